"""A dataset that looks planned and preprocessed, and finished folds as nnU-Net leaves them."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import SimpleITK as sitk

CASES = [f"case_{number}" for number in range(4)]
FOLDS = [{"train": CASES[2:], "val": CASES[:2]}, {"train": CASES[:2], "val": CASES[2:]}]
DATASET = "Dataset801_Cross"


def write_mask(path, seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((6, 8, 10), np.uint8)
    z, y, x = rng.integers(0, 4, 3)
    mask[z : z + 2, y : y + 3, x : x + 4] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(path))


def write_checkpoint(path):
    """A whole file of the kind that PyTorch writes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"0" * 1000)


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Folders below ``tmp_path``; returns the preprocessed dataset."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "nnUNet_preprocessed" / DATASET
    for case, seed in zip(CASES, range(4), strict=True):
        write_mask(folder / "gt_segmentations" / f"{case}.nii.gz", seed)
        for identifier in ("nnUNetPlans_3d_fullres", "nnUNetPlans_3d_lowres"):
            (folder / identifier).mkdir(exist_ok=True)
            (folder / identifier / f"{case}.pkl").touch()
    configurations = {
        "3d_fullres": {"data_identifier": "nnUNetPlans_3d_fullres"},
        "3d_lowres": {"data_identifier": "nnUNetPlans_3d_lowres", "next_stage": "3d_cascade_fullres"},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        "2d": {"data_identifier": "nnUNetPlans_2d"},
    }
    plans = {"plans_name": "nnUNetPlans", "configurations": configurations}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    content = {
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "tumor": 1},
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "splits_final.json").write_text(json.dumps(FOLDS))
    return folder


@pytest.fixture
def predicted(dataset, tmp_path):
    """Finished folds of three trainers, as nnU-Net leaves them."""

    def write(trainer, shift):
        model = tmp_path / "nnUNet_results" / DATASET / f"{trainer}__nnUNetPlans__3d_fullres"
        for fold, split in enumerate(FOLDS):
            validation = model / f"fold_{fold}" / "validation"
            for case in split["val"]:
                write_mask(validation / f"{case}.nii.gz", 0)
                truth = sitk.GetArrayFromImage(sitk.ReadImage(str(dataset / "gt_segmentations" / f"{case}.nii.gz")))
                moved = np.roll(truth, shift * (1 + CASES.index(case)) % 3, axis=2)
                sitk.WriteImage(sitk.GetImageFromArray(moved), str(validation / f"{case}.nii.gz"))
            write_checkpoint(validation.parent / "checkpoint_final.pth")
            (validation / "summary.json").write_text("{}")
        return model

    return write
