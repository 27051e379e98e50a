"""Running a conversion: convert what an earlier run has not finished, case by case, then publish the dataset."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from dataset_conversion.cases import Case, CaseWriter, Discovery, Outcome, Recipe, Refusal
from dataset_conversion.errors import ConversionError, UsageError
from dataset_conversion.raw_dataset import to_text
from dataset_conversion.workspace import (
    CASE_FILE,
    fingerprint,
    finished_case,
    locked,
    publish,
    published_records,
    recover,
    workspace_of,
)


def _convert_one(recipe: Recipe, case: Case, mark: str, workspace: Path) -> Refusal | None:
    """Convert one case in its own folder and rename that into ``cases`` when it is complete."""
    work = workspace / "work" / f"{case.case_id}.{os.getpid()}"
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        record = recipe.convert(case, recipe.options, CaseWriter(work, case.case_id))
        sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        head = {"case_id": case.case_id, "patient": case.patient, "fingerprint": mark, "files": sizes}
        (work / CASE_FILE).write_text(to_text({**head, **record}))
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
        remedy = "run again: finished cases are kept"
        return Refusal.of(case, ConversionError(f"{error.strerror or error}", remedy, error.filename))
    except Exception as error:  # a single odd file must not stop the other patients, nor show a traceback
        remedy = "please report this with the file's headers"
        return Refusal.of(case, ConversionError(f"unexpected {_where(error)}", remedy))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _where(error: BaseException) -> str:
    """Return type, message and the innermost line of an exception, on one line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())[:300]}"


def _start_worker() -> None:
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


def _convert_all(
    recipe: Recipe, jobs: Sequence[tuple[Case, str]], workspace: Path, processes: int, tick: Callable[[], None]
) -> list[Refusal]:
    """Convert all jobs; returns what could not be converted."""
    refusals: list[Refusal] = []
    if processes <= 1 or len(jobs) <= 1:
        for case, mark in jobs:
            refusal = _convert_one(recipe, case, mark, workspace)
            refusals += [] if refusal is None else [refusal]
            tick()
        return refusals
    refusals, left = _convert_in_pool(recipe, jobs, workspace, min(processes, len(jobs)), tick)
    for job in left:
        # A worker was killed, as a rule for want of memory, and took the others' work along: one by one from here on.
        again, lost = _convert_in_pool(recipe, [job], workspace, 1, tick)
        refusals += again
        if lost:
            what = "its worker process died, twice (out of memory?)"
            remedy = "free memory and run again: finished cases are kept"
            refusals.append(Refusal.of(job[0], ConversionError(what, remedy)))
            tick()
    return refusals


def _convert_in_pool(
    recipe: Recipe, jobs: Sequence[tuple[Case, str]], workspace: Path, workers: int, tick: Callable[[], None]
) -> tuple[list[Refusal], list[tuple[Case, str]]]:
    """Convert jobs in worker processes; returns refusals, and the jobs not done because a worker died."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    refusals: list[Refusal] = []
    left: list[tuple[Case, str]] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = {}
        try:
            for job in jobs:
                try:
                    futures[pool.submit(_convert_one, recipe, *job, workspace)] = job
                except BrokenProcessPool:
                    left.append(job)
            for future in as_completed(futures):
                try:
                    refusal = future.result()
                except BrokenProcessPool:
                    left.append(futures[future])
                    continue
                refusals += [] if refusal is None else [refusal]
                tick()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return refusals, sorted(left, key=lambda job: job[0].case_id)


def unique_cases(discovery: Discovery) -> None:
    """Turn cases that share an identifier into refusals."""
    by_id: dict[str, list[Case]] = {}
    for case in discovery.cases:
        by_id.setdefault(case.case_id, []).append(case)
    discovery.cases = []
    for case_id, cases in sorted(by_id.items()):
        if len(cases) == 1:
            discovery.cases.append(cases[0])
        else:
            patients = ", ".join(repr(case.patient) for case in cases)
            what = f"{len(cases)} patients or studies share this identifier ({patients})"
            discovery.refusals.append(Refusal(case_id, what, "rename them", cases[0].folder))


def split_test_cases(discovery: Discovery, test: Sequence[str]) -> set[str]:
    """Return the identifiers of the cases that belong to the patients (or are the cases) named in ``test``.

    Raises:
        UsageError: a name fits nothing, or nothing is left to train on.
    """
    cases = discovery.cases
    refused = {refusal.subject for refusal in discovery.refusals} | set(discovery.passed_over)
    chosen = set()
    for name in test:
        hits = {case.case_id for case in cases if name in (case.patient, case.case_id)}
        if not hits and name not in refused:
            known = ", ".join(sorted({case.patient for case in cases})[:10])
            raise UsageError(f"--test {name}: no such patient", f"known are {known}")
        chosen |= hits
    if cases and len(chosen) == len(cases):
        raise UsageError("--test names all patients", "leave at least one for training")
    return chosen


def run(
    recipe: Recipe,
    source: Path,
    dataset: Path,
    discovery: Discovery,
    processes: int,
    test: Sequence[str] = (),
    progress: Callable[[int], Callable[[], None]] = lambda total: lambda: None,
) -> Outcome:
    """Convert all cases and publish the dataset.

    Args:
        recipe: the converter.
        source: folder the cases were found in.
        dataset: the dataset's folder, from ``raw_dataset.locate``.
        discovery: from ``recipe.discover``; cases with equal identifiers become refusals.
        processes: worker processes; 1 converts in this one.
        test: patients or cases whose images go to imagesTs.
        progress: given the number of cases, returns a function called after each.

    Returns:
        What was done. Where no case could be converted, nothing is published.

    Raises:
        UsageError: the run cannot start.
    """
    unique_cases(discovery)
    test_ids = split_test_cases(discovery, test)
    workspace = workspace_of(dataset)
    with locked(workspace):
        recover(dataset, workspace)
        published = published_records(dataset, recipe, discovery)
        marks = {case.case_id: fingerprint(case, recipe, source) for case in discovery.cases}
        todo, kept = [], []
        for case in discovery.cases:
            finished = finished_case(case.case_id, marks[case.case_id], dataset, workspace, published)
            if finished is None:
                todo.append((case, marks[case.case_id]))
            else:
                kept.append(case.case_id)
        tick = progress(len(discovery.cases))
        for _ in kept:
            tick()
        failed = _convert_all(recipe, todo, workspace, processes, tick)
        refusals = sorted([*discovery.refusals, *failed], key=lambda refusal: refusal.subject)
        bad = {refusal.subject for refusal in failed}
        good = [case for case in discovery.cases if case.case_id not in bad]
        outcome = Outcome(
            dataset=dataset,
            converted=[case.case_id for case, _ in todo if case.case_id not in bad],
            kept=kept,
            refusals=refusals,
            notes={},
            splits=[],
            test_cases=sum(case.case_id in test_ids for case in good),
        )
        if any(case.case_id not in test_ids for case in good):
            publish(recipe, source, good, marks, test_ids, published, discovery, workspace, outcome)
        shutil.rmtree(workspace, ignore_errors=True)
    return outcome
