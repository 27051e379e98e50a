"""The NIfTI release of autoPET I and II: a folder per study with SUV.nii.gz, SEG.nii.gz and CTres.nii.gz."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dataset_conversion.autopet_names import of_folder
from dataset_conversion.autopet_study import Study, Volume, lesion_label, write_volumes
from dataset_conversion.cases import CaseWriter, Discovery
from dataset_conversion.errors import ConversionError
from dataset_conversion.nifti import usual_orientation

if TYPE_CHECKING:
    import SimpleITK as sitk

#: The report's word on SUV that came with the data.
AS_RELEASED = {"rule": "SUV as released, computed by the data's authors"}
_PARTS = {f"{part}{ending}": part for part in ("CT", "CTres", "SUV", "SEG") for ending in (".nii", ".nii.gz")}


@dataclass(frozen=True)
class ReleasedStudy(Study):
    """A study folder; ``parts`` maps CT, CTres, SUV and SEG to their files."""

    parts: Mapping[str, str] = field(default_factory=dict)

    def has_lesions(self, options: Mapping[str, Any]) -> bool:
        """True where SEG has a voxel that is not 0."""
        import SimpleITK as sitk

        from dataset_conversion.nifti import read_image

        label = read_image(self.parts["SEG"])
        return bool(sitk.GetArrayViewFromImage(label).any())

    def _ct(self, options: Mapping[str, Any]) -> str:
        return "CT" if options["grid"] == "ct" or "CTres" not in self.parts else "CTres"

    def describe(self, options: Mapping[str, Any]) -> str:
        """Return the folder and the files taken from it."""
        return f"{self.place}: {self._ct(options)}, SUV, SEG"

    def convert(self, options: Mapping[str, Any], writer: CaseWriter) -> dict[str, Any]:
        """Write CT, SUV and lesions."""
        from dataset_conversion.nifti import read_image
        from dataset_conversion.resampling import FILL_CT, check_same_place
        from dataset_conversion.volume_file import VolumeFile

        warnings: list[str] = []
        ct_path, pet_path, seg_path = self.parts[self._ct(options)], self.parts["SUV"], self.parts["SEG"]
        if "CTres" not in self.parts and options["grid"] == "pet":
            warnings.append("CTres is missing; CT was resampled to the PET grid")
        seg = read_image(seg_path)
        label, fits = lesion_label(seg, seg_path, warnings)
        pet, own = read_image(pet_path), None
        if ct_path == self.parts.get("CT") and options["grid"] == "pet":
            # It may have many times the PET's voxels.
            file = VolumeFile(ct_path)
            own = file.grid
            check_same_place(own, pet, ct_path)
            ct = file.read_onto(pet, FILL_CT)
        else:
            ct = read_image(ct_path)
        check_mask_grid(label, pet, seg_path, warnings)
        if ct_path != self.parts.get("CT"):
            check_pet_grid(ct, pet, ct_path)
        written = write_volumes(
            Volume(ct, ct_path, own is None, own), Volume(pet, pet_path), Volume(label, seg_path, fits),
            options["grid"], self.orientation, writer, warnings,
        )  # fmt: skip
        names = {name: os.path.basename(path) for name, path in (("CT", ct_path), ("PET", pet_path), ("SEG", seg_path))}
        return {"sources": {"folder": self.place, **names}, "suv": AS_RELEASED, **written}


def check_mask_grid(label: sitk.Image, pet: sitk.Image, path: str, warnings: list[str]) -> None:
    """Check that a mask has its PET's voxels; a slice or row more or less is noted, and placed by position.

    Raises:
        ConversionError: it is on another grid, which autoPET's masks never are: a mix-up or damage; or it has lesions
            outside the PET.
    """
    import numpy as np
    import SimpleITK as sitk

    from dataset_conversion import resampling

    if resampling.same_grid(label, pet):
        return
    difference = resampling.describe_difference(label, pet)
    turned = not np.allclose(label.GetDirection(), pet.GetDirection(), rtol=0, atol=1e-3)
    if turned or not resampling.same_lattice(label, pet):
        raise ConversionError(f"is on another grid than its PET ({difference})", "restore the file", path)
    voxels = np.argwhere(sitk.GetArrayViewFromImage(label))[:, ::-1]
    if len(voxels) and resampling.fraction_inside(voxels, label, pet) < 1.0:
        raise ConversionError(f"has lesions outside its PET ({difference})", "restore the file", path)
    warnings.append(f"the label has other extents than the PET ({difference}); it was placed by position")


def check_pet_grid(ct: sitk.Image, pet: sitk.Image, path: str) -> None:
    """Raise where a CT that was resampled to the PET's grid by the release is on another one: a mix-up or damage."""
    from dataset_conversion import resampling

    if not resampling.same_grid(ct, pet):
        difference = resampling.describe_difference(ct, pet)
        raise ConversionError(f"is on another grid than its PET ({difference})", "restore the file", path)


def find(
    paths: Sequence[str], options: Mapping[str, Any], discovery: Discovery, progress: Callable[[], None]
) -> list[Study]:
    """Return the study folders among some files: those that hold a SUV or a SEG."""
    folders: dict[str, dict[str, str]] = {}
    twice: dict[str, ConversionError] = {}
    for path in paths:
        folder, name = os.path.split(path)
        part = _PARTS.get(name)
        if part is not None:
            if part in folders.setdefault(folder, {}):
                twice[folder] = ConversionError(f"is there twice, also as {folders[folder][part]}", "remove one", path)
            folders[folder][part] = path
    folders = {folder: parts for folder, parts in sorted(folders.items()) if {"CTres", "SUV", "SEG"} & set(parts)}
    studies: list[Study] = []
    orientation = usual_orientation([parts["SUV"] for parts in folders.values() if "SUV" in parts])
    for folder, parts in folders.items():
        study = ReleasedStudy(
            of_folder(folder), folder, tuple(sorted(parts.values())), orientation=orientation, parts=parts
        )
        missing = sorted(({"SUV", "SEG"} | ({"CT"} if options["grid"] == "ct" else set())) - set(parts))
        study = replace(study, fault=twice.get(folder))
        missing += [] if {"CT", "CTres"} & set(parts) else ["CTres"]
        if missing:
            files = ", ".join(f"{name}.nii.gz" for name in missing)
            study = replace(study, fault=ConversionError(f"lacks {files}", "restore it"))
        studies.append(study)
    return studies
