"""Decoding a DICOM SEG onto the grid of the images it was drawn on, frame by frame and by position.

The order of frames, the number of frames and the orientation differ between writers: empty frames may be left out or
may be all there is, and autoPET has SEGs whose rows run the other way than their PET's. Only positions count here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_conversion.dicom_series import READ_ERRORS, SliceStack, quiet_dicom
from dataset_conversion.errors import ConversionError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# Part of a voxel by which a SEG's pixel centres may miss the image's.
LATTICE_TOLERANCE = 0.1
_SPACING_TOLERANCE = 1e-3
_TILT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class SegHeader:
    """What a SEG says of itself without its pixels.

    Attributes:
        path: the file.
        series_uids: series it was drawn on.
        frame_of_reference: of its positions.
        segments: labels of its segments.
    """

    path: str
    series_uids: frozenset[str]
    frame_of_reference: str
    segments: tuple[str, ...]


@dataclass
class DecodedSeg:
    """A SEG on an image's grid.

    Attributes:
        mask: uint8, shape (slices, rows, columns) of the image, 1 where any segment is.
        notes: what was tolerated.
    """

    mask: np.ndarray
    notes: list[str]


def read_seg_header(path: str) -> SegHeader:
    """Read what a SEG refers to.

    Raises:
        ConversionError: the file cannot be read or is no SEG.
    """
    dataset = _open(path, stop_before_pixels=True)
    try:
        with quiet_dicom():
            series = {str(item.get("SeriesInstanceUID", "")) for item in dataset.get("ReferencedSeriesSequence") or ()}
            segments = tuple(str(item.get("SegmentLabel", "")) for item in dataset.get("SegmentSequence") or ())
            frame = str(dataset.get("FrameOfReferenceUID") or "").strip()
    except READ_ERRORS as error:
        raise ConversionError(f"is no readable DICOM file ({error})", "restore the file", path) from error
    return SegHeader(path, frozenset(series - {""}), frame, segments)


def without_copies(paths: Sequence[str]) -> list[str]:
    """Return the files without byte-identical copies of one another."""
    kept: dict[str, str] = {}
    for path in paths:
        kept.setdefault(hashlib.sha256(Path(path).read_bytes()).hexdigest(), path)
    return list(kept.values())


def has_segmented_pixels(path: str) -> bool:
    """True where any pixel of any frame is set; positions are not looked at."""
    return bool(_frames(_open(path), path).any())


def decode(path: str, stack: SliceStack) -> DecodedSeg:
    """Decode a SEG onto the grid of a series.

    Args:
        path: the SEG: BINARY, FRACTIONAL (from half the maximum on) or LABELMAP; all its segments count.
        stack: the series, from ``read_stack``.

    Returns:
        The mask. Frames whose pixels lie on the grid's are placed exactly; others are resampled (nearest), with a note.

    Raises:
        ConversionError: the file is damaged, lacks positions, or has segmented pixels outside the series.
    """
    dataset = _open(path)
    frames = _frames(dataset, path)
    notes = []
    if not len(frames):
        notes.append("the SEG has no frames: no lesion is segmented")
    segments = dataset.get("SegmentSequence") or ()
    if len(segments) > 1:
        labels = ", ".join(str(item.get("SegmentLabel", "")) for item in segments)
        notes.append(f"its {len(segments)} segments ({labels}) were joined")
    frame_of_reference = str(dataset.get("FrameOfReferenceUID") or "").strip()
    if frame_of_reference != stack.series.frame_of_reference:
        notes.append("the SEG names another frame of reference than the PET; it was placed by position")
    placed = _placed(dataset, frames, path)
    pitch = _pitch(dataset, stack)
    exact = _exact(placed, pitch, stack, path)
    if exact is None:
        exact = _resampled(placed, pitch, stack, path)
        if not exact.any():
            what = "its lesions fall between the PET's voxel centres"
            raise ConversionError(what, "draw it on the PET, or leave the study out", path)
        notes.append("the SEG is not on the PET's grid; it was resampled (nearest)")
    return DecodedSeg(exact, notes)


def _open(path: str, **options: Any) -> Dataset:
    import pydicom

    try:
        with quiet_dicom():
            dataset = pydicom.dcmread(path, **options)
            modality = str(dataset.get("Modality") or "")
    except READ_ERRORS as error:
        raise ConversionError(f"is no readable DICOM file ({error})", "restore the file", path) from error
    if modality != "SEG":
        raise ConversionError(f"is no SEG: its Modality is {modality!r}", "restore the file", path)
    return dataset


def _frames(dataset: Dataset, path: str) -> np.ndarray:
    """Return what is segmented, bool, shape (frames, rows, columns)."""
    if not _count_frames(dataset):
        return np.zeros((0, 1, 1), dtype=bool)
    if "PixelData" not in dataset:
        raise ConversionError("has no pixels", "restore the file", path)
    try:
        with quiet_dicom():
            values = dataset.pixel_array
            kind = str(dataset.get("SegmentationType") or "BINARY").upper()
            limit = 0.5 * float(dataset.get("MaximumFractionalValue") or 255) if kind == "FRACTIONAL" else 0.5
            shape = (int(dataset.get("NumberOfFrames") or 1), int(dataset.Rows), int(dataset.Columns))
            return values.reshape(shape) >= limit
    except MemoryError:
        raise
    except READ_ERRORS as error:
        raise ConversionError(f"its pixels cannot be read ({error})", "restore the file", path) from error


def _count_frames(dataset: Dataset) -> int:
    """Return the number of frames; a SEG of which all empty frames were left out may have none."""
    try:
        if dataset.get("NumberOfFrames") is None and "PixelData" in dataset:
            return 1
        return int(dataset.get("NumberOfFrames") or 0) or len(dataset.get("PerFrameFunctionalGroupsSequence") or ())
    except READ_ERRORS:
        return 1


@dataclass(frozen=True)
class _Frame:
    """One frame: its pixels, and where its first pixel, its rows' and its columns' steps are (mm, LPS)."""

    values: np.ndarray
    origin: np.ndarray
    right: np.ndarray
    down: np.ndarray


def _placed(dataset: Dataset, frames: np.ndarray, path: str) -> list[_Frame]:
    """Return the frames that have segmented pixels, with their geometry."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [None])[0]
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(own) < len(frames):
        raise ConversionError(
            f"has {len(frames)} frames and positions for {len(own)}", "restore (5200,9230) of the file", path
        )
    placed = []
    for values, groups in zip(frames, own, strict=False):
        if not values.any():
            continue
        spacing = _group_value(groups, shared, "PixelMeasuresSequence", "PixelSpacing", 2, path)
        origin = _group_value(groups, shared, "PlanePositionSequence", "ImagePositionPatient", 3, path)
        axes = _group_value(groups, shared, "PlaneOrientationSequence", "ImageOrientationPatient", 6, path)
        right, down = spacing[1] * axes[:3], spacing[0] * axes[3:]
        placed.append(_Frame(values, origin, right, down))
    return placed


