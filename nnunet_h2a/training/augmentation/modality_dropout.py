"""A modality that is missing now and then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform


class ModalityDropoutTransform(ImageOnlyTransform):
    """Replace all of one channel by a constant.

    At most one channel of a sample is replaced, so that there is always something to see.

    Args:
        channels: those that may be missing.
        probability: of a sample missing one of them, each as often as the other.
        value: what stands for a missing channel, after normalisation; the same is to be fed at inference.
    """

    def __init__(self, channels: Sequence[int], probability: float, value: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability is {probability}: 0 to 1 is needed")
        self.channels, self.probability, self.value = tuple(channels), probability, value

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Return the channel to replace, None for none."""
        if torch.rand(1).item() >= self.probability:
            return {"channel": None}
        return {"channel": self.channels[int(torch.randint(len(self.channels), (1,)))]}

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        if params["channel"] is not None:
            img[params["channel"]] = self.value
        return img
