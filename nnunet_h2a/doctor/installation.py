"""Checks of the environment: versions, nnU-Net's folders, the lookup of trainers, the GPU."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from nnunet_h2a import __version__
from nnunet_h2a._autoreg import SWITCH, VARIABLE, shim_folder
from nnunet_h2a.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding

#: nnU-Net versions that `make test-matrix` runs the tests with.
TESTED_NNUNET = ("2.8.0", "2.8.1")

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")

#: What version 1 of nnU-Net called them.
OLD_NAMES = {"nnUNet_raw_data_base": "nnUNet_raw", "RESULTS_FOLDER": "nnUNet_results"}

#: Settings of nnU-Net beside its folders; another name that begins like these is a slip of the pen.
SETTINGS = {
    "nnUNet_compile", "nnUNet_n_proc_DA", "nnUNet_def_n_proc", "nnUNet_extTrainer", "nnUNet_keep_files_open",
    "nnUNet_wandb_enabled", "nnUNet_wandb_project", "nnUNet_wandb_mode",
}  # fmt: skip

GIB = 2**30
#: A checkpoint of our largest network with its optimiser is 0.9 GB, and nnU-Net keeps three per fold.
RESULTS_GIB = 10
#: Docker's own 64 MiB stop nnU-Net's loaders, which hand patches over in shared memory.
SHARED_MEMORY_GIB = 1


def check_installation(trainer: str) -> Iterator[Finding]:
    """All checks that need no dataset.

    Args:
        trainer: name to look up.
    """
    yield from check_versions()
    yield from check_folders()
    yield from check_settings()
    yield from check_shared_memory()
    yield from check_lookup(trainer)
    yield from check_gpu()


def check_versions() -> Iterator[Finding]:
    """Python, this package, and what it needs, at the versions that it needs."""
    from packaging.requirements import Requirement

    wrong = []
    for text in metadata.requires("nnunet-h2a") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append((requirement, found))
    for requirement, found in wrong:
        state = "is not installed" if found is None else f"is {found}, and {requirement.specifier} is needed"
        yield Finding(
            PROBLEM, f"{requirement.name} {state}", f'type: pip install "{requirement.name}{requirement.specifier}"'
        )
    versions = []
    for name in ("nnunetv2", "torch", "dynamic-network-architectures", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    yield Finding(OK, f"nnunet_h2a {__version__}, Python {platform.python_version()}, {', '.join(versions)}")
    with contextlib.suppress(metadata.PackageNotFoundError):
        nnunet = metadata.version("nnunetv2")
        if nnunet not in TESTED_NNUNET:
            tested = " and ".join(TESTED_NNUNET)
            yield Finding(
                NOTE, f"nnunetv2 {nnunet} has not been tested with nnunet_h2a {__version__}, {tested} have",
                f'if something breaks: pip install "nnunetv2=={TESTED_NNUNET[-1]}"',
            )  # fmt: skip


def check_folders() -> Iterator[Finding]:
    """nnU-Net's three folders: set, there, different, writable, with room."""
    seen: dict[Path, str] = {}
    for variable in FOLDERS:
        value = os.environ.get(variable)
        if not value:
            old = next((name for name, new in OLD_NAMES.items() if new == variable and name in os.environ), None)
            hint = f" ({old} is nnU-Net 1's)" if old else ""
            yield Finding(PROBLEM, f"{variable} is not set{hint}", f"type: export {variable}=/path/to/{variable}")
            continue
        folder = Path(value)
        if value != value.strip():
            yield Finding(
                PROBLEM, f"{variable} begins or ends with a blank: {value!r}",
                f'type: export {variable}="{value.strip()}"',
            )  # fmt: skip
        elif value.startswith("~"):
            yield Finding(
                PROBLEM, f"{variable} is {value}, and ~ is not a folder within quotes",
                f'type: export {variable}="{folder.expanduser()}"',
            )  # fmt: skip
        elif value[0] in "\"'":
            yield Finding(PROBLEM, f"{variable} has quotes in its value: {value}", f"type: export {variable}={value}")
        elif folder.exists() and not folder.is_dir():
            yield Finding(
                PROBLEM, f"{variable} is {value}, which is a file", f"type: export {variable}=/path/to/a/folder"
            )
        elif not folder.is_dir():
            yield Finding(PROBLEM, f"{variable} is {value}, which is no folder", f'type: mkdir -p "{value}"')
        elif folder.resolve() in seen:
            yield Finding(
                PROBLEM, f"{variable} and {seen[folder.resolve()]} are the same folder, {value}", "give each its own"
            )
        else:
            seen[folder.resolve()] = variable
            if not folder.is_absolute():
                yield Finding(
                    WARNING, f"{variable} is {value}, which depends on where a command is typed",
                    f'type: export {variable}="{folder.resolve()}"',
                )  # fmt: skip
            yield _writable(variable, folder)


