"""Reading volume files whole or not at all, and writing NIfTI with fast compression.

ITK reads a cut-off ``.nii.gz`` without complaint, as zeros from the cut on, and a full disk may leave a cut-off file
without an error. Here a damaged file is an error, a value that is no number is one too, and every byte written is
accounted for. Compression and decompression are ISA-L's where it is installed (three to ten times zlib's speed).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING

import numpy as np

from dataset_conversion.errors import ConversionError
from dataset_conversion.nifti_forms import check_finite, check_forms
from dataset_conversion.nifti_stream import NiftiStream, gzip_module
from dataset_conversion.resampling import Grid, orientation_code, set_geometry

if TYPE_CHECKING:
    import SimpleITK as sitk

NIFTI_ENDINGS = (".nii.gz", ".nii")
VOLUME_ENDINGS = (*NIFTI_ENDINGS, ".mha", ".mhd", ".nrrd")
_IMAGE_TYPES = ("32-bit float", "64-bit float", "16-bit signed integer", "32-bit signed integer")
_LEVEL = 1
_SPACING_MM = (0.05, 50.0)
_READ_ERRORS = (EOFError, OSError, ValueError, RuntimeError)


def ending_of(path: str, endings: tuple[str, ...] = VOLUME_ENDINGS) -> str:
    """Return which of some endings a file name has, ``""`` where none."""
    return next((ending for ending in endings if path.lower().endswith(ending)), "")


def read_header(path: str) -> sitk.ImageFileReader:
    """Return SimpleITK's reader of a file after it has read the geometry, and nothing else.

    Raises:
        ConversionError: the file cannot be opened or is no image.
    """
    import SimpleITK as sitk

    _check_readable(path)
    if ending_of(path, NIFTI_ENDINGS):
        check_finite(path)
    # What ITK would warn of on the terminal either becomes an error here or does not matter.
    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path, error) from error
    return reader


def volume_header(path: str) -> sitk.ImageFileReader:
    """Return ``read_header`` of a file that holds a volume; a fourth axis of length 1 does not matter.

    Raises:
        ConversionError: the file cannot be opened, or holds no volume.
    """
    reader = read_header(path)
    size = tuple(reader.GetSize())
    flat = len(size) == 4 and size[3] == 1
    if (len(size) != 3 and not flat) or reader.GetNumberOfComponents() != 1:
        raise ConversionError(f"is no volume: its size is {size}", "a 3-D image is needed", path)
    grid = geometry(reader)
    low, high = _SPACING_MM
    if not all(low <= value <= high for value in grid.spacing):
        shown = " x ".join(f"{value:g}" for value in grid.spacing)
        raise ConversionError(f"its spacing is {shown} mm", f"{low} to {high} mm is believed: correct the header", path)
    if ending_of(path, NIFTI_ENDINGS):
        check_forms(path, grid)
    return reader


def geometry(reader: sitk.ImageFileReader) -> Grid:
    """Return the grid of a volume file's first three axes."""
    matrix = np.array(reader.GetDirection()).reshape(reader.GetDimension(), -1)[:3, :3]
    return Grid(
        tuple(reader.GetSize()[:3]), tuple(reader.GetSpacing()[:3]), tuple(reader.GetOrigin()[:3]),
        tuple(matrix.ravel().tolist()),
    )  # fmt: skip


def read_image(path: str) -> sitk.Image:
    """Read a volume.

    Args:
        path: NIfTI (compressed or not), MetaImage or NRRD; a fourth axis of length 1 is dropped.

    Returns:
        Three-dimensional SimpleITK image of the file's pixel type (what NIfTI's slope and intercept give, where set).

    Raises:
        ConversionError: the file is missing, cut off or damaged, is no volume, or holds values that are no numbers.
    """
    import SimpleITK as sitk

    reader = volume_header(path)
    if ending_of(path, NIFTI_ENDINGS):
        image = _nifti_values(path, tuple(reader.GetSize())[:3])
        set_geometry(image, geometry(reader))
    else:
        _check_compressed(path)
        try:
            image = sitk.ReadImage(path)
        except RuntimeError as error:
            raise _unreadable(path, error) from error
        image = image[..., 0] if image.GetDimension() == 4 else image
    _check_numbers(path, image)
    return image


def _check_compressed(path: str) -> None:
    """Raise where a compressed MetaImage or NRRD is damaged, which ITK reads with a warning on the terminal only."""
    import zlib

    with open(path, "rb") as stream:
        content = stream.read()
    if path.lower().endswith(".nrrd"):
        head, _, body = content.partition(b"\n\n")
        packed = re.search(rb"^encoding:\s*(gz|gzip)\s*$", head, re.MULTILINE | re.IGNORECASE) is not None
        kind = zlib.MAX_WBITS | 16
    else:
        head, _, body = content.partition(b"ElementDataFile = LOCAL\n")
        packed = re.search(rb"^CompressedData = True\s*$", head, re.MULTILINE) is not None
        kind = zlib.MAX_WBITS
    if not packed:
        return
    unpacker = zlib.decompressobj(kind)
    try:
        unpacker.decompress(body)
    except zlib.error as error:
        raise ConversionError(f"is cut off or damaged ({error})", "restore the file", path) from error
    if not unpacker.eof:
        raise ConversionError("is cut off or damaged (its end is missing)", "restore the file", path)


