"""Label files of a reference and a predicted folder: which belong together, and whether they lie on one grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from dataset_conversion import nifti
from dataset_conversion.errors import ConversionError
from dataset_conversion.nifti import VOLUME_ENDINGS, ending_of
from nnunet_h2a.command import CommandError

ENDINGS = (*VOLUME_ENDINGS, ".png", ".bmp", ".tif", ".tiff")
#: Grids are one where no corner of the volume is moved by more than this part of a voxel.
TOLERANCE = 0.05
# Voxels looked at in one go where a whole copy of the volume would be too much.
_CHUNK = 1 << 22


class CaseError(Exception):
    """This case cannot be scored: the message says why and what to do, without the case's name."""


@dataclass(frozen=True)
class Pair:
    """Files of one case.

    Attributes:
        case: identifier.
        reference: the true labels.
        predicted: the predicted labels.
        pet: PET image, or None.
    """

    case: str
    reference: Path
    predicted: Path
    pet: Path | None = None


def label_files(folder: Path) -> dict[str, Path]:
    """Label files of a folder by case identifier, in the order of the identifiers.

    Raises:
        CaseError: where two files have one identifier.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((e for e in ENDINGS if path.name.casefold().endswith(e)), None)
        # macOS leaves files that begin with a dot beside every file on some drives.
        if ending is None or path.name.startswith(".") or not path.is_file():
            continue
        case = path.name[: -len(ending)]
        if case in found:
            raise CaseError(f"{found[case].name} and {path.name} in {folder} are both case {case}: remove one")
        found[case] = path
    return dict(sorted(found.items()))


def read_image(path: Path) -> sitk.Image:
    """A volume, or a picture as a volume of one slice.

    Raises:
        CaseError: where it cannot be read, is cut off, or holds values that are no numbers.
    """
    if ending_of(str(path), VOLUME_ENDINGS):
        try:
            # SimpleITK alone would read a cut file in silence, and NaN as 0.
            return nifti.read_image(str(path))
        except ConversionError as error:
            raise CaseError(str(error)) from error
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise CaseError(f"{path} cannot be read as an image: restore the file") from error
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise CaseError(f"{path} has {image.GetNumberOfComponentsPerPixel()} colours: give one number per pixel")
    image = sitk.JoinSeries(image) if image.GetDimension() == 2 else image
    if image.GetDimension() != 3:
        raise CaseError(f"{path} has {image.GetDimension()} axes: one volume per file is needed")
    return image


@dataclass(frozen=True)
class Grid:
    """Where a volume's voxels are, without the voxels; axes in ITK's order, (x, y, z)."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, image: sitk.Image) -> Grid:
        """The grid of an image with three axes."""
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    def corners(self) -> np.ndarray:
        """Positions of the centres of the eight outermost voxels in mm."""
        ends = np.array(list(product(*((0, max(length - 1, 1)) for length in self.size))), float)
        return np.array(self.origin) + (ends * self.spacing) @ np.array(self.direction).reshape(3, 3).T


def difference_of_grids(one: Grid, other: Grid) -> str | None:
    """What differs between two grids, in words; None where they are one."""
    if one.size != other.size:
        return f"{_times(one.size)} and {_times(other.size)} voxels"
    moved = np.abs(one.corners() - other.corners()).max()
    if moved <= TOLERANCE * min(one.spacing):
        return None
    if not np.allclose(one.spacing, other.spacing, rtol=1e-3):
        return f"spacings {_times(one.spacing)} and {_times(other.spacing)} mm"
    return f"positions or orientations, by up to {moved:.3g} mm"


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.6g}" for number in numbers)


def on_grid_of(grid: Grid, image: sitk.Image, is_mask: bool = True) -> sitk.Image:
    """An image resampled by physical coordinates; 0 outside. Masks by nearest neighbour, others linearly."""
    interpolator = sitk.sitkNearestNeighbor if is_mask else sitk.sitkLinear
    return sitk.Resample(
        image, grid.size, sitk.Transform(), interpolator, grid.origin, grid.spacing, grid.direction, 0.0,
        image.GetPixelID(),
    )  # fmt: skip


def labels_of(image: sitk.Image, path: Path) -> np.ndarray:
    """A label image as an array, (z, y, x), of the smallest integer type that holds it.

    Raises:
        CaseError: where values are no integers from 0.
    """
    array = sitk.GetArrayViewFromImage(image)
    if array.dtype == np.uint8:
        return sitk.GetArrayFromImage(image)
    flat = array.reshape(-1)
    largest = 0.0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if not (part == np.floor(part)).all() or part.min() < 0:
            raise CaseError(f"{path} holds values that are no labels: only whole numbers from 0 are")
        largest = max(largest, float(part.max()))
    if largest > np.iinfo(np.int32).max:
        raise CaseError(f"{path} holds the label {largest:g}: no mask has so many")
    return array.astype(np.min_scalar_type(int(largest)))


def labels_in(array: np.ndarray) -> set[int]:
    """The labels that occur, without background."""
    flat, found = array.reshape(-1), set()
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        # Counting does not sort, and takes memory for every number up to the largest.
        occurring = np.flatnonzero(np.bincount(part)) if part.itemsize <= 2 else np.unique(part)
        found |= set(occurring.tolist())
    return found - {0}


def foreground(array: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Where an array has any of some labels, bool."""
    mask = array == labels[0]
    for label in labels[1:]:
        mask |= array == label
    return mask


@dataclass(frozen=True)
class Labels:
    """Which labels are scored.

    Attributes:
        named: name of each label or region, and the integers it is made of.
        ignored: the label whose voxels count neither way, or None.
        known: all integers that a file may hold; None: any.
    """

    named: Mapping[str, tuple[int, ...]]
    ignored: int | None = None
    known: frozenset[int] | None = None

    def scored(self) -> Iterator[tuple[int | list[int], str, tuple[int, ...]]]:
        """Label as the evaluation file names it, its name, and its integers."""
        for name, integers in self.named.items():
            yield (integers[0] if len(integers) == 1 else list(integers)), name, integers


def labels_of_dataset(dataset_json: Mapping[str, Any], path: Path) -> Labels:
    """Labels of nnU-Net's dataset.json: regions where there are any, as nnU-Net's own evaluation does.

    Args:
        dataset_json: content.
        path: of the file, for the error.

    Raises:
        CommandError: where its labels are not as nnU-Net wants them.
    """
    try:
        entries = {str(name): _integers(value) for name, value in dict(dataset_json["labels"]).items()}
    except (TypeError, ValueError) as error:
        raise CommandError(
            f'{path}: "labels" must give integers by name, as in {{"background": 0, "tumor": 1}}, found '
            f"{dataset_json['labels']!r:.100}"
        ) from error
    ignored = entries.pop("ignore", (None,))[0]
    known = frozenset(i for value in entries.values() for i in value) | {0}
    named = {name: value for name, value in entries.items() if value != (0,)}
    if len(set(named.values())) < len(named):
        raise CommandError(f'{path}: "labels" has two names for the same label: {named}; leave one')
    if not named:
        raise CommandError(f'{path}: "labels" has no label beside the background')
    return Labels(named, ignored, known | ({ignored} if ignored is not None else set()))


def _integers(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in values):
        raise ValueError(f"{value!r} is no label")
    return tuple(values)
