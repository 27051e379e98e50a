"""Checks of what nnU-Net's planning and preprocessing have made of a dataset."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_h2a.command import dataset_number
from nnunet_h2a.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding, some
from nnunet_h2a.training.modalities import ChannelError, channel_roles

GIB = 2**30


def check_preprocessed(
    folder: Path, dataset_json: Mapping[str, Any], plans: str, cases: Sequence[str], trainer: str
) -> Iterator[Finding]:
    """Plans, fingerprint and preprocessed files belong to the dataset as it is, and there is room for the latter.

    Args:
        folder: of the dataset below ``$nnUNet_preprocessed``.
        dataset_json: of the raw dataset.
        plans: name of the plans.
        cases: identifiers of the training cases, empty where the raw dataset is elsewhere.
        trainer: name of the trainer.
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
        if not all(isinstance(configuration, dict) for configuration in configurations.values()):
            raise TypeError("a configuration is no object")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield Finding(
            PROBLEM, f"{path} is damaged ({type(error).__name__}: {error})", "run h2a_plan or nnU-Net's planning again"
        )
        return
    yield from _fingerprint(folder, number, dataset_json)
    yield from _same_preprocessing(folder, plans, configurations, number)
    yield from _ground_truth(folder, number, cases)
    for key, configuration in configurations.items():
        yield from _planned_network(path, key, configuration, trainer)
        kwargs = configuration.get("architecture", {}).get("arch_kwargs", {})
        yield from _planned_channels(path, key, kwargs, dataset_json)
        identifier = configuration.get("data_identifier")
        if identifier is not None:
            yield _files(folder / identifier, key, plans, number, cases, _needed(configurations, key, dataset_json))


def _same_preprocessing(folder: Path, plans: str, configurations: Mapping[str, Any], number: int) -> Iterator[Finding]:
    """Plans that share preprocessed files with nnU-Net's own agree with them on what is in the files."""
    base = folder / "nnUNetPlans.json"
    if plans == base.stem or not base.is_file():
        return
    try:
        others = json.loads(base.read_text(encoding="utf-8"))["configurations"]
    except (ValueError, KeyError, TypeError):
        return
    for key, configuration in configurations.items():
        other = others.get(key, {})
        if configuration.get("data_identifier") is None or configuration["data_identifier"] != other.get(
            "data_identifier"
        ):
            continue
        changed = [
            k for k in ("spacing", "normalization_schemes", "use_mask_for_norm") if configuration.get(k) != other.get(k)
        ]
        if changed:
            yield Finding(
                PROBLEM, f"{plans}, {key}: its {some(changed)} is not that of {base}, which has been planned anew and "
                "shares its preprocessed files", f"type: h2a_plan -d {number} …, as you did before",
            )  # fmt: skip


def _planned_network(path: Path, key: str, configuration: Mapping[str, Any], trainer: str) -> Iterator[Finding]:
    """The network that a configuration names is there, and is the one that the trainer builds."""
    from nnunet_h2a import networks
    from nnunet_h2a.trainers import TRAINERS

    name = configuration.get("architecture", {}).get("network_class_name", "")
    if not name.startswith("nnunet_h2a."):
        return
    kind, wanted = name.rpartition(".")[2], getattr(TRAINERS.get(trainer), "network_class", None)
    if kind not in networks.__all__:
        yield Finding(PROBLEM, f"{path}, {key}: there is no network {name}", "write these plans anew with h2a_plan")
    elif wanted is not None and wanted.__name__ != kind:
        yield Finding(
            PROBLEM, f"{path}, {key}: made for {kind}, and {trainer} trains {wanted.__name__}",
            f"take -tr nnUNetTrainer{kind}, or other plans (-p)",
        )  # fmt: skip


def _ground_truth(folder: Path, number: int, cases: Sequence[str]) -> Iterator[Finding]:
    """The labels that nnU-Net scores its validation with, hours after the training has begun."""
    truth = folder / "gt_segmentations"
    there = {path.name.split(".")[0] for path in truth.glob("*")} if truth.is_dir() else set()
    missing = sorted({case.split(".")[0] for case in cases} - there)
    if missing:
        yield Finding(
            PROBLEM, f"{truth} lacks {some(missing)}, and the validation after a training needs it",
            f"type: nnUNetv2_preprocess -d {number}",
        )  # fmt: skip


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
    half = half or sorted(p.name for p in folder.iterdir() if p.is_file() and p.stat().st_size == 0)
    if missing or half:
        return Finding(PROBLEM, f"{folder}: incomplete ({some(missing or half)})", command)
    old = sorted(there - set(cases)) if cases else []
    if old:
        return Finding(
            WARNING, f"{folder}: {some(old)} are not in the dataset any more; fold all would train on them",
            f"delete the folder, then {command}",
        )  # fmt: skip
    return Finding(OK, f"{folder}: {len(there)} cases preprocessed")
