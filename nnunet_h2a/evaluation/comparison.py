"""Several models on the same cases: who is better in what, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import PermutationMethod, wilcoxon

from nnunet_h2a.evaluation.conventions import CONVENTIONS, Convention

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
        p: of the paired Wilcoxon signed-rank test against the baseline; None for the baseline itself, and where there
            is no pair.
        p_holm: the same after Holm's correction over the models of one metric.
        pairs: cases in which both models have the metric.
        rank: 1 for the best mean, 2 for the second; models with equal means share a rank.
        complete: whether no other model has the metric in a case where this one has not.
        of_the_set: whether it is one number of all cases together, and no mean.
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
    complete: bool = True
    of_the_set: bool = False


#: Cells by model and column.
Table = dict[str, dict[str, Cell]]


#: Up to so many pairs with a difference every assignment of signs is tried; SciPy's tables hold without ties only.
_EXACT = 13
#: Numbers that differ by less, relatively, are equal: sums of floats in another order differ by about 1e-15.
_SAME = 1e-9


def paired(one: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> tuple[list[float], list[float]]:
    """A metric of two models, case by case, where both have it.

    Labels of one case are not independent of each other, so that a case is one observation: the mean of the labels that
    both models have.

    Args:
        one: evaluation file.
        other: evaluation file, of the same cases and labels.
        metric: of cases.
    """
    others = cases_of(other)
    found: dict[str, list[tuple[float, float]]] = {}
    for key, row in cases_of(one).items():
        pair = row[metric], others[key][metric]
        if None not in pair:
            found.setdefault(key[0], []).append(pair)
    means = [np.mean(pairs, axis=0) for pairs in found.values()]
    return [float(pair[0]) for pair in means], [float(pair[1]) for pair in means]


def paired_p(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Two-sided p of the Wilcoxon signed-rank test of two models' numbers for the same cases.

    Equal pairs have no sign and are left out (Wilcoxon's treatment). The distribution is exact up to 13 differences,
    and up to 50 where no two are equally large. 1 where all pairs are equal, None where there is no pair.
    """
    if not len(one):
        return None
    first, second = np.asarray(one, float), np.asarray(other, float)
    unit = _SAME * max(np.abs(first).max(), np.abs(second).max())
    # In whole units: ties that rounding has torn apart, as of 0.3 - 0.2 and 0.2 - 0.1, would change the ranks.
    differences = np.rint((first - second) / unit) if unit else np.zeros(len(first))
    # With zeros among them SciPy would leave the exact test for an approximation.
    differences = differences[differences != 0]
    # Of one difference either sign is as likely, and SciPy tries no permutation of it.
    if len(differences) < 2:
        return 1.0
    method = PermutationMethod(n_resamples=np.inf) if len(differences) <= _EXACT else "auto"
    return float(wilcoxon(differences, method=method).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction for several tests; None stays None and does not count."""
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for position, (p, place) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - position) * p))
        corrected[place] = largest
    return corrected


def _merit(name: str, mean: float) -> float:
    """Larger is better; what is equal but for the order of summation is equal."""
    metric = name.removesuffix(" median")
    rounded = float(f"{mean:.9g}")
    if metric in NEARER_TO_ZERO:
        return -abs(rounded)
    return -rounded if metric in SMALLER else rounded


def compare(
    summaries: Mapping[str, Mapping[str, Any]],
    baseline: str,
    metrics: Sequence[str],
    reported: Sequence[str] | None = None,
) -> Table:
    """Cells of the table.

    Args:
        summaries: evaluation file of each model; all of the same cases and labels.
        baseline: the model that the others are tested against.
        metrics: of cases, to compare.
        reported: what the convention says of the whole set, of :func:`set_metrics`; None: all of it.

    Returns:
        For each model the cell of each column.
    """
    table: Table = {model: {} for model in summaries}
    for metric in metrics:
        others = [model for model in summaries if model != baseline]
        pairs = {model: paired(summaries[model], summaries[baseline], metric) for model in others}
        tests = {model: paired_p(*values) for model, values in pairs.items()}
        corrected = dict(zip(others, holm(list(tests.values())), strict=True))
        having = {
            model: {key for key, row in cases_of(summary).items() if row[metric] is not None}
            for model, summary in summaries.items()
        }
        every, most = set().union(*having.values()), max(summary["n"][metric] for summary in summaries.values())
        for model, summary in summaries.items():
            statistics = {key: summary[key][metric] for key in ("mean", "std", "median", "n", "ci95")}
            statistics["median"] = _median(summary, metric)
            table[model][metric] = Cell(
                **statistics, p=tests.get(model), p_holm=corrected.get(model), pairs=len(pairs.get(model, ([],))[0]),
                complete=having[model] == every and statistics["n"] == most,
            )  # fmt: skip
    for model, summary in summaries.items():
        number = len({entry["case"] for entry in summary["cases"]})
        for name, (value, interval) in of_the_set(summary, reported).items():
            table[model][name] = Cell(value, None, None, number, interval, of_the_set=True)
    return ranked(table)


def ranked(table: Table) -> Table:
    """The table with ranks: of the models that have a number for every case that any model has it for.

    A mean over fewer cases is no equal: who predicts one easy case and nothing else would be the best.
    """
    result: Table = {model: {} for model in table}
    for name in next(iter(table.values())):
        merits = {
            model: _merit(name, cells[name].mean)
            for model, cells in table.items()
            if cells[name].mean is not None and math.isfinite(cells[name].mean) and cells[name].complete
        }
        order = sorted(set(merits.values()), reverse=True)
        for model, cells in table.items():
            rank = order.index(merits[model]) + 1 if model in merits else None
            result[model][name] = replace(cells[name], rank=rank)
    return result


def _median(summary: Mapping[str, Any], metric: str) -> float | None:
    return math.inf if metric in summary["infinite_median"] else summary["median"][metric]


def set_metrics(convention: Convention) -> list[str]:
    """What a convention says of all cases together: pooled and aggregated ratios, medians."""
    return [
        name for name in convention.reported
        if name.startswith(("pooled ", "aggregated ")) or name.endswith(" median")
    ]  # fmt: skip


def of_the_set(
    summary: Mapping[str, Any], wanted: Sequence[str] | None = None
) -> dict[str, tuple[float | None, list[float] | None]]:
    """What a convention says of all cases together, and its interval.

    Args:
        summary: evaluation file.
        wanted: of :func:`set_metrics`; None: all.
    """
    found: dict[str, tuple[float | None, list[float] | None]] = {}
    for reported in set_metrics(CONVENTIONS[summary["convention"]]) if wanted is None else wanted:
        kind, _, metric = reported.rpartition(" ")
        if kind == "aggregated":
            ratio = f"aggregated_{metric}"
            for key, value in summary[ratio].items():
                found[f"{reported} of {summary['by_label'][key]['name']}"] = value, summary[f"{ratio}_ci95"][key]
            if len(summary[ratio]) > 1:
                found[f"{reported}, mean"] = summary[f"{ratio}_mean"], None
        elif kind == "pooled":
            found[reported] = summary["pooled"][metric], summary["pooled_ci95"][metric]
        else:
            found[reported] = _median(summary, kind), None
    return found


def cases_of(summary: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Rows by case and label, in one order for all models."""
    rows = {(entry["case"], str(entry["label"])): entry for entry in summary["cases"]}
    return dict(sorted(rows.items()))


@dataclass(frozen=True)
class Disagreement:
    """A case in which models differ.

    Attributes:
        case, label: which; the label by its name.
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
            name = next(iter(values.values()))[case, label].get("label_name", label)
            found.append(Disagreement(case, name, float(np.std(defined)), dice))
    return sorted(found, key=lambda item: (-item.spread, item.case, item.label))[:most]
