"""``h2a_convert_autopet`` on the folder layout of the NIfTI release."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from dataset_conversion.autopet import main

LAS = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
DATASET = "Dataset601_AutoPET"
HEXES = ("0011f3deaf", "01140d52d8", "0123456789", "a1b2c3d4e5", "ffeeddccbb", "0a0a0a0a0a")


def convert(source: Path, *flags: str) -> int:
    return main(["-i", str(source), "-d", "601", "-np", "1", *flags])


def image(array: np.ndarray, spacing: tuple[float, ...], direction: tuple[float, ...] = LAS) -> sitk.Image:
    result = sitk.GetImageFromArray(array)
    result.SetSpacing(spacing)
    result.SetOrigin((-20.0, 30.0, -400.0))
    result.SetDirection(direction)
    return result


def write_study(
    root: Path, hexes: str, date: str = "03-23-2003", number: str = "61168", lesion: bool = True, **changes: object
) -> Path:
    """Write one study on a 2 x 2 x 3 mm PET grid, CT on a 1 x 1 x 1.5 mm grid of the same extent."""
    folder = root / "FDG-PET-CT-Lesions" / f"PETCT_{hexes}"
    folder /= f"{date}-NA-PET-CT Ganzkoerper  primaer mit KM-{number}"
    folder.mkdir(parents=True)
    z, y, x = np.mgrid[0:10, 0:14, 0:16]
    pet_grid, direction = (2.0, 2.0, 3.0), changes.get("direction", LAS)
    seg = np.zeros(x.shape, np.uint8)
    if lesion:
        seg[4:6, 5:9, 6:10] = 1
    ct = np.float32(10.0 * x + 5 * y + z - 50)
    fine = np.mgrid[0:20, 0:28, 0:32] / 2.0
    parts = {
        "CT": image(np.float32(10.0 * fine[2] + 5 * fine[1] + fine[0] - 50), (1.0, 1.0, 1.5), direction),
        "CTres": image(ct, pet_grid, direction),
        "PET": image(np.float32(x * 1000.0), pet_grid, direction),
        "SUV": image(np.float32(x * 0.5 + seg * 10), pet_grid, direction),
        "SEG": image(seg, pet_grid, direction),
        **{name: value for name, value in changes.items() if name in ("CT", "CTres", "SUV", "SEG")},
    }
    for name, content in parts.items():
        if content is not None:
            sitk.WriteImage(content, str(folder / f"{name}.nii.gz"))
    return folder


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Six patients, one of them with two studies, one negative, with the metadata table beside."""
    root = tmp_path / "release"
    for index, name in enumerate(HEXES):
        write_study(root, name, number=f"{10000 + index}", lesion=index != 3)
    write_study(root, HEXES[0], date="08-01-2004", number="77777")
    (root / "Clinical Metadata FDG PET_CT Lesions.csv").write_text("Subject ID,diagnosis\n")
    return root


def test_release_layout(raw: Path, release: Path) -> None:
    assert convert(release) == 0
    folder = raw / DATASET
    names = {path.name.removesuffix(".nii.gz") for path in (folder / "labelsTr").iterdir()}
    assert names == {f"fdg_{name}_20030323" for name in HEXES} | {f"fdg_{HEXES[0]}_20040801"}
    assert len(list((folder / "imagesTr").iterdir())) == 14
    content = json.loads((folder / "dataset.json").read_text())
    assert (content["channel_names"], content["h2a_modalities"]) == ({"0": "CT", "1": "PET"}, ["CT", "PET"])
    assert content["numTraining"] == 7
    splits = json.loads((folder / "splits_final.json").read_text())
    assert len(splits) == 5
    for fold in splits:
        assert not {name.split("_")[1] for name in fold["train"]} & {name.split("_")[1] for name in fold["val"]}


def test_fitting_files_are_taken_as_they_are(raw: Path, release: Path) -> None:
    assert convert(release) == 0
    study = next((release / "FDG-PET-CT-Lesions" / f"PETCT_{HEXES[1]}").iterdir())
    case = f"fdg_{HEXES[1]}_20030323"
    for name, target in (
        ("CTres", f"imagesTr/{case}_0000"),
        ("SUV", f"imagesTr/{case}_0001"),
        ("SEG", f"labelsTr/{case}"),
    ):
        source = (study / f"{name}.nii.gz").read_bytes()
        assert (raw / DATASET / f"{target}.nii.gz").read_bytes() == source


