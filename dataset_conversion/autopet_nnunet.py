"""The releases of autoPET III to V: nnU-Net folders, ``imagesTr/<id>_0000`` (CT), ``_0001`` (PET in SUV), ``labelsTr``.

Which channel is CT and which PET is checked by their values: the baseline of autoPET I had them the other way round.
Further channels (the clicks of autoPET IV) are left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dataset_conversion.autopet_names import of_file
from dataset_conversion.autopet_release import AS_RELEASED, check_mask_grid, check_pet_grid
from dataset_conversion.autopet_study import Study, Volume, lesion_label, write_volumes
from dataset_conversion.cases import CaseWriter, Discovery
from dataset_conversion.errors import ConversionError
from dataset_conversion.nifti import NIFTI_ENDINGS, ending_of, usual_orientation

if TYPE_CHECKING:
    import SimpleITK as sitk

_CHANNEL = re.compile(r"^(?P<identifier>.+)_(?P<channel>\d{4})$")
#: Air is about -1000 HU in a CT; SUV is never far below 0, interpolation may undershoot a little.
HU_OF_AIR_AT_MOST = -200.0
SUV_AT_LEAST = -20.0
SPLITS = "splits_final.json"


@dataclass(frozen=True)
class NnunetStudy(Study):
    """A case of an nnU-Net raw dataset: its two channels and (``""`` where there is none) its label."""

    channels: tuple[str, str] = ("", "")
    label: str = ""
    more_channels: int = 0

    def has_lesions(self, options: Mapping[str, Any]) -> bool:
        """True where the label has a voxel that is not 0."""
        import SimpleITK as sitk

        from dataset_conversion.nifti import read_image

        label = read_image(self.label)
        return bool(sitk.GetArrayViewFromImage(label).any())

    def describe(self, options: Mapping[str, Any]) -> str:
        """Return the files it is made of."""
        files = [os.path.basename(path) for path in (*self.channels, self.label) if path]
        return f"{self.place}: {', '.join(files)}"

    def convert(self, options: Mapping[str, Any], writer: CaseWriter) -> dict[str, Any]:
        """Write CT, SUV and, where it is public, the label."""
        from dataset_conversion.nifti import read_image

        warnings: list[str] = []
        images = [read_image(path) for path in self.channels]
        first = _channel_of_ct(images, self.channels)
        ct, pet = (Volume(images[index], self.channels[index]) for index in (first, 1 - first))
        if first == 1:
            warnings.append("channel 0 is PET and channel 1 CT, by their values; they were exchanged")
        if self.more_channels:
            warnings.append(f"{self.more_channels} further channels were left out")
        check_pet_grid(ct.image, pet.image, ct.path)
        label = None
        if self.labelled:
            stored = read_image(self.label)
            values, fits = lesion_label(stored, self.label, warnings)
            check_mask_grid(values, pet.image, self.label, warnings)
            label = Volume(values, self.label, fits)
        written = write_volumes(ct, pet, label, options["grid"], self.orientation, writer, warnings)
        files = {"CT": ct.path, "PET": pet.path, "label": self.label}
        return {
            "sources": {"released_as": self.released_as, **_relative(files, self.folder)},
            "suv": AS_RELEASED,
            **written,
        }


def _relative(files: Mapping[str, str], folder: str) -> dict[str, str]:
    return {name: os.path.relpath(path, folder) for name, path in files.items() if path}


def _channel_of_ct(images: Sequence[sitk.Image], paths: Sequence[str]) -> int:
    """Return which of two channels is CT.

    Raises:
        ConversionError: the values fit neither order.
    """
    import SimpleITK as sitk

    lowest = [float(sitk.GetArrayViewFromImage(image).min()) for image in images]
    for first in (0, 1):
        if lowest[first] <= HU_OF_AIR_AT_MOST and lowest[1 - first] >= SUV_AT_LEAST:
            return first
    raise ConversionError(
        f"CT and PET cannot be told apart: the lowest values of the two channels are {lowest[0]:g} and {lowest[1]:g}, "
        f"where a CT in HU goes below {HU_OF_AIR_AT_MOST:g} and PET in SUV does not go below 0",
        "give CT in HU and PET in SUV",
        paths[0],
    )


def find(
    paths: Sequence[str], options: Mapping[str, Any], discovery: Discovery, progress: Callable[[], None]
) -> list[Study]:
    """Return the cases of nnU-Net folders among some files, and take over their folds."""
    channels: dict[tuple[str, str], dict[int, str]] = {}
    volumes: dict[tuple[str, str], str] = {}
    twice: dict[str, ConversionError] = {}
    folds: list[str] = []
    for path in paths:
        folder, name = os.path.split(path)
        ending = ending_of(name, NIFTI_ENDINGS)
        if name == SPLITS:
            folds.append(path)
        if not ending:
            continue
        stem = name[: -len(ending)]
        if (folder, stem) in volumes:
            what = f"is there twice, also as {volumes[folder, stem]}"
            twice[stem] = ConversionError(what, "remove one of the two", path)
        match = _CHANNEL.match(stem)
        if match is not None:
            channels.setdefault((folder, match["identifier"]), {})[int(match["channel"])] = path
        # A label's name may end in four digits as well.
        volumes[folder, stem] = path
    studies: list[Study] = []
    first = [files[0] for files in channels.values() if 0 in files]
    orientation = usual_orientation(first)
    for (folder, identifier), files in sorted(channels.items()):
        images, parent = os.path.basename(folder), os.path.dirname(folder)
        labels = os.path.join(parent, images.replace("images", "labels", 1))
        if not images.startswith("images"):
            continue
        label = volumes.get((labels, identifier), "")
        study = NnunetStudy(
            of_file(identifier), parent, tuple(sorted([*files.values(), *([label] if label else [])])),
            orientation=orientation, labelled=bool(label), is_test=images == "imagesTs", released_as=identifier,
            channels=(files.get(0, ""), files.get(1, "")), label=label, more_channels=len(set(files) - {0, 1}),
        )  # fmt: skip
        names = (identifier, f"{identifier}_0000", f"{identifier}_0001")
        study = replace(study, fault=next((twice[name] for name in names if name in twice), None))
        missing = [f"{images}/{identifier}_{channel:04d}.nii.gz" for channel in (0, 1) if channel not in files]
        if not label and not study.is_test:
            missing.append(f"{os.path.basename(labels)}/{identifier}.nii.gz")
        if missing:
            study = replace(study, fault=ConversionError(f"lacks {', '.join(missing)}", "restore it"))
        studies.append(study)
    known = {(os.path.dirname(folder), identifier) for folder, identifier in channels}
    for (folder, stem), path in sorted(volumes.items()):
        if os.path.basename(folder) == "labelsTr" and (os.path.dirname(folder), stem) not in known:
            error = ConversionError(
                f"lacks imagesTr/{stem}_0000.nii.gz and imagesTr/{stem}_0001.nii.gz", "restore them"
            )
            studies.append(NnunetStudy(of_file(stem), os.path.dirname(folder), (path,), fault=error))
    if studies and len(folds) == 1:
        discovery.folds = _read_folds(folds[0], discovery)
    elif studies and len(folds) > 1:
        discovery.notes.append(f"{len(folds)} files {SPLITS} were found; none was used")
    return studies


def _read_folds(path: str, discovery: Discovery) -> list[dict[str, list[str]]] | None:
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
        if not isinstance(content, list) or not content:
            raise ValueError("it is no list of folds")
        return [{side: [str(name) for name in fold[side]] for side in ("train", "val")} for fold in content]
    except (OSError, ValueError, TypeError, KeyError) as error:
        discovery.notes.append(f"{path} cannot be used ({type(error).__name__}: {error}); folds were drawn anew")
        return None
