"""Distances between the surfaces of two masks, computed once for all metrics that are made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

#: A distance transform passes over all voxels of the box, a k-d tree over the surfaces' points; measured, a point
#: costs the tree as much as so many voxels cost the transform (benchmarks/evaluation.py).
VOXELS_PER_POINT = 25
#: Bytes per voxel that the transform may take altogether, while it is the faster one.
TRANSFORM_BYTES = 24


def surface_mask(mask: np.ndarray) -> np.ndarray:
    """Voxels of a mask of which at least one face neighbour is outside it; the border of the array is outside."""
    inner = mask.copy()
    for axis in range(mask.ndim):
        ahead, behind = ([slice(None)] * mask.ndim for _ in range(2))
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        inner[tuple(behind)] &= mask[tuple(ahead)]
        inner[tuple(ahead)] &= mask[tuple(behind)]
        for end in (0, -1):
            edge = [slice(None)] * mask.ndim
            edge[axis] = end
            inner[tuple(edge)] = False
    return mask & ~inner


def surface_distances(
    truth: np.ndarray, predicted: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from each surface voxel of one mask to the nearest surface voxel of the other, centre to centre.

    Args:
        truth: boolean, not empty.
        predicted: boolean, of the same shape, not empty.
        spacing: mm per axis, in the arrays' axis order.

    Returns:
        From the prediction's surface to the truth's, and from the truth's to the prediction's; mm, float64.
    """
    surfaces = surface_mask(truth), surface_mask(predicted)
    points = [np.argwhere(surface) for surface in surfaces]
    if truth.size < VOXELS_PER_POINT * sum(map(len, points)) and truth.size * TRANSFORM_BYTES < 2**30:
        return tuple(
            distance_transform_edt(~surfaces[other], sampling=spacing)[surfaces[own]] for own, other in ((1, 0), (0, 1))
        )
    scaled = [found * np.asarray(spacing, np.float64) for found in points]
    return tuple(cKDTree(scaled[other]).query(scaled[own], workers=-1)[0] for own, other in ((1, 0), (0, 1)))