def test_nnunet_accepts_the_dataset(raw: Path, release: Path) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    assert convert(release) == 0
    verify_dataset_integrity(str(raw / DATASET), 1)


def test_two_studies_of_one_day(raw: Path, tmp_path: Path) -> None:
    for number in ("11111", "22222"):
        write_study(tmp_path / "r", HEXES[0], number=number)
    write_study(tmp_path / "r", HEXES[1])
    assert convert(tmp_path / "r") == 0
    names = {path.name for path in (raw / DATASET / "labelsTr").iterdir()}
    assert names == {
        f"fdg_{HEXES[0]}_20030323_11111.nii.gz",
        f"fdg_{HEXES[0]}_20030323_22222.nii.gz",
        f"fdg_{HEXES[1]}_20030323.nii.gz",
    }
    assert len(json.loads((raw / DATASET / "splits_final.json").read_text())) == 2


def test_drop_negatives(raw: Path, release: Path, capsys) -> None:
    assert convert(release, "--drop-negatives") == 0
    said = f"note: 1 cases were left out (e.g. fdg_{HEXES[3]}_20030323: no lesion (--drop-negatives))"
    assert said in capsys.readouterr().out
    assert not (raw / DATASET / "labelsTr" / f"fdg_{HEXES[3]}_20030323.nii.gz").exists()
    assert json.loads((raw / DATASET / "dataset.json").read_text())["numTraining"] == 6


def test_nothing_of_the_tracer_that_is_wanted(raw: Path, release: Path, capsys) -> None:
    assert convert(release, "--tracer", "psma") == 2
    error = capsys.readouterr().err
    assert "holds nothing that is wanted: 7 cases were left out" in error
    assert "tracer fdg (--tracer psma)" in error


def test_six_two_two_of_two_patients(raw: Path, tmp_path: Path, capsys) -> None:
    for name in HEXES[:2]:
        write_study(tmp_path / "r", name)
    assert convert(tmp_path / "r", "--splits", "622") == 2
    assert "--splits 622: there are 2 patients, and each part needs one" in capsys.readouterr().err


def test_one_patient_alone_is_validated_on_what_it_trains_on(raw: Path, tmp_path: Path, capsys) -> None:
    for name in HEXES[:2]:
        write_study(tmp_path / "r", name)
    assert convert(tmp_path / "r") == 0
    assert "one patient alone" not in capsys.readouterr().err
    assert convert(tmp_path / "r", "--test", f"PETCT_{HEXES[0]}") == 0
    assert "warning: one patient alone is left to train on" in capsys.readouterr().err


def test_test_patient_takes_all_its_studies(raw: Path, release: Path) -> None:
    assert convert(release, "--test", f"PETCT_{HEXES[0]}") == 0
    assert len(list((raw / DATASET / "labelsTs").iterdir())) == 2
    assert HEXES[0] not in (raw / DATASET / "splits_final.json").read_text()


def test_ct_is_resampled_where_ctres_is_missing(raw: Path, tmp_path: Path) -> None:
    write_study(tmp_path / "r", HEXES[0], CTres=None)
    write_study(tmp_path / "r", HEXES[1])
    assert convert(tmp_path / "r") == 0
    made, given = (
        sitk.ReadImage(str(raw / DATASET / "imagesTr" / f"fdg_{name}_20030323_0000.nii.gz")) for name in HEXES[:2]
    )
    assert made.GetSize() == given.GetSize()
    np.testing.assert_allclose(sitk.GetArrayFromImage(made), sitk.GetArrayFromImage(given), atol=1e-3)


def test_ct_grid(raw: Path, tmp_path: Path) -> None:
    write_study(tmp_path / "r", HEXES[0])
    assert convert(tmp_path / "r", "--grid", "ct") == 0
    label = sitk.ReadImage(str(raw / DATASET / "labelsTr" / f"fdg_{HEXES[0]}_20030323.nii.gz"))
    assert label.GetSize() == (32, 28, 20)
    volume = sitk.GetArrayFromImage(label).sum() * 1.5
    assert volume == pytest.approx(2 * 4 * 4 * 12, rel=0.3)


