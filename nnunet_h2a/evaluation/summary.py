"""From scored cases to numbers of a set: means, medians, bootstrap intervals, pooled and aggregated ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_h2a.evaluation.conventions import COUNTS, Convention, Row, median_with_infinity
from nnunet_h2a.evaluation.measure import Measures
from nnunet_h2a.evaluation.pet import QUANTITIES, agreement

RESAMPLES = 2000
POOLED = ("dice", "iou", "balanced_accuracy")


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

    def interval(self, numbers: np.ndarray) -> list[float] | None:
        """95 % interval; sets in which the number is not defined are left out, and one patient has no interval."""
        defined = numbers[np.isfinite(numbers)]
        if self._number < 2 or not len(defined):
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
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Mean, SD, median, interval and number of each metric of one label; and the means of the resampled sets."""
    found: dict[str, dict[str, Any]] = {key: {} for key in ("mean", "std", "median", "ci95", "n")}
    resampled = {}
    for metric in (key for key in rows[0] if key not in COUNTS):
        by_case = _values(convention, metric, rows, scored)
        values = [v for case in by_case for v in case]
        resampled[metric] = _divide(
            bootstrap.sums(np.array([sum(case) for case in by_case])),
            bootstrap.sums(np.array([float(len(case)) for case in by_case])),
        )
        infinite = 0
        if metric == "hd95" and convention.infinite_in_median:
            infinite = sum(bool(s.measures.true_voxels) != bool(s.measures.predicted_voxels) for s in scored)
        found["mean"][metric] = float(np.mean(values)) if values else None
        found["std"][metric] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        found["median"][metric] = median_with_infinity(values, infinite)
        found["ci95"][metric] = bootstrap.interval(resampled[metric])
        found["n"][metric] = len(values)
    return found, resampled


def _pooled(tp: Any, fp: Any, fn: Any, tn: Any) -> dict[str, Any]:
    """Ratios of summed voxels; Dice and IoU are 1 where there is nothing to find and nothing found, as CIPA has it."""
    tp, fp, fn, tn = (np.asarray(number, float) for number in (tp, fp, fn, tn))
    empty = tp + fp + fn == 0
    return {
        "dice": np.where(empty, 1.0, _divide(2 * tp, 2 * tp + fp + fn)),
        "iou": np.where(empty, 1.0, _divide(tp, tp + fp + fn)),
        "balanced_accuracy": (_divide(tp, tp + fn) + _divide(tn, tn + fp)) / 2,
    }


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def summarise(convention: Convention, scored: Sequence[Scored], refused: Mapping[str, str]) -> dict[str, Any]:
    """Content of the evaluation file.

    Args:
        convention: how to score.
        scored: at least one case and label; every label has the same cases.
        refused: cases without scores, and why.

    Returns:
        ``cases``, one entry per case and label; ``mean``, ``std`` (n - 1), ``median``, ``ci95`` (bootstrap interval of
        the mean) and ``n`` of each metric, over several labels the average of the labels' values as in nnU-Net's
        ``foreground_mean``, and ``by_label``; ``pooled`` ratios of all voxels of all cases; ``aggregated_dice`` by
        label, of volumes; with PET ``pet_agreement``. None stands for what is not defined.
    """
    labels = list(dict.fromkeys(item.name for item in scored))
    by_label, aggregated, aggregated_interval, agreements, totals = {}, {}, {}, {}, []
    averaged: dict[str, list[np.ndarray]] = {}
    cases: list[dict[str, Any]] = []
    bootstrap = None
    for name in labels:
        items = [item for item in scored if item.name == name]
        bootstrap = Bootstrap([item.patient for item in items])
        rows = [convention.row(item.measures) for item in items]
        key = str(items[0].label)
        statistics, resampled = _statistics(convention, items, rows, bootstrap)
        by_label[key] = {"name": name, **statistics}
        for metric, means in resampled.items():
            averaged.setdefault(metric, []).append(means)
        both, sizes = (np.array(v) for v in zip(*(_volumes(item.measures) for item in items), strict=True))
        aggregated[key] = _number(_divide(2 * both.sum(), sizes.sum()))
        aggregated_interval[key] = bootstrap.interval(_divide(2 * bootstrap.sums(both), bootstrap.sums(sizes)))
        totals.append(np.array([[m.tp, m.fp, m.fn, m.tn] for m in (item.measures for item in items)], float))
        if any(item.pet for item in items):
            agreements[key] = {
                quantity: agreement(
                    *([item.pet[side]["patient"][quantity] if item.pet else None for item in items] for side in _SIDES)
                )
                for quantity in QUANTITIES
            }
        for item, row in zip(items, rows, strict=True):
            entry = {"case": item.case, "label": item.label, "label_name": name, **row}
            cases.append(entry | ({"pet": item.pet} if item.pet else {}))
    voxels = sum(totals)
    resampled_voxels = [bootstrap.sums(column) for column in voxels.T]
    pooled = _pooled(*voxels.sum(0))
    return {
        "convention": convention.name,
        "source": convention.source,
        "remark": convention.remark,
        "cases": sorted(cases, key=lambda entry: entry["case"]),
        **_average(by_label, averaged, bootstrap),
        "by_label": by_label,
        "pooled": {key: _number(value) for key, value in pooled.items()},
        "pooled_ci95": {key: bootstrap.interval(v) for key, v in _pooled(*resampled_voxels).items()},
        "aggregated_dice": aggregated,
        "aggregated_dice_ci95": aggregated_interval,
        **({"pet_agreement": agreements} if agreements else {}),
        "refused": dict(refused),
    }


_SIDES = ("true", "predicted")


def _volumes(m: Measures) -> tuple[float, float]:
    """Common volume, and the sum of both volumes, in ml."""
    return m.tp * m.voxel_ml, (m.true_voxels + m.predicted_voxels) * m.voxel_ml


def _average(
    by_label: Mapping[str, Mapping[str, Any]], resampled: Mapping[str, list[np.ndarray]], bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """Averages of the labels' values, where they are defined."""
    found: dict[str, dict[str, Any]] = {}
    for key in ("mean", "std", "median"):
        found[key] = {}
        for metric in resampled:
            values = [label[key][metric] for label in by_label.values() if label[key][metric] is not None]
            found[key][metric] = float(np.mean(values)) if values else None
    found["ci95"], found["n"] = {}, {}
    for metric, means in resampled.items():
        kept = [m for m in means if np.isfinite(m).any()]
        found["ci95"][metric] = bootstrap.interval(np.mean(kept, axis=0)) if kept else None
        found["n"][metric] = sum(label["n"][metric] for label in by_label.values())
    return found
