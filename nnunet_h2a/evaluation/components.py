"""Lesions of truth and prediction as connected components, matched in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import numpy as np

#: Voxels that share a face or an edge are one component, as the autoPET challenges have it. In 2D: pixels that share a
#: side or a corner.
CONNECTIVITY = {2: 8, 3: 18}


@dataclass(frozen=True)
class Components:
    """Connected components of a pair of masks.

    Attributes:
        truth_sizes: voxels of each component of the truth.
        truth_found: whether the prediction shares a voxel with it.
        predicted_sizes: voxels of each component of the prediction.
        predicted_right: whether the truth shares a voxel with it.
    """

    truth_sizes: np.ndarray
    truth_found: np.ndarray
    predicted_sizes: np.ndarray
    predicted_right: np.ndarray

    @property
    def false_positive_voxels(self) -> int:
        """Voxels of predicted components without any truth in them."""
        return int(self.predicted_sizes[~self.predicted_right].sum())

    @property
    def false_negative_voxels(self) -> int:
        """Voxels of the truth's components without any prediction in them."""
        return int(self.truth_sizes[~self.truth_found].sum())


def match_components(truth: np.ndarray, predicted: np.ndarray, connectivity: int | None = None) -> Components:
    """Components of both masks, and which of them the other mask touches.

    Each mask is labelled once, and one at a time: the labels take 4 bytes per voxel at most.

    Args:
        truth: boolean, 2D or 3D.
        predicted: boolean, of the same shape.
        connectivity: as cc3d has it; None for :data:`CONNECTIVITY`.
    """
    connectivity = connectivity or CONNECTIVITY[truth.ndim]
    found = []
    both = truth & predicted
    for mask in (truth, predicted):
        labels = cc3d.connected_components(mask, connectivity=connectivity)
        sizes = np.bincount(labels[mask])[1:]
        touched = np.zeros(len(sizes) + 1, bool)
        touched[labels[both]] = True
        found.append((sizes, touched[1:]))
    return Components(*found[0], *found[1])
