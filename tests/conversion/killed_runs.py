"""Run a conversion that is killed at a chosen change of the output folder, and then once more: a script for a test.

Usage: ``python killed_runs.py FOLDER MODULE ARGUMENTS...``. A conversion into a fresh ``nnUNet_raw`` is killed at its
first change (a file opened for writing, made, moved or removed), another at its second, and so on, each in a process
of its own, forked so that libraries are imported once. Below FOLDER they leave, for change N, ``N/nnUNet_raw`` as the
second run left it and ``N/seen`` with a copy of the dataset folder that was there between the two runs, if any.
``count`` says how many changes there are. Where FOLDER holds a ``before``, every ``nnUNet_raw`` begins as a copy of it.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
from pathlib import Path

_CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(raw: Path, kill_at: int | None) -> list[int]:
    """Count changes below ``raw`` from now on, and end this process at one of them without any warning."""
    count = [0]

    def hook(event: str, arguments: tuple) -> None:
        changes = event in _CHANGES or (event == "open" and arguments[2] & _WRITING)
        if changes and str(raw) in str(arguments[0]):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def in_another_process(main, arguments: list[str], raw: Path, kill_at: int | None = None) -> int:
    """Return the number of changes, or minus the signal that ended it; raise where the conversion failed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.environ["nnUNet_raw"] = str(raw)
        count = watch(raw, kill_at)
        code = main(arguments)
        os.write(writing, str(count[0]).encode())
        os._exit(code)
    os.close(writing)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reading) as answer:
        counted = answer.read()
    if os.WIFSIGNALED(status):
        return -os.WTERMSIG(status)
    if os.WEXITSTATUS(status):
        raise SystemExit(f"the conversion ended with {os.WEXITSTATUS(status)}")
    return int(counted)


def run() -> None:
    """See above."""
    folder, module, *arguments = sys.argv[1:]
    main = importlib.import_module(module).main
    # Imported, not used: a library's threads would not live on in a forked process.
    for name in ("SimpleITK", "nibabel", "dataset_conversion.engine", "dataset_conversion.processes"):
        importlib.import_module(name)
    before = Path(folder) / "before"

    def begin(name: str) -> Path:
        raw = Path(folder) / name / "nnUNet_raw"
        if before.exists():
            shutil.copytree(before, raw)
        return raw

    changes = in_another_process(main, arguments, begin("whole"))
    for change in range(1, changes + 1):
        raw = begin(str(change))
        ended = in_another_process(main, arguments, raw, change)
        if ended != -signal.SIGKILL:
            raise SystemExit(f"change {change} of {changes} did not come")
        published = list(raw.glob("Dataset*"))
        if published:
            shutil.copytree(published[0], raw.parent / "seen")
        in_another_process(main, arguments, raw)
    (Path(folder) / "count").write_text(str(changes))


if __name__ == "__main__":
    run()
