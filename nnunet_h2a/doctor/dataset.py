"""Checks of a dataset: channels, cases, geometry, plans, preprocessed files, room on the disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_h2a.command import CommandError, SeveralDatasets, dataset_folder, dataset_number
from nnunet_h2a.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding, some
from nnunet_h2a.doctor.installation import FOLDERS
from nnunet_h2a.doctor.preprocessed import check_preprocessed
from nnunet_h2a.doctor.splits import check_splits, equal_files
from nnunet_h2a.planning.make_plans import has_regions
from nnunet_h2a.training.modalities import PET_NAMES, ChannelError, channel_roles


def check_dataset(dataset: str, plans: str, trainer: str) -> Iterator[Finding]:
    """All checks of a dataset, raw and, where it is there, preprocessed.

    Args:
        dataset: number or name.
        plans: name of the plans to look at.
        trainer: name of the trainer, for whether it takes one modality.

    Raises:
        CommandError: where no folder has the dataset.
    """
    dataset = dataset.rstrip("/" + os.sep)
    raw, preprocessed = (_folder(variable, dataset) for variable in ("nnUNet_raw", "nnUNet_preprocessed"))
    if raw is None and preprocessed is None:
        unset = [name for name in ("nnUNet_raw", "nnUNet_preprocessed") if not os.environ.get(name)]
        if unset:
            raise CommandError(f"no dataset '{dataset}': {' and '.join(unset)} not set, see above")
        there = sorted({path.name for name in FOLDERS for path in _datasets(name)})
        others = f"there are {some(there, 8)}" if there else "there is none: convert one with h2a_convert_…"
        raise CommandError(
            f"no dataset '{dataset}' in nnUNet_raw ({os.environ['nnUNet_raw']}) or nnUNet_preprocessed "
            f"({os.environ['nnUNet_preprocessed']}); {others}"
        )
    yield from check_name(raw or preprocessed)
    described = read_dataset_json(raw, preprocessed)
    if isinstance(described, Finding):
        yield described
        return
    yield from check_channels(described, trainer)
    cases: list[str] = []
    if raw is not None:
        cases = yield from check_cases(raw, described)
    if preprocessed is None and os.environ.get("nnUNet_preprocessed"):
        yield Finding(
            NOTE, f"{dataset} is not planned yet",
            f"type: nnUNetv2_plan_and_preprocess -d {dataset_number(raw)} --verify_dataset_integrity",
        )  # fmt: skip
    # A machine that trains often has no raw data: then the preprocessed cases are the dataset's.
    yield from check_splits(raw, preprocessed, cases or _preprocessed_cases(preprocessed))
    if preprocessed is not None:
        yield from check_preprocessed(preprocessed, described, plans, cases, trainer)


def _preprocessed_cases(folder: Path | None) -> list[str]:
    """Cases of any configuration that is preprocessed."""
    return sorted({path.stem for path in folder.glob("*/*.pkl")}) if folder is not None else []


def _datasets(variable: str) -> list[Path]:
    """Datasets in the folder of one of nnU-Net's variables."""
    parent = os.environ.get(variable)
    if not parent or not Path(parent).is_dir():
        return []
    return [path for path in Path(parent).glob("Dataset[0-9][0-9][0-9]_*") if path.is_dir()]


def check_name(folder: Path) -> Iterator[Finding]:
    """A number has one name in all of nnU-Net's folders, or nnU-Net refuses it everywhere."""
    number = dataset_number(folder)
    others = sorted(
        str(path)
        for variable in FOLDERS
        for path in _datasets(variable)
        if dataset_number(path) == number and path.name != folder.name
    )
    if others:
        yield Finding(
            PROBLEM, f"number {number} is {folder.name}, and {some(others)} has it too", "rename or remove one of them"
        )


def _folder(variable: str, dataset: str) -> Path | None:
    parent = os.environ.get(variable)
    if not parent or not Path(parent).is_dir():
        return None
    try:
        return dataset_folder(Path(parent), dataset)
    except SeveralDatasets:
        raise
    except CommandError:
        return None


