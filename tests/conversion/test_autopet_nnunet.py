"""``h2a_convert_autopet`` on the nnU-Net shaped releases of autoPET III to V."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from dataset_conversion.autopet import main

DATASET = "Dataset603_AutoPET"
LAS = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
FDG = "fdg_0011f3deaf_03-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-10445"
FDG_LATER = "fdg_0011f3deaf_08-01-2004-NA-PET-CT Ganzkoerper nativ u. mit KM-20000"
PSMA = "psma_95b833d65be26293_2018-04-16"
PSMA_LATER = "psma_95b833d65be26293_2019-10-02"
PSMA_OTHER = "psma_00000000000000ff_2018-04-16"
CLEAN = {
    FDG: "fdg_0011f3deaf_20030323",
    FDG_LATER: "fdg_0011f3deaf_20040801",
    PSMA: "psma_95b833d65be26293_20180416",
    PSMA_LATER: "psma_95b833d65be26293_20191002",
    PSMA_OTHER: "psma_00000000000000ff_20180416",
}


def convert(source: Path, *flags: str) -> int:
    return main(["-i", str(source), "-d", "603", "-np", "1", *flags])


def image(array: np.ndarray) -> sitk.Image:
    result = sitk.GetImageFromArray(array)
    result.SetSpacing((2.0, 2.0, 3.0))
    result.SetDirection(LAS)
    return result


def write_case(root: Path, name: str, lesion: bool = True, swapped: bool = False, label: bool = True, **more) -> None:
    z, y, x = np.mgrid[0:6, 0:8, 0:10]
    ct, pet = np.float32(100 * x - 1000), np.float32(x + y + z)
    seg = np.zeros(x.shape, np.uint8)
    seg[2:4, 3:5, 3:6] = lesion
    images, labels = root / more.get("images", "imagesTr"), root / "labelsTr"
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    channels = [more.get("pet", pet), more.get("ct", ct)][:: 1 if swapped else -1]
    for number, values in enumerate([*channels, *more.get("clicks", [])]):
        sitk.WriteImage(image(values), str(images / f"{name}_{number:04d}.nii.gz"), useCompression=True)
    if label:
        sitk.WriteImage(image(seg), str(labels / f"{name}.nii.gz"), useCompression=True)


@pytest.fixture
def release(source) -> Path:
    """Five studies of three patients with the reference folds, and what else the release holds."""
    for name in CLEAN:
        write_case(source, name, lesion=name != FDG_LATER)
    folds = [{"train": [FDG, FDG_LATER, PSMA_OTHER], "val": [PSMA, PSMA_LATER]},
             {"train": [PSMA, PSMA_LATER, PSMA_OTHER], "val": [FDG, FDG_LATER]}]  # fmt: skip
    (source / "splits_final.json").write_text(json.dumps(folds))
    (source / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT", "1": "CT"}}))
    (source / "psma_metadata.csv").write_text("Subject ID,Study Date\n")
    return source


def cases(raw: Path, folder: str = "labelsTr") -> set[str]:
    return {path.name.removesuffix(".nii.gz") for path in (raw / DATASET / folder).iterdir()}


def test_release(raw, release):
    assert convert(release) == 0
    assert cases(raw) == set(CLEAN.values())
    splits = json.loads((raw / DATASET / "splits_final.json").read_text())
    assert [set(fold["val"]) for fold in splits] == [{CLEAN[PSMA], CLEAN[PSMA_LATER]}, {CLEAN[FDG], CLEAN[FDG_LATER]}]
    assert set(splits[0]["train"]) == {CLEAN[FDG], CLEAN[FDG_LATER], CLEAN[PSMA_OTHER]}
    for channel in (0, 1):
        source = release / "imagesTr" / f"{PSMA}_{channel:04d}.nii.gz"
        written = raw / DATASET / "imagesTr" / f"{CLEAN[PSMA]}_{channel:04d}.nii.gz"
        assert written.read_bytes() == source.read_bytes()
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    verify_dataset_integrity(str(raw / DATASET), 1)


def test_own_folds_instead(raw, release):
    assert convert(release, "--splits", "patient") == 0
    assert len(json.loads((raw / DATASET / "splits_final.json").read_text())) == 3


def test_one_tracer(raw, release, capsys):
    assert convert(release, "--tracer", "psma") == 0
    assert cases(raw) == {CLEAN[name] for name in (PSMA, PSMA_LATER, PSMA_OTHER)}
    # Only the first fold still has both sides.
    (fold,) = json.loads((raw / DATASET / "splits_final.json").read_text())
    assert fold == {"train": [CLEAN[PSMA_OTHER]], "val": [CLEAN[PSMA], CLEAN[PSMA_LATER]]}
    assert "splits_final.json names 2 cases that are not converted" in capsys.readouterr().err


def test_negatives(raw, release):
    assert convert(release, "--drop-negatives") == 0
    assert cases(raw) == set(CLEAN.values()) - {CLEAN[FDG_LATER]}


def test_channels_the_other_way_round(raw, source):
    """The baseline of autoPET I had PET as channel 0: told by the values."""
    write_case(source, FDG, swapped=True)
    write_case(source, PSMA)
    assert convert(source) == 0
    ct, pet = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(raw / DATASET / "imagesTr" / f"{CLEAN[FDG]}_{channel:04d}.nii.gz")))
        for channel in (0, 1)
    )
    assert (ct.min(), pet.min()) == (-1000, 0)
    report = json.loads((raw / DATASET / "conversion_report.json").read_text())
    assert "they were exchanged" in report["cases"][CLEAN[FDG]]["warnings"][0]


@pytest.mark.parametrize("changes", [{"ct": np.ones((6, 8, 10), np.float32)}, {"pet": np.full((6, 8, 10), -900.0)}])
def test_channels_that_cannot_be_told_apart(raw, source, capsys, changes):
    write_case(source, FDG, **changes)
    assert convert(source) == 2
    assert "CT and PET cannot be told apart" in capsys.readouterr().err


def test_clicks_are_left_out(raw, source):
    """autoPET IV: channels 2 and 3 are heat maps of clicks."""
    write_case(source, FDG, clicks=[np.zeros((6, 8, 10), np.float32)] * 2)
    assert convert(source) == 0
    assert len(list((raw / DATASET / "imagesTr").iterdir())) == 2


def test_images_without_label(raw, source, capsys):
    write_case(source, FDG)
    write_case(source, PSMA, label=False)
    write_case(source, PSMA_OTHER, label=False, images="imagesTs")
    assert convert(source) == 1
    assert f"lacks labelsTr/{PSMA}.nii.gz" in capsys.readouterr().err
    assert cases(raw) == {CLEAN[FDG]}
    assert cases(raw, "imagesTs") == {f"{CLEAN[PSMA_OTHER]}_000{channel}" for channel in (0, 1)}
    assert not (raw / DATASET / "labelsTs").exists()


@pytest.mark.parametrize("content", ["{}", "not json", '[{"train": 3}]'])
def test_unusable_folds(raw, release, capsys, content):
    (release / "splits_final.json").write_text(content)
    assert convert(release) == 0
    assert "folds were drawn anew" in capsys.readouterr().err
    assert len(json.loads((raw / DATASET / "splits_final.json").read_text())) == 3


def test_folds_that_leak(raw, release, capsys):
    folds = [{"train": [FDG, PSMA], "val": [FDG_LATER, PSMA_LATER]}]
    (release / "splits_final.json").write_text(json.dumps(folds))
    assert convert(release) == 0
    assert "have 2 patients on both sides (e.g. fdg_0011f3deaf)" in capsys.readouterr().err


def test_a_case_in_no_fold_is_named(raw, release, capsys):
    folds = [{"train": [FDG, FDG_LATER], "val": [PSMA, PSMA_LATER]}]
    (release / "splits_final.json").write_text(json.dumps(folds))
    assert convert(release) == 0
    error = capsys.readouterr().err
    assert (
        f"1 cases are in none of the folds that came with the data and are not trained on (e.g. {CLEAN[PSMA_OTHER]}"
        in error
    )


def test_a_label_without_images(raw, release, capsys):
    for channel in (0, 1):
        (release / "imagesTr" / f"{PSMA}_{channel:04d}.nii.gz").unlink()
    assert convert(release) == 1
    assert f"refused {CLEAN[PSMA]}: {release}: lacks imagesTr/{PSMA}_0000.nii.gz" in capsys.readouterr().err


def test_channels_on_two_grids(raw, source, capsys):
    write_case(source, FDG)
    path = source / "imagesTr" / f"{FDG}_0000.nii.gz"
    ct = sitk.ReadImage(str(path))
    ct.SetOrigin((3.0, 0.0, 0.0))
    sitk.WriteImage(ct, str(path))
    assert convert(source) == 2
    assert "_0000.nii.gz: is on another grid than its PET (origin" in capsys.readouterr().err
