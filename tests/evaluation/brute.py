"""The metrics' definitions written out, slowly: loops over points and components, in float64."""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy import ndimage

EIGHTEEN = ndimage.generate_binary_structure(3, 2)


def border(mask: np.ndarray, axes: tuple[int, ...] | None = None) -> np.ndarray:
    """Foreground voxels with a neighbour along ``axes`` that is background or outside, (n, 3).

    Without ``axes`` along all of more than one voxel; every voxel where there is none.
    """
    points = []
    if axes is None:
        axes = tuple(axis for axis in range(3) if mask.shape[axis] > 1) or (0, 1, 2)
    for point in np.argwhere(mask):
        for axis, step in product(axes, (-1, 1)):
            other = point.copy()
            other[axis] += step
            if not 0 <= other[axis] < mask.shape[axis] or not mask[tuple(other)]:
                points.append(point)
                break
    return np.array(points).reshape(-1, 3)


def directed(one: np.ndarray, other: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance of each point of ``one`` to the nearest of ``other``."""
    return np.array([min(np.sqrt((((a - b) * spacing) ** 2).sum()) for b in other) for a in one])


def untouched(mask: np.ndarray, other: np.ndarray) -> tuple[int, int, int]:
    """Components of a mask: how many, how many without a voxel of the other, and the voxels of those."""
    labels, count = ndimage.label(mask, EIGHTEEN)
    sizes = [int((labels == i).sum()) for i in range(1, count + 1) if not (other & (labels == i)).any()]
    return count, len(sizes), sum(sizes)


def pairs_above(one: np.ndarray, other: np.ndarray, least: float) -> int:
    """Largest number of pairs of components with more than ``least`` IoU, no component in two: all ways are tried."""
    lumps = [[labels == i for i in range(1, n + 1)] for labels, n in (ndimage.label(m, EIGHTEEN) for m in (one, other))]
    iou = np.array([[(a & b).sum() / (a | b).sum() for b in lumps[1]] for a in lumps[0]])

    def most(row: int, free: frozenset[int]) -> int:
        if row == len(lumps[0]):
            return 0
        taken = [1 + most(row + 1, free - {k}) for k in free if iou[row, k] > least]
        return max([most(row + 1, free), *taken])

    return most(0, frozenset(range(len(lumps[1]))))


def random_pair(rng: np.random.Generator, largest: int = 9) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Two masks of one random shape with lumps, at times empty, full or of one voxel; and a spacing."""
    shape = tuple(rng.integers(1, largest, 3))
    masks = []
    for _ in range(2):
        kind = rng.integers(8)
        if kind == 0:
            mask = np.zeros(shape, bool)
        elif kind == 1:
            mask = np.ones(shape, bool)
        elif kind == 2:
            mask = np.zeros(shape, bool)
            mask[tuple(rng.integers(0, shape))] = True
        else:
            mask = ndimage.uniform_filter(rng.random(shape), 2) > rng.uniform(0.4, 0.75)
        masks.append(mask)
    return masks[0], masks[1], tuple(float(s) for s in rng.uniform(0.5, 4, 3))
