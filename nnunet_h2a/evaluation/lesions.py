"""Lesions as connected components, and which of them the other mask touches."""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

#: Voxels that share a face or an edge belong together, as in the autoPET challenges.
CONNECTIVITY = 18
#: HECKTOR 2025 counts a lesion as detected above this intersection over union.
LEAST_IOU = 0.3


@dataclass(frozen=True)
class Lesions:
    """Connected components of one mask.

    Attributes:
        voxels: size of each component; (n,) int64.
        common: component of each voxel that the other mask has as well, 0 to n - 1, in the volume's C order.
        labels: component of each foreground voxel, 0 to n - 1; None unless asked for.
        positions: of these voxels in the volume's C order, ascending; None unless asked for.
    """

    voxels: np.ndarray
    common: np.ndarray
    labels: np.ndarray | None = None
    positions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.voxels)

    @property
    def touched(self) -> np.ndarray:
        """Whether the other mask has a voxel in each component; (n,) bool."""
        return np.bincount(self.common, minlength=len(self)) > 0

    @property
    def missed_voxels(self) -> int:
        """Voxels of the components that the other mask does not touch."""
        return int(self.voxels[~self.touched].sum())


def find_lesions(mask: np.ndarray, common: np.ndarray, keep_labels: bool = False) -> Lesions:
    """Label a mask once, and take from it all that the measures of detection need.

    Args:
        mask: (z, y, x) bool.
        common: voxels that the other mask has as well: positions in the mask's C order. Positions and no mask: beside
            the labels, four bytes per voxel, there is no room for another volume.
        keep_labels: also return each foreground voxel's component and position.
    """
    # The labels of background voxels are never looked at: counting those would take as long as the labelling.
    components, count = cc3d.connected_components(mask, connectivity=CONNECTIVITY, return_N=True, binary_image=True)
    labels = components[mask]
    voxels = np.bincount(labels, minlength=count + 1)[1:]
    shared = components.reshape(-1)[common] - 1
    if not keep_labels:
        return Lesions(voxels, shared)
    return Lesions(voxels, shared, labels - 1, np.flatnonzero(mask))


def _overlaps(both: tuple[Lesions, Lesions]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of lesions with a common voxel, (2, n), by their numbers; and how many voxels each pair has in common."""
    # One number per pair: that sorts faster than pairs do.
    width = max(len(both[1]), 1)
    joined, shared = np.unique(
        both[0].common.astype(np.int64) * width + both[1].common.astype(np.int64), return_counts=True
    )
    return np.stack(np.divmod(joined, width)), shared


def matches(both: tuple[Lesions, Lesions]) -> list[int | None]:
    """For each lesion of the first mask the lesion of the second that belongs to it.

    Two lesions belong together where each has more voxels in common with the other than with any other lesion; of
    equally large parts the one with the lower number counts.

    Args:
        both: the masks' lesions.

    Returns:
        Numbers from 0, None for a lesion without a partner.
    """
    pairs, shared = _overlaps(both)
    best: tuple[dict[int, int], dict[int, int]] = {}, {}
    for place in np.argsort(-shared, kind="stable"):
        one, other = (int(number) for number in pairs[:, place])
        best[0].setdefault(one, other)
        best[1].setdefault(other, one)
    found = [best[0].get(one) for one in range(len(both[0]))]
    return [other if other is not None and best[1][other] == one else None for one, other in enumerate(found)]


def overlapping(both: tuple[Lesions, Lesions], least: float = LEAST_IOU) -> int:
    """The largest number of pairs of lesions, one of each mask, whose intersection over union is more than ``least``.

    No lesion is in two pairs. (Above 0.5 it could not be; below it has to be said.)
    """
    pairs, shared = _overlaps(both)
    pairs = pairs[:, shared > least * (both[0].voxels[pairs[0]] + both[1].voxels[pairs[1]] - shared)]
    if not pairs.size:
        return 0
    graph = csr_array((np.ones(pairs.shape[1], bool), pairs), (len(both[0]), len(both[1])))
    return int(np.count_nonzero(maximum_bipartite_matching(graph) >= 0))


def detection_f1(truth: Lesions, predicted: Lesions) -> float | None:
    """F1 of finding lesions: a true lesion is found where a predicted voxel lies in it.

    2 found / (2 found + false + missed), where found and missed count true lesions, and false counts predicted
    components without a true voxel. None where there is neither a true nor a predicted lesion.
    """
    found, missed, false = truth.touched.sum(), (~truth.touched).sum(), (~predicted.touched).sum()
    total = 2 * found + missed + false
    return float(2 * found / total) if total else None
