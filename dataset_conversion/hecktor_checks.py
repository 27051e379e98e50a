"""What is checked of HECKTOR's voxels while they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dataset_conversion import resampling
from dataset_conversion.errors import ConversionError
from dataset_conversion.hecktor_layouts import patient_key

if TYPE_CHECKING:
    from dataset_conversion.resampling import Grid
    from dataset_conversion.volume_file import VolumeFile

#: The organisers computed SUV with an assumed weight of 75 kg (list_approx_weight.txt of voreille/hecktor).
APPROXIMATE_WEIGHT = tuple(f"{centre}{number:03d}" for centre in ("HMR", "CHMR") for number in (5, 16, 24, 29, 30, 34))
# A mask may end a voxel before or after its CT; its tumour may not lie outside.
_LOST_AT_MOST = 0.01
_HIGHEST_SUV = 3000.0
# Values of a label that is refused, in its error.
_SHOWN = 5


class Range:
    """The lowest and highest value of the slices it is shown."""

    def __init__(self) -> None:
        self.lowest, self.highest = np.inf, -np.inf

    def __call__(self, index: int, values: np.ndarray) -> None:
        """Take in a slice."""
        self.lowest = min(self.lowest, float(values.min()))
        self.highest = max(self.highest, float(values.max()))


def value_warnings(ct: Range, pet: Range, patient: str, path: str) -> list[str]:
    """Return warnings on values that are hardly HU or SUV, and on SUV of an assumed weight.

    Raises:
        ConversionError: the PET (at ``path``) has values that only a CT has.
    """
    warnings = []
    resampling.check_no_hu(pet.lowest, path)
    if ct.lowest > -200:
        warnings.append(f"the lowest value of the CT is {ct.lowest:g}: not in HU?")
    if pet.highest > _HIGHEST_SUV or pet.highest < 0.5:
        warnings.append(f"the highest value of the PET is {pet.highest:.4g}: not in SUV?")
    if patient_key(patient) in APPROXIMATE_WEIGHT:
        warnings.append("its SUV was computed by the organisers with an assumed weight of 75 kg")
    return warnings


class LabelCheck:
    """Values and place of a label's tumour, from the slices it is shown.

    Args:
        label: where the slices come from.
        labels: allowed values by name.
        ct, pet: their grids.
        reference: the grid that is written.

    Attributes:
        counts: voxels of each value.
    """

    def __init__(self, label: VolumeFile, labels: Mapping[str, int], ct: Grid, pet: Grid, reference: Grid) -> None:
        self._label, self._allowed = label, set(labels.values())
        self._ct, self._grids = ct, {"ct": ct, "pet": pet, "reference": reference}
        self.counts: Counter[int] = Counter()
        self._others: set[float] = set()
        self._inside = dict.fromkeys(self._grids, 0.0)

    def __call__(self, index: int, values: np.ndarray) -> None:
        """Take in a slice."""
        rows, columns = np.nonzero(values)
        found = values[rows, columns]
        for value in np.unique(found).tolist():
            if value in self._allowed:
                self.counts[int(value)] += int(np.count_nonzero(found == value))
            elif len(self._others) < _SHOWN:
                self._others.add(value)
        self.counts[0] += values.size - len(found)
        if len(found):
            voxels = np.stack([columns, rows, np.full(len(rows), index)], axis=1)
            for name, grid in self._grids.items():
                self._inside[name] += resampling.fraction_inside(voxels, self._label.grid, grid) * len(voxels)

    def warnings(self) -> list[str]:
        """Return warnings on a label of another size than its CT, and on tumour outside the region.

        Raises:
            ConversionError: a value is not allowed, tumour lies outside the CT, or all of it outside PET or region.
        """
        path, warnings = self._label.path, []
        if self._others:
            shown = ", ".join(f"{value:g}" for value in sorted(self._others))
            expected = ", ".join(str(value) for value in sorted(self._allowed))
            raise ConversionError(f"holds label values {shown}", f"{expected} are expected", path)
        if not resampling.same_grid(self._label.grid, self._ct):
            difference = resampling.describe_difference(self._label.grid, self._ct)
            warnings.append(f"label and CT differ ({difference}); the label was placed by physical coordinates")
        tumour = sum(count for value, count in self.counts.items() if value)
        if not tumour:
            return [*warnings, "has no tumour"]
        outside = 1.0 - self._inside["ct"] / tumour
        if outside > _LOST_AT_MOST:
            what = f"{outside:.1%} of its tumour lies outside the CT"
            raise ConversionError(what, "check the label's geometry", path)
        unseen = 1.0 - self._inside["pet"] / tumour
        if unseen > 1.0 - 1e-9:
            raise ConversionError("the PET does not cover the tumour", "check the geometry of PET and label", path)
        if unseen > 1e-9:
            warnings.append(f"{unseen:.2%} of the tumour lies outside the PET; SUV is 0 there")
        lost = 1.0 - self._inside["reference"] / tumour
        if lost > 1.0 - 1e-9:
            raise ConversionError("all of its tumour lies outside the region", "use another --crop", path)
        if lost > 1e-9:
            warnings.append(f"{lost:.2%} of the tumour lies outside the region and is cut off")
        return warnings
