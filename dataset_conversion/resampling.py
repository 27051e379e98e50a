"""Bringing images of one case onto one grid, by physical coordinates."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_conversion.errors import ConversionError

if TYPE_CHECKING:
    import SimpleITK as sitk

# Corners of two grids that differ by less than this part of a voxel are rounding (NIfTI keeps affines as float32).
SAME_GRID_VOXELS = 0.01
LATTICE_VOXELS = 0.05
# CT and PET of one examination overlap by most of the smaller one; with a mirrored axis by a few per cent.
SHARED_AT_LEAST = 0.2
AXIS_TOLERANCE = 1e-4
FILL_CT = -1024.0
FILL_PET = 0.0


@dataclass(frozen=True)
class Grid:
    """Size, spacing, origin and direction (x, y, z order, mm, LPS) of voxels that are not in memory.

    It answers as a SimpleITK image does where only geometry is asked for.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]

    def GetSize(self) -> tuple[int, int, int]:
        """Return the number of voxels."""
        return self.size

    def GetSpacing(self) -> tuple[float, float, float]:
        """Return the spacing in mm."""
        return self.spacing

    def GetOrigin(self) -> tuple[float, float, float]:
        """Return the centre of the first voxel in mm."""
        return self.origin

    def GetDirection(self) -> tuple[float, ...]:
        """Return the direction matrix row by row."""
        return self.direction


def to_world(grid: sitk.Image | Grid, index: np.ndarray) -> np.ndarray:
    """Return the positions (n, 3), mm, LPS, of voxel indices (n, 3), order x, y, z."""
    matrix = np.array(grid.GetDirection()).reshape(3, 3) * np.array(grid.GetSpacing())
    return index @ matrix.T + np.array(grid.GetOrigin())


def corners(image: sitk.Image | Grid) -> np.ndarray:
    """Return the physical positions of the eight corner voxels, shape (8, 3), mm, LPS."""
    ends = [(0, size - 1) for size in image.GetSize()]
    return to_world(image, np.array(list(itertools.product(*ends)), dtype=float))


def same_grid(first: sitk.Image | Grid, second: sitk.Image | Grid) -> bool:
    """True where both images have the same size and the same corners to 1 % of a voxel."""
    if first.GetSize() != second.GetSize():
        return False
    apart = np.abs(corners(first) - corners(second)).max()
    return bool(apart <= SAME_GRID_VOXELS * min(*first.GetSpacing(), *second.GetSpacing()))


def as_type(image: sitk.Image, kind: int) -> sitk.Image:
    """Return the image with voxels of a SimpleITK pixel type; the same image where it has them already."""
    import SimpleITK as sitk

    return image if image.GetPixelID() == kind else sitk.Cast(image, kind)


def same_lattice(first: sitk.Image, second: sitk.Image) -> bool:
    """True where the voxels of both images lie on one lattice, though one may have more of them (to 5 % of a voxel)."""
    if not np.allclose(first.GetDirection(), second.GetDirection(), rtol=0, atol=1e-3):
        return False
    drift = np.abs(np.array(first.GetSpacing()) - np.array(second.GetSpacing())) * np.array(first.GetSize())
    if (drift > LATTICE_VOXELS * np.array(second.GetSpacing())).any():
        return False
    offset = np.array(second.TransformPhysicalPointToContinuousIndex(first.GetOrigin()))
    return bool(np.abs(offset - offset.round()).max() <= LATTICE_VOXELS)


def overlap(grid: sitk.Image | Grid, image: sitk.Image | Grid) -> float:
    """Return which part of a grid's box lies within another image's box, 0 to 1, to about 1 %."""
    axes = [np.unique(np.linspace(0, size - 1, 24).round()) for size in grid.GetSize()]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return fraction_inside(points, grid, image)


def check_same_place(ct: sitk.Image | Grid, pet: sitk.Image | Grid, path: str | None) -> None:
    """Raise where CT and PET share so little that they cannot be of one examination, or an axis is mirrored."""
    shared = max(overlap(ct, pet), overlap(pet, ct))
    if shared >= SHARED_AT_LEAST:
        return
    what = "CT and PET lie at different places: they share "
    what += f"{shared:.1%} of the smaller one" if shared else "no part"
    raise ConversionError(what, "check direction and origin, or whether they are of one patient", path)


