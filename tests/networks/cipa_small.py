"""CIPA small enough for a CPU, and its weights and inputs at random, for several test modules."""

from __future__ import annotations

import torch
from torch import nn

from nnunet_h2a.networks import CIPA

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
SMALL = {"widths": (4, 6, 8, 12), "depths": (1, 1, 2, 1), "decoder_depth": 1}


def build(patch=(64, 64), num_classes=2, input_channels=2, strides=(1, 2, 2, 2, 2, 2), **options):
    """A small network as nnU-Net would initialise it."""
    torch.manual_seed(0)
    conv_op = CONV[2 if patch is None else len(patch)]
    network = CIPA(
        input_channels, len(strides), 32, conv_op, 3, strides, num_classes, patch_size=patch, **{**SMALL, **options}
    )
    return network.apply(network.initialize)


def randomise(module: nn.Module) -> nn.Module:
    """Every parameter and statistic random, so that none hides at 0 or 1, in float64 and evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + ("var" in name))
    return module.double().eval()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def to_maps(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(-1, 1)


def to_tokens(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1)
