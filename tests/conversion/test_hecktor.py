"""``h2a_convert_hecktor`` on the layouts of 2020/21, 2022, 2025 and 2026."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from dataset_conversion.hecktor import main
from tests.conversion.test_engine import environment

DATASET = "Dataset610_HECKTOR"
NAMES = ("imagesTr/CHUM_001_0000", "imagesTr/CHUM_001_0001", "labelsTr/CHUM_001")
CT_GRID = ((40, 36, 20), (2.0, 2.0, 3.0), (-40.0, -36.0, -30.0))
PET_GRID = ((16, 16, 18), (5.0, 5.0, 4.0), (-38.0, -37.0, -31.0))


def convert(source: Path, *flags: str) -> int:
    return main(["-i", str(source), "-d", "610", "-np", "1", *flags])


def grid_image(size, spacing, origin, function) -> sitk.Image:
    """An image whose value at a position (mm) is a function of it."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), axis=-1)
    world = index * np.array(spacing) + np.array(origin)
    values = function(*np.moveaxis(world, -1, 0))
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0)))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    return image


def hu(x, y, z):
    return np.float32(-400 + 3 * x + 2 * y + z)


def suv(x, y, z):
    return np.float32(20 + 0.1 * x + 0.2 * y + 0.05 * z)


def tumours(old: bool):
    def labels(x, y, z):
        primary = (np.abs(x - 2) < 8) & (np.abs(y) < 6) & (np.abs(z + 3) < 7)
        node = (np.abs(x + 20) < 5) & (np.abs(y) < 5) & (np.abs(z - 6) < 5)
        return np.uint8(primary) if old else np.where(node, 2, primary).astype(np.uint8)

    return labels


def write(path: Path, image: sitk.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=True)


def write_patient(
    root: Path, layout: str, patient: str, *, label_grid: tuple = CT_GRID, pet_grid: tuple = PET_GRID,
    label: bool = True, **images: sitk.Image,
) -> None:  # fmt: skip
    """Write one patient as an edition has it; ``images`` replace ``ct``, ``pet`` or ``mask``."""
    folder, ct, pet, mask = {
        "2021": ("hecktor_nii", f"{patient}_ct", f"{patient}_pt", f"{patient}_ct_gtvt"),
        "2022": ("hecktor2022_training", f"imagesTr/{patient}__CT", f"imagesTr/{patient}__PT", f"labelsTr/{patient}"),
        "2025": ("hecktor2025_training/Task 1", *(f"{patient}/{patient}{end}" for end in ("__CT", "__PT", ""))),
        "2026": ("hecktor2026_training", *(f"{patient}/{patient}{end}" for end in ("__CT", "__PT", ""))),
        "test": ("hecktor2026_testing", *(f"{patient}/{patient}{end}" for end in ("__CT", "__PT", ""))),
    }[layout]
    place = root / folder
    write(place / f"{ct}.nii.gz", images.get("ct", grid_image(*CT_GRID, hu)))
    write(place / f"{pet}.nii.gz", images.get("pet", grid_image(*pet_grid, suv)))
    if label:
        write(place / f"{mask}.nii.gz", images.get("mask", grid_image(*label_grid, tumours(layout == "2021"))))


def read(raw: Path, name: str) -> sitk.Image:
    return sitk.ReadImage(str(raw / DATASET / f"{name}.nii.gz"))


def values(raw: Path, name: str) -> np.ndarray:
    return sitk.GetArrayFromImage(read(raw, name))


def expected(image: sitk.Image, function) -> np.ndarray:
    """A function of position on an image's grid (identity direction)."""
    return sitk.GetArrayFromImage(grid_image(image.GetSize(), image.GetSpacing(), image.GetOrigin(), function))


