"""From scored cases to numbers of a set: means, medians, bootstrap intervals, pooled and aggregated ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_h2a.evaluation.conventions import COUNTS, Convention, Row, median_with_infinity
from nnunet_h2a.evaluation.measure import Measures
from nnunet_h2a.evaluation.pet import LESION_QUANTITIES, QUANTITIES, agreement

RESAMPLES = 2000
#: Means of a metric in the resampled sets, and how many values each case has.
Resampled = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Scored:
    """One case and label.

    Attributes:
        case: identifier.
        patient: whom the case is of; cases of one patient are drawn together by the bootstrap.
        label: integer, or the list of a region's integers.
        name: of the label.
        measures: what was measured.
        pet: for ``"true"`` and ``"predicted"`` what is said of the ``patient`` and of the ``lesions``; or None.
    """

    case: str
    patient: str
    label: int | list[int]
    name: str
    measures: Measures
    pet: dict[str, dict[str, Any]] | None = None


class Bootstrap:
    """Resampled sets of patients, the same for every number of a table.

    Patients are drawn with replacement, as many as there are, 2000 times with a fixed seed; the interval is that of the
    2.5th and 97.5th percentile of what comes out.
    """

    def __init__(self, patients: Sequence[str]) -> None:
        names = sorted(set(patients))
        self._group = np.searchsorted(names, patients)
        self._number = len(names)
        draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / max(len(names), 1)), RESAMPLES)
        self._weights = draws.astype(float)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over each resampled set of one number per case."""
        return self._weights @ np.bincount(self._group, values, self._number)

    def interval(self, numbers: np.ndarray, counts: np.ndarray) -> list[float] | None:
        """95 % interval; sets in which the number is not defined are left out.

        Args:
            numbers: one for each resampled set.
            counts: for each case, whether (or how often) it has the number. One patient alone has no interval.
        """
        defined = numbers[np.isfinite(numbers)]
        patients = np.count_nonzero(np.bincount(self._group, counts, self._number))
        if patients < 2 or not len(defined):
            return None
        return [float(v) for v in np.percentile(defined, [2.5, 97.5])]


