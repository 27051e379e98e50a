"""A comparison as Markdown, CSV, LaTeX and box plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_h2a.evaluation.comparison import NEARER_TO_ZERO, SMALLER, Cell, Disagreement, cases_of
from nnunet_h2a.evaluation.conventions import Convention
from nnunet_h2a.evaluation.tables import metric_name

SIGNIFICANT = 0.05


def _arrow(metric: str, up: str, down: str, zero: str) -> str:
    return zero if metric in NEARER_TO_ZERO else down if metric in SMALLER else up


def _cell(cell: Cell, bold: str, underline: str, plus_minus: str, star: str) -> str:
    if cell.mean is None:
        return "–"
    text = f"{cell.mean:.4g}{plus_minus}{'–' if cell.std is None else f'{cell.std:.3g}'}"
    text = {1: bold, 2: underline}.get(cell.rank, "{}").replace("{}", text)
    return text + (star if cell.p_holm is not None and cell.p_holm < SIGNIFICANT else "")


def markdown(
    table: Mapping[str, Mapping[str, Cell]],
    convention: Convention,
    baseline: str,
    disputed: Sequence[Disagreement],
    extra: Mapping[str, Mapping[str, float | None]],
) -> str:
    """The table as Markdown; best bold, second underlined, a star for what differs from the baseline.

    Args:
        table: from :func:`nnunet_h2a.evaluation.comparison.compare`.
        convention: by which was scored.
        baseline: that was tested against.
        disputed: cases in which models disagree most.
        extra: numbers of the whole set by model: pooled and aggregated ratios.
    """
    metrics = list(next(iter(table.values())))
    names = [f"{metric_name(m, convention)} {_arrow(m, '↑', '↓', '→ 0')}" for m in metrics]
    sets = list(next(iter(extra.values()))) if extra else []
    lines = [
        f"# Comparison by {convention.name}", "",
        f"Mean ± SD over cases, scored as by {convention.source}. Best **bold**, second <u>underlined</u>; * differs "
        f"from {baseline} (paired Wilcoxon signed-rank test, p < {SIGNIFICANT} after Holm's correction over the "
        f"models). {convention.remark}".rstrip(), "",
        "| model | " + " | ".join([*names, *sets]) + " |", "|---" * (1 + len(names) + len(sets)) + "|",
    ]  # fmt: skip
    for model, cells in table.items():
        row = [_cell(cells[m], "**{}**", "<u>{}</u>", " ± ", " *") for m in metrics]
        row += ["–" if extra[model][name] is None else f"{extra[model][name]:.4g}" for name in sets]
        lines.append(f"| {model} | " + " | ".join(row) + " |")
    lines += ["", "p after correction (cases in which both models have the number):", ""]
    lines += ["| model | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for model, cells in table.items():
        if model != baseline:
            row = ["–" if cells[m].p_holm is None else f"{cells[m].p_holm:.3g} ({cells[m].pairs})" for m in metrics]
            lines.append(f"| {model} | " + " | ".join(row) + " |")
    if disputed:
        lines += ["", "Cases in which the models' Dice differ most:", ""]
        lines += ["| case | label | " + " | ".join(table) + " |", "|---" * (2 + len(table)) + "|"]
        for item in disputed:
            row = ["–" if item.dice[model] is None else f"{item.dice[model]:.3f}" for model in table]
            lines.append(f"| {item.case} | {item.label} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


_ESCAPED = {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "–": "--", "→": r"$\to$"}


_TEX_ARROWS = (r"\uparrow", r"\downarrow", r"\to 0")


def _escaped(text: str) -> str:
    return "".join(_ESCAPED.get(letter, letter) for letter in text)


def latex(table: Mapping[str, Mapping[str, Cell]], convention: Convention, baseline: str) -> str:
    """The table for a paper; needs the package booktabs."""
    metrics = list(next(iter(table.values())))
    names = [f"{_escaped(metric_name(m, convention))} ${_arrow(m, *_TEX_ARROWS)}$" for m in metrics]
    lines = [
        f"% {convention.name}: mean and SD over cases; best bold, second underlined; * p < {SIGNIFICANT} against "
        f"{_escaped(baseline)}, Wilcoxon signed-rank, Holm",
        rf"\begin{{tabular}}{{l{'c' * len(metrics)}}}", r"\toprule",
        "Model & " + " & ".join(names) + r" \\", r"\midrule",
    ]  # fmt: skip
    for model, cells in table.items():
        row = [_cell(cells[m], r"\textbf{{}}", r"\underline{{}}", r" $\pm$ ", "$^*$") for m in metrics]
        lines.append(f"{_escaped(model)} & " + " & ".join(text.replace("–", "--") for text in row) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def long_csv(table: Mapping[str, Mapping[str, Cell]]) -> str:
    """A row per model and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["model", "metric", "mean", "std", "median", "n", "ci95_low", "ci95_high", "p", "p_holm", "pairs", "rank"]
    )
    for model, cells in table.items():
        for metric, c in cells.items():
            low, high = c.ci95 or (None, None)
            writer.writerow([model, metric, c.mean, c.std, c.median, c.n, low, high, c.p, c.p_holm, c.pairs, c.rank])
    return text.getvalue()


def box_plots(
    path: Path, summaries: Mapping[str, Mapping[str, Any]], metrics: Sequence[str], convention: Convention
) -> None:
    """A box per model and metric over the cases that have it, whiskers of 1.5 times its height; a point per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(metrics), figsize=(1.2 + (0.6 + 0.5 * len(summaries)) * len(metrics), 4),
                                   squeeze=False, layout="constrained")  # fmt: skip
    for axis, metric in zip(axes[0], metrics, strict=True):
        values = [
            [row[metric] for row in cases_of(summary).values() if row[metric] is not None]
            for summary in summaries.values()
        ]
        axis.boxplot(values, showfliers=False, widths=0.6)
        for place, column in enumerate(values, 1):
            # Beside each other in a fixed order, so that the same numbers make the same picture.
            spread = [place + 0.2 * ((k * 0.618) % 1 - 0.5) for k in range(len(column))]
            axis.plot(spread, column, ".", color="0.4", markersize=3, alpha=0.6)
        axis.set_title(metric_name(metric, convention), fontsize="small")
        axis.set_xticks(range(1, len(summaries) + 1), list(summaries), rotation=90, fontsize="x-small")
    half = path.with_name(f".{path.name}.part.png")
    figure.savefig(half, dpi=150)
    pyplot.close(figure)
    half.replace(path)
