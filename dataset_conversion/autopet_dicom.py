"""TCIA's DICOM of FDG-PET-CT-Lesions and PSMA-PET-CT-Lesions: CT, PT and SEG series per study.

Series are told by Modality, never by folder names; the SEG says which PET it was drawn on. SUV is computed from the
headers, so it differs from the NIfTI release's (docs/conversion.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_conversion.autopet_names import of_dicom, patient_of_folder
from dataset_conversion.autopet_study import Study, Volume, write_volumes
from dataset_conversion.cases import CaseWriter, Discovery
from dataset_conversion.errors import ConversionError

if TYPE_CHECKING:
    from dataset_conversion.dicom_seg import SegHeader
    from dataset_conversion.dicom_series import DicomFile, ImageSeries, SliceStack

_USED = ("CT", "PT", "SEG")
_FDG_WORDS = ("fdg", "fluorodeoxyglucose", "fludeoxyglucose")
# Codes of fluorodeoxyglucose in SRT and SNOMED CT.
_FDG_CODES = ("C-B1031", "35321007", "422975008")


@dataclass(frozen=True)
class DicomStudy(Study):
    """A DICOM study: its image series and its SEG files."""

    series: tuple[ImageSeries, ...] = ()
    segs: tuple[str, ...] = ()

    def has_lesions(self, options: Mapping[str, Any]) -> bool:
        """True where any pixel of any SEG is set, and without SEG where that is refused later on."""
        from dataset_conversion.dicom_seg import has_segmented_pixels

        if not self.segs:
            return options["missing_seg"] == "refuse"
        return any(has_segmented_pixels(path) for path in self.segs)

    def describe(self, options: Mapping[str, Any]) -> str:
        """Return series and SEG, and the SUV rule; headers only."""
        from dataset_conversion.dicom_series import quiet_dicom
        from dataset_conversion.suv import suv_conversion

        ct, pet, seg, _ = self._select(options)
        with quiet_dicom():
            rule = suv_conversion(pet.headers).provenance.get("rule", "")
        drawn = "no SEG" if seg is None else f"SEG {', '.join(seg.segments)}"
        return (
            f"CT {ct.series.description!r} {ct.size}, PET {pet.series.description!r} {pet.size}, {drawn}; SUV: {rule}"
        )

    def convert(self, options: Mapping[str, Any], writer: CaseWriter) -> dict[str, Any]:
        """Write CT, SUV and lesions."""
        import numpy as np
        import SimpleITK as sitk

        from dataset_conversion import resampling
        from dataset_conversion.dicom_pixels import grid_of_stack, read_onto, read_volume, with_stack_geometry
        from dataset_conversion.dicom_seg import decode
        from dataset_conversion.dicom_series import quiet_dicom
        from dataset_conversion.suv import suv_conversion

        ct, pet, seg, warnings = self._select(options)
        try:
            with quiet_dicom():
                suv = suv_conversion(pet.headers)
        except ConversionError as error:
            raise error.located(pet.paths[0]) from error
        warnings += suv.warnings
        if seg is None:
            mask = np.zeros(pet.size[::-1], np.uint8)
        else:
            decoded = decode(seg.path, pet)
            mask = decoded.mask
            warnings += decoded.notes
        pet_image = resampling.oriented(read_volume(pet, suv.factors))
        if options["grid"] == "pet":
            ct_grid = grid_of_stack(ct)
            resampling.check_same_place(ct_grid, pet_image, ct.series.folder)
            ct_volume = Volume(read_onto(ct, pet_image, resampling.FILL_CT), read_from=ct_grid)
        else:
            ct_volume = Volume(resampling.oriented(read_volume(ct)))
        label = Volume(resampling.oriented(with_stack_geometry(sitk.GetImageFromArray(mask), pet)))
        warnings += [f"CT: {note}" for note in ct.notes] + [f"PET: {note}" for note in pet.notes]
        written = write_volumes(ct_volume, Volume(pet_image), label, options["grid"], "LPS", writer, warnings)
        sources = {
            name: {"series_uid": stack.series.uid, "description": stack.series.description, "files": len(stack.paths),
                   "folder": stack.series.folder}
            for name, stack in (("CT", ct), ("PET", pet))
        }  # fmt: skip
        sources["SEG"] = None if seg is None else {"file": seg.path, "segments": list(seg.segments)}
        factors = {"factor_min": float(np.min(suv.factors)), "factor_max": float(np.max(suv.factors))}
        return {"sources": sources, "suv": {**suv.provenance, **factors}, **written}

    def _select(self, options: Mapping[str, Any]) -> tuple[SliceStack, SliceStack, SegHeader | None, list[str]]:
        from dataset_conversion.dicom_seg import read_seg_header, without_copies
        from dataset_conversion.series_choice import Stacks, check_frames, corrected_pet

        notes: list[str] = []
        stacks = Stacks()
        series = corrected_pet(self.series, notes)
        segs = [read_seg_header(path) for path in without_copies(self.segs)]
        pets = [item for item in series if item.modality == "PT"]
        drawn = [(item, seg) for item in pets for seg in segs if item.uid in seg.series_uids]
        if len(drawn) > 1:
            listed = ", ".join(seg.path for _, seg in drawn)
            raise ConversionError(f"has {len(drawn)} SEGs of its PET: {listed}", "keep the one that counts")
        if drawn:
            pet, seg = drawn[0]
        else:
            seg = self._only_seg(segs, options, notes)
            pet = _only(stacks.measurable(pets, notes), seg, "PET")
            if seg is not None and seg.frame_of_reference != pet.frame_of_reference:
                what = "names neither its PET's series nor its frame of reference"
                raise ConversionError(what, "give the SEG that was drawn on this PET", seg.path)
            if seg is not None:
                notes.append(f"the SEG names another series; it was placed on {pet} by position")
        cts = stacks.measurable([item for item in series if item.modality == "CT"], notes)
        same = [item for item in cts if item.frame_of_reference == pet.frame_of_reference]
        ct = _only(same or cts, None, "CT")
        if len(cts) > 1:
            notes.append(f"of {len(cts)} CT series {ct} was taken by frame of reference")
        check_frames(ct, pet, notes)
        return stacks(ct), stacks(pet), seg, notes

    def _only_seg(self, segs: Sequence[SegHeader], options: Mapping[str, Any], notes: list[str]) -> SegHeader | None:
        if len(segs) == 1:
            return segs[0]
        if segs:
            listed = ", ".join(seg.path for seg in segs)
            raise ConversionError(f"has {len(segs)} SEGs and none names its PET: {listed}", "keep the one that counts")
        if options["missing_seg"] == "refuse":
            raise ConversionError("has no SEG", "restore it, or take such studies as negative: --missing-seg negative")
        notes.append("has no SEG and was taken as free of lesions (--missing-seg negative)")
        return None


def _only(candidates: Sequence[ImageSeries], seg: SegHeader | None, spoken: str) -> ImageSeries:
    """Return the one series there is; of several the one of the SEG's frame of reference."""
    if not candidates:
        raise ConversionError(f"has no {spoken} series but scouts", "restore its files")
    if len(candidates) > 1 and seg is not None:
        candidates = [item for item in candidates if item.frame_of_reference == seg.frame_of_reference] or candidates
    if len(candidates) > 1:
        listed = "; ".join(str(item) for item in candidates)
        raise ConversionError(f"has {len(candidates)} {spoken} series: {listed}", "keep the one that counts")
    return candidates[0]