def read_dataset_json(raw: Path | None, preprocessed: Path | None) -> dict[str, Any] | Finding:
    """The dataset's description, or what is wrong with it; nnU-Net copies the raw one when it plans."""
    folder = raw or preprocessed
    path = folder / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for key, kind in (("labels", dict), ("numTraining", int), ("file_ending", str), ("channel_names", dict)):
            if not isinstance(content[key], kind):
                raise TypeError(f"{key} is {content[key]!r}")
        if sorted(content["channel_names"]) != sorted(str(number) for number in range(len(content["channel_names"]))):
            raise ValueError(f"channel_names must be numbered from 0, found {list(content['channel_names'])}")
        _check_entries(content)
    except FileNotFoundError:
        return Finding(PROBLEM, f"{path} does not exist", "run the conversion again")
    except (ValueError, KeyError, TypeError) as error:
        return Finding(PROBLEM, f"{path} is damaged ({type(error).__name__}: {error})", "run the conversion again")
    copy = None if raw is None or preprocessed is None else preprocessed / "dataset.json"
    if copy is not None and not copy.is_file() and list(preprocessed.glob("*Plans*.json")):
        return Finding(PROBLEM, f"{copy} does not exist, and training needs it", f"type: cp {path} {copy}")
    if copy is not None and copy.is_file():
        try:
            other = json.loads(copy.read_text(encoding="utf-8"))
            changed = [key for key in _COPIED if content.get(key) != other.get(key)]
        except (ValueError, AttributeError):
            return Finding(PROBLEM, f"{copy} is damaged", "run nnU-Net's planning again")
        if changed:
            return Finding(
                PROBLEM, f"{copy} and the raw dataset differ in {some(changed)}, and nnU-Net trains by the former",
                f"type: nnUNetv2_plan_and_preprocess -d {dataset_number(raw)} --clean",
            )  # fmt: skip
    return content


