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
    batch, channels, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    x, step = u.to(kind), delta.to(kind)
    if delta_bias is not None:
        step = step + delta_bias.to(kind)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    # Groups are an axis of their own: a group's B and C serve all its channels without being repeated.
    grouped = (batch, groups, channels // groups, length)
    decay_rate = A.to(kind).reshape(groups, channels // groups, states)
    inputs = ((step * x).reshape(grouped), step.reshape(grouped), B.to(kind), C.to(kind))
    state = x.new_zeros(*grouped[:3], states)
    outputs = []
    # unbind, not indexing: the backward pass of every single index would fill a tensor of the whole length.
    for drive_t, step_t, b_t, c_t in zip(*(t.unbind(-1) for t in inputs), strict=True):
        state = torch.exp(step_t[..., None] * decay_rate) * state + drive_t[..., None] * b_t[:, :, None]
        outputs.append((state * c_t[:, :, None]).sum(-1).flatten(1))
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + D.to(kind)[:, None] * x
    return y.to(u.dtype)
