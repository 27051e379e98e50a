"""Folds and test sets that never divide a patient."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

Fold = dict[str, list[str]]

N_FOLDS = 5
SPLIT_SEED = 12345
#: Parts of all patients in training, validation and test.
SIX_TWO_TWO = (0.6, 0.2, 0.2)


def make_splits(patient_of_case: Mapping[str, str]) -> list[Fold]:
    """Return nnU-Net's splits_final.json with all cases of a patient on one side of every fold.

    Five folds from five patients on, as many folds as patients below that (leave one out), and for a single patient
    one fold that trains and validates on it. Deterministic; folds are balanced by number of cases.

    Args:
        patient_of_case: case identifier to patient.
    """
    cases_of = _by_value(patient_of_case)
    everything = sorted(patient_of_case)
    if not cases_of:
        return []
    if len(cases_of) == 1:
        return [{"train": everything, "val": everything}]
    patients = sorted(cases_of)
    if len(patients) >= N_FOLDS:
        random.Random(SPLIT_SEED).shuffle(patients)
        # Patients with many studies first: only then can the small ones even the folds out.
        patients.sort(key=lambda patient: -len(cases_of[patient]))
    folds: list[list[str]] = [[] for _ in range(min(N_FOLDS, len(patients)))]
    for patient in patients:
        smallest = min(range(len(folds)), key=lambda index: (len(folds[index]), index))
        folds[smallest].extend(cases_of[patient])
    return [_fold(everything, fold) for fold in folds]


def leave_one_group_out(patient_of_case: Mapping[str, str], group_of_case: Mapping[str, str]) -> list[Fold]:
    """Return one fold per group (centre), in the groups' order, that validates on the group.

    A patient with cases in two groups is kept out of the training of both, so that no fold knows a patient it is
    validated on. A single group gives the folds of ``make_splits``.

    Args:
        patient_of_case: case identifier to patient.
        group_of_case: case identifier to group.
    """
    groups = _by_value({case: group_of_case[case] for case in patient_of_case})
    if len(groups) < 2:
        return make_splits(patient_of_case)
    folds = []
    for _, cases in sorted(groups.items()):
        known = {patient_of_case[case] for case in cases}
        train = [case for case, patient in patient_of_case.items() if patient not in known]
        folds.append({"train": sorted(train), "val": sorted(cases)})
    return [fold for fold in folds if fold["train"]]


def six_two_two(patient_of_case: Mapping[str, str]) -> tuple[set[str], list[Fold]]:
    """Return the test cases and the single fold of a 6:2:2 division by patients, as papers use it.

    Which patient goes where is drawn once, deterministically. From three patients on every part has at least one.

    Args:
        patient_of_case: case identifier to patient.
    """
    cases_of = _by_value(patient_of_case)
    patients = sorted(cases_of)
    if len(patients) < 3:
        return set(), make_splits(patient_of_case)
    random.Random(SPLIT_SEED).shuffle(patients)
    n_val, n_test = (max(1, round(part * len(patients))) for part in SIX_TWO_TWO[1:])
    bounds = 0, n_test, n_test + n_val, len(patients)
    test, val, train = (
        sorted(case for patient in patients[start:end] for case in cases_of[patient])
        for start, end in itertools.pairwise(bounds)
    )
    return set(test), [{"train": train, "val": val}]


def restricted(folds: Sequence[Mapping[str, Sequence[str]]], cases: set[str]) -> list[Fold]:
    """Return folds without the cases that are not there, and without folds that lose a whole side."""
    kept = [{side: sorted(set(fold[side]) & cases) for side in ("train", "val")} for fold in folds]
    return [fold for fold in kept if fold["train"] and fold["val"]]


def leaks(folds: Sequence[Mapping[str, Sequence[str]]], patient_of_case: Mapping[str, str]) -> list[str]:
    """Return the patients who are on both sides of a fold."""
    found: set[str] = set()
    for fold in folds:
        sides = [{patient_of_case[case] for case in fold[side] if case in patient_of_case} for side in ("train", "val")]
        found |= sides[0] & sides[1]
    return sorted(found)


def _by_value(mapping: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, value in sorted(mapping.items()):
        groups.setdefault(value, []).append(key)
    return groups


def _fold(everything: Sequence[str], val: Sequence[str]) -> Fold:
    return {"train": sorted(set(everything) - set(val)), "val": sorted(val)}
