"""DICOM SEG onto the PET grid: every way of writing the same lesions gives the same mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from dataset_conversion.dicom_seg import decode, has_segmented_pixels, read_seg_header
from dataset_conversion.dicom_series import SliceStack, group_series, read_stack, scan
from dataset_conversion.errors import ConversionError
from tests.conversion.synthetic_dicom import Patient
from tests.conversion.synthetic_seg import ORIENTATIONS, write_seg

SHAPE = (12, 18, 20)


def lesions() -> np.ndarray:
    """Two lesions of no symmetry, the upper one in a single slice, empty slices between and around."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:4, 3:6, 4:11] = 1
    mask[3, 5, 10:13] = 1
    mask[8, 12:14, 2:4] = 1
    return mask


class Pet:
    """A patient's PET on disk and as a stack."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.patient = Patient(folder, "PETCT_0011f3deaf")
        self.files = self.patient.write_pet(**options)

    @property
    def stack(self) -> SliceStack:
        return read_stack(group_series(scan(self.files[0].parent)[0], ("PT",))[0])

    def seg(self, *segments: np.ndarray, **options: object) -> str:
        path = self.patient.folder / "seg" / "1-1.dcm"
        return str(write_seg(path, self.patient.study, self.files, segments, **options))


@pytest.fixture
def pet(tmp_path: Path) -> Pet:
    return Pet(tmp_path)


@pytest.mark.parametrize("keep_empty", [False, True], ids=["empty frames omitted", "all frames"])
@pytest.mark.parametrize(
    "order",
    [range, lambda n: range(n - 1, -1, -1), lambda n: np.random.default_rng(0).permutation(n)],
    ids=["upwards", "downwards", "shuffled"],
)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_way_of_writing(pet, orientation, order, keep_empty):
    decoded = decode(pet.seg(lesions(), orientation=orientation, order=order, keep_empty=keep_empty), pet.stack)
    np.testing.assert_array_equal(decoded.mask, lesions())
    assert decoded.notes == []


@pytest.mark.parametrize(
    "orientation", [(1, 0, 0, 0, 1, 0), (1, 0, 0, 0, -1, 0), (-1, 0, 0, 0, -1, 0), (0, 1, 0, 0, 0, -1)]
)
def test_orientations_of_the_pet(tmp_path, orientation):
    pet = Pet(tmp_path, orientation=orientation)
    decoded = decode(pet.seg(lesions(), orientation="rows flipped", shared_orientation=False), pet.stack)
    np.testing.assert_array_equal(decoded.mask, lesions())


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_written_by_another_library(pet, kind):
    """highdicom's writer, which leaves empty frames out and fills in every module of the standard."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    sources = [pydicom.dcmread(path) for path in pet.files]
    for source in sources:
        source.StudyID = source.AccessionNumber = source.PatientBirthDate = source.PatientSex = ""
        source.StudyDate = source.StudyTime = source.ReferringPhysicianName = source.PositionReferenceIndicator = ""
        source.SeriesNumber = source.InstanceNumber = 1
    description = hd.seg.SegmentDescription(
        1, "Tissue", codes.SCT.Tissue, codes.SCT.Tissue, hd.seg.SegmentAlgorithmTypeValues.MANUAL
    )
    seg = hd.seg.Segmentation(
        sources, lesions(), getattr(hd.seg.SegmentationTypeValues, kind), [description], hd.UID(), 300, hd.UID(), 1,
        "m", "m", "1", "1",
    )  # fmt: skip
    path = pet.patient.folder / "highdicom.dcm"
    seg.save_as(path)
    assert int(seg.NumberOfFrames) == 3
    decoded = decode(str(path), pet.stack)
    np.testing.assert_array_equal(decoded.mask, lesions())


def test_all_frames_empty(pet):
    path = pet.seg(np.zeros(SHAPE, np.uint8), keep_empty=True)
    assert not has_segmented_pixels(path)
    assert not decode(path, pet.stack).mask.any()


@pytest.mark.parametrize("how", ["NumberOfFrames 0", "nothing"])
def test_no_frames(pet, how):
    """A SEG of which all empty frames were left out."""

    def without_frames(dataset):
        del dataset.PixelData, dataset.PerFrameFunctionalGroupsSequence
        dataset.NumberOfFrames = 0
        if how == "nothing":
            del dataset.NumberOfFrames

    path = pet.seg(lesions(), change=without_frames)
    assert not has_segmented_pixels(path)
    decoded = decode(path, pet.stack)
    assert decoded.mask.shape == SHAPE
    assert not decoded.mask.any()
    assert decoded.notes == ["the SEG has no frames: no lesion is segmented"]


def test_a_single_frame(pet):
    mask = np.zeros(SHAPE, np.uint8)
    mask[8, 12:14, 2:4] = 1
    path = pet.seg(mask)
    assert has_segmented_pixels(path)
    np.testing.assert_array_equal(decode(path, pet.stack).mask, mask)


