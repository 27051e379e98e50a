"""What the three forms of autoPET share: a study found on disk, and writing its volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dataset_conversion.autopet_names import StudyName
from dataset_conversion.cases import CaseWriter
from dataset_conversion.errors import ConversionError

if TYPE_CHECKING:
    import SimpleITK as sitk

    from dataset_conversion.resampling import Grid


#: What programs that save masks as pictures write for 1.
WHITE = 255


@dataclass(frozen=True)
class Study:
    """A study as found; the forms add how it is read.

    Attributes:
        name: what it is called.
        folder: where its files are; ``place`` the same relative to the source, for the report.
        files: its files.
        orientation: direction of the axes its volumes are turned to.
        labelled: False for test images whose labels are not public.
        is_test: True where the release has it among its test images.
        released_as: identifier in the release's own list of folds.
        fault: why it cannot be converted, where that shows at once.
    """

    name: StudyName
    folder: str
    files: tuple[str, ...] = ()
    place: str = ""
    orientation: str = "LPS"
    labelled: bool = True
    is_test: bool = False
    released_as: str = ""
    fault: ConversionError | None = None

    def has_lesions(self, options: Mapping[str, Any]) -> bool:
        """True where the label has a voxel that is not 0."""
        raise NotImplementedError

    def describe(self, options: Mapping[str, Any]) -> str:
        """Return what would be converted from which files."""
        raise NotImplementedError

    def convert(self, options: Mapping[str, Any], writer: CaseWriter) -> dict[str, Any]:
        """Write the study's volumes and return the record for the report."""
        raise NotImplementedError


@dataclass
class Volume:
    """One of a study's volumes.

    Attributes:
        image: the volume.
        path: the file it is in, ``""`` where it was put together from several.
        as_it_is: False where the file's values must not be taken over as they are.
        read_from: the grid it was on before it was read onto that of ``image``, None where that is its own.
    """

    image: sitk.Image
    path: str = ""
    as_it_is: bool = True
    read_from: Grid | None = None

    @property
    def grid(self) -> sitk.Image | Grid:
        """Its own grid."""
        return self.image if self.read_from is None else self.read_from


def lesion_label(label: sitk.Image, path: str, warnings: list[str]) -> tuple[sitk.Image, bool]:
    """Return a label map of 0 and 1, uint8, and whether it had these values already.

    Raises:
        ConversionError: it holds other values than 0 and 1, or 0 and 255.
    """
    import numpy as np
    import SimpleITK as sitk

    view = sitk.GetArrayViewFromImage(label)
    highest = view.max()
    set_voxels = np.count_nonzero(view)
    # Passes over bytes; the full list of values (a sort or a table) only where it is to be shown.
    several = set_voxels != (np.count_nonzero(view == highest) if highest else 0)
    if several or highest not in (0, 1, WHITE):
        values = np.unique(view).tolist()
        shown = ", ".join(f"{value:g}" for value in values[:5])
        raise ConversionError(f"holds label values {shown}", "0 and 1 are expected", path)
    if set_voxels == view.size:
        raise ConversionError("has no background: every voxel is set", "restore the file", path)
    if highest == WHITE:
        warnings.append("lesions have the value 255 in the label; written as 1")
        return sitk.Cast(label != 0, sitk.sitkUInt8), False
    return sitk.Cast(label, sitk.sitkUInt8), "integer" in label.GetPixelIDTypeAsString()


def check_tumour_covered(label: sitk.Image, image: sitk.Image | Grid, spoken: str, path: str) -> list[str]:
    """Return a warning where part of the tumour lies outside an image.

    Raises:
        ConversionError: all of it does.
    """
    import numpy as np
    import SimpleITK as sitk

    from dataset_conversion.resampling import fraction_inside

    voxels = np.argwhere(sitk.GetArrayViewFromImage(label))[:, ::-1]
    inside = fraction_inside(voxels, label, image) if len(voxels) else 1.0
    if inside == 0.0:
        raise ConversionError(f"the {spoken} does not cover the tumour", "check the geometry", path or None)
    return [f"{1 - inside:.1%} of the tumour lies outside the {spoken}"] if inside < 1.0 else []


