"""Contours of a DICOM RTSTRUCT, and their rasterisation on the slices of an image series.

A voxel belongs to a contour when its centre lies inside the polygon (the vertices are not rounded to pixels, which
would enlarge a small tumour by 15 to 20 %).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dataset_conversion.dicom_series import READ_ERRORS, SliceStack, quiet_dicom
from dataset_conversion.errors import ConversionError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_WITHOUT_AREA = ("POINT", "OPEN_PLANAR")
# Contours of one plane differ by what their coordinates were rounded to (STS_001: 4e-5 mm), and by no more.
PLANE_MM = 0.01
PLANE_RELATIVE = 0.01
_Filled = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Contour:
    """One closed contour.

    Attributes:
        points: float64, shape (n, 3), mm, LPS.
        sop_uid: SOPInstanceUID of the slice it was drawn on, "" where it is not told.
        exclusive: True for CLOSEDPLANAR_XOR.
    """

    points: np.ndarray
    sop_uid: str
    exclusive: bool


@dataclass
class Roi:
    """One region of interest; ``skipped`` counts contours without an area, ``faults`` says what makes it unusable."""

    number: int
    name: str
    frame_of_reference: str
    contours: list[Contour] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def sop_uids(self) -> set[str]:
        """All slices its contours say they were drawn on."""
        return {contour.sop_uid for contour in self.contours if contour.sop_uid}


@dataclass
class StructureSet:
    """An RTSTRUCT file.

    Attributes:
        path: the file.
        label: StructureSetLabel.
        description: SeriesDescription.
        series_uids: SeriesInstanceUIDs it says it was drawn on.
        sop_uids: SOPInstanceUIDs of the slices it says it was drawn on.
        rois: by ROI number.
    """

    path: str
    label: str
    description: str
    series_uids: set[str]
    sop_uids: set[str]
    rois: dict[int, Roi]

    def __str__(self) -> str:
        names = ", ".join(roi.name for roi in self.rois.values())
        return f"RTSTRUCT {self.description!r} (ROIs {names})"


def read_structure_set(path: str) -> StructureSet:
    """Read an RTSTRUCT; ROIs and contours are joined by ROI number, whatever their order.

    Raises:
        ConversionError: the file cannot be read as an RTSTRUCT.
    """
    import pydicom

    with quiet_dicom():
        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            return _parse(dataset, path)
        except READ_ERRORS as error:
            if isinstance(error, ConversionError):
                raise error.located(path) from error
            raise ConversionError(f"cannot be read as an RTSTRUCT ({error})", "restore the file", path) from error


def _parse(dataset: Dataset, path: str) -> StructureSet:
    series_uids, sop_uids, frames = set(), set(), set()
    for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ():
        frames.add(str(frame.get("FrameOfReferenceUID") or ""))
        for study in frame.get("RTReferencedStudySequence") or ():
            for series in study.get("RTReferencedSeriesSequence") or ():
                series_uids.add(str(series.get("SeriesInstanceUID") or ""))
                for image in series.get("ContourImageSequence") or ():
                    sop_uids.add(str(image.get("ReferencedSOPInstanceUID") or ""))
    frames.discard("")
    only_frame = frames.pop() if len(frames) == 1 else str(dataset.get("FrameOfReferenceUID") or "")
    rois: dict[int, Roi] = {}
    for item in dataset.get("StructureSetROISequence") or ():
        number = int(item.ROINumber)
        name = str(item.get("ROIName") or "").strip()
        rois[number] = Roi(number, name, str(item.get("ReferencedFrameOfReferenceUID") or only_frame))
    for item in dataset.get("ROIContourSequence") or ():
        roi = rois.get(int(item.ReferencedROINumber))
        if roi is None:
            continue
        for contour in item.get("ContourSequence") or ():
            _add_contour(roi, contour)
    label, description = (str(dataset.get(key) or "").strip() for key in ("StructureSetLabel", "SeriesDescription"))
    return StructureSet(path, label, description, series_uids - {""}, sop_uids - {""}, rois)


def _add_contour(roi: Roi, item: Dataset) -> None:
    kind = str(item.get("ContourGeometricType") or "").strip().upper()
    if kind in _WITHOUT_AREA:
        roi.skipped[kind] += 1
        return
    # A fault counts only where this ROI is wanted: couch or skin contours may be anything.
    if kind not in _CLOSED:
        roi.faults.append(f"has a contour of type {kind or 'missing'!r}")
        return
    try:
        values = np.array([float(value) for value in item.get("ContourData") or ()], dtype=np.float64)
    except (TypeError, ValueError):
        values = np.array([np.nan])
    if len(values) % 3 or not np.isfinite(values).all():
        roi.faults.append("has a contour whose data are not three numbers per point")
        return
    points = values.reshape(-1, 3)
    if len(points) < 3:
        roi.skipped["fewer than 3 points"] += 1
        return
    images = item.get("ContourImageSequence") or ()
    sop_uid = str(images[0].get("ReferencedSOPInstanceUID") or "") if images else ""
    roi.contours.append(Contour(points, sop_uid, kind == "CLOSEDPLANAR_XOR"))


def plane_deviation(roi: Roi, stack: SliceStack) -> float:
    """Return the largest distance in slices between a contour plane and its nearest slice (inf: frames differ)."""
    if not roi.contours or not roi.frame_of_reference or roi.frame_of_reference != stack.series.frame_of_reference:
        return float("inf")
    heights = np.array([stack.to_index(contour.points)[:, 2].mean() for contour in roi.contours])
    nearest = np.abs(heights[:, None] - stack.distances[None, :]).min(axis=1)
    return float(nearest.max() / stack.spacing[2])


def rasterise(roi: Roi, stack: SliceStack, mask: np.ndarray | None = None) -> tuple[np.ndarray, list[str]]:
    """Fill a ROI on the slices of a stack.

    Args:
        roi: its closed contours, in mm.
        stack: the grid, usually of the series the ROI was drawn on.
        mask: what the ROI is added to, uint8, shape (z, y, x); slices without a contour are not touched, so that of an
            array of zeros they take no memory. An empty one where None.

    Returns:
        The mask on the stack's grid, and notes on how the contours were placed.

    Raises:
        ConversionError: no contours, a contour that belongs to no slice, or one that does not lie in a slice.
    """
    notes = []
    if roi.faults:
        raise ConversionError(f"ROI {roi.name!r} {roi.faults[0]}", "closed planar contours are needed: export it again")
    if not roi.contours:
        raise ConversionError(f"ROI {roi.name!r} has no closed contour", "draw it, or leave the patient out")
    for kind, count in sorted(roi.skipped.items()):
        notes.append(f"{count} contours of ROI {roi.name!r} were skipped ({kind}): they have no area")
    by_uid = {uid: index for index, uid in enumerate(stack.sop_uids) if uid}
    on_slice: dict[int, list[tuple[float, np.ndarray, bool]]] = {}
    by_position = 0
    columns, rows, slices = stack.size
    outside = False
    for contour in roi.contours:
        local = stack.to_index(contour.points)
        height = float(local[:, 2].mean())
        if np.ptp(local[:, 2]) > 0.5 * stack.spacing[2]:
            raise ConversionError(
                f"ROI {roi.name!r} has a contour that is tilted against the slices by {np.ptp(local[:, 2]):.2f} mm",
                "give the RTSTRUCT drawn on this series",
            )
        index = by_uid.get(contour.sop_uid)
        if index is None:
            index = _slice_by_position(roi, contour, height, stack)
            by_position += 1
        elif abs(height - stack.distances[index]) > 0.5 * stack.spacing[2] + 1e-3:
            raise ConversionError(
                f"ROI {roi.name!r} has a contour {abs(height - stack.distances[index]):.2f} mm off the slice it names",
                "export the RTSTRUCT again",
            )
        low, high = local[:, :2].min(axis=0), local[:, :2].max(axis=0)
        outside |= bool((low < -0.5).any() or high[0] > columns - 0.5 or high[1] > rows - 0.5)
        on_slice.setdefault(index, []).append((height, local[:, :2], contour.exclusive))
    if by_position:
        notes.append(
            f"{by_position} of {len(roi.contours)} contours of ROI {roi.name!r} were placed by frame of reference and "
            "position: the slices they name are not in the series"
        )
    if outside:
        notes.append(f"a part of ROI {roi.name!r} lies outside the image and was cut off")
    mask = np.zeros((slices, rows, columns), dtype=np.uint8) if mask is None else mask
    counts: Counter[str] = Counter()
    for index, contours in sorted(on_slice.items()):
        # Contours of one plane form holes among each other; those of another plane on the same slice never do.
        for polygons in _planes(contours, max(PLANE_MM, PLANE_RELATIVE * stack.spacing[2])):
            mask[index] |= _fill_plane(polygons, (rows, columns), counts)
    if counts["holes"]:
        notes.append(f"{counts['holes']} contours of ROI {roi.name!r} lie inside another one and were cut out as holes")
    if counts["copies"]:
        notes.append(f"{counts['copies']} contours of ROI {roi.name!r} are copies of another one and were left out")
    used = sorted(on_slice)
    missing = used[-1] - used[0] + 1 - len(used)
    if missing:
        notes.append(f"{missing} slices between the first and last contour of ROI {roi.name!r} have no contour")
    return mask, notes


def _slice_by_position(roi: Roi, contour: Contour, height: float, stack: SliceStack) -> int:
    frame = stack.series.frame_of_reference
    if not frame or roi.frame_of_reference != frame:
        raise ConversionError(
            f"ROI {roi.name!r} names slices that are not in {stack.series}, and its frame of reference "
            f"{roi.frame_of_reference or '(missing)'} is not that of the series ({frame or 'missing'})",
            "give the series the RTSTRUCT was drawn on",
        )
    index = int(np.argmin(np.abs(stack.distances - height)))
    distance = abs(float(stack.distances[index]) - height)
    if distance > 0.5 * stack.spacing[2] + 1e-3:
        raise ConversionError(
            f"ROI {roi.name!r} has a contour {distance:.2f} mm from the nearest slice of {stack.series} "
            f"(spacing {stack.spacing[2]:.2f} mm)",
            "give the series the RTSTRUCT was drawn on, with all its slices",
        )
    return index


def _fill_polygon(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the pixels (row, column) whose centre lies in a polygon (n, 2) of continuous (column, row)."""
    from skimage.draw import polygon as draw_polygon

    mask = np.zeros(shape, dtype=bool)
    rows, columns = draw_polygon(polygon[:, 1], polygon[:, 0], shape)
    mask[rows, columns] = True
    return mask


