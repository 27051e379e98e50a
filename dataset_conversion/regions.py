"""Axis-parallel boxes in the patient's coordinates, and the parts of grids inside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dataset_conversion import resampling
from dataset_conversion.errors import ConversionError
from dataset_conversion.resampling import Grid

if TYPE_CHECKING:
    import SimpleITK as sitk

#: Head-and-neck box in mm, x, y, z: what holds skull base to clavicle, and the winners of 2022 used.
HEAD_NECK_MM = (200.0, 200.0, 310.0)
_BRAIN_SUV = 3.0
_BRAIN_ML = 200.0
# Raised arms reach this far above the head at the most; the brain fills this part of the body's cross-section.
_BRAIN_BELOW_TOP_MM = 500.0
_BRAIN_SHARE = 0.35
_BODY_SUV = 0.4
_BODY_ML_PER_MM = 2.0
_ABOVE_BRAIN_MM = 10.0
_WORKING_MM = 5.0


def extent(image: sitk.Image | Grid) -> np.ndarray:
    """Return the box of an image, voxels' edges included: shape (2, 3), lowest and highest x, y, z in mm, LPS.

    Raises:
        ConversionError: the axes are oblique, so that boxes do not fit.
    """
    if resampling.is_oblique(image):
        raise ConversionError("the grid is oblique to the patient's axes", "use --crop none and no --spacing")
    points = resampling.corners(image)
    steps = np.abs(np.array(image.GetDirection()).reshape(3, 3)) @ np.array(image.GetSpacing())
    return np.stack([points.min(axis=0) - steps / 2, points.max(axis=0) + steps / 2])


def intersection(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the box common to two boxes; where there is none, its highest corner is below its lowest."""
    return np.stack([np.maximum(first[0], second[0]), np.minimum(first[1], second[1])])


def cropped(grid: Grid, box: np.ndarray) -> Grid:
    """Return the part of a grid whose voxel centres lie in a box.

    Raises:
        ConversionError: none does.
    """
    extent(grid)
    index = resampling.to_index(grid, box)
    low = np.maximum(np.ceil(index.min(axis=0) - 1e-6), 0).astype(int)
    high = np.minimum(np.floor(index.max(axis=0) + 1e-6), np.array(grid.size) - 1).astype(int)
    if (high < low).any():
        raise ConversionError("no voxel lies in the box it is to be cropped to", "check the box and the geometry")
    return resampling.part_of(grid, low, high - low + 1)


def grid_in(box: np.ndarray, spacing: tuple[float, float, float]) -> Grid:
    """Return the grid of a spacing whose voxels fill a box, axes along the patient's (LPS)."""
    step = np.array(spacing)
    size = np.maximum(np.round((box[1] - box[0]) / step), 1).astype(int)
    origin = (box[0] + box[1]) / 2 - (size - 1) / 2 * step
    return Grid(tuple(size.tolist()), tuple(step.tolist()), tuple(origin.tolist()), tuple(np.eye(3).ravel().tolist()))


def working_grid(grid: sitk.Image | Grid) -> Grid:
    """Return the grid that ``head_and_neck`` wants a PET on, from its own."""
    return grid_in(extent(grid), (_WORKING_MM,) * 3)


def head_and_neck(smooth: sitk.Image) -> tuple[np.ndarray, str]:
    """Find head and neck in a PET: from the top of the brain down, centred on it.

    The brain is the uppermost connected volume of at least 200 ml with SUV of 3 or more that begins within 500 mm of
    the top of the body (SUV of 0.4 or more) and fills 35 % of its cross-section. Where there is none (a field of view
    that begins below it, another tracer) the uppermost part of the body takes its place.

    Args:
        smooth: SUV on ``working_grid``.

    Returns:
        The box, shape (2, 3), mm, LPS, 200 x 200 x 310 mm; and in words what it was found by.

    Raises:
        ConversionError: nothing in the image takes up tracer.
    """
    import SimpleITK as sitk

    values = sitk.GetArrayViewFromImage(smooth)
    found = _brain(values)
    how = "the brain"
    if found is None:
        how = "the top of the body (no brain was found)"
        found = _top_of_body(values >= _BODY_SUV)
    if found is None:
        raise ConversionError("its PET shows no body", "check its values: SUV is expected", None)
    x, y, top = smooth.TransformContinuousIndexToPhysicalPoint(found)
    half = np.array(HEAD_NECK_MM[:2]) / 2
    high = top + _ABOVE_BRAIN_MM + _WORKING_MM / 2
    return np.array([[x - half[0], y - half[1], high - HEAD_NECK_MM[2]], [x + half[0], y + half[1], high]]), how


def _brain(values: np.ndarray) -> tuple[float, float, float] | None:
    """Return centre x and y and highest z (indices) of the brain, None where none is found.

    Heart, liver and bladder may be as large and as hot, but they lie lower or fill less of the body's cross-section.
    """
    import cc3d

    top = _top_of_body(values >= _BODY_SUV)
    if top is None:
        return None
    labels = cc3d.connected_components(values >= _BRAIN_SUV, connectivity=6)
    statistics = cc3d.statistics(labels)
    best = None
    for label in range(1, len(statistics["voxel_counts"])):
        z, y, x = statistics["bounding_boxes"][label]
        highest = float(z.stop - 1)
        if statistics["voxel_counts"][label] * _WORKING_MM**3 < _BRAIN_ML * 1000.0:
            continue
        middle = (z.start + z.stop - 1) // 2
        share = np.count_nonzero(labels[middle] == label) / np.count_nonzero(values[middle] >= _BODY_SUV)
        low = (top[2] - highest) * _WORKING_MM > _BRAIN_BELOW_TOP_MM
        if not low and share >= _BRAIN_SHARE and (best is None or highest > best[2]):
            _, y, x = statistics["centroids"][label]
            best = (float(x), float(y), highest)
    return best


def _top_of_body(mask: np.ndarray) -> tuple[float, float, float] | None:
    """Return centre x and y of the upper 200 mm of a body, and the height where it begins (indices)."""
    filled = mask.sum(axis=(1, 2)) * _WORKING_MM**2 / 1000.0 >= _BODY_ML_PER_MM
    if not filled.any():
        return None
    top = int(np.flatnonzero(filled).max())
    upper = mask[max(0, top - int(200 / _WORKING_MM)) : top + 1]
    _, y, x = np.argwhere(upper).mean(axis=0)
    return float(x), float(y), float(top)