@pytest.mark.parametrize(
    ("layout", "patients", "cases"),
    [
        ("2021", ("CHGJ007", "CHUM001"), ("CHGJ_007", "CHUM_001")),
        ("2022", ("CHUM-001", "MDA-052"), ("CHUM_001", "MDA_052")),
        ("2025", ("CHUM-001", "CHUP_008"), ("CHUM_001", "CHUP_008")),
        ("2026", ("CHUM-001", "USZ-101"), ("CHUM_001", "USZ_101")),
    ],
)
def test_layouts(raw, source, layout, patients, cases):
    for patient in patients:
        write_patient(source, layout, patient)
    (source / "hecktor_clinical_info.csv").write_text("PatientID,Weight\n")
    assert convert(source) == 0
    content = json.loads((raw / DATASET / "dataset.json").read_text())
    old = layout == "2021"
    assert content["labels"] == ({"background": 0, "GTVt": 1} if old else {"background": 0, "GTVp": 1, "GTVn": 2})
    assert {path.name.removesuffix(".nii.gz") for path in (raw / DATASET / "labelsTr").iterdir()} == set(cases)
    case = cases[0]
    np.testing.assert_array_equal(values(raw, f"imagesTr/{case}_0000"), expected(read(raw, f"labelsTr/{case}"), hu))
    np.testing.assert_array_equal(
        values(raw, f"labelsTr/{case}"), expected(read(raw, f"labelsTr/{case}"), tumours(old))
    )
    pet = values(raw, f"imagesTr/{case}_0001")
    core = (slice(2, -2),) * 3
    # SUV grows linearly, so that linear interpolation is exact but for the rim.
    np.testing.assert_allclose(pet[core], expected(read(raw, f"labelsTr/{case}"), suv)[core], atol=1e-4)


@pytest.mark.parametrize("extra", [(0, 0, 1), (0, 1, 0), (1, 1, 1)])
def test_label_larger_than_its_ct(raw, source, extra):
    """48 of the 524 masks of 2022: one slice, row or column more."""
    size = tuple(int(n) + more for n, more in zip(CT_GRID[0], extra, strict=True))
    write_patient(source, "2022", "CHUP-008", label_grid=(size, *CT_GRID[1:]))
    assert convert(source) == 0
    label = read(raw, "labelsTr/CHUP_008")
    assert label.GetSize() == CT_GRID[0]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label), expected(label, tumours(False)))
    record = json.loads((raw / DATASET / "conversion_report.json").read_text())["cases"]["CHUP_008"]
    assert any("label and CT differ (size" in text for text in record["warnings"])
    assert record["resampled"] == {"CT": False, "PT": True, "label": False}, "cut, on the CT's own lattice"
    assert record["highest_suv"] > 0


def test_label_shifted_by_a_few_voxels_is_placed_by_position(raw, source):
    size, spacing, origin = CT_GRID
    write_patient(source, "2022", "CHUP-008", label_grid=((34, 36, 20), spacing, (origin[0] + 6, *origin[1:])))
    assert convert(source) == 0
    label = read(raw, "labelsTr/CHUP_008")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label), expected(label, tumours(False)))
    assert label.GetSize() == size


def test_files_that_fit_are_taken_as_they_are(raw, source):
    write_patient(source, "2022", "CHUM-001")
    assert convert(source, "--link", "hard") == 0
    place = source / "hecktor2022_training"
    assert (raw / DATASET / "imagesTr/CHUM_001_0000.nii.gz").samefile(place / "imagesTr/CHUM-001__CT.nii.gz")
    assert (raw / DATASET / "labelsTr/CHUM_001.nii.gz").samefile(place / "labelsTr/CHUM-001.nii.gz")


def test_pet_grid(raw, source):
    write_patient(source, "2022", "CHUM-001")
    assert convert(source, "--grid", "pet") == 0
    pet = read(raw, "imagesTr/CHUM_001_0001")
    assert (pet.GetSize(), pet.GetSpacing(), pet.GetOrigin()) == PET_GRID
    np.testing.assert_array_equal(sitk.GetArrayFromImage(pet), expected(pet, suv))


def test_given_spacing(raw, source):
    write_patient(source, "2022", "CHUM-001")
    assert convert(source, "--spacing", "1", "1", "2", "--crop", "overlap") == 0
    ct = read(raw, "imagesTr/CHUM_001_0000")
    assert ct.GetSpacing() == (1.0, 1.0, 2.0)
    # From the later of both lower edges to the earlier of both upper edges.
    low, high = (-40.5, -37.0, -31.5), (39.5, 35.0, 28.5)
    for axis in range(3):
        start = ct.GetOrigin()[axis] - ct.GetSpacing()[axis] / 2
        assert start == pytest.approx(low[axis], abs=1.01)
        assert start + ct.GetSize()[axis] * ct.GetSpacing()[axis] == pytest.approx(high[axis], abs=1.01)
    inner = (slice(3, -3),) * 3
    np.testing.assert_allclose(sitk.GetArrayFromImage(ct)[inner], expected(ct, hu)[inner], atol=1e-2)
    np.testing.assert_allclose(values(raw, "imagesTr/CHUM_001_0001")[inner], expected(ct, suv)[inner], atol=1e-3)


