"""``h2a_convert_sts``: which series and contours are taken, and what is refused, on synthetic patients."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from dataset_conversion.sts import main
from tests.conversion.sts_run import ONE_HOUR, convert, dice, edit, load, report
from tests.conversion.synthetic_dicom import Patient, Study, write_rtstruct, write_series


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("mass", "other"),
    [
        ("GTV_Mass", "GTV_Edema"),
        ("GTV_Research", "GTV_Res+edema"),
        ("gtv mass", "GTV_Mass_Oedema"),
        ("GTV_Mass", "GTV"),
    ],
)
def test_tumour_is_chosen_by_name(raw: Path, source: Path, mass: str, other: str, reverse: bool) -> None:
    patient = Patient(source, "STS_036")
    ct = patient.write_ct()
    patient.write_pet()
    rois = {other: patient.ball(1.5, 2.0), mass: patient.ball()}
    write_rtstruct(source / "rt.dcm", patient.study, ct, rois, description="RTstructCT", reverse_contours=reverse)
    assert convert(source) == 0
    label = sitk.GetArrayFromImage(load(raw, "STS_036")[2]) > 0
    assert dice(label, patient.expected((40, 36, 12), 2.0, 0.0)) >= 0.99


def test_roi_flag(raw: Path, source: Path) -> None:
    patient = Patient(source, "STS_001").write()
    assert convert(source, "--roi", "GTV_Edema") == 0
    label = sitk.GetArrayFromImage(load(raw, "STS_001")[2]) > 0
    assert dice(label, patient.expected((40, 36, 12), 2.0, 0.0, 1.5)) >= 0.99


def test_of_two_pet_series_the_contoured_one_is_taken(raw: Path, source: Path) -> None:
    patient = Patient(source, "STS_100")
    patient.write_pet(folder=source / "a", values=patient.pet_values() * 3, description="LEGS2DAC")
    ct, pet = patient.write_ct(), patient.write_pet(folder=source / "b")
    rois = {"GTV_Mass": patient.ball()}
    write_rtstruct(source / "ct.dcm", patient.study, ct, rois, description="RTstructCT")
    write_rtstruct(source / "pet.dcm", patient.study, pet, rois, description="RTstruct_PET")
    for dataset, grid in (("501", "ct"), ("502", "pet")):
        assert main(["-i", str(source), "-d", dataset, "-np", "1", "--grid", grid]) == 0
        highest = sitk.GetArrayFromImage(load(raw, "STS_100", f"Dataset{dataset}_STS")[1]).max()
        assert highest == pytest.approx(patient.pet_values().max() * ONE_HOUR, rel=0.05)
        report = json.loads((raw / f"Dataset{dataset}_STS" / "conversion_report.json").read_text())
        assert any("of 2 PET series" in text for text in report["cases"]["STS_100"]["warnings"])


def test_pet_without_attenuation_correction_is_left_out(raw: Path, source: Path) -> None:
    patient = Patient(source, "STS_100").write()
    patient.write_pet(folder=source / "nac", values=patient.pet_values() * 3, CorrectedImage=["DECY", "SCAT"])
    assert convert(source) == 0
    pet = sitk.GetArrayFromImage(load(raw, "STS_100")[1])
    assert pet.max() == pytest.approx(patient.pet_values().max() * ONE_HOUR, rel=0.05)


def write_scout(patient: Patient, modality: str = "CT") -> None:
    """A single image whose ImageType does not say LOCALIZER."""
    write_series(
        patient.folder / "scout", patient.study, modality, np.zeros((1, 8, 8)), (2.0, 2.0, 4.0), description="Scout"
    )


@pytest.mark.parametrize("modality", ["CT", "PT"])
@pytest.mark.parametrize("grid", ["ct", "pet"])
def test_a_scout_does_not_refuse_the_patient(raw: Path, source: Path, grid: str, modality: str) -> None:
    """Neither where contours that name unknown slices are placed, nor where the other series is looked for."""
    foreign, companion = Patient(source / "a", "STS_001"), Patient(source / "b", "STS_002")
    for patient in (foreign, companion):
        series = {"CT": patient.write_ct(), "PET": patient.write_pet()}
        write_scout(patient, modality)
        drawn_on = {"CT": "PET", "PT": "CT"}[modality]
        names = series if patient is foreign else [drawn_on]
        for name in names:
            path = patient.folder / f"{name}.dcm"
            reference = "foreign" if patient is foreign else "real"
            write_rtstruct(path, patient.study, series[name], {"GTV_Mass": patient.ball()}, reference=reference,
                           description=f"RTstruct{name}")  # fmt: skip
    assert convert(source, "--grid", grid) == 0
    for case in ("STS_001", "STS_002"):
        assert any(
            "'Scout'" in text and "was not considered" in text for text in report(raw)["cases"][case]["warnings"]
        )
        size, spacing, origin = ((40, 36, 12), 2.0, 0.0) if grid == "ct" else ((20, 18, 12), 4.0, 1.0)
        label = sitk.GetArrayFromImage(load(raw, case)[2]) > 0
        assert dice(label, foreign.expected(size, spacing, origin)) >= 0.9


def test_only_a_scout_is_refused(raw: Path, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    patient = Patient(source, "STS_001")
    pet = patient.write_pet()
    write_scout(patient)
    write_rtstruct(source / "a.dcm", patient.study, pet, {"GTV_Mass": patient.ball()}, description="RTstructPET")
    assert convert(source) == 2
    assert "it has a single slice" in capfd.readouterr().err


def write_mr(patient: Patient, description: str) -> list[Path]:
    values = np.round(np.random.default_rng(1).random((12, 18, 20)) * 100)
    return write_series(
        patient.folder / description,
        patient.study,
        "MR",
        values,
        (4.0, 4.0, 4.0),
        (1.0, 1.0, 0.0),
        description=description,
    )


@pytest.mark.parametrize("keep_mr", [True, False])
@pytest.mark.parametrize(
    "description", ["RTstructT1", "RTstruct_T2FS", "RTstructAlignedT1toPET", "RTstructAlignedTtoPET"]
)
def test_mr_contours_only_are_refused(
    raw: Path, source: Path, capsys: pytest.CaptureFixture[str], description: str, keep_mr: bool
) -> None:
    Patient(source / "good", "STS_001").write()
    patient = Patient(source / "bad", "STS_002")
    patient.write_ct(), patient.write_pet()
    mr = write_mr(patient, "AlignedT1toPETBOX")
    write_rtstruct(source / "mr.dcm", patient.study, mr, {"GTV_Mass": patient.ball()}, description=description)
    if not keep_mr:
        for path in mr:
            path.unlink()
    assert convert(source) == 1
    line = next(text for text in capsys.readouterr().err.splitlines() if "STS_002" in text)
    assert "MR" in line
    assert (raw / "Dataset501_STS" / "labelsTr" / "STS_001.nii.gz").is_file()


def test_mr_contours_beside_those_on_pet_are_ignored(raw: Path, source: Path) -> None:
    patient = Patient(source, "STS_001").write()
    mr = write_mr(patient, "AlignedT1toPETBOX")
    contours = {"GTV_Mass": patient.ball(0.5)}
    write_rtstruct(source / "mr.dcm", patient.study, mr, contours, description="RTstructAlignedT1toPET")
    assert convert(source, "--grid", "pet") == 0
    label = sitk.GetArrayFromImage(load(raw, "STS_001")[2]) > 0
    assert dice(label, patient.expected((20, 18, 12), 4.0, 1.0)) >= 0.97


def _missing_weight(patient: Patient) -> None:
    for path in (patient.folder / "pet").iterdir():
        edit(path, PatientWeight=None)


def _missing_slice(patient: Patient) -> None:
    files = {float(pydicom.dcmread(p).ImagePositionPatient[2]): p for p in (patient.folder / "ct").iterdir()}
    files[16.0].unlink()


def _no_ct(patient: Patient) -> None:
    shutil.rmtree(patient.folder / "ct")


def _no_pet(patient: Patient) -> None:
    shutil.rmtree(patient.folder / "pet")


def _no_rtstruct(patient: Patient) -> None:
    shutil.rmtree(patient.folder / "rt")


def _dynamic(patient: Patient) -> None:
    shutil.rmtree(patient.folder / "pet")
    values = np.concatenate([patient.pet_values(), patient.pet_values()])
    patient.write_pet(values=values, heights=[4.0 * (index % 12) for index in range(24)])


def _gantry_tilt(patient: Patient) -> None:
    for path in (patient.folder / "ct").iterdir():
        x, y, z = pydicom.dcmread(path).ImagePositionPatient
        edit(path, ImagePositionPatient=[x, y + 0.2 * z, z])


def _mixed_orientation(patient: Patient) -> None:
    edit(next((patient.folder / "ct").iterdir()), ImageOrientationPatient=[1, 0, 0, 0, 0, -1])


def _irregular(patient: Patient) -> None:
    shutil.rmtree(patient.folder / "pet")
    patient.write_pet(heights=[4.0 * index + (1.0 if index % 2 else 0.0) for index in range(12)])


def _multi_frame(patient: Patient) -> None:
    edit(next((patient.folder / "pet").iterdir()), NumberOfFrames=12)


def _truncated(patient: Patient) -> None:
    path = next((patient.folder / "ct").iterdir())
    path.write_bytes(path.read_bytes()[:-500])


def _other_units(patient: Patient) -> None:
    for path in (patient.folder / "pet").iterdir():
        edit(path, Units="PROPCPS")


def _second_rtstruct(patient: Patient) -> None:
    shutil.copyfile(patient.folder / "rt" / "ct.dcm", patient.folder / "rt" / "copy.dcm")
    edit(patient.folder / "rt" / "copy.dcm", SOPInstanceUID="1.2.3.5")


def _no_mass_roi(patient: Patient) -> None:
    for path in (patient.folder / "rt").iterdir():
        dataset = pydicom.dcmread(path)
        dataset.StructureSetROISequence[0].ROIName = "Bladder"
        dataset.save_as(path)


def _empty_roi(patient: Patient) -> None:
    for path in (patient.folder / "rt").iterdir():
        dataset = pydicom.dcmread(path)
        del dataset.ROIContourSequence[0]
        dataset.save_as(path)


def _other_frame(patient: Patient) -> None:
    other = Study(patient.study.patient)
    other.study_uid = patient.study.study_uid
    shutil.rmtree(patient.folder / "rt")
    ct = sorted((patient.folder / "ct").iterdir())
    write_rtstruct(patient.folder / "rt" / "a.dcm", other, ct, {"GTV_Mass": patient.ball()}, reference="foreign")


def _second_ct(patient: Patient) -> None:
    shutil.rmtree(patient.folder / "rt")
    patient.write_ct(folder=patient.folder / "ct2")
    pet = sorted((patient.folder / "pet").iterdir(), key=lambda p: float(pydicom.dcmread(p).ImagePositionPatient[2]))
    write_rtstruct(patient.folder / "rt" / "a.dcm", patient.study, pet, {"GTV_Mass": patient.ball()})


DAMAGES = {
    "weight": (_missing_weight, "(0010,1030)"),
    "slice": (_missing_slice, "gap of 8.00 mm"),
    "ct": (_no_ct, "no CT series"),
    "pet": (_no_pet, "no PET series"),
    "rtstruct": (_no_rtstruct, "no RTSTRUCT"),
    "dynamic": (_dynamic, "several slices at one position"),
    "tilt": (_gantry_tilt, "gantry tilt"),
    "orientation": (_mixed_orientation, "mixes orientations"),
    "irregular": (_irregular, "irregularly spaced"),
    "multi-frame": (_multi_frame, "multi-frame"),
    "truncated": (_truncated, "pixels cannot be read"),
    "units": (_other_units, "(0054,1001)"),
    "rtstructs": (_second_rtstruct, "2 RTSTRUCTs"),
    "names": (_no_mass_roi, "no tumour ROI"),
    "empty": (_empty_roi, "has no contours"),
    "frame": (_other_frame, "frame of reference"),
    "two ct": (_second_ct, "2 CT series"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_patient_is_refused_and_the_rest_goes_on(
    raw: Path, source: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    damage, reason = DAMAGES[name]
    Patient(source / "good", "STS_001").write()
    damage(Patient(source / "bad", "STS_002").write())
    assert convert(source) == 1
    streams = capfd.readouterr()
    lines = [line for line in streams.err.splitlines() if line.startswith("refused")]
    assert len(lines) == 1
    # refused STS_002: <file or folder>: <what>; <what to do>
    assert re.fullmatch(rf"refused STS_002: {re.escape(str(source))}\S*: .+; .+", lines[0])
    assert reason in lines[0]
    last = streams.err.splitlines()[-1]
    assert last == f"1 of 2 patients refused; see {raw / 'Dataset501_STS' / 'conversion_report.json'}"
    assert "Traceback" not in streams.err + streams.out
    assert sorted(path.name for path in (raw / "Dataset501_STS").rglob("*.nii.gz")) == [
        "STS_001.nii.gz",
        "STS_001_0000.nii.gz",
        "STS_001_0001.nii.gz",
    ]
    assert [item["subject"] for item in report(raw)["refused"]] == ["STS_002"]
    assert sorted(path.name for path in raw.iterdir()) == ["Dataset501_STS"]


def test_nothing_convertible_writes_nothing(raw: Path, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _missing_weight(Patient(source, "STS_002").write())
    assert convert(source) == 2
    assert not (raw / "Dataset501_STS").exists()
    assert capfd.readouterr().err.splitlines()[-1].startswith("1 of 1 patients refused; no training case")


def test_unreadable_files_are_no_patients(raw: Path, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Patient(source, "STS_001").write()
    (source / "odd.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\x02\0\0\0XX" + b"\xff" * 40)
    assert convert(source) == 1
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith(f"refused odd.dcm: {source / 'odd.dcm'}: ") for line in lines)
    assert lines[-1].startswith("0 of 1 patients refused, 1 unreadable files; see ")


def test_dry_run_writes_nothing(raw: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Patient(source / "good", "STS_001").write()
    _missing_weight(Patient(source / "bad", "STS_002").write())
    assert convert(source, "--dry-run") == 1
    streams = capsys.readouterr()
    assert "STS_001" in streams.out
    assert "(0010,1030)" in streams.err
    assert streams.err.splitlines()[-1] == "1 of 2 patients refused; a dry run writes no report"
    assert not raw.exists()


def test_pet_of_another_examination_is_refused(raw: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patient = Patient(source, "STS_001")
    ct = patient.write_ct()
    write_rtstruct(source / "rt.dcm", patient.study, ct, {"GTV_Mass": patient.ball()}, description="RTstructCT")
    other = Patient(source, "STS_001")
    other.write_pet()
    assert convert(source) == 2
    assert "frame of reference" in capsys.readouterr().err


def test_pet_far_from_the_tumour_is_refused(raw: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patient = Patient(source, "STS_001")
    ct = patient.write_ct()
    patient.write_pet(origin=(1.0, 1.0, 500.0))
    write_rtstruct(source / "rt.dcm", patient.study, ct, {"GTV_Mass": patient.ball()}, description="RTstructCT")
    assert convert(source) == 2
    assert "does not cover the tumour" in capsys.readouterr().err


def test_odd_contours_of_other_rois_do_not_matter(raw: Path, source: Path) -> None:
    Patient(source, "STS_001").write()
    for path in (source / "rt").iterdir():
        dataset = pydicom.dcmread(path)
        dataset.ROIContourSequence[1].ContourSequence[0].ContourGeometricType = "OPEN_NONPLANAR"
        dataset.save_as(path)
    assert convert(source) == 0
