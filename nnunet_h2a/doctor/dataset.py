"""Checks of a dataset: channels, cases, geometry, plans, preprocessed files, room on the disk."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_h2a.command import CommandError, dataset_folder, dataset_number
from nnunet_h2a.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding, some
from nnunet_h2a.doctor.splits import check_splits, equal_files
from nnunet_h2a.planning.make_plans import has_regions
from nnunet_h2a.training.modalities import ChannelError, channel_roles

GIB = 2**30


def check_dataset(dataset: str, plans: str, trainer: str) -> Iterator[Finding]:
    """All checks of a dataset, raw and, where it is there, preprocessed.

    Args:
        dataset: number or name.
        plans: name of the plans to look at.
        trainer: name of the trainer, for whether it takes one modality.

    Raises:
        CommandError: where no folder has the dataset.
    """
    raw, preprocessed = (_folder(variable, dataset) for variable in ("nnUNet_raw", "nnUNet_preprocessed"))
    if raw is None and preprocessed is None:
        raise CommandError(
            f"no dataset '{dataset}' in nnUNet_raw ({os.environ.get('nnUNet_raw', 'not set')}) or nnUNet_preprocessed "
            f"({os.environ.get('nnUNet_preprocessed', 'not set')}): convert it with h2a_convert_…"
        )
    described = read_dataset_json(raw, preprocessed)
    if isinstance(described, Finding):
        yield described
        return
    yield from check_channels(described, trainer)
    cases: list[str] = []
    if raw is not None:
        cases = yield from check_cases(raw, described)
    if preprocessed is None:
        yield Finding(
            NOTE, f"{dataset} is not planned yet",
            f"type: nnUNetv2_plan_and_preprocess -d {dataset_number(raw)} --verify_dataset_integrity",
        )  # fmt: skip
    # A machine that trains often has no raw data: then the preprocessed cases are the dataset's.
    yield from check_splits(raw, preprocessed, cases or _preprocessed_cases(preprocessed))
    if preprocessed is not None:
        yield from check_preprocessed(preprocessed, described, plans, cases)


def _preprocessed_cases(folder: Path | None) -> list[str]:
    """Cases of any configuration that is preprocessed."""
    return sorted({path.stem for path in folder.glob("*/*.pkl")}) if folder is not None else []


def _folder(variable: str, dataset: str) -> Path | None:
    parent = os.environ.get(variable)
    if not parent or not Path(parent).is_dir():
        return None
    try:
        return dataset_folder(Path(parent), dataset)
    except CommandError as error:
        if "several" in str(error):
            raise
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
    except FileNotFoundError:
        return Finding(PROBLEM, f"{path} does not exist", "run the conversion again")
    except (ValueError, KeyError, TypeError) as error:
        return Finding(PROBLEM, f"{path} is damaged ({type(error).__name__}: {error})", "run the conversion again")
    copy = None if raw is None or preprocessed is None else preprocessed / "dataset.json"
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
    if pet is not None and str(names[str(pet)]).casefold() in ("pet", "pt", "suv", "zscore"):
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


def check_preprocessed(
    folder: Path, dataset_json: Mapping[str, Any], plans: str, cases: Sequence[str]
) -> Iterator[Finding]:
    """Plans, fingerprint and preprocessed files belong to the dataset as it is, and there is room for the latter.

    Args:
        folder: of the dataset below ``$nnUNet_preprocessed``.
        dataset_json: of the raw dataset.
        plans: name of the plans.
        cases: identifiers of the training cases, empty where the raw dataset is elsewhere.
    """
    number = dataset_number(folder)
    path = folder / f"{plans}.json"
    if not path.is_file():
        others = sorted(p.stem for p in folder.glob("*Plans*.json"))
        hint = f"it has {some(others)} (-p)" if others else f"type: nnUNetv2_plan_and_preprocess -d {number}"
        yield Finding(PROBLEM, f"{folder} has no plans {plans}", hint)
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        configurations = content["configurations"]
        configurations.items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield Finding(
            PROBLEM, f"{path} is damaged ({type(error).__name__}: {error})", "run h2a_plan or nnU-Net's planning again"
        )
        return
    yield from _fingerprint(folder, number, dataset_json)
    for key, configuration in configurations.items():
        kwargs = configuration.get("architecture", {}).get("arch_kwargs", {})
        yield from _planned_channels(path, key, kwargs, dataset_json)
        identifier = configuration.get("data_identifier")
        if identifier is not None:
            yield _files(folder / identifier, key, plans, number, cases, _needed(configurations, key, dataset_json))


def _fingerprint(folder: Path, number: int, dataset_json: Mapping[str, Any]) -> Iterator[Finding]:
    path = folder / "dataset_fingerprint.json"
    clean = f"type: nnUNetv2_plan_and_preprocess -d {number} --clean"
    try:
        seen = len(json.loads(path.read_text())["shapes_after_crop"])
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError) as error:
        yield Finding(PROBLEM, f"{path} is damaged ({type(error).__name__})", clean)
        return
    if seen != dataset_json["numTraining"]:
        yield Finding(
            PROBLEM, f"{path} is of {seen} cases, and the dataset has {dataset_json['numTraining']}; nnU-Net plans by "
            "an old fingerprint without a word", clean,
        )  # fmt: skip


def _planned_channels(
    path: Path, key: str, kwargs: Mapping[str, Any], dataset_json: Mapping[str, Any]
) -> Iterator[Finding]:
    if "ct_channel" not in kwargs:
        return
    try:
        roles = dict(zip(("ct_channel", "pet_channel"), channel_roles(dataset_json, kwargs.get("modalities", "both")),
                         strict=True))  # fmt: skip
    except ChannelError:
        return
    if any(kwargs.get(name) != roles[name] for name in roles):
        yield Finding(
            PROBLEM, f"{path}, {key}: made when CT was channel {kwargs['ct_channel']} and PET {kwargs['pet_channel']}",
            "write these plans anew with h2a_plan",
        )  # fmt: skip


def _needed(configurations: Mapping[str, Any], key: str, dataset_json: Mapping[str, Any]) -> float:
    """GiB that preprocessing takes at most: nnU-Net compresses float32 images and int8 or int16 labels."""
    shape = configurations[key].get("median_image_size_in_voxels", [])
    if len(shape) == 2:
        # Slices of whole volumes.
        volumes = (c.get("median_image_size_in_voxels", []) for c in configurations.values())
        shape = max((v for v in volumes if len(v) == 3), key=math.prod, default=shape)
    return math.prod(shape) * dataset_json["numTraining"] * (4 * len(dataset_json["channel_names"]) + 1) / GIB


def _files(folder: Path, key: str, plans: str, number: int, cases: Sequence[str], needed: float) -> Finding:
    command = f"type: nnUNetv2_preprocess -d {number} -c {key} -plans_name {plans}"
    free = shutil.disk_usage(folder.parent).free / GIB
    if not folder.is_dir():
        if needed > free:
            return Finding(
                WARNING, f"{key} is not preprocessed yet, which takes up to {needed:.1f} GiB, and {free:.1f} are free",
                "free some space first, or move nnUNet_preprocessed",
            )  # fmt: skip
        return Finding(NOTE, f"{key} is not preprocessed yet (up to {needed:.1f} GiB; {free:.1f} free)", command)
    there = {p.name.removesuffix(".pkl") for p in folder.glob("*.pkl")}
    images = {p.name.removesuffix(ending) for ending in (".b2nd", ".npz") for p in folder.glob(f"*{ending}")}
    labels = {name.removesuffix("_seg") for name in images if name.endswith("_seg") and name[:-4] in there}
    images -= {f"{name}_seg" for name in labels}
    # An .npz holds image and label; a .b2nd has its label beside it.
    alone = {p.stem for p in folder.glob("*.npz")}
    half = sorted((there ^ images) | (images - labels - alone))
    missing = sorted(set(cases) - there)
    if missing or half:
        return Finding(PROBLEM, f"{folder}: incomplete ({some(missing or half)})", command)
    old = sorted(there - set(cases)) if cases else []
    if old:
        return Finding(
            WARNING, f"{folder}: {some(old)} are not in the dataset any more; fold all would train on them",
            f"delete the folder, then {command}",
        )  # fmt: skip
    return Finding(OK, f"{folder}: {len(there)} cases preprocessed")