def test_crop_to_the_overlap(raw, source):
    """PET that ends below the CT: what is left has PET everywhere."""
    write_patient(source, "2022", "CHUM-001", pet_grid=((16, 16, 8), *PET_GRID[1:]))
    assert convert(source, "--crop", "overlap") == 0
    ct = read(raw, "imagesTr/CHUM_001_0000")
    # The PET ends at -31 - 2 + 8 * 4 = -1 mm; CT slices are at -30, -27 … -3.
    assert ct.GetSize()[2] == 10
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ct), expected(ct, hu))
    assert (values(raw, "imagesTr/CHUM_001_0001") > 0).all()
    report = json.loads((raw / DATASET / "conversion_report.json").read_text())["cases"]["CHUM_001"]
    assert any("of the tumour lies outside the region" in text for text in report["warnings"])


def test_boxes_of_2021(raw, source, capsys):
    for patient in ("CHGJ007", "CHUM001"):
        write_patient(source, "2021", patient)
    table = source / "hecktor2021_bbox_training.csv"
    table.write_bytes(b"\xef\xbb\xbfPatientID,x1,x2,y1,y2,z1,z2\r\nCHGJ007,-20,20.5,-18,20,-25,10\r\n")
    assert convert(source, "--crop", "bbox") == 1
    assert "refused CHUM_001: " in (error := capsys.readouterr().err)
    assert "has no box in the CSV file" in error
    ct = read(raw, "imagesTr/CHGJ_007_0000")
    assert ct.GetOrigin() == (-20.0, -18.0, -24.0)
    assert ct.GetSize() == (21, 20, 12)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ct), expected(ct, hu))
    np.testing.assert_array_equal(values(raw, "labelsTr/CHGJ_007"), expected(ct, tumours(True)))


@pytest.mark.parametrize("row", ["CHGJ007,a,2,3,4,5,6", "CHGJ007,5,2,3,4,5,6", "CHGJ007,1,2"])
def test_unusable_box(raw, source, capsys, row):
    write_patient(source, "2021", "CHGJ007")
    (source / "bbox.csv").write_text(f"PatientID,x1,x2,y1,y2,z1,z2\n{row}\n")
    assert convert(source, "--crop", "bbox") == 2
    assert "bbox.csv: the box of CHGJ007 is" in capsys.readouterr().err


def test_folds_by_centre(raw, source):
    for patient in ("CHUM-001", "CHUM-002", "MDA-001", "HMR-005"):
        write_patient(source, "2026", patient)
    assert convert(source, "--splits", "centre") == 0
    splits = json.loads((raw / DATASET / "splits_final.json").read_text())
    assert [fold["val"] for fold in splits] == [["CHUM_001", "CHUM_002"], ["HMR_005"], ["MDA_001"]]
    assert splits[1]["train"] == ["CHUM_001", "CHUM_002", "MDA_001"]
    report = json.loads((raw / DATASET / "conversion_report.json").read_text())
    assert "assumed weight of 75 kg" in report["cases"]["HMR_005"]["warnings"][-1]


def test_test_cases_without_label(raw, source, capsys):
    write_patient(source, "2026", "CHUM-001")
    write_patient(source, "2026", "CHUM-002", label=False)
    write_patient(source, "test", "USZ-001", label=False)
    assert convert(source) == 1
    assert "refused CHUM_002" in (error := capsys.readouterr().err)
    assert "lacks its label" in error
    assert {path.name for path in (raw / DATASET / "imagesTs").iterdir()} == {
        "USZ_001_0000.nii.gz", "USZ_001_0001.nii.gz",
    }  # fmt: skip


def test_tasks_of_2025_hold_a_patient_twice(raw, source):
    """Task 2 repeats CT and PET of some patients beside their planning CT and dose: the copy with the label counts."""
    write_patient(source, "2025", "CHUM-001")
    other = source / "hecktor2025_training" / "Task 2" / "CHUM-001"
    for name in ("__CT", "__PT", "__CTPlanning", "__RTDOSE"):
        write(other / f"CHUM-001{name}.nii.gz", grid_image(*CT_GRID, hu))
    assert convert(source) == 0
    report = json.loads((raw / DATASET / "conversion_report.json").read_text())
    assert report["cases"]["CHUM_001"]["sources"]["folder"].endswith("Task 1/CHUM-001")


