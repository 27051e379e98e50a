"""Running a conversion: discover, convert case by case, publish the dataset as a whole.

Nothing half-written is ever where nnU-Net looks. Cases are written one folder each into a hidden workspace beside the
dataset (same file system), every folder is renamed into place when complete, and when all are done the dataset folder
is put together from them and moved in with one rename. A killed run leaves the workspace; the next one goes on from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_conversion.errors import ConversionError, UsageError
from dataset_conversion.raw_dataset import FILE_ENDING, DatasetSpec, make_splits, to_text

if TYPE_CHECKING:
    import SimpleITK as sitk

FORMAT_VERSION = 1
REPORT = "conversion_report.json"
_CASE_FILE = "case.json"
_MANAGED = ("dataset.json", "splits_final.json", REPORT)


@dataclass(frozen=True)
class Case:
    """One case to convert.

    Attributes:
        case_id: identifier in the raw dataset.
        patient: patient it belongs to; cases of a patient stay in one fold.
        files: source files, whose path, size and time decide whether a finished case is still valid.
        payload: what the converter needs, picklable.
        variant: what else the result depends on, such as a choice made over all cases.
    """

    case_id: str
    patient: str
    files: tuple[str, ...]
    payload: Any = None
    variant: str = ""


@dataclass(frozen=True)
class Refusal:
    """Why a patient or study is not in the dataset."""

    subject: str
    what: str
    remedy: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.subject}: {ConversionError(self.what, self.remedy, self.file)}"


@dataclass
class Discovery:
    """What was found below the source folder.

    Attributes:
        cases: to be converted.
        refusals: what was found and cannot be converted.
        passed_over: left out on the user's wish (not a fault), identifier to reason.
    """

    cases: list[Case] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)


class CaseWriter:
    """Writes the images of one case into its folder of the workspace under nnU-Net's names."""

    def __init__(self, folder: Path, case_id: str) -> None:
        self.folder = folder
        self.case_id = case_id

    def image(self, channel: int, image: sitk.Image) -> None:
        """Write one channel as float32."""
        import SimpleITK as sitk

        self._write(f"{self.case_id}_{channel:04d}{FILE_ENDING}", sitk.Cast(image, sitk.sitkFloat32))

    def label(self, image: sitk.Image) -> None:
        """Write the label map as uint8."""
        import SimpleITK as sitk

        self._write(f"{self.case_id}{FILE_ENDING}", sitk.Cast(image, sitk.sitkUInt8))

    def copy(self, source: str, channel: int | None) -> None:
        """Take a file over as it is, as a channel or (None) as the label map."""
        name = f"{self.case_id}{FILE_ENDING}" if channel is None else f"{self.case_id}_{channel:04d}{FILE_ENDING}"
        shutil.copyfile(source, self.folder / name)

    def _write(self, name: str, image: sitk.Image) -> None:
        import SimpleITK as sitk

        sitk.WriteImage(image, str(self.folder / name), useCompression=True)