def _writable(variable: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / GIB
    try:
        # Permissions do not tell all: a read-only or full disk shows when something is written.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        what = f"{variable}={folder} cannot be written to ({error.strerror})"
        if variable == "nnUNet_raw":
            return Finding(NOTE, what, "conversion needs to, training does not")
        return Finding(PROBLEM, what, "take a folder of your own, or free some space")
    if variable == "nnUNet_results" and free < RESULTS_GIB:
        return Finding(
            WARNING,
            f"{variable}={folder}: {free:.1f} GiB free; a fold may take 3",
            "free some space, or take another disk",
        )
    return Finding(OK, f"{variable}={folder}, {free:.1f} GiB free")


def check_settings() -> Iterator[Finding]:
    """Variables that look like nnU-Net's and are not, and values that do not do what they say."""
    known = {name.casefold(): name for name in (*FOLDERS, *SETTINGS)}
    for name in sorted(os.environ):
        if not name.casefold().startswith("nnunet_") or name in known.values() or name in OLD_NAMES:
            continue
        nearest = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.8)
        if nearest:
            meant = known[nearest[0]]
            yield Finding(
                WARNING, f"{name} is set, but nnU-Net reads {meant}", f'type: export {meant}="${name}"; unset {name}'
            )
    workers = os.environ.get("nnUNet_n_proc_DA")
    if workers == "0":
        yield Finding(
            WARNING, "nnUNet_n_proc_DA is 0: training works so, nnU-Net's planning does not",
            "type: nnUNet_n_proc_DA=1 nnUNetv2_plan_and_preprocess …",
        )  # fmt: skip
    elif workers is not None and not workers.isdigit():
        yield Finding(
            PROBLEM, f"nnUNet_n_proc_DA is {workers!r}, which is no number of processes", "type: unset nnUNet_n_proc_DA"
        )
    processes = os.environ.get("nnUNet_def_n_proc")
    if processes is not None and not re.fullmatch("[1-9][0-9]*", processes):
        yield Finding(
            PROBLEM, f"nnUNet_def_n_proc is {processes!r}, which is no number above 0", "type: unset nnUNet_def_n_proc"
        )
    if (compiling := os.environ.get("nnUNet_compile")) is not None and compiling.lower() not in (
        "true", "1", "t", "false", "0", "f",
    ):  # fmt: skip
        yield Finding(
            WARNING, f"nnUNet_compile is {compiling!r}; nnU-Net takes everything but true, 1 and t for no",
            "type: export nnUNet_compile=false",
        )  # fmt: skip
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if limit == "1":
        yield Finding(WARNING, "OMP_THREAD_LIMIT is 1: training on a CPU then hangs", "type: unset OMP_THREAD_LIMIT")


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Whether nnU-Net's loaders have room to hand patches over."""
    if not folder.is_dir() or os.environ.get("nnUNet_n_proc_DA") == "0":
        return
    size = shutil.disk_usage(folder).total / GIB
    if size < SHARED_MEMORY_GIB:
        yield Finding(
            WARNING, f"{folder} has {size * 1024:.0f} MiB: nnU-Net's loaders end with a bus error where it is full",
            "start the container with --shm-size=8g or --ipc=host",
        )  # fmt: skip


