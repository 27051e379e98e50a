"""The residual blocks of H2ASeg's backbone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from nnunet_h2a.networks.precision import InstanceNorm, convolution


def same_conv(
    conv_op: type[nn.Module],
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] | int = 1,
) -> nn.Module:
    """A convolution with bias whose padding keeps the map's size at stride 1 (odd kernels)."""
    padding = [k // 2 for k in kernel_size]
    return convolution(conv_op, in_channels, out_channels, tuple(kernel_size), stride, padding, bias=True)


class ResidualBlock(nn.Module):
    """Residual block of H2ASeg: main path + skip path, nothing after the sum.

    Main: InstanceNorm, PReLU, convolution (stride), InstanceNorm, PReLU, convolution.
    Skip: InstanceNorm, PReLU, convolution (stride). ``stem=True`` is the form of the first level, which sees raw
    images: its first convolution and its skip convolution have no norm and activation before them.

    The paper (Lu et al., MICCAI 2024, section 2) names a dual-branch residual U-Net only; the form is that of the
    released code, without its dropout of 0.5 after the first convolution (the paper has none).

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: per axis, odd.
        stride: per axis.
        stem: the first level's form.

    Shapes:
        (batch, in_channels, spatial...) to (batch, out_channels, spatial / stride ...).
    """

    def __init__(
        self,
        conv_op: type[nn.Module],
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int] | int = 1,
        stem: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels

        def before() -> list[nn.Module]:
            return [] if stem else [InstanceNorm(), nn.PReLU()]

        self.main = nn.Sequential(
            *before(),
            same_conv(conv_op, in_channels, out_channels, kernel_size, stride),
            InstanceNorm(),
            nn.PReLU(),
            same_conv(conv_op, out_channels, out_channels, kernel_size),
        )
        self.skip = nn.Sequential(*before(), same_conv(conv_op, in_channels, out_channels, kernel_size, stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.skip(x)

    def compute_conv_feature_map_size(self, map_size: Sequence[int]) -> int:
        """Elements that the three convolutions write for one sample; ``map_size`` is the output's."""
        return 3 * self.out_channels * int(np.prod(map_size))
