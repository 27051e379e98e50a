"""Finding DICOM series by their headers and reading one as a volume with measured geometry.

Folder and file names play no part. Geometry comes from ImagePositionPatient of every slice, never from SliceThickness;
a stack that is no regular grid (missing or double slices, gantry tilt, mixed orientation) is refused with the reason.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_conversion.errors import ConversionError
from dataset_conversion.files import list_files
from dataset_conversion.series_checks import check_complete, check_one_series

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# STS_001's PET has gaps of 3.19 to 3.29 mm; more than 5 % and 0.1 mm is no longer rounding.
GAP_TOLERANCE_RELATIVE = 0.05
GAP_TOLERANCE_MM = 0.1
DUPLICATE_MM = 1e-2
ORIENTATION_TOLERANCE = 1e-3
_SCAN_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "PatientID", "PatientName", "StudyInstanceUID", "SeriesInstanceUID",
    "SeriesDescription", "FrameOfReferenceUID", "ImageType", "NumberOfFrames", "CorrectedImage", "StudyDate",
]  # fmt: skip
# What a file that ends in .dcm has at the least: preamble, mark and one element.
_SMALLEST_DICOM = 140
_DICOM_ENDINGS = (".dcm", ".ima")
# The directory of a medium belongs to no series.
_NOT_OF_A_SERIES = ("1.2.840.10008.1.3.10",)
# A damaged file makes pydicom raise nearly anything (struct.error, NotImplementedError, BytesLengthException …).
READ_ERRORS = (Exception,)


@dataclass(frozen=True)
class DicomFile:
    """What the scan keeps of one DICOM file."""

    path: str
    size: int
    mtime_ns: int
    modality: str
    patient_id: str
    patient_name: str
    study_uid: str
    series_uid: str
    sop_uid: str
    sop_class: str
    description: str
    frame_of_reference: str
    image_type: tuple[str, ...]
    corrections: tuple[str, ...]
    frames: int
    study_date: str = ""


@dataclass(frozen=True)
class ImageSeries:
    """The files of one image series.

    Attributes:
        modality: ``CT``, ``PT`` or ``MR``.
        uid: SeriesInstanceUID.
        files: its files in path order.
    """

    modality: str
    uid: str
    files: tuple[DicomFile, ...]

    @property
    def description(self) -> str:
        """SeriesDescription of the first file."""
        return self.files[0].description

    @property
    def frame_of_reference(self) -> str:
        """FrameOfReferenceUID of the first file."""
        return self.files[0].frame_of_reference

    @property
    def study_uid(self) -> str:
        """StudyInstanceUID of the first file."""
        return self.files[0].study_uid

    @property
    def folder(self) -> str:
        """The folder of the first file, for messages."""
        return os.path.dirname(self.files[0].path)

    def __str__(self) -> str:
        return f"{self.modality} series {self.description!r} ({len(self.files)} files, UID {self.uid})"


@dataclass
class SliceStack:
    """One series as a regular grid, slices sorted along the normal (row direction x column direction).

    Attributes:
        series: the series it was read from.
        headers: pydicom headers in slice order, without pixels.
        paths: file of every slice.
        size: (columns, rows, slices), SimpleITK order x, y, z.
        spacing: mm, x, y, z; z is the mean gap between slice positions.
        origin: mm, LPS, centre of the first voxel.
        direction: (3, 3), columns are the directions of the x, y, z axes.
        distances: mm along the normal, shape (slices,), position of every slice relative to the first.
        notes: what was tolerated.
    """

    series: ImageSeries
    headers: list[Dataset]
    paths: list[str]
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: np.ndarray
    direction: np.ndarray
    distances: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def sop_uids(self) -> list[str]:
        """SOPInstanceUID of every slice."""
        return [str(header.get("SOPInstanceUID", "")) for header in self.headers]

    def to_index(self, points: np.ndarray) -> np.ndarray:
        """Return points (n, 3) in mm, LPS, as continuous (column, row, mm along the normal), shape (n, 3)."""
        local = (np.asarray(points, dtype=np.float64) - self.origin) @ self.direction
        return local / np.array([self.spacing[0], self.spacing[1], 1.0])


@contextlib.contextmanager
def quiet_dicom() -> Iterator[None]:
    """Keep pydicom from warning about values that break the standard's length and character rules."""
    import pydicom

    settings = pydicom.config.settings
    before = settings.reading_validation_mode
    settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.reading_validation_mode = before


