"""PCLT20K's files and lists on disk."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from dataset_conversion.errors import ConversionError

KINDS = ("CT", "PET", "mask")
_FILE = re.compile(r"^(?P<name>.+)_(?P<kind>ct|pet|mask)\.png$", re.IGNORECASE)
_SPOKEN = {kind.lower(): kind for kind in KINDS}
_LISTS = {"train.txt": "train", "test.txt": "test"}


@dataclass
class Slice:
    """One slice.

    Attributes:
        name: as the lists have it, ``<patient>_<number>``.
        folder: where it is.
        files: ``CT``, ``PET`` and ``mask`` to path, those there are.
        fault: why it cannot be converted, where that shows at once.
    """

    name: str
    folder: str
    files: dict[str, str] = field(default_factory=dict)
    fault: ConversionError | None = None


def patient_of(name: str) -> str:
    """Return the patient of a slice: what is before the first ``_``."""
    return name.split("_", 1)[0]


def slice_number(name: str) -> tuple[int, str]:
    """Return what slices of a patient are ordered by: the last number in the name, then the name."""
    numbers = re.findall(r"\d+", name)
    return (int(numbers[-1]) if numbers else -1), name


def find_slices(paths: Sequence[str]) -> dict[str, Slice]:
    """Return slices by name; one that is there twice has that as its fault."""
    slices: dict[str, Slice] = {}
    for path in paths:
        folder, file = os.path.split(path)
        match = _FILE.match(file)
        if match is None:
            continue
        found = slices.setdefault(match["name"], Slice(match["name"], folder))
        kind = _SPOKEN[match["kind"].lower()]
        if kind in found.files:
            found.fault = ConversionError(f"is there twice, also as {found.files[kind]}", "remove one of the two", path)
        found.files[kind] = path
    return slices


def read_lists(paths: Sequence[str]) -> dict[str, str] | None:
    """Return slice name -> ``train`` or ``test``, or None where neither list is there.

    Any line ending will do, also none after the last line; endings of file names are cut off.

    Raises:
        ConversionError: a list is there twice, or a slice is in both, or a list cannot be read.
    """
    found: dict[str, str] = {}
    lists: dict[str, str] = {}
    for path in paths:
        which = _LISTS.get(os.path.basename(path).lower())
        if which is None:
            continue
        if which in found:
            raise ConversionError(f"is there twice, also as {found[which]}", "remove one of the two", path)
        found[which] = path
        try:
            with open(path, encoding="utf-8-sig") as stream:
                names = [line.strip() for line in stream.read().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConversionError(f"cannot be read ({error})", "restore the file", path) from error
        for name in filter(None, names):
            name = re.sub(r"(_(ct|pet|mask))?\.png$", "", name, flags=re.IGNORECASE)
            if lists.setdefault(name, which) != which:
                raise ConversionError(f"{name} is in train.txt and in test.txt", "take it out of one", path)
    if len(found) == 1:
        (which, path), other = next(iter(found.items())), "test" if "train" in found else "train"
        raise ConversionError(f"is there without {other}.txt", f"restore {other}.txt, or --lists ignore", path)
    return lists if found else None