def _divide(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    return np.divide(parts, wholes, out=np.full(np.shape(parts), np.nan), where=wholes > 0)


def _values(convention: Convention, metric: str, rows: Sequence[Row], scored: Sequence[Scored]) -> list[list[float]]:
    """The numbers that a metric's mean is taken over, by case; a convention may have several for a case."""
    if metric == "hd95" and convention.images is not None:
        return [[v for v in convention.images(item.measures) if v is not None] for item in scored]
    return [[row[metric]] if row.get(metric) is not None else [] for row in rows]


def _statistics(
    convention: Convention, scored: Sequence[Scored], rows: Sequence[Row], bootstrap: Bootstrap
) -> tuple[dict[str, dict[str, Any]], dict[str, Resampled]]:
    """Mean, SD, median, interval and number of each metric of one label; and its means in the resampled sets."""
    found: dict[str, dict[str, Any]] = {key: {} for key in ("mean", "std", "median", "ci95", "n")}
    resampled = {}
    for metric in (key for key in rows[0] if key not in COUNTS):
        by_case = _values(convention, metric, rows, scored)
        values = [v for case in by_case for v in case]
        counts = np.array([float(len(case)) for case in by_case])
        sums = bootstrap.sums(np.array([float(sum(case)) for case in by_case]))
        resampled[metric] = _divide(sums, bootstrap.sums(counts)), counts
        infinite = 0
        if metric == "hd95" and convention.infinite is not None:
            infinite = sum(convention.infinite(item.measures) for item in scored)
        found["mean"][metric] = float(np.mean(values)) if values else None
        # Equal values have no spread; their mean's rounding would give them one.
        spread = float(np.std(values, ddof=1)) if len(set(values)) > 1 else 0.0
        found["std"][metric] = spread if len(values) > 1 else None
        found["median"][metric] = median_with_infinity(values, infinite)
        found["ci95"][metric] = bootstrap.interval(*resampled[metric])
        found["n"][metric] = len(values)
    return found, resampled


def _pooled(tp: Any, fp: Any, fn: Any, tn: Any, of_nothing: float | None) -> dict[str, Any]:
    """Ratios of summed voxels; ``of_nothing`` are Dice and IoU where nothing is to be found and nothing was found."""
    tp, fp, fn, tn = (np.asarray(number, float) for number in (tp, fp, fn, tn))
    empty, nothing = tp + fp + fn == 0, np.nan if of_nothing is None else of_nothing
    return {
        "dice": np.where(empty, nothing, _divide(2 * tp, 2 * tp + fp + fn)),
        "iou": np.where(empty, nothing, _divide(tp, tp + fp + fn)),
        "balanced_accuracy": (_divide(tp, tp + fn) + _divide(tn, tn + fp)) / 2,
    }


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def summarise(
    convention: Convention,
    scored: Sequence[Scored],
    refused: Mapping[str, str],
    resampled: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Content of the evaluation file.

    Args:
        convention: how to score.
        scored: at least one case and label; every label has the same cases.
        refused: cases without scores, and why.
        resampled: what lay on another grid, by case.

    Returns:
        ``cases``, one entry per case and label; ``mean``, ``std`` (n - 1), ``median``, ``ci95`` (bootstrap interval of
        the mean) and ``n`` of each metric, over several labels the average of the labels' values as in nnU-Net's
        ``foreground_mean``, and ``by_label``; ``pooled`` ratios of all voxels of all cases; ``aggregated_dice`` by
        label, of volumes, and ``aggregated_f1`` of detected lesions, both with the labels' mean and intervals; with
        PET ``pet_agreement``. None stands for what is not defined; ``infinite_median`` names the metrics whose median
        is None because it is infinite.
    """
    labels = list(dict.fromkeys(item.name for item in scored))
    by_label, agreements, totals, medians = {}, {}, [], []
    aggregated: dict[str, dict[str, Any]] = {name + end: {} for name in _AGGREGATED for end in ("", "_ci95")}
    averaged: dict[str, list[Resampled]] = {}
    cases: list[dict[str, Any]] = []
    bootstrap = None
    for name in labels:
        items = [item for item in scored if item.name == name]
        bootstrap = Bootstrap([item.patient for item in items])
        rows = [convention.row(item.measures) for item in items]
        key = str(items[0].label)
        statistics, drawn = _statistics(convention, items, rows, bootstrap)
        by_label[key] = {"name": name, **_finite(statistics)}
        medians.append(statistics["median"])
        for metric, means in drawn.items():
            averaged.setdefault(metric, []).append(means)
        for ratio, parts_of in _AGGREGATED.items():
            both, sizes = np.array([parts_of(item.measures) for item in items], float).T
            drawn_ratios = _divide(2 * bootstrap.sums(both), bootstrap.sums(sizes))
            aggregated[ratio][key] = _number(_divide(2 * both.sum(), sizes.sum()))
            aggregated[f"{ratio}_ci95"][key] = bootstrap.interval(drawn_ratios, sizes)
        totals.append(np.array([[m.tp, m.fp, m.fn, m.tn] for m in (item.measures for item in items)], float))
        if any(item.pet for item in items):
            agreements[key] = _agreements([item.pet for item in items if item.pet])
        for item, row in zip(items, rows, strict=True):
            entry = {"case": item.case, "label": item.label, "label_name": name, **row}
            cases.append(entry | ({"pet": item.pet} if item.pet else {}))
    voxels = sum(totals)
    resampled_voxels = [bootstrap.sums(column) for column in voxels.T]
    pooled = _pooled(*voxels.sum(0), convention.pooled_of_nothing)
    resampled_pooled = _pooled(*resampled_voxels, convention.pooled_of_nothing)
    for ratio in _AGGREGATED:
        defined = [value for value in aggregated[ratio].values() if value is not None]
        aggregated[f"{ratio}_mean"] = float(np.mean(defined)) if defined else None
    return {
        "convention": convention.name,
        "source": convention.source,
        "remark": convention.remark,
        "cases": sorted(cases, key=lambda entry: entry["case"]),
        **_finite(_average(by_label, medians, averaged, bootstrap)),
        "by_label": by_label,
        "pooled": {key: _number(value) for key, value in pooled.items()},
        "pooled_ci95": {key: bootstrap.interval(v, np.ones(len(voxels))) for key, v in resampled_pooled.items()},
        **aggregated,
        **({"pet_agreement": agreements} if agreements else {}),
        "resampled": dict(resampled or {}),
        "refused": dict(refused),
    }


_SIDES = ("true", "predicted")


def _agreements(cases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Predicted against true quantities, of cases and of lesions that belong together."""
    pairs = [
        (lesion, case["predicted"]["lesions"][lesion["partner"] - 1])
        for case in cases
        for lesion in case["true"]["lesions"]
        if lesion["partner"] is not None
    ]
    return {
        "case": {
            quantity: agreement(*([case[side]["patient"][quantity] for case in cases] for side in _SIDES))
            for quantity in QUANTITIES
        },
        "lesion": {
            quantity: agreement([one[quantity] for one, _ in pairs], [other[quantity] for _, other in pairs])
            for quantity in LESION_QUANTITIES
        },
    }


def _volumes(m: Measures) -> tuple[float, float]:
    """Common volume, and the sum of both volumes, in ml."""
    return m.tp * m.voxel_ml, (m.true_voxels + m.predicted_voxels) * m.voxel_ml


def _detections(m: Measures) -> tuple[float, float]:
    """Lesions of which enough overlaps, and the number of lesions of both masks."""
    return m.overlapping_lesions or 0, (m.lesions or 0) + (m.predicted_lesions or 0)


#: Ratios over all cases, by their name in the evaluation file: twice the sum of the one over the sum of the other.
_AGGREGATED = {"aggregated_dice": _volumes, "aggregated_f1": _detections}


def _finite(statistics: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Statistics as JSON can hold them: infinite medians are named and not given."""
    infinite = [metric for metric, median in statistics["median"].items() if median == math.inf]
    return {**statistics, "median": statistics["median"] | dict.fromkeys(infinite), "infinite_median": infinite}


def _average(
    by_label: Mapping[str, Mapping[str, Any]],
    medians: Sequence[Mapping[str, float | None]],
    resampled: Mapping[str, list[Resampled]],
    bootstrap: Bootstrap,
) -> dict[str, dict[str, Any]]:
    """Averages of the labels' values, where they are defined; of an infinite median the average is infinite."""
    found: dict[str, dict[str, Any]] = {}
    of_labels = {key: [label[key] for label in by_label.values()] for key in ("mean", "std")} | {"median": medians}
    for key, labels in of_labels.items():
        found[key] = {}
        for metric in resampled:
            values = [label[metric] for label in labels if label[metric] is not None]
            found[key][metric] = float(np.mean(values)) if values else None
    found["ci95"], found["n"] = {}, {}
    for metric, labels in resampled.items():
        kept = [(means, counts) for means, counts in labels if np.isfinite(means).any()]
        averages = np.mean([means for means, _ in kept], axis=0) if kept else np.array([])
        found["ci95"][metric] = bootstrap.interval(averages, sum(counts for _, counts in kept)) if kept else None
        found["n"][metric] = sum(label["n"][metric] for label in by_label.values())
    return found
