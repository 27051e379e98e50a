"""Which of a patient's image series can be used together."""

from __future__ import annotations

from collections.abc import Sequence

from dataset_conversion.dicom_series import ImageSeries, SliceStack, read_stack
from dataset_conversion.errors import ConversionError

#: How the modalities of DICOM are spoken of in messages.
SPOKEN = {"CT": "CT", "PT": "PET", "MR": "MR"}


class Stacks:
    """Measures series on demand, once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], SliceStack | ConversionError] = {}

    def __call__(self, series: ImageSeries) -> SliceStack:
        key = (series.modality, series.uid)
        if key not in self._known:
            try:
                self._known[key] = read_stack(series)
            except ConversionError as error:
                self._known[key] = error
        known = self._known[key]
        if isinstance(known, ConversionError):
            raise known
        return known

    def measurable(self, candidates: Sequence[ImageSeries], notes: list[str]) -> list[ImageSeries]:
        """Return the candidates that are volumes: a scout or a screenshot beside them must not refuse the patient.

        Raises:
            ConversionError: none of them is.
        """
        kept, faults = [], []
        for item in candidates:
            try:
                self(item)
                kept.append(item)
            except ConversionError as error:
                faults.append((item, error))
        if faults and not kept:
            raise faults[0][1]
        for item, error in faults:
            note = f"{item} was not considered: {error.what.replace(str(item), 'it')}"
            if note not in notes:
                notes.append(note)
        return kept


def corrected_pet(series: Sequence[ImageSeries], notes: list[str]) -> list[ImageSeries]:
    """Return the series without PET that is not attenuation-corrected where there is PET that is."""
    corrected = {
        item.uid
        for item in series
        if item.modality == "PT" and all("ATTN" in (word.upper() for word in f.corrections) for f in item.files)
    }
    usable = []
    for item in series:
        if item.modality == "PT" and corrected and item.uid not in corrected:
            notes.append(f"{item} was left out: not attenuation-corrected, unlike another PET series")
        else:
            usable.append(item)
    return usable


def check_frames(ct: ImageSeries, pet: ImageSeries, notes: list[str]) -> None:
    """Note that positions are taken as comparable where only the study says so.

    Raises:
        ConversionError: neither frame of reference nor study says that CT and PET positions are comparable.
    """
    if ct.frame_of_reference and ct.frame_of_reference == pet.frame_of_reference:
        return
    if ct.study_uid != pet.study_uid:
        raise ConversionError(
            f"{ct} and {pet} are of different studies and share no frame of reference",
            "register them first, or give the CT and PET of one examination",
            ct.folder,
        )
    notes.append(
        "CT and PET share no frame of reference; as they are of one study, their positions were taken as comparable"
    )
