"""The selective scan as one loop node in an exported graph, instead of every step's operations one after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

#: From this release on ``torch.onnx.export`` writes PyTorch's scan operator as an ONNX ``Scan`` node.
FIRST_TORCH = "2.9"


def available() -> bool:
    """Whether the export under way can hold the loop.

    Older releases and the exporter that traces (``torch.onnx.export(..., dynamo=False)``) have to unroll the reference.
    """
    return torch.compiler.is_exporting() and TorchVersion(torch.__version__) >= FIRST_TORCH


def export_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """The reference's recurrence, with its step as the body of PyTorch's scan operator.

    A graph's size then does not depend on the length: ``torch.onnx.export`` writes an ONNX ``Scan`` node of 9 inner
    nodes, where the unrolled reference has 21 nodes for each step. Arguments and result are those of
    :func:`nnunet_h2a.networks.selective_scan.selective_scan`; no gradients are meant to pass.
    """
    # Imported here: the module is PyTorch's own and loads its compiler, which nothing but an export needs.
    from torch._higher_order_ops.scan import scan_op

    kind = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, channels, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    x, step = u.to(kind), delta.to(kind)
    if delta_bias is not None:
        step = step + delta_bias.to(kind)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    # Groups are an axis of their own, so that B and C, which a group's channels share, need not be repeated.
    decay_rate = A.to(kind).reshape(groups, channels // groups, states)

    def steps_first(t: Tensor) -> Tensor:
        return t.reshape(batch, groups, channels // groups, length).permute(3, 0, 1, 2)

    b, c = (m.to(kind).permute(3, 0, 1, 2)[:, :, :, None] for m in (B, C))

    def advance(state: Tensor, step_t: Tensor, drive_t: Tensor, b_t: Tensor, c_t: Tensor, rate: Tensor) -> list[Tensor]:
        state = torch.exp(step_t[..., None] * rate) * state + drive_t[..., None] * b_t
        return [state, (state * c_t).sum(-1)]

    start = x.new_zeros(batch, groups, channels // groups, states)
    # The operator itself and not the function around it, which would start the compiler inside of the export.
    _, y = scan_op(advance, (start,), (steps_first(step), steps_first(step * x), b, c), (decay_rate,))
    y = y.permute(1, 2, 3, 0).reshape(batch, channels, length)
    if D is not None:
        y = y + D.to(kind)[:, None] * x
    return y.to(u.dtype)
