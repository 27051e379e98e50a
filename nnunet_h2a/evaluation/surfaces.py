"""Surface points of masks, and the distances between two surfaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

# Measured: seconds per surface point for building and asking a k-d tree, and per voxel for a distance transform. The
# transform wins in small boxes full of surface.
_TREE_SECONDS = 2e-6
_TRANSFORM_SECONDS = 1.5e-7
# A transform holds about so many bytes per voxel of its box; it must stay small beside the masks.
_TRANSFORM_BYTES = 40


def surface_points(mask: np.ndarray, axes: Sequence[int] | None = None) -> np.ndarray:
    """Foreground voxels with a background voxel next to them.

    Args:
        mask: bool, any number of axes.
        axes: look at the two neighbours along these axes; None: along all. What is outside the array is background.

    Returns:
        Indices, (n, axes of the mask) int64, in C order.
    """
    inner = mask.copy()
    for axis in range(mask.ndim) if axes is None else axes:
        ahead = [slice(None)] * mask.ndim
        behind = list(ahead)
        first, last = list(ahead), list(ahead)
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        first[axis], last[axis] = slice(0, 1), slice(-1, None)
        inner[tuple(ahead)] &= mask[tuple(behind)]
        inner[tuple(behind)] &= mask[tuple(ahead)]
        inner[tuple(first)] = inner[tuple(last)] = False
    np.logical_xor(mask, inner, out=inner)
    return np.stack(np.unravel_index(np.flatnonzero(inner), mask.shape), axis=1)


@dataclass(frozen=True)
class SurfaceDistances:
    """Distance of every surface point to the other mask's nearest surface point.

    Attributes:
        from_truth: one for each surface point of the truth.
        from_predicted: one for each surface point of the prediction.
    """

    from_truth: np.ndarray
    from_predicted: np.ndarray

    @property
    def hausdorff(self) -> float:
        """The largest distance in either direction."""
        return float(max(self.from_truth.max(), self.from_predicted.max()))

    @property
    def hausdorff95(self) -> float:
        """The larger of the two directions' 95th percentiles."""
        return float(max(np.percentile(self.from_truth, 95), np.percentile(self.from_predicted, 95)))

    @property
    def pooled_hausdorff95(self) -> float:
        """95th percentile of both directions' distances in one heap, as the medpy library has it."""
        return float(np.percentile(np.concatenate([self.from_truth, self.from_predicted]), 95))

    @property
    def average(self) -> float:
        """Average symmetric surface distance: the mean of the two directions' means."""
        return float((self.from_truth.mean() + self.from_predicted.mean()) / 2)


def distances_between(
    truth: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], room: int = 2**24, workers: int = 1
) -> SurfaceDistances:
    """Nearest distances between two sets of surface points, by k-d tree or by distance transform.

    Args:
        truth: indices of voxels, (n, axes) of integers; at least one.
        predicted: likewise, (m, axes).
        spacing: of voxels, one number per axis; its unit is the result's.
        room: bytes that a distance transform may take.
        workers: threads that ask a k-d tree.
    """
    lowest = np.minimum(truth.min(0), predicted.min(0))
    shape = np.maximum(truth.max(0), predicted.max(0)) - lowest + 1
    box = int(np.prod(shape))
    if box * _TRANSFORM_BYTES <= room and 2 * box * _TRANSFORM_SECONDS < (len(truth) + len(predicted)) * _TREE_SECONDS:
        at_truth, at_predicted = tuple((truth - lowest).T), tuple((predicted - lowest).T)
        return SurfaceDistances(
            _transform(at_predicted, shape, spacing)[at_truth], _transform(at_truth, shape, spacing)[at_predicted]
        )
    scale = np.asarray(spacing, float)
    one, other = truth * scale, predicted * scale
    return SurfaceDistances(
        cKDTree(other, balanced_tree=False, compact_nodes=False).query(one, workers=workers)[0],
        cKDTree(one, balanced_tree=False, compact_nodes=False).query(other, workers=workers)[0],
    )


def _transform(points: tuple[np.ndarray, ...], shape: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distance of every voxel of a box to the nearest of some points."""
    others = np.ones(shape, bool)
    others[points] = False
    return distance_transform_edt(others, sampling=spacing)
