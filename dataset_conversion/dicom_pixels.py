"""Reading the pixels of a measured DICOM series, with every slice's own slope."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dataset_conversion.dicom_series import READ_ERRORS, SliceStack, quiet_dicom
from dataset_conversion.errors import ConversionError
from dataset_conversion.resampling import Grid, set_geometry
from dataset_conversion.slabs import resample_slices

if TYPE_CHECKING:
    import SimpleITK as sitk
    from pydicom.dataset import Dataset


def read_volume(stack: SliceStack, factors: np.ndarray | None = None) -> sitk.Image:
    """Read the pixels of a stack, rescaled slice by slice.

    Args:
        stack: from ``read_stack``.
        factors: one factor per slice, applied after rescaling, or None.

    Returns:
        float32 SimpleITK image on the stack's grid.

    Raises:
        ConversionError: pixels of a slice cannot be read, or a PET slice has no RescaleSlope.
    """
    import SimpleITK as sitk

    columns, rows, slices = stack.size
    volume = np.empty((slices, rows, columns), dtype=np.float32)
    with quiet_dicom():
        for index in range(slices):
            values = _read_slice(stack, index)
            volume[index] = values if factors is None else values * factors[index]
    _note_unscaled(stack)
    image = sitk.GetImageFromArray(volume)
    return with_stack_geometry(image, stack)


def read_onto(stack: SliceStack, reference: sitk.Image | Grid, fill: float) -> sitk.Image:
    """Read a stack onto another grid, linearly interpolated, without holding more than some of its slices at a time.

    Args:
        stack: from ``read_stack``; a CT may be ten times as large as the PET whose grid is wanted.
        reference: the grid that is wanted.
        fill: value outside the stack.

    Returns:
        float32 SimpleITK image, the same as that of resampling ``read_volume(stack)``.

    Raises:
        ConversionError: pixels of a slice cannot be read, needed or not.
    """

    seen: set[int] = set()

    def read(index: int) -> np.ndarray:
        seen.add(index)
        return np.float32(_read_slice(stack, index))

    with quiet_dicom():
        image = resample_slices(grid_of_stack(stack), read, reference, fill)
        # A damaged slice is a damaged series, whether the grid needs it or not.
        for index in sorted(set(range(stack.size[2])) - seen):
            _read_slice(stack, index)
    _note_unscaled(stack)
    return image


def grid_of_stack(stack: SliceStack) -> Grid:
    """Return the grid of a stack."""
    return Grid(stack.size, stack.spacing, tuple(stack.origin.tolist()), tuple(stack.direction.ravel().tolist()))


def _read_slice(stack: SliceStack, index: int) -> np.ndarray:
    """Return the rescaled values of one slice, float64, shape (rows, columns)."""
    columns, rows, _ = stack.size
    header, path = stack.headers[index], stack.paths[index]
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    if slope is None and stack.series.modality == "PT":
        raise ConversionError("(0028,1053) RescaleSlope is missing", "restore the tag", path)
    try:
        scale = (float(1 if slope is None else slope), float(intercept or 0))
    except ValueError as error:
        raise ConversionError(
            f"RescaleSlope {slope!r} or RescaleIntercept {intercept!r} is no number", "correct the tag", path
        ) from error
    if not scale[0] or not np.isfinite(scale).all():
        raise ConversionError(f"RescaleSlope is {slope}", "correct the tag", path)
    values = _stored_values(path)
    if values.shape != (rows, columns):
        raise ConversionError(
            f"holds pixels of shape {values.shape}, not {(rows, columns)}", "grey images are needed", path
        )
    rescaled = values.astype(np.float64) * scale[0] + scale[1]
    if not np.isfinite(rescaled).all():
        raise ConversionError("holds values that are no numbers", "restore the file", path)
    return rescaled


def _note_unscaled(stack: SliceStack) -> None:
    unscaled = sum(header.get("RescaleSlope") is None for header in stack.headers)
    if unscaled:
        stack.notes.append(f"{unscaled} slices have no RescaleSlope; their stored values were taken as they are")


def with_stack_geometry(image: sitk.Image, stack: SliceStack) -> sitk.Image:
    """Give an image made from a (z, y, x) array on the stack's grid the stack's spacing, origin and direction."""
    return set_geometry(image, grid_of_stack(stack))


def _stored_values(path: str) -> np.ndarray:
    """Return the stored pixel values of one file, shape (rows, columns) for grey images."""
    import pydicom

    try:
        dataset = pydicom.dcmread(path, force=True)
        if getattr(dataset.file_meta, "TransferSyntaxUID", None) is None:
            # Files without preamble carry no meta group; their encoding was found on reading.
            explicit, little = not dataset.original_encoding[0], dataset.original_encoding[1]
            dataset.file_meta.TransferSyntaxUID = (
                pydicom.uid.ImplicitVRLittleEndian
                if not explicit
                else pydicom.uid.ExplicitVRLittleEndian
                if little
                else pydicom.uid.ExplicitVRBigEndian
            )
        if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            return _decompressed_values(path, dataset)
        return dataset.pixel_array
    except READ_ERRORS as error:
        if isinstance(error, (ConversionError, MemoryError)):
            raise
        raise ConversionError(f"its pixels cannot be read ({error})", "restore the file", path) from error


def _decompressed_values(path: str, dataset: Dataset) -> np.ndarray:
    """Decode compressed pixels with pydicom's plug-ins where installed, else with SimpleITK's GDCM."""
    import SimpleITK as sitk

    try:
        return dataset.pixel_array
    except (RuntimeError, NotImplementedError, ImportError):
        # SimpleITK ends the process on names that are no UTF-8 text; this is an error that the caller reports.
        path.encode()
        image = sitk.ReadImage(path, sitk.sitkFloat64)
    rescaled = sitk.GetArrayFromImage(image)[0]
    slope, intercept = float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)
    # GDCM applies slope and intercept; the caller expects stored values.
    return (rescaled - intercept) / slope if slope else rescaled