def _planes(contours: list[tuple[float, np.ndarray, bool]], tolerance: float) -> list[list[tuple[np.ndarray, bool]]]:
    """Divide the contours (height, polygon, exclusive) of one slice into planes, wherever heights leave a gap."""
    planes: list[list[tuple[np.ndarray, bool]]] = []
    last = -np.inf
    for height, polygon, exclusive in sorted(contours, key=lambda item: item[0]):
        if height - last > tolerance:
            planes.append([])
        planes[-1].append((polygon, exclusive))
        last = height
    return planes


def _fill_plane(polygons: list[tuple[np.ndarray, bool]], shape: tuple[int, int], counts: Counter[str]) -> np.ndarray:
    """Combine the contours of one plane; holes and copies are added to ``counts``.

    CLOSED_PLANAR: overlapping or separate ones are joined, what lies inside of them is a hole, what lies inside of that
    is filled again. CLOSEDPLANAR_XOR: exclusive or, as the standard demands. Keyhole contours need no rule: their
    channel has no area.
    """
    exclusive = np.zeros(shape, dtype=bool)
    plain: list[_Filled] = []
    for polygon, is_exclusive in polygons:
        filled = _fill_polygon(polygon, shape)
        if is_exclusive:
            exclusive ^= filled
        elif any(np.array_equal(filled, other) for _, other in plain):
            # Drawn twice. As a hole in its own copy it would vanish, and as a second outer it would hide holes.
            counts["copies"] += bool(filled.any())
        else:
            plain.append((polygon, filled))
    plain.sort(key=lambda item: -_area(item[0]))
    return _fill_nested(plain, shape, 0, counts) | exclusive


def _fill_nested(contours: list[_Filled], shape: tuple[int, int], depth: int, counts: Counter[str]) -> np.ndarray:
    """Return the joined outermost contours without what lies inside of them; ``contours`` in falling order of area."""
    joined = np.zeros(shape, dtype=bool)
    outermost: list[np.ndarray] = []
    inside: list[_Filled] = []
    for polygon, filled in contours:
        if _lies_inside(polygon, filled, outermost, joined):
            inside.append((polygon, filled))
        else:
            outermost.append(polygon)
            joined |= filled
    if depth % 2:
        counts["holes"] += len(outermost)
    return joined & ~_fill_nested(inside, shape, depth + 1, counts) if inside else joined


def _area(polygon: np.ndarray) -> float:
    x, y = polygon[:, 0], polygon[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2.0


def _lies_inside(polygon: np.ndarray, filled: np.ndarray, outer: list[np.ndarray], joined: np.ndarray) -> bool:
    """True where a contour lies in the joined outer ones, by its pixels and by nine tenths of its points."""
    from skimage.measure import points_in_poly

    if not outer or (filled & ~joined).any():
        return False
    within = np.any([points_in_poly(polygon, other) for other in outer], axis=0)
    return float(np.mean(within)) >= 0.9
