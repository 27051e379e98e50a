"""Whether the ways in which a NIfTI header says where its voxels are agree with what ITK makes of them.

ITK takes the spacing from pixdim, and direction and origin from sform or qform, whichever it prefers, in silence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dataset_conversion import resampling
from dataset_conversion.errors import ConversionError
from dataset_conversion.nifti_stream import gzip_module, read_nifti_header

# In voxels; rounding of qform's quaternion over 1000 voxels is a tenth of it.
_APART_AT_MOST = 0.5
_TO_MM = {1: 1000.0, 3: 0.001}
_REMEDY = "write the file anew with one geometry, resampled if it is sheared"


def _header(path: str) -> Any:
    opener = gzip_module().open if path.lower().endswith(".gz") else open
    with opener(path, "rb") as stream:
        return read_nifti_header(stream)


def _forms(header: Any) -> dict[str, np.ndarray]:
    """Return the matrices from voxel index to mm (RAS) that the header gives: those whose code is not 0."""
    scale = np.diag([*[_TO_MM.get(int(header["xyzt_units"]) & 7, 1.0)] * 3, 1.0])
    found = {}
    if header["sform_code"] > 0:
        found["sform"] = scale @ header.get_sform()
    if header["qform_code"] > 0:
        found["qform"] = scale @ header.get_qform()
    return found


def check_finite(path: str) -> None:
    """Raise where a header holds numbers that are none, of which ITK speaks on the terminal only."""
    try:
        header = _header(path)
        values = [header["pixdim"][1:4]]
        values += [header[f"srow_{axis}"] for axis in "xyz"] if header["sform_code"] > 0 else []
        if header["qform_code"] > 0:
            values += [header[f"quatern_{part}"] for part in "bcd"] + [header[f"qoffset_{axis}"] for axis in "xyz"]
        finite = all(np.isfinite(np.asarray(item, float)).all() for item in values)
    except Exception:  # no NIfTI header at all: ITK's reader says so
        return
    if not finite:
        raise ConversionError(
            "its header has a geometry that is no numbers (NaN or infinite)", "restore the file", path
        )


def check_forms(path: str, grid: resampling.Grid) -> None:
    """Raise where a form of the header puts corners elsewhere than ITK does: sheared, or two forms that contradict.

    Args:
        path: NIfTI file.
        grid: what ITK made of it.
    """
    try:
        forms = _forms(_header(path))
    except Exception as error:
        raise ConversionError(f"its geometry cannot be read ({error})", "restore the file", path) from error
    ends = [(0, size - 1) for size in grid.size]
    index = np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(-1, 3)
    expected = resampling.to_world(grid, index.astype(float))
    for name, matrix in forms.items():
        placed = (index @ matrix[:3, :3].T + matrix[:3, 3]) * (-1.0, -1.0, 1.0)
        apart = float(np.abs(placed - expected).max())
        if apart <= _APART_AT_MOST * min(grid.spacing):
            continue
        axes = matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
        if np.abs(axes.T @ axes - np.eye(3)).max() > 1e-3:
            raise ConversionError(f"its {name} is sheared (gantry tilt?), by {apart:.1f} mm at a corner", _REMEDY, path)
        what = f"its sform, qform and pixdim do not agree: {apart:.1f} mm apart at a corner"
        raise ConversionError(what, _REMEDY, path)
