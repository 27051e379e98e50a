"""CIPA's channel-wise rectification module (CRM), and its weights on maps of another size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_h2a.networks.ss2d import SS1D


def resize_map_weights(weight: Tensor, old_map: Sequence[int], new_map: Sequence[int]) -> Tensor:
    """Carry weights that belong to the positions of a map over to a map of another size by linear interpolation.

    Args:
        weight: (positions), one value per position of the map (LayerNorm's weight and bias): interpolated; or
            (rows, positions), a linear layer over the map: the layer that answers to a map of the new size as the old
            one answers to that map interpolated to the old size. A row's sum is kept.
        old_map: the map that ``weight`` belongs to, row-major.
        new_map: the map wanted; as many axes.

    Returns:
        (new positions) or (rows, new positions), in ``weight``'s type.

    Raises:
        ValueError: where ``weight`` does not have the old map's positions, or the maps are not both 2D or both 3D.
    """
    old, new = math.prod(old_map), math.prod(new_map)
    if len(old_map) != len(new_map) or len(new_map) not in (2, 3):
        raise ValueError(f"the maps must both have 2 or both have 3 axes, got {list(old_map)} and {list(new_map)}")
    if weight.dim() not in (1, 2) or weight.shape[-1] != old:
        raise ValueError(f"a weight of shape {list(weight.shape)} is not one over a map of {list(old_map)}")
    resized = weight.detach().to(torch.float64).reshape(-1, *old_map)
    for axis, (before, after) in enumerate(zip(old_map, new_map, strict=True), start=1):
        # A layer's weights are carried by the transpose of what carries the map back.
        carry = interpolation(before, after) if weight.dim() == 1 else interpolation(after, before).T
        resized = (resized.movedim(axis, -1) @ carry.T).movedim(-1, axis)
    return resized.reshape(*weight.shape[:-1], new).to(weight.dtype)


def interpolation(old: int, new: int) -> Tensor:
    """The matrix (new, old) that interpolates ``old`` values on a line linearly to ``new``, in float64.

    Where the line gets shorter, each new value is a mean over all that it stands for (antialiased): single old ones
    would be noise.
    """
    lines = torch.eye(old, dtype=torch.float64).reshape(1, old, 1, old)
    lines = F.interpolate(lines, size=(1, new), mode="bilinear", align_corners=False, antialias=True)
    return lines.reshape(old, new).T


def guess_map(positions: int, like: Sequence[int]) -> tuple[int, ...] | None:
    """The map that ``positions`` weights belong to: one of ``like``'s aspect, else a square (cube), else None."""
    dims = len(like)
    scale = (positions / math.prod(like)) ** (1 / dims)
    guess = tuple(round(n * scale) for n in like)
    same_aspect = all(g * like[0] == guess[0] * n for g, n in zip(guess, like, strict=True))
    if same_aspect and math.prod(guess) == positions:
        return guess
    side = round(positions ** (1 / dims))
    return (side,) * dims if side**dims == positions else None


class CRM(nn.Module):
    """Channel-wise rectification: a weight for each channel of either modality from the map it draws.

    Mei et al., CVPR 2025 (arXiv 2503.17261), section 3.2, equations 2 to 5. The channels of both modalities, CT's
    first, are a row of 2C tokens, each as long as its map: LayerNorm and linear layer over the map, GELU, a scan along
    the channels (:class:`SS1D`), LayerNorm, linear layer to one number, sigmoid: W; then X_rec = X + W X.

    Differs from the paper's equation 5, X_rec = W X: the form is the released code's, which its weights belong to.

    The first two layers have a weight per position of the map, so they depend on the patch size. Weights of another
    map size are interpolated when they are loaded (:func:`resize_map_weights`), with a warning. The map is guessed
    from the number of positions, so another map of as many positions (8 x 32 for 16 x 16) is not noticed.

    Args:
        map_size: of the maps.
        width: of the tokens after the first linear layer, 96 in the paper.
        scan_backend: see :class:`SelectiveScanBlock`.

    Shapes:
        ``ct`` and ``pet`` (batch, map_size..., C), any C; returns both, rectified.
    """

    #: Layers of ``mlp`` whose weights belong to positions of the map.
    MAP_WEIGHTS = ("mlp.0.weight", "mlp.0.bias", "mlp.1.weight")

    def __init__(self, map_size: Sequence[int], width: int = 96, scan_backend: str = "auto") -> None:
        super().__init__()
        self.map_size = tuple(map_size)
        positions = math.prod(self.map_size)
        self.mlp = nn.Sequential(
            nn.LayerNorm(positions),
            nn.Linear(positions, width),
            nn.GELU(),
            SS1D(width, scan_backend=scan_backend),
            nn.LayerNorm(width),
            nn.Linear(width, 1),
            nn.Sigmoid(),
        )

    def forward(self, ct: Tensor, pet: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([m.flatten(1, -2).transpose(1, 2) for m in (ct, pet)], dim=1)
        weights = self.mlp(tokens).reshape(ct.shape[0], 2, *[1] * len(self.map_size), ct.shape[-1])
        return ct + weights[:, 0] * ct, pet + weights[:, 1] * pet

    def compute_conv_feature_map_size(self, channels: int) -> int:
        """Elements that linear layers and scan write for one sample with ``channels`` channels per modality."""
        tokens = 2 * channels
        return tokens * (self.mlp[1].out_features + 1) + self.mlp[3].compute_conv_feature_map_size(tokens)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        positions = math.prod(self.map_size)
        for name in self.MAP_WEIGHTS:
            weight = state_dict.get(prefix + name)
            if weight is None or weight.dim() not in (1, 2) or weight.shape[-1] == positions:
                continue
            old_map = guess_map(weight.shape[-1], self.map_size)
            if old_map is None:
                raise ValueError(
                    f"{prefix + name} has {weight.shape[-1]} positions: neither a map with the aspect "
                    f"of this network's {list(self.map_size)} nor a square or cubic one, so it cannot be adapted to "
                    "this patch size"
                )
            warnings.warn(
                f"{prefix + name} belongs to a map of {list(old_map)} and is interpolated to {list(self.map_size)}: "
                "the weights come from a network of another patch size",
                stacklevel=2,
            )
            state_dict[prefix + name] = resize_map_weights(weight, old_map, self.map_size)
        super()._load_from_state_dict(state_dict, prefix, *args)
