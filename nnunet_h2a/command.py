"""What our console commands share: errors for people, and nnU-Net's folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

#: Exit code of a command that did nothing.
NOTHING_DONE = 2
#: Exit code of a command that Ctrl-C has ended.
INTERRUPTED = 130


class CommandError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do."""


def run_command(action: Callable[[], int]) -> int:
    """Run ``action``; bad input and files that cannot be read or written become one line on stderr and exit code 2."""
    try:
        return action()
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return NOTHING_DONE


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
        CommandError: unless exactly one folder matches.
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
    raise CommandError(
        f"{parent} holds several datasets {dataset}: {', '.join(p.name for p in found)}; remove all but one"
    )
