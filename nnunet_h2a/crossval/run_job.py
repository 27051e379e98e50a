"""One job: train, validate and score what is not done yet, with nnU-Net's and our commands."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nnunet_h2a.crossval.jobs import MEASURES, Job, is_whole

#: Somebody else works on the job.
BUSY = 75
_SCORER = "h2a_evaluate"
# Seconds that a command has to end when it is asked to.
_PATIENCE = 20


@dataclass(frozen=True)
class Settings:
    """What holds for all jobs.

    Attributes:
        device: nnU-Net's ``-device``.
        probabilities: keep them (``--npz``).
        file_ending: of the dataset.
    """

    device: str
    probabilities: bool
    file_ending: str


def command(name: str) -> str:
    """A console command of this Python environment, by its path where it has one."""
    path = Path(sys.executable).parent / name
    return str(path if path.exists() or path.with_suffix(".exe").exists() else name)


def next_command(job: Job, settings: Settings) -> list[str] | None:
    """The command that brings a job one step further; None when it is finished."""
    train = [command("nnUNetv2_train"), job.dataset, job.configuration, job.fold, "-tr", job.trainer, "-p", job.plans,
             "-device", settings.device, *(["--npz"] if settings.probabilities else [])]  # fmt: skip
    if not job.is_trained():
        # nnU-Net begins anew where there is no checkpoint yet.
        return [*train, "--c"]
    if not job.is_validated(settings.file_ending, settings.probabilities):
        return [*train, "--val"]
    if not job.is_scored():
        return [command(_SCORER), "-ref", str(job.preprocessed / "gt_segmentations"), "-pred",
                str(job.validation), "-djfile", str(job.preprocessed / "dataset.json"), "--chill", "--convention",
                "all", "-np", "1", "-o", str(job.scores), "--cache", str(job.validation / MEASURES)]  # fmt: skip
    return None


def _flock(file: IO[str]) -> bool:
    """Try to get a lock; where the system has no such locks (Windows) the user sees to it that one run is enough."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def _held(path: Path, patience: float = 0.0) -> Iterator[IO[str] | None]:
    """Hold a lock file as long as this process or a command that inherits it lives; None where another holds it.

    The file says whose it is. A command that was killed may leave children behind that hold the lock and do nothing, as
    nnU-Net's augmentation workers do: these are ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        deadline = time.monotonic() + patience
        while not _flock(file):
            _end_orphans(path)
            if time.monotonic() >= deadline:
                yield None
                return
            time.sleep(0.1)
        _own(file, os.getpid())
        yield file


def _own(file: IO[str], process: int) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps({"host": socket.gethostname(), "process": process}))
    file.flush()


def _end_orphans(path: Path) -> None:
    """End what is left of a command whose first process is gone. Its session has that process's number."""
    try:
        owner = json.loads(path.read_text())
        if owner["host"] != socket.gethostname():
            return
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(owner["process"], signal.SIGKILL)
    except (OSError, ValueError, KeyError, TypeError):
        return


def is_busy(job: Job) -> bool:
    """Whether a process works on the job, of this run or of another."""
    if not job.lock.is_file():
        return False
    with job.lock.open("a+") as file:
        return not _flock(file)


def run_job(job: Job, settings: Settings, environment: Mapping[str, str]) -> int:
    """Run a job's commands until it is finished, one fails, or one leaves the job where it was.

    Args:
        job: what to run.
        settings: how.
        environment: what is added to this process's environment variables.

    Returns:
        0 when the job is finished; BUSY where another process works on it; else the exit code of what failed.
    """
    # Who only looks whether a job is busy holds the lock for a moment.
    with _held(job.lock, patience=1.0) as lock:
        if lock is None:
            return BUSY
        previous = None
        while (step := next_command(job, settings)) is not None:
            if step == previous:
                _note(job, "the last command ended without an error, and what it should have written is not there")
                return 1
            previous = step
            _prepare(job, step)
            with job.log.open("a", encoding="utf-8") as log:
                log.write(f"\n$ {' '.join(step)}\n")
                log.flush()
                code = _run(step, os.environ | environment, log, lock)
            if code:
                return 1 if code == BUSY else code
            if step[0].endswith(_SCORER):
                job.note_scored()
        return 0


def _note(job: Job, text: str) -> None:
    with job.log.open("a", encoding="utf-8") as log:
        log.write(text + "\n")


def _prepare(job: Job, step: list[str]) -> None:
    """Put away what would mislead a command: checkpoints that were cut off, the summary of an earlier validation."""
    if "--c" in step:
        for name in ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"):
            checkpoint = job.folder / name
            if checkpoint.is_file() and not is_whole(checkpoint):
                _note(job, f"{checkpoint} was cut off while it was written: it is now {name}.damaged")
                checkpoint.replace(checkpoint.with_name(f"{name}.damaged"))
    elif "--val" in step:
        job.summary.unlink(missing_ok=True)


def _run(step: list[str], environment: Mapping[str, str], log: IO[str], lock: IO[str]) -> int:
    """Run a command in a session of its own, and end what it leaves behind; it keeps the lock as long as it lives."""
    separate = {} if os.name == "nt" else {"pass_fds": (lock.fileno(),), "start_new_session": True}
    process = subprocess.Popen(step, env=dict(environment), stdout=log, stderr=subprocess.STDOUT, **separate)
    _own(lock, process.pid)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        raise
    finally:
        if os.name != "nt":
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _own(lock, os.getpid())


def reason(job: Job) -> str:
    """Why a job failed: the last line of its log that says something."""
    try:
        lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it left no log"
    # What earlier commands have said is not the reason.
    begins = max((number for number, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    # Nor is what this command has said of them.
    said = [line.strip() for line in lines[begins + 1 :] if line.strip() and not line.startswith("failed: ")]
    errors = [line for line in said if "Error" in line or line.startswith(("error: ", "refused: "))]
    return (errors or said or ["nothing"])[-1][:300]