def test_two_editions_in_one_folder(raw, source, capsys):
    write_patient(source, "2021", "CHGJ007")
    write_patient(source, "2022", "CHUM-001")
    assert convert(source) == 2
    assert "holds two editions (1 patients named as in 2020/21, 1 as from 2022 on)" in capsys.readouterr().err


FAR = (900.0, 0.0, 0.0)
BAD_IMAGES = {
    "label values": (
        {"mask": grid_image(*CT_GRID, lambda x, y, z: np.uint8(x > 0) * 3)},
        "holds label values 3; 0, 1, 2",
    ),
    "label elsewhere": ({"mask": grid_image(*CT_GRID[:2], FAR, lambda x, y, z: np.uint8(x > 900))}, "outside the CT"),
    "PET elsewhere": ({"pet": grid_image(*PET_GRID[:2], FAR, suv)}, "CT and PET lie at different places"),
    "tumour outside the PET": (
        {"pet": grid_image((16, 16, 4), (5.0, 5.0, 4.0), (-38.0, -37.0, 14.0), suv)},
        "the PET does not cover the tumour",
    ),
    "NaN": ({"pet": grid_image(*PET_GRID, lambda x, y, z: np.float32(np.where(x > 0, np.nan, y)))}, "no numbers (NaN"),
}


@pytest.mark.parametrize(("images", "what"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_refused(raw, source, capsys, images, what):
    write_patient(source, "2022", "CHUM-001")
    write_patient(source, "2022", "CHUM-002", **images)
    assert convert(source) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("refused")]
    assert line.startswith("refused CHUM_002: ")
    assert what in line


@pytest.mark.parametrize("ending", [".mha", ".nrrd", ".nii"])
def test_other_formats(raw, source, ending):
    write_patient(source, "2022", "CHUM-001")
    assert convert(source) == 0
    plain = {name: values(raw, name) for name in NAMES}
    shutil.rmtree(raw)
    for path in source.rglob("*.nii.gz"):
        sitk.WriteImage(
            sitk.ReadImage(str(path)), str(path).replace(".nii.gz", ending), useCompression=ending != ".nii"
        )
        path.unlink()
    assert convert(source) == 0
    for name, found in plain.items():
        np.testing.assert_array_equal(values(raw, name), found)


@pytest.mark.parametrize("layout", ["2021", "2022", "2026"])
def test_a_label_without_images_is_refused(raw, source, capsys, layout):
    write_patient(source, layout, "CHUM001")
    write_patient(source, layout, "CHUM002")
    for path in [*source.rglob("CHUM002_*t.nii.gz"), *source.rglob("CHUM002__*.nii.gz")]:
        if "gtvt" not in path.name:
            path.unlink()
    assert convert(source) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("refused")]
    assert line.startswith("refused CHUM_002: ")
    assert "lacks its CT and its PET" in line


def test_a_source_that_is_the_test_set(raw, source, capsys):
    """Its own name says so, where no folder in it says that it is for training."""
    write_patient(source, "2026", "CHUM-001")
    write_patient(source, "test", "CHUM-002", label=False)
    assert convert(source / "hecktor2026_testing") == 2
    assert "no training case" in capsys.readouterr().err
    everything = source.parent / "hecktor_test"
    source.rename(everything)
    assert convert(everything) == 0
    assert (raw / DATASET / "imagesTr" / "CHUM_001_0000.nii.gz").exists()
    assert (raw / DATASET / "imagesTs" / "CHUM_002_0000.nii.gz").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("flags", [("--grid", "pet"), ("--crop", "overlap", "--spacing", "3", "3", "3")])
