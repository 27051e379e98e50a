"""TCIA Soft-tissue-Sarcoma (PET/CT DICOM with RTSTRUCT) to an nnU-Net raw dataset: ``h2a_convert_sts``.

Data: Vallieres et al. 2015, doi 10.7937/K9/TCIA.2015.7GO2GSKS, CC BY 3.0. Channel 0 is CT in HU, channel 1 PET in
SUVbw, label 1 the tumour mass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_conversion.cases import Case, CaseWriter, Discovery, Recipe, Refusal
from dataset_conversion.command import build_parser, execute
from dataset_conversion.errors import ConversionError
from dataset_conversion.raw_dataset import DatasetSpec, clean_identifier

if TYPE_CHECKING:
    from dataset_conversion.dicom_series import DicomFile
    from dataset_conversion.sts_selection import Selection

SPEC = DatasetSpec(
    default_name="STS",
    channel_names=("CT", "PET"),
    modalities=("CT", "PET"),
    labels={"background": 0, "tumor": 1},
    description="Soft-tissue sarcoma of the extremities, FDG-PET/CT: CT in HU, PET in SUVbw, tumour mass",
    reference="Vallieres et al. 2015, doi 10.7937/K9/TCIA.2015.7GO2GSKS",
    licence="CC BY 3.0",
)


LOOKS_FOR = "the patients' DICOM files: CT, PET and RTSTRUCT"


def group_patients(files: Sequence[DicomFile], source: Path) -> dict[str, list[DicomFile]]:
    """Group files by PatientID; without one, by that of the same study, then PatientName, then the first folder."""
    id_of_study = {file.study_uid: file.patient_id for file in files if file.patient_id and file.study_uid}
    groups: dict[str, list[DicomFile]] = {}
    for file in files:
        folder = os.path.relpath(os.path.dirname(file.path), source).split(os.sep)[0]
        patient = file.patient_id or id_of_study.get(file.study_uid) or file.patient_name or folder
        groups.setdefault(patient, []).append(file)
    return groups


def discover(source: Path, options: Mapping[str, Any], progress: Callable[[], None]) -> Discovery:
    """Find the patients that have CT, PET or RTSTRUCT files below ``source``."""
    from dataset_conversion.dicom_series import broken_files, scan
    from dataset_conversion.sts_selection import PatientFiles

    files, broken = scan(source, progress)
    discovery = Discovery()
    faults = broken_files(broken)
    known = set()
    for patient, members in sorted(group_patients(files, source).items()):
        # MR is not converted, but which RTSTRUCT was drawn on it decides which one counts.
        used = [file for file in members if file.modality in ("CT", "PT", "RTSTRUCT", "MR")]
        if all(file.modality == "MR" for file in used):
            continue
        payload = PatientFiles.of(members)
        identifier = clean_identifier(patient) or "patient"
        places = {os.path.dirname(file.path) for file in used if file.modality != "MR"}
        known |= places
        error = next((faults[place] for place in sorted(places) if place in faults), None)
        if error is not None:
            # It may be a slice at an end, which leaves no gap, or the contours that count.
            discovery.refusals.append(Refusal(identifier, error.what, error.remedy, error.file))
            continue
        discovery.cases.append(Case(identifier, patient, tuple(sorted(file.path for file in used)), payload))
    discovery.add_faults(error for folder, error in faults.items() if folder not in known)
    return discovery


def describe(case: Case, options: Mapping[str, Any]) -> str:
    """Return what would be converted from which series; headers only."""
    selection, suv = _prepare(case, options)
    return f"{selection.summary()}; SUV: {suv.provenance.get('rule', '')}"


def _prepare(case: Case, options: Mapping[str, Any]) -> tuple[Selection, Any]:
    from dataset_conversion.dicom_series import quiet_dicom
    from dataset_conversion.sts_selection import select
    from dataset_conversion.suv import suv_conversion

    selection = select(case.payload, options["grid"], options["roi"])
    try:
        with quiet_dicom():
            return selection, suv_conversion(selection.pet.headers)
    except ConversionError as error:
        raise error.located(selection.pet.paths[0]) from error


def convert(case: Case, options: Mapping[str, Any], writer: CaseWriter) -> dict[str, Any]:
    """Convert one patient; returns the record for the report."""
    import numpy as np
    import SimpleITK as sitk

    from dataset_conversion import resampling
    from dataset_conversion.dicom_pixels import grid_of_stack, read_onto, read_volume
    from dataset_conversion.rtstruct import rasterise
    from dataset_conversion.slabs import resample_slices

    selection, suv = _prepare(case, options)
    warnings = [*selection.notes, *suv.warnings]
    drawn_on = selection.label_stack
    mask = np.zeros(drawn_on.size[::-1], dtype=np.uint8)
    for roi in selection.rois:
        try:
            warnings += rasterise(roi, drawn_on, mask)[1]
        except ConversionError as error:
            raise error.located(selection.structure.path) from error
    if not mask.any():
        remedy = "check the contours, or leave the patient out"
        raise ConversionError("the tumour's contours enclose no voxel centre", remedy, selection.structure.path)
    grids = {name: grid_of_stack(stack) for name, stack in (("CT", selection.ct), ("PET", selection.pet))}
    pet = resampling.oriented(read_volume(selection.pet, suv.factors))
    if options["grid"] == "ct":
        reference, other_name, fill = resampling.oriented(read_volume(selection.ct)), "PET", resampling.FILL_PET
        moved = resampling.onto_grid(pet, reference, fill)[0]
    else:
        # The CT has ten to forty times the PET's voxels: it is resampled while its slices are read.
        reference, other_name, fill = pet, "CT", resampling.FILL_CT
        moved = read_onto(selection.ct, reference, fill)
    other = grids[other_name]
    other_resampled = not resampling.same_grid(resampling.oriented_grid(other), reference)
    drawn_grid = grid_of_stack(drawn_on)
    label_resampled = not resampling.same_grid(resampling.oriented_grid(drawn_grid), reference)
    label_moved = resample_slices(
        drawn_grid, lambda index: mask[index], reference, 0, nearest=True, kind=sitk.sitkUInt8
    )  # fmt: skip
    warnings += [f"CT: {note}" for note in selection.ct.notes] + [f"PET: {note}" for note in selection.pet.notes]
    before = {name: resampling.grid_record(grid) for name, grid in grids.items()}
    voxels = np.argwhere(sitk.GetArrayViewFromImage(label_moved))[:, ::-1]
    if not len(voxels):
        remedy = "give the images the contours belong to"
        raise ConversionError("the tumour lies outside the images", remedy, selection.structure.path)
    if label_resampled:
        drawn = drawn_on.series.modality.replace("PT", "PET")
        warnings.append(f"the contours were drawn on the {drawn}; the mask was resampled (nearest)")
    inside = resampling.fraction_inside(voxels, reference, other)
    if inside == 0.0:
        remedy = f"give the {other_name} series that does, or leave the patient out"
        raise ConversionError(f"the {other_name} does not cover the tumour", remedy, selection.structure.path)
    if inside < 1.0:
        warnings.append(f"{1.0 - inside:.1%} of the tumour lies outside the {other_name}, filled with {fill:g} there")
    if resampling.is_oblique(reference):
        warnings.append("the grid is oblique; nnU-Net ignores the direction, so it is kept as it is")
    ct, pet = (reference, moved) if options["grid"] == "ct" else (moved, reference)
    highest = float(sitk.GetArrayViewFromImage(pet).max())
    if not 0.5 <= highest <= 500.0:
        warnings.append(f"the highest SUV is {highest:.3g}")
    writer.image(0, ct)
    writer.image(1, pet)
    writer.label(label_moved)
    return {
        "sources": selection.sources(),
        "geometry_before": before,
        "geometry_after": resampling.grid_record(reference),
        "resampled": {other_name: other_resampled, "label": label_resampled},
        "tumour_voxels": len(voxels),
        "tumour_ml": round(len(voxels) * float(np.prod(reference.GetSpacing())) / 1000.0, 3),
        "highest_suv": round(highest, 4),
        "suv": {
            **suv.provenance,
            "factor_min": float(np.min(suv.factors)),
            "factor_max": float(np.max(suv.factors)),
        },
        "warnings": warnings,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``h2a_convert_sts`` and return its exit code."""
    parser = build_parser(
        "h2a_convert_sts",
        "Convert the TCIA Soft-tissue-Sarcoma collection (DICOM CT, PET and RTSTRUCT) to $nnUNet_raw.",
        SPEC.default_name,
        "ct",
    )
    parser.add_argument(
        "--roi",
        nargs="+",
        default=[],
        metavar="NAME",
        help="ROIs that make up the tumour, by exact name (default: GTV_Mass*, else GTV_Research)",
    )
    arguments = parser.parse_args(argv)
    options = {"grid": arguments.grid, "roi": sorted(arguments.roi)}
    recipe = Recipe("h2a_convert_sts", SPEC, options, discover, convert, describe, LOOKS_FOR)
    return execute(recipe, arguments)
