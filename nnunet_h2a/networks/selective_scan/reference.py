"""The selective scan as its recurrence reads, one step after the other: the yardstick for every other backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t and y_t = C_t h_t + D u_t by autograd's own operations.

    For tests and for export (every step becomes nodes of the graph). Autograd keeps every step's state, so memory is
    O(batch d N L). Arguments and result are those of :func:`nnunet_h2a.networks.selective_scan.selective_scan`.
    """
    kind = torch.float64 if u.dtype == torch.float64 else torch.float32
    channels, groups = u.shape[1], B.shape[1]
    x, step = u.to(kind), delta.to(kind)
    if delta_bias is not None:
        step = step + delta_bias.to(kind)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    decay_rate = A.to(kind)
    # A group's B and C serve all its channels: (batch, d, N, L).
    b, c = (m.to(kind).repeat_interleave(channels // groups, dim=1) for m in (B, C))
    state = x.new_zeros(x.shape[0], channels, A.shape[1])
    outputs = []
    # unbind, not indexing: the backward pass of every single index would fill a tensor of the whole length.
    for u_t, step_t, b_t, c_t in zip(x.unbind(-1), step.unbind(-1), b.unbind(-1), c.unbind(-1), strict=True):
        state = torch.exp(step_t[..., None] * decay_rate) * state + (step_t * u_t)[..., None] * b_t
        outputs.append((state * c_t).sum(-1))
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + D.to(kind)[:, None] * x
    return y.to(u.dtype)
