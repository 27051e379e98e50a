"""``h2a_convert_sts``: values and geometry, on the real patients and on synthetic ones."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from dataset_conversion.sts import main
from tests.conversion.data import needs, shared_data
from tests.conversion.sts_run import ONE_HOUR, convert, dice, edit, load, report
from tests.conversion.synthetic_dicom import DOSE_BQ, Patient, pet_header, write_rtstruct, write_series

MODALITY = {"ct": "CT", "pet": "PET"}


def onto(image: sitk.Image, grid: sitk.Image, how: int) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.Resample(image, grid, sitk.Transform(), how, 0.0))


@pytest.mark.parametrize("grid", ["ct", "pet"])
@needs("sts")
def test_real_patients_against_independent_nifti(raw: Path, grid: str) -> None:
    assert convert(shared_data() / "sts", "--grid", grid) == 0
    for patient in ("STS_001", "STS_002"):
        ct, pet, label = load(raw, patient)
        folder = shared_data() / "sts" / patient
        mask = sitk.ReadImage(str(folder / MODALITY[grid] / "nifti" / "mask" / "mask.nii.gz"))
        truth = onto(mask, label, sitk.sitkNearestNeighbor) > 0
        assert truth.sum() == (sitk.GetArrayFromImage(mask) > 0).sum()
        assert dice(sitk.GetArrayFromImage(label) > 0, truth) >= 0.99
        for image, name in ((ct, "CT"), (pet, "PET")):
            reference = sitk.ReadImage(str(folder / name / "nifti" / "image" / "image.nii.gz"), sitk.sitkFloat64)
            expected = onto(reference, image, sitk.sitkLinear)
            inside = onto(reference * 0 + 1, image, sitk.sitkNearestNeighbor) > 0
            if name == "PET":
                inside &= expected > 0.05
            assert inside.mean() > 0.3
            tolerance = {"rtol": 1e-3, "atol": 0.0} if name == "PET" else {"rtol": 0.0, "atol": 0.05}
            np.testing.assert_allclose(sitk.GetArrayFromImage(image)[inside], expected[inside], **tolerance)
        assert ct.GetDirection() == pet.GetDirection() == label.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
        assert (ct.GetPixelID(), pet.GetPixelID(), label.GetPixelID()) == (
            sitk.sitkFloat32,
            sitk.sitkFloat32,
            sitk.sitkUInt8,
        )
    splits = json.loads((raw / "Dataset501_STS" / "splits_final.json").read_text())
    assert splits == [{"train": ["STS_002"], "val": ["STS_001"]}, {"train": ["STS_001"], "val": ["STS_002"]}]


@needs("sts")
def test_real_patients_in_one_flat_folder_with_foreign_files(raw: Path, source: Path) -> None:
    files = sorted((shared_data() / "sts").rglob("*.dcm"))
    for index, path in enumerate(files):
        shutil.copyfile(path, source / f"{(index * 7919) % 100003:06d}")
    (source / "notes.txt").write_text("not an image")
    (source / "table.csv").write_bytes(b"")
    (source / "scan.nii.gz").write_bytes(b"\x1f\x8b garbage")
    assert len({path.name for path in source.iterdir()}) == len(files) + 3
    assert convert(source) == 0
    flat = {case: [sitk.GetArrayFromImage(image) for image in load(raw, case)] for case in ("STS_001", "STS_002")}
    assert main(["-i", str(shared_data() / "sts"), "-d", "502", "-np", "1"]) == 0
    for case, arrays in flat.items():
        for array, image in zip(arrays, load(raw, case, "Dataset502_STS"), strict=True):
            np.testing.assert_array_equal(array, sitk.GetArrayFromImage(image))


@needs("sts")
def test_nnunet_accepts_the_dataset(raw: Path) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    assert convert(shared_data() / "sts", "--grid", "pet") == 0
    verify_dataset_integrity(str(raw / "Dataset501_STS"), 1)
    content = json.loads((raw / "Dataset501_STS" / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "CT", "1": "PET"}
    assert content["h2a_modalities"] == ["CT", "PET"]
    assert content["labels"] == {"background": 0, "tumor": 1}
    assert (content["numTraining"], content["file_ending"]) == (2, ".nii.gz")


@pytest.mark.parametrize("reference", ["real", "foreign", "none"])
def test_geometry_and_suv_of_a_synthetic_patient(raw: Path, source: Path, reference: str) -> None:
    patient = Patient(source, "STS_100")
    ct, pet = patient.write_ct(), patient.write_pet(slopes=[0.5 + 0.1 * index for index in range(12)])
    for name, drawn_on in (("CT", ct), ("PET", pet)):
        rois = {f"GTV_Mass_{name}": patient.ball()}
        write_rtstruct(source / f"{name}.dcm", patient.study, drawn_on, rois, reference=reference)
    assert convert(source) == 0
    ct_image, pet_image, label = load(raw, "STS_100")
    assert label.GetSize() == (40, 36, 12)
    assert label.GetSpacing() == pytest.approx((2, 2, 4))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ct_image), patient.ct_values())
    assert dice(sitk.GetArrayFromImage(label) > 0, patient.expected((40, 36, 12), 2.0, 0.0)) >= 0.99
    z, y, x = np.mgrid[0:12, 0:36, 0:40]
    linear = 1000 + 40 * (2 * x - 1) / 4 + 30 * (2 * y - 1) / 4 + 20 * z
    inside = (slice(None), slice(1, 35), slice(1, 39))
    np.testing.assert_allclose(sitk.GetArrayFromImage(pet_image)[inside], linear[inside] * ONE_HOUR, rtol=1e-3)


def test_pet_grid_resamples_ct_and_keeps_pet(raw: Path, source: Path) -> None:
    patient = Patient(source, "STS_100").write()
    assert convert(source, "--grid", "pet") == 0
    ct_image, pet_image, label = load(raw, "STS_100")
    assert pet_image.GetSize() == (20, 18, 12)
    np.testing.assert_allclose(sitk.GetArrayFromImage(pet_image), patient.pet_values() * ONE_HOUR, rtol=1e-6)
    assert dice(sitk.GetArrayFromImage(label) > 0, patient.expected((20, 18, 12), 4.0, 1.0)) >= 0.97
    z, y, x = np.mgrid[0:12, 0:18, 0:20]
    np.testing.assert_allclose(
        sitk.GetArrayFromImage(ct_image), (4 * x + 1) / 2 * 3 + (4 * y + 1) / 2 * 2 + z - 100, atol=1e-3
    )


def test_outside_the_pet_is_zero_and_outside_the_ct_minus_1024(raw: Path, source: Path) -> None:
    patient = Patient(source, "STS_100")
    ct = patient.write_ct(values=patient.ct_values()[:, :30])
    pet = patient.write_pet(values=patient.pet_values()[:, :, 5:], origin=(21.0, 1.0, 0.0))
    write_rtstruct(source / "a.dcm", patient.study, ct, {"GTV_Mass": patient.ball(0.6)}, description="RTstructCT")
    write_rtstruct(source / "b.dcm", patient.study, pet, {"GTV_Mass": patient.ball(0.6)}, description="RTstructPET")
    assert convert(source) == 0
    assert (sitk.GetArrayFromImage(load(raw, "STS_100")[1])[:, :, :9] == 0).all()
    assert main(["-i", str(source), "-d", "502", "-np", "1", "--grid", "pet"]) == 0
    assert (sitk.GetArrayFromImage(load(raw, "STS_100", "Dataset502_STS")[0])[:, 15:] == -1024).all()


def test_only_pet_contours_on_the_ct_grid(raw: Path, source: Path) -> None:
    patient = Patient(source, "STS_100")
    patient.write_ct()
    pet = patient.write_pet()
    write_rtstruct(source / "rt.dcm", patient.study, pet, {"GTV_Mass": patient.ball()}, description="RTstructPET")
    assert convert(source) == 0
    label = sitk.GetArrayFromImage(load(raw, "STS_100")[2]) > 0
    assert label.shape == (12, 36, 40)
    assert dice(label, patient.expected((40, 36, 12), 2.0, 0.0)) >= 0.9
    assert any("drawn on the PET" in text for text in report(raw)["cases"]["STS_100"]["warnings"])


def test_irregular_spacing_within_tolerance_is_measured(raw: Path, source: Path) -> None:
    patient = Patient(source, "STS_001")
    heights = [4.0 * index + (0.04 if index % 2 else 0.0) for index in range(12)]
    ct = patient.write_ct(heights=heights)
    patient.write_pet()
    write_rtstruct(source / "a.dcm", patient.study, ct, {"GTV_Mass": patient.ball()}, description="RTstructCT")
    assert convert(source) == 0
    assert load(raw, "STS_001")[0].GetSpacing()[2] == pytest.approx(heights[-1] / 11, abs=1e-4)
    assert any("slice gaps" in text for text in report(raw)["cases"]["STS_001"]["warnings"])


@pytest.mark.parametrize("orientation", [(-1, 0, 0, 0, -1, 0), (1, 0, 0, 0, -1, 0), (0, 1, 0, -1, 0, 0)])
def test_all_cases_get_one_orientation(raw: Path, source: Path, orientation: tuple[int, ...]) -> None:
    """A flipped series is turned to the identity direction, so that nnU-Net, which ignores it, sees the same body."""
    Patient(source / "plain", "STS_001").write()
    patient = Patient(source / "turned", "STS_002")
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    axes = np.stack([row, column, np.cross(row, column)])
    to_index = np.linalg.inv(axes.T)
    corners = np.array([[0, 0, 0], [78, 70, 44]], float) @ to_index.T
    low, high = corners.min(axis=0), corners.max(axis=0)
    size = np.round((high - low) / (np.abs(to_index) @ [2, 2, 4])).astype(int) + 1
    spacing = np.abs(to_index) @ [2.0, 2.0, 4.0]
    index = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), axis=-1)
    world = (low + index * spacing) @ axes
    values = (world[..., 0] * 1.5 + world[..., 1] + world[..., 2] / 4 - 100).round().transpose(2, 1, 0)
    ct = write_series(
        source / "ct", patient.study, "CT", values, tuple(spacing), tuple(low @ axes), orientation=orientation
    )
    patient.write_pet()
    heights = {round(float(pydicom.dcmread(p).ImagePositionPatient[2])): i for i, p in enumerate(ct)}
    ball = {heights[4 * slice_index]: contours for slice_index, contours in patient.ball().items()}
    write_rtstruct(source / "rt.dcm", patient.study, ct, {"GTV_Mass": ball}, description="RTstructCT")
    assert convert(source) == 0
    for image, expected in zip(load(raw, "STS_002"), load(raw, "STS_001"), strict=True):
        assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
        assert image.GetSize() == expected.GetSize()
        assert image.GetOrigin() == pytest.approx(expected.GetOrigin(), abs=1e-4)
        np.testing.assert_allclose(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(expected), atol=1e-4)


def test_patient_id_missing(raw: Path, source: Path) -> None:
    Patient(source / "one", "STS_001").write()
    Patient(source / "two", "STS_002").write()
    for folder in ("one", "two"):
        for path in (source / folder).rglob("*.dcm"):
            edit(path, PatientID="", PatientName="")
    assert convert(source) == 0
    assert sorted(report(raw)["cases"]) == ["one", "two"]


def test_dicom_without_preamble(raw: Path, source: Path) -> None:
    Patient(source, "STS_001").write()
    for path in source.rglob("*.dcm"):
        dataset = pydicom.dcmread(path)
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)
        assert path.read_bytes()[128:132] != b"DICM"
    assert convert(source) == 0


def test_headers_helper_is_what_the_suv_tests_use() -> None:
    """The factor expected above is the one of the synthetic header."""
    from dataset_conversion.suv import suvbw_scale_factors

    assert suvbw_scale_factors([pet_header()]) == pytest.approx([ONE_HOUR], rel=1e-9)


def test_oblique_series_keep_their_grid(raw: Path, source: Path) -> None:
    patient = Patient(source, "STS_001")
    angle = np.deg2rad(12.0)
    row, column = [np.cos(angle), np.sin(angle), 0.0], [-np.sin(angle), np.cos(angle), 0.0]
    turn = np.stack([row, column, [0.0, 0.0, 1.0]], axis=1)
    orientation = [round(float(value), 8) for value in (*row, *column)]
    ct = patient.write_ct(orientation=orientation)
    patient.write_pet(orientation=orientation, origin=tuple(turn @ np.array([1.0, 1.0, 0.0])))
    ball = {
        index: [(np.array(contour).reshape(-1, 3) @ turn.T).ravel().tolist() for contour in contours]
        for index, contours in patient.ball().items()
    }
    write_rtstruct(source / "rt.dcm", patient.study, ct, {"GTV_Mass": ball}, description="RTstructCT")
    assert convert(source) == 0
    ct_image, pet_image, label = load(raw, "STS_001")
    np.testing.assert_allclose(np.array(label.GetDirection()).reshape(3, 3), turn, atol=1e-6)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ct_image), patient.ct_values())
    assert dice(sitk.GetArrayFromImage(label) > 0, patient.expected((40, 36, 12), 2.0, 0.0)) >= 0.99
    z, y, x = np.mgrid[0:12, 1:35, 1:39]
    linear = (1000 + 40 * (2 * x - 1) / 4 + 30 * (2 * y - 1) / 4 + 20 * z) * ONE_HOUR
    np.testing.assert_allclose(sitk.GetArrayFromImage(pet_image)[:, 1:35, 1:39], linear, rtol=1e-3)
    assert any("oblique" in text for text in report(raw)["cases"]["STS_001"]["warnings"])


@pytest.mark.parametrize("modality", ["ct", "pet", "rt"])
def test_cut_at_any_length(source: Path, modality: str) -> None:
    """A file cut anywhere in its header is told of in one line: pydicom raises five kinds of errors for it."""
    from dataset_conversion.dicom_series import group_series, read_stack, scan
    from dataset_conversion.errors import ConversionError
    from dataset_conversion.rtstruct import read_structure_set

    Patient(source, "STS_001").write()
    path = next((source / modality).iterdir())
    content = path.read_bytes()
    kind = {"ct": "CT", "pet": "PT"}.get(modality)
    for length in range(1, min(len(content), 1500)):
        path.write_bytes(content[:length])
        found, broken = scan(path)
        assert len(found) + len(broken) <= 1
        assert all("\n" not in str(error) for error in broken)
        # Whatever comes of it, it is no other error.
        with contextlib.suppress(ConversionError):
            if kind and found:
                read_stack(group_series(found, (kind,))[0])
            elif not kind:
                read_structure_set(str(path))


def test_a_damaged_meta_header_is_no_traceback(raw: Path, source: Path, capsys) -> None:
    Patient(source, "STS_001").write()
    path = next((source / "ct").iterdir())
    content = bytearray(path.read_bytes())
    at = content.index(b"\x02\x00\x02\x00UI")
    content[at + 4 : at + 6] = b"ZZ"
    path.write_bytes(content)
    assert convert(source) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["RLE", "JPEG", "JPEG2000"])
def test_compressed_slices(raw: Path, source: Path, encoding: str) -> None:
    """Lossless encodings of CT and PET; pydicom reads JPEG with plug-ins that are not installed, GDCM does."""
    patient = Patient(source, "STS_001").write()
    assert convert(source) == 0
    plain = load(raw, "STS_001")
    for path in (*(source / "ct").iterdir(), *(source / "pet").iterdir()):
        dataset = pydicom.dcmread(path)
        if encoding == "RLE":
            dataset.compress(pydicom.uid.RLELossless)
        else:
            stored = sitk.GetImageFromArray(dataset.pixel_array[None])
            writer = sitk.ImageFileWriter()
            writer.SetFileName(str(source / "encoded.dcm"))
            writer.SetUseCompression(True)
            writer.SetCompressor(encoding)
            writer.Execute(stored)
            encoded = pydicom.dcmread(source / "encoded.dcm")
            assert encoded.file_meta.TransferSyntaxUID.is_encapsulated
            dataset.file_meta.TransferSyntaxUID = encoded.file_meta.TransferSyntaxUID
            dataset.PixelData = encoded.PixelData
            dataset["PixelData"].is_undefined_length = True
        dataset.save_as(path)
    (source / "encoded.dcm").unlink(missing_ok=True)
    shutil.rmtree(raw)
    assert convert(source) == 0
    for image, expected in zip(load(raw, "STS_001"), plain, strict=True):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(expected))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(load(raw, "STS_001")[0]), patient.ct_values())


def test_identical_copies_of_slices_are_left_out(raw: Path, source: Path) -> None:
    patient = Patient(source, "STS_001").write()
    shutil.copytree(source / "pet", source / "backup")
    assert convert(source) == 0
    assert load(raw, "STS_001")[1].GetSize() == (40, 36, 12)
    assert patient.slices == 12


def test_every_slice_gets_its_own_factor(raw: Path, source: Path) -> None:
    """Without decay correction the factor grows with the slice's acquisition time; files are in shuffled order."""
    patient = Patient(source, "STS_001")
    pet = patient.write_pet(DecayCorrection="NONE", CorrectedImage=["ATTN", "SCAT"])
    for index, path in enumerate(pet):
        edit(path, AcquisitionTime=f"11{3 * index:02d}00")
    patient.write_ct()
    write_rtstruct(source / "rt.dcm", patient.study, pet, {"GTV_Mass": patient.ball()}, description="RTstructPET")
    assert convert(source, "--grid", "pet") == 0
    rate = np.log(2) / 6586.2
    middle = np.log(rate * 120 / (1 - np.exp(-rate * 120))) / rate
    factors = 70_000.0 / DOSE_BQ * 2 ** ((3600 + 180 * np.arange(12) + middle) / 6586.2)
    expected = patient.pet_values() * factors[:, None, None]
    np.testing.assert_allclose(sitk.GetArrayFromImage(load(raw, "STS_001")[1]), expected, rtol=1e-6)
