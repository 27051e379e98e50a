"""All cases of an evaluation: in processes, with a progress bar, and going on where an earlier run was stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataset_conversion.processes import start_worker
from nnunet_h2a.command import CommandError, read_json
from nnunet_h2a.evaluation import MEASURES_VERSION
from nnunet_h2a.evaluation.masks import CaseError, Labels, Pair
from nnunet_h2a.evaluation.measure import Measures
from nnunet_h2a.evaluation.pet import patient_quantities
from nnunet_h2a.evaluation.score_case import Job, empty_measures, score_case
from nnunet_h2a.evaluation.summary import Scored

Found = dict[str, Any]


def fingerprint(pair: Pair, job: Job) -> str:
    """Changes with the files of a case, and with how it is measured, but not with how much of it."""
    files = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for path in (pair.reference, pair.predicted, pair.pet)
        if path is not None
    ]
    fields = sorted(field.name for field in dataclasses.fields(Measures))
    how = (MEASURES_VERSION, fields, job.labels, job.resample)
    return hashlib.sha256(repr((files, how)).encode()).hexdigest()


#: How a line of kept measures begins.
_LINE = '{"fingerprint"'


def _finished(progress: Path, job: Job) -> dict[str, Found]:
    """Cases of an earlier run by fingerprint, of which as much was measured as is wanted now.

    A line that was cut off is not among them.

    Raises:
        CommandError: where the file is not one of ours.
    """
    found: dict[str, Found] = {}
    if not progress.is_file():
        return found
    for line in progress.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith(_LINE[: len(line)]):
            raise CommandError(f"{progress} holds something else than measures: name another file, or remove it")
        try:
            entry = json.loads(line)
            if set(job.wanted) <= set(entry["wanted"]):
                found[entry["fingerprint"]] = entry["found"]
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _score(pair: Pair, job: Job) -> Found | str:
    """What was found, or why the case cannot be scored."""
    try:
        return score_case(pair, job)
    except CaseError as error:
        return str(error)
    except MemoryError:
        return "not enough memory: run again with a smaller -np"
    except OSError as error:
        return f"{error.filename or pair.reference}: {error.strerror or error}"


def measure_all(
    pairs: Sequence[Pair], job: Job, processes: int, progress: Path | None, refuse: Callable[[str, str], None]
) -> dict[str, Found]:
    """Measure cases.

    Args:
        pairs: at least one.
        job: how.
        processes: of this machine; 1 measures in this one.
        progress: file that keeps finished cases for a later run; removing it is the caller's. None keeps none, nor does
            a file that cannot be written.
        refuse: is told each case that cannot be scored, and why.

    Returns:
        What :func:`score_case` found, by case, in the order of the pairs.

    Raises:
        CommandError: where a process was ended from outside.
    """
    earlier = _finished(progress, job) if progress is not None else {}
    marks = {pair.case: fingerprint(pair, job) for pair in pairs}
    done = {case: earlier[mark] for case, mark in marks.items() if mark in earlier}
    todo = [pair for pair in pairs if pair.case not in done]
    bar = tqdm(total=len(pairs), initial=len(done), desc="cases", unit="case", disable=None)
    with _kept(progress) as keep, bar:
        for pair, outcome in _outcomes(todo, job, processes):
            bar.update()
            if isinstance(outcome, str):
                refuse(pair.case, outcome)
            else:
                done[pair.case] = outcome
                keep(json.dumps({"fingerprint": marks[pair.case], "wanted": job.wanted, "found": outcome}))
    return {pair.case: done[pair.case] for pair in pairs if pair.case in done}


@contextmanager
def _kept(progress: Path | None) -> Iterator[Callable[[str], None]]:
    """Where finished cases are written to, a line each."""
    file = None
    if progress is not None:
        with suppress(OSError):
            progress.parent.mkdir(parents=True, exist_ok=True)
            file = progress.open("a", encoding="utf-8")
    if file is None:
        yield lambda line: None
        return

    def keep(line: str) -> None:
        # The newline comes first: the last line of a run that was killed may have none.
        file.write(f"\n{line}")
        file.flush()

    with file:
        yield keep


def _outcomes(pairs: Sequence[Pair], job: Job, processes: int) -> Iterator[tuple[Pair, Found | str]]:
    if processes == 1 or len(pairs) < 2:
        for pair in pairs:
            yield pair, _score(pair, job)
        return
    # A forked child would inherit the threads' locks of the image library.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(pairs)), context, initializer=start_worker)
    try:
        futures = {pool.submit(_score, pair, job): pair for pair in pairs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise CommandError(
            "a process was ended from outside, perhaps for want of memory: run again with a smaller -np (finished "
            "cases are kept)"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def patients_of(reference: Path) -> dict[str, str]:
    """Patient of each case, where one of our converters has written it beside the labels.

    Args:
        reference: folder of true labels; of nnU-Net's ``gt_segmentations`` the raw dataset's report is taken, where
            it is at hand.
    """
    dataset = reference.resolve().parent
    raw = os.environ.get("nnUNet_raw")
    if reference.name == "gt_segmentations" and raw:
        dataset = Path(raw) / dataset.name
    path = dataset / "conversion_report.json"
    if not path.is_file():
        return {}
    content = read_json(path, "the conversion", [])
    cases = content.get("cases")
    if not isinstance(cases, dict):
        raise CommandError(f"{path} has no cases: run the conversion again, or remove it")
    return {
        case: str(entry["patient"]) for case, entry in cases.items() if isinstance(entry, dict) and "patient" in entry
    }


def scored_cases(found: Mapping[str, Found], job: Job, patients: Mapping[str, str]) -> list[Scored]:
    """Every case with every label; a label that neither file of a case holds is empty there.

    Args:
        found: from :func:`measure_all`.
        job: how was measured.
        patients: of cases; a case that is not among them is a patient of its own.
    """
    labels = job.labels
    if labels is None:
        numbers = sorted({int(name) for content in found.values() for name in content["measures"]})
        labels = Labels({str(number): (number,) for number in numbers})
    nothing = {side: {"patient": patient_quantities([], ()), "lesions": []} for side in ("true", "predicted")}
    scored = []
    for case, content in found.items():
        for label, name, _ in labels.scored():
            kept = content["measures"].get(name)
            measures = Measures(**kept) if kept is not None else empty_measures(content, job.wanted)
            pet = content["pet"].get(name, nothing) if "pet" in content else None
            scored.append(Scored(case, patients.get(case, case), label, name, measures, pet))
    return scored
