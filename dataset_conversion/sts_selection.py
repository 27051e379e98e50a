"""Which CT, PET and contours of a Soft-tissue-Sarcoma patient belong together.

The RTSTRUCT decides, by the slices and series it names; where it names none that are there (de-identified or cropped
copies), by CT or PET in its names and by coinciding planes. What stays ambiguous is refused, never guessed: patients
of this collection have up to four contoured image series and several CT or PET series (body, legs, arms).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataset_conversion.dicom_series import DicomFile, ImageSeries, SliceStack, group_series
from dataset_conversion.errors import ConversionError
from dataset_conversion.rtstruct import Roi, StructureSet, plane_deviation, read_structure_set
from dataset_conversion.series_choice import SPOKEN, Stacks, check_frames, corrected_pet

_GRID_MODALITY = {"ct": "CT", "pet": "PT"}
# Registered MR copies are called RTstructAlignedT1toPET (also "Alligned", "AlignedTtoPET", "T!"): MR, not PET.
_MR_NAME = re.compile(r"all?igned|(?<![a-z])t[12!](?![0-9])|stir|flair|(?<![a-z])mri?(?![a-z])")
_CT_NAME = re.compile(r"(?<![a-z])ct")
_PET_NAME = re.compile(r"pet|(?<![a-z])pt(?![a-z])")
_STRUCT_WORDS = re.compile(r"rt[ _-]*struct(ure)?(set)?|structure|struct")
_OEDEMA_NAME = re.compile(r"o?edema|odem|ödem")
_MASS_NAME = re.compile(r"(?<![a-z])mass")
_RESEARCH_NAME = re.compile(r"gtv[ _-]*research")
_HALF_SLICE = 0.5 + 1e-3


@dataclass(frozen=True)
class PatientFiles:
    """The files of one patient that matter, and which UIDs belong to MR."""

    series: tuple[ImageSeries, ...]
    structures: tuple[DicomFile, ...]
    mr_series: frozenset[str]
    mr_slices: frozenset[str]

    @classmethod
    def of(cls, files: Sequence[DicomFile]) -> PatientFiles:
        """Sort the scanned files of a patient."""
        mr = [file for file in files if file.modality == "MR"]
        return cls(
            series=tuple(group_series(files, ("CT", "PT"))),
            structures=tuple(sorted((f for f in files if f.modality == "RTSTRUCT"), key=lambda f: f.path)),
            mr_series=frozenset(file.series_uid for file in mr),
            mr_slices=frozenset(file.sop_uid for file in mr),
        )


@dataclass
class Selection:
    """What a case is made of.

    Attributes:
        ct, pet: the two series as measured stacks.
        structure: the RTSTRUCT; ``rois`` its tumour ROIs.
        label_stack: the stack the contours are rasterised on (``ct`` or ``pet``).
        notes: choices worth knowing.
    """

    ct: SliceStack
    pet: SliceStack
    structure: StructureSet
    rois: list[Roi]
    label_stack: SliceStack
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Return one line for a dry run."""
        names = ", ".join(roi.name for roi in self.rois)
        return (
            f"CT {self.ct.series.description!r} {self.ct.size}, PET {self.pet.series.description!r} {self.pet.size}, "
            f"ROI {names} of {self.structure.description!r}"
        )

    def sources(self) -> dict[str, Any]:
        """Return series and contours for the report."""
        return {
            **{
                name: {
                    "series_uid": stack.series.uid,
                    "description": stack.series.description,
                    "files": len(stack.paths),
                    "folder": stack.series.folder,
                }
                for name, stack in (("CT", self.ct), ("PET", self.pet))
            },
            "RTSTRUCT": {
                "file": self.structure.path,
                "description": self.structure.description,
                "rois": [roi.name for roi in self.rois],
                "drawn_on": SPOKEN[self.label_stack.series.modality],
            },
        }


@dataclass
class _Drawing:
    """An RTSTRUCT with tumour ROIs and what it was drawn on."""

    structure: StructureSet
    rois: list[Roi]
    series: ImageSeries
    how: str
    named_mr: bool


def tumour_rois(structure: StructureSet, wanted: Sequence[str], modality: str | None = None) -> list[Roi]:
    """Return the ROIs of the tumour mass, chosen by name.

    ``GTV_Edema`` is tumour plus oedema and is never taken, nor is a ROI taken for its position in the file.

    Args:
        structure: the RTSTRUCT.
        wanted: exact names given by the user; empty: GTV_Mass*, else GTV_Research.
        modality: where several mass ROIs differ by a CT or PET suffix, the one to take.

    Raises:
        ConversionError: several mass ROIs that names do not tell apart.
    """
    rois = list(structure.rois.values())
    if wanted:
        names = {name.casefold() for name in wanted}
        return [roi for roi in rois if roi.name.casefold() in names]
    clean = [roi for roi in rois if not _OEDEMA_NAME.search(roi.name.casefold())]
    mass = [roi for roi in clean if _MASS_NAME.search(roi.name.casefold())]
    mass = mass or [roi for roi in clean if _RESEARCH_NAME.search(roi.name.casefold())]
    if len(mass) > 1 and modality is not None:
        mass = [roi for roi in mass if modality_in_name(roi.name) == modality] or mass
    drawn = [roi for roi in mass if roi.contours]
    if len(drawn) > 1:
        raise ConversionError(
            f"has several tumour ROIs ({', '.join(roi.name for roi in drawn)})",
            "name those that make up the tumour with --roi",
            structure.path,
        )
    return drawn or mass


