"""autoPET I to V to an nnU-Net raw dataset: ``h2a_convert_autopet``.

Three forms are told apart by looking: TCIA's DICOM (CT, PT and SEG per study), the NIfTI release of autoPET I and II
(SUV.nii.gz, SEG.nii.gz and CTres.nii.gz per study), and the nnU-Net shaped releases of autoPET III to V. Data: Gatidis
et al. 2022, doi 10.7937/gkr0-xv29 (FDG); Jeblick et al. 2023, doi 10.7937/r7ep-3x37 (PSMA). Channel 0 is CT in HU,
channel 1 PET in SUVbw, label 1 the lesions. The SUV of the NIfTI releases is taken as it is: it was computed from the
acquisition time of one bed and can exceed what the DICOM headers give by up to 19 %.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataset_conversion import autopet_dicom, autopet_nnunet, autopet_release
from dataset_conversion.autopet_names import TRACERS, told_apart
from dataset_conversion.autopet_study import Study
from dataset_conversion.cases import Case, CaseWriter, Discovery, Recipe, Refusal
from dataset_conversion.command import build_parser, execute
from dataset_conversion.errors import ConversionError, UsageError
from dataset_conversion.files import list_files
from dataset_conversion.raw_dataset import DatasetSpec

SPEC = DatasetSpec(
    default_name="AutoPET",
    channel_names=("CT", "PET"),
    modalities=("CT", "PET"),
    labels={"background": 0, "tumor": 1},
    description="autoPET, whole-body PET/CT: CT in HU, PET in SUV, lesions",
    reference="Gatidis et al. 2022, doi 10.7937/gkr0-xv29; Jeblick et al. 2023, doi 10.7937/r7ep-3x37",
    licence="see the release",
)
LOOKS_FOR = (
    "the studies' DICOM (CT, PT, SEG), or SUV.nii.gz, SEG.nii.gz and CTres.nii.gz of each, or imagesTr and labelsTr"
)
FORMS = {
    "NIfTI of autoPET I/II": autopet_release,
    "nnU-Net folders of autoPET III to V": autopet_nnunet,
    "DICOM": autopet_dicom,
}


def discover(source: Path, options: Mapping[str, Any], progress: Callable[[], None]) -> Discovery:
    """Find the studies below ``source`` in whichever form they are."""
    discovery = Discovery()
    faults: list[ConversionError] = []
    paths = list_files(source, progress, faults)
    discovery.add_faults(faults)
    found = {name: form.find(paths, options, discovery, progress) for name, form in FORMS.items()}
    found = {name: studies for name, studies in found.items() if studies}
    if len(found) > 1:
        listed = ", ".join(f"{name}: {len(studies)} studies" for name, studies in found.items())
        raise UsageError(f"holds several forms of the data ({listed})", "give -i the folder of one", source)
    studies = next(iter(found.values()), [])
    studies = _of_tracer(studies, options["tracer"], discovery)
    _add_cases(studies, source, discovery)
    if options["drop_negatives"]:
        _drop_negatives(discovery, options, progress)
    return discovery


def _of_tracer(studies: Sequence[Study], tracer: str, discovery: Discovery) -> list[Study]:
    """Keep the studies of a tracer; those whose names and headers do not tell are refused, not guessed."""
    if tracer == "all":
        return list(studies)
    kept = []
    for study in studies:
        if study.name.tracer == tracer:
            kept.append(study)
        elif study.name.tracer:
            discovery.passed_over[study.name.identifier] = f"tracer {study.name.tracer} (--tracer {tracer})"
        else:
            what = "its tracer is not known"
            discovery.refusals.append(Refusal(study.name.identifier, what, "leave --tracer out", study.folder))
    return kept


def _add_cases(studies: Sequence[Study], source: Path, discovery: Discovery) -> None:
    identifiers = dict(zip(map(id, studies), told_apart([study.name for study in studies]), strict=True))
    renamed = {study.released_as: identifiers[id(study)] for study in studies if study.released_as}
    if discovery.folds is not None:
        discovery.folds = _renamed(discovery.folds, renamed, discovery)
        divided = {name for fold in discovery.folds for side in fold.values() for name in side}
        left = sorted(
            identifiers[id(study)] for study in studies if not study.is_test and identifiers[id(study)] not in divided
        )
        if left:
            discovery.notes.append(
                f"{len(left)} cases are in none of the folds that came with the data and are not trained on (e.g. "
                f"{left[0]}); --splits patient draws folds of all"
            )
    for study in studies:
        case_id = identifiers[id(study)]
        if study.fault is not None:
            error = study.fault
            discovery.refusals.append(Refusal(case_id, error.what, error.remedy, error.file or study.folder))
            continue
        payload = replace(study, place=os.path.relpath(study.folder, source))
        discovery.cases.append(
            Case(case_id, study.name.patient, study.files, payload, study.orientation, labelled=study.labelled)
        )
        if study.is_test:
            discovery.test.add(case_id)


def _renamed(folds: Sequence[Mapping[str, Sequence[str]]], names: Mapping[str, str], discovery: Discovery) -> list:
    """Return folds with the cases' new identifiers; what is in no fold, or in folds and not there, is said."""
    unknown = {name for fold in folds for side in fold.values() for name in side} - set(names)
    if unknown:
        discovery.notes.append(
            f"splits_final.json names {len(unknown)} cases that are not converted (e.g. {sorted(unknown)[0]})"
        )
    return [{side: sorted(names[name] for name in fold[side] if name in names) for side in fold} for fold in folds]