def find(
    paths: Sequence[str], options: Mapping[str, Any], discovery: Discovery, progress: Callable[[], None]
) -> list[Study]:
    """Return the DICOM studies among some files that have a PET or a SEG."""
    from dataset_conversion.dicom_series import broken_files, scan_files
    from dataset_conversion.nifti import ending_of

    files, broken = scan_files((path for path in paths if not ending_of(path)), progress)
    faults = broken_files(broken)
    places = {os.path.dirname(file.path) for file in files if file.modality in _USED}
    discovery.add_faults(error for folder, error in faults.items() if folder not in places)
    groups: dict[str, list[DicomFile]] = {}
    for file in files:
        if file.modality in _USED:
            groups.setdefault(file.study_uid or os.path.dirname(file.path), []).append(file)
    return [
        _study(members, options, faults)
        for _, members in sorted(groups.items())
        if any(file.modality in ("PT", "SEG") for file in members)
    ]


def _study(files: Sequence[DicomFile], options: Mapping[str, Any], faults: Mapping[str, ConversionError]) -> Study:
    from dataset_conversion.dicom_series import group_series

    pets = [file for file in files if file.modality == "PT"]
    lead = (pets or list(files))[0]
    folder = os.path.commonpath([os.path.dirname(file.path) for file in files])
    patient = lead.patient_id or lead.patient_name or patient_of_folder(folder)
    name = of_dicom(patient, lead.study_date, lead.study_uid, _tracer(pets[0].path) if pets else "")
    study = DicomStudy(
        name, folder, tuple(sorted(file.path for file in files)), series=tuple(group_series(files, ("CT", "PT"))),
        segs=tuple(sorted(file.path for file in files if file.modality == "SEG")),
    )  # fmt: skip
    broken = next((faults[place] for file in files if (place := os.path.dirname(file.path)) in faults), None)
    if broken is None and not any(file.modality == "SEG" for file in files) and options["missing_seg"] == "negative":
        # What cannot be read below the study's folder may be its SEG.
        broken = next((error for place, error in faults.items() if Path(place).is_relative_to(folder)), None)
    if broken is not None:
        # A slice at an end would leave no gap.
        return replace(study, fault=broken)
    patients = {file.patient_id for file in files}
    missing = [spoken for code, spoken in (("CT", "CT"), ("PT", "PET")) if all(f.modality != code for f in files)]
    if len(patients) > 1:
        odd = next(file for file in files if file.patient_id != lead.patient_id)
        what = f"its files are of several patients: {', '.join(sorted(map(repr, patients)))}"
        return replace(study, fault=ConversionError(what, "give each patient's own files", odd.path))
    if missing:
        return replace(study, fault=ConversionError(f"has no {' and no '.join(missing)} series", "restore its files"))
    return study


def _tracer(path: str) -> str:
    """Return the tracer by the header of a PET file: ``fdg``, ``psma`` or ``""`` where it does not say."""
    import pydicom

    from dataset_conversion.dicom_series import READ_ERRORS, quiet_dicom

    texts: list[str] = []
    try:
        with quiet_dicom():
            keyword = "RadiopharmaceuticalInformationSequence"
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[keyword])
            for item in header.get(keyword) or ():
                texts.append(str(item.get("Radiopharmaceutical") or ""))
                for code in item.get("RadiopharmaceuticalCodeSequence") or ():
                    texts += [str(code.get("CodeMeaning") or ""), str(code.get("CodeValue") or "")]
    except READ_ERRORS:
        return ""
    words = " ".join(texts).lower()
    if any(word in words for word in _FDG_WORDS) or any(text in _FDG_CODES for text in texts):
        return "fdg"
    return "psma" if "psma" in words else ""