def test_peak_memory(raw, source, flags):
    """At most four times CT and PET as float32 and the label on the output grid, above what Python itself takes."""
    size, place = (512, 512, 100), (-256.0, -256.0, 0.0)
    write_patient(
        source, "2022", "CHUM-001", ct=grid_image(size, (1.0, 1.0, 3.0), place, lambda x, y, z: np.int16(x - y - 300)),
        pet=grid_image((170, 170, 100), (3.0, 3.0, 3.0), place, lambda x, y, z: np.float32(np.hypot(x, y) < 100)),
        mask=grid_image(size, (1.0, 1.0, 3.0), place, lambda x, y, z: np.uint8(np.abs(x) + np.abs(y) + z < 60)),
    )  # fmt: skip
    code = (
        "import sys\n"
        "import cc3d, isal.igzip, nibabel, numpy, SimpleITK, dataset_conversion.engine, dataset_conversion.slabs\n"
        "from dataset_conversion.hecktor import main\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "before = peak()\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print('PEAK', peak() - before)\n"
    )
    arguments = ["-i", str(source), "-d", "610", "-np", "1", *flags]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(), text=True, capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr
    written = read(raw, "imagesTr/CHUM_001_0001")
    case = int(np.prod(written.GetSize())) * (4 + 4 + 1)
    peak = int(run.stdout.split("PEAK")[1])
    assert 0.5 * case < peak <= 4 * case, f"{peak / case:.2f} times"


class Body:
    """A PET of a whole body: brain, bladder, background, air; arms up where wanted."""

    def __init__(self, height: float = 900.0, brain: bool = True, arms: bool = False) -> None:
        self.spacing, self.top = (4.0, 4.0, 4.0), -100.0
        size = (100, 80, int(height / 4))
        self.origin = (-198.0, -158.0, self.top - height)
        self.brain, self.arms = brain, arms
        self.image = grid_image(size, self.spacing, self.origin, self.uptake)

    def uptake(self, x, y, z):
        below = self.top - z
        head = (below > 60) & (np.hypot((x - 12) / 80, (y + 6) / 95) < 1) & (below < 300)
        trunk = (below >= 300) & (np.hypot(x / 170, y / 110) < 1)
        values = np.where(head | trunk, 0.8, 0.0)
        if self.arms:
            values = np.where((np.abs(np.abs(x) - 60) < 25) & (np.abs(y) < 30) & (below < 400), 0.7, values)
        brain = np.sqrt(((x - 12) / 65) ** 2 + ((y + 6) / 80) ** 2 + ((below - 130) / 60) ** 2) < 1
        bladder = np.sqrt(x**2 + y**2 + (below - 800) ** 2) < 45
        values = np.where(bladder, 30.0, values)
        return np.float32(np.where(brain & self.brain, 8.0, values))


def head_and_neck(pet: sitk.Image):
    from dataset_conversion import regions
    from dataset_conversion.resampling import onto_grid

    return regions.head_and_neck(onto_grid(pet, regions.working_grid(pet), 0.0)[0])


@pytest.mark.parametrize("arms", [False, True], ids=["arms down", "arms up"])
def test_head_and_neck_by_the_brain(arms):
    box, how = head_and_neck(Body(arms=arms).image)
    assert how == "the brain"
    # The brain reaches from 70 to 190 mm below the top, around x = 12, y = -6.
    np.testing.assert_allclose(box[1] - box[0], (200, 200, 310))
    np.testing.assert_allclose((box[0] + box[1])[:2] / 2, (12, -6), atol=3)
    assert box[1][2] == pytest.approx(-100 - 70 + 10, abs=8)


@pytest.mark.parametrize("height", [500, 900], ids=["without", "with a bladder"])
def test_head_and_neck_without_a_brain(height):
    box, how = head_and_neck(Body(height=height, brain=False).image)
    assert "no brain was found" in how
    assert box[1][2] == pytest.approx(-100 - 60 + 10, abs=8)


def test_head_and_neck_of_nothing():
    from dataset_conversion.errors import ConversionError

    with pytest.raises(ConversionError, match="shows no body"):
        head_and_neck(grid_image((50, 50, 50), (4.0, 4.0, 4.0), (0, 0, 0), lambda x, y, z: 0 * x))