def modality_in_name(text: str) -> str | None:
    """Return the modality a name speaks of: MR, CT, PT, or None where it names none or both CT and PET."""
    plain = _STRUCT_WORDS.sub(" ", text.casefold())
    if _MR_NAME.search(plain):
        return "MR"
    is_ct, is_pet = bool(_CT_NAME.search(plain)), bool(_PET_NAME.search(plain))
    return None if is_ct == is_pet else ("CT" if is_ct else "PT")


def select(patient: PatientFiles, grid: str, wanted_rois: Sequence[str] = ()) -> Selection:
    """Choose CT, PET and contours for the grid ``ct`` or ``pet``.

    Raises:
        ConversionError: something is missing or ambiguous.
    """
    notes: list[str] = []
    series = corrected_pet(patient.series, notes)
    for modality in ("CT", "PT"):
        if not any(item.modality == modality for item in series):
            raise ConversionError(
                f"has no {SPOKEN[modality]} series here",
                "give -i a folder that holds the patient's CT, PET and RTSTRUCT",
            )
    if not patient.structures:
        raise ConversionError("has no RTSTRUCT, so no tumour contours", "restore its file")
    stacks = Stacks()
    wanted = _GRID_MODALITY[grid]
    drawings = _drawings(patient, series, wanted, wanted_rois, stacks, notes)
    here = [drawing for drawing in drawings if drawing.series.modality == wanted]
    there = [drawing for drawing in drawings if drawing.series.modality != wanted]
    drawing = _only(here or there)
    if drawing.how:
        notes.append(drawing.how)
    chosen = {drawing.series.modality: drawing.series}
    companions = {item.series.uid: item.series for item in there} if here else {}
    if len(companions) == 1:
        companion = next(iter(companions.values()))
        chosen[companion.modality] = companion
    for name in ("CT", "PT"):
        if name not in chosen:
            chosen[name] = _companion([item for item in series if item.modality == name], drawing, stacks, notes)
    for name, taken in chosen.items():
        others = [item for item in series if item.modality == name and item.uid != taken.uid]
        if others and not any(str(taken) in note for note in notes):
            notes.append(f"of {len(others) + 1} {SPOKEN[name]} series {taken} was taken, the contoured one")
    selection = Selection(
        ct=stacks(chosen["CT"]),
        pet=stacks(chosen["PT"]),
        structure=drawing.structure,
        rois=drawing.rois,
        label_stack=stacks(drawing.series),
        notes=notes,
    )
    check_frames(selection.ct.series, selection.pet.series, notes)
    return selection


def _only(drawings: Sequence[_Drawing]) -> _Drawing:
    """Return the one drawing there is; of several on a modality those named after MR do not count."""
    if len(drawings) > 1:
        drawings = [item for item in drawings if not item.named_mr] or drawings
    if len(drawings) > 1:
        files = ", ".join(item.structure.path for item in drawings)
        spoken = SPOKEN[drawings[0].series.modality]
        raise ConversionError(
            f"has {len(drawings)} RTSTRUCTs of the tumour on its {spoken}: {files}", "keep the one that counts"
        )
    return drawings[0]


def _drawings(
    patient: PatientFiles,
    series: Sequence[ImageSeries],
    wanted: str,
    wanted_rois: Sequence[str],
    stacks: Stacks,
    notes: list[str],
) -> list[_Drawing]:
    """Return the RTSTRUCTs with a tumour ROI on CT or PET, or raise with the reason why there is none."""
    found: list[_Drawing] = []
    reasons: list[str] = []
    faults: list[ConversionError] = []
    for file in patient.structures:
        try:
            structure = read_structure_set(file.path)
        except ConversionError as error:
            faults.append(error)
            continue
        if _references(structure.sop_uids, structure.series_uids, patient, series) == "MR":
            reasons.append(f"{structure} was drawn on MR")
            continue
        try:
            rois = tumour_rois(structure, wanted_rois, wanted)
        except ConversionError as error:
            faults.append(error)
            continue
        if not rois:
            reasons.append(f"{structure} has no tumour ROI by name")
            continue
        if not any(roi.contours for roi in rois):
            reasons.append(f"{structure}: ROI {rois[0].name!r} has no contours")
            continue
        try:
            drawing = _place(structure, rois, patient, series, wanted, stacks, notes)
        except ConversionError as error:
            faults.append(error)
            continue
        if isinstance(drawing, str):
            reasons.append(f"{structure} {drawing}")
        else:
            found.append(drawing)
    if faults and not any(drawing.series.modality == wanted for drawing in found):
        # The file at fault may be the one that counts; another modality's contours must not stand in for it.
        raise faults[0]
    if not found:
        raise ConversionError(
            f"has no tumour contours on CT or PET: {'; '.join(reasons)}",
            "add the RTSTRUCT drawn on CT or PET, or name the tumour ROI with --roi",
            patient.structures[0].path,
        )
    notes += [f"{reason}; it was not used" for reason in [*reasons, *map(str, faults)]]
    return found


