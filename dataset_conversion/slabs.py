"""Resampling volumes that are read slice by slice, so that a large one never lies in memory for a small result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dataset_conversion import resampling
from dataset_conversion.resampling import Grid

if TYPE_CHECKING:
    import SimpleITK as sitk

# Slices of the source held at a time, about.
_HELD = 8


def resample_slices(
    source: Grid,
    read: Callable[[int], np.ndarray],
    reference: sitk.Image | Grid,
    fill: float,
    nearest: bool = False,
    kind: int | None = None,
) -> sitk.Image:
    """Resample a volume onto another grid while it is read.

    Args:
        source: its grid.
        read: returns a slice, shape (y, x), by its index along the grid's last axis; each slice is asked for once at
            the most, in rising order, and slices that are not needed are not asked for.
        reference: the grid that is wanted, at any angle to the source.
        fill: value outside the source.
        nearest: nearest neighbour (masks) instead of linear interpolation. Where both grids lie on one lattice, nothing
            is interpolated.
        kind: SimpleITK pixel type of the result, float32 where None.

    Returns:
        The image that SimpleITK's resampling of the whole volume gives, to rounding.
    """
    import SimpleITK as sitk

    kind = sitk.sitkFloat32 if kind is None else kind
    nearest = nearest or resampling.same_lattice(reference, source, resampling.SAME_GRID_VOXELS)
    axis, step = _along(source, reference)
    size, last = np.array(reference.GetSize()), source.size[2] - 1
    thickness = max(1, int(_HELD / max(abs(step), 1e-6)))
    starts = range(0, int(size[axis]), thickness)
    result: np.ndarray | None = None
    held: dict[int, np.ndarray] = {}
    for start in starts if step >= 0 else reversed(starts):
        low, many = np.zeros(3, int), size.copy()
        low[axis], many[axis] = start, min(thickness, size[axis] - start)
        slab = resampling.part_of(reference, low, many)
        first, final = _slices_between(source, slab)
        if final < 0 or first > last:
            continue
        wanted = range(max(first, 0), min(final, last) + 1)
        held = {index: held[index] if index in held else read(index) for index in wanted}
        part = sitk.GetImageFromArray(np.stack([held[index] for index in wanted]))
        corner = np.array([0, 0, wanted[0]])
        resampling.set_geometry(part, resampling.part_of(source, corner, np.array(part.GetSize())))
        moved = resampling.resampled(part, slab, fill, nearest, kind)
        values = sitk.GetArrayViewFromImage(moved)
        if result is None:
            result = np.full(size[::-1], fill, dtype=values.dtype)
        where = [slice(None)] * 3
        where[2 - axis] = slice(start, start + int(many[axis]))
        result[tuple(where)] = values
    if result is None:
        image = sitk.Image(size.tolist(), kind) + fill
    else:
        image = sitk.GetImageFromArray(result)
    return resampling.set_geometry(image, reference)


def _along(source: Grid, reference: sitk.Image | Grid) -> tuple[int, float]:
    """Return the axis of ``reference`` that runs most along the source's slices, and its step in slices."""
    steps = np.array(reference.GetDirection()).reshape(3, 3) * np.array(reference.GetSpacing())
    normal = np.linalg.inv(np.array(source.direction).reshape(3, 3) * np.array(source.spacing))[2]
    along = normal @ steps
    axis = int(np.abs(along).argmax())
    return axis, float(along[axis])


def _slices_between(source: Grid, slab: Grid) -> tuple[int, int]:
    """Return the first and last slice of a source that interpolation may need for a slab of another grid."""
    along = resampling.to_index(source, resampling.corners(slab))[:, 2]
    return int(np.floor(along.min() + 1e-6)), int(np.ceil(along.max() - 1e-6))
