"""What all converter commands share: their flags, their messages and their exit codes.

Exit codes: 0 all converted, 1 some patients refused, 2 nothing done, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from dataset_conversion import raw_dataset
from dataset_conversion.cases import Discovery, Recipe, Refusal
from dataset_conversion.engine import SPLITS, plan_splits, run, split_test_cases, unique_cases
from dataset_conversion.errors import ConversionError, UsageError, where
from dataset_conversion.processes import Workers
from dataset_conversion.raw_dataset import PET_NORMALIZATIONS
from dataset_conversion.workspace import DATASET_JSON, REPORT

MAX_NOTES = 20
ALL_CONVERTED, SOME_REFUSED, NOTHING_DONE, INTERRUPTED = 0, 1, 2, 130


def build_parser(
    prog: str, description: str, default_name: str, default_grid: str | None, splits: Sequence[str] = ("patient", "622")
) -> argparse.ArgumentParser:
    """Return a parser with the flags common to all converters.

    Args:
        prog: the command.
        description: what it converts.
        default_name: of the dataset.
        default_grid: ``ct`` or ``pet``, None where both are on one grid anyway.
        splits: ways of dividing its cases, keys of ``engine.SPLITS``.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="Exit code: 0 all converted, 1 some patients refused (each with its reason), 2 nothing done.",
    )
    parser.add_argument(
        "-i", "--input", required=True, metavar="SOURCE", help="folder with the data, searched whatever its layout"
    )
    parser.add_argument(
        "-d", "--dataset-id", required=True, type=int, metavar="ID", help="nnU-Net dataset ID, 1 to 999"
    )
    parser.add_argument("--name", default=default_name, help=f"dataset name (default: {default_name})")
    if default_grid is not None:
        parser.add_argument(
            "--grid",
            choices=("ct", "pet"),
            default=default_grid,
            help=f"voxel grid of the dataset; the other image is resampled to it (default: {default_grid})",
        )
    parser.add_argument(
        "-np",
        "--num-processes",
        type=_positive,
        default=None,
        metavar="N",
        help="worker processes (default: nnUNet_def_n_proc, else the number of cores, at most 8)",
    )
    parser.add_argument(
        "--dask", metavar="tcp://HOST:PORT", help="hand the cases to this Dask cluster instead of -np processes"
    )
    parser.add_argument("--test", nargs="+", default=[], metavar="PATIENT", help="patients for imagesTs and labelsTs")
    parser.add_argument(
        "--splits",
        choices=splits,
        help="; ".join(f"{name}: {SPLITS[name]}" for name in splits)
        + f" (default: {'shipped where there are such, else ' * ('shipped' in splits)}patient)",
    )
    parser.add_argument(
        "--pet-normalization",
        choices=tuple(PET_NORMALIZATIONS),
        help="what nnU-Net does with PET, set by the channel's name in dataset.json. zscore: mean 0 and SD 1 in every "
        "image, nnU-Net's own choice for PET; the same SUV then differs with field of view, bladder and brain. ct: "
        "clipped and scaled by the percentiles, mean and SD of all tumours' voxels, as the autoPET winners had it; "
        "keeps SUV comparable, but flattens what is below the tumours' 0.5 %% percentile and needs tumours. suv: "
        "absolute, fixed scaling; keeps SUV comparable and clips nothing (default: zscore, or what an earlier "
        "dataset.json has)",
    )
    parser.add_argument(
        "--link",
        choices=("copy", "hard", "soft"),
        default="copy",
        help="how files are taken over that can be used as they are: copy; hard link (same file system, else copied); "
        "soft link (needs the source for good) (default: copy)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and write nothing")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def default_processes() -> int:
    """Return nnU-Net's own setting where the user has made one, else the number of cores, at most 8."""
    setting = os.environ.get("nnUNet_def_n_proc", "").strip()
    return int(setting) if setting.isdigit() and int(setting) > 0 else min(8, os.cpu_count() or 1)


