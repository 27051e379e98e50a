"""Noise of a PET."""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform


class UptakeNoiseTransform(ImageOnlyTransform):
    """Add noise whose variance is in proportion to the uptake, as counting statistics have it; SUV keeps its mean.

    Zero uptake is where the patch is lowest: what normalisation made of SUV 0 is not known here, and air is nearly
    always in a patch.

    Args:
        channel: of the PET.
        strength: range of the noise's standard deviation where the uptake is one (in normalised units) above zero.
    """

    def __init__(self, channel: int, strength: tuple[float, float] = (0.0, 0.1)) -> None:
        super().__init__()
        if not 0.0 <= strength[0] <= strength[1]:
            raise ValueError(f"strength is {strength}: two numbers from 0 on, the lower first, are needed")
        self.channel, self.strength = channel, strength

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Return the strength for a sample."""
        low, high = self.strength
        return {"strength": low + (high - low) * torch.rand(1).item()}

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        pet = img[self.channel]
        uptake = pet - pet.min()
        img[self.channel] = pet + params["strength"] * uptake.sqrt() * torch.randn_like(pet)
        return img
