"""Converting cases: one after the other, in worker processes of this machine, or on a Dask cluster."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nnunet_h2a
from dataset_conversion.cases import Case, CaseWriter, Recipe, Refusal
from dataset_conversion.errors import ConversionError, UsageError, where
from dataset_conversion.raw_dataset import to_bytes
from dataset_conversion.workspace import CASE_FILE

if TYPE_CHECKING:
    from distributed import Client

Job = tuple[Case, str]
DASK_TIMEOUT = 20
# What no other case could be written after either.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _convert_one(recipe: Recipe, case: Case, mark: str, workspace: Path) -> Refusal | None:
    """Convert one case in its own folder and rename that into ``cases`` when it is complete."""
    place = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    work = workspace / "work" / f"{case.case_id}.{place}"
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        record = recipe.convert(case, recipe.options, CaseWriter(work, case, recipe.spec, recipe.link))
        sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        head = {"case_id": case.case_id, "patient": case.patient, "fingerprint": mark, "files": sizes}
        (work / CASE_FILE).write_bytes(to_bytes({**head, **record}))
        target = workspace / "cases" / case.case_id
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(work, target)
        return None
    except ConversionError as error:
        return Refusal.of(case, error)
    except MemoryError:
        remedy = "run again with a smaller -np: finished cases are kept"
        return Refusal.of(case, ConversionError("not enough memory", remedy))
    except OSError as error:
        fatal = error.errno in _NO_ROOM
        remedy = f"{'make room and ' if fatal else ''}run again: finished cases are kept"
        at = workspace if fatal else error.filename
        return Refusal.of(case, ConversionError(f"{error.strerror or error}", remedy, at), fatal)
    except Exception as error:  # a single odd file must not stop the other patients, nor show a traceback
        remedy = "please report this with the file's headers"
        return Refusal.of(case, ConversionError(f"unexpected {where(error)}", remedy))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def start_worker() -> None:
    """Keep a worker to one thread, leave Ctrl-C to the process that started it, and end with that process."""
    import multiprocessing
    import signal

    import SimpleITK as sitk

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@dataclass(frozen=True)
class Workers:
    """Who converts.

    Attributes:
        processes: worker processes on this machine; 1 converts in this one.
        dask: address of a Dask scheduler, ``tcp://host:port``, or None.
    """

    processes: int = 1
    dask: str | None = None


class _Tally:
    """Collects refusals as cases end, and stops the run where no other case could be written either."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.refusals: list[Refusal] = []
        self._tick = tick

    def add(self, refusal: Refusal | None) -> None:
        self._tick()
        if refusal is None:
            return
        if refusal.fatal:
            raise UsageError(refusal.what, refusal.remedy, refusal.file)
        self.refusals.append(refusal)


def convert_all(
    recipe: Recipe, jobs: Sequence[Job], workspace: Path, workers: Workers, tick: Callable[[], None]
) -> list[Refusal]:
    """Convert all jobs; returns what could not be converted.

    Args:
        recipe: the converter.
        jobs: cases with the fingerprints they are to carry.
        workspace: where finished cases go.
        workers: who converts.
        tick: called after each case.

    Raises:
        UsageError: the disk is full, or the cluster cannot be used.
    """
    tally = _Tally(tick)
    if workers.dask and jobs:
        _convert_on_dask(recipe, jobs, workspace, workers.dask, tally)
    elif workers.processes <= 1 or len(jobs) <= 1:
        for job in jobs:
            tally.add(_convert_one(recipe, *job, workspace))
    else:
        left = _convert_in_pool(recipe, jobs, workspace, min(workers.processes, len(jobs)), tally)
        for job in left:
            # A worker was killed, as a rule for want of memory, and took the others' work along: one by one from here.
            if _convert_in_pool(recipe, [job], workspace, 1, tally):
                what = "its worker process died, twice (out of memory?)"
                remedy = "free memory and run again: finished cases are kept"
                tally.add(Refusal.of(job[0], ConversionError(what, remedy)))
    return tally.refusals