def _dicom_start(path: str) -> str:
    """Return ``marked`` for files with the DICM mark, ``bare`` for what may be DICOM without preamble, else ""."""
    with open(path, "rb") as stream:
        start = stream.read(132)
    if start[128:132] == b"DICM":
        return "marked"
    # Without preamble a file begins with its first element, of group 0002 or 0008, little endian.
    return "bare" if start[:2] in (b"\x08\x00", b"\x02\x00") and start[3:4] == b"\x00" else ""


def _why_not_open(path: str, error: OSError) -> tuple[str, str]:
    if os.path.islink(path) and not os.path.exists(path):
        return "is a link to a file that is not there", "restore the file"
    return f"cannot be opened ({error.strerror or error})", "allow reading it"


def broken_files(broken: Sequence[ConversionError]) -> dict[str, ConversionError]:
    """Return folder -> an error of a file in it: whatever is made of that folder's files may lack a slice."""
    return {os.path.dirname(error.file): error for error in reversed(broken) if error.file}


def _words(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value.strip(),) if isinstance(value, str) else tuple(str(item).strip() for item in value)


def scan(source: Path, progress: Callable[[], None] = lambda: None) -> tuple[list[DicomFile], list[ConversionError]]:
    """Read the headers of all DICOM files below a folder (or of one file), as ``scan_files`` does."""
    faults: list[ConversionError] = []
    paths = list_files(source, lambda: None, faults) if source.is_dir() else [str(source)]
    found, broken = scan_files(paths, progress)
    return found, [*faults, *broken]


def scan_files(
    paths: Iterable[str], progress: Callable[[], None] = lambda: None
) -> tuple[list[DicomFile], list[ConversionError]]:
    """Read the headers of the DICOM files among some files.

    Args:
        paths: the files.
        progress: called once per file looked at.

    Returns:
        The DICOM files (directories of media passed over), and one error per file that says it is DICOM and cannot be
        read. Files that are no DICOM are passed over.
    """
    import pydicom

    found: list[DicomFile] = []
    broken: list[ConversionError] = []
    with quiet_dicom():
        for path in paths:
            progress()
            start = ""
            try:
                start = _dicom_start(path)
                if not start:
                    if path.lower().endswith(_DICOM_ENDINGS) and os.path.getsize(path) < _SMALLEST_DICOM:
                        broken.append(ConversionError("is cut off or empty", "restore the file", path))
                    continue
                header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(_SCAN_TAGS))
                record = _file_record(path, header)
                of_a_series = header.file_meta.get("MediaStorageSOPClassUID") not in _NOT_OF_A_SERIES
            except OSError as error:
                if path.lower().endswith(_DICOM_ENDINGS) or not os.path.islink(path):
                    broken.append(ConversionError(*_why_not_open(path, error), path))
                continue
            except READ_ERRORS as error:
                if start == "marked":
                    broken.append(ConversionError(f"is no readable DICOM file ({error})", "restore the file", path))
                continue
            if record is not None:
                found.append(record)
            elif start == "marked" and of_a_series:
                what = "is cut off: it has no Modality or no SeriesInstanceUID"
                broken.append(ConversionError(what, "restore the file", path))
    return found, broken


def _file_record(path: str, header: Dataset) -> DicomFile | None:
    modality = str(header.get("Modality") or "").strip().upper()
    series_uid = str(header.get("SeriesInstanceUID") or "").strip()
    if not modality or not series_uid:
        return None
    status = os.stat(path)
    return DicomFile(
        path=path,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        modality=modality,
        patient_id=str(header.get("PatientID") or "").strip(),
        patient_name=str(header.get("PatientName") or "").strip(),
        study_uid=str(header.get("StudyInstanceUID") or "").strip(),
        series_uid=series_uid,
        sop_uid=str(header.get("SOPInstanceUID") or "").strip(),
        sop_class=str(header.get("SOPClassUID") or "").strip(),
        description=str(header.get("SeriesDescription") or "").strip(),
        frame_of_reference=str(header.get("FrameOfReferenceUID") or "").strip(),
        image_type=_words(header.get("ImageType")),
        corrections=_words(header.get("CorrectedImage")),
        frames=int(header.get("NumberOfFrames") or 1),
        study_date=str(header.get("StudyDate") or "").strip(),
    )


