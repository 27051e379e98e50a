"""``h2a_convert_pclt20k``: PNG slices for nnU-Net's NaturalImage2DIO, and volumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from dataset_conversion.pclt20k import main

DATASET = "Dataset620_PCLT20K"
SLICES = ("0001_10", "0001_9", "0002_1", "0003_1", "200908508_42", "0005_3", "0006_1")
TRAIN, TEST = SLICES[:5], SLICES[5:]


def convert(source: Path, *flags: str) -> int:
    return main(["-i", str(source), "-d", "620", "-np", "1", *flags])


def grey(name: str, kind: str) -> np.ndarray:
    seed = sum(map(ord, name + kind))
    return np.random.default_rng(seed).integers(0, 256, (12, 16), np.uint8)


def mask(name: str) -> np.ndarray:
    values = np.zeros((12, 16), np.uint8)
    values[3:6, 4 : 5 + sum(map(ord, name)) % 6] = 255
    return values


def write_slice(root: Path, name: str, **changes: Image.Image | None) -> None:
    folder = root / "PCLT20K" / name.split("_")[0]
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"CT": Image.fromarray(grey(name, "CT")), "PET": Image.fromarray(grey(name, "PET")),
                "mask": Image.fromarray(mask(name)), **changes}  # fmt: skip
    for kind, picture in pictures.items():
        if picture is not None:
            picture.save(folder / f"{name}_{kind}.png")


def write_lists(root: Path, train=TRAIN, test=TEST, newline: str = "\n", last: str = "") -> None:
    for name, names in (("train", train), ("test", test)):
        (root / "PCLT20K" / f"{name}.txt").write_bytes((newline.join(names) + last).encode())


@pytest.fixture
def release(source) -> Path:
    for name in SLICES:
        write_slice(source, name)
    write_lists(source)
    return source


def read(raw: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(raw / DATASET / name))


@pytest.mark.parametrize(("newline", "last"), [("\n", ""), ("\n", "\n"), ("\r\n", ""), ("\r\n", "\r\n\r\n")])
def test_lists_decide(raw, release, newline, last):
    write_lists(release, newline=newline, last=last)
    assert convert(release) == 0
    assert {path.stem for path in (raw / DATASET / "labelsTr").iterdir()} == set(TRAIN)
    assert {path.stem for path in (raw / DATASET / "labelsTs").iterdir()} == set(TEST)
    for name in SLICES:
        end = "Tr" if name in TRAIN else "Ts"
        for channel, kind in enumerate(("CT", "PET")):
            np.testing.assert_array_equal(read(raw, f"images{end}/{name}_{channel:04d}.png"), grey(name, kind))
        np.testing.assert_array_equal(read(raw, f"labels{end}/{name}.png"), mask(name) // 255)
    splits = json.loads((raw / DATASET / "splits_final.json").read_text())
    assert len(splits) == 4
    for fold in splits:
        assert not {name.split("_")[0] for name in fold["train"]} & {name.split("_")[0] for name in fold["val"]}


def test_nnunet_reads_it(raw, release):
    """The explicit list in dataset.json, the reader, and the integrity check of nnU-Net."""
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    assert convert(release) == 0
    content = json.loads((raw / DATASET / "dataset.json").read_text())
    assert (content["file_ending"], content["overwrite_image_reader_writer"]) == (".png", "NaturalImage2DIO")
    files = get_filenames_of_train_images_and_targets(str(raw / DATASET))
    assert set(files) == set(TRAIN)
    images, _ = NaturalImage2DIO().read_images(files["0001_9"]["images"])
    np.testing.assert_array_equal(images[:, 0], [grey("0001_9", "CT"), grey("0001_9", "PET")])
    verify_dataset_integrity(str(raw / DATASET), 1)


def test_fitting_files_are_linked(raw, release):
    assert convert(release, "--link", "hard") == 0
    source = release / "PCLT20K" / "0001" / "0001_9_PET.png"
    assert (raw / DATASET / "imagesTr" / "0001_9_0001.png").samefile(source)


@pytest.mark.parametrize(
    "stored",
    [
        lambda values: Image.fromarray(np.stack([values] * 3, axis=-1)),
        lambda values: Image.fromarray(np.stack([values] * 3 + [np.full_like(values, 255)], axis=-1)),
        lambda values: Image.fromarray(values).convert("P"),
        lambda values: Image.fromarray(values).convert("LA"),
    ],
    ids=["RGB", "RGBA", "palette", "grey with opacity"],
)
def test_grey_stored_otherwise(raw, release, stored):
    name = TRAIN[0]
    write_slice(release, name, CT=stored(grey(name, "CT")), mask=stored(mask(name)))
    assert convert(release) == 0
    written = Image.open(raw / DATASET / "imagesTr" / f"{name}_0000.png")
    assert written.mode == "L"
    np.testing.assert_array_equal(np.asarray(written), grey(name, "CT"))
    np.testing.assert_array_equal(read(raw, f"labelsTr/{name}.png"), mask(name) // 255)


@pytest.mark.parametrize(
    ("values", "written"),
    [((0, 127, 128, 255), (0, 0, 1, 1)), ((0, 1), (0, 1)), ((0,), (0,))],
    ids=["as the authors' loader has it", "0 and 1", "empty"],
)
def test_mask_values(raw, release, values, written):
    name, picture, expected = TRAIN[0], np.zeros((12, 16), np.uint8), np.zeros((12, 16), np.uint8)
    picture[0, : len(values)], expected[0, : len(values)] = values, written
    write_slice(release, name, mask=Image.fromarray(picture))
    assert convert(release) == 0
    np.testing.assert_array_equal(read(raw, f"labelsTr/{name}.png"), expected)


def colour() -> Image.Image:
    values = np.zeros((12, 16, 3), np.uint8)
    values[..., 0] = 200
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"CT": colour()}, "0001_10_CT.png: is a colour picture"),
        ({"PET": Image.fromarray(np.zeros((12, 16), np.uint16))}, "0001_10_PET.png: is no 8-bit grey picture"),
        ({"PET": Image.fromarray(np.zeros((12, 17), np.uint8))}, "PET and CT differ in size: 17 x 12 and 16 x 12"),
        ({"mask": Image.fromarray(np.full((12, 16), 7, np.uint8))}, "0001_10_mask.png: its highest value is 7"),
    ],
)
def test_refused_pictures(raw, release, capsys, changes, what):
    write_slice(release, TRAIN[0], **changes)
    assert convert(release) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("refused")]
    assert line.startswith("refused 0001_10: ")
    assert what in line


def test_damaged_and_missing_files(raw, release, capsys):
    folder = release / "PCLT20K"
    path = folder / "0002" / "0002_1_CT.png"
    path.write_bytes(path.read_bytes()[:-60])
    (folder / "0003" / "0003_1_mask.png").unlink()
    for path in (folder / "0005").iterdir():
        path.unlink()
    assert convert(release) == 1
    lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("refused")]
    assert len(lines) == 3
    assert "0002_1_CT.png: cannot be read as a picture" in lines[0]
    assert "lacks 0003_1_mask.png" in lines[1]
    assert "refused 0005_3: is in test.txt and its files are not there" in lines[2]


def test_lists_missing(raw, release, capsys):
    for name in ("train", "test"):
        (release / "PCLT20K" / f"{name}.txt").unlink()
    assert convert(release) == 2
    assert (
        "has no train.txt and test.txt, the official lists; restore them, or --lists ignore" in capsys.readouterr().err
    )
    assert convert(release, "--lists", "ignore") == 0
    assert {path.stem for path in (raw / DATASET / "labelsTr").iterdir()} == set(SLICES)


def test_slice_in_both_lists(raw, release, capsys):
    write_lists(release, train=[*TRAIN, TEST[0]])
    assert convert(release) == 2
    assert f"{TEST[0]} is in train.txt and in test.txt" in capsys.readouterr().err


def test_patient_in_both_lists_and_unlisted_slices(raw, release, capsys):
    write_lists(release, train=TRAIN[1:], test=[*TEST[:1], TRAIN[0]])
    assert convert(release) == 0
    error = capsys.readouterr().err
    assert "1 patients are in both official lists (e.g. 0001)" in error
    assert "1 slices are in neither list and were left out (e.g. 0006_1)" in error


@pytest.mark.parametrize(("choice", "name"), [("zscore", "PET"), ("ct", "CT"), ("suv", "rgb_to_0_1")])
def test_pet_normalization(raw, release, choice, name):
    assert convert(release, "--pet-normalization", choice) == 0
    content = json.loads((raw / DATASET / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "CT", "1": name}


def test_volumes(raw, release):
    """Slices in the order of their numbers, 9 before 10; one volume per patient."""
    assert convert(release, "--volumes", "--spacing", "0.98", "0.98", "3.27") == 0
    folder = raw / DATASET
    assert {path.name for path in (folder / "labelsTr").iterdir()} == {
        f"{patient}.nii.gz" for patient in ("0001", "0002", "0003", "200908508")
    }
    assert {path.name for path in (folder / "labelsTs").iterdir()} == {"0005.nii.gz", "0006.nii.gz"}
    for channel, kind in enumerate(("CT", "PET")):
        image = sitk.ReadImage(str(folder / "imagesTr" / f"0001_{channel:04d}.nii.gz"))
        np.testing.assert_allclose(image.GetSpacing(), (0.98, 0.98, 3.27), rtol=1e-6)
        expected = [grey("0001_9", kind), grey("0001_10", kind)]
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), expected)
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / "0001.nii.gz")))
    np.testing.assert_array_equal(label, [mask("0001_9") // 255, mask("0001_10") // 255])
    content = json.loads((folder / "dataset.json").read_text())
    assert (content["file_ending"], content["overwrite_image_reader_writer"]) == (".nii.gz", "SimpleITKIO")
    assert "dataset" not in content


def test_volumes_of_a_patient_in_both_lists(raw, release, capsys):
    write_lists(release, train=TRAIN[1:], test=[*TEST, TRAIN[0]])
    assert convert(release, "--volumes") == 0
    assert "volumes of these 1 patients hold their test slices only" in capsys.readouterr().err
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / DATASET / "labelsTs" / "0001.nii.gz")))
    np.testing.assert_array_equal(label, [mask("0001_10") // 255])


def test_volume_of_unequal_slices(raw, release, capsys):
    small = Image.fromarray(np.zeros((6, 8), np.uint8))
    write_slice(release, "0001_10", CT=small, PET=small, mask=small)
    assert convert(release, "--volumes") == 1
    assert "has 8 x 6 pixels, the patient's first slice 16 x 12" in capsys.readouterr().err


def test_one_list_missing(raw, release, capsys):
    (release / "PCLT20K" / "test.txt").unlink()
    assert convert(release) == 2
    assert "train.txt: is there without test.txt; restore test.txt, or --lists ignore" in capsys.readouterr().err


def test_spacing_without_volumes(raw, release, capsys):
    with pytest.raises(SystemExit) as stop:
        convert(release, "--spacing", "1", "1", "2")
    assert stop.value.code == 2
    assert "--spacing goes with --volumes" in capsys.readouterr().err


def test_volumes_over_a_dataset_of_slices(raw, release, capsys):
    assert convert(release) == 0
    assert convert(release, "--volumes") == 2
    assert "cases that this run would not make" in capsys.readouterr().err


def test_no_patients_are_added_to_the_official_test_set(raw, release, capsys):
    assert convert(release, "--splits", "622") == 2
    assert "the data has a test set of its own" in capsys.readouterr().err


def test_two_slices_of_one_number(raw, release, capsys):
    write_slice(release, "0001_09")
    write_lists(release, train=[*TRAIN, "0001_09"])
    assert convert(release, "--volumes") == 1
    assert "has the number of 0001_09" in capsys.readouterr().err


def test_a_picture_twice(raw, release, capsys):
    folder = release / "PCLT20K" / "more"
    folder.mkdir()
    (folder / "0001_9_CT.png").write_bytes((release / "PCLT20K" / "0001" / "0001_9_CT.png").read_bytes())
    assert convert(release) == 1
    assert "is there twice, also as" in capsys.readouterr().err
