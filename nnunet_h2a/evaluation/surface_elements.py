"""HD95 over surface elements weighted by their area, as the HECKTOR challenges measure it.

The challenges' evaluator calls the surface-distance library. It looks at every corner between voxels whose eight
(2 x 2 x 2) voxels are neither all foreground nor all background, gives it the area of the surface that marching cubes
puts there, and takes the distance that 95 % of the area does not exceed. In a picture it is four pixels, and the length
that marching squares puts there. Source: Nikolov et al., "Clinically applicable
segmentation of head and neck anatomy", J Med Internet Res 2021, https://github.com/google-deepmind/surface-distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from skimage.measure import find_contours, marching_cubes, mesh_surface_area

from nnunet_h2a.evaluation.surfaces import distances_between


def corners(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners between voxels where foreground meets background; what is outside the array is background.

    Args:
        mask: (z, y, x) bool, or (y, x).

    Returns:
        Their positions, (n, axes) int64: corner (i, j, k) lies half a voxel before voxel (i, j, k); and which of the
        eight voxels (four pixels) around each are foreground, (n,) uint8, one bit per voxel.
    """
    code = np.zeros([length + 1 for length in mask.shape], np.uint8)
    for bit, offset in enumerate(product((0, 1), repeat=mask.ndim)):
        # The voxel that is `offset` behind the corner's first one.
        part = tuple(slice(1 - o, 1 - o + length) for o, length in zip(offset, mask.shape, strict=True))
        code[part] |= mask.view(np.uint8) << np.uint8(bit)
    flat = code.ravel()
    found = np.flatnonzero((flat != 0) & (flat != 2 ** (2**mask.ndim) - 1))
    return np.stack(np.unravel_index(found, code.shape), axis=1), flat[found]


@lru_cache(maxsize=16)
def _lengths(spacing: tuple[float, ...]) -> np.ndarray:
    """Length of the contour at a corner for each of the 16 patterns of its pixels."""
    lengths = np.zeros(16)
    for code in range(1, 15):
        block = np.array([code >> bit & 1 for bit in range(4)], float).reshape(2, 2)
        lines = find_contours(block, 0.5)
        lengths[code] = sum(np.linalg.norm(np.diff(line * spacing, axis=0), axis=1).sum() for line in lines)
    return lengths


@lru_cache(maxsize=16)
def _areas(spacing: tuple[float, ...]) -> np.ndarray:
    """Area of the surface at a corner for each of the 256 patterns of its voxels.

    Where more than four are foreground the surface around the others is taken: marching cubes has several surfaces for
    such patterns, and this is the one of the surface-distance library's tables.
    """
    areas = np.zeros(256)
    for code in range(1, 255):
        block = np.array([code >> bit & 1 for bit in range(8)], float).reshape(2, 2, 2)
        block = 1 - block if block.sum() > 4 else block
        vertices, faces, *_ = marching_cubes(block, 0.5, method="lorensen")
        # Halves of voxels, which single precision holds exactly; the spacing's product would be rounded to it.
        areas[code] = mesh_surface_area(vertices.astype(np.float64) * spacing, faces)
    return areas


def element_hausdorff95(
    truth: tuple[np.ndarray, np.ndarray],
    predicted: tuple[np.ndarray, np.ndarray],
    spacing: Sequence[float],
    workers: int = 1,
) -> float:
    """The larger of the two directions' distances that 95 % of the surface's area does not exceed.

    Args:
        truth: what :func:`corners` finds in the true mask; at least one corner.
        predicted: likewise, of the predicted mask.
        spacing: of voxels in mm, in the order of the mask's axes.
        workers: threads.

    Returns:
        mm.
    """
    between = distances_between(truth[0], predicted[0], spacing, workers=workers)
    areas = (_areas if len(spacing) == 3 else _lengths)(tuple(float(s) for s in spacing))
    return max(_quantile(between.from_truth, areas[truth[1]]), _quantile(between.from_predicted, areas[predicted[1]]))


def _quantile(distances: np.ndarray, areas: np.ndarray) -> float:
    order = np.lexsort((areas, distances))
    share = np.cumsum(areas[order]) / areas.sum()
    return float(distances[order][min(np.searchsorted(share, 0.95), len(order) - 1)])