def _references(
    sop_uids: set[str], series_uids: set[str], patient: PatientFiles, series: Sequence[ImageSeries]
) -> ImageSeries | str | None:
    """Return the CT or PET series that UIDs point to, ``"MR"``, or None where they point to nothing (or to several)."""
    hits = [item for item in series if sop_uids & {file.sop_uid for file in item.files}]
    if not hits and sop_uids & patient.mr_slices:
        return "MR"
    if not hits:
        hits = [item for item in series if item.uid in series_uids]
    if not hits and series_uids & patient.mr_series:
        return "MR"
    return hits[0] if len(hits) == 1 else None


def _place(
    structure: StructureSet,
    rois: list[Roi],
    patient: PatientFiles,
    series: Sequence[ImageSeries],
    wanted: str,
    stacks: Stacks,
    notes: list[str],
) -> _Drawing | str:
    """Return the series a tumour was drawn on, or the reason why that cannot be told.

    Raises:
        ConversionError: of the series it could be, none is a volume.
    """
    contoured = set().union(*(roi.sop_uids() for roi in rois))
    named = next(
        (name for text in (rois[0].name, structure.description, structure.label) if (name := modality_in_name(text))),
        None,
    )
    named_mr = "MR" in {modality_in_name(text) for text in (rois[0].name, structure.description, structure.label)}
    target = _references(contoured, set(), patient, series)
    if target is None:
        target = _references(structure.sop_uids, structure.series_uids, patient, series)
    if target == "MR":
        return "was drawn on MR"
    if isinstance(target, ImageSeries):
        return _Drawing(structure, rois, target, "", named_mr)
    if named_mr:
        return "was drawn on MR, by its name"
    candidates = {}
    for item in stacks.measurable([item for item in series if named in (None, item.modality)], notes):
        deviation = max(plane_deviation(roi, stacks(item)) for roi in rois if roi.contours)
        if deviation <= _HALF_SLICE:
            candidates[item.uid] = (deviation, item)
    if not candidates:
        return "names slices that are not there, and its planes fit no CT or PET series of its frame of reference"
    best = min(deviation for deviation, _ in candidates.values())
    # Planes that fit equally well (1 % of a slice) lie on both series; then the grid asked for is as good.
    level = [item for deviation, item in candidates.values() if deviation <= best + 0.01]
    preferred = [item for item in level if item.modality == wanted] or level
    if len(preferred) > 1:
        return f"names slices that are not there, and its planes fit {len(preferred)} series"
    basis = f"{SPOKEN[named]} in its names" if named else "coinciding planes"
    how = (
        f"{structure} names slices that are not there; it was matched to {preferred[0]} by {basis} and frame of "
        "reference"
    )
    return _Drawing(structure, rois, preferred[0], how, named_mr)


def _companion(candidates: Sequence[ImageSeries], drawing: _Drawing, stacks: Stacks, notes: list[str]) -> ImageSeries:
    """Return the other modality's series that belongs to the contoured one."""
    if len(candidates) == 1:
        return candidates[0]
    spoken = SPOKEN[candidates[0].modality]
    candidates = stacks.measurable(candidates, notes)
    if len(candidates) == 1:
        return candidates[0]
    filters: list[tuple[str, Callable[[ImageSeries], bool]]] = [
        ("frame of reference", lambda item: item.frame_of_reference == drawing.series.frame_of_reference),
        ("study", lambda item: item.study_uid == drawing.series.study_uid),
        ("coverage of the tumour", lambda item: _covers(stacks(item), drawing.rois)),
    ]
    left = list(candidates)
    for basis, fits in filters:
        left = [item for item in left if fits(item)]
        if len(left) == 1:
            notes.append(f"of {len(candidates)} {spoken} series {left[0]} was taken by {basis}")
            return left[0]
        if not left:
            break
    listed = "; ".join(str(item) for item in candidates)
    raise ConversionError(
        f"has {len(candidates)} {spoken} series, and nothing tells which belongs to {drawing.series}: {listed}",
        "keep the one that counts",
        candidates[0].folder,
    )


def _covers(stack: SliceStack, rois: Sequence[Roi]) -> bool:
    """True where all contour points lie in the volume, to half a voxel."""
    points = np.concatenate([contour.points for roi in rois for contour in roi.contours])
    index = stack.to_index(points)
    low = np.array([-0.5, -0.5, -0.5 * stack.spacing[2]])
    high = np.array([stack.size[0] - 0.5, stack.size[1] - 0.5, stack.distances[-1] + 0.5 * stack.spacing[2]])
    return bool(((index >= low) & (index <= high)).all())
