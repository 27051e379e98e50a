"""A transform of some of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform


class OnChannelsTransform(BasicTransform):
    """Apply a transform of images to some channels and leave the others as they are.

    Args:
        transform: of images; it sees the channels alone.
        channels: numbers of those.
    """

    def __init__(self, transform: BasicTransform, channels: Sequence[int]) -> None:
        super().__init__()
        self.transform, self.channels = transform, list(channels)

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Return the sample with these channels changed."""
        image = data_dict["image"]
        image[self.channels] = self.transform(image=image[self.channels])["image"]
        return data_dict
