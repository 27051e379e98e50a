"""A comparison as Markdown, CSV, LaTeX and box plots."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_h2a.evaluation.comparison import NEARER_TO_ZERO, SMALLER, Cell, Disagreement, Table, cases_of
from nnunet_h2a.evaluation.conventions import Convention
from nnunet_h2a.evaluation.tables import markdown_head, markdown_row, metric_name

SIGNIFICANT = 0.05
_PLOTS_IN_A_ROW = 4


def _arrow(name: str, up: str, down: str, zero: str) -> str:
    metric = name.removesuffix(" median")
    return zero if metric in NEARER_TO_ZERO else down if metric in SMALLER else up


def _heading(name: str, convention: Convention) -> str:
    """A column as tables call it."""
    kind, _, rest = name.partition(" ")
    if kind in ("pooled", "aggregated"):
        # Of the aggregated ratios a label's name follows.
        metric = re.match(r"\w+", rest)[0]
        return f"{kind} {metric_name(metric, convention)}{rest.removeprefix(metric)}"
    if name.endswith(" median"):
        return f"median {metric_name(name.removesuffix(' median'), convention)}"
    return metric_name(name, convention)


def _cell(cell: Cell, bold: str, underline: str, plus_minus: str, star: str) -> str:
    if cell.mean is None:
        return "–"
    spread = "" if cell.of_the_set else f"{plus_minus}{'–' if cell.std is None else f'{cell.std:.3g}'}"
    number = "∞" if math.isinf(cell.mean) else f"{cell.mean:.4g}"
    text = {1: bold, 2: underline}.get(cell.rank, "{}").replace("{}", number + spread)
    text += star if cell.p_holm is not None and cell.p_holm < SIGNIFICANT else ""
    return text if cell.complete else f"{text} (n = {cell.n})"


def markdown(table: Table, convention: Convention, baseline: str, disputed: Sequence[Disagreement]) -> str:
    """The table as Markdown; best bold, second underlined, a star for what differs from the baseline.

    Args:
        table: from :func:`nnunet_h2a.evaluation.comparison.compare`.
        convention: by which was scored.
        baseline: that was tested against.
        disputed: cases in which models disagree most.
    """
    columns = list(next(iter(table.values())))
    tested = [c for c in columns if any(cells[c].p_holm is not None for cells in table.values())]
    names = {c: f"{_heading(c, convention)} {_arrow(c, '↑', '↓', '→ 0')}" for c in columns}
    lines = [
        f"# Comparison by {convention.name}", "",
        f"Mean ± SD over cases, scored as by {convention.source}. Best **bold**, second <u>underlined</u>; * differs "
        f"from {baseline} (paired Wilcoxon signed-rank test, p < {SIGNIFICANT} after Holm's correction over the "
        "models). A mean that lacks cases which another model's has is given with the number of its "
        f"values ({'images' if convention.images is not None else 'a case has one for each label'}) and has no rank. "
        f"{convention.remark}".rstrip(), "",
        *markdown_head(["model", *names.values()]),
    ]  # fmt: skip
    for model, cells in table.items():
        row = [_cell(cells[c], "**{}**", "<u>{}</u>", " ± ", " *") for c in columns]
        lines.append(markdown_row([model, *row]))
    if tested:
        lines += ["", "p after correction (cases in which both models have the number):", ""]
        lines += markdown_head(["model", *(names[c] for c in tested)])
        for model, cells in table.items():
            if model != baseline:
                row = ["–" if cells[c].p_holm is None else f"{cells[c].p_holm:.3g} ({cells[c].pairs})" for c in tested]
                lines.append(markdown_row([model, *row]))
    if disputed:
        lines += ["", "Cases in which the models' Dice differ most:", ""]
        lines += markdown_head(["case", "label", *table])
        for item in disputed:
            row = ["–" if item.dice[model] is None else f"{item.dice[model]:.3f}" for model in table]
            lines.append(markdown_row([item.case, item.label, *row]))
    return "\n".join(lines) + "\n"


_ESCAPED = {letter: rf"\{letter}" for letter in "_%&#${}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "–": "--", "\n": " ",
}  # fmt: skip
_TEX_ARROWS = (r"\uparrow", r"\downarrow", r"\to 0")


def _escaped(text: str) -> str:
    return "".join(_ESCAPED.get(letter, letter) for letter in text)


def latex(table: Table, convention: Convention, baseline: str) -> str:
    """The table for a paper; needs the package booktabs."""
    columns = list(next(iter(table.values())))
    names = [f"{_escaped(_heading(c, convention))} ${_arrow(c, *_TEX_ARROWS)}$" for c in columns]
    lines = [
        f"% {convention.name}: mean and SD over cases; best bold, second underlined; * p < {SIGNIFICANT} against "
        f"{_escaped(baseline)}, Wilcoxon signed-rank, Holm",
        rf"\begin{{tabular}}{{l{'c' * len(columns)}}}", r"\toprule",
        "Model & " + " & ".join(names) + r" \\", r"\midrule",
    ]  # fmt: skip
    for model, cells in table.items():
        row = [_cell(cells[c], r"\textbf{{}}", r"\underline{{}}", r" $\pm$ ", "$^*$") for c in columns]
        row = [text.replace("–", "--").replace("∞", r"$\infty$") for text in row]
        lines.append(" & ".join([_escaped(model), *row]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def long_csv(table: Table) -> str:
    """A row per model and column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["model", "metric", "value", "std", "median", "n", "ci95_low", "ci95_high", "p", "p_holm", "pairs", "rank"]
    )
    for model, cells in table.items():
        for metric, c in cells.items():
            low, high = c.ci95 or (None, None)
            writer.writerow([model, metric, c.mean, c.std, c.median, c.n, low, high, c.p, c.p_holm, c.pairs, c.rank])
    return text.getvalue()


