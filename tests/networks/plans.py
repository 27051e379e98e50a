"""Plans as nnU-Net writes them, small enough for a CPU: what every network must cope with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Plan:
    """Geometry of a plan and the kind of labels."""

    patch: tuple[int, ...]
    features: tuple[int, ...]
    strides: tuple
    kernel_sizes: Any = 3
    num_classes: int = 2
    region_based: bool = False
    input_channels: int = 2

    def keywords(self, **overrides: Any) -> dict[str, Any]:
        """Constructor arguments in dynamic-network-architectures' names."""
        return {
            "input_channels": self.input_channels,
            "n_stages": len(self.features),
            "features_per_stage": list(self.features),
            "conv_op": nn.Conv2d if len(self.patch) == 2 else nn.Conv3d,
            "kernel_sizes": self.kernel_sizes,
            "strides": list(self.strides),
            "num_classes": self.num_classes,
            "patch_size": list(self.patch),
            "region_based": self.region_based,
            **overrides,
        }

    def input(self, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        """Normalised images: mostly within a few standard deviations, with hot spots far outside."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, self.input_channels, *self.patch, generator=generator)
        x[:, 1].clamp_(min=-0.5)
        x[(slice(None), 1, *(slice(0, 3) for _ in self.patch))] = 40.0
        return x.to(dtype)


PLANS = {
    "paper strides": Plan((16, 32, 32), (4, 4, 8, 8, 8), (1, 2, 2, 2, 2)),
    "three stages": Plan((16, 16, 24), (4, 8, 8), (1, 2, 2)),
    "anisotropic 28x64x56": Plan(
        (28, 64, 56), (2, 2, 4, 4), ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
        kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)), num_classes=3,
    ),
    "anisotropic 12x32x24": Plan(
        (12, 32, 24), (2, 2, 4), ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)), num_classes=3,
    ),
    "seven stages": Plan(
        (8, 128, 128), (2, 2, 2, 4, 4, 4, 4),
        ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)),
        kernel_sizes=((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    ),
    "regions": Plan((16, 16, 16), (4, 4, 8, 8), (1, 2, 2, 2), num_classes=3, region_based=True),
    "one class": Plan((16, 16, 16), (4, 4, 8), (1, 2, 2), num_classes=1),
    "cascade": Plan((16, 16, 16), (4, 4, 8), (1, 2, 2), num_classes=3, input_channels=4),
    "2d": Plan((64, 96), (4, 4, 8, 8, 8), (1, 2, 2, 2, 2)),
    "2d seven stages": Plan((128, 192), (2, 2, 4, 4, 4, 4, 4), (1, 2, 2, 2, 2, 2, 2), num_classes=3),
    "2d anisotropic": Plan((40, 64), (4, 4, 8, 8), ((1, 1), (2, 2), (2, 2), (1, 2)), kernel_sizes=(3, 3, 5, 3)),
    "2d 36x44": Plan((36, 44), (2, 2, 4), (1, 2, 2)),
}  # fmt: skip
