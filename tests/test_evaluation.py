"""Dice of the demo."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_h2a.evaluation.dice import dice, mean_dice, score_folder


def test_dice_by_hand():
    truth, predicted = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    truth[0, :3], predicted[0, 1:] = True, True
    assert dice(truth, predicted) == pytest.approx(2 * 2 / 6)
    assert dice(truth, truth) == 1
    assert dice(truth, np.zeros_like(truth)) == 0
    assert dice(np.zeros_like(truth), predicted) is None
    with pytest.raises(ValueError, match="shape"):
        dice(truth, predicted[:, :3])


def test_mean_leaves_lesion_free_cases_out():
    assert mean_dice({"a": 0.5, "b": None, "c": 1.0}) == 0.75
    assert mean_dice({"b": None}) is None


def test_score_folder(tmp_path):
    truth, predicted = tmp_path / "truth", tmp_path / "predicted"
    truth.mkdir(), predicted.mkdir()
    mask = np.zeros((3, 4, 5), np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(truth / "free.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(predicted / "free.nii.gz"))
    mask[1] = 1
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(truth / "case.nii.gz"))
    with pytest.raises(FileNotFoundError, match=r"case\.nii\.gz"):
        score_folder(truth, predicted)
    mask[1, 2:] = 0
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(predicted / "case.nii.gz"))
    assert score_folder(truth, predicted) == {"case": pytest.approx(2 * 10 / 30), "free": None}
