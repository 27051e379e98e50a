"""The hidden workspace beside a dataset, and publishing the dataset from it.

Nothing half-written is ever where nnU-Net looks. Cases are written one folder each into the workspace (same file
system), every folder is renamed into place when complete, and when all are done the dataset folder is put together
from them and moved in with one rename. A killed run leaves the workspace; the next one goes on from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nnunet_h2a
from dataset_conversion.cases import Case, Discovery, Outcome, Recipe
from dataset_conversion.errors import UsageError
from dataset_conversion.raw_dataset import REPORT, to_bytes
from dataset_conversion.splits import Fold

FORMAT_VERSION = 3
# To be raised with every change of what is selected from the same files or of what is written for them.
RULES_VERSION = 4
CASE_FILE = "case.json"
DATASET_JSON = "dataset.json"
_MANAGED = (DATASET_JSON, "splits_final.json", REPORT)


def workspace_of(dataset: Path) -> Path:
    """Return the hidden folder beside the dataset in which cases are made."""
    return dataset.parent / f".h2a_{dataset.name}"


@contextlib.contextmanager
def locked(workspace: Path) -> Iterator[None]:
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
        try:
            yield
        finally:
            if not any((workspace / "cases").glob("*")) and not (workspace / "old").exists():
                shutil.rmtree(workspace, ignore_errors=True)


def recover(dataset: Path, workspace: Path) -> None:
    """Finish or undo what a killed run left between its renames, and clear its half-written folders."""
    old = workspace / "old"
    if old.exists() and not dataset.exists():
        os.rename(old, dataset)
    for name in ("old", "dataset", "work"):
        shutil.rmtree(workspace / name, ignore_errors=True)


def fingerprint(case: Case, recipe: Recipe, source: Path) -> str:
    """Return a hash of everything a converted case depends on: code, settings, source files by path, size and time."""
    files = []
    for path in sorted(case.files):
        status = os.stat(path)
        files.append([os.path.relpath(path, source), status.st_size, status.st_mtime_ns])
    code = [FORMAT_VERSION, RULES_VERSION, nnunet_h2a.__version__]
    settings = [recipe.command, dict(recipe.options), recipe.link, recipe.spec.file_ending]
    content = [code, *settings, case.case_id, case.patient, case.variant, case.labelled, files]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def published_records(dataset: Path, recipe: Recipe, discovery: Discovery) -> dict[str, dict[str, Any]]:
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
    records = report.get("cases")
    whole = isinstance(records, dict) and all(
        isinstance(record, dict) and isinstance(record.get("files"), dict) and record.get("case_id") == case_id
        for case_id, record in records.items()
    )
    if not whole:
        raise UsageError("is damaged", "restore it, or delete the dataset's folder", dataset / REPORT)
    found = {case.case_id for case in discovery.cases} | set(discovery.passed_over)
    found |= {refusal.subject for refusal in discovery.refusals}
    strangers = sorted(set(records) - found)
    if strangers:
        if report.get("options") != json.loads(json.dumps(dict(recipe.options))):
            raise UsageError(
                f"holds {len(strangers)} cases that this run would not make (e.g. {strangers[0]}); it was written with "
                "other settings",
                "use another -d, or delete the dataset folder",
                dataset,
            )
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


def _kind(name: str, case_id: str) -> str:
    """Return whether nnU-Net keeps a case's file among images or labels: only images have a channel number."""
    return "labels" if name.split(".")[0] == case_id else "images"


def _case_files(folder: Path, record: Mapping[str, Any]) -> dict[str, Path] | None:
    """Return name -> path of a record's files in ``folder`` or nnU-Net's folders below it; None if one is missing."""
    found = {}
    for name, size in record["files"].items():
        kind = _kind(name, record["case_id"])
        for path in (folder / name, folder / f"{kind}Tr" / name, folder / f"{kind}Ts" / name):
            if path.is_file() and path.stat().st_size == size:
                found[name] = path
                break
        else:
            return None
    return found


def finished_case(
    case_id: str, mark: str, dataset: Path, workspace: Path, published: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Path]] | None:
    """Return record and files of a case that an earlier run finished with the same settings and sources."""
    folder = workspace / "cases" / case_id
    for record, place in ((_load_json(folder / CASE_FILE), folder), (published.get(case_id), dataset)):
        if isinstance(record, dict) and record.get("fingerprint") == mark:
            files = _case_files(place, record)
            if files is not None:
                return record, files
    return None


