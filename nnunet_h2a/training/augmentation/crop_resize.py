"""A random part of the patch, enlarged to the whole."""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from torch import nn

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class CropResizeTransform(BasicTransform):
    """Cut a box of the same shape from a random place and enlarge it to the patch.

    Mei et al., CVPR 2025, section 4: square crops of 0.7 to 0.9 of the image, resized back.

    Args:
        scale: range of the box's edge, in parts of the patch's.
    """

    def __init__(self, scale: tuple[float, float] = (0.7, 0.9)) -> None:
        super().__init__()
        if not 0.0 < scale[0] <= scale[1] <= 1.0:
            raise ValueError(f"scale is {scale}: two numbers above 0, at most 1, the lower first, are needed")
        self.scale = scale

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Return where the box begins and its size, in voxels."""
        shape = data_dict["image"].shape[1:]
        part = self.scale[0] + (self.scale[1] - self.scale[0]) * torch.rand(1).item()
        size = [max(1, round(part * n)) for n in shape]
        return {"box": [(int(torch.randint(n - s + 1, (1,))), s) for n, s in zip(shape, size, strict=True)]}

    def _resized(self, values: torch.Tensor, box: list[tuple[int, int]], mode: str) -> torch.Tensor:
        part = values[(slice(None), *(slice(start, start + size) for start, size in box))]
        align = None if mode == "nearest-exact" else False
        return nn.functional.interpolate(part[None], values.shape[1:], mode=mode, align_corners=align)[0]

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        return self._resized(img, params["box"], _LINEAR[img.ndim - 1])

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **params: Any) -> torch.Tensor:
        resized = self._resized(segmentation.float(), params["box"], "nearest-exact")
        return resized.to(segmentation.dtype)
