"""Files below a source folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from dataset_conversion.errors import ConversionError


def iterate_files(source: Path, faults: list[ConversionError] | None = None) -> Iterator[str]:
    """Yield all files below ``source`` in sorted order, links to folders followed once; hidden names are left out.

    Args:
        source: a folder.
        faults: gets an error for every folder that cannot be opened.
    """
    visited = set()
    own = _own_folder(source)

    def note(error: OSError) -> None:
        if faults is not None:
            what = f"cannot be opened ({error.strerror})"
            faults.append(ConversionError(what, "allow reading it", error.filename))

    for folder, subfolders, names in os.walk(source, followlinks=True, onerror=note):
        real = os.path.realpath(folder)
        if real in visited or real == own:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(folder, name)
            if not name.startswith(".") and _may_be_read(path):
                yield path


def _own_folder(source: Path) -> str:
    """Return nnUNet_raw where it lies below the source: what was converted is no source."""
    raw = os.environ.get("nnUNet_raw", "").strip()
    real = os.path.realpath(os.path.expanduser(raw)) if raw else ""
    return real if real and Path(real).is_relative_to(os.path.realpath(source)) else ""


def _may_be_read(path: str) -> bool:
    """False for pipes and devices, which may never end; what cannot be looked at is reported on opening."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def list_files(source: Path, progress: Callable[[], None], faults: list[ConversionError] | None = None) -> list[str]:
    """Return what ``iterate_files`` yields, nothing where ``source`` is no folder; ``progress`` is called per file."""
    paths = []
    for path in iterate_files(source, faults) if source.is_dir() else ():
        progress()
        paths.append(path)
    return paths