def test_label_on_another_grid_is_placed_by_position(raw: Path, tmp_path: Path) -> None:
    """A label with one row and slice more than the PET, as other releases have it."""
    seg = np.zeros((11, 15, 16), np.uint8)
    seg[4:6, 5:9, 6:10] = 1
    write_study(tmp_path / "r", HEXES[0], SEG=image(seg, (2.0, 2.0, 3.0)))
    assert convert(tmp_path / "r") == 0
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / DATASET / "labelsTr" / f"fdg_{HEXES[0]}_20030323.nii.gz")))
    np.testing.assert_array_equal(label, seg[:10, :14])


def test_one_orientation_for_all(raw: Path, tmp_path: Path) -> None:
    for name in HEXES[:3]:
        write_study(tmp_path / "r", name)
    write_study(tmp_path / "r", HEXES[3], direction=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    assert convert(tmp_path / "r") == 0
    for path in (raw / DATASET).rglob("*.nii.gz"):
        assert sitk.ReadImage(str(path)).GetDirection() == LAS
    turned = sitk.ReadImage(str(raw / DATASET / "labelsTr" / f"fdg_{HEXES[3]}_20030323.nii.gz"))
    assert turned.TransformIndexToPhysicalPoint((6, 13 - 5, 4)) == pytest.approx((-8.0, 40.0, -388.0))
    assert turned[6, 13 - 5, 4] == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"SUV": None}, "SUV.nii.gz"),
        ({"SEG": None}, "SEG.nii.gz"),
        ({"SEG": image(np.full((10, 14, 16), 7, np.uint8), (2.0, 2.0, 3.0))}, "label values"),
    ],
)
def test_a_bad_study_is_refused_and_the_rest_goes_on(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, reason: str
) -> None:
    write_study(tmp_path / "r", HEXES[0])
    write_study(tmp_path / "r", HEXES[1], **changes)
    assert convert(tmp_path / "r") == 1
    lines = capsys.readouterr().err.splitlines()
    line = next(text for text in lines if text.startswith("refused"))
    assert lines[-1].startswith("1 of 2 studies refused; see ")
    assert HEXES[1] in line
    assert reason in line
    assert [path.name for path in (raw / DATASET / "labelsTr").iterdir()] == [f"fdg_{HEXES[0]}_20030323.nii.gz"]


@pytest.mark.parametrize("name", ["CTres", "SUV", "SEG"])
@pytest.mark.parametrize("keep", [0, 60, -3])
def test_cut_off_file_is_refused_without_traceback(
    raw: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, keep: int
) -> None:
    write_study(tmp_path / "r", HEXES[0])
    path = write_study(tmp_path / "r", HEXES[1]) / f"{name}.nii.gz"
    path.write_bytes(path.read_bytes()[:keep])
    assert convert(tmp_path / "r") == 1
    error = capfd.readouterr().err
    assert f"{name}.nii.gz" in error
    assert "Traceback" not in error


def test_swapped_ct_and_pet_are_refused(raw, tmp_path, capsys):
    folder = write_study(tmp_path / "r", HEXES[0])
    (folder / "CTres.nii.gz").rename(folder / "x")
    (folder / "SUV.nii.gz").rename(folder / "CTres.nii.gz")
    sitk.WriteImage(sitk.ReadImage(str(folder / "CTres.nii.gz")) * 0 - 1000, str(folder / "SUV.nii.gz"))
    assert convert(tmp_path / "r") == 2
    assert "SUV.nii.gz: the lowest value of the PET is -1000, and SUV is not negative" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda seg: seg.SetSpacing((4.0, 4.0, 3.0)), "spacing"),
        (lambda seg: seg.SetOrigin((-19.0, 30.0, -400.0)), "origin"),
        (lambda seg: seg.SetDirection((1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)), "direction"),
    ],
    ids=["spacing", "half a voxel beside", "mirrored"],
)
def test_a_mask_on_another_grid_is_refused(raw, tmp_path, capsys, change, what):
    """Never resampled: autoPET's masks are on the PET's grid, so that the header or the file is wrong."""
    seg = image(np.zeros((10, 14, 16), np.uint8), (2.0, 2.0, 3.0))
    seg[6, 5, 4] = 1
    change(seg)
    write_study(tmp_path / "r", HEXES[0], SEG=seg)
    assert convert(tmp_path / "r") == 2
    error = capsys.readouterr().err
    assert f"SEG.nii.gz: is on another grid than its PET ({what}" in error


