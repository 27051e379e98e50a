"""The nnU-Net v2 raw dataset: its place, its dataset.json, and the commands that follow."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset_conversion.errors import UsageError

#: What a conversion tells of itself, in the dataset folder.
REPORT = "conversion_report.json"

#: What PET may be normalised by, and the channel name that has stock nnU-Net do it (None: its fixed scaling).
PET_NORMALIZATIONS = {"zscore": "PET", "ct": "CT", "suv": None}
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


@dataclass(frozen=True)
class DatasetSpec:
    """What dataset.json says of a data set.

    Attributes:
        default_name: dataset name where the user gives none.
        channel_names: one per image channel, in file order.
        modalities: ``CT`` or ``PET`` of each channel, whatever the channel is named.
        labels: label name to integer, background 0.
        description, reference, licence: as nnU-Net's own dataset.json files have them.
        file_ending: of images and labels.
        reader: nnU-Net's class that reads them.
        fixed_scaling: channel name that makes nnU-Net keep values absolute: ``noNorm`` takes them as they are,
            ``rgb_to_0_1`` divides by 255.
        listed: name every case's files in dataset.json; nnU-Net looks for them by name otherwise, which takes minutes
            where there are thousands.
        configuration, trainer: what to train it with, for the commands printed at the end.
    """

    default_name: str
    channel_names: tuple[str, ...]
    modalities: tuple[str, ...]
    labels: Mapping[str, int]
    description: str
    reference: str
    licence: str
    file_ending: str = ".nii.gz"
    reader: str = "SimpleITKIO"
    fixed_scaling: str = "noNorm"
    listed: bool = False
    configuration: str = "3d_fullres"
    trainer: str = "nnUNetTrainerH2ASeg"

    def normalised(self, choice: str | None) -> DatasetSpec:
        """Return the spec with the PET channel named so that nnU-Net normalises it by ``choice``.

        Args:
            choice: a key of ``PET_NORMALIZATIONS``, or None for the spec as it is.
        """
        if choice is None:
            return self
        name = PET_NORMALIZATIONS[choice] or self.fixed_scaling
        pairs = zip(self.channel_names, self.modalities, strict=True)
        names = tuple(name if modality == "PET" else channel for channel, modality in pairs)
        return replace(self, channel_names=names)

    def image_name(self, case_id: str, channel: int | None) -> str:
        """Return the file name of a case's channel, or (None) of its label map."""
        return f"{case_id}{self.file_ending}" if channel is None else f"{case_id}_{channel:04d}{self.file_ending}"

    def to_json(self, name: str, training: Sequence[str]) -> dict[str, Any]:
        """Return dataset.json for the training cases of the given identifiers."""
        content = {
            "channel_names": {str(index): channel for index, channel in enumerate(self.channel_names)},
            "h2a_modalities": list(self.modalities),
            "labels": dict(self.labels),
            "numTraining": len(training),
            "file_ending": self.file_ending,
            "overwrite_image_reader_writer": self.reader,
            "name": name,
            "description": self.description,
            "reference": self.reference,
            "licence": self.licence,
        }
        if self.listed:
            channels = range(len(self.channel_names))
            content["dataset"] = {
                case_id: {
                    "images": [f"imagesTr/{self.image_name(case_id, channel)}" for channel in channels],
                    "label": f"labelsTr/{self.image_name(case_id, None)}",
                }
                for case_id in sorted(training)
            }
        return content


def clean_identifier(text: str) -> str:
    """Return ``text`` with everything but letters, digits, ``_`` and ``-`` turned into ``_``."""
    return re.sub(r"[^A-Za-z0-9-]+", "_", text).strip("_-")


def dataset_folder_name(dataset_id: int, name: str) -> str:
    """Return ``Dataset<3 digits>_<name>``."""
    return f"Dataset{dataset_id:03d}_{name}"