def group_series(files: Sequence[DicomFile], modalities: Sequence[str]) -> list[ImageSeries]:
    """Group image files of the given modalities into series, sorted by UID; scout images are left out."""
    groups: dict[tuple[str, str], list[DicomFile]] = {}
    for file in files:
        if file.modality in modalities and "LOCALIZER" not in (word.upper() for word in file.image_type):
            groups.setdefault((file.modality, file.series_uid), []).append(file)
    return [
        ImageSeries(modality, uid, tuple(sorted(members, key=lambda file: file.path)))
        for (modality, uid), members in sorted(groups.items())
    ]


def _without_copies(series: ImageSeries) -> tuple[list[DicomFile], list[str]]:
    """Drop byte-identical copies of a slice; two different files of one SOPInstanceUID are an error."""
    kept: dict[str, DicomFile] = {}
    copies = 0
    for file in series.files:
        first = kept.get(file.sop_uid) if file.sop_uid else None
        if first is None:
            kept[file.sop_uid or file.path] = file
        elif first.size == file.size and Path(first.path).read_bytes() == Path(file.path).read_bytes():
            copies += 1
        else:
            raise ConversionError(
                f"has the same SOPInstanceUID as {first.path} and other contents", "remove one of the two", file.path
            )
    return list(kept.values()), [f"{copies} identical copies of slices were left out"] if copies else []


def read_stack(series: ImageSeries) -> SliceStack:
    """Read the headers of a series and measure its grid.

    Raises:
        ConversionError: the slices do not form one regular three-dimensional grid.
    """
    import pydicom

    files, notes = _without_copies(series)
    headers = []
    with quiet_dicom():
        for file in files:
            try:
                headers.append(pydicom.dcmread(file.path, stop_before_pixels=True, force=True))
            except READ_ERRORS as error:
                raise ConversionError(f"cannot be read ({error})", "restore the file", file.path) from error
        for file in files:
            if file.frames > 1:
                raise ConversionError(
                    f"is a multi-frame object ({file.frames} frames)",
                    "export the series as one object per slice",
                    file.path,
                )
        if len(files) < 2:
            raise ConversionError(f"{series} is no volume: it has a single slice", "restore its files", files[0].path)
        return _measure(series, headers, [file.path for file in files], notes)


def _vector(header: Dataset, keyword: str, length: int, path: str) -> np.ndarray:
    try:
        values = np.array([float(value) for value in header.get(keyword) or ()], dtype=np.float64)
    except (TypeError, ValueError):
        values = np.array([np.nan])
    if values.shape != (length,) or not np.isfinite(values).all():
        shown = header.get(keyword) if keyword in header else "missing"
        raise ConversionError(f"{keyword} is {shown}", f"{length} numbers are needed", path)
    return values