def test_crop_to_head_and_neck(raw, source):
    body = Body()
    ct = grid_image((100, 100, 300), (4.0, 4.0, 3.0), (-198.0, -198.0, -1000.0), hu)
    mask = grid_image(
        (100, 100, 300),
        (4.0, 4.0, 3.0),
        (-198.0, -198.0, -1000.0),
        lambda x, y, z: np.uint8((np.abs(x - 12) < 20) & (np.abs(y) < 15) & (np.abs(z + 330) < 15)),
    )
    write_patient(source, "2026", "CHUP-001", ct=ct, pet=body.image, mask=mask)
    assert convert(source, "--crop", "head-neck") == 0
    written = read(raw, "imagesTr/CHUP_001_0000")
    extent = np.multiply(written.GetSize(), written.GetSpacing())
    np.testing.assert_allclose(extent, (200, 200, 310), atol=4)
    assert np.count_nonzero(values(raw, "labelsTr/CHUP_001")) == np.count_nonzero(sitk.GetArrayFromImage(mask))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written), expected(written, hu))


def test_a_mirrored_pet_is_refused(raw, source, capsys):
    pet = grid_image(*PET_GRID, suv)
    pet.SetDirection((-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
    write_patient(source, "2022", "CHUM-001", pet=pet)
    assert convert(source) == 2
    assert "CT and PET lie at different places: they share" in capsys.readouterr().err


def test_patients_added_to_a_test_set_are_told(raw, source, capsys):
    write_patient(source, "2026", "CHUM-001")
    write_patient(source, "2026", "CHUM-003")
    write_patient(source, "test", "CHUM-002", label=False)
    assert convert(source, "--test", "CHUM-003") == 0
    assert "warning: --test adds 1 cases to the test set that came with the data" in capsys.readouterr().err


def test_boxes_without_the_crop_they_are_for(raw, source, capsys):
    with pytest.raises(SystemExit) as stop:
        convert(source, "--bbox", "boxes.csv")
    assert stop.value.code == 2
    assert "--bbox goes with --crop bbox" in capsys.readouterr().err


def test_a_labelled_test_set_stays_one(raw, source):
    write_patient(source, "2026", "CHUM-001")
    write_patient(source, "test", "USZ-001")
    assert convert(source) == 0
    assert [path.name for path in (raw / DATASET / "labelsTs").iterdir()] == ["USZ_001.nii.gz"]


def test_a_name_that_holds_the_letters_of_test(raw, source, capsys):
    write_patient(source / "latest_download", "2026", "CHUM-001", label=False)
    assert convert(source) == 2
    assert "lacks its label" in capsys.readouterr().err


def test_boxes_that_differ(raw, source, capsys):
    write_patient(source, "2021", "CHGJ007")
    for number in (1, 2):
        (source / f"bbox{number}.csv").write_text(f"PatientID,x1,x2,y1,y2,z1,z2\nCHGJ007,-20,{number},-9,9,-9,9\n")
    assert convert(source, "--crop", "bbox") == 2
    assert "has another box of CHGJ007 than another row or CSV file" in capsys.readouterr().err


def test_one_centre_has_no_folds_by_centre(raw, source, capsys):
    for patient in ("CHUM-001", "CHUM-002"):
        write_patient(source, "2026", patient)
    assert convert(source, "--splits", "centre") == 2
    assert "all cases are of one centre" in capsys.readouterr().err


@pytest.mark.parametrize("orientation", ["LAS", "RAS", "PIR"])
@pytest.mark.parametrize("flags", [(), ("--crop", "overlap"), ("--spacing", "2", "2", "3"), ("--grid", "pet")])
def test_other_orientations(raw, source, orientation, flags):
    """Whatever way the axes run, every voxel has the value of its place."""
    images = {name: grid_image(*grid, function) for name, grid, function in (
        ("ct", CT_GRID, hu), ("pet", PET_GRID, suv), ("mask", CT_GRID, tumours(False)))}  # fmt: skip
    write_patient(source, "2022", "CHUM-001", **{n: sitk.DICOMOrient(i, orientation) for n, i in images.items()})
    assert convert(source, *flags) == 0
    for name, function, tolerance in (("imagesTr/CHUM_001_0000", hu, 1e-3), ("imagesTr/CHUM_001_0001", suv, 1e-4)):
        written = read(raw, name)
        straight = sitk.DICOMOrient(written, "LPS")
        core = (slice(3, -3),) * 3
        np.testing.assert_allclose(
            sitk.GetArrayFromImage(straight)[core], expected(straight, function)[core], atol=tolerance
        )
    label = sitk.DICOMOrient(read(raw, "labelsTr/CHUM_001"), "LPS")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label), expected(label, tumours(False)))