def _link(source: Path, target: Path) -> None:
    """Hard-link, or copy where the file system has no links; a symbolic link stays one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        os.symlink(os.readlink(source), target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def publish(
    recipe: Recipe,
    source: Path,
    cases: Sequence[Case],
    marks: Mapping[str, str],
    test_ids: set[str],
    published: Mapping[str, dict[str, Any]],
    discovery: Discovery,
    workspace: Path,
    outcome: Outcome,
    folds_of: Callable[[Sequence[Case]], list[Fold]],
) -> None:
    """Put the dataset folder together in the workspace and swap it in; ``folds_of`` divides the training cases."""
    dataset, new = outcome.dataset, workspace / "dataset"
    shutil.rmtree(new, ignore_errors=True)
    records: dict[str, dict[str, Any]] = {}
    for case in cases:
        finished = finished_case(case.case_id, marks[case.case_id], dataset, workspace, published)
        if finished is None:
            raise UsageError(f"case {case.case_id} vanished from the workspace", "run again", workspace)
        record, files = finished
        record = {**record, "set": "test" if case.case_id in test_ids else "training"}
        records[case.case_id] = record
        outcome.notes[case.case_id] = list(record.get("warnings", ()))
        suffix = "Ts" if case.case_id in test_ids else "Tr"
        for name, path in files.items():
            _link(path, new / f"{_kind(name, case.case_id)}{suffix}" / name)
    training = [case for case in cases if case.case_id not in test_ids]
    outcome.splits = folds_of(training)
    name = dataset.name.split("_", 1)[1]
    report = {
        "command": recipe.command,
        "format": FORMAT_VERSION,
        "version": nnunet_h2a.__version__,
        "source": str(source.absolute()),
        "options": dict(recipe.options),
        "splits": recipe.splits,
        "cases": records,
        "refused": [
            {"subject": item.subject, "what": item.what, "remedy": item.remedy, "file": item.file}
            for item in outcome.refusals
        ],
        "passed_over": discovery.passed_over,
    }
    content = recipe.spec.to_json(name, [case.case_id for case in training])
    content, outcome.edits = _with_edits(content, dataset / DATASET_JSON, recipe.keep_channel_names)
    report["channel_names"] = list(content["channel_names"].values())
    (new / DATASET_JSON).write_bytes(to_bytes(content))
    (new / "splits_final.json").write_bytes(to_bytes(outcome.splits))
    (new / REPORT).write_bytes(to_bytes(report))
    before = dataset / REPORT
    if before.exists() and before.read_bytes() == to_bytes(report):
        # The report is as old as what it tells of: raw_dataset.stale_fingerprint goes by it.
        status = before.stat()
        os.utime(new / REPORT, ns=(status.st_atime_ns, status.st_mtime_ns))
    _carry_over(dataset, new, published)
    old = workspace / "old"
    if dataset.exists():
        os.rename(dataset, old)
    os.rename(new, dataset)
    shutil.rmtree(old, ignore_errors=True)


def _with_edits(content: dict[str, Any], published: Path, keep_names: bool) -> tuple[dict[str, Any], list[str]]:
    """Return dataset.json with the channel names of an earlier one, which users may change, and lines on all edits."""
    if not published.exists():
        return content, []
    old = _load_json(published)
    if not isinstance(old, dict):
        return content, ["cannot be read as JSON and was written anew; edits, if any, must be made again"]
    lines = []
    names = old.get("channel_names")
    same_channels = isinstance(names, dict) and set(names) == set(content["channel_names"])
    if not keep_names:
        old.pop("channel_names", None)
    elif names != content["channel_names"] and same_channels:
        content = {**content, "channel_names": names}
        lines.append(f"channel_names {names} of the earlier dataset.json were kept")
    own = {"numTraining", "dataset"} | (set() if keep_names else {"channel_names"})
    lost = sorted(key for key in {*old, *content} - own if old.get(key) != content.get(key))
    if lost:
        lines.append(f"differed from what was written now in {', '.join(lost)}; edits there must be made again")
    return content, lines


def _carry_over(dataset: Path, new: Path, published: Mapping[str, dict[str, Any]]) -> None:
    """Keep files the user has put beside ours in an existing dataset (test images, notes)."""
    ours = {name for record in published.values() for name in record["files"]}
    for path in sorted(dataset.rglob("*")) if dataset.exists() else ():
        relative = path.relative_to(dataset)
        target = new / relative
        is_ours = str(relative) in _MANAGED or (len(relative.parts) == 2 and path.name in ours)
        if path.is_file() and not is_ours and not target.exists():
            _link(path, target)
