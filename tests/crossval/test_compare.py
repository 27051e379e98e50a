"""``h2a_compare``: the table's numbers against SciPy and by hand, and its files."""

from __future__ import annotations

import csv
import os
import re
import shutil
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import PermutationMethod, wilcoxon

from nnunet_h2a.evaluation import run_cases
from nnunet_h2a.evaluation.compare import main
from nnunet_h2a.evaluation.comparison import compare, disagreements, holm, paired, paired_p
from nnunet_h2a.evaluation.comparison_tables import latex, long_csv, markdown
from nnunet_h2a.evaluation.conventions import CONVENTIONS
from tests.crossval.conftest import CASES, DATASET


def test_holm_by_hand():
    # 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1 and never less than the one before.
    assert holm([0.02, 0.01, 0.04, 0.03]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, None, 0.6]) == [1, None, 1]
    assert holm([None]) == [None]


def rows(values, label=1, metric="dice"):
    return [{"case": f"c{k:02d}", "label": label, metric: value} for k, value in enumerate(values)]


def test_wilcoxon_takes_the_pairs_that_are_defined():
    rng = np.random.default_rng(0)
    one, other = rng.random(20), rng.random(20) + 0.2
    expected = wilcoxon(one[2:], other[2:]).pvalue
    pairs = paired({"cases": rows([None, 0.5, *one[2:]])}, {"cases": rows([0.1, None, *other[2:]])}, "dice")
    assert np.array_equal(pairs, [one[2:], other[2:]])
    assert paired_p(*pairs) == pytest.approx(expected)
    assert paired_p([1, 2], [1, 2]) == paired_p([0, 0], [0, 0]) == 1
    assert paired_p([], []) is None


@pytest.mark.parametrize("voxel", [1.0, 2.04, 0.1, 1e6 / 3])
def test_ties_do_not_depend_on_the_unit(voxel):
    """Distances are whole voxels: in mm their differences are equal but for rounding."""
    rng = np.random.default_rng(3)
    for pairs in (8, 30):
        one, other = rng.integers(1, 9, pairs), rng.integers(1, 9, pairs)
        differences = (one - other)[one != other]
        method = PermutationMethod(n_resamples=np.inf) if pairs == 8 else "auto"
        expected = wilcoxon(differences, method=method).pvalue
        assert paired_p(one * voxel, other * voxel) == pytest.approx(expected)


def test_few_differences_among_many_equal_pairs():
    """Five of five pairs with a difference on one side: 2 of 32 assignments of signs, however many pairs are equal."""
    zeros = np.zeros(25)
    moved = zeros.copy()
    moved[:5] = 0.2
    assert paired_p(moved, zeros) == 0.0625
    moved[:5] = np.arange(5) + 1
    assert paired_p(moved, zeros) == 0.0625


def test_labels_of_a_case_are_one_observation():
    """Of labels that one model has not in a case the other's do not count there either."""
    one = {"cases": rows([3, 4, 5, None]) + rows([None, None, 1, None], label=2)}
    other = {"cases": rows([3, 4, 7, 1]) + rows([8, 8, 5, 2], label=2)}
    one, other = ({"cases": [row | {"hd95": row["dice"]} for row in each["cases"]]} for each in (one, other))
    assert paired(one, other, "hd95") == ([3, 4, 3], [3, 4, 6])


def test_a_mean_over_fewer_cases_has_no_rank():
    full, part = summary([0.5, 0.5], [3, 3]), summary([1, 0], [1, 9])
    part["mean"]["hd95"], part["n"]["hd95"], part["cases"][1]["hd95"] = 1.0, 1, None
    table = compare({"full": full, "part": part}, "full", ["hd95"])
    assert (table["full"]["hd95"].rank, table["full"]["hd95"].complete) == (1, True)
    assert (table["part"]["hd95"].rank, table["part"]["hd95"].complete) == (None, False)
    text = markdown(table, CONVENTIONS["autopet"], "full", [])
    assert "(n = 1)" in text


