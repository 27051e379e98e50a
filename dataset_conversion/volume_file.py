"""A volume file that is read slice by slice, its voxels checked as they pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dataset_conversion.nifti import (
    NIFTI_ENDINGS,
    can_be_taken,
    count_not_numbers,
    ending_of,
    geometry,
    nifti_errors,
    no_numbers,
    read_image,
    volume_header,
)
from dataset_conversion.nifti_stream import NiftiStream
from dataset_conversion.resampling import Grid
from dataset_conversion.slabs import resample_slices

if TYPE_CHECKING:
    import SimpleITK as sitk

#: Sees every slice, shape (y, x), with its index along z.
Watch = Callable[[int, np.ndarray], None]


class VolumeFile:
    """A volume in a file, of which no more than some slices are in memory at a time.

    Args:
        path: as ``read_image`` takes it; MetaImage and NRRD are read whole.

    Attributes:
        path: the file.
        grid: its geometry.
        pixel_type: SimpleITK's words for the type of its values.

    Raises:
        ConversionError: the file is missing or holds no volume; reading raises it where the file is cut off or damaged,
            or holds values that are no numbers.
    """

    def __init__(self, path: str) -> None:
        import SimpleITK as sitk

        reader = volume_header(path)
        self.path = path
        self.grid: Grid = geometry(reader)
        self.pixel_type: str = sitk.GetPixelIDValueAsString(reader.GetPixelID())

    def fits(self, is_label: bool) -> bool:
        """True where nnU-Net can read the file as it is."""
        return can_be_taken(self.path, self.pixel_type, is_label)

    def read_through(self, watch: Watch) -> None:
        """Read the whole file and show its slices to ``watch``."""
        with nifti_errors(self.path), self._open() as stream:
            _Slices(self, stream, watch).finish()

    def read_onto(
        self,
        reference: sitk.Image | Grid,
        fill: float,
        watch: Watch | None = None,
        nearest: bool = False,
        kind: int | None = None,
    ) -> sitk.Image:
        """Read the whole file onto another grid; arguments as in ``resample_slices``, ``watch`` as above."""
        with nifti_errors(self.path), self._open() as stream:
            slices = _Slices(self, stream, watch)
            image = resample_slices(self.grid, slices.read, reference, fill, nearest, kind)
            slices.finish()
        return image

    def _open(self) -> NiftiStream | _Whole:
        return NiftiStream(self.path) if ending_of(self.path, NIFTI_ENDINGS) else _Whole(self.path)


class _Whole:
    """The voxels of a file that cannot be read in parts."""

    def __init__(self, path: str) -> None:
        import SimpleITK as sitk

        self._image = read_image(path)
        self._values = sitk.GetArrayViewFromImage(self._image).reshape(-1)
        self.count, self._done = self._values.size, 0

    def __enter__(self) -> _Whole:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""

    def read(self, count: int) -> np.ndarray:
        """Return the next voxels in file order."""
        self._done += count
        return self._values[self._done - count : self._done]

    def finish(self) -> None:
        """Nothing is left to read."""


class _Slices:
    """The slices of an open file by rising index; those between are read and checked as well."""

    def __init__(self, volume: VolumeFile, stream: NiftiStream | _Whole, watch: Watch | None) -> None:
        self._volume, self._stream, self._watch = volume, stream, watch
        self._next = self._not_numbers = 0
        if stream.count != np.prod(volume.grid.size):
            raise ValueError(f"{stream.count} voxels in a grid of {volume.grid.size}")

    def read(self, index: int) -> np.ndarray:
        if index < self._next:
            raise AssertionError(f"slice {index} was read already")
        columns, rows, _ = self._volume.grid.size
        while self._next <= index:
            values = self._stream.read(columns * rows).reshape(rows, columns)
            self._not_numbers += count_not_numbers(values)
            if self._watch is not None and not self._not_numbers:
                self._watch(self._next, values)
            self._next += 1
        return values

    def finish(self) -> None:
        if self._next < self._volume.grid.size[2]:
            self.read(self._volume.grid.size[2] - 1)
        self._stream.finish()
        if self._not_numbers:
            raise no_numbers(self._volume.path, self._not_numbers)
