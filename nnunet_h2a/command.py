"""What our console commands share: errors for people, and nnU-Net's folders."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Exit code of a command that did nothing.
NOTHING_DONE = 2
#: Exit code of a command that Ctrl-C has ended.
INTERRUPTED = 130
#: Exit code of a command whose output nobody reads any more.
CLOSED_PIPE = 141


class CommandError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do."""


class SeveralDatasets(CommandError):
    """One number, several datasets."""


def positive(text: str) -> int:
    """An argparse type: an integer above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which models of a dataset, as nnU-Net's own commands ask for them."""
    parser.add_argument("-d", "--dataset", required=True, help="dataset number or name, planned and preprocessed")
    parser.add_argument("-c", "--configurations", nargs="+", required=True, metavar="C", help="2d, 3d_fullres, …")
    parser.add_argument("-tr", "--trainers", nargs="+", default=["nnUNetTrainer"], metavar="TR",
                        help="trainers [nnUNetTrainer]")  # fmt: skip
    parser.add_argument(
        "-p", "--plans", nargs="+", default=["nnUNetPlans"], metavar="P",
        help="plans: one for all trainers, or one for each [nnUNetPlans]",
    )  # fmt: skip
    parser.add_argument("-f", "--folds", nargs="+", default=["0", "1", "2", "3", "4"], metavar="F",
                        help="folds, or all [0 1 2 3 4]")  # fmt: skip


def run_command(action: Callable[[], int]) -> int:
    """Run ``action``; bad input and files that cannot be read or written become one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that knows no "±" gets a question mark, and no traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = action()
        # Here, where a closed pipe is no traceback.
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:
        # Who reads our output has seen enough, as head does; what is still buffered must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return NOTHING_DONE


def write_whole(contents: Mapping[Path, str]) -> None:
    """Write text files, whole ones only: a full disk leaves all those that were there before.

    Raises:
        CommandError: where a folder stands in the place of one.
    """
    for target in contents:
        _refuse_folder(target)
    halves = {target: target.with_name(target.name + ".part") for target in contents}
    try:
        for target, half in halves.items():
            half.write_text(contents[target], encoding="utf-8")
        for target, half in halves.items():
            half.replace(target)
    finally:
        for half in halves.values():
            if half.is_file():
                half.unlink()


def _refuse_folder(target: Path) -> None:
    if target.is_dir():
        raise CommandError(f"{target} is a folder, and a file is to be written there: name another, or remove it")


def check_targets(targets: Iterable[Path]) -> None:
    """Make the folders of files that will be written, and see now, before long work, that they can be.

    Raises:
        CommandError: where one cannot.
    """
    for target in targets:
        _refuse_folder(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=target.parent):
                pass
        except OSError as error:
            raise CommandError(f"{target} cannot be written ({error.strerror or error}): name another place") from error


def nnunet_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's environment variables names.

    Raises:
        CommandError: where it is not set, with the command to type.
    """
    value = os.environ.get(variable)
    if not value:
        raise CommandError(f"{variable} is not set: type  export {variable}=/path/to/{variable}  and run this again")
    return Path(value)


def dataset_folder(parent: Path, dataset: str) -> Path:
    """The folder of a dataset below ``parent``, by number or by full name.

    Args:
        parent: e.g. ``$nnUNet_preprocessed``.
        dataset: ``"901"`` or ``"Dataset901_Phantom"``.

    Raises:
        SeveralDatasets: where more than one folder matches.
        CommandError: where none does.
    """
    if dataset.isdigit():
        found = sorted(p for p in parent.glob(f"Dataset{int(dataset):03d}_*") if p.is_dir())
    else:
        found = sorted(p for p in parent.glob("Dataset[0-9][0-9][0-9]_*") if p.is_dir() and p.name == dataset)
    if len(found) == 1:
        return found[0]
    if not found:
        number = dataset if dataset.isdigit() else "ID"
        raise CommandError(f"no dataset '{dataset}' in {parent}: run  nnUNetv2_plan_and_preprocess -d {number}  first")
    raise SeveralDatasets(
        f"{parent} holds several datasets {dataset}: {', '.join(p.name for p in found)}; remove all but one"
    )


def read_json(path: Path, cure: str, keys: Sequence[str]) -> dict[str, Any]:
    """Content of a JSON file of nnU-Net's.

    Args:
        path: the file.
        cure: the command that writes it.
        keys: what must be in it.

    Raises:
        CommandError: where it is missing, no JSON object, or lacks a key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CommandError(f"{path} does not exist: run  {cure}  first") from error
    except ValueError as error:
        # No JSON, or no UTF-8.
        raise CommandError(f"{path} is not JSON ({error}): write it anew with  {cure}") from error
    if not isinstance(content, dict):
        raise CommandError(f"{path} holds no JSON object, but {str(content)[:50]}: write it anew with  {cure}")
    if missing := [key for key in keys if key not in content]:
        raise CommandError(f"{path} has no {', '.join(missing)}: write it anew with  {cure}")
    return content


def _plans_in(folder: Path) -> list[str]:
    """Names of the plans in a folder: they may be called anything, but they have configurations."""
    return [
        path.stem for path in sorted(folder.glob("*.json")) if '"configurations"' in path.read_text(errors="replace")
    ]


def read_plans(folder: Path, plans: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans and dataset.json of a preprocessed dataset.

    Args:
        folder: of the dataset below ``$nnUNet_preprocessed``.
        plans: name of the plans, ``-p`` of nnU-Net's commands.

    Raises:
        CommandError: where one is missing or damaged; other plans that there are get named.
    """
    cure = f"nnUNetv2_plan_and_preprocess -d {dataset_number(folder)}"
    path = folder / f"{plans}.json"
    if not path.exists() and (others := _plans_in(folder)):
        raise CommandError(f"{folder} has no plans {plans}; it has {', '.join(others)} (-p)")
    base = read_json(path, cure, ["plans_name", "configurations"])
    return base, read_json(folder / "dataset.json", cure, ["channel_names", "labels"])


def dataset_number(folder: Path) -> int:
    """The number in ``Dataset123_Name``."""
    return int(folder.name[len("Dataset") :].split("_")[0])