def test_means_over_other_cases_have_no_rank():
    """As many cases, and not the same: one model has left out a hard one, the other an easy one."""
    one, other = summary([1, 1], [3, 9]), summary([1, 1], [3, 9])
    one["cases"][0]["hd95"] = other["cases"][1]["hd95"] = None
    one["n"]["hd95"] = other["n"]["hd95"] = 1
    table = compare({"one": one, "other": other}, "one", ["hd95"])
    assert [table[model]["hd95"].rank for model in ("one", "other")] == [None, None]


def test_equal_means_share_a_rank_in_whatever_order_they_were_summed():
    orders = [np.array(values) for values in permutations((0.1, 0.2, 0.3))]
    assert len({float(np.mean(v)) for v in orders}) > 1
    summaries = {f"model {k}": summary(v, v) for k, v in enumerate(orders)} | {"worse": summary([0, 0, 0], [1, 1, 1])}
    table = compare(summaries, "worse", ["dice"])
    assert [cells["dice"].rank for cells in table.values()] == [1] * 6 + [2]


def test_names_that_mean_something_to_markdown_and_latex():
    table = compare({"base": summary([1], [1]), "x^2_{a}~\\b|c": summary([0.5], [1])}, "base", ["dice"])
    text = markdown(table, CONVENTIONS["autopet"], "base", [])
    assert "| x^2_{a}~\\b\\|c | " in text
    tex = latex(table, CONVENTIONS["autopet"], "base")
    assert r"x\textasciicircum{}2\_\{a\}\textasciitilde{}\textbackslash{}b\textbar{}c & " in tex


def test_an_infinite_median_is_the_worst():
    found, lost = (summary([1, 1], [1, 1]) | {"convention": "hecktor"} for _ in range(2))
    for each in (found, lost):
        each |= {name: {} for name in ("aggregated_dice", "aggregated_f1")}
    lost["median"]["hd95"], lost["infinite_median"] = None, ["hd95"]
    table = compare({"lost": lost, "found": found}, "found", ["dice"])
    assert [table[model]["hd95 median"].rank for model in ("lost", "found")] == [None, 1]
    text = markdown(table, CONVENTIONS["hecktor"], "found", [])
    assert "| lost | **1 ± 0** |" in text
    assert text.count("| ∞ |") == 1
    assert r" & $\infty$ \\" in latex(table, CONVENTIONS["hecktor"], "found")
    assert [line.split(",")[2] for line in long_csv(table).splitlines() if line.startswith("lost,hd95 m")] == ["inf"]


def summary(dice, hd95):
    """What of an evaluation file is compared."""
    columns = {"dice": dice, "hd95": hd95}
    statistics = {
        name: {metric: float(function(values)) for metric, values in columns.items()}
        for name, function in (("mean", np.mean), ("std", np.std), ("median", np.median), ("n", len))
    }
    cases = [{"case": f"c{k}", "label": 1, "dice": dice[k], "hd95": hd95[k]} for k in range(len(dice))]
    return {
        "convention": "autopet", "cases": cases, "ci95": {"dice": None, "hd95": [0, 1]}, "infinite_median": [],
        **statistics,
    }  # fmt: skip


def test_ranks_and_tests():
    rng = np.random.default_rng(1)
    base = rng.random(12)
    summaries = {
        "base": summary(base, base), "better": summary(base + 0.1, base - 0.1), "same": summary(base, base),
        "worse": summary(base - rng.random(12), base + 1),
    }  # fmt: skip
    table = compare(summaries, "base", ["dice", "hd95"])
    assert {name: cells["dice"].rank for name, cells in table.items()} == {
        "base": 2,
        "better": 1,
        "same": 2,
        "worse": 3,
    }
    assert {name: cells["hd95"].rank for name, cells in table.items()} == {
        "base": 2,
        "better": 1,
        "same": 2,
        "worse": 3,
    }
    assert table["base"]["dice"].p is None
    assert table["same"]["dice"].p == 1
    exact = wilcoxon(np.round(base + 0.1, 15), base).pvalue
    assert table["better"]["dice"].p == pytest.approx(exact)
    assert table["better"]["dice"].p_holm == pytest.approx(3 * exact)
    assert table["better"]["dice"].pairs == 12


def test_the_most_disputed_cases_come_first():
    found = disagreements({"a": summary([1, 0.5, 0.2], [0] * 3), "b": summary([1, 0.4, 0.9], [0] * 3)})
    assert [item.case for item in found] == ["c2", "c1"]
    assert found[0].dice == {"a": 0.2, "b": 0.9}
    assert found[0].spread == pytest.approx(0.35)


