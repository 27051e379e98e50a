"""The memory order of the chunked scan's gradients is the one promised to the compiler."""

from __future__ import annotations

import pytest
import torch

import nnunet_h2a.networks.selective_scan.chunked  # noqa: F401


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_contiguous(groups):
    d, n, length = 4, 3, 10
    u, delta, dy = (torch.rand(2, d, length) for _ in range(3))
    A, B, C = -torch.rand(d, n), torch.rand(2, groups, n, length), torch.rand(2, groups, n, length)
    D, bias = torch.rand(d), torch.rand(d)
    inputs = (u, delta, A, B, C, D, bias)
    _, kept = torch.ops.nnunet_h2a.selective_scan_chunked(*inputs, True, True)
    gradients = torch.ops.nnunet_h2a.selective_scan_chunked_backward(dy, kept, *inputs, True)
    assert [g.stride() for g in gradients] == [t.stride() for t in inputs]