@dataclass(frozen=True)
class Recipe:
    """A converter: the functions must be module-level, for they are sent to worker processes.

    Attributes:
        command: console command, for messages.
        spec: what dataset.json says.
        options: settings that change the result, ready for JSON.
        discover: (source, options, progress) -> Discovery.
        convert: (case, options, writer) -> record for the report; raises ConversionError.
        describe: (case, options) -> one line for ``--dry-run``; raises ConversionError where convert would early on.
    """

    command: str
    spec: DatasetSpec
    options: Mapping[str, Any]
    discover: Callable[[Path, Mapping[str, Any], Callable[[], None]], Discovery]
    convert: Callable[[Case, Mapping[str, Any], CaseWriter], dict[str, Any]]
    describe: Callable[[Case, Mapping[str, Any]], str]


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        dataset: the dataset's folder.
        converted: identifiers converted in this run.
        kept: identifiers finished by an earlier run.
        refusals: what could not be converted.
        notes: case to warnings.
        splits: the folds written.
        test_cases: how many cases went to imagesTs.
    """

    dataset: Path
    converted: list[str]
    kept: list[str]
    refusals: list[Refusal]
    notes: dict[str, list[str]]
    splits: list[dict[str, list[str]]]
    test_cases: int


def fingerprint(case: Case, recipe: Recipe, source: Path) -> str:
    """Return a hash of everything a converted case depends on: settings, and its source files by path, size, time."""
    files = []
    for path in sorted(case.files):
        status = os.stat(path)
        files.append([os.path.relpath(path, source), status.st_size, status.st_mtime_ns])
    content = [FORMAT_VERSION, recipe.command, dict(recipe.options), case.case_id, case.patient, case.variant, files]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _locked(workspace: Path) -> Iterator[None]:
    """Hold the workspace against a second run on the same dataset; the lock dies with the process."""
    workspace.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        # Windows: no advisory locks of this kind; a second run there is the user's to avoid.
        yield
        return
    with open(workspace / "lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                "another conversion into this dataset is running", "wait for it, or use another -d", workspace
            ) from error
        yield


def workspace_of(dataset: Path) -> Path:
    """Return the hidden folder beside the dataset in which cases are made."""
    return dataset.parent / f".h2a_{dataset.name}"


def _recover(dataset: Path, workspace: Path) -> None:
    """Finish or undo what a killed run left between its renames, and clear its half-written folders."""
    old = workspace / "old"
    if old.exists() and not dataset.exists():
        os.rename(old, dataset)
    for name in ("old", "dataset", "work"):
        shutil.rmtree(workspace / name, ignore_errors=True)


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _published(dataset: Path, recipe: Recipe, discovery: Discovery) -> dict[str, dict[str, Any]]:
    """Return the case records of an existing dataset, checked to be this converter's own."""
    if not dataset.exists() or not any(dataset.iterdir()):
        return {}
    report = _load_json(dataset / REPORT)
    if not isinstance(report, dict) or report.get("command") != recipe.command:
        raise UsageError(
            f"is there already and was not written by {recipe.command}",
            "use another -d or --name, or delete the folder",
            dataset,
        )
    records: dict[str, dict[str, Any]] = report.get("cases", {})
    found = {case.case_id for case in discovery.cases} | set(discovery.passed_over)
    found |= {refusal.subject for refusal in discovery.refusals}
    strangers = sorted(set(records) - found)
    if strangers:
        raise UsageError(
            f"holds {len(strangers)} cases that are not in the source folder (e.g. {strangers[0]})",
            "convert from a folder that holds all patients, use another -d, or delete the dataset folder",
            dataset,
        )
    known = {name for record in records.values() for name in record["files"]}
    for folder in ("imagesTr", "labelsTr"):
        for entry in sorted((dataset / folder).glob("*")) if (dataset / folder).is_dir() else ():
            if entry.name not in known:
                raise UsageError("was not written by this converter", "move it out of the dataset", entry)
    return records


def _case_files(folder: Path, record: Mapping[str, Any]) -> dict[str, Path] | None:
    """Return name -> path of a record's files in ``folder`` or nnU-Net's folders below it; None if one is missing."""
    found = {}
    for name, size in record["files"].items():
        kind = "labels" if name == f"{record['case_id']}{FILE_ENDING}" else "images"
        for path in (folder / name, folder / f"{kind}Tr" / name, folder / f"{kind}Ts" / name):
            if path.is_file() and path.stat().st_size == size:
                found[name] = path
                break
        else:
            return None
    return found


def _convert_one(recipe: Recipe, case: Case, mark: str, workspace: Path) -> Refusal | None:
    """Convert one case in its own folder and rename that into ``cases`` when it is complete."""
    work = workspace / "work" / f"{case.case_id}.{os.getpid()}"
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        record = recipe.convert(case, recipe.options, CaseWriter(work, case.case_id))
        sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        head = {"case_id": case.case_id, "patient": case.patient, "fingerprint": mark, "files": sizes}
        (work / _CASE_FILE).write_text(to_text({**head, **record}))
        target = workspace / "cases" / case.case_id
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(work, target)
        return None
    except ConversionError as error:
        return Refusal(case.case_id, error.what, error.remedy, error.file)
    except MemoryError:
        return Refusal(case.case_id, "not enough memory", "run again with a smaller -np: finished cases are kept")
    except OSError as error:
        return Refusal(case.case_id, f"{error.strerror or error}", "run again: finished cases are kept", error.filename)
    except Exception as error:  # a single odd file must not stop the other patients, nor show a traceback
        return Refusal(case.case_id, f"unexpected {_where(error)}", "please report this with the file's headers")
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
    """Keep a worker to one thread, and let it end with the process that started it."""
    import multiprocessing

    import SimpleITK as sitk

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
    refusals: list[Refusal] = []
    if processes <= 1 or len(jobs) <= 1:
        for case, mark in jobs:
            refusal = _convert_one(recipe, case, mark, workspace)
            refusals += [] if refusal is None else [refusal]
            tick()
        return refusals
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")
    workers = min(processes, len(jobs))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = {pool.submit(_convert_one, recipe, case, mark, workspace): case for case, mark in jobs}
        try:
            for future in as_completed(futures):
                try:
                    refusal = future.result()
                except BrokenProcessPool:
                    refusal = Refusal(
                        futures[future].case_id,
                        "a worker process died (out of memory?)",
                        "run again with -np 1: finished cases are kept",
                    )
                refusals += [] if refusal is None else [refusal]
                tick()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return refusals