@pytest.fixture
def arguments(dataset, predicted, tmp_path):
    for trainer, shift in (("nnUNetTrainer", 1), ("nnUNetTrainerH2ASeg", 0), ("Third", 2)):
        predicted(trainer, shift)
    return ["-d", "801", "-c", "3d_fullres", "-f", "0", "1", "-np", "1", "-o", str(tmp_path / "table"), "-tr",
            "nnUNetTrainer", "nnUNetTrainerH2ASeg", "Third"]  # fmt: skip


def test_files(arguments, tmp_path, capsys):
    assert main([*arguments, "--convention", "hecktor"]) == 0
    text = (tmp_path / "table" / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    ours = "nnUNetTrainerH2ASeg__nnUNetPlans__3d_fullres"
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {ours} | **1 ± 0**")]
    # The last columns are the set's: aggregated Dice and F1, and the median of HD95.
    assert line.endswith("| **1** | **1** | **0** |")
    assert text.count("<u>") > 3
    assert "differs from nnUNetTrainer__nnUNetPlans__3d_fullres" in text
    # In the third case all predictions are equal.
    assert [case for case in CASES if f"| {case} | tumor | " in text] == ["case_0", "case_1", "case_3"]
    rows = list(csv.DictReader((tmp_path / "table" / "comparison.csv").open()))
    (row,) = [row for row in rows if row["model"] == ours and row["metric"] == "dice"]
    assert (row["value"], row["n"], row["rank"]) == ("1.0", "4", "1")
    (row,) = [row for row in rows if row["model"] == ours and row["metric"] == "aggregated dice of tumor"]
    assert (row["value"], row["rank"], row["ci95_low"]) == ("1.0", "1", "1.0")
    tex = (tmp_path / "table" / "comparison.tex").read_text()
    assert r"nnUNetTrainerH2ASeg\_\_nnUNetPlans\_\_3d\_fullres & \textbf{1 $\pm$ 0}" in tex
    assert r"Dice $\uparrow$" in tex
    assert r"aggregated Dice of tumor $\uparrow$ & aggregated F1 of detection of tumor $\uparrow$ & median HD95" in tex
    assert not re.search(r"(?<!\\)_", tex)
    columns = {line.count("&") for line in tex.splitlines() if line.endswith(r"\\")}
    assert len(columns) == 1
    assert (tmp_path / "table" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "table").iterdir()) == [
        f"comparison.{ending}" for ending in ("csv", "md", "png", "tex")
    ]


def test_what_was_measured_is_not_measured_again(arguments, monkeypatch, capsys):
    assert main(arguments) == 0
    first = capsys.readouterr().out

    def never(pair, job):
        raise AssertionError

    monkeypatch.setattr(run_cases, "score_case", never)
    assert main(arguments) == 0
    assert capsys.readouterr().out == first


