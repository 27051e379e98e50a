"""Everything the conventions need of one case and label, measured once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from nnunet_h2a.evaluation.images import image_distances
from nnunet_h2a.evaluation.lesions import Lesions, detection_f1, find_lesions, overlapping
from nnunet_h2a.evaluation.surface_elements import corners, element_hausdorff95
from nnunet_h2a.evaluation.surfaces import distances_between, surface_points

#: What can be measured besides the overlap; a convention names what it needs.
LESIONS, SURFACES, VOXELS, ELEMENTS, SWAPPED, IMAGES, DUMMIES = (
    "lesions", "surfaces", "surfaces in voxels", "surface elements", "surface elements, axes swapped", "images",
    "images as published",
)  # fmt: skip
# A box that is smaller is copied out of the volume: the masks' memory is then there twice.
_SMALL_BOX = 0.5
# Bytes that distance transforms may take per voxel of the case.
_ROOM_PER_VOXEL = 3


@dataclass(frozen=True)
class Measures:
    """Measured numbers of one case and label; None where a number is not defined, or was not asked for.

    Attributes:
        tp, fp, fn, tn: voxels.
        voxel_ml: volume of a voxel.
        lesions, found_lesions, missed_voxels: true components; those with a predicted voxel; voxels of the others.
        predicted_lesions, false_lesions, false_voxels: predicted components; those without a true voxel; their voxels.
        detection_f1: see :func:`nnunet_h2a.evaluation.lesions.detection_f1`.
        overlapping_lesions: true lesions paired with a predicted one, see
            :func:`nnunet_h2a.evaluation.lesions.overlapping`.
        hd, hd95, pooled_hd95, assd: mm, see :class:`nnunet_h2a.evaluation.surfaces.SurfaceDistances`.
        pooled_hd95_voxels: the same with voxels as unit.
        element_hd95: mm, by area, see :mod:`nnunet_h2a.evaluation.surface_elements`.
        swapped_element_hd95: the same with the spacing's axes in the wrong order.
        image_hd95, published_image_hd95: pixels, one for each axial image.
    """

    tp: int
    fp: int
    fn: int
    tn: int
    voxel_ml: float
    lesions: int | None = None
    found_lesions: int | None = None
    missed_voxels: int | None = None
    predicted_lesions: int | None = None
    false_lesions: int | None = None
    false_voxels: int | None = None
    detection_f1: float | None = None
    overlapping_lesions: int | None = None
    hd: float | None = None
    hd95: float | None = None
    pooled_hd95: float | None = None
    assd: float | None = None
    pooled_hd95_voxels: float | None = None
    element_hd95: float | None = None
    swapped_element_hd95: float | None = None
    image_hd95: list[float | None] = field(default_factory=list)
    published_image_hd95: list[float | None] = field(default_factory=list)

    @property
    def true_voxels(self) -> int:
        """Size of the truth."""
        return self.tp + self.fn

    @property
    def predicted_voxels(self) -> int:
        """Size of the prediction."""
        return self.tp + self.fp


def measure(
    truth: np.ndarray,
    predicted: np.ndarray,
    spacing: Sequence[float],
    wanted: Collection[str],
    ignored: int = 0,
    workers: int = 1,
) -> Measures:
    """Measure one mask against another: :func:`measure_and_label` without the lesions."""
    return measure_and_label(truth, predicted, spacing, wanted, ignored, workers, keep_labels=False)[0]


def measure_and_label(
    truth: np.ndarray,
    predicted: np.ndarray,
    spacing: Sequence[float],
    wanted: Collection[str],
    ignored: int = 0,
    workers: int = 1,
    keep_labels: bool = True,
) -> tuple[Measures, tuple[Lesions, Lesions] | None]:
    """Measure one mask against another, and hand on what was labelled.

    Each mask is cut to the box of the two where that saves something, labelled once, and its surface points are taken
    once; one set of distances serves every measure in the same metric. Along an axis of one voxel there is no surface:
    a volume of one slice is a picture, and its surfaces are contours.

    Args:
        truth: (z, y, x) bool.
        predicted: (z, y, x) bool.
        spacing: mm, (z, y, x).
        wanted: any of LESIONS, SURFACES, ….
        ignored: voxels that count neither way, background in both masks.
        workers: threads.
        keep_labels: keep the component and the position in the volume of each foreground voxel.

    Returns:
        The measures, and the lesions of truth and prediction; None where LESIONS are not wanted.

    Raises:
        ValueError: where the shapes differ.
    """
    if truth.shape != predicted.shape or truth.ndim != 3:
        raise ValueError(f"masks must have one shape (z, y, x): truth {truth.shape}, prediction {predicted.shape}")
    results: dict[str, object] = {}
    if IMAGES in wanted:
        results["image_hd95"] = image_distances(truth, predicted)
    if DUMMIES in wanted:
        results["published_image_hd95"] = image_distances(truth, predicted, as_published=True)
    shape, voxels = truth.shape, truth.size - ignored
    box = _box(truth, predicted)
    if truth[box].size < _SMALL_BOX * truth.size:
        truth, predicted = truth[box].copy(), predicted[box].copy()
    else:
        box = tuple(slice(0, length) for length in shape)
    both = None
    common = np.flatnonzero(truth & predicted)
    tp, true, positive = len(common), int(np.count_nonzero(truth)), int(np.count_nonzero(predicted))
    if LESIONS in wanted:
        lesions, others = both = tuple(find_lesions(mask, common, keep_labels) for mask in (truth, predicted))
        results |= {
            "lesions": len(lesions), "found_lesions": int(lesions.touched.sum()),
            "missed_voxels": lesions.missed_voxels, "predicted_lesions": len(others),
            "false_lesions": int((~others.touched).sum()), "false_voxels": others.missed_voxels,
            "detection_f1": detection_f1(lesions, others), "overlapping_lesions": overlapping(both),
        }  # fmt: skip
    del common
    if true and positive:
        axes = tuple(axis for axis, length in enumerate(shape) if length > 1) or tuple(range(len(shape)))
        results |= _distances(truth, predicted, spacing, axes, wanted, _ROOM_PER_VOXEL * voxels, workers)
    measures = Measures(
        tp, positive - tp, true - tp, voxels - true - positive + tp, float(np.prod(spacing)) / 1000, **results
    )
    if both is not None and keep_labels:
        both = tuple(_in_volume(lesions, box, shape) for lesions in both)
    return measures, both


def _in_volume(lesions: Lesions, box: tuple[slice, ...], shape: Sequence[int]) -> Lesions:
    """Lesions of a box with positions in the volume that it was cut from."""
    inside = np.unravel_index(lesions.positions, [part.stop - part.start for part in box])
    moved = tuple(index + part.start for index, part in zip(inside, box, strict=True))
    return replace(lesions, positions=np.ravel_multi_index(moved, shape))


def _distances(
    truth: np.ndarray,
    predicted: np.ndarray,
    spacing: Sequence[float],
    axes: tuple[int, ...],
    wanted: Collection[str],
    room: int,
    workers: int,
) -> dict[str, float]:
    results = {}
    if SURFACES in wanted or VOXELS in wanted:
        points = surface_points(truth, axes), surface_points(predicted, axes)
        if SURFACES in wanted:
            between = distances_between(*points, spacing, room, workers)
            results |= {
                "hd": between.hausdorff, "hd95": between.hausdorff95, "pooled_hd95": between.pooled_hausdorff95,
                "assd": between.average,
            }  # fmt: skip
        if VOXELS in wanted:
            between = distances_between(*points, (1.0, 1.0, 1.0), room, workers)
            results["pooled_hd95_voxels"] = between.pooled_hausdorff95
    if ELEMENTS in wanted or SWAPPED in wanted:
        if len(axes) == 2:
            (flat,) = set(range(truth.ndim)) - set(axes)
            truth, predicted = truth.squeeze(flat), predicted.squeeze(flat)
            spacing = [spacing[axis] for axis in axes]
        elements = corners(truth), corners(predicted)
        if ELEMENTS in wanted:
            results["element_hd95"] = element_hausdorff95(*elements, spacing, workers)
        if SWAPPED in wanted:
            results["swapped_element_hd95"] = element_hausdorff95(*elements, tuple(spacing)[::-1], workers)
    return results


def _box(truth: np.ndarray, predicted: np.ndarray) -> tuple[slice, ...]:
    """The smallest box with the foreground of both masks; one voxel where there is none."""
    box: list[slice] = []
    for axis in range(truth.ndim):
        # What is already known to be empty along earlier axes is not looked at again.
        others = tuple(other for other in range(truth.ndim) if other != axis)
        found = np.flatnonzero(truth[tuple(box)].any(others) | predicted[tuple(box)].any(others))
        box.append(slice(found[0], found[-1] + 1) if len(found) else slice(0, 1))
    return tuple(box)
