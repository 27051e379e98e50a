"""Checks of the folds: complete, and no patient on both sides."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dataset_conversion.raw_dataset import REPORT
from dataset_conversion.splits import leaks
from nnunet_h2a.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding, some

SPLITS = "splits_final.json"

#: Case names that say whose they are: autoPET's own, and those of our converters.
PATIENT_IN_NAME = (
    re.compile(r"^((?:fdg|psma|PETCT)_[0-9a-zA-Z]+)_(?:\d{2,4}-\d{2}-\d{2,4}|\d{8}).*$"),
    re.compile(r"^([A-Z]+-\d{3})(?:_\d+)?$"),
)


def patients_of(raw: Path | None, cases: Sequence[str]) -> tuple[dict[str, str], str]:
    """Whose each case is, and how that is known ('' unless it is known of all).

    Args:
        raw: the dataset's folder below ``$nnUNet_raw``, None where it is elsewhere.
        cases: identifiers.
    """
    known: dict[str, str] = {}
    if raw is not None:
        try:
            report = json.loads((raw / REPORT).read_text(encoding="utf-8"))["cases"]
            known = {name: report[name]["patient"] for name in cases if "patient" in report.get(name, {})}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            known = {}
    if cases and len(known) == len(cases):
        return known, f"patients by {REPORT}"
    for form in PATIENT_IN_NAME:
        found = {case: match.group(1) for case in cases if (match := form.match(case))}
        if len(found) == len(cases) and cases:
            return found, "patients by the cases' names"
    return {}, ""


def check_splits(raw: Path | None, preprocessed: Path | None, cases: Sequence[str]) -> Iterator[Finding]:
    """Folds of a dataset.

    Args:
        raw: the dataset's folder below ``$nnUNet_raw``, None where it is elsewhere.
        preprocessed: below ``$nnUNet_preprocessed``, None where there is none.
        cases: identifiers of the training cases.
    """
    patients, how = patients_of(raw, cases)
    path = next((f / SPLITS for f in (preprocessed, raw) if f is not None and (f / SPLITS).is_file()), None)
    if path is None:
        yield from _without_folds(raw or preprocessed, patients)
        return
    try:
        folds = [
            {side: [str(c) for c in fold[side]] for side in ("train", "val")} for fold in json.loads(path.read_text())
        ]
        if not folds:
            raise ValueError("no folds")
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Finding(
            PROBLEM, f"{path} is no list of folds with train and val ({type(error).__name__})",
            "delete it and run the conversion, or nnU-Net's planning, again",
        )  # fmt: skip
        return
    yield from _complete(path, folds, cases)
    if raw is not None:
        yield from _same_as_raw(path, raw)
    yield from _leaks(path, folds, patients, how)


def _without_folds(raw: Path, patients: Mapping[str, str]) -> Iterator[Finding]:
    several = sorted(p for p, n in Counter(patients.values()).items() if n > 1)
    if several:
        yield Finding(
            PROBLEM, f"no {SPLITS}: nnU-Net will draw folds by case, and {len(several)} patients have several "
            f"({some(several)})", f"write folds by patient to {raw / SPLITS}: the converters of this package do",
        )  # fmt: skip
    elif not patients:
        yield Finding(
            WARNING, f"no {SPLITS}, and whose cases these are is not known: nnU-Net will draw folds by case",
            f"if patients have several cases, write folds by patient to {raw / SPLITS}",
        )  # fmt: skip
    else:
        yield Finding(OK, f"no {SPLITS} yet: nnU-Net draws folds by case, and no patient has two")


def _complete(path: Path, folds: Sequence[Mapping[str, Sequence[str]]], cases: Sequence[str]) -> Iterator[Finding]:
    there = set(cases)
    gone = sorted({case for fold in folds for side in fold.values() for case in side} - there)
    if gone:
        yield Finding(
            PROBLEM, f"{path} names cases that are not in the dataset: {some(gone)}",
            f"run the conversion again, or take them out of every {SPLITS} of this dataset",
        )  # fmt: skip
    for number, fold in enumerate(folds):
        both = sorted(set(fold["train"]) & set(fold["val"]))
        if both and sorted(fold["train"]) != sorted(fold["val"]):
            yield Finding(
                PROBLEM, f"{path}: fold {number} trains and validates on {some(both)}", "take them out of train"
            )
        elif both:
            yield Finding(NOTE, f"{path}: fold {number} validates on what it trains on, one patient's cases")
        if not fold["train"] or not fold["val"]:
            yield Finding(PROBLEM, f"{path}: fold {number} has an empty side", "write the folds anew")
    times = Counter(case for fold in folds for case in set(fold["val"]))
    unseen = sorted(there - {case for fold in folds for side in fold.values() for case in side})
    if unseen:
        yield Finding(
            WARNING, f"{path}: {len(unseen)} cases are in no fold ({some(unseen)})",
            "was the dataset enlarged? write the folds anew",
        )  # fmt: skip
    twice = sorted(case for case, n in times.items() if n > 1)
    if twice and len(folds) > 1:
        yield Finding(
            WARNING, f"{path}: {len(twice)} cases are validated in several folds ({some(twice)})",
            "a mean over all folds then counts them more than once",
        )  # fmt: skip


def _same_as_raw(path: Path, raw: Path) -> Iterator[Finding]:
    other = raw / SPLITS
    if other == path or not other.is_file():
        return
    try:
        same = json.loads(other.read_text()) == json.loads(path.read_text())
    except ValueError:
        same = False
    if not same:
        yield Finding(
            WARNING, f"{path} differs from {other}, and nnU-Net trains by the former",
            f"if the latter is right: rm {path}, and run nnU-Net's planning again, which stops otherwise",
        )  # fmt: skip


def _leaks(
    path: Path, folds: Sequence[Mapping[str, Sequence[str]]], patients: Mapping[str, str], how: str
) -> Iterator[Finding]:
    if not patients:
        yield Finding(NOTE, f"{path}: whose cases these are is not known; equal images are looked for")
        return
    # One patient alone can only be validated on what it was trained on, which is told already.
    real = [fold for fold in folds if sorted(fold["train"]) != sorted(fold["val"])]
    divided = leaks(real, patients)
    if divided:
        numbers = [str(n) for n, fold in enumerate(folds) if fold in real and leaks([fold], patients)]
        yield Finding(
            PROBLEM, f"{path}: {len(divided)} patients are trained and validated on ({some(divided)}; fold "
            f"{', '.join(numbers)}; {how})", f"convert with --splits patient, rm {path}, plan again",
        )  # fmt: skip
    else:
        count = len(set(patients.values()))
        yield Finding(OK, f"{path}: {len(folds)} folds, {count} patients, none on both sides ({how})")


def equal_files(files: Mapping[str, Path]) -> list[list[str]]:
    """Groups of cases whose files are equal byte by byte; only files of one size are read.

    Args:
        files: case identifier to a file of it.
    """
    by_size: dict[int, list[str]] = {}
    for case, path in files.items():
        by_size.setdefault(path.stat().st_size, []).append(case)
    groups: dict[Any, list[str]] = {}
    for cases in by_size.values():
        for case in cases if len(cases) > 1 else ():
            with files[case].open("rb") as file:
                groups.setdefault(_digest(file), []).append(case)
    return [sorted(cases) for cases in groups.values() if len(cases) > 1]


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
