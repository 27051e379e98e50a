"""Running a conversion: convert what an earlier run has not finished, case by case, then publish the dataset."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from dataset_conversion.cases import Case, Discovery, Outcome, Recipe, Refusal
from dataset_conversion.errors import UsageError
from dataset_conversion.processes import Workers, convert_all
from dataset_conversion.splits import Fold, leaks, leave_one_group_out, make_splits, restricted, six_two_two
from dataset_conversion.workspace import (
    fingerprint,
    finished_case,
    locked,
    publish,
    published_records,
    recover,
    workspace_of,
)

#: How training cases may be divided, with the words for --help.
SPLITS = {
    "patient": "five folds that never divide a patient",
    "622": "60 %% training, 20 %% validation (fold 0), 20 %% test (imagesTs) of the patients, as in the papers",
    "centre": "one fold per centre, validated on it",
    "shipped": "the folds that came with the data",
}


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
            discovery.refusals += [Refusal(case_id, what, "rename them", case.folder) for case in cases]


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
        patients = {case.patient for case in cases if case.case_id in hits}
        whole = {case.case_id for case in cases if case.patient in patients}
        if whole != hits:
            discovery.notes.append(f"--test {name}: all {len(whole)} studies of the patient go to the test set")
        chosen |= whole
    if chosen - discovery.test and discovery.test:
        added = len(chosen - discovery.test)
        discovery.notes.append(f"--test adds {added} cases to the test set that came with the data")
    if cases and chosen and len(chosen | discovery.test) == len(cases):
        raise UsageError("--test leaves no patient for training", "name fewer")
    return chosen | {case.case_id for case in cases if case.case_id in discovery.test}


def plan_splits(recipe: Recipe, discovery: Discovery, test_ids: set[str]) -> tuple[set[str], list[Fold] | None]:
    """Return the test cases, and the folds where they are drawn from all cases found rather than those converted.

    Raises:
        UsageError: the way of splitting does not fit the data.
    """
    training = {case.case_id: case.patient for case in discovery.cases if case.case_id not in test_ids}
    if recipe.splits == "622":
        if discovery.test:
            what = "--splits 622: the data has a test set of its own, which patients must not be added to"
            raise UsageError(what, "use --splits patient")
        patients = len(set(training.values()))
        if patients < 3:
            what = f"--splits 622: there are {patients} patients, and each part needs one"
            raise UsageError(what, "use --splits patient")
        more, folds = six_two_two(training)
        return test_ids | more, folds
    if recipe.splits == "shipped":
        if not discovery.folds:
            raise UsageError("--splits shipped: no splits_final.json came with the data", "use --splits patient")
        divided = leaks(discovery.folds, training)
        if divided:
            discovery.notes.append(
                f"the folds that came with the data have {len(divided)} patients on both sides (e.g. {divided[0]})"
            )
        return test_ids, discovery.folds
    if recipe.splits == "centre" and not all(case.group for case in discovery.cases):
        raise UsageError("--splits centre: the centres are not known", "use --splits patient")
    if recipe.splits == "centre" and len({case.group for case in discovery.cases}) < 2:
        raise UsageError("--splits centre: all cases are of one centre", "use --splits patient")
    return test_ids, None


def _folds_of(recipe: Recipe, planned: list[Fold] | None, training: Sequence[Case]) -> list[Fold]:
    patients = {case.case_id: case.patient for case in training}
    if planned is not None:
        return restricted(planned, set(patients)) or make_splits(patients)
    if recipe.splits == "centre":
        return leave_one_group_out(patients, {case.case_id: case.group for case in training})
    return make_splits(patients)


def run(
    recipe: Recipe,
    source: Path,
    dataset: Path,
    discovery: Discovery,
    workers: Workers,
    test: Sequence[str] = (),
    progress: Callable[[int], Callable[[], None]] = lambda total: lambda: None,
) -> Outcome:
    """Convert all cases and publish the dataset.

    Args:
        recipe: the converter.
        source: folder the cases were found in.
        dataset: the dataset's folder, from ``raw_dataset.locate``.
        discovery: from ``recipe.discover``; cases with equal identifiers become refusals.
        workers: who converts: this process, others, or a cluster.
        test: patients or cases whose images go to imagesTs.
        progress: given the number of cases, returns a function called after each.

    Returns:
        What was done. Where no case could be converted, nothing is published.

    Raises:
        UsageError: the run cannot start.
    """
    unique_cases(discovery)
    test_ids, folds = plan_splits(recipe, discovery, split_test_cases(discovery, test))
    workspace = workspace_of(dataset)
    with locked(workspace):
        recover(dataset, workspace)
        published = published_records(dataset, recipe, discovery)
        marks = _fingerprints(recipe, source, discovery)
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
        failed = convert_all(recipe, todo, workspace, workers, tick)
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
            publish(
                recipe, source, good, marks, test_ids, published, discovery, workspace, outcome,
                lambda training: _folds_of(recipe, folds, training),
            )  # fmt: skip
        shutil.rmtree(workspace, ignore_errors=True)
    return outcome


def _fingerprints(recipe: Recipe, source: Path, discovery: Discovery) -> dict[str, str]:
    """Return the mark of every case; a case whose files cannot be looked at becomes a refusal."""
    marks, kept = {}, []
    for case in discovery.cases:
        try:
            marks[case.case_id] = fingerprint(case, recipe, source)
        except OSError as error:
            what = f"cannot be opened ({error.strerror})"
            discovery.refusals.append(Refusal(case.case_id, what, "restore the file", error.filename))
            continue
        kept.append(case)
    discovery.cases = kept
    return marks
