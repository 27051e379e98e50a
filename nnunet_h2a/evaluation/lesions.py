"""Lesions as connected components, and which of them the other mask touches."""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import numpy as np

#: Voxels that share a face or an edge belong together, as in the autoPET challenges.
CONNECTIVITY = 18


@dataclass(frozen=True)
class Lesions:
    """Connected components of one mask.

    Attributes:
        voxels: size of each component; (n,) int64.
        touched: whether the other mask has a voxel in it; (n,) bool.
        labels: component of each foreground voxel, 0 to n - 1; None unless asked for.
        positions: of these voxels in the volume's C order, ascending; None unless asked for.
    """

    voxels: np.ndarray
    touched: np.ndarray
    labels: np.ndarray | None = None
    positions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.voxels)

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
    touched = np.zeros(count + 1, bool)
    touched[components.reshape(-1)[common]] = True
    if not keep_labels:
        return Lesions(voxels, touched[1:])
    return Lesions(voxels, touched[1:], labels - 1, np.flatnonzero(mask))


def matches(both: tuple[Lesions, Lesions]) -> list[int | None]:
    """For each lesion of the first mask the lesion of the second that belongs to it.

    Two lesions belong together where each has more voxels in common with the other than with any other lesion; of
    equally large parts the one with the lower number counts.

    Args:
        both: the masks' lesions, with labels.

    Returns:
        Numbers from 0, None for a lesion without a partner.
    """
    _, *places = np.intersect1d(*(lesions.positions for lesions in both), assume_unique=True, return_indices=True)
    here, there = (lesions.labels[at].astype(np.int64) for lesions, at in zip(both, places, strict=True))
    pairs, shared = np.unique(np.stack([here, there]), axis=1, return_counts=True)
    best: tuple[dict[int, int], dict[int, int]] = {}, {}
    for place in np.argsort(-shared, kind="stable"):
        one, other = (int(number) for number in pairs[:, place])
        best[0].setdefault(one, other)
        best[1].setdefault(other, one)
    found = [best[0].get(one) for one in range(len(both[0]))]
    return [other if other is not None and best[1][other] == one else None for one, other in enumerate(found)]


def detection_f1(truth: Lesions, predicted: Lesions) -> float | None:
    """F1 of finding lesions: a true lesion is found where a predicted voxel lies in it.

    2 found / (2 found + false + missed), where found and missed count true lesions, and false counts predicted
    components without a true voxel. None where there is neither a true nor a predicted lesion.
    """
    found, missed, false = truth.touched.sum(), (~truth.touched).sum(), (~predicted.touched).sum()
    total = 2 * found + missed + false
    return float(2 * found / total) if total else None
