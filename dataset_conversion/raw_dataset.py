"""The nnU-Net v2 raw dataset: its place, its dataset.json, its patient-level folds, and the commands that follow."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset_conversion.errors import UsageError

FILE_ENDING = ".nii.gz"
N_FOLDS = 5
SPLIT_SEED = 12345
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
    """

    default_name: str
    channel_names: tuple[str, ...]
    modalities: tuple[str, ...]
    labels: Mapping[str, int]
    description: str
    reference: str
    licence: str

    def to_json(self, name: str, num_training: int) -> dict[str, Any]:
        """Return dataset.json for ``num_training`` cases."""
        return {
            "channel_names": {str(index): channel for index, channel in enumerate(self.channel_names)},
            "h2a_modalities": list(self.modalities),
            "labels": dict(self.labels),
            "numTraining": num_training,
            "file_ending": FILE_ENDING,
            "overwrite_image_reader_writer": "SimpleITKIO",
            "name": name,
            "description": self.description,
            "reference": self.reference,
            "licence": self.licence,
        }


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


def make_splits(patient_of_case: Mapping[str, str]) -> list[dict[str, list[str]]]:
    """Return nnU-Net's splits_final.json with all cases of a patient on one side of every fold.

    Five folds from five patients on, as many folds as patients below that (leave one out), and for a single patient
    one fold that trains and validates on it. Deterministic; folds are balanced by number of cases.

    Args:
        patient_of_case: case identifier to patient.
    """
    cases_of: dict[str, list[str]] = {}
    for case, patient in sorted(patient_of_case.items()):
        cases_of.setdefault(patient, []).append(case)
    everything = sorted(patient_of_case)
    if not cases_of:
        return []
    if len(cases_of) == 1:
        return [{"train": everything, "val": everything}]
    patients = sorted(cases_of)
    if len(patients) >= N_FOLDS:
        random.Random(SPLIT_SEED).shuffle(patients)
        # Patients with many studies first: only then can the small ones even the folds out.
        patients.sort(key=lambda patient: -len(cases_of[patient]))
    folds: list[list[str]] = [[] for _ in range(min(N_FOLDS, len(patients)))]
    for patient in patients:
        smallest = min(range(len(folds)), key=lambda index: (len(folds[index]), index))
        folds[smallest].extend(cases_of[patient])
    return [{"train": sorted(set(everything) - set(fold)), "val": sorted(fold)} for fold in folds]


def to_text(content: Any) -> str:
    """Return JSON as it is written to disk."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


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


def stale_fingerprint(dataset_name: str) -> Path | None:
    """Return the fingerprint that nnU-Net has of the dataset, None where it has none.

    Unless told to ``--clean``, nnU-Net plans changed images by the fingerprint of the former ones.
    """
    folder = os.environ.get("nnUNet_preprocessed", "").strip()
    path = Path(folder).expanduser() / dataset_name / "dataset_fingerprint.json"
    return path if folder and path.is_file() else None


def next_commands(
    dataset_id: int, folds: int, has_test_cases: bool, dataset_name: str, clean: bool = False
) -> list[str]:
    """Return the nnU-Net commands to type after the conversion; ``clean`` has nnU-Net take a new fingerprint."""
    which = "fold 0" if folds == 1 else f"folds 0 to {folds - 1}"
    trainer = "-tr nnUNetTrainerH2ASeg"
    commands = [
        f"nnUNetv2_plan_and_preprocess -d {dataset_id} --verify_dataset_integrity{' --clean' if clean else ''}",
        f"nnUNetv2_train {dataset_id} 3d_fullres 0 {trainer}    # {which}",
    ]
    if has_test_cases:
        commands.append(
            f'nnUNetv2_predict -i "$nnUNet_raw/{dataset_name}/imagesTs" -o OUTPUT_FOLDER -d {dataset_id} '
            f"-c 3d_fullres -f 0 {trainer}"
        )
    return commands
