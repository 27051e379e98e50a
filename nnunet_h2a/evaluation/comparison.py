"""Several models on the same cases: who is better in what, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

#: Metrics of which less is better; of ``rvd`` what is nearer to 0; of all others more.
SMALLER = frozenset({"hd95", "hd", "assd", "voe", "fp_volume_ml", "fn_volume_ml", "fpr", "fnr"})
NEARER_TO_ZERO = frozenset({"rvd"})


@dataclass(frozen=True)
class Cell:
    """One metric of one model.

    Attributes:
        mean, std, median: over the cases where it is defined.
        n: their number.
        ci95: bootstrap interval of the mean.
        p: of the paired Wilcoxon signed-rank test against the baseline; None for the baseline itself, and where fewer
            than one pair is defined.
        p_holm: the same after Holm's correction over the models of one metric.
        pairs: cases in which both models have the metric.
        rank: 1 for the best mean, 2 for the second; models with equal means share a rank.
    """

    mean: float | None
    std: float | None
    median: float | None
    n: int
    ci95: list[float] | None
    p: float | None = None
    p_holm: float | None = None
    pairs: int = 0
    rank: int | None = None


def paired_p(one: Sequence[float | None], other: Sequence[float | None]) -> tuple[float | None, int]:
    """Two-sided p of the Wilcoxon signed-rank test of two models' numbers for the same cases, and the number of pairs.

    Cases in which one of them has none are left out, equal pairs have no sign (Wilcoxon's treatment); 1 where all pairs
    are equal, None where there is no pair.
    """
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if not pairs:
        return None, 0
    first, second = np.array(pairs).T
    if (first == second).all():
        return 1.0, len(pairs)
    return float(wilcoxon(first, second).pvalue), len(pairs)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction for several tests; None stays None and does not count."""
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for position, (p, place) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - position) * p))
        corrected[place] = largest
    return corrected


def _merit(metric: str, mean: float) -> float:
    """Larger is better."""
    if metric in NEARER_TO_ZERO:
        return -abs(mean)
    return -mean if metric in SMALLER else mean


def compare(
    summaries: Mapping[str, Mapping[str, Any]], baseline: str, metrics: Sequence[str]
) -> dict[str, dict[str, Cell]]:
    """Cells of the table.

    Args:
        summaries: evaluation file of each model; all of the same cases and labels.
        baseline: the model that the others are tested against.
        metrics: to compare.

    Returns:
        For each model the cell of each metric.
    """
    values = {model: cases_of(summary) for model, summary in summaries.items()}
    table: dict[str, dict[str, Cell]] = {model: {} for model in summaries}
    for metric in metrics:
        others = [model for model in summaries if model != baseline]
        tests = [
            paired_p(
                [row[metric] for row in values[model].values()], [row[metric] for row in values[baseline].values()]
            )
            for model in others
        ]
        corrected = dict(zip(others, holm([p for p, _ in tests]), strict=True))
        tested = dict(zip(others, tests, strict=True))
        means = {model: summary["mean"][metric] for model, summary in summaries.items()}
        merits = sorted({_merit(metric, mean) for mean in means.values() if mean is not None}, reverse=True)
        for model, summary in summaries.items():
            mean = means[model]
            p, pairs = tested.get(model, (None, 0))
            table[model][metric] = Cell(
                mean, summary["std"][metric], summary["median"][metric], summary["n"][metric],
                summary["ci95"][metric], p, corrected.get(model), pairs,
                None if mean is None else merits.index(_merit(metric, mean)) + 1,
            )  # fmt: skip
    return table


def cases_of(summary: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Rows by case and label, in one order for all models."""
    rows = {(entry["case"], str(entry["label"])): entry for entry in summary["cases"]}
    return dict(sorted(rows.items()))


@dataclass(frozen=True)
class Disagreement:
    """A case in which models differ.

    Attributes:
        case, label: which.
        spread: standard deviation of the models' Dice.
        dice: of each model.
    """

    case: str
    label: str
    spread: float
    dice: dict[str, float | None]


def disagreements(summaries: Mapping[str, Mapping[str, Any]], most: int = 10) -> list[Disagreement]:
    """The cases in which the models' Dice differ most, the most disputed first."""
    values = {model: cases_of(summary) for model, summary in summaries.items()}
    found = []
    for case, label in next(iter(values.values())):
        dice = {model: rows[case, label]["dice"] for model, rows in values.items()}
        defined = [value for value in dice.values() if value is not None]
        if len(defined) > 1 and np.std(defined) > 0:
            found.append(Disagreement(case, label, float(np.std(defined)), dice))
    return sorted(found, key=lambda item: (-item.spread, item.case, item.label))[:most]
