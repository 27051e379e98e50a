"""``h2a_convert_autopet`` on DICOM as TCIA has it: CT, PT and SEG per study."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from dataset_conversion.autopet import main
from tests.conversion.synthetic_dicom import DELETE, Patient, Study
from tests.conversion.synthetic_seg import write_seg

DATASET = "Dataset602_AutoPET"
SUV_FACTOR = 70.0 * 1000 / (370e6 * 2 ** (-3600 / 6586.2))


def convert(source: Path, *flags: str) -> int:
    return main(["-i", str(source), "-d", "602", "-np", "1", *flags])


def lesions() -> np.ndarray:
    mask = np.zeros((12, 18, 20), np.uint8)
    mask[2:4, 3:6, 4:11] = 1
    mask[8, 12, 2:4] = 1
    return mask


def write_study(
    root: Path, patient: str = "PETCT_0011f3deaf", date: str = "20030323", mask: np.ndarray | None = None,
    seg: bool = True, pet: dict | None = None, **options: object,
) -> Patient:  # fmt: skip
    """One study in a folder named as TCIA does it, series folders named after nothing that says what they are."""
    folder = root / patient / f"{date[4:6]}-{date[6:]}-{date[:4]}-NA-PET-CT Ganzkoerper  primaer mit KM-12345"
    study = Patient(folder, patient)
    study.write_ct(folder=folder / "1.000000-a-1", StudyDate=date)
    files = study.write_pet(folder=folder / "2.000000-b-2", StudyDate=date, **(pet or {}))
    if seg:
        write_seg(folder / "3.000000-c-3" / "1-1.dcm", study.study, files, [lesions() if mask is None else mask],
                  StudyDate=date, **options)  # fmt: skip
    return study


def read(raw: Path, name: str) -> sitk.Image:
    return sitk.ReadImage(str(raw / DATASET / f"{name}.nii.gz"))


@pytest.mark.parametrize("orientation", ["as the PET", "rows flipped"])
def test_study(raw, source, orientation):
    study = write_study(source, orientation=orientation)
    write_study(source, "PETCT_01140d52d8")
    assert convert(source) == 0
    case = "fdg_0011f3deaf_20030323"
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(raw, f"labelsTr/{case}")), lesions())
    pet = read(raw, f"imagesTr/{case}_0001")
    np.testing.assert_allclose(sitk.GetArrayFromImage(pet), study.pet_values() * SUV_FACTOR, rtol=1e-5)
    assert (pet.GetSpacing(), pet.GetOrigin()) == ((4.0, 4.0, 4.0), (1.0, 1.0, 0.0))
    # The CT grows linearly, so that linear interpolation at the PET's centres is exact.
    z, y, x = np.mgrid[0:12, 0:18, 0:20]
    expected = (1 + 4 * x) / 2 * 3 + (1 + 4 * y) / 2 * 2 + z - 100
    np.testing.assert_allclose(sitk.GetArrayFromImage(read(raw, f"imagesTr/{case}_0000")), expected, atol=1e-3)
    record = json.loads((raw / DATASET / "conversion_report.json").read_text())["cases"][case]
    assert record["patient"] == "PETCT_0011f3deaf"
    assert record["suv"]["rule"]
    assert record["sources"]["SEG"]["segments"] == ["Tissue 1"]
    assert record["geometry_before"]["CT"]["size"] == [40, 36, 12]
    assert record["resampled"] == {"CT": True, "PET": False, "label": False}


def test_ct_grid(raw, source):
    study = write_study(source)
    assert convert(source, "--grid", "ct") == 0
    case = "fdg_0011f3deaf_20030323"
    ct = read(raw, f"imagesTr/{case}_0000")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ct), study.ct_values())
    label = sitk.GetArrayFromImage(read(raw, f"labelsTr/{case}"))
    np.testing.assert_array_equal(label, lesions().repeat(2, axis=1).repeat(2, axis=2))


def test_patients_and_tracers(raw, source):
    """Studies of one patient share a fold; PSMA by PatientID; two studies of a day by their numbers."""
    write_study(source, date="20030323")
    write_study(source, date="20040801")
    write_study(source, "PSMA_95b833d65be26293")
    write_study(source, "PETCT_ffeeddccbb")
    assert convert(source) == 0
    splits = json.loads((raw / DATASET / "splits_final.json").read_text())
    assert [fold["val"] for fold in splits] == [
        ["fdg_0011f3deaf_20030323", "fdg_0011f3deaf_20040801"], ["fdg_ffeeddccbb_20030323"],
        ["psma_95b833d65be26293_20030323"],
    ]  # fmt: skip


@pytest.mark.parametrize(("tracer", "cases"), [("fdg", 2), ("psma", 1), ("all", 3)])
def test_tracer(raw, source, tracer, cases):
    write_study(source)
    write_study(source, "PSMA_95b833d65be26293")
    write_study(source, "anonymous", pet={})  # by its header: Radiopharmaceutical is FDG
    assert convert(source, "--tracer", tracer) == 0
    assert len(list((raw / DATASET / "labelsTr").iterdir())) == cases


def test_negatives_by_the_label(raw, source):
    write_study(source)
    write_study(source, "PETCT_01140d52d8", mask=np.zeros((12, 18, 20)), keep_empty=True)
    assert convert(source) == 0
    assert not sitk.GetArrayFromImage(read(raw, "labelsTr/fdg_01140d52d8_20030323")).any()
    assert convert(source, "--drop-negatives") == 0
    assert [path.name for path in (raw / DATASET / "labelsTr").iterdir()] == ["fdg_0011f3deaf_20030323.nii.gz"]


def test_missing_seg(raw, source, capsys):
    write_study(source)
    write_study(source, "PETCT_01140d52d8", seg=False)
    assert convert(source) == 1
    assert "refused fdg_01140d52d8_20030323:" in (error := capsys.readouterr().err)
    assert "has no SEG; restore it, or take such studies as negative: --missing-seg negative" in error
    assert convert(source, "--missing-seg", "negative") == 0
    assert not sitk.GetArrayFromImage(read(raw, "labelsTr/fdg_01140d52d8_20030323")).any()


def test_the_pet_that_the_seg_names(raw, source):
    """A second PET series without attenuation correction, and one of another body part."""
    study = write_study(source)
    study.write_pet(folder=study.folder / "nac", CorrectedImage=["DECY"], values=study.pet_values() * 3)
    study.write_pet(folder=study.folder / "legs", values=study.pet_values() * 5)
    assert convert(source) == 0
    pet = sitk.GetArrayFromImage(read(raw, "imagesTr/fdg_0011f3deaf_20030323_0001"))
    np.testing.assert_allclose(pet, study.pet_values() * SUV_FACTOR, rtol=1e-5)


def _one_slice_less(study: Patient) -> None:
    sorted((study.folder / "2.000000-b-2").iterdir())[3].unlink()


def _cut(study: Patient) -> None:
    path = sorted((study.folder / "1.000000-a-1").iterdir())[3]
    path.write_bytes(path.read_bytes()[:-800])


def _another_patient(study: Patient) -> None:
    other = Patient(study.folder, "PETCT_someoneelse")
    other.study.study_uid = study.study.study_uid
    for path in (study.folder / "1.000000-a-1").iterdir():
        path.unlink()
    other.write_ct(folder=study.folder / "1.000000-a-1")


def _two_segs(study: Patient) -> None:
    files = sorted((study.folder / "2.000000-b-2").iterdir(),
                   key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))  # fmt: skip
    write_seg(study.folder / "more" / "1-1.dcm", study.study, files, [lesions()])


def _no_ct(study: Patient) -> None:
    for path in (study.folder / "1.000000-a-1").iterdir():
        path.unlink()


def _no_weight(study: Patient) -> None:
    for path in (study.folder / "2.000000-b-2").iterdir():
        header = pydicom.dcmread(path)
        del header.PatientWeight
        header.save_as(path)


def _pet_files(study: Patient) -> list[Path]:
    """In slice order."""
    files = (study.folder / "2.000000-b-2").iterdir()
    return sorted(files, key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))


def _cut_last_slice(study: Patient) -> None:
    path = _pet_files(study)[-1]
    path.write_bytes(path.read_bytes()[:300])


def _empty_last_slice(study: Patient) -> None:
    _pet_files(study)[-1].write_bytes(b"")


def _last_slice_links_to_nothing(study: Patient) -> None:
    path = _pet_files(study)[-1]
    path.unlink()
    path.symlink_to("nowhere.dcm")


def _last_slice_of_a_stated_number_gone(study: Patient) -> None:
    files = _pet_files(study)
    for path in files:
        header = pydicom.dcmread(path)
        header.NumberOfSlices = len(files)
        header.save_as(path)
    files[-1].unlink()


def _two_series_of_one_uid(study: Patient) -> None:
    """A second CT, half a slice beside the first, numbered alike."""
    uid = ""
    for number, path in enumerate(sorted((study.folder / "1.000000-a-1").iterdir())):
        header = pydicom.dcmread(path)
        uid, header.InstanceNumber = header.SeriesInstanceUID, number
        header.save_as(path)
    study.write_ct(folder=study.folder / "more", origin=(0.0, 0.0, 2.0), SeriesInstanceUID=uid)
    for number, path in enumerate(sorted((study.folder / "more").iterdir())):
        header = pydicom.dcmread(path)
        header.InstanceNumber = number
        header.save_as(path)


def _mirrored_ct(study: Patient) -> None:
    for path in (study.folder / "1.000000-a-1").iterdir():
        header = pydicom.dcmread(path)
        header.ImageOrientationPatient = [1, 0, 0, 0, -1, 0]
        header.save_as(path)


def _slope_zero(study: Patient) -> None:
    path = next((study.folder / "1.000000-a-1").iterdir())
    header = pydicom.dcmread(path)
    header.RescaleSlope = 0
    header.save_as(path)


def _seg_of_something_else(study: Patient) -> None:
    (study.folder / "3.000000-c-3" / "1-1.dcm").unlink()
    other = Study(study.study.patient)
    other.study_uid = study.study.study_uid

    def change(dataset: pydicom.Dataset) -> None:
        dataset.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3"

    write_seg(study.folder / "3.000000-c-3" / "1-1.dcm", other, _pet_files(study), [lesions()], change=change)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (_one_slice_less, "lacks slices"),
        (_cut, "its pixels cannot be read"),
        (_another_patient, "its files are of several patients: 'PETCT_0011f3deaf', 'PETCT_someoneelse'"),
        (_two_segs, "has 2 SEGs of its PET"),
        (_no_ct, "has no CT series"),
        (_no_weight, "(0010,1030) PatientWeight is missing"),
        (_cut_last_slice, "is "),
        (_empty_last_slice, "is cut off or empty"),
        (_last_slice_links_to_nothing, "is a link to a file that is not there"),
        (_last_slice_of_a_stated_number_gone, "(0054,0081) NumberOfSlices is 12, 11 are there"),
        (_two_series_of_one_uid, "holds several series under one UID: it has the InstanceNumber"),
        (_mirrored_ct, "CT and PET lie at different places"),
        (_slope_zero, "RescaleSlope is 0"),
        (_seg_of_something_else, "names neither its PET's series nor its frame of reference"),
    ],
)
def test_refused(raw, source, capfd, damage, what):
    write_study(source, "PETCT_01140d52d8")
    damage(write_study(source))
    assert convert(source) == 1
    error = capfd.readouterr().err
    (line,) = [text for text in error.splitlines() if text.startswith("refused")]
    assert line.startswith("refused fdg_0011f3deaf_20030323: ")
    assert what in line
    assert "Traceback" not in error


def test_two_forms_in_one_folder(raw, source, capsys):
    write_study(source)
    folder = source / "imagesTr"
    folder.mkdir()
    for channel in (0, 1):
        sitk.WriteImage(sitk.Image(4, 4, 4, sitk.sitkFloat32), str(folder / f"psma_a_2020-01-01_{channel:04d}.nii.gz"))
    assert convert(source) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "holds several forms of the data (nnU-Net folders of autoPET III to V: 1 studies, DICOM: 1 studies)" in error


def test_dry_run(raw, source, capsys):
    write_study(source)
    assert convert(source, "--dry-run") == 0
    assert not raw.exists()
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(
        "  fdg_0011f3deaf_20030323 (training): CT 'CT IMAGES - RESEARCH' (40, 36, 12), PET 'PET AC' "
    )


def test_study_without_date_or_id(raw, source):
    """PatientID emptied by de-identification: the folder stands in, the study's number for the date."""
    folder = source / "somebody"
    patient = Patient(folder, "x")
    patient.study = Study("")
    patient.write_ct(PatientName=DELETE)
    files = patient.write_pet(PatientName=DELETE)
    write_seg(folder / "s.dcm", patient.study, files, [lesions()], StudyDate=DELETE, PatientName=DELETE)
    assert convert(source) == 0
    (label,) = (raw / DATASET / "labelsTr").iterdir()
    assert label.name == f"fdg_somebody_{patient.study.study_uid[-5:]}.nii.gz"