def test_lesions_outside_the_pet_are_refused(raw, tmp_path, capsys):
    seg = np.zeros((12, 14, 16), np.uint8)
    seg[11, 5, 5] = 1
    write_study(tmp_path / "r", HEXES[0], SEG=image(seg, (2.0, 2.0, 3.0)))
    assert convert(tmp_path / "r") == 2
    assert "SEG.nii.gz: has lesions outside its PET" in capsys.readouterr().err


MIRRORED = (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)


@pytest.mark.parametrize("change", [lambda ct: ct.SetDirection(MIRRORED), lambda ct: ct.SetOrigin((2000.0, 0.0, 0.0))])
def test_ctres_on_another_grid_is_refused(raw, tmp_path, capsys, change):
    """The release resampled it to the PET: anything else is a wrong header or another study's file."""
    ct = image(np.full((10, 14, 16), -500, np.float32), (2.0, 2.0, 3.0))
    change(ct)
    write_study(tmp_path / "r", HEXES[0], CTres=ct)
    assert convert(tmp_path / "r") == 2
    assert "CTres.nii.gz: is on another grid than its PET" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--grid", "ct")])
@pytest.mark.parametrize("change", [lambda ct: ct.SetDirection(MIRRORED), lambda ct: ct.SetOrigin((2000.0, 0.0, 0.0))])
def test_ct_elsewhere_or_mirrored(raw, tmp_path, capsys, change, flags):
    ct = image(np.full((20, 28, 32), -500, np.float32), (1.0, 1.0, 1.5))
    change(ct)
    write_study(tmp_path / "r", HEXES[0], CTres=None, CT=ct)
    assert convert(tmp_path / "r", *flags) == 2
    assert "CT and PET lie at different places" in capsys.readouterr().err


def test_ct_that_does_not_cover_the_lesions(raw, tmp_path, capsys):
    """CT of the lower half, lesions in the upper one."""
    seg = np.zeros((10, 14, 16), np.uint8)
    seg[8:, 5:9, 6:10] = 1
    ct = image(np.full((10, 28, 32), -500, np.float32), (1.0, 1.0, 1.5))
    write_study(tmp_path / "r", HEXES[0], CTres=None, CT=ct, SEG=image(seg, (2.0, 2.0, 3.0)))
    assert convert(tmp_path / "r") == 2
    assert "the CT does not cover the tumour" in capsys.readouterr().err


