"""The voxels of a NIfTI file in file order, every byte accounted for, without holding more than is asked for."""

from __future__ import annotations

import os
from typing import IO, Any

import numpy as np

_CHUNK = 1 << 22
# A byte of deflate's output stands for 1032 bytes at the most.
_DEFLATE_AT_MOST = 1040


def gzip_module() -> Any:
    """Return the module that does gzip's work: ISA-L's where there is one for this machine."""
    try:
        from isal import igzip
    except ImportError:
        import gzip

        return gzip
    return igzip


def read_nifti_header(stream: IO[bytes]) -> Any:
    """Return nibabel's header of an open NIfTI file, which is read up to the header's end."""
    import nibabel

    start = stream.read(4)
    kind = nibabel.Nifti2Header if start in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nibabel.Nifti1Header
    # Without nibabel's own check, which speaks on the terminal.
    return kind(start + stream.read(kind.sizeof_hdr - len(start)), check=False)


class NiftiStream:
    """An open NIfTI file, compressed or not, read from its first voxel to its last byte.

    Args:
        path: ending in ``.nii`` or ``.nii.gz``.

    Attributes:
        count: number of voxels.

    Raises:
        EOFError, OSError, ValueError, zlib's errors: the file is cut off or damaged; so do ``read`` and ``finish``.
    """

    def __init__(self, path: str) -> None:
        self._path, self._packed = path, path.lower().endswith(".gz")
        opener = gzip_module().open if self._packed else open
        self._stream: IO[bytes] = opener(path, "rb")
        try:
            self._read_header()
        except BaseException:
            self._stream.close()
            raise

    def _read_header(self) -> None:
        header = read_nifti_header(self._stream)
        length = header.sizeof_hdr
        self._kind, self.count = header.get_data_dtype(), int(np.prod(header.get_data_shape()))
        offset = int(header.get_data_offset())
        if offset < length + 4:
            # Programs differ in where they then begin to read.
            raise ValueError(f"vox_offset is {offset}, the header takes {length + 4} bytes")
        size, claimed = os.path.getsize(self._path), offset + self.count * self._kind.itemsize
        if min(header.get_data_shape(), default=0) < 1 or claimed > size * (_DEFLATE_AT_MOST if self._packed else 1):
            # Before an array of that size is asked for.
            raise EOFError(f"its header claims {claimed} bytes, the file has {size}")
        self._stream.read(offset - length)
        slope, intercept = header.get_slope_inter()
        self._scaling = None
        if slope not in (None, 1.0) or intercept not in (None, 0.0):
            self._scaling = (1.0 if slope is None else slope, intercept or 0.0)
        self._done = 0

    def __enter__(self) -> NiftiStream:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def read(self, count: int) -> np.ndarray:
        """Return the next voxels in file order, after slope and intercept, of a type that SimpleITK has."""
        values = np.empty(count, self._kind)
        view, filled = memoryview(values.view(np.uint8)), 0
        while filled < len(view):
            # Parts that stay in the processor's cache between decompression and checksum.
            got = self._stream.readinto(view[filled : filled + _CHUNK])
            if not got:
                read = self._done * self._kind.itemsize + filled
                raise EOFError(f"{read} of {self.count * self._kind.itemsize} bytes of voxels")
            filled += got
        self._done += count
        if self._scaling is not None:
            values = values * self._scaling[0] + self._scaling[1]
        if values.dtype == np.float16 or not values.dtype.isnative:
            values = values.astype(np.float32 if values.dtype == np.float16 else values.dtype.newbyteorder("="))
        return values

    def finish(self) -> None:
        """Read to the end of the file: the checksum of a compressed one is behind its last byte."""
        while self._stream.read(_CHUNK):
            pass
