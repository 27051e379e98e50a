"""One job: train, validate and score what is not done yet, with nnU-Net's and our commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nnunet_h2a.crossval.jobs import MEASURES, Job

#: Somebody else works on the job.
BUSY = 75


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
        return [command("h2a_evaluate"), "-ref", str(job.preprocessed / "gt_segmentations"), "-pred",
                str(job.validation), "-djfile", str(job.preprocessed / "dataset.json"), "--chill", "--convention",
                "all", "-np", "1", "-o", str(job.scores), "--cache", str(job.validation / MEASURES)]  # fmt: skip
    return None


@contextmanager
def _held(path: Path) -> Iterator[IO[str] | None]:
    """Hold a lock file as long as this process or a child that inherits it lives; None where another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: two runs at once are the user's to avoid
            yield file
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield file


def is_busy(job: Job) -> bool:
    """Whether a process works on the job, of this run or of another."""
    if not job.lock.is_file():
        return False
    with _held(job.lock) as file:
        return file is None


def run_job(job: Job, settings: Settings, environment: Mapping[str, str]) -> int:
    """Run a job's commands until it is finished, one fails, or one leaves the job where it was.

    Args:
        job: what to run.
        settings: how.
        environment: what is added to this process's environment variables.

    Returns:
        0 when the job is finished; BUSY where another process works on it; else the exit code of what failed.
    """
    with _held(job.lock) as lock:
        if lock is None:
            return BUSY
        previous = None
        while (step := next_command(job, settings)) is not None:
            if step == previous:
                with job.log.open("a", encoding="utf-8") as log:
                    log.write("the last command ended without an error, and what it should have written is not there\n")
                return 1
            previous = step
            with job.log.open("a", encoding="utf-8") as log:
                log.write(f"\n$ {' '.join(step)}\n")
                log.flush()
                code = _run(step, os.environ | environment, log, lock)
            if code:
                return code
        return 0


def _run(step: list[str], environment: Mapping[str, str], log: IO[str], lock: IO[str]) -> int:
    """Run a command; it keeps the lock for as long as it lives, also where this process is killed."""
    inherited = {} if os.name == "nt" else {"pass_fds": (lock.fileno(),)}
    with subprocess.Popen(step, env=dict(environment), stdout=log, stderr=subprocess.STDOUT, **inherited) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise


def reason(job: Job) -> str:
    """Why a job failed: the last line of its log that says something."""
    try:
        lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it left no log"
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if "Error" in line or line.startswith("error:")]
    return (errors or said or ["nothing"])[-1][:300]