def check_lookup(trainer: str) -> Iterator[Finding]:
    """Whether nnU-Net finds a trainer of ours, and ours it is."""
    entries = [entry for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]
    for entry in entries:
        if not Path(entry).is_dir():
            yield Finding(
                WARNING, f"{VARIABLE} names {entry}, which is no folder; nnU-Net passes over it", "take it out"
            )
    by_hand = "type: export nnUNet_extTrainer=$(python -m nnunet_h2a.ext_path)"
    try:
        # nnU-Net tells on the screen where it looks.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

            found = recursive_find_trainer_class_by_name(trainer)
    except Exception as error:  # a user's own trainer folder may raise anything when it is imported
        why = " ".join(str(error).split())[:300] or type(error).__name__
        if shim_folder() not in entries:
            off = f", because {SWITCH} is {os.environ[SWITCH]}" if SWITCH in os.environ else ""
            yield Finding(PROBLEM, f"nnU-Net does not look into {shim_folder()}{off}", by_hand)
        elif isinstance(error, RuntimeError) and "Could not find" in why:
            yield Finding(
                PROBLEM, f"nnU-Net finds no trainer {trainer}",
                f"compare the name with README.md and docs/training.md; a folder of your own belongs in {VARIABLE}",
            )  # fmt: skip
        else:
            others = [entry for entry in entries if entry != shim_folder()]
            fix = f"mend or take out what raises it in {', '.join(others)}" if others else "see the settings above"
            yield Finding(PROBLEM, f"nnU-Net's search for trainers ends with {type(error).__name__}: {why}", fix)
        return
    module = found.__module__
    if module.startswith(("nnunet_h2a.", "nnunetv2.")):
        yield Finding(OK, f"nnU-Net finds {trainer} ({module})")
    else:
        yield Finding(NOTE, f"nnU-Net finds {trainer}, and it is not of this package ({module})")


def check_gpu() -> Iterator[Finding]:
    """The device that training would use, and what computes CIPA's scan on it."""
    import torch

    built = torch.version.cuda or torch.version.hip
    if not torch.cuda.is_available():
        if torch.backends.mps.is_available():
            yield Finding(NOTE, "no CUDA GPU; PyTorch offers mps", "train and predict with -device mps")
        elif shutil.which("nvidia-smi") and built is None:
            yield Finding(
                PROBLEM, f"there is an NVIDIA driver, but torch {torch.__version__} is built for the CPU",
                "install the CUDA build that https://pytorch.org/get-started/locally names",
            )  # fmt: skip
        elif shutil.which("nvidia-smi"):
            yield Finding(
                PROBLEM, f"there is an NVIDIA driver, but torch {torch.__version__} (CUDA {built}) finds no GPU",
                "see whether nvidia-smi lists one, its driver is new enough, and CUDA_VISIBLE_DEVICES is right",
            )  # fmt: skip
        else:
            yield Finding(
                NOTE, "no GPU: training at full size takes weeks on a CPU", "small runs: nnUNetv2_train … -device cpu"
            )
        return
    for index in range(torch.cuda.device_count()):
        yield from _one_gpu(index)


def _one_gpu(index: int) -> Iterator[Finding]:
    import torch

    from nnunet_h2a.networks.selective_scan import triton_scan

    properties = torch.cuda.get_device_properties(index)
    name = f"GPU {index}: {properties.name}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        why_not = triton_scan.why_not(torch.empty(1, device=f"cuda:{index}"))
    except Exception as error:  # the driver's errors have many types
        why = " ".join(str(error).split())[:300]
        yield Finding(PROBLEM, f"{name} cannot be used ({why})", "see whether nvidia-smi shows it free and working")
        return
    yield Finding(
        OK, f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free",
        f"plans that fit it: h2a_plan -d ID --gpu-memory {total // GIB}",
    )  # fmt: skip
    if why_not is not None:
        yield Finding(WARNING, f"{name}: CIPA's scan runs without Triton, slower ({why_not})")