def test_segments_are_joined(pet):
    other = np.zeros(SHAPE, np.uint8)
    other[3, 4:9, 9:14] = 1
    decoded = decode(pet.seg(lesions(), other), pet.stack)
    np.testing.assert_array_equal(decoded.mask, lesions() | other)
    assert "2 segments (Tissue 1, Tissue 2) were joined" in decoded.notes[0]


def test_fractional_counts_from_half_on(pet):
    share = lesions() * 0.4
    share[8] = lesions()[8] * 0.5
    expected = np.where(share >= 0.5, 1, 0)
    np.testing.assert_array_equal(decode(pet.seg(share, kind="FRACTIONAL"), pet.stack).mask, expected)


def test_slices_a_little_irregular(tmp_path):
    heights = np.arange(12) * 4.0 + np.array([0, 0.04, -0.03, 0.05, 0, 0, -0.05, 0.02, 0.04, 0, 0, 0.0])
    pet = Pet(tmp_path, heights=heights)
    np.testing.assert_array_equal(decode(pet.seg(lesions()), pet.stack).mask, lesions())


def test_drawn_on_another_grid_is_resampled(tmp_path):
    """On the CT (twice as fine in plane): every PET voxel takes what the SEG has at its centre."""
    pet = Pet(tmp_path)
    ct = pet.patient.write_ct()
    fine = np.zeros((12, 36, 40), np.uint8)
    fine[4:7, 11:20, 15:25] = 1
    path = write_seg(tmp_path / "seg.dcm", pet.patient.study, ct, [fine])
    decoded = decode(str(path), pet.stack)
    # PET centres lie half a CT voxel beside CT centres (1, 5, 9 … mm; 0, 2, 4 … mm): either neighbour may be nearest.
    low, high = fine[:, ::2, ::2], fine[:, 1::2, 1::2]
    assert ((decoded.mask >= (low & high)) & (decoded.mask <= (low | high))).all()
    assert decoded.mask.any()
    assert "resampled" in decoded.notes[-1]


def test_frames_far_apart_on_another_grid_are_not_smeared(tmp_path):
    """Drawn on the CT in two slices of twelve, empty frames left out: nothing between them."""
    pet = Pet(tmp_path)
    ct = pet.patient.write_ct()
    fine = np.zeros((12, 36, 40), np.uint8)
    fine[1, 10:14, 10:14] = fine[10, 20:24, 10:14] = 1
    decoded = decode(str(write_seg(tmp_path / "seg.dcm", pet.patient.study, ct, [fine])), pet.stack)
    assert np.flatnonzero(decoded.mask.any(axis=(1, 2))).tolist() == [1, 10]


def test_slices_twice_as_thick_fill_the_pet_slices_between(tmp_path):
    """Every second PET slice has a SEG slice of 8 mm on it; the one above lies as near to it as to the next."""
    pet = Pet(tmp_path)
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:9:2, 3:6, 4:11] = 1

    def thick(dataset):
        dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness = 8.0

    decoded = decode(pet.seg(mask, change=thick), pet.stack)
    np.testing.assert_array_equal(np.flatnonzero(decoded.mask.any(axis=(1, 2))), range(1, 10))
    assert "resampled" in decoded.notes[-1]


def test_lesions_that_fall_between_the_voxels(tmp_path):
    pet = Pet(tmp_path)
    ct = pet.patient.write_ct(folder=tmp_path / "fine", values=np.zeros((12, 36, 40)), PixelSpacing=[0.5, 0.5])
    mask = np.zeros((12, 36, 40), np.uint8)
    mask[3, 5, 5] = 1
    path = write_seg(tmp_path / "seg.dcm", pet.patient.study, ct, [mask])
    with pytest.raises(ConversionError, match="fall between"):
        decode(str(path), pet.stack)


def test_header(pet):
    header = read_seg_header(pet.seg(lesions()))
    assert header.series_uids == {pydicom.dcmread(pet.files[0]).SeriesInstanceUID}
    assert header.segments == ("Tissue 1",)


def _drop_position(dataset):
    del dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence


def _shift(dataset):
    position = dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
    position.ImagePositionPatient = [500.0, 0.0, 0.0]


def _fewer_groups(dataset):
    dataset.PerFrameFunctionalGroupsSequence = dataset.PerFrameFunctionalGroupsSequence[:-1]


def _cut_pixels(dataset):
    dataset.PixelData = dataset.PixelData[: len(dataset.PixelData) // 2 // 2 * 2]


def _no_pixels(dataset):
    del dataset.PixelData


def _other_modality(dataset):
    dataset.Modality = "PT"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_drop_position, "ImagePositionPatient of a frame is missing"),
        (_shift, "outside the PET"),
        (_fewer_groups, "3 frames and positions for 2"),
        (_cut_pixels, "its pixels cannot be read"),
        (_no_pixels, "has no pixels"),
        (_other_modality, "is no SEG"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged(pet, change, what):
    path = pet.seg(lesions(), change=change)
    with pytest.raises(ConversionError, match=what) as error:
        decode(path, pet.stack)
    assert error.value.file == path