def test_ensembles_and_other_programs(arguments, tmp_path, capsys):
    results = tmp_path / "nnUNet_results" / DATASET
    names = [f"{trainer}__nnUNetPlans__3d_fullres" for trainer in ("nnUNetTrainer", "nnUNetTrainerH2ASeg")]
    ensemble = results / "ensembles" / f"ensemble___{names[0]}___{names[1]}___0_1"
    other = results / "ensembles" / f"ensemble___{names[0]}___Unknown__P__2d___0_1"
    for folder in (ensemble, other, tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        for case in CASES:
            (path,) = (results / names[1]).glob(f"fold_*/validation/{case}.nii.gz")
            shutil.copy(path, folder)
    assert main([*arguments, "--predictions", f"elsewhere={tmp_path / 'elsewhere'}", "--baseline", "Third"]) == 0
    out = capsys.readouterr().out
    assert f"| ensemble of {names[0]} and {names[1]} | **1 ± 0**" in out
    assert "| elsewhere | **1 ± 0**" in out
    assert "Unknown" not in out
    assert "differs from Third__nnUNetPlans__3d_fullres" in out


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["-tr", "nnUNetTrainer"], "there is one model only"),
        (["-tr", "nnUNetTrainer", "Missing"], "there is no model Missing__nnUNetPlans__3d_fullres in"),
        (["--baseline", "x"], "--baseline x: name one of nnUNetTrainer__"),
        (["--metrics", "dice", "x"], "--metrics x: choose of dice, iou"),
        (["--convention", "all"], "one at a time"),
        (["--convention", "x"], "choose one of autopet"),
        (["--predictions", "x"], "give NAME=DIR"),
        (["-f", "7"], "-f 7"),
        (["-f", "0", "all"], "-f 0 all: the folds 0 and all both validate on case_0"),
        (["--predictions", "=."], "give NAME=DIR"),
        (["--predictions", "a=.", "a=.."], "--predictions a=..: there is a model a already"),
    ],
)
def test_nothing_is_done(arguments, tmp_path, capsys, more, text):
    assert main([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize("what", ["no summary", "trained again"])
def test_a_model_that_has_not_ended_its_validation(arguments, tmp_path, capsys, what):
    fold = tmp_path / "nnUNet_results" / DATASET / "Third__nnUNetPlans__3d_fullres" / "fold_1"
    summary = fold / "validation" / "summary.json"
    if what == "no summary":
        summary.unlink()
    else:
        os.utime(summary, (1e9, 1e9))
    assert main(arguments) == 2
    says = "has not ended its validation" if what == "no summary" else "has trained again since its validation"
    assert f"Third__nnUNetPlans__3d_fullres {says} in {summary.parent}: finish it with" in capsys.readouterr().err


def test_an_ensemble_of_earlier_predictions_is_left_out(arguments, tmp_path, capsys):
    results = tmp_path / "nnUNet_results" / DATASET
    names = [f"{trainer}__nnUNetPlans__3d_fullres" for trainer in ("nnUNetTrainer", "nnUNetTrainerH2ASeg")]
    ensemble = results / "ensembles" / f"ensemble___{names[0]}___{names[1]}___0_1"
    ensemble.mkdir(parents=True)
    (ensemble / "summary.json").write_text("{}")
    os.utime(ensemble / "summary.json", (1e9, 1e9))
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert f"left out: ensemble of {names[0]} and {names[1]} is older than its members' predictions" in printed.err
    assert "ensemble of" not in printed.out


def test_a_spread_stands_beside_an_infinite_median():
    """A model that has found nothing in most cases still has a mean and a spread over the others."""
    found, lost = (summary([1, 1], [1, 3]) | {"convention": "hecktor"} for _ in range(2))
    lost["median"]["hd95"], lost["infinite_median"] = None, ["hd95"]
    table = compare({"lost": lost, "found": found}, "found", ["hd95"], [])
    assert list(table["lost"]) == ["hd95"]
    assert "| lost | **2 ± 1** |" in markdown(table, CONVENTIONS["hecktor"], "found", [])


@pytest.mark.parametrize(
    ("metrics", "columns"),
    [
        (["dice", "hd95_median"], ["dice", "hd95 median"]),
        (["aggregated_f1"], ["aggregated f1 of tumor"]),
    ],
)
def test_columns_that_are_asked_for(arguments, tmp_path, metrics, columns):
    assert main([*arguments, "--convention", "hecktor", "--metrics", *metrics]) == 0
    rows = list(csv.DictReader((tmp_path / "table" / "comparison.csv").open()))
    assert list(dict.fromkeys(row["metric"] for row in rows)) == columns
    assert ("p after correction" in (tmp_path / "table" / "comparison.md").read_text()) == ("dice" in metrics)
    # What is of the whole set has no distribution to draw.
    assert (tmp_path / "table" / "comparison.png").exists() == ("dice" in metrics)


def test_an_output_that_cannot_be_written_is_said_before_measuring(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_cases, "score_case", None)
    (tmp_path / "table" / "comparison.tex").mkdir(parents=True)
    assert main(arguments) == 2
    assert "comparison.tex is a folder" in capsys.readouterr().err


def test_some_metrics(arguments, tmp_path):
    assert main([*arguments, "--metrics", "dice", "assd"]) == 0
    rows = list(csv.DictReader((tmp_path / "table" / "comparison.csv").open()))
    assert {row["metric"] for row in rows} == {"dice", "assd"}