def _convert_in_pool(recipe: Recipe, jobs: Sequence[Job], workspace: Path, workers: int, tally: _Tally) -> list[Job]:
    """Convert jobs in worker processes; returns the jobs not done because a worker died."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    left: list[Job] = []
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
    )  # fmt: skip
    futures = {}
    try:
        for job in jobs:
            try:
                futures[pool.submit(_convert_one, recipe, *job, workspace)] = job
            except BrokenProcessPool:
                left.append(job)
        for future in as_completed(futures):
            try:
                tally.add(future.result())
            except BrokenProcessPool:
                left.append(futures[future])
    except BaseException:
        _abandon(pool, others)
        raise
    pool.shutdown()
    return sorted(left, key=lambda job: job[0].case_id)


def _abandon(pool: Any, others: set[Any]) -> None:
    """End a pool's workers at once: what they were writing is in a temporary place and is begun again."""
    import multiprocessing
    import signal

    in_main = threading.current_thread() is threading.main_thread()
    # An impatient second Ctrl-C must not stop the clearing up, which takes no time.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        pool.shutdown(wait=True, cancel_futures=True)
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)


def _convert_on_dask(recipe: Recipe, jobs: Sequence[Job], workspace: Path, address: str, tally: _Tally) -> None:
    """Hand the cases to a cluster whose workers see the same folders under the same names."""
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise UsageError("--dask needs dask.distributed", 'type: pip install "nnunet-h2a[dask]"') from error
    # What a lost cluster has to say is said in one line of ours.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    try:
        client = Client(address, timeout=DASK_TIMEOUT, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        what = f"--dask {address}: no scheduler answers there"
        raise UsageError(what, "start one: dask scheduler; or leave --dask out") from error
    with client:
        _check_cluster(client, address, workspace, jobs[0][0].files[0])
        futures = {client.submit(_convert_one, recipe, *job, workspace, pure=False): job for job in jobs}
        for future in as_completed(futures, loop=client.loop):
            case = futures[future][0]
            try:
                refusal = future.result()
            except KilledWorker:
                what = "workers of the cluster died on it, again and again (out of memory?)"
                refusal = Refusal.of(case, ConversionError(what, "give them more memory and run again"))
            except Exception as error:  # what a cluster may raise when it is lost has no common class
                what = f"--dask {address}: the cluster was lost ({type(error).__name__})"
                raise UsageError(what, "run again: finished cases are kept") from error
            tally.add(refusal)


def _seen(workspace: str, file: str) -> tuple[str, str]:
    """Run on a worker: the package's version there, and the first path of ours that it cannot use."""
    missing = [path for path, mode in ((workspace, os.W_OK), (file, os.R_OK)) if not os.access(path, mode)]
    return nnunet_h2a.__version__, missing[0] if missing else ""


def _check_cluster(client: Client, address: str, workspace: Path, file: str) -> None:
    """Raise a UsageError unless all workers have this package and see source and dataset under the same names."""
    answers = client.run(_seen, str(workspace), os.path.abspath(file), on_error="return")
    if not answers:
        raise UsageError(f"--dask {address}: the scheduler has no workers", f"start some: dask worker {address}")
    for worker, answer in sorted(answers.items()):
        if isinstance(answer, BaseException):
            what = f"--dask {address}: the worker {worker} cannot load this package ({answer})"
            raise UsageError(what, f"install nnunet-h2a {nnunet_h2a.__version__} there")
        version, missing = answer
        if version != nnunet_h2a.__version__:
            what = f"--dask {address}: the worker {worker} has nnunet-h2a {version}"
            raise UsageError(what, f"install {nnunet_h2a.__version__} there")
        if missing:
            what = f"--dask {address}: the worker {worker} cannot use {missing}"
            raise UsageError(what, "give source and nnUNet_raw on a file system that all workers have")