def _check_readable(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        # SimpleITK ends the process on such a name.
        raise ConversionError("its name is no UTF-8 text", "rename file and folders", path) from error
    try:
        with open(path, "rb") as stream:
            if not stream.read(1):
                raise ConversionError("is empty", "restore the file", path)
    except FileNotFoundError as error:
        what = "is a link to a file that is not there" if os.path.islink(path) else "is not there"
        raise ConversionError(what, "restore the file", path) from error
    except OSError as error:
        raise ConversionError(f"cannot be opened ({error.strerror})", "allow reading it", path) from error


def _unreadable(path: str, error: Exception) -> ConversionError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
    return ConversionError(f"cannot be read as an image ({reason})", "restore the file", path)


def _nifti_values(path: str, size: tuple[int, ...]) -> sitk.Image:
    """Return the voxels of a NIfTI file, every byte of which was checked, without geometry."""
    import SimpleITK as sitk

    with nifti_errors(path), NiftiStream(path) as stream:
        values = stream.read(stream.count)
        stream.finish()
        return sitk.GetImageFromArray(values.reshape(size, order="F").T)


@contextlib.contextmanager
def nifti_errors(path: str) -> Iterator[None]:
    """Turn what reading a damaged NIfTI file raises into a ConversionError."""
    import nibabel

    try:
        yield
    except (*_READ_ERRORS, nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        if isinstance(error, ConversionError):
            raise
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ConversionError(f"is cut off or damaged ({reason})", "restore the file", path) from error


def _check_numbers(path: str, image: sitk.Image) -> None:
    import SimpleITK as sitk

    not_numbers = count_not_numbers(sitk.GetArrayViewFromImage(image))
    if not_numbers:
        raise no_numbers(path, not_numbers)


def count_not_numbers(values: np.ndarray) -> int:
    """Return how many values are NaN or infinite."""
    if values.dtype.kind != "f":
        return 0
    # A sum is not finite when one value is not, and needs no map of all voxels; float64 does not overflow here.
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(values.sum(dtype=np.float64)):
            return 0
    return int(values.size - np.isfinite(values).sum())


def no_numbers(path: str, count: int) -> ConversionError:
    """Return the error of a file with voxels that are no numbers."""
    what = f"holds {count} voxels that are no numbers (NaN or infinite)"
    return ConversionError(what, "mend or leave out the file", path)


def fits_as_it_is(image: sitk.Image, path: str, is_label: bool, orientation: str) -> bool:
    """True where nnU-Net can read a file as it is: compressed NIfTI of a pixel type and orientation that will do."""
    kind = image.GetPixelIDTypeAsString()
    return can_be_taken(path, kind, is_label) and orientation_code(image) == orientation


def can_be_taken(path: str, pixel_type: str, is_label: bool) -> bool:
    """True for a compressed NIfTI file of a pixel type (SimpleITK's words) that nnU-Net reads as it should."""
    readable = "integer" in pixel_type if is_label else pixel_type in _IMAGE_TYPES
    return readable and path.endswith(".nii.gz")


def usual_orientation(paths: Sequence[str]) -> str:
    """Return the orientation most files have: nnU-Net ignores directions, and files that fit are kept as they are."""
    counts: Counter[str] = Counter()
    for path in paths:
        try:
            counts[orientation_code(geometry(volume_header(path)))] += 1
        except (ConversionError, RuntimeError):
            # Reported with its reason when the case is converted.
            continue
    return max(sorted(counts), key=lambda code: counts[code]) if counts else "LPS"


def write_image(image: sitk.Image, path: str) -> None:
    """Write a three-dimensional image as ``.nii.gz``: the same bytes for the same image.

    Args:
        image: of a pixel type that NIfTI has; its geometry is kept to float32, as NIfTI does.
        path: ending in ``.nii.gz``.

    Raises:
        OSError: it cannot be written, for instance on a full disk.
    """
    import SimpleITK as sitk

    values = sitk.GetArrayViewFromImage(image)
    with open(path, "wb") as raw, gzip_module().GzipFile("", "wb", _LEVEL, raw, mtime=0) as stream:
        _write_header(image, values.dtype, stream)
        for part in values:
            stream.write(np.ascontiguousarray(part).data)


def _write_header(image: sitk.Image, kind: np.dtype, stream: IO[bytes]) -> None:
    """Write the 352 bytes before the voxels; NIfTI's x and y run to right and anterior, ITK's to left and posterior."""
    import nibabel

    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1.0
    header = nibabel.Nifti1Header(endianness="<")
    header.set_data_dtype(kind)
    header.set_data_shape(image.GetSize())
    header.set_slope_inter(1.0, 0.0)
    header.set_qform(affine + 0.0, code=1)
    header.set_sform(affine + 0.0, code=1)
    # set_qform takes the spacing from rounded products; the image knows it exactly.
    header["pixdim"][1:4] = image.GetSpacing()
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352
    stream.write(header.binaryblock + b"\0\0\0\0")