def describe_difference(image: sitk.Image | Grid, other: sitk.Image | Grid) -> str:
    """Return in words what differs between two grids: size, spacing, direction or position."""
    sizes = image.GetSize(), other.GetSize()
    if sizes[0] != sizes[1]:
        return f"size {sizes[0]} and {sizes[1]}"
    for name, values in (
        ("spacing", (image.GetSpacing(), other.GetSpacing())),
        ("direction", (image.GetDirection(), other.GetDirection())),
        ("origin", (image.GetOrigin(), other.GetOrigin())),
    ):
        if not np.allclose(*values, rtol=1e-3, atol=1e-3):
            first, second = (tuple(round(value, 4) for value in item) for item in values)
            return f"{name} {first} and {second}"
    return "corners that differ"


def onto_grid(
    image: sitk.Image, reference: sitk.Image, fill: float, nearest: bool = False, kind: int | None = None
) -> tuple[sitk.Image, bool]:
    """Return the image on the grid of ``reference``, and whether it had to be resampled.

    Args:
        image: moving image.
        reference: image whose grid is wanted.
        fill: value outside the image.
        nearest: nearest neighbour (masks) instead of linear interpolation.
        kind: SimpleITK pixel type of the result; that of the image where None.
    """
    import SimpleITK as sitk

    kind = image.GetPixelID() if kind is None else kind
    if same_grid(image, reference):
        copy = sitk.Image(as_type(image, kind))
        copy.CopyInformation(reference)
        return copy, False
    interpolator = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    return sitk.Resample(image, reference, sitk.Transform(), interpolator, fill, kind), True


def orientation_code(image: sitk.Image | Grid) -> str:
    """Return the directions the axes run to, e.g. ``LPS`` for the identity direction."""
    import SimpleITK as sitk

    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())


def is_oblique(image: sitk.Image | Grid) -> bool:
    """True where the axes are not parallel to the patient's axes."""
    direction = np.abs(np.array(image.GetDirection()).reshape(3, 3))
    return bool(np.abs(direction - direction.round()).max() > AXIS_TOLERANCE)


def oriented(image: sitk.Image, code: str = "LPS") -> sitk.Image:
    """Return the image with its axes permuted and flipped to ``code``; voxels are not resampled.

    nnU-Net's SimpleITK reader ignores the direction, so all cases of a dataset need the same one. Directions that
    differ from the patient's axes by rounding only are made exact.
    """
    import SimpleITK as sitk

    turned = image if orientation_code(image) == code else sitk.DICOMOrient(image, code)
    direction = tuple((np.array(turned.GetDirection()).round() + 0.0).tolist())
    if is_oblique(turned) or turned.GetDirection() == direction:
        return turned
    exact = sitk.Image(turned)
    exact.SetDirection(direction)
    return exact


def grid_record(image: sitk.Image | Grid) -> dict[str, Any]:
    """Return size, spacing, origin and direction (x, y, z order, mm, LPS), ready for JSON."""
    return {
        "size": list(image.GetSize()),
        "spacing": [round(value, 6) for value in image.GetSpacing()],
        "origin": [round(value, 4) for value in image.GetOrigin()],
        "direction": [round(value, 6) + 0.0 for value in image.GetDirection()],
        "orientation": orientation_code(image),
    }


def fraction_inside(voxels: np.ndarray, grid: sitk.Image | Grid, image: sitk.Image | Grid) -> float:
    """Return which part of some voxels of a grid lies within another image.

    Args:
        voxels: indices on ``grid``, shape (n, 3), order x, y, z.
        grid: image the indices belong to.
        image: the other image.

    Returns:
        0 to 1.
    """
    world = to_world(grid, voxels)
    to_index = np.linalg.inv(np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing()))
    index = (world - np.array(image.GetOrigin())) @ to_index.T
    inside = ((index >= -0.5) & (index <= np.array(image.GetSize()) - 0.5)).all(axis=1)
    return float(inside.mean())