def execute(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """Run a converter command and return its exit code; every fault becomes one line on the error stream."""
    for stream in (sys.stdout, sys.stderr):
        # File names of other systems may not be text, and the terminal may not be UTF-8.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _execute(recipe, arguments)
    except ConversionError as error:
        print_error(f"{recipe.command}: error: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print_error(f"{recipe.command}: error: {where}{error.strerror or error}; correct this and run again")
    except MemoryError:
        print_error(f"{recipe.command}: error: not enough memory; free some and run again, finished cases are kept")
    except Exception as error:  # whatever it is, a user gets one line
        remedy = "please report this; run again to go on, finished cases are kept"
        print_error(f"{recipe.command}: error: unexpected {where(error)}; {remedy}")
    except KeyboardInterrupt:
        with contextlib.suppress(ValueError):
            # The process ends now; a second Ctrl-C must not end it with a traceback. ValueError: not the main thread.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print_error(f"{recipe.command}: interrupted; run the same command again to go on, finished cases are kept")
        return INTERRUPTED
    return NOTHING_DONE


def _execute(recipe: Recipe, arguments: argparse.Namespace) -> int:
    dataset = raw_dataset.locate(arguments.dataset_id, arguments.name)
    source = Path(arguments.input).expanduser()
    if arguments.dask:
        # Workers of a cluster run in folders of their own.
        source = source.absolute()
    if not source.exists():
        raise UsageError("does not exist", "give the folder with the data: -i SOURCE", source)
    with _Bar("searching", "files") as bar:
        discovery = recipe.discover(source, recipe.options, bar.tick)
    unique_cases(discovery)
    if not discovery.cases:
        _report_refusals(discovery.refusals)
        counted = f" ({_count_refusals(discovery.refusals, 0, recipe.unit)})" if discovery.refusals else ""
        if discovery.passed_over and not discovery.refusals:
            raise UsageError(f"holds nothing that is wanted: {_left_out(discovery)}", "change that flag", source)
        what = f"{'is a file and ' if source.is_file() else ''}holds nothing that can be converted{counted}"
        raise UsageError(what, f"give -i the folder with {recipe.looks_for}", source)
    recipe = _with_flags(recipe, arguments, discovery)
    if arguments.dry_run:
        return _dry_run(recipe, discovery, dataset, arguments.test)
    workers = Workers(arguments.num_processes or default_processes(), arguments.dask)
    with _Bar("converting", "cases") as bar:
        outcome = run(recipe, source, dataset, discovery, workers, arguments.test, bar.start)
    _report_refusals(outcome.refusals)
    summary = _count_refusals(outcome.refusals, len(outcome.converted) + len(outcome.kept), recipe.unit)
    if not outcome.splits:
        print_error(f"{summary}; no training case could be converted, no dataset was written")
        return NOTHING_DONE
    for text in discovery.notes:
        print_error(f"warning: {text}")
    if any(set(fold["train"]) & set(fold["val"]) for fold in outcome.splits) and recipe.splits != "shipped":
        print_error("warning: one patient alone is left to train on, who is validated on as well (fold 0)")
    if discovery.passed_over:
        say(f"note: {_left_out(discovery)}")
    _print_notes([f"note: {case_id}: {text}" for case_id, texts in outcome.notes.items() for text in texts])
    say(
        f"{dataset}: {len(outcome.converted)} cases converted, {len(outcome.kept)} kept from an earlier run, "
        f"{len(outcome.refusals)} refused; details in conversion_report.json"
    )
    stale = raw_dataset.stale_preprocessed_splits(dataset.name, outcome.splits)
    if stale is not None:
        print_error(
            f"warning: {stale} holds other folds than the new dataset and nnU-Net would stop; "
            f"type: rm {shlex.quote(str(stale))}"
        )
    prepared = raw_dataset.stale_fingerprint(dataset)
    if prepared is not None:
        print_error(
            f"warning: {prepared} was made of an earlier state of this dataset, and nnU-Net would go on with it; plan "
            "with --clean, as below"
        )
    for text in outcome.edits:
        print_error(f"warning: {dataset / DATASET_JSON}: {text}")
    say("next:")
    commands = raw_dataset.next_commands(
        recipe.spec,
        arguments.dataset_id,
        len(outcome.splits),
        outcome.test_cases > 0,
        dataset.name,
        prepared is not None,
    )
    for line in commands:
        say(f"  {line}")
    if not outcome.refusals:
        return ALL_CONVERTED
    print_error(f"{summary}; see {dataset / REPORT}")
    return SOME_REFUSED


def _left_out(discovery: Discovery) -> str:
    """Return how many cases were left out on the user's wish, with one of them."""
    name, reason = min(discovery.passed_over.items())
    return f"{len(discovery.passed_over)} cases were left out (e.g. {name}: {reason})"


def _with_flags(recipe: Recipe, arguments: argparse.Namespace, discovery: Discovery) -> Recipe:
    spec = (discovery.spec or recipe.spec).normalised(arguments.pet_normalization)
    return replace(
        recipe,
        spec=spec,
        splits=arguments.splits or ("shipped" if discovery.folds else "patient"),
        link=arguments.link,
        keep_channel_names=arguments.pet_normalization is None,
    )


def _dry_run(recipe: Recipe, discovery: Discovery, dataset: Path, test: Sequence[str]) -> int:
    test_ids, _ = plan_splits(recipe, discovery, split_test_cases(discovery, test))
    refusals = list(discovery.refusals)
    say(f"would write {dataset}:")
    for case in discovery.cases:
        try:
            line = recipe.describe(case, recipe.options)
        except Exception as error:  # one odd file must not hide the other cases
            if not isinstance(error, ConversionError):
                error = ConversionError(f"unexpected {where(error)}", "please report this with the file's headers")
            refusals.append(Refusal.of(case, error))
            continue
        say(f"  {case.case_id} ({'test' if case.case_id in test_ids else 'training'}): {line}")
    for name, reason in sorted(discovery.passed_over.items()):
        say(f"  {name}: left out, {reason}")
    for text in discovery.notes:
        print_error(f"warning: {text}")
    if not refusals:
        return ALL_CONVERTED
    _report_refusals(refusals)
    good = len(discovery.cases) + len(discovery.refusals) - len(refusals)
    print_error(f"{_count_refusals(refusals, good, recipe.unit)}; a dry run writes no report")
    return SOME_REFUSED if good else NOTHING_DONE


class _Heard:
    """A stream that goes on when nobody listens (a closed pipe, a full disk): what was converted stays converted."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write, or from the first failure on nothing any more."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # Python flushes its streams once more at the end and would fail then.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def flush(self) -> None:
        """Nothing is held back."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(text: str) -> None:
    """Write one line to the output."""
    _Heard(sys.stdout).write(f"{text}\n")


def print_error(text: str) -> None:
    """Write one line to the error stream, after all that was printed before."""
    _Heard(sys.stderr).write(f"{text}\n")


def _print_notes(lines: Sequence[str]) -> None:
    for line in lines[:MAX_NOTES]:
        say(line)
    if len(lines) > MAX_NOTES:
        say(f"note: {len(lines) - MAX_NOTES} more notes are in conversion_report.json")


def _report_refusals(refusals: Sequence[Refusal]) -> None:
    for refusal in refusals:
        print_error(f"refused {refusal}")


def _count_refusals(refusals: Sequence[Refusal], good: int, unit: str) -> str:
    """Return e.g. ``1 of 3 patients refused``, files that belong to no known patient counted apart."""
    refused = sum(refusal.of_case for refusal in refusals)
    files = len(refusals) - refused
    return f"{refused} of {refused + good} {unit} refused" + (f", {files} unreadable files" if files else "")


class _Bar:
    """A tqdm bar on the error stream, made on first use, so that ``--help`` does not import tqdm."""

    def __init__(self, what: str, unit: str) -> None:
        self._what = what
        self._unit = unit
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, total: int | None) -> Callable[[], None]:
        """Show the bar for ``total`` steps and return what advances it."""
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=self._what, unit=f" {self._unit}", file=_Heard(sys.stderr), mininterval=0.5)
        return self.tick

    def tick(self) -> None:
        """Advance by one."""
        if self._bar is None:
            self.start(None)
        self._bar.update(1)