def write_volumes(
    ct: Volume, pet: Volume, label: Volume | None, grid: str, orientation: str, writer: CaseWriter, warnings: list[str]
) -> dict[str, Any]:
    """Bring the volumes onto one grid and write them; files that fit are taken over as they are.

    Args:
        ct, pet: in HU and SUVbw.
        label: 0 and 1, or None where there is none.
        grid: ``ct`` or ``pet``.
        orientation: what the axes are turned to.
        writer: of the case.
        warnings: what was noted so far; more is added.

    Returns:
        Geometry before and after, what was resampled, and figures of the result.

    Raises:
        ConversionError: the volumes do not cover one another.
    """
    import numpy as np
    import SimpleITK as sitk

    from dataset_conversion import resampling
    from dataset_conversion.nifti import fits_as_it_is

    reference = ct if grid == "ct" else pet
    inputs = {"CT": (ct, resampling.FILL_CT), "PET": (pet, resampling.FILL_PET)}
    if label is not None:
        inputs["label"] = (label, 0.0)
    before = {name: resampling.grid_record(volume.grid) for name, (volume, _) in inputs.items()}
    resampling.check_no_hu(float(sitk.GetArrayViewFromImage(pet.image).min()), pet.path or None)
    other, spoken = (pet, "PET") if grid == "ct" else (ct, "CT")
    resampling.check_same_place(ct.grid, pet.grid, other.path or None)
    covered = resampling.overlap(reference.grid, other.grid)
    if covered < 0.99:
        warnings.append(f"the {spoken} covers {covered:.1%} of the {grid.upper()} grid; it is filled elsewhere")
    if label is not None:
        warnings += check_tumour_covered(label.image, ct.grid, "CT", label.path)
        warnings += check_tumour_covered(label.image, pet.grid, "PET", label.path)
    if resampling.is_oblique(reference.grid):
        warnings.append("the grid is oblique; nnU-Net ignores the direction, so it is kept as it is")
    resampled: dict[str, bool] = {}
    final: dict[str, sitk.Image] = {}
    for channel, (name, (volume, fill)) in zip((0, 1, None), inputs.items(), strict=False):
        same = resampling.same_grid(volume.grid, reference.grid)
        resampled[name] = not same
        fits = same and volume.as_it_is and fits_as_it_is(volume.image, volume.path, name == "label", orientation)
        if fits:
            writer.take(volume.path, channel)
            final[name] = volume.image
            continue
        nearest = name == "label"
        kind = sitk.sitkUInt8 if nearest else sitk.sitkFloat32
        moved = resampling.onto_grid(volume.image, reference.image, fill, nearest, kind)[0]
        final[name] = resampling.oriented(moved, orientation)
        if nearest:
            writer.label(final[name])
        else:
            writer.image(channel, final[name])
    highest = float(sitk.GetArrayViewFromImage(final["PET"]).max())
    if not 0.5 <= highest <= 500.0:
        warnings.append(f"the highest value of the PET is {highest:.4g}: not in SUV?")
    record = {
        "geometry_before": before,
        "geometry_after": resampling.grid_record(final["PET"]),
        "resampled": resampled,
        "highest_suv": round(highest, 4),
    }
    if label is not None:
        lesion = int(np.count_nonzero(sitk.GetArrayViewFromImage(final["label"])))
        if not lesion and np.any(sitk.GetArrayViewFromImage(label.image)):
            what = "its lesions lie outside the images"
            raise ConversionError(what, "check the geometry", label.path or None)
        record["tumour_voxels"] = lesion
        record["tumour_ml"] = round(lesion * float(np.prod(reference.image.GetSpacing())) / 1000.0, 3)
    warnings += [f"{name} was resampled to the {grid.upper()} grid" for name, moved in resampled.items() if moved]
    return {**record, "warnings": warnings}