def locate(dataset_id: int, name: str) -> Path:
    """Return the dataset's folder below $nnUNet_raw, checked to be free for it.

    Raises:
        UsageError: nnUNet_raw is not set or not a usable folder, the name is not usable, or the ID belongs to a
            dataset of another name in one of nnU-Net's folders (nnU-Net then refuses the ID everywhere).
    """
    if not _NAME.match(name):
        raise UsageError(f"--name {name!r} is no dataset name", "use letters, digits, _ - and .")
    if not 1 <= dataset_id <= 999:
        raise UsageError(f"-d {dataset_id} is no dataset ID", "use 1 to 999")
    raw = os.environ.get("nnUNet_raw", "").strip()
    if not raw:
        raise UsageError(
            "the environment variable nnUNet_raw is not set", 'type: export nnUNet_raw="$HOME/nnUNet_raw" (or your own)'
        )
    root = Path(raw).expanduser().absolute()
    if root.exists() and not root.is_dir():
        raise UsageError("nnUNet_raw is no folder", "type: export nnUNet_raw=FOLDER", root)
    wanted = dataset_folder_name(dataset_id, name)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folder = os.environ.get(variable, "").strip()
        if not folder or not Path(folder).expanduser().is_dir():
            continue
        for entry in sorted(Path(folder).expanduser().iterdir()):
            if not (entry.is_dir() and entry.name.startswith(f"Dataset{dataset_id:03d}_") and entry.name != wanted):
                continue
            other = entry.name.split("_", 1)[1]
            raise UsageError(
                f"dataset ID {dataset_id} is taken by {entry.name} (in {variable})",
                f"use another ID: -d {_free_id(dataset_id)}, or, to convert into that dataset: --name {other}",
            )
    return root / wanted


def _free_id(dataset_id: int) -> int:
    """Return the next ID that no folder of nnU-Net uses."""
    used = set()
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folder = os.environ.get(variable, "").strip()
        if folder and Path(folder).expanduser().is_dir():
            for entry in Path(folder).expanduser().iterdir():
                match = re.match(r"Dataset(\d{3})_", entry.name)
                if match:
                    used.add(int(match.group(1)))
    candidates = [*range(dataset_id + 1, 1000), *range(1, dataset_id)]
    return next((candidate for candidate in candidates if candidate not in used), dataset_id)


def to_bytes(content: Any) -> bytes:
    """Return JSON as it is written to disk: UTF-8, and file names that are none (from other systems) escaped."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:
        return (json.dumps(content, indent=2) + "\n").encode()


def stale_preprocessed_splits(dataset_name: str, splits: Sequence[Mapping[str, Sequence[str]]]) -> Path | None:
    """Return the older splits_final.json below nnUNet_preprocessed that holds other folds, None where there is none.

    nnU-Net keeps an existing copy and stops planning with a bare assertion when the folds differ.
    """
    folder = os.environ.get("nnUNet_preprocessed", "").strip()
    if not folder:
        return None
    path = Path(folder).expanduser() / dataset_name / "splits_final.json"
    if not path.is_file():
        return None
    try:
        old = json.loads(path.read_text())
        same = [(sorted(fold["train"]), sorted(fold["val"])) for fold in old] == [
            (sorted(fold["train"]), sorted(fold["val"])) for fold in splits
        ]
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    return None if same else path


def stale_fingerprint(dataset: Path) -> Path | None:
    """Return the fingerprint that nnU-Net has of an earlier state of the dataset, None where it has none.

    Unless told to ``--clean``, nnU-Net plans changed images by the fingerprint of the former ones.
    """
    folder = os.environ.get("nnUNet_preprocessed", "").strip()
    path, report = Path(folder).expanduser() / dataset.name / "dataset_fingerprint.json", dataset / REPORT
    if not folder or not path.is_file() or not report.is_file():
        return None
    return path if path.stat().st_mtime_ns < report.stat().st_mtime_ns else None


def next_commands(
    spec: DatasetSpec, dataset_id: int, folds: int, has_test_cases: bool, dataset_name: str, clean: bool = False
) -> list[str]:
    """Return the nnU-Net commands to type after the conversion; ``clean`` has nnU-Net take a new fingerprint."""
    which = "fold 0" if folds == 1 else f"folds 0 to {folds - 1}"
    configuration, trainer = spec.configuration, f"-tr {spec.trainer}"
    only = f" -c {configuration}" if configuration == "2d" else ""
    commands = [
        f"nnUNetv2_plan_and_preprocess -d {dataset_id}{only} --verify_dataset_integrity{' --clean' if clean else ''}",
        f"nnUNetv2_train {dataset_id} {configuration} 0 {trainer}    # {which}",
    ]
    if has_test_cases:
        commands.append(
            f'nnUNetv2_predict -i "$nnUNet_raw/{dataset_name}/imagesTs" -o OUTPUT_FOLDER -d {dataset_id} '
            f"-c {configuration} -f 0 {trainer}"
        )
    return commands
