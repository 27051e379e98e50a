"""Changing nnU-Net's list of training transforms instead of copying it.

What nnU-Net does for the cascade, masks, regions and deep supervision stays, in whatever version it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import (
    BrightnessAdditiveTransform,
    MultiplicativeBrightnessTransform,
)
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.local.brightness_gradient import BrightnessGradientAdditiveTransform
from batchgeneratorsv2.transforms.local.local_gamma import LocalGammaTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform

#: What nnU-Net does to values.
INTENSITY = (
    GaussianNoiseTransform,
    GaussianBlurTransform,
    MultiplicativeBrightnessTransform,
    ContrastTransform,
    SimulateLowResolutionTransform,
    GammaTransform,
)

#: What changes the scale of values and not only what a scanner does to them; some of it DA5's.
RESCALING = (
    MultiplicativeBrightnessTransform,
    BrightnessAdditiveTransform,
    BrightnessGradientAdditiveTransform,
    ContrastTransform,
    GammaTransform,
    LocalGammaTransform,
)
_LABELS = (MaskImageTransform, RemoveLabelTansform)


def is_a(transform: BasicTransform, kinds: Sequence[type[BasicTransform]]) -> bool:
    """Whether a transform is of some kinds, applied always, now and then, or as one of several."""
    if isinstance(transform, RandomTransform):
        return is_a(transform.transform, kinds)
    if isinstance(transform, OneOfTransform):
        return any(is_a(item, kinds) for item in transform.list_of_transforms)
    return isinstance(transform, tuple(kinds))


def without(transforms: ComposeTransforms, kinds: Sequence[type[BasicTransform]]) -> ComposeTransforms:
    """Return the transforms that are of none of some kinds."""
    return ComposeTransforms([t for t in transforms.transforms if not is_a(t, kinds)])


def with_spatial(transforms: ComposeTransforms, **changes: Any) -> ComposeTransforms:
    """Return the transforms with other settings of nnU-Net's ``SpatialTransform``.

    Raises:
        ValueError: there is not exactly one, or it has no such setting: this nnU-Net builds its transforms otherwise.
    """
    found = [t for t in transforms.transforms if isinstance(t, SpatialTransform)]
    unknown = [name for name in changes if found and not hasattr(found[0], name)]
    if len(found) != 1 or unknown:
        raise ValueError(f"nnU-Net has {len(found)} SpatialTransforms here, which do not know {unknown}: report it")
    for name, value in changes.items():
        setattr(found[0], name, value)
    return transforms


def after_spatial(transforms: ComposeTransforms, *added: BasicTransform) -> ComposeTransforms:
    """Return the transforms with further ones after rotation, scaling and cropping, before intensities change."""
    last = max(
        (i for i, t in enumerate(transforms.transforms) if isinstance(t, (SpatialTransform, Convert2DTo3DTransform))),
        default=-1,
    )
    return ComposeTransforms([*transforms.transforms[: last + 1], *added, *transforms.transforms[last + 1 :]])


def after_intensity(transforms: ComposeTransforms, *added: BasicTransform) -> ComposeTransforms:
    """Return the transforms with further ones after all that change values, before masks and labels are dealt with."""
    first = next((i for i, t in enumerate(transforms.transforms) if is_a(t, _LABELS)), len(transforms.transforms))
    return ComposeTransforms([*transforms.transforms[:first], *added, *transforms.transforms[first:]])


def wrapped(
    transforms: ComposeTransforms,
    kinds: Sequence[type[BasicTransform]],
    wrap: Callable[[BasicTransform], BasicTransform],
) -> ComposeTransforms:
    """Return the transforms with every one of some kinds put into a wrapper."""
    return ComposeTransforms([wrap(t) if is_a(t, kinds) else t for t in transforms.transforms])