def _check_entries(dataset_json: Mapping[str, Any]) -> None:
    """``dataset``, where it is there, gives every case a list of images and a label.

    Raises:
        ValueError: with the first entry that does not.
    """
    entries = dataset_json.get("dataset", {})
    if not isinstance(entries, dict):
        raise ValueError(f"dataset is a {type(entries).__name__}, not cases by name")
    for case, entry in entries.items():
        images, label = (entry.get("images"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        if not (isinstance(images, list) and all(isinstance(p, str) for p in [*images, label])):
            raise ValueError(f"dataset: case {case} must have a list 'images' and one 'label', paths all of them")
        if len(images) != len(dataset_json["channel_names"]):
            raise ValueError(
                f"dataset: case {case} has {len(images)} images, and there are "
                f"{len(dataset_json['channel_names'])} channels"
            )


#: What training and prediction take from nnU-Net's copy of dataset.json.
_COPIED = ("channel_names", "labels", "regions_class_order", "file_ending", "h2a_modalities")


def check_channels(dataset_json: Mapping[str, Any], trainer: str) -> Iterator[Finding]:
    """Which channel is what, and how nnU-Net will normalise PET."""
    if has_regions(dataset_json) and "regions_class_order" not in dataset_json:
        yield Finding(PROBLEM, "dataset.json has regions and no regions_class_order", "add it, nnU-Net needs it")
    modalities = _modalities_of(trainer)
    try:
        ct, pet = channel_roles(dataset_json, modalities or "both")
    except ChannelError as error:
        if modalities is None:
            yield Finding(NOTE, f"not a dataset for our networks: {error}")
        else:
            yield Finding(PROBLEM, str(error))
        return
    names = dataset_json["channel_names"]
    roles = ", ".join(
        f"{kind} is channel {number} ({names[str(number)]!r})"
        for kind, number in (("CT", ct), ("PET", pet))
        if number is not None
    )
    yield Finding(OK, roles)
    if ct is not None and str(names[str(ct)]).casefold() in PET_NAMES:
        yield Finding(
            WARNING, f"the CT channel is named {names[str(ct)]!r}: nnU-Net would normalise it as PET, or "
            "h2a_modalities is the wrong way round", "correct dataset.json",
        )  # fmt: skip
    if pet is not None and str(names[str(pet)]).casefold() in PET_NAMES | {"zscore"}:
        yield Finding(
            NOTE, "PET is z-scored per image, so that the network does not see absolute SUV",
            "other normalisations: the converters' --pet-normalization",
        )  # fmt: skip


def _modalities_of(trainer: str) -> str | None:
    """What a trainer needs: ``"both"``, ``"pet"`` or ``"ct"``; None where it is not of this package."""
    from nnunet_h2a.trainers import TRAINERS

    found = TRAINERS.get(trainer)
    if found is None or not hasattr(found, "network_options"):
        return None
    return found.network_options.get("modalities", "both")


def check_cases(raw: Path, dataset_json: Mapping[str, Any]) -> Iterator[Finding]:
    """Every case has all channels and a label on one grid. Returns the identifiers of the training cases."""
    import SimpleITK as sitk
    from tqdm import tqdm

    ending, channels = dataset_json["file_ending"], len(dataset_json["channel_names"])
    files = _listed(raw, dataset_json, ending, channels)
    if not files:
        yield Finding(
            PROBLEM, f"{raw}: no case whose files end with {ending}, as dataset.json says",
            "correct file_ending, or run the conversion again",
        )  # fmt: skip
        return []
    missing = sorted(p.name for paths in files.values() for p in paths if not p.is_file())
    if missing:
        yield Finding(PROBLEM, f"{raw}: {len(missing)} files are missing ({some(missing)})", "run the conversion again")
    if len(files) != dataset_json["numTraining"]:
        yield Finding(
            PROBLEM, f"{raw}: numTraining is {dataset_json['numTraining']}, and there are {len(files)} training cases",
            "run the conversion again, or correct dataset.json",
        )  # fmt: skip
    different, unread = [], []
    for case, paths in tqdm(files.items(), desc="headers", unit="case", disable=None, leave=False):
        there = [p for p in paths if p.is_file()]
        try:
            grids = [_grid(path, sitk) for path in there]
        except RuntimeError:
            unread.append(case)
            continue
        if any(not _same_grid(grid, grids[0]) for grid in grids[1:]):
            different.append(case)
    if unread:
        yield Finding(
            PROBLEM, f"{raw}: {len(unread)} cases cannot be read ({some(unread)})", "run the conversion again"
        )
    if different:
        yield Finding(
            PROBLEM, f"{raw}: images and labels of {len(different)} cases are on different grids ({some(different)})",
            "bring them on one grid: the converters do",
        )  # fmt: skip
    if not (missing or different or unread):
        yield Finding(OK, f"{raw}: {len(files)} cases, {channels} channels and a label each, one grid per case")
    equal = equal_files({case: paths[0] for case, paths in files.items() if paths[0].is_file()})
    for cases in equal:
        yield Finding(
            PROBLEM, f"{raw}: {some(cases)} have the same image (channel 0)",
            "keep one of them, or make sure that they are in the same part of every fold",
        )  # fmt: skip
    return sorted(files)


def _listed(raw: Path, dataset_json: Mapping[str, Any], ending: str, channels: int) -> dict[str, list[Path]]:
    """Images and label of every training case, as nnU-Net finds them: by ``dataset``, or by name."""
    if "dataset" in dataset_json:
        return {
            case: [raw / path for path in (*entry["images"], entry["label"])]
            for case, entry in dataset_json["dataset"].items()
        }
    images = (p.name for p in (raw / "imagesTr").glob(f"*_[0-9][0-9][0-9][0-9]{ending}"))
    labels = (p.name.removesuffix(ending) for p in (raw / "labelsTr").glob(f"*{ending}"))
    cases = {name.removesuffix(ending)[:-5] for name in images} | set(labels)
    return {
        case: [
            *(raw / "imagesTr" / f"{case}_{channel:04d}{ending}" for channel in range(channels)),
            raw / "labelsTr" / f"{case}{ending}",
        ]
        for case in sorted(cases)
    }


def _grid(path: Path, sitk: Any) -> list[tuple[float, ...]]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return [reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection()]


def _same_grid(one: Sequence[tuple[float, ...]], other: Sequence[tuple[float, ...]]) -> bool:
    """Whether no voxel is moved by more than what single precision in a header explains."""
    return one[0] == other[0] and all(
        math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-3)
        for first, second in zip(one[1:], other[1:], strict=True)
        for a, b in zip(first, second, strict=True)
    )
