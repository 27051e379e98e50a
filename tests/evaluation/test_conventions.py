"""Each convention's numbers for the cases in which they differ."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nnunet_h2a.evaluation.conventions import CONVENTIONS, METRICS, by_name, median_with_infinity
from nnunet_h2a.evaluation.measure import measure
from nnunet_h2a.evaluation.summary import Scored, summarise
from nnunet_h2a.evaluation.tables import markdown

SHAPE = (4, 20, 24)


def block(*corner, size=(2, 4, 4)):
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = True
    return mask


FULL, OTHER, NONE = block(1, 2, 2), block(1, 4, 3), np.zeros(SHAPE, bool)
CASES = {"both": (FULL, OTHER), "no truth": (NONE, OTHER), "no prediction": (FULL, NONE), "nothing": (NONE, NONE)}
SPACING = (3.0, 2.0, 1.5)


def rows(convention):
    convention = CONVENTIONS[convention]
    return {
        name: convention.row(measure(*masks, SPACING, convention.wanted)) for name, masks in CASES.items()
    }  # fmt: skip


@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_metric_is_in_every_row_and_finite(name):
    for row in rows(name).values():
        assert set(METRICS) <= set(row)
        assert all(value is None or np.isfinite(value) for value in row.values())


@pytest.mark.parametrize("name", CONVENTIONS)
def test_where_both_masks_have_lesions(name):
    """Overlap is the same by all conventions: 2 slices of 2 x 3 common pixels of 16."""
    row = rows(name)["both"]
    tp, size = 2 * 2 * 3, 2 * 16
    assert (row["tp"], row["fp"], row["fn"]) == (tp, size - tp, size - tp)
    loose = 1e-3 if name == "h2aseg-as-published" else 1e-12
    assert row["dice"] == pytest.approx(tp / size, rel=loose)
    assert row["iou"] == pytest.approx(tp / (2 * size - tp), rel=loose)
    assert row["voe"] == pytest.approx(1 - tp / (2 * size - tp), rel=loose)
    assert row["precision"] == row["recall"] == pytest.approx(tp / size, rel=loose)
    assert (row["rvd"], row["fp_volume_ml"], row["fn_volume_ml"], row["lesion_f1"]) == (0, 0, 0, 1)
    # Two rows of 2 mm and one column of 1.5 mm further.
    assert row["hd"] == pytest.approx(np.hypot(4, 1.5), rel=1e-12)


def test_undefined_numbers():
    ml = np.prod(SPACING) / 1000
    expected = {
        "autopet": {
            "no truth": {"dice": None, "fp_volume_ml": 32 * ml, "fn_volume_ml": None, "lesion_f1": 0},
            "no prediction": {"dice": 0, "fp_volume_ml": 0, "fn_volume_ml": 32 * ml, "precision": None, "recall": 0},
            "nothing": {"dice": None, "fp_volume_ml": 0, "fn_volume_ml": None, "lesion_f1": None},
        },
        "hecktor": {
            "no truth": {"dice": 0, "hd95": None, "recall": None},
            "no prediction": {"dice": 0, "hd95": None, "recall": 0, "precision": 0},
            "nothing": {"dice": None, "hd95": None},
        },
        "hecktor-as-published": {"no prediction": {"dice": 0, "hd95": 0}, "nothing": {"dice": 0, "hd95": 0}},
        # Two of four images have one empty mask, two have none.
        "cipa": {"no truth": {"hd95": 0, "dice": 0}, "no prediction": {"hd95": 0}, "nothing": {"hd95": 0}},
        "h2aseg": {"no truth": {"dice": None, "iou": None, "hd95": None}, "no prediction": {"dice": 0, "hd95": None}},
        "h2aseg-as-published": {
            "no truth": {"dice": 0, "recall": 0, "hd95": None}, "nothing": {"dice": 0, "precision": 0, "fpr": 0},
        },
        "isanet": {
            "no truth": {"dice": 0, "rvd": None, "voe": 1, "assd": None}, "no prediction": {"rvd": -1, "hd": None},
            "nothing": {"dice": None, "voe": None},
        },
    }  # fmt: skip
    for name, cases in expected.items():
        found = rows(name)
        for case, metrics in cases.items():
            for metric, value in metrics.items():
                assert found[case][metric] == (value if value is None else pytest.approx(value)), (name, case, metric)


def test_units_of_hd95():
    """The masks are moved by two rows and one column; all border points together, or the worse direction."""
    found = {name: rows(name)["both"]["hd95"] for name in CONVENTIONS}
    assert found["h2aseg-as-published"] < found["h2aseg"]
    assert found["cipa"] == found["cipa-as-published"] < 3
    assert found["autopet"] == found["isanet"]
    # Moved by one slice of 3 mm, which the challenge's evaluator took for the 1.5 mm of a column.
    for name, distance in (("hecktor", 3), ("hecktor-as-published", 1.5)):
        convention = CONVENTIONS[name]
        moved = measure(block(0, 2, 2), FULL, SPACING, convention.wanted)
        assert convention.row(moved)["hd95"] == distance


def summary(name, cases=CASES, labels=(1,)):
    convention = CONVENTIONS[name]
    return summarise(
        convention,
        [
            Scored(case, case, label, f"label {label}", measure(*masks, SPACING, convention.wanted))
            for case, masks in cases.items()
            for label in labels
        ],
        {},
    )


def test_means_leave_out_what_is_not_defined():
    found = summary("autopet")
    assert found["n"]["dice"] == 2
    assert found["mean"]["dice"] == pytest.approx((12 / 32 + 0) / 2)
    assert found["std"]["dice"] == pytest.approx(np.std([12 / 32, 0], ddof=1))
    assert found["median"]["dice"] == pytest.approx(12 / 64)
    assert found["ci95"]["dice"][0] <= found["mean"]["dice"] <= found["ci95"]["dice"][1]
    assert [c["case"] for c in found["cases"]] == sorted(CASES)


def test_equal_values_have_no_spread():
    found = summary("autopet", dict.fromkeys("abcdefg", CASES["both"]))
    assert found["std"]["dice"] == found["std"]["iou"] == 0


def test_pooled_and_aggregated():
    found = summary("cipa")
    tp, fp, fn, voxels = 12, 20 + 32, 20 + 32, 4 * np.prod(SHAPE)
    tn = voxels - tp - fp - fn
    assert found["pooled"]["iou"] == pytest.approx(tp / (tp + fp + fn))
    assert found["pooled"]["dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert found["pooled"]["balanced_accuracy"] == pytest.approx((tp / (tp + fn) + tn / (tn + fp)) / 2)
    assert found["aggregated_dice"] == {"1": pytest.approx(2 * tp / (2 * tp + fp + fn))}
    nothing = {"nothing": CASES["nothing"]}
    # One is what CIPA's script says of nothing; nobody else does.
    assert summary("cipa", nothing)["pooled"] == {"dice": 1, "iou": 1, "balanced_accuracy": None}
    assert summary("autopet", nothing)["pooled"] == {"dice": None, "iou": None, "balanced_accuracy": None}
    assert summary("hecktor", labels=(1, 2))["aggregated_dice_mean"] == pytest.approx(2 * tp / (2 * tp + fp + fn))


def test_aggregated_detection_of_hecktor():
    """Lesions of all cases in one heap: 1 of 2 and 2 of 3 true ones, with 1 and 3 predictions."""
    one, other = np.zeros((1, 3, 30), bool), np.zeros((1, 3, 30), bool)
    one[0, 0, 0:9] = one[0, 2, 28] = other[0, 0, 0:6] = True
    few, many = one.copy(), other.copy()
    few[0, 2, 10:20] = many[0, 2, 10:19] = many[0, 2, 25] = True
    found = summary("hecktor", {"one": (one, other), "many": (few, many)})
    assert found["aggregated_f1"] == {"1": pytest.approx(2 * 3 / ((2 + 3) + (1 + 3)))}
    assert found["aggregated_f1_mean"] == found["aggregated_f1"]["1"]
    low, high = found["aggregated_f1_ci95"]["1"]
    # Each case alone: 2 · 1 / 3 and 2 · 2 / 6, which are the same.
    assert low == high == pytest.approx(2 / 3)
    nothing = summary("hecktor", {"nothing": CASES["nothing"]})
    assert nothing["aggregated_f1"] == {"1": None}
    assert nothing["aggregated_f1_mean"] is None


def test_cipa_takes_the_mean_over_images_and_not_over_cases():
    thin = (FULL[:1], FULL[:1])
    found = summary("cipa", {"both": CASES["both"], "thin": thin})
    image = measure(*CASES["both"], SPACING, CONVENTIONS["cipa"].wanted).image_hd95
    assert image[0] == image[3] == 0
    assert found["mean"]["hd95"] == pytest.approx((image[1] + image[2]) / 5)
    assert found["n"]["hd95"] == 5


def test_median_counts_lost_cases_as_infinitely_far():
    assert median_with_infinity([1, 2], 1) == 2
    assert median_with_infinity([1], 1) == median_with_infinity([1], 2) == math.inf
    assert median_with_infinity([1, 2, 3, None], 0) == 2
    assert median_with_infinity([], 0) is None
    cases = {"a": CASES["both"], "b": (FULL, FULL), "lost": CASES["no prediction"], "nothing": CASES["nothing"]}
    found = summary("hecktor", cases)
    assert found["median"]["hd95"] == found["cases"][0]["hd95"] > 0
    assert found["infinite_median"] == []
    # Elsewhere the median is over the two cases that have a distance, one of which is 0.
    plain = summary("autopet", cases)
    assert plain["median"]["hd95"] == pytest.approx(plain["cases"][0]["hd95"] / 2)


def test_a_lost_class_makes_the_median_infinite():
    """Of two labels one is never found: what is left of the median is not that of the other label."""
    convention = CONVENTIONS["hecktor"]
    found = summarise(
        convention,
        [
            Scored(case, case, label, name, measure(*masks, SPACING, convention.wanted))
            for case in ("a", "b", "c")
            for label, name, masks in ((1, "GTVp", CASES["both"]), (2, "GTVn", CASES["no prediction"]))
        ],
        {},
    )
    assert found["by_label"]["1"]["infinite_median"] == []
    assert found["by_label"]["2"]["infinite_median"] == found["infinite_median"] == ["hd95"]
    assert found["by_label"]["2"]["median"]["hd95"] is found["median"]["hd95"] is None
    assert "| median HD95 (mm) | ∞ | – |" in markdown(found, convention)


def test_the_published_median_counts_false_cases_as_infinite_and_lost_ones_as_perfect():
    cases = {"far": (FULL, block(0, 2, 2)), "equal": (FULL, FULL), "false": CASES["no truth"]}
    assert summary("hecktor-as-published", cases)["median"]["hd95"] == 1.5
    cases = {"far": (FULL, block(0, 2, 2)), "equal": (FULL, FULL), "lost": CASES["no prediction"]}
    assert summary("hecktor-as-published", cases)["median"]["hd95"] == 0


def test_one_patient_alone_has_no_interval():
    """However many others there are: nobody knows how the number varies."""
    found = summary("autopet", {"a": CASES["both"], **{f"free {k}": CASES["nothing"] for k in range(9)}})
    assert found["mean"]["dice"] is not None
    assert found["ci95"]["dice"] is None
    assert found["ci95"]["fp_volume_ml"] == [0, 0]


def test_patients_are_drawn_whole():
    """Ten equal cases of one patient are one observation: the interval is not narrower for them."""
    convention = CONVENTIONS["autopet"]
    measured = {name: measure(*masks, SPACING, convention.wanted) for name, masks in CASES.items()}
    few = [Scored(name, name, 1, "tumor", m) for name, m in measured.items()]
    many = [Scored(f"{name} {i}", name, 1, "tumor", m) for name, m in measured.items() for i in range(10)]
    apart = [Scored(f"{name} {i}", f"{name} {i}", 1, "tumor", m) for name, m in measured.items() for i in range(10)]
    intervals = [summarise(convention, scored, {})["ci95"]["fp_volume_ml"] for scored in (few, many, apart)]
    assert intervals[0] == pytest.approx(intervals[1])
    assert intervals[2][1] - intervals[2][0] < 0.6 * (intervals[0][1] - intervals[0][0])


def test_several_labels_are_averaged():
    found = summary("autopet", labels=(1, 2))
    assert found["mean"] == pytest.approx(summary("autopet")["mean"])
    assert set(found["by_label"]) == set(found["aggregated_dice"]) == {"1", "2"}
    assert found["n"]["dice"] == 4


def test_names():
    assert [c.name for c in by_name("all")] == ["autopet", "hecktor", "cipa", "h2aseg", "isanet"]
    for name, text in (("x", "choose one of autopet, "), ("autopet-as-published", "no fault is known")):
        with pytest.raises(KeyError, match=text):
            by_name(name)
