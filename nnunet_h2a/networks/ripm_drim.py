"""ISA-Net's levels: the residual module, and with the attention module the encoder's RIPM and the decoder's DRIM."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_h2a.networks.conv_norm_relu import conv_norm_relu
from nnunet_h2a.networks.isa import ISA
from nnunet_h2a.networks.plan_geometry import spatial_dims


class ResidualModule(nn.Module):
    """ISA-Net's residual module: two residual blocks, no activation after a sum.

    Huang et al., "ISA-Net" (arXiv 2211.02256), equation 1: block = ReLU(InstanceNorm(conv X)) + shortcut, where the
    shortcut is ReLU(InstanceNorm(1x1x1 conv X)) in the first block and the identity in the second. The equation has
    the pooling inside; here the level's input is pooled before the module. InstanceNorm's learned scale and shift
    and convolutions without bias are the released code's, which has one block per decoder level.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: per axis, odd.

    Shapes:
        (batch, in_channels, spatial...) to (batch, out_channels, spatial...).
    """

    def __init__(
        self, conv_op: type[nn.Module], in_channels: int, out_channels: int, kernel_size: Sequence[int]
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.first = conv_norm_relu(conv_op, in_channels, out_channels, kernel_size)
        self.shortcut = conv_norm_relu(conv_op, in_channels, out_channels, (1,) * len(kernel_size))
        self.second = conv_norm_relu(conv_op, out_channels, out_channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.shortcut(x)
        return self.second(x) + x

    def compute_conv_feature_map_size(self, map_size: Sequence[int]) -> int:
        """Elements that the three convolutions write for one sample."""
        return 3 * self.out_channels * math.prod(map_size)


class RIPM(nn.Module):
    """One level of the encoder: maximum pooling of what comes from above, residual module, ISA module.

    Huang et al., "ISA-Net", section 2. The paper draws the pooling at the end of a level; it is the next level's
    first step here, so that the output is the skip and every level is alike. Pooling has kernel = stride = the
    plan's stride of the level, so that an axis with stride 1 is not pooled.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        in_channels: channels of the level above.
        out_channels: channels of this level.
        kernel_size: per axis, odd.
        stride: of the pooling, per axis; 1 for the first level.

    Shapes:
        (batch, in_channels, spatial...) to (batch, out_channels, spatial / stride ...).
    """

    def __init__(
        self,
        conv_op: type[nn.Module],
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
    ) -> None:
        super().__init__()
        pool = {2: nn.MaxPool2d, 3: nn.MaxPool3d}[spatial_dims(conv_op)]
        self.pool = nn.Identity() if all(s == 1 for s in stride) else pool(tuple(stride))
        self.residual = ResidualModule(conv_op, in_channels, out_channels, kernel_size)
        self.isa = ISA(conv_op, out_channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.isa(self.residual(self.pool(x)))

    def compute_conv_feature_map_size(self, map_size: Sequence[int]) -> int:
        """Elements that convolutions and matrix product write for one sample; ``map_size`` is the output's."""
        return sum(part.compute_conv_feature_map_size(map_size) for part in (self.residual, self.isa))


class DRIM(nn.Module):
    """One level of the decoder: deconvolution, concatenation, residual module, ISA module.

    Huang et al., "ISA-Net", section 2. The deconvolution has kernel = stride (the paper does not say; the released
    code has 3x3x3) and gives the level's channels, as each map that it is concatenated with has.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        in_channels: channels of the level below.
        out_channels: C of this level.
        kernel_size: per axis, odd.
        stride: of the deconvolution, per axis: the stride of the level below.
        other_maps: number of maps that are concatenated with the deconvolved one.

    Shapes:
        ``below`` (batch, in_channels, spatial / stride ...), each of ``others`` (batch, C, spatial...);
        returns (batch, C, spatial...).
    """

    def __init__(
        self,
        conv_op: type[nn.Module],
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        other_maps: int,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        deconvolution = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[spatial_dims(conv_op)]
        self.upsample = deconvolution(in_channels, out_channels, tuple(stride), tuple(stride))
        self.residual = ResidualModule(conv_op, (1 + other_maps) * out_channels, out_channels, kernel_size)
        self.isa = ISA(conv_op, out_channels, kernel_size)

    def forward(self, below: Tensor, *others: Tensor) -> Tensor:
        return self.isa(self.residual(torch.cat([self.upsample(below), *others], dim=1)))

    def compute_conv_feature_map_size(self, map_size: Sequence[int]) -> int:
        """Elements that convolutions and matrix product write for one sample; ``map_size`` is the output's."""
        deconvolved = self.out_channels * math.prod(map_size)
        return deconvolved + sum(p.compute_conv_feature_map_size(map_size) for p in (self.residual, self.isa))