def test_drop_negatives_does_not_drop_what_lacks_its_seg(raw, source, capsys):
    write_study(source)
    write_study(source, "PETCT_01140d52d8", seg=False)
    assert convert(source, "--drop-negatives") == 1
    assert "has no SEG" in capsys.readouterr().err
    assert convert(source, "--drop-negatives", "--missing-seg", "negative") == 0
    report = json.loads((raw / DATASET / "conversion_report.json").read_text())
    assert list(report["passed_over"]) == ["fdg_01140d52d8_20030323"]


@pytest.mark.parametrize("keep", [0, 300])
def test_a_damaged_seg_is_not_taken_for_none(raw, source, capsys, keep):
    path = write_study(source).folder / "3.000000-c-3" / "1-1.dcm"
    path.write_bytes(path.read_bytes()[:keep])
    assert convert(source, "--missing-seg", "negative") == 2
    assert f"refused fdg_0011f3deaf_20030323: {path}: is " in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_a_study_of_scouts(raw, source, capsys, flags):
    study = write_study(source)
    for path in (study.folder / "1.000000-a-1").iterdir():
        header = pydicom.dcmread(path)
        header.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        header.save_as(path)
    assert convert(source, *flags) == 2
    assert "has no CT series but scouts" in capsys.readouterr().err