def _measure(series: ImageSeries, headers: list[Dataset], paths: list[str], notes: list[str]) -> SliceStack:
    orientations = np.stack([_vector(h, "ImageOrientationPatient", 6, p) for h, p in zip(headers, paths, strict=True)])
    positions = np.stack([_vector(h, "ImagePositionPatient", 3, p) for h, p in zip(headers, paths, strict=True)])
    pixels = np.stack([_vector(h, "PixelSpacing", 2, p) for h, p in zip(headers, paths, strict=True)])
    shapes = [(int(h.get("Rows") or 0), int(h.get("Columns") or 0)) for h in headers]
    for index, path in enumerate(paths):
        if np.abs(orientations[index] - orientations[0]).max() > ORIENTATION_TOLERANCE:
            raise ConversionError(
                f"{series} mixes orientations: {orientations[index].round(4).tolist()} and "
                f"{orientations[0].round(4).tolist()}",
                "give one series per orientation",
                path,
            )
        if shapes[index] != shapes[0] or np.abs(pixels[index] / pixels[0] - 1.0).max() > 1e-3:
            raise ConversionError(
                f"{series} mixes image sizes or pixel spacings: {shapes[index]}, {pixels[index].tolist()} and "
                f"{shapes[0]}, {pixels[0].tolist()}",
                "give one series per image size",
                path,
            )
    rows, columns = shapes[0]
    if rows < 1 or columns < 1 or (pixels <= 0).any():
        what = f"Rows x Columns is {rows} x {columns}, PixelSpacing {pixels[0].tolist()}"
        raise ConversionError(what, "correct the tags", paths[0])
    row, column = orientations[0, :3], orientations[0, 3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1.0) for length in lengths) > 1e-2 or abs(float(row @ column)) > ORIENTATION_TOLERANCE:
        raise ConversionError(
            f"ImageOrientationPatient {orientations[0].tolist()} is no pair of perpendicular unit vectors",
            "correct the tag",
            paths[0],
        )
    row = row / lengths[0]
    column = column - (column @ row) * row
    column /= np.linalg.norm(column)
    normal = np.cross(row, column)
    order = np.argsort(positions @ normal, kind="stable")
    positions, headers = positions[order], [headers[index] for index in order]
    paths = [paths[index] for index in order]
    distances = (positions - positions[0]) @ normal
    check_one_series(str(series), headers, paths)
    spacing = _slice_spacing(series, distances, paths, notes)
    check_complete(str(series), headers, paths, notes)
    sideways = (positions - positions[0]) - np.outer(distances, normal)
    drift = float(np.linalg.norm(sideways, axis=1).max())
    if drift > max(0.1, 0.1 * float(pixels[0].min())):
        raise ConversionError(
            f"{series} is sheared: slices shift sideways by up to {drift:.2f} mm (gantry tilt)",
            "resample it to an untilted grid first",
            paths[0],
        )
    return SliceStack(
        series=series,
        headers=headers,
        paths=paths,
        size=(columns, rows, len(paths)),
        spacing=(float(pixels[0, 1]), float(pixels[0, 0]), spacing),
        origin=positions[0],
        direction=np.stack([row, column, normal], axis=1),
        distances=distances,
        notes=notes,
    )


def _slice_spacing(series: ImageSeries, distances: np.ndarray, paths: list[str], notes: list[str]) -> float:
    gaps = np.diff(distances)
    usual = float(np.median(gaps))
    closest = int(np.argmin(gaps))
    if gaps[closest] < max(DUPLICATE_MM, 0.01 * usual):
        raise ConversionError(
            f"{series} has several slices at one position ({paths[closest]} and {paths[closest + 1]}): double, "
            "dynamic or gated images",
            "give one image per position",
            paths[closest],
        )
    widest = int(np.argmax(gaps))
    if gaps[widest] > 1.5 * usual:
        raise ConversionError(
            f"{series} lacks slices: a gap of {gaps[widest]:.2f} mm after {paths[widest]}, {usual:.2f} mm elsewhere",
            "restore the missing files",
            paths[widest],
        )
    tolerance = max(GAP_TOLERANCE_MM, GAP_TOLERANCE_RELATIVE * usual)
    if np.abs(gaps - usual).max() > tolerance:
        raise ConversionError(
            f"{series} is irregularly spaced: gaps of {gaps.min():.3f} to {gaps.max():.3f} mm",
            "resample it to regular slices first",
            paths[0],
        )
    spacing = float(distances[-1] / len(gaps))
    lattice = np.abs(distances - spacing * np.arange(len(distances))).max()
    if lattice > 0.25 * spacing:
        raise ConversionError(
            f"{series} is irregularly spaced: slices lie up to {lattice:.2f} mm off a grid of {spacing:.3f} mm",
            "resample it to regular slices first",
            paths[0],
        )
    if gaps.max() - gaps.min() > 1e-2:
        notes.append(
            f"slice gaps of {gaps.min():.3f} to {gaps.max():.3f} mm taken as {spacing:.4f} mm; slices lie up to "
            f"{lattice:.3f} mm off that grid"
        )
    return spacing
