"""Numerics that networks share: instance statistics on any map, and leaving autocast where it would lose digits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

#: A map whose variance is below this fraction of eps is constant but for rounding.
CONSTANT = 1e-4


class _Normalise(torch.autograd.Function):
    """Instance normalisation whose derivative is 0 on constant maps; everywhere else it is PyTorch's own."""

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the normalised maps, and for each its mean and one over its deviation."""
        maps = x.reshape(1, -1, *x.shape[2:])
        # A scale in float32 makes PyTorch hand out mean and deviation in float32 for half-precision maps too.
        one = maps.new_ones(maps.shape[1], dtype=wide(maps[:, :0]).dtype)
        y, mean, scale = torch.native_batch_norm(maps, one, torch.zeros_like(one), None, None, True, 0.0, eps)
        return y.view(x.shape), mean, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.eps = inputs
        _, mean, scale = output
        ctx.mark_non_differentiable(mean, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        if dy is None:
            return None, None
        x, mean, scale = ctx.saved_tensors
        constant = scale * ctx.eps**0.5 > 1 - CONSTANT / 2
        maps = (1, -1, *x.shape[2:])
        dx, _, _ = torch.ops.aten.native_batch_norm_backward(
            dy.reshape(maps), x.reshape(maps), torch.ones_like(scale), None, None, mean, scale.masked_fill(constant, 0),
            True, ctx.eps, [True, False, False],
        )  # fmt: skip
        return dx.view(x.shape), None


class Conv3d(nn.Conv3d):
    """``nn.Conv3d`` that survives half precision on a CPU; on other devices, and in 2D, nothing is amiss.

    PyTorch's CPU build (seen with 2.15) computes the gradient of a half-precision 3D convolution over a map that is
    smaller than the kernel from memory that is not the map's: it is NaN now and then, and can end the process. Such
    maps, and to be safe those of up to twice the kernel, are convolved in float32, and the result is of the type it
    would have been. CIPA's convolutions have :func:`nnunet_h2a.networks.ss2d.convolve` instead, because they also
    need a memory order.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or all(n >= 2 * k for n, k in zip(x.shape[2:], self.kernel_size, strict=True)):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if dtype not in (torch.float16, torch.bfloat16):
            return super().forward(x)
        with without_autocast(x):
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(x.float(), self.weight.float(), bias).to(dtype)


def convolution(conv_op: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """``conv_op(*args, **kwargs)``, in 3D as :class:`Conv3d`."""
    return (Conv3d if conv_op is nn.Conv3d else conv_op)(*args, **kwargs)


class InstanceNorm(nn.Module):
    """Instance normalisation for maps of any size.

    The same numbers as ``nn.InstanceNorm2d/3d``. Unlike these it accepts a map of one voxel, whose
    normalised value is 0 but for rounding: plans with many poolings and a small patch reach it at their deepest level.
    PyTorch's kernel keeps mean and variance in float32 for fp16 and bf16 maps.

    Without a learned scale, constant maps pass no gradient back. Their value is 0, whatever comes in, but the
    derivative there is 1 / sqrt(eps) = 316 in every norm: over a network of fourteen, a patch that is 0 throughout (air
    outside of nnU-Net's mask, a modality that is missing) gave gradients of 1e27, and infinite ones in float16.

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
        exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
        if self.weight is None and not exporting:
            return _Normalise.apply(x, self.eps)[0]
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
