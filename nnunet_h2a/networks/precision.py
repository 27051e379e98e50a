"""Numerics that networks share: instance statistics on any map, and leaving autocast where it would lose digits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


class InstanceNorm(nn.Module):
    """Instance normalisation for maps of any size.

    The same numbers as ``nn.InstanceNorm2d/3d``. Unlike these it accepts a map of one voxel, whose
    normalised value is 0: plans with many poolings and a small patch reach it at their deepest level.
    PyTorch's kernel keeps mean and variance in float32 for fp16 and bf16 maps.

    Args:
        eps: added to the variance.
        channels: of the maps, for a learned scale and shift of each (``affine=True``); None for neither.

    Shapes:
        input and output (batch, channels, spatial...).
    """

    def __init__(self, eps: float = 1e-5, channels: int | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = None if channels is None else nn.Parameter(torch.ones(channels))
        self.bias = None if channels is None else nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.instance_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, True)

    def extra_repr(self) -> str:
        return f"eps={self.eps}" if self.weight is None else f"eps={self.eps}, channels={len(self.weight)}"


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which operations on ``x``'s device keep the type of their inputs."""
    if x.device.type in ("cpu", "cuda"):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
