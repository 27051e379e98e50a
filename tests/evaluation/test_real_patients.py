"""Masks of real sarcoma patients: contours drawn on CT, on PET, and thresholds of the PET."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_h2a.evaluation.evaluate import main
from tests.conftest import ROOT
from tests.evaluation.brute import untouched

DATA = ROOT.parent / "shared" / "data" / "sts"
PATIENTS = ("STS_001", "STS_002")
LOW = 1.5
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"real patients are not at hand: {DATA}")


def nifti(patient, modality, kind):
    return sitk.ReadImage(str(DATA / patient / modality / "nifti" / kind / f"{kind}.nii.gz"))


@pytest.fixture
def folders(tmp_path):
    for name in ("ct", "pet", "threshold", "images"):
        (tmp_path / name).mkdir()
    for patient in PATIENTS:
        pet = nifti(patient, "PET", "image")
        threshold = sitk.Cast(pet > LOW, sitk.sitkUInt8)
        for name, image in (
            ("ct", nifti(patient, "CT", "mask")), ("pet", nifti(patient, "PET", "mask")), ("threshold", threshold),
            ("images", pet),
        ):  # fmt: skip
            sitk.WriteImage(image, str(tmp_path / name / f"{patient}.nii.gz"))
    return tmp_path


def scores(folders, reference, predicted, *more):
    output = folders / "out" / "s.json"
    arguments = ["-ref", folders / reference, "-pred", folders / predicted, "-o", output, "-np", "1", *more]
    assert main([str(word) for word in arguments]) == 0
    return {entry["case"]: entry for entry in json.loads(output.read_text())["cases"]}


def test_the_challenges_numbers(folders):
    """Dice and both volumes as the autoPET script finds them, component by component."""
    found = scores(folders, "pet", "threshold")
    several = 0
    for patient in PATIENTS:
        image = nifti(patient, "PET", "mask")
        truth = sitk.GetArrayFromImage(image) > 0
        predicted = sitk.GetArrayFromImage(nifti(patient, "PET", "image")) > LOW
        millilitres = np.prod(image.GetSpacing()) / 1000
        row = found[patient]
        assert row["dice"] == pytest.approx(2 * (truth & predicted).sum() / (truth.sum() + predicted.sum()))
        components, false, voxels = untouched(predicted, truth)
        assert (row["lesions_predicted"], row["lesions_false"]) == (components, false)
        assert row["fp_volume_ml"] == pytest.approx(voxels * millilitres)
        assert row["fn_volume_ml"] == pytest.approx(untouched(truth, predicted)[2] * millilitres)
        several += false
    assert several > 1


def test_contours_on_grids_of_different_resolution(folders, capsys):
    assert main(["-ref", str(folders / "ct"), "-pred", str(folders / "pet"), "-o", str(folders / "x.json")]) == 2
    assert "voxels" in capsys.readouterr().err
    found = scores(folders, "ct", "pet", "--resample")
    for patient in PATIENTS:
        reference = nifti(patient, "CT", "mask")
        moved = sitk.Resample(nifti(patient, "PET", "mask"), reference, sitk.Transform(), sitk.sitkNearestNeighbor)
        measured = sitk.LabelOverlapMeasuresImageFilter()
        measured.Execute(reference, moved)
        assert found[patient]["dice"] == pytest.approx(measured.GetDiceCoefficient())
        # Two observers of one tumour: near each other, and not the same.
        assert 0.6 < found[patient]["dice"] < 1
        hausdorff = sitk.HausdorffDistanceImageFilter()
        hausdorff.Execute(reference, moved)
        assert found[patient]["hd"] == pytest.approx(hausdorff.GetHausdorffDistance(), rel=0.2)


def test_quantities(folders):
    found = scores(folders, "pet", "threshold", "-img", folders / "images")
    rows = list(csv.DictReader((folders / "out" / "s.csv").open()))
    for patient in PATIENTS:
        image, mask = nifti(patient, "PET", "image"), nifti(patient, "PET", "mask")
        statistics = sitk.LabelIntensityStatisticsImageFilter()
        statistics.Execute(mask, image)
        truth = found[patient]["pet"]["true"]["patient"]
        assert truth["suv_max"] == pytest.approx(statistics.GetMaximum(1))
        assert truth["suv_mean"] == pytest.approx(statistics.GetMean(1), rel=1e-6)
        assert truth["tmtv_ml"] == pytest.approx(statistics.GetPhysicalSize(1) / 1000)
        assert truth["tlg"] == pytest.approx(truth["tmtv_ml"] * truth["suv_mean"])
        assert truth["suv_mean"] < truth["suv_peak"] <= truth["suv_peak_global"] <= truth["suv_max"]
        (row,) = [row for row in rows if row["case"] == patient]
        assert float(row["true_tmtv_ml"]) == truth["tmtv_ml"]
