"""How the challenges and papers score: each convention's numbers from the same measures.

``docs/evaluation.md`` has the definitions side by side, with every edge case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from nnunet_h2a.evaluation.measure import DUMMIES, ELEMENTS, IMAGES, LESIONS, SURFACES, SWAPPED, VOXELS, Measures

Row = dict[str, float | int | None]
#: Metrics of a case in the order of the tables; those of the evaluation file and, at the end, some of detection.
METRICS = (
    "dice", "iou", "precision", "recall", "hd95", "hd", "assd", "voe", "rvd", "fp_volume_ml", "fn_volume_ml",
    "lesion_f1",
)  # fmt: skip
COUNTS = (
    "tp", "fp", "fn", "lesions", "lesions_found", "lesions_predicted", "lesions_false", "lesions_overlapping",
)  # fmt: skip


@dataclass(frozen=True)
class Convention:
    """One way to score.

    Attributes:
        name: value of ``--convention``.
        source: whose it is.
        reported: what the challenge or paper reports, for the head of the tables: keys of a row, ``pooled …`` or
            ``aggregated …``.
        wanted: what must be measured.
        row: one case's numbers.
        remark: what must be known to compare numbers.
        images: where HD95 has one number per axial image, over all of which the mean is taken: those of a case.
        hd95_unit: of HD95.
        infinite: whether a case without HD95 counts as infinitely far in the median.
        pooled_of_nothing: pooled Dice and IoU where there is nothing to find and nothing was found; None: not defined.
    """

    name: str
    source: str
    reported: tuple[str, ...]
    wanted: frozenset[str]
    row: Callable[[Measures], Row]
    remark: str = ""
    images: Callable[[Measures], Sequence[float | None]] | None = None
    hd95_unit: str = "mm"
    infinite: Callable[[Measures], bool] | None = None
    pooled_of_nothing: float | None = None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def common_row(m: Measures) -> Row:
    """What holds where a convention does not say otherwise.

    A ratio whose denominator is 0 is not defined, nor is a distance where a mask is empty, nor the volume of missed
    lesions where there is none to miss. Hausdorff distances are the larger of both directions, in mm, between surface
    voxels' centres.
    """
    union, sizes = m.tp + m.fp + m.fn, m.true_voxels + m.predicted_voxels
    iou = _ratio(m.tp, union)
    return {
        "dice": _ratio(2 * m.tp, sizes),
        "iou": iou,
        "precision": _ratio(m.tp, m.predicted_voxels),
        "recall": _ratio(m.tp, m.true_voxels),
        "hd95": m.hd95,
        "hd": m.hd,
        "assd": m.assd,
        "voe": None if iou is None else 1 - iou,
        "rvd": _ratio(m.predicted_voxels - m.true_voxels, m.true_voxels),
        "fp_volume_ml": None if m.false_voxels is None else m.false_voxels * m.voxel_ml,
        "fn_volume_ml": m.missed_voxels * m.voxel_ml if m.true_voxels and m.missed_voxels is not None else None,
        "lesion_f1": m.detection_f1,
        "tp": m.tp,
        "fp": m.fp,
        "fn": m.fn,
        "lesions": m.lesions,
        "lesions_found": m.found_lesions,
        "lesions_predicted": m.predicted_lesions,
        "lesions_false": m.false_lesions,
        "lesions_overlapping": m.overlapping_lesions,
    }


def _only_with_truth(row: Row, m: Measures, *keys: str) -> Row:
    return row if m.true_voxels else row | dict.fromkeys(keys)


def _autopet(m: Measures) -> Row:
    return _only_with_truth(common_row(m), m, "dice", "iou", "voe")


def _hecktor(m: Measures) -> Row:
    row = common_row(m) | {"hd95": m.element_hd95}
    # The challenge's rule: who predicts nothing has found nothing, and nothing of it was right.
    return row | {"precision": 0.0} if m.true_voxels and not m.predicted_voxels else row


def _hecktor_as_published(m: Measures) -> Row:
    row = _hecktor(m) | {"hd95": m.swapped_element_hd95}
    return row if m.predicted_voxels else row | {"dice": 0.0, "hd95": 0.0, "recall": 0.0, "precision": 0.0}


def _mean_of_images(images: Sequence[float | None]) -> float | None:
    defined = [distance for distance in images if distance is not None]
    return float(np.mean(defined)) if defined else None


def _cipa(m: Measures) -> Row:
    return common_row(m) | {"hd95": _mean_of_images(m.image_hd95)}


def _cipa_as_published(m: Measures) -> Row:
    return common_row(m) | {"hd95": _mean_of_images(m.published_image_hd95)}


def _h2aseg(m: Measures) -> Row:
    return _only_with_truth(common_row(m) | {"hd95": m.pooled_hd95}, m, "dice", "iou", "voe")


#: What the authors' code adds to every denominator.
_SMOOTH = 1e-3


def _h2aseg_as_published(m: Measures) -> Row:
    iou = m.tp / (m.tp + m.fp + m.fn + _SMOOTH)
    return common_row(m) | {
        "dice": 2 * m.tp / (m.true_voxels + m.predicted_voxels + _SMOOTH),
        "iou": iou,
        "voe": 1 - iou,
        "precision": m.tp / (m.predicted_voxels + _SMOOTH),
        "recall": m.tp / (m.true_voxels + _SMOOTH),
        "hd95": m.pooled_hd95_voxels,
        "fpr": m.fp / (m.fp + m.tn + _SMOOTH),
        "fnr": m.fn / (m.fn + m.tp + _SMOOTH),
    }


_AS_PUBLISHED = "-as-published"
_ALL = frozenset({LESIONS, SURFACES})

CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention(
            "autopet", "autoPET I to III challenges", ("dice", "fp_volume_ml", "fn_volume_ml"), _ALL, _autopet,
            "Cases without a true lesion have no Dice and no false negative volume; they count for false positives.",
        ),
        Convention(
            "hecktor", "HECKTOR 2020 to 2025 challenges", ("aggregated dice", "aggregated f1", "dice", "hd95 median",
            "precision", "recall"), _ALL | {ELEMENTS}, _hecktor,
            "Where one mask is empty there is no HD95, and the case counts as infinitely far in the median.",
            infinite=lambda m: bool(m.true_voxels) != bool(m.predicted_voxels),
        ),
        Convention(
            "hecktor" + _AS_PUBLISHED, "the evaluator of HECKTOR 2020 and 2021", ("aggregated dice", "dice",
            "hd95 median", "precision", "recall"), _ALL | {SWAPPED}, _hecktor_as_published,
            "Two faults are reproduced: an empty prediction has HD95 0, the best there is, and spacings are taken "
            "along the wrong axes (x for z), which changes HD95 where voxels are not cubes.",
            # An empty truth is infinitely far for the library that the evaluator calls.
            infinite=lambda m: not m.true_voxels and bool(m.predicted_voxels),
        ),
        Convention(
            "cipa", "CIPA, CVPR 2025", ("pooled iou", "pooled dice", "pooled balanced_accuracy", "hd95"),
            _ALL | {IMAGES}, _cipa,
            "HD95 is the mean over axial images in pixels, 0 where both masks are empty; images where one is empty "
            "have none and are left out.", attrgetter("image_hd95"), "pixels", pooled_of_nothing=1.0,
        ),
        Convention(
            "cipa" + _AS_PUBLISHED, "CIPA's pred.py", ("pooled iou", "pooled dice", "pooled balanced_accuracy",
            "hd95"), _ALL | {DUMMIES}, _cipa_as_published,
            "One fault is reproduced: an empty prediction counts as the pixel (256, 256), wherever the tumour is. "
            "Images with a prediction and no tumour, at which the script stops, are left out.",
            attrgetter("published_image_hd95"), "pixels", pooled_of_nothing=1.0,
        ),
        Convention(
            "h2aseg", "H2ASeg, MICCAI 2024", ("dice", "hd95", "precision", "recall"), _ALL, _h2aseg,
            "Dice and HD95 over cases with lesions only; HD95 of both directions' distances in one heap, in mm.",
        ),
        Convention(
            "h2aseg" + _AS_PUBLISHED, "H2ASeg's metrics.py", ("dice", "iou", "fpr", "fnr", "hd95"),
            _ALL | {VOXELS}, _h2aseg_as_published,
            "Three faults are reproduced: 0.001 is added to denominators, HD95 is in voxels whatever their size, and "
            "lesion-free cases have Dice 0.", hd95_unit="voxels",
        ),
        Convention(
            "isanet", "ISA-Net, 2022", ("dice", "hd", "assd", "recall", "precision", "voe", "rvd"), _ALL, common_row,
            "The paper's printed VOE contradicts its Dice: do not compare with it.",
        ),
    )
}  # fmt: skip


def by_name(name: str) -> list[Convention]:
    """The conventions that ``--convention`` names: one, or for ``all`` the five without published faults.

    Raises:
        KeyError: with the names there are.
    """
    if name == "all":
        return [convention for key, convention in CONVENTIONS.items() if not key.endswith(_AS_PUBLISHED)]
    if name in CONVENTIONS:
        return [CONVENTIONS[name]]
    if name.removesuffix(_AS_PUBLISHED) in CONVENTIONS:
        plain = name.removesuffix(_AS_PUBLISHED)
        raise KeyError(f"{name}: no fault is known in what was published, so '{plain}' gives its numbers")
    raise KeyError(f"{name}: choose one of {', '.join(CONVENTIONS)}, or all")


def median_with_infinity(values: Sequence[float | None], infinite: int) -> float | None:
    """Median where ``infinite`` of the missing values count as infinitely large; None where there is no value."""
    heap = sorted([value for value in values if value is not None]) + [math.inf] * infinite
    if not heap:
        return None
    # The mean of a number and infinity, too.
    return math.inf if math.isinf(heap[len(heap) // 2]) else float(np.median(heap))