def _drop_negatives(discovery: Discovery, options: Mapping[str, Any], progress: Callable[[], None]) -> None:
    """Leave out studies without a lesion voxel, by their label: the release's diagnosis column is not reliable."""
    kept = []
    for case in discovery.cases:
        progress()
        try:
            positive = not case.labelled or case.payload.has_lesions(options)
        except Exception:
            # Whatever it is: reported with its reason when the case is converted.
            positive = True
        if positive:
            kept.append(case)
        else:
            discovery.passed_over[case.case_id] = "no lesion (--drop-negatives)"
    discovery.cases = kept


def describe(case: Case, options: Mapping[str, Any]) -> str:
    """Return one line on what would be converted; no pixels are read."""
    return f"{case.payload.describe(options)}; patient {case.patient}"


def convert(case: Case, options: Mapping[str, Any], writer: CaseWriter) -> dict[str, Any]:
    """Convert one study; returns the record for the report."""
    return case.payload.convert(options, writer)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``h2a_convert_autopet`` and return its exit code."""
    parser = build_parser(
        "h2a_convert_autopet",
        "Convert autoPET to $nnUNet_raw: TCIA's DICOM (CT, PT, SEG), the NIfTI release of autoPET I/II (CTres, SUV, "
        "SEG per study folder), or the nnU-Net shaped releases of autoPET III to V.",
        SPEC.default_name,
        "pet",
        ("patient", "622", "shipped"),
    )
    parser.add_argument(
        "--tracer", choices=(*TRACERS, "all"), default="all", help="convert studies of this tracer only (default: all)"
    )
    parser.add_argument(
        "--drop-negatives", action="store_true", help="leave out studies without a lesion voxel in their label"
    )
    parser.add_argument(
        "--missing-seg",
        choices=("refuse", "negative"),
        default="refuse",
        help="DICOM studies without a SEG: refuse them, or take them as free of lesions (default: refuse)",
    )
    arguments = parser.parse_args(argv)
    options = {name: getattr(arguments, name) for name in ("grid", "tracer", "drop_negatives", "missing_seg")}
    recipe = Recipe("h2a_convert_autopet", SPEC, options, discover, convert, describe, LOOKS_FOR, unit="studies")
    return execute(recipe, arguments)
