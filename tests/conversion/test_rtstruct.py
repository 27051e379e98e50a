"""Rasterising contours: holes, overlaps, keyholes, odd contours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from dataset_conversion.dicom_series import SliceStack, group_series, read_stack, scan
from dataset_conversion.errors import ConversionError
from dataset_conversion.rtstruct import rasterise, read_structure_set
from dataset_conversion.sts_selection import modality_in_name
from tests.conversion.data import needs, shared_data
from tests.conversion.synthetic_dicom import Study, circle, write_rtstruct, write_series

SIZE = 60


def square(low: float, high: float, shift: float = 0.0, height: float = 3.0) -> list[float]:
    points = [(low, low), (high, low), (high, high), (low, high)]
    return [value for x, y in points for value in (x + shift, y, height)]


def fill(tmp_path: Path, contours: list[list[float]], kind: str = "CLOSED_PLANAR") -> np.ndarray:
    """Rasterise contours on slice 1 of three slices of 1 mm pixels."""
    return fill_with_notes(tmp_path, contours, kind)[0][1]


def make_stack(tmp_path: Path) -> tuple[Study, list[Path], SliceStack]:
    study = Study("P")
    files = write_series(tmp_path / "ct", study, "CT", np.zeros((3, SIZE, SIZE)), (1.0, 1.0, 3.0))
    return study, files, read_stack(group_series(scan(tmp_path / "ct")[0], ("CT",))[0])


def fill_with_notes(
    tmp_path: Path, contours: list[list[float]], kind: str = "CLOSED_PLANAR"
) -> tuple[np.ndarray, list[str]]:
    study, files, stack = make_stack(tmp_path)
    path = write_rtstruct(tmp_path / "rt.dcm", study, files, {"A": {1: contours}}, kind=kind)
    mask, notes = rasterise(read_structure_set(str(path)).rois[11], stack)
    assert not mask[[0, 2]].any()
    return mask, notes


def test_pixel_centres_decide(tmp_path: Path) -> None:
    """From 9.6 to 20.4 mm lie the centres 10 to 20; rounding vertices to pixels would give more."""
    mask = fill(tmp_path, [square(9.6, 20.4)])
    expected = np.zeros((SIZE, SIZE), bool)
    expected[10:21, 10:21] = True
    np.testing.assert_array_equal(mask > 0, expected)
    assert fill(tmp_path / "b", [square(9.4, 20.6)]).sum() == 121


def test_area_of_a_circle(tmp_path: Path) -> None:
    mask = fill(tmp_path, [circle((30.3, 29.7), 20.25, 3.0, 720)])
    assert mask.sum() == pytest.approx(np.pi * 20.25**2, rel=0.005)


def test_anisotropic_pixels_are_not_swapped(tmp_path: Path) -> None:
    study = Study("P")
    files = write_series(tmp_path / "ct", study, "CT", np.zeros((3, 30, 60)), (1.0, 2.0, 3.0), (-5.0, 7.0, 1.0))
    stack = read_stack(group_series(scan(tmp_path / "ct")[0], ("CT",))[0])
    contour = [-5 + 9.5, 7 + 2 * 3.5, 4.0, -5 + 40.5, 7 + 2 * 3.5, 4.0, -5 + 40.5, 7 + 2 * 8.5, 4.0,
               -5 + 9.5, 7 + 2 * 8.5, 4.0]  # fmt: skip
    path = write_rtstruct(tmp_path / "rt.dcm", study, files, {"A": {1: [contour]}})
    mask = rasterise(read_structure_set(str(path)).rois[11], stack)[0]
    expected = np.zeros((3, 30, 60), bool)
    expected[1, 4:9, 10:41] = True
    np.testing.assert_array_equal(mask > 0, expected)


def test_hole_and_island_in_it(tmp_path: Path) -> None:
    mask = fill(tmp_path, [square(19.5, 30.5), square(9.5, 40.5), square(23.5, 26.5)])
    assert mask.sum() == 31**2 - 11**2 + 3**2
    assert mask[25, 25]
    assert not mask[21, 21]


def test_overlap_is_joined_and_double_contours_do_not_vanish(tmp_path: Path) -> None:
    assert fill(tmp_path / "a", [square(9.5, 19.5), square(9.5, 19.5, shift=5)]).sum() == 150
    assert fill(tmp_path / "b", [square(9.5, 19.5), square(9.5, 19.5)]).sum() == 100
    assert fill(tmp_path / "c", [square(9.5, 19.5), square(9.5, 19.5, shift=20)]).sum() == 200


@pytest.mark.parametrize(
    ("contours", "area", "note"),
    [
        # Outer contour and hole drawn twice.
        ([square(9.5, 40.5), square(9.5, 40.5), square(19.5, 30.5)], 31**2 - 11**2, "1 contours of ROI 'A' are copies"),
        ([square(9.5, 40.5), square(19.5, 30.5), square(19.5, 30.5)], 31**2 - 11**2, "copies"),
        # A hole in the part common to two overlapping contours, and one that lies across both.
        ([square(9.5, 39.5), square(9.5, 39.5, shift=5), square(19.5, 30.5)], 30 * 35 - 11**2, "1 contours"),
        ([square(9.5, 29.5), square(9.5, 29.5, shift=10), square(14.5, 24.5, shift=5)], 20 * 30 - 10**2, "1 contours"),
        # Two overlapping holes, and an island in them.
        ([square(4.5, 54.5), square(9.5, 39.5), square(9.5, 39.5, shift=5)], 50**2 - 30 * 35, "2 contours"),
        (
            [square(4.5, 54.5), square(9.5, 39.5), square(9.5, 39.5, shift=5), square(19.5, 30.5)],
            50**2 - 30 * 35 + 11**2,
            "2 contours",
        ),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_holes_in_double_and_in_overlapping_contours(
    tmp_path: Path, contours: list[list[float]], area: int, note: str, turned: bool
) -> None:
    mask, notes = fill_with_notes(tmp_path, contours[::-1] if turned else contours)
    assert mask[1].sum() == area
    assert any(note in text for text in notes)


def test_exclusive_contours(tmp_path: Path) -> None:
    contours = [square(9.5, 19.5), square(9.5, 19.5, shift=5)]
    assert fill(tmp_path, contours, "CLOSEDPLANAR_XOR").sum() == 100


def test_keyhole(tmp_path: Path) -> None:
    outer = [(9.5, 9.5), (40.5, 9.5), (40.5, 40.5), (9.5, 40.5), (9.5, 25.3)]
    inner = [(19.5, 25.3), (19.5, 30.5), (30.5, 30.5), (30.5, 19.5), (19.5, 19.5), (19.5, 25.3)]
    contour = [value for x, y in [*outer, *inner, (9.5, 25.3)] for value in (x, y, 3.0)]
    assert fill(tmp_path, [contour]).sum() == 31**2 - 11**2


def test_contour_over_the_edge_is_cut_and_noted(tmp_path: Path) -> None:
    mask, notes = fill_with_notes(tmp_path, [square(-10.0, 4.5)])
    assert mask.sum() == 25
    assert any("outside" in note for note in notes)


@pytest.mark.parametrize(("kind", "good"), [("POINT", True), ("OPEN_PLANAR", True), ("OPEN_NONPLANAR", False)])
def test_contours_without_area(tmp_path: Path, kind: str, good: bool) -> None:
    study, files, stack = make_stack(tmp_path)
    path = write_rtstruct(tmp_path / "rt.dcm", study, files, {"A": {1: [square(9.5, 19.5)]}})
    dataset = pydicom.dcmread(path)
    extra = Dataset()
    extra.ContourGeometricType = kind
    extra.ContourData = square(30, 50)
    dataset.ROIContourSequence[0].ContourSequence.append(extra)
    dataset.save_as(path)
    if not good:
        with pytest.raises(ConversionError, match=kind):
            rasterise(read_structure_set(str(path)).rois[11], stack)
        return
    mask, notes = rasterise(read_structure_set(str(path)).rois[11], stack)
    assert mask.sum() == 100
    assert any(kind in note for note in notes)


def test_tilted_contour_is_refused(tmp_path: Path) -> None:
    study, files, stack = make_stack(tmp_path)
    contour = [10, 10, 1.0, 30, 10, 1.0, 30, 30, 5.0, 10, 30, 5.0]
    path = write_rtstruct(tmp_path / "rt.dcm", study, files, {"A": {1: [contour]}})
    with pytest.raises(ConversionError, match="tilted"):
        rasterise(read_structure_set(str(path)).rois[11], stack)


def test_contour_that_names_the_wrong_slice_is_refused(tmp_path: Path) -> None:
    study, files, stack = make_stack(tmp_path)
    path = write_rtstruct(tmp_path / "rt.dcm", study, files, {"A": {0: [square(9.5, 19.5)]}})
    with pytest.raises(ConversionError, match="off the slice"):
        rasterise(read_structure_set(str(path)).rois[11], stack)


@pytest.mark.parametrize(("height", "fits"), [(4.4, True), (7.4, True), (7.6, False)])
def test_position_within_half_a_slice(tmp_path: Path, height: float, fits: bool) -> None:
    study, files, stack = make_stack(tmp_path)
    contours = {"A": {1: [square(9.5, 19.5, height=height)]}}
    path = write_rtstruct(tmp_path / "rt.dcm", study, files, contours, reference="foreign")
    roi = read_structure_set(str(path)).rois[11]
    if fits:
        assert rasterise(roi, stack)[0][round(height / 3)].sum() == 100
    else:
        with pytest.raises(ConversionError, match="from the nearest slice"):
            rasterise(roi, stack)


@pytest.mark.parametrize("offset", [4e-5, -4e-5])
def test_contours_of_one_plane_may_differ_by_rounding(tmp_path: Path, offset: float) -> None:
    """3.12504 and 3.12496 mm are one plane: the inner contour is a hole."""
    study = Study("P")
    files = write_series(tmp_path / "ct", study, "CT", np.zeros((3, SIZE, SIZE)), (1.0, 1.0, 3.125))
    stack = read_stack(group_series(scan(tmp_path / "ct")[0], ("CT",))[0])
    contours = [square(9.5, 40.5, height=3.125 + offset), square(19.5, 30.5, height=3.125 - offset)]
    path = write_rtstruct(tmp_path / "rt.dcm", study, files, {"A": {1: contours}})
    mask, notes = rasterise(read_structure_set(str(path)).rois[11], stack)
    assert mask[1].sum() == 31**2 - 11**2
    assert any("holes" in note for note in notes)


def test_planes_closer_than_slices_do_not_cut_holes(tmp_path: Path) -> None:
    """A smaller contour of the next plane on the same slice is no hole."""
    study, files, stack = make_stack(tmp_path)
    contours = {"A": {1: [square(9.5, 29.5, height=2.5), square(14.5, 19.5, height=3.5)]}}
    path = write_rtstruct(tmp_path / "rt.dcm", study, files, contours, reference="foreign")
    assert rasterise(read_structure_set(str(path)).rois[11], stack)[0][1].sum() == 400


@pytest.mark.parametrize(
    ("text", "modality"),
    [
        ("RTstructPET", "PT"), ("RTStruct_PET", "PT"), ("RTstructCT", "CT"), ("RTstruct_CT", "CT"),
        ("RTstructT1", "MR"), ("RTstructT2FS", "MR"), ("RTstructSTIR", "MR"), ("RTstructAlignedT1toPETBOX", "MR"),
        ("RTstructAlignedTtoPET", "MR"), ("AllignedT1toPETBOX", "MR"), ("GTV_Mass_CT", "CT"), ("GTV_Mass_PET", "PT"),
        ("RTstruct", None), ("GTV_Mass", None), ("PET CT", None), ("IBSI_1_STS_001_PET_mask", "PT"), ("contour", None),
        ("CT1", "CT"), ("PET_2", "PT"),
    ],
)  # fmt: skip
def test_modality_in_name(text: str, modality: str | None) -> None:
    assert modality_in_name(text) == modality


@needs("sts_raw")
def test_original_contours_of_sts_001() -> None:
    """Voxels by pixel centre; the polygons' areas times the spacing say 5082 and 8081."""
    folder = shared_data() / "sts_raw" / "STS_001" / "FDG_PET"
    stack = read_stack(group_series(scan(folder / "image")[0], ("PT",))[0])
    (path,) = (folder / "mask").iterdir()
    counts = {roi.name: int(rasterise(roi, stack)[0].sum()) for roi in read_structure_set(str(path)).rois.values()}
    assert sorted(counts.values()) == [5095, 8058]
