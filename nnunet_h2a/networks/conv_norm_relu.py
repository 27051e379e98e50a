"""The convolution, InstanceNorm, ReLU of ISA-Net's blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from nnunet_h2a.networks.precision import InstanceNorm, convolution


def conv_norm_relu(
    conv_op: type[nn.Module], in_channels: int, out_channels: int, kernel_size: Sequence[int]
) -> nn.Sequential:
    """ReLU(InstanceNorm(convolution)), of the input's size (odd kernels).

    InstanceNorm has a learned scale and shift. The convolution has no bias: the norm would take it away again.
    """
    padding = tuple(k // 2 for k in kernel_size)
    return nn.Sequential(
        convolution(conv_op, in_channels, out_channels, tuple(kernel_size), 1, padding, bias=False),
        InstanceNorm(channels=out_channels),
        nn.ReLU(),
    )