def test_patient_by_its_folder_where_the_header_has_none(raw, source):
    for date in ("20030323", "20040801"):
        study = write_study(source, "PETCT_0011f3deaf", date=date)
        for path in study.folder.rglob("*.dcm"):
            header = pydicom.dcmread(path)
            header.PatientID = header.PatientName = ""
            header.save_as(path)
    write_study(source, "PETCT_01140d52d8")
    assert convert(source) == 0
    splits = json.loads((raw / DATASET / "splits_final.json").read_text())
    assert splits[0]["val"] == ["fdg_0011f3deaf_20030323", "fdg_0011f3deaf_20040801"]


def test_a_copy_of_a_seg_is_no_second_one(raw, source):
    study = write_study(source)
    path = study.folder / "3.000000-c-3" / "1-1.dcm"
    path.with_name("copy.dcm").write_bytes(path.read_bytes())
    assert convert(source) == 0


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (1, 0, 0, 0, -1, 0), (0, 1, 0, 0, 0, -1)])
@pytest.mark.parametrize("held", [1, 5, 100])
def test_reading_onto_a_grid_is_resampling(tmp_path, monkeypatch, orientation, held):
    """Some slices at a time or all at once: the same values, also beyond the ends and with other axes."""
    from dataset_conversion import dicom_pixels as pixels
    from dataset_conversion import slabs
    from dataset_conversion.dicom_series import group_series, read_stack, scan

    monkeypatch.setattr(slabs, "_HELD", held)
    study = Patient(tmp_path, "x")
    values = np.random.default_rng(0).integers(-1000, 1000, (12, 36, 40))
    study.write_ct(values=values, orientation=orientation)
    stack = read_stack(group_series(scan(tmp_path)[0], ("CT",))[0])
    whole = pixels.read_volume(stack)
    centre = np.array(whole.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in whole.GetSize()]))
    reference = sitk.Image(30, 28, 40, sitk.sitkUInt8)
    reference.SetSpacing((3.3, 3.1, 2.7))
    reference.SetOrigin((centre - (30 * 3.3 / 2, 28 * 3.1 / 2, 40 * 2.7 / 2)).tolist())
    expected = sitk.GetArrayFromImage(sitk.Resample(whole, reference, sitk.Transform(), sitk.sitkLinear, -1024.0))
    read = pixels.read_onto(stack, reference, -1024.0)
    assert (expected == -1024).any()
    assert (expected != -1024).any()
    np.testing.assert_allclose(sitk.GetArrayFromImage(read), expected, atol=1e-3)