def _slice_positions(index: np.ndarray, stack: SliceStack) -> np.ndarray:
    """Return stack indices (n, 3) whose third column, mm along the normal, has become a slice number.

    Slices may be spaced a little irregularly; beyond the ends the mean spacing goes on.
    """
    along, slices = index[:, 2], np.arange(len(stack.distances), dtype=float)
    number = np.interp(along, stack.distances, slices)
    number = np.where(along < 0.0, along / stack.spacing[2], number)
    beyond = slices[-1] + (along - stack.distances[-1]) / stack.spacing[2]
    number = np.where(along > stack.distances[-1], beyond, number)
    return np.column_stack([index[:, :2], number])


def _pitch(dataset: Dataset, stack: SliceStack) -> float:
    """Return the distance of a SEG's slices in mm.

    Frames without segmented pixels may be left out, so that the smallest distance is only an upper bound, and the
    thickness in the header may be wrong, so that it counts where all distances are multiples of it.
    """
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [None])[0]
    heights, thickness = [], 0.0
    for groups in dataset.get("PerFrameFunctionalGroupsSequence") or ():
        position = (groups.get("PlanePositionSequence") or [None])[0]
        values = position.get("ImagePositionPatient") if position is not None else None
        if values is not None and len(values) == 3:
            heights.append(float((np.array(values, float) - stack.origin) @ stack.direction[:, 2]))
        for place in (groups, shared):
            measures = ((place.get("PixelMeasuresSequence") or [None])[0]) if place is not None else None
            stated = measures and (measures.get("SpacingBetweenSlices") or measures.get("SliceThickness"))
            thickness = thickness or float(stated or 0.0)
    gaps = np.diff(np.unique(np.array(heights).round(2)))
    usual = stack.spacing[2]
    if (
        thickness > usual * (1 + LATTICE_TOLERANCE)
        and np.abs(gaps / thickness - (gaps / thickness).round()).max(initial=0.0) < LATTICE_TOLERANCE
    ):
        return thickness
    return min(float(gaps.min(initial=usual)), usual)