@pytest.mark.parametrize(("values", "code"), [((0, 255), 0), ((0, 7), 2), ((0, 1, 2), 2), ((0, 0.5), 2)])
def test_label_values(raw, tmp_path, capsys, values, code):
    seg = np.zeros((10, 14, 16), np.float32 if 0.5 in values else np.uint8)
    seg[4, 5, : len(values)] = values
    write_study(tmp_path / "r", HEXES[0], SEG=image(seg, (2.0, 2.0, 3.0)))
    assert convert(tmp_path / "r") == code
    if code:
        assert "SEG.nii.gz: holds label values 0, " in capsys.readouterr().err
    else:
        label = sitk.ReadImage(str(raw / DATASET / "labelsTr" / f"fdg_{HEXES[0]}_20030323.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(label), seg // 255)


def test_a_study_in_the_test_set_takes_its_patients_others_along(raw, release, capsys):
    assert convert(release, "--test", f"fdg_{HEXES[0]}_20030323") == 0
    assert {path.name[:14] for path in (raw / DATASET / "labelsTs").iterdir()} == {f"fdg_{HEXES[0]}"}
    assert len(list((raw / DATASET / "labelsTs").iterdir())) == 2
    assert "all 2 studies of the patient go to the test set" in capsys.readouterr().err


def test_incomplete_studies_are_named(raw, release, capsys):
    folder = write_study(release, "deadbeef00", SUV=None, SEG=None)
    assert convert(release) == 1
    assert f"refused fdg_deadbeef00_20030323: {folder}: lacks SEG.nii.gz, SUV.nii.gz" in capsys.readouterr().err


def test_six_two_two(raw, tmp_path):
    """--splits 622: 60 % training, 20 % validation and 20 % test of the patients, studies of a patient together."""
    for index in range(10):
        write_study(tmp_path / "r", f"{index:010d}")
    write_study(tmp_path / "r", f"{0:010d}", date="08-01-2004")
    assert convert(tmp_path / "r", "--splits", "622") == 0
    (fold,) = json.loads((raw / DATASET / "splits_final.json").read_text())
    test = {path.name.removesuffix(".nii.gz") for path in (raw / DATASET / "labelsTs").iterdir()}
    patients = [{name.split("_")[1] for name in part} for part in (fold["train"], fold["val"], test)]
    assert [len(part) for part in patients] == [6, 2, 2]
    assert len(set.union(*patients)) == 10
    trained = {path.name.removesuffix(".nii.gz") for path in (raw / DATASET / "labelsTr").iterdir()}
    assert trained == set(fold["train"]) | set(fold["val"])


@pytest.mark.parametrize(("choice", "name"), [("zscore", "PET"), ("ct", "CT"), ("suv", "noNorm")])
def test_pet_normalization(raw, release, choice, name):
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

    assert convert(release, "--pet-normalization", choice) == 0
    content = json.loads((raw / DATASET / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "CT", "1": name}
    assert content["h2a_modalities"] == ["CT", "PET"]
    expected = {"zscore": "ZScoreNormalization", "ct": "CTNormalization", "suv": "NoNormalization"}[choice]
    assert get_normalization_scheme(name).__name__ == expected
    # Chosen once, it stays until chosen otherwise, and changing it converts nothing again.
    before = {path: path.stat().st_mtime_ns for path in (raw / DATASET).rglob("*.nii.gz")}
    assert convert(release) == 0
    assert json.loads((raw / DATASET / "dataset.json").read_text())["channel_names"]["1"] == name
    assert convert(release, "--pet-normalization", "zscore") == 0
    assert json.loads((raw / DATASET / "dataset.json").read_text())["channel_names"]["1"] == "PET"
    assert {path: path.stat().st_mtime_ns for path in (raw / DATASET).rglob("*.nii.gz")} == before


@pytest.mark.parametrize("link", ["copy", "hard", "soft"])
def test_links(raw, release, link):
    assert convert(release, "--link", link) == 0
    study = next((release / "FDG-PET-CT-Lesions" / f"PETCT_{HEXES[1]}").iterdir())
    written = raw / DATASET / "imagesTr" / f"fdg_{HEXES[1]}_20030323_0001.nii.gz"
    assert written.read_bytes() == (study / "SUV.nii.gz").read_bytes()
    assert written.is_symlink() == (link == "soft")
    assert written.samefile(study / "SUV.nii.gz") == (link != "copy")
    # A second run keeps them as they are.
    assert convert(release, "--link", link) == 0
    assert written.is_symlink() == (link == "soft")
    assert written.samefile(study / "SUV.nii.gz") == (link != "copy")


def test_a_label_without_background(raw, tmp_path, capsys):
    write_study(tmp_path / "r", HEXES[0], SEG=image(np.ones((10, 14, 16), np.uint8), (2.0, 2.0, 3.0)))
    assert convert(tmp_path / "r") == 2
    assert "SEG.nii.gz: has no background" in capsys.readouterr().err


def test_lesions_partly_outside_the_ct(raw, tmp_path):
    """On the CT grid, which ends in the middle of a lesion: a note says how much is cut off."""
    seg = np.zeros((10, 14, 16), np.uint8)
    seg[3:7, 5:9, 6:10] = 1
    ct = image(np.full((10, 28, 32), -500, np.float32), (1.0, 1.0, 1.5))
    write_study(tmp_path / "r", HEXES[0], CT=ct, SEG=image(seg, (2.0, 2.0, 3.0)))
    assert convert(tmp_path / "r", "--grid", "ct") == 0
    (record,) = json.loads((raw / DATASET / "conversion_report.json").read_text())["cases"].values()
    assert any("of the tumour lies outside the CT" in text for text in record["warnings"])


def test_a_file_twice(raw, tmp_path, capsys):
    folder = write_study(tmp_path / "r", HEXES[0])
    sitk.WriteImage(sitk.ReadImage(str(folder / "SUV.nii.gz")), str(folder / "SUV.nii"))
    assert convert(tmp_path / "r") == 2
    assert f"SUV.nii.gz: is there twice, also as {folder / 'SUV.nii'}" in capsys.readouterr().err