def _link(source: Path, target: Path) -> None:
    """Hard-link, or copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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
            discovery.refusals.append(
                Refusal(case_id, f"{len(cases)} patients or studies share this identifier ({patients})", "rename them")
            )


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
    with _locked(workspace):
        _recover(dataset, workspace)
        published = _published(dataset, recipe, discovery)
        marks = {case.case_id: fingerprint(case, recipe, source) for case in discovery.cases}
        todo, kept = [], []
        for case in discovery.cases:
            finished = _finished(case.case_id, marks[case.case_id], dataset, workspace, published)
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
            _publish(recipe, source, good, marks, test_ids, published, discovery, workspace, outcome)
        shutil.rmtree(workspace, ignore_errors=True)
    return outcome


def _finished(
    case_id: str, mark: str, dataset: Path, workspace: Path, published: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Path]] | None:
    """Return record and files of a case that an earlier run finished with the same settings and sources."""
    folder = workspace / "cases" / case_id
    for record, place in ((_load_json(folder / _CASE_FILE), folder), (published.get(case_id), dataset)):
        if isinstance(record, dict) and record.get("fingerprint") == mark:
            files = _case_files(place, record)
            if files is not None:
                return record, files
    return None


def _publish(
    recipe: Recipe,
    source: Path,
    cases: Sequence[Case],
    marks: Mapping[str, str],
    test_ids: set[str],
    published: Mapping[str, dict[str, Any]],
    discovery: Discovery,
    workspace: Path,
    outcome: Outcome,
) -> None:
    """Put the dataset folder together in the workspace and swap it in."""
    dataset, new = outcome.dataset, workspace / "dataset"
    shutil.rmtree(new, ignore_errors=True)
    records: dict[str, dict[str, Any]] = {}
    for case in cases:
        finished = _finished(case.case_id, marks[case.case_id], dataset, workspace, published)
        if finished is None:
            raise UsageError(f"case {case.case_id} vanished from the workspace", "run again", workspace)
        record, files = finished
        record = {**record, "set": "test" if case.case_id in test_ids else "training"}
        records[case.case_id] = record
        outcome.notes[case.case_id] = list(record.get("warnings", ()))
        suffix = "Ts" if case.case_id in test_ids else "Tr"
        for name, path in files.items():
            kind = "labels" if name == f"{case.case_id}{FILE_ENDING}" else "images"
            _link(path, new / f"{kind}{suffix}" / name)
    training = {case.case_id: case.patient for case in cases if case.case_id not in test_ids}
    outcome.splits = make_splits(training)
    name = dataset.name.split("_", 1)[1]
    report = {
        "command": recipe.command,
        "format": FORMAT_VERSION,
        "source": str(source.absolute()),
        "options": dict(recipe.options),
        "cases": records,
        "refused": [
            {"subject": item.subject, "what": item.what, "remedy": item.remedy, "file": item.file}
            for item in outcome.refusals
        ],
        "passed_over": discovery.passed_over,
    }
    (new / "dataset.json").write_text(to_text(recipe.spec.to_json(name, len(training))))
    (new / "splits_final.json").write_text(to_text(outcome.splits))
    (new / REPORT).write_text(to_text(report))
    _carry_over(dataset, new, published)
    old = workspace / "old"
    if dataset.exists():
        os.rename(dataset, old)
    os.rename(new, dataset)
    shutil.rmtree(old, ignore_errors=True)


def _carry_over(dataset: Path, new: Path, published: Mapping[str, dict[str, Any]]) -> None:
    """Keep files the user has put beside ours in an existing dataset (test images, notes)."""
    ours = {name for record in published.values() for name in record["files"]}
    for path in sorted(dataset.rglob("*")) if dataset.exists() else ():
        relative = path.relative_to(dataset)
        target = new / relative
        is_ours = str(relative) in _MANAGED or (len(relative.parts) == 2 and path.name in ours)
        if path.is_file() and not is_ours and not target.exists():
            _link(path, target)


def print_error(text: str) -> None:
    """Write one line to the error stream."""
    sys.stderr.write(f"{text}\n")