def _exact(frames: Sequence[_Frame], pitch: float, stack: SliceStack, path: str) -> np.ndarray | None:
    """Return the mask where all segmented pixels are voxels of the stack, None where they lie between voxels.

    Raises:
        ConversionError: segmented pixels lie outside the stack.
    """
    columns, rows, slices = stack.size
    mask = np.zeros((slices, rows, columns), np.uint8)
    in_plane = np.sort(stack.spacing[:2])
    fits = pitch <= stack.spacing[2] * (1 + LATTICE_TOLERANCE)
    for frame in frames:
        row, column = np.nonzero(frame.values)
        points = frame.origin + np.outer(column, frame.right) + np.outer(row, frame.down)
        index = _slice_positions(stack.to_index(points), stack)
        nearest = np.round(index)
        if (nearest < 0).any() or (nearest >= np.array(stack.size)).any():
            raise ConversionError(
                "has segmented pixels outside the PET it belongs to", "check which PET it was drawn on", path
            )
        steps = np.sort([np.linalg.norm(frame.right), np.linalg.norm(frame.down)])
        fits = fits and np.abs(steps / in_plane - 1.0).max() <= _SPACING_TOLERANCE
        fits = fits and np.abs(index - nearest).max() <= LATTICE_TOLERANCE
        x, y, z = nearest.astype(int).T
        mask[z, y, x] = 1
    return mask if fits else None


def _resampled(frames: Sequence[_Frame], pitch: float, stack: SliceStack, path: str) -> np.ndarray:
    """Return what the frames have nearest to each voxel centre of the stack.

    Raises:
        ConversionError: the frames do not lie parallel to the stack's slices.
    """
    columns, rows, slices = stack.size
    mask = np.zeros((slices, rows, columns), np.uint8)
    normal = stack.direction[:, 2]
    for frame in frames:
        tilt = max(abs(float(step @ normal)) / float(np.linalg.norm(step)) for step in (frame.right, frame.down))
        if tilt > _TILT_TOLERANCE:
            raise ConversionError("its frames lie oblique to its PET's slices", "draw it on the PET", path)
    heights = np.array([float((frame.origin - stack.origin) @ normal) for frame in frames])
    reach = 0.5 * pitch + 1e-3
    y, x = np.mgrid[0:rows, 0:columns]
    plane = (
        stack.origin
        + x[..., None] * stack.spacing[0] * stack.direction[:, 0]
        + y[..., None] * stack.spacing[1] * stack.direction[:, 1]
    )
    for index, distance in enumerate(stack.distances):
        apart = np.abs(heights - distance)
        for number in np.flatnonzero(apart <= min(reach, apart.min() + 1e-3)):
            frame = frames[number]
            local = plane + distance * normal - frame.origin
            column = np.round(local @ frame.right / (frame.right @ frame.right)).astype(int)
            row = np.round(local @ frame.down / (frame.down @ frame.down)).astype(int)
            inside = (column >= 0) & (row >= 0) & (row < frame.values.shape[0]) & (column < frame.values.shape[1])
            mask[index][inside] |= frame.values[row[inside], column[inside]]
    return mask


def _group_value(groups: Any, shared: Any, sequence: str, keyword: str, length: int, path: str) -> np.ndarray:
    """Return a value of a frame's functional groups, its own or shared by all frames."""
    for place in (groups, shared):
        items = place.get(sequence) if place is not None else None
        values = items[0].get(keyword) if items else None
        if values is None:
            continue
        try:
            numbers = np.array([float(value) for value in values])
        except (TypeError, ValueError):
            numbers = np.empty(0)
        if len(numbers) == length and np.isfinite(numbers).all():
            return numbers
        raise ConversionError(f"{keyword} of a frame is {values}", f"{length} numbers are needed", path)
    raise ConversionError(f"{keyword} of a frame is missing", "restore the file", path)
