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
# Reconstruction leaves small negative values.
_LOWEST_SUV = -50.0
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


def grid_of(image: sitk.Image | Grid) -> Grid:
    """Return the grid of an image."""
    return Grid(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())


def _steps(grid: sitk.Image | Grid) -> np.ndarray:
    return np.array(grid.GetDirection()).reshape(3, 3) * np.array(grid.GetSpacing())


def to_world(grid: sitk.Image | Grid, index: np.ndarray) -> np.ndarray:
    """Return the positions (n, 3), mm, LPS, of voxel indices (n, 3), order x, y, z."""
    return index @ _steps(grid).T + np.array(grid.GetOrigin())


def to_index(grid: sitk.Image | Grid, points: np.ndarray) -> np.ndarray:
    """Return the continuous voxel indices (n, 3), order x, y, z, of positions (n, 3) in mm, LPS."""
    return (points - np.array(grid.GetOrigin())) @ np.linalg.inv(_steps(grid)).T


def part_of(grid: sitk.Image | Grid, low: np.ndarray, size: np.ndarray) -> Grid:
    """Return the grid of a box of another grid's voxels, from the index of its first voxel and its size (x, y, z)."""
    (origin,) = to_world(grid, np.array([low], dtype=float))
    return Grid(tuple(map(int, size)), grid.GetSpacing(), tuple(origin.tolist()), grid.GetDirection())


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


def same_lattice(first: sitk.Image | Grid, second: sitk.Image | Grid, within: float = LATTICE_VOXELS) -> bool:
    """True where the voxels of both images lie on one lattice, though one may have more of them.

    Args:
        first, second: images or grids; axes may be swapped or run the other way.
        within: how far apart voxels may be, in voxels.
    """
    # A step along an axis of the one must be a step along some axis of the other.
    turn = np.linalg.inv(_steps(second)) @ _steps(first)
    if not np.array_equal(np.abs(turn.round()).sum(axis=0), np.ones(3)) or not np.linalg.det(turn.round()):
        return False
    stretched = np.abs(turn - turn.round()) @ np.array(first.GetSize())
    index = to_index(second, corners(first))
    return bool(stretched.max() <= within and np.abs(index - index.round()).max() <= within)


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


def check_no_hu(lowest: float, path: str | None) -> None:
    """Raise where a PET's lowest value is one that only a CT has: files that were mixed up."""
    if lowest < _LOWEST_SUV:
        what = f"the lowest value of the PET is {lowest:g}, and SUV is not negative"
        raise ConversionError(what, "check whether CT and PET were swapped", path)


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
    image: sitk.Image, reference: sitk.Image | Grid, fill: float, nearest: bool = False, kind: int | None = None
) -> tuple[sitk.Image, bool]:
    """Return the image on the grid of ``reference``, and whether it had to be resampled.

    Args:
        image: moving image.
        reference: the grid that is wanted.
        fill: value outside the image.
        nearest: nearest neighbour (masks) instead of linear interpolation.
        kind: SimpleITK pixel type of the result; that of the image where None.
    """
    import SimpleITK as sitk

    kind = image.GetPixelID() if kind is None else kind
    if same_grid(image, reference):
        copy = sitk.Image(as_type(image, kind))
        set_geometry(copy, reference)
        return copy, False
    return resampled(image, reference, fill, nearest, kind), True


def set_geometry(image: sitk.Image, grid: sitk.Image | Grid) -> sitk.Image:
    """Give an image a grid's spacing, origin and direction; returns it."""
    image.SetSpacing(grid.GetSpacing())
    image.SetOrigin(grid.GetOrigin())
    image.SetDirection(grid.GetDirection())
    return image


def resampled(image: sitk.Image, grid: sitk.Image | Grid, fill: float, nearest: bool, kind: int) -> sitk.Image:
    """Return an image interpolated at the voxels of a grid; arguments as in ``onto_grid``."""
    import SimpleITK as sitk

    filter_ = sitk.ResampleImageFilter()
    filter_.SetSize(grid.GetSize())
    filter_.SetOutputSpacing(grid.GetSpacing())
    filter_.SetOutputOrigin(grid.GetOrigin())
    filter_.SetOutputDirection(grid.GetDirection())
    filter_.SetInterpolator(sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear)
    filter_.SetDefaultPixelValue(fill)
    filter_.SetOutputPixelType(kind)
    return filter_.Execute(image)


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


def oriented_grid(grid: sitk.Image | Grid, code: str = "LPS") -> Grid:
    """Return the grid that ``oriented`` gives an image."""
    import SimpleITK as sitk

    voxel = set_geometry(sitk.Image(1, 1, 1, sitk.sitkUInt8), grid)
    turn = sitk.DICOMOrientImageFilter()
    turn.SetDesiredCoordinateOrientation(code)
    exact = oriented(turn.Execute(voxel), code)
    order, flip = list(turn.GetPermuteOrder()), turn.GetFlipAxes()
    size = np.array(grid.GetSize())
    first = np.zeros(3)
    for axis, source in enumerate(order):
        first[source] = size[source] - 1 if flip[axis] else 0
    (origin,) = to_world(grid, first[None])
    return Grid(tuple(size[order].tolist()), exact.GetSpacing(), tuple(origin.tolist()), exact.GetDirection())


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
    index = to_index(image, to_world(grid, voxels))
    inside = ((index >= -0.5) & (index <= np.array(image.GetSize()) - 0.5)).all(axis=1)
    return float(inside.mean())
