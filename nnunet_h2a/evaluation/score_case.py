"""One case: read its files, measure every label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nnunet_h2a.evaluation.lesions import Lesions, matches
from nnunet_h2a.evaluation.masks import (
    CaseError,
    Grid,
    Labels,
    Pair,
    difference_of_grids,
    foreground,
    labels_in,
    labels_of,
    on_grid_of,
    read_image,
)
from nnunet_h2a.evaluation.measure import Measures, measure, measure_and_label
from nnunet_h2a.evaluation.pet import lesion_quantities, patient_quantities


@dataclass(frozen=True)
class Job:
    """How cases are measured.

    Attributes:
        labels: what to score; None: every label that the files of a case hold.
        wanted: see :func:`nnunet_h2a.evaluation.measure.measure`.
        resample: bring predictions and images on the reference's grid, instead of refusing the case.
        workers: threads per case.
    """

    labels: Labels | None
    wanted: tuple[str, ...]
    resample: bool
    workers: int = 1


def score_case(pair: Pair, job: Job) -> dict[str, Any]:
    """Measure a case.

    Returns:
        ``measures``: for the name of each label, :class:`Measures` as a dictionary; ``pet``, where there is an image:
        for the name of each label the patient's and the lesions' quantities, true and predicted; ``voxels``,
        ``voxel_ml``, ``images``: size of the case; ``resampled``: what lay on another grid.

    Raises:
        CaseError: where a file cannot be used.
    """
    reference = read_image(pair.reference)
    truth, grid = labels_of(reference, pair.reference), Grid.of(reference)
    # An image holds its voxels beside the array that was made of them.
    del reference
    spacing = grid.spacing[::-1]
    resampled: list[str] = []
    predicted = labels_of(_on_grid(grid, pair.predicted, job, resampled, is_mask=True), pair.predicted)
    pet = None
    if pair.pet is not None:
        import SimpleITK as sitk

        image = _on_grid(grid, pair.pet, job, resampled, is_mask=False)
        if image.GetPixelID() != sitk.sitkFloat32:
            image = sitk.Cast(image, sitk.sitkFloat32)
        # A view does not keep its image: that must stay to the end of this function.
        pet = sitk.GetArrayViewFromImage(image)
        if not np.isfinite(pet.sum(dtype=np.float64)):
            raise CaseError(f"{pair.pet} holds values that are no SUV, beyond all bounds: write it again")
    labels = job.labels or Labels({str(n): (n,) for n in sorted(labels_in(truth) | labels_in(predicted))})
    for array, path in ((truth, pair.reference), (predicted, pair.predicted)):
        strange = labels_in(array) - labels.known if labels.known is not None else set()
        if strange:
            raise CaseError(
                f"{path} holds the labels {sorted(strange)}, which dataset.json does not have: correct one of them, or "
                "choose labels with -l"
            )
    ignored = None if labels.ignored is None else truth == labels.ignored
    number_ignored = 0 if ignored is None else int(np.count_nonzero(ignored))
    found: dict[str, Any] = {
        "measures": {}, "voxels": truth.size - number_ignored, "voxel_ml": float(np.prod(spacing)) / 1000,
        "images": len(truth), "resampled": resampled,
    }  # fmt: skip
    if pet is not None:
        found["pet"] = {}
    single = _single(labels, truth, predicted)
    for _, name, integers in labels.scored():
        # Where there is but one label the arrays themselves are the masks, and no copy is made.
        one, other = (a.view(bool) if single else foreground(a, integers) for a in (truth, predicted))
        if ignored is not None:
            other &= ~ignored
        measures, lesions = measure_and_label(
            one, other, spacing, job.wanted, number_ignored, job.workers, keep_labels=pet is not None
        )
        found["measures"][name] = asdict(measures)
        if pet is not None:
            found["pet"][name] = _quantities(pet, lesions, spacing)
    return found


def _single(labels: Labels, truth: np.ndarray, predicted: np.ndarray) -> bool:
    integers = [value for _, _, value in labels.scored()]
    return integers == [(1,)] and all(a.dtype == np.uint8 and a.max(initial=0) <= 1 for a in (truth, predicted))


def _on_grid(grid: Grid, path: Any, job: Job, resampled: list[str], is_mask: bool) -> Any:
    image = read_image(path)
    difference = difference_of_grids(grid, Grid.of(image))
    if difference is None:
        return image
    if not job.resample:
        cure = "predict on the reference's grid" if is_mask else "give the image that belongs to the labels"
        raise CaseError(f"{path} and the reference differ in {difference}: {cure}, or --resample")
    moved = on_grid_of(grid, image, is_mask)
    resampled.append(f"{path.name}: {difference}{_lost(image, moved, path) if is_mask else ''}")
    return moved


def _lost(image: Any, moved: Any, path: Any) -> str:
    """What of a prediction lies outside the reference's field of view, where it counts for nothing.

    Raises:
        CaseError: where that is all of it.
    """
    import SimpleITK as sitk

    before, after = (
        int(np.count_nonzero(sitk.GetArrayViewFromImage(each))) * math.prod(each.GetSpacing()) / 1000
        for each in (image, moved)
    )
    if before and not after:
        raise CaseError(f"{path} has all of its foreground outside the reference's field of view: is it of this case?")
    # Nearest neighbours alone change a volume, more so of few voxels.
    return f"; {before:.4g} ml became {after:.4g} ml" if abs(before - after) > 0.01 * before else ""


def _quantities(pet: np.ndarray, both: tuple[Lesions, Lesions], spacing: Sequence[float]) -> dict[str, dict[str, Any]]:
    sides = {}
    for side, lesions in zip(("true", "predicted"), both, strict=True):
        quantities = lesion_quantities(pet, lesions, spacing)
        sides[side] = {"patient": patient_quantities(quantities, spacing), "lesions": quantities}
    for one, other in enumerate(matches(both)):
        sides["true"]["lesions"][one]["partner"] = None if other is None else other + 1
        if other is not None:
            sides["predicted"]["lesions"][other]["partner"] = one + 1
    return sides


def empty_measures(found: dict[str, Any], wanted: Sequence[str]) -> Measures:
    """Measures of a label that neither file of a case holds."""
    shape = (found["images"], 1, 1)
    nothing = measure(np.zeros(shape, bool), np.zeros(shape, bool), (1.0, 1.0, 1.0), wanted)
    return Measures(**asdict(nothing) | {"tn": found["voxels"], "voxel_ml": found["voxel_ml"]})