def box_plots(
    path: Path,
    summaries: Mapping[str, Mapping[str, Any]],
    table: Table,
    metrics: Sequence[str],
    convention: Convention,
) -> None:
    """A box per model and metric over the cases that have it, whiskers of 1.5 times its height.

    There is a point for each case and label; where a model lacks cases that another has, their number stands beside.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(_PLOTS_IN_A_ROW, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    names = [name.replace(" and ", "\nand ") for name in summaries]
    # In inches: letters of the names, which stand at the left edge, and a box each.
    width = 1 + 0.065 * max(len(line) for name in names for line in name.split("\n")) + 2.6 * columns
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width, rows * (0.7 + 0.35 * len(names))), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        values = [
            [row[metric] for row in cases_of(summary).values() if row[metric] is not None]
            for summary in summaries.values()
        ]
        axis.boxplot(values, showfliers=False, widths=0.6, orientation="horizontal")
        for place, numbers in enumerate(values, 1):
            # Beside each other in a fixed order, so that the same numbers make the same picture.
            spread = [place + 0.2 * ((k * 0.618) % 1 - 0.5) for k in range(len(numbers))]
            axis.plot(numbers, spread, ".", color="0.4", markersize=3, alpha=0.6)
            cell = list(table.values())[place - 1][metric]
            if not cell.complete:
                axis.text(0.99, place - 0.32, f"{len(numbers)} values", transform=axis.get_yaxis_transform(),
                          ha="right", va="bottom", fontsize="xx-small", color="C3")  # fmt: skip
        axis.set_title(metric_name(metric, convention), fontsize="small")
        axis.tick_params(labelsize="x-small")
        axis.set_yticks(range(1, len(names) + 1), names)
    # The first model stands at the top, as in the tables.
    axes[0, 0].invert_yaxis()
    half = path.with_name(f".{path.name}.part.png")
    figure.savefig(half, dpi=150)
    pyplot.close(figure)
    half.replace(path)
