"""The evaluation file, and the tables beside it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_h2a.command import write_whole
from nnunet_h2a.evaluation.conventions import COUNTS, Convention
from nnunet_h2a.evaluation.pet import QUANTITIES

_NAMES = {
    "dice": "Dice", "iou": "IoU", "hd95": "HD95", "hd": "HD", "assd": "ASSD", "voe": "VOE", "rvd": "RVD",
    "fp_volume_ml": "false positive volume (ml)", "fn_volume_ml": "false negative volume (ml)",
    "lesion_f1": "lesion detection F1", "fpr": "false positive rate", "fnr": "false negative rate",
    "balanced_accuracy": "balanced accuracy", "f1": "F1 of detection",
}  # fmt: skip


#: Endings of an evaluation's files.
FILES = (".json", ".csv", ".md")


def write_summary(path: Path, summary: Mapping[str, Any], convention: Convention) -> list[Path]:
    """Write ``path``, and beside it a CSV file with a row per case and a Markdown table; whole files or none.

    Returns:
        What was written.
    """
    contents = {
        path: json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        path.with_suffix(".csv"): cases_csv(summary),
        path.with_suffix(".md"): markdown(summary, convention),
    }
    if lesions := lesions_csv(summary):
        contents[path.with_name(f"{path.stem}_lesions.csv")] = lesions
    write_whole(contents)
    # Of an earlier run with images.
    if not lesions:
        path.with_name(f"{path.stem}_lesions.csv").unlink(missing_ok=True)
    return list(contents)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def cases_csv(summary: Mapping[str, Any]) -> str:
    """A row per case and label; empty where a number is not defined."""
    rows = []
    for entry in summary["cases"]:
        row = {key: value for key, value in entry.items() if key != "pet"}
        for side, quantities in entry.get("pet", {}).items():
            row |= {f"{side}_{quantity}": quantities["patient"][quantity] for quantity in QUANTITIES}
        rows.append(row)
    return _csv(rows)


def lesions_csv(summary: Mapping[str, Any]) -> str:
    """A row per true and predicted lesion; empty without PET."""
    rows = [
        {"case": entry["case"], "label": entry["label"], "mask": side, "lesion": number, **lesion}
        for entry in summary["cases"]
        for side, quantities in entry.get("pet", {}).items()
        for number, lesion in enumerate(quantities["lesions"], 1)
    ]
    return _csv(rows) if rows else ""


def _shown(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _median(statistics: Mapping[str, Any], metric: str) -> str:
    return "∞" if metric in statistics["infinite_median"] else _shown(statistics["median"][metric])


def _interval(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{_shown(interval[0])} to {_shown(interval[1])}"


def metric_name(metric: str, convention: Convention) -> str:
    """A metric as tables call it, with its unit."""
    unit = ""
    if metric in ("hd", "assd") or (metric == "hd95" and convention.hd95_unit == "mm"):
        unit = " (mm)"
    elif metric == "hd95":
        unit = f" ({convention.hd95_unit})"
    return _NAMES.get(metric, metric) + unit


def markdown_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table; names may hold anything that file names may."""
    return "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in cells) + " |"


def markdown_head(cells: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [markdown_row(cells), "|---" * len(cells) + "|"]


def markdown(summary: Mapping[str, Any], convention: Convention) -> str:
    """What the convention reports, then every metric by label, as Markdown."""
    number = len({entry["case"] for entry in summary["cases"]})
    lines = [
        f"# {convention.name}: {number} case{'s' * (number != 1)}",
        "",
        f"Scored as by {convention.source}.",
    ]
    if convention.remark:
        lines[-1] += f" {convention.remark}"
    lines += ["", *markdown_head(["reported", "value", "95 % interval"])]
    for reported in convention.reported:
        lines += [markdown_row(cells) for cells in _reported(reported, summary, convention)]
    for key, label in summary["by_label"].items():
        lines += ["", f"## {label['name']} (label {key})", ""]
        lines += markdown_head(["metric", "cases", "mean ± SD", "95 % interval of the mean", "median"])
        for metric, mean in label["mean"].items():
            lines.append(
                f"| {metric_name(metric, convention)} | {label['n'][metric]} | {_shown(mean)} ± "
                f"{_shown(label['std'][metric])} | {_interval(label['ci95'][metric])} | "
                f"{_median(label, metric)} |"
            )
        counts = {c: sum(e[c] or 0 for e in summary["cases"] if str(e["label"]) == key) for c in COUNTS}
        lines += ["", ", ".join(f"{name.replace('_', ' ')}: {number}" for name, number in counts.items())]
        for kind, quantities in summary.get("pet_agreement", {}).get(key, {}).items():
            of_what = "cases" if kind == "case" else "lesions, each with its counterpart"
            head = ["PET quantity", of_what, "bias (predicted minus true)", "limits of agreement"]
            lines += ["", *markdown_head(head)]
            lines += [
                f"| {name} | {q['n']} | {_shown(q['bias'])} | "
                f"{_interval(None if q['lower'] is None else [q['lower'], q['upper']])} |"
                for name, q in quantities.items()
            ]  # fmt: skip
    if summary["resampled"]:
        lines += ["", "On other grids, resampled by position:", ""]
        lines += [f"- {case}: {'; '.join(what)}" for case, what in summary["resampled"].items()]
    if summary["refused"]:
        lines += ["", "Not scored:", "", *(f"- {case}: {why}" for case, why in summary["refused"].items())]
    return "\n".join(lines) + "\n"


def _reported(reported: str, summary: Mapping[str, Any], convention: Convention) -> list[tuple[str, str, str]]:
    """Name, value and interval of one of the numbers that a convention reports."""
    kind, _, metric = reported.rpartition(" ")
    if kind == "aggregated":
        name, ratio = f"aggregated {metric_name(metric, convention)}", f"aggregated_{metric}"
        labels = [
            (f"{name}, {summary['by_label'][key]['name']}", _shown(value), _interval(summary[f"{ratio}_ci95"][key]))
            for key, value in summary[ratio].items()
        ]
        mean = (f"{name}, mean of the labels", _shown(summary[f"{ratio}_mean"]), "–")
        return [*labels, mean] if len(labels) > 1 else labels
    if kind == "pooled":
        name = f"pooled {_NAMES.get(metric, metric)}"
        return [(name, _shown(summary["pooled"][metric]), _interval(summary["pooled_ci95"][metric]))]
    if metric == "median":
        return [(f"median {metric_name(kind, convention)}", _median(summary, kind), "–")]
    value = f"{_shown(summary['mean'][metric])} ± {_shown(summary['std'][metric])}"
    return [(f"mean {metric_name(metric, convention)}", value, _interval(summary["ci95"][metric]))]
