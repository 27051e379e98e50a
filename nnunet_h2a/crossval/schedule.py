"""All jobs on all slots, with a table of how far each is."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from nnunet_h2a.command import CommandError
from nnunet_h2a.crossval.jobs import (
    FAILED,
    FINISHED,
    SCORING,
    TRAINING,
    VALIDATING,
    WAITING,
    Job,
    Progress,
    progress_of,
)
from nnunet_h2a.crossval.run_job import BUSY, Settings, is_busy, reason
from nnunet_h2a.crossval.slots import Places, Slot

#: Seconds between looks at what runs, and until a job that another run works on is asked for again.
LOOK, ASK_AGAIN = 2.0, 30.0
#: Seconds without any place to run before giving up: workers may be restarted.
ALONE = 60.0
_STAGES = {WAITING: 0, TRAINING: 1, VALIDATING: 2, SCORING: 3}


def run_all(
    jobs: Sequence[Job],
    places: Places,
    settings: Settings,
    show: Callable[[Mapping[Job, Progress], Mapping[Job, str], int], None],
) -> dict[Job, str]:
    """Run what is not finished yet.

    Args:
        jobs: in the order in which they begin; a cascade's second stage waits for its first.
        places: where.
        settings: how.
        show: is called again and again with every job's progress, its place where it runs, and the number of places.

    Returns:
        The jobs that failed, and why. What waits for them has not begun.
    """
    numbers = {job: number for number, job in enumerate(jobs)}
    failed: dict[Job, str] = {}
    finished = {job for job in jobs if _progress(job, settings).stage == FINISHED}
    waiting = [job for job in jobs if job not in finished]
    not_before: dict[Job, float] = {}
    running: dict[Slot, Job] = {}
    slots: list[Slot] = []
    there = time.monotonic()
    try:
        while True:
            for slot, job in list(running.items()):
                code = slot.poll()
                if code is None:
                    continue
                del running[slot]
                if code == BUSY:
                    not_before[job] = time.monotonic() + ASK_AGAIN
                    waiting.append(job)
                elif code:
                    failed[job] = reason(job)
                else:
                    finished.add(job)
            for job in [job for job in waiting if _lost(job, failed)]:
                waiting.remove(job)
                failed[job] = f"waits for {job.after}, which failed"
            slots = [slot for slot in slots if slot in running or slot.is_there()]
            slots += places.newcomers([slot.name for slot in slots])
            there = time.monotonic() if slots else there
            if time.monotonic() - there > ALONE:
                raise CommandError("no worker is left: start some, and this command again, which goes on")
            for slot in (slot for slot in slots if slot not in running):
                ready = [
                    job for job in waiting
                    if not_before.get(job, 0) <= time.monotonic() and _can_begin(job, jobs, finished)
                ]  # fmt: skip
                if ready:
                    waiting.remove(ready[0])
                    slot.start(ready[0], numbers[ready[0]])
                    running[slot] = ready[0]
            where = {job: slot.name for slot, job in running.items()}
            where |= {job: "another run" for job in waiting if job in not_before and is_busy(job)}
            show({job: _shown(job, settings, finished, failed, where) for job in jobs}, where, len(slots))
            if not waiting and not running:
                return failed
            time.sleep(LOOK)
    except BaseException:
        for slot in running:
            slot.stop()
        for slot in running:
            slot.join()
        raise


def _progress(job: Job, settings: Settings) -> Progress:
    return progress_of(job, settings.file_ending, settings.probabilities)


def _lost(job: Job, failed: Mapping[Job, str]) -> bool:
    return job.after is not None and any(other.model == job.after for other in failed)


def _can_begin(job: Job, jobs: Sequence[Job], finished: set[Job]) -> bool:
    return job.after is None or all(other in finished for other in jobs if other.model == job.after)


def _shown(
    job: Job, settings: Settings, finished: set[Job], failed: Mapping[Job, str], places: Mapping[Job, str]
) -> Progress:
    if job in finished or job in failed:
        return Progress(FINISHED if job in finished else FAILED)
    found = _progress(job, settings)
    return found if job in places else Progress(WAITING, found.epoch, found.epoch_seconds)


def seconds_left(progress: Progress, epochs: int | None, typical: float | None) -> float | None:
    """Seconds of training that a job has before it.

    Args:
        progress: of the job.
        epochs: of its training; None where unknown.
        typical: seconds per epoch of jobs like it, for one that has not begun.
    """
    if progress.stage not in (WAITING, TRAINING):
        return 0.0
    each = progress.epoch_seconds or typical
    return None if each is None or epochs is None else max(epochs - progress.epoch, 0) * each


def duration(seconds: float | None) -> str:
    """In words as short as a table needs."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class Table:
    """The state of every job; in a terminal it is drawn over again, elsewhere only what changes is printed."""

    def __init__(self, epochs: Mapping[str, int | None]) -> None:
        self._epochs = epochs
        self._lines = 0
        self._stages: dict[Job, str] = {}
        self._live = sys.stdout.isatty()

    def __call__(self, progress: Mapping[Job, Progress], places: Mapping[Job, str], slots: int) -> None:
        """Show how far the jobs are."""
        if self._live:
            width, height = shutil.get_terminal_size()
            # A line that wraps, or a table taller than the screen, could not be drawn over.
            lines = [line[: width - 1] for line in self.lines(progress, places, slots)]
            lines = lines if len(lines) < height else [*lines[: height - 3], "…", lines[-1]]
            # Up to the first line of the last table, and clear to the end of the screen.
            sys.stdout.write(f"\x1b[{self._lines}F\x1b[J" if self._lines else "")
            sys.stdout.write("\n".join(lines) + "\n")
            self._lines = len(lines)
        else:
            for job, state in progress.items():
                if self._stages.get(job) != state.stage:
                    print(f"{job.model} fold {job.fold}: {state.stage}{self._where(job, places)}", flush=True)
            self._stages = {job: state.stage for job, state in progress.items()}
        sys.stdout.flush()

    @staticmethod
    def _where(job: Job, places: Mapping[Job, str]) -> str:
        return f" on {places[job]}" if job in places else ""

    def lines(self, progress: Mapping[Job, Progress], places: Mapping[Job, str], slots: int) -> list[str]:
        """The table."""
        rows = [("model", "fold", "state", "epoch", "time left")]
        left: list[float | None] = []
        for job, state in progress.items():
            alike = [p.epoch_seconds for other, p in progress.items() if other.model == job.model and p.epoch_seconds]
            epochs = self._epochs.get(job.model)
            left.append(seconds_left(state, epochs, sum(alike) / len(alike) if alike else None))
            begun = state.stage == TRAINING or (state.stage == WAITING and state.epoch)
            rows.append((
                job.model, job.fold, state.stage + self._where(job, places),
                f"{state.epoch}/{epochs or '?'}" if begun else "",
                duration(left[-1]) if state.stage in (WAITING, TRAINING) else "",
            ))  # fmt: skip
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        done = sum(state.stage == FINISHED for state in progress.values())
        total = None if any(seconds is None for seconds in left) else sum(left) / max(slots, 1)
        return [
            *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
            f"{done} of {len(progress)} finished; training left: {duration(total)}",
        ]
