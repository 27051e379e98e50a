"""Body-weight SUV (SUVbw) from the headers of a DICOM PET series.

SUVbw = (stored value x slope_i + intercept_i) x weight / dose at the decay reference, slice by slice. Which tags hold
these depends on vendor and units; the rules are those of the QIBA vendor-neutral pseudo-code and of the OncoRay/IBSI
SUV manual with its reference objects. Every value that cannot be had from the headers is an error, never a guess: no
assumed 75 kg, no assumed dose.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from dataset_conversion._suv_header import (
    SeriesHeaders,
    SUVError,
    SUVWarning,
    parse_number,
    read_private_text,
    read_text,
    tag_label,
)
from dataset_conversion._suv_nuclides import (
    HALF_LIFE_TOLERANCE,
    HALF_LIVES_S,
    nuclide_from_code,
    nuclide_from_text,
)
from dataset_conversion._suv_time import (
    Notes,
    acquisition_times,
    average_decay_time,
    frame_durations,
    injection_time,
    reference_time,
)

__all__ = ["SUVConversion", "SUVError", "SUVWarning", "suv_conversion", "suvbw_scale_factors"]

_PHILIPS_CREATOR = "Philips PET Private Group"
_PET_STORAGE = "1.2.840.10008.5.1.4.1.1.128"
_REFUSED_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.128.1": "a Legacy Converted Enhanced PET object",
    "1.2.840.10008.5.1.4.1.1.130": "an Enhanced PET object",
    "1.2.840.10008.5.1.4.1.1.7": "a Secondary Capture (screenshot)",
}


@dataclass
class SUVConversion:
    """The way from rescaled PET values to SUVbw.

    Attributes:
        factors: float64, shape (slices,): multiply the rescaled values (slope and intercept applied) of slice i with
            ``factors[i]`` to get SUVbw in g/ml.
        warnings: doubtful choices, one sentence each.
        provenance: the rules and figures used and, under ``doubtful``, the doubtful choices again, ready for JSON.
    """

    factors: np.ndarray
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


def suvbw_scale_factors(headers: Sequence[Dataset]) -> np.ndarray:
    """Return one factor per slice that turns rescaled PET values into SUVbw.

    Args:
        headers: one pydicom Dataset per slice of one PET series, in any order; pixel data is not needed.

    Returns:
        float64 array of shape (len(headers),), in the order of ``headers``.

    Raises:
        SUVError: a tag is missing, contradictory or not convertible; the message names it and its value.

    Doubtful choices are issued as SUVWarning; ``suv_conversion`` returns them instead.
    """
    conversion = suv_conversion(headers)
    for text in conversion.warnings:
        warnings.warn(text, SUVWarning, stacklevel=2)
    return conversion.factors


def suv_conversion(headers: Sequence[Dataset]) -> SUVConversion:
    """Return factors, warnings and provenance; see ``suvbw_scale_factors``."""
    series = SeriesHeaders(headers)
    notes = Notes()
    _check_kind(series, notes)
    units = series.text("Units").upper()
    notes.provenance["units"] = units
    if units == "GML":
        factors = _from_gml(series, notes)
    elif units == "CM2ML":
        factors = _from_body_surface(series, notes)
    elif units == "CNTS":
        factors = _from_counts(series, notes)
    elif units == "BQML":
        factors = _from_activity(series, notes)
    else:
        raise SUVError(
            f"{tag_label('Units')} is {units!r}" if units else f"{tag_label('Units')} is missing",
            "convertible are BQML, GML, CM2ML, and CNTS with Philips' private factors",
        )
    if notes.warnings:
        # The record of a figure says itself what is doubtful in it, wherever it is taken.
        notes.provenance["doubtful"] = list(notes.warnings)
    return SUVConversion(np.asarray(factors, dtype=np.float64), notes.warnings, notes.provenance)


def _check_kind(series: SeriesHeaders, notes: Notes) -> None:
    modality = series.text("Modality").upper()
    if modality != "PT":
        raise SUVError(
            f"{tag_label('Modality')} is {modality!r}, not 'PT'" if modality else f"{tag_label('Modality')} is missing",
            "give the slices of a PET series",
        )
    sop_class = series.text("SOPClassUID")
    if sop_class in _REFUSED_CLASSES:
        raise SUVError(
            f"{tag_label('SOPClassUID')} is {sop_class}, {_REFUSED_CLASSES[sop_class]}",
            "export the series as one PET Image Storage object per slice",
        )
    if sop_class not in ("", _PET_STORAGE):
        notes.warn(f"{tag_label('SOPClassUID')} is {sop_class}, not PET Image Storage")
    for frames in series.numbers("NumberOfFrames"):
        if frames is not None and frames > 1:
            raise SUVError(
                f"{tag_label('NumberOfFrames')} is {frames:.0f}: a multi-frame object",
                "export the series as one object per slice",
            )
    series.text("SeriesInstanceUID")
    for intercept in series.numbers("RescaleIntercept"):
        if intercept:
            raise SUVError(
                f"{tag_label('RescaleIntercept')} is {intercept:g}", "it is 0 in PET: check the file's export"
            )
    for slope in series.numbers("RescaleSlope"):
        if slope is not None and slope < 0:
            raise SUVError(f"{tag_label('RescaleSlope')} is {slope:g}", "it cannot be negative: correct the tag")


def _from_gml(series: SeriesHeaders, notes: Notes) -> np.ndarray:
    kind = series.text("SUVType").upper()
    notes.provenance["suv_type"] = kind
    if kind in ("", "BW"):
        notes.provenance["rule"] = "values are SUVbw already"
        return np.ones(len(series))
    if kind not in ("LBM", "LBMJAMES128", "LBMJANMA", "IBW"):
        raise SUVError(
            f"{tag_label('SUVType')} is {kind!r} with units GML",
            "convertible are BW, LBM, LBMJAMES128, LBMJANMA and IBW",
        )
    weight = _weight_kg(series, notes)
    mass = _normalising_mass_kg(kind, weight, _height_cm(series, notes), _sex(series))
    if mass <= 0:
        raise SUVError(
            f"weight and height give a {kind} mass of {mass:.1f} kg",
            f"check {tag_label('PatientWeight')} and {tag_label('PatientSize')}",
        )
    notes.provenance.update(rule=f"SUV normalised by {kind}, turned to body weight", normalising_mass_kg=mass)
    return np.full(len(series), weight / mass)


def _normalising_mass_kg(kind: str, weight: float, height: float, sex: str) -> float:
    """Return lean or ideal body mass in kg from kg and cm; for sex O the mean of both formulas."""
    bmi = weight / (height / 100.0) ** 2
    ratio = (weight / height) ** 2
    masses = {
        "LBM": (1.10 * weight - 120.0 * ratio, 1.07 * weight - 148.0 * ratio),
        "LBMJAMES128": (1.10 * weight - 128.0 * ratio, 1.07 * weight - 148.0 * ratio),
        "LBMJANMA": (9270.0 * weight / (6680.0 + 216.0 * bmi), 9270.0 * weight / (8780.0 + 244.0 * bmi)),
        "IBW": (48.0 + 1.06 * (height - 152.0), 45.5 + 0.91 * (height - 152.0)),
    }
    male, female = masses[kind]
    return {"M": male, "F": female, "O": (male + female) / 2.0}[sex]


def _from_body_surface(series: SeriesHeaders, notes: Notes) -> np.ndarray:
    kind = series.text("SUVType").upper()
    if kind not in ("", "BSA"):
        raise SUVError(
            f"{tag_label('SUVType')} is {kind!r} with units CM2ML", "CM2ML goes with BSA: correct one of the two tags"
        )
    weight = _weight_kg(series, notes)
    surface = 0.007184 * _height_cm(series, notes) ** 0.725 * weight**0.425
    notes.provenance.update(rule="SUV normalised by body surface, turned to body weight", body_surface_m2=surface)
    return np.full(len(series), weight / (surface * 10.0))


def _from_counts(series: SeriesHeaders, notes: Notes) -> np.ndarray:
    suv_factors = _philips_factors(series, 0x00, "SUV Scale Factor", notes)
    activity_factors = _philips_factors(series, 0x09, "Activity Concentration Scale Factor", notes)
    if suv_factors is not None:
        notes.provenance["rule"] = "counts times Philips SUV scale factor (7053,1000)"
        if activity_factors is not None:
            _compare_philips(series, suv_factors, activity_factors, notes)
        return suv_factors
    if activity_factors is None:
        raise SUVError(
            f"{tag_label('Units')} is CNTS, and neither (7053,1000) SUV Scale Factor nor (7053,1009) Activity "
            "Concentration Scale Factor is there",
            "counts cannot be converted: export the series in BQML or keep Philips' private tags",
        )
    notes.provenance["activity_rule"] = "counts times Philips activity scale factor (7053,1009)"
    return activity_factors * _from_activity(series, notes)


def _philips_factors(series: SeriesHeaders, element: int, name: str, notes: Notes) -> np.ndarray | None:
    label = f"(7053,10{element:02X}) {name}"
    found = series.per_slice(lambda header: read_private_text(header, 0x7053, element, _PHILIPS_CREATOR))
    values = [parse_number(text, label) if text else 0.0 for text, _ in found]
    if all(value == 0.0 for value in values):
        return None
    if any(value <= 0.0 for value in values):
        raise SUVError(f"{label} is {min(values):g} or missing on some slices", "it must be positive on every slice")
    if any(by_number for _, by_number in found):
        notes.provenance["philips_private_tag"] = f"{label} read by number: its creator element is absent"
    return np.asarray(values)


def _compare_philips(series: SeriesHeaders, suv: np.ndarray, activity: np.ndarray, notes: Notes) -> None:
    """Warn where Philips' two factors lead to different SUV; silent where the headers do not allow the comparison."""
    trial = Notes()
    try:
        other = activity * _from_activity(series, trial)
    except SUVError:
        return
    deviation = float(np.max(np.abs(other / suv - 1.0)))
    notes.provenance["philips_factors_agree_within"] = deviation
    if deviation > 0.05:
        notes.warn(
            f"Philips' (7053,1000) and (7053,1009) lead to SUV that differ by {deviation:.1%}; (7053,1000) was taken"
        )


def _from_activity(series: SeriesHeaders, notes: Notes) -> np.ndarray:
    """Return SUV per Bq/ml for every slice."""
    correction = series.text("DecayCorrection").upper()
    notes.provenance["decay_correction"] = correction
    if correction not in ("START", "ADMIN", "NONE"):
        raise SUVError(
            f"{tag_label('DecayCorrection')} is {correction!r}"
            if correction
            else f"{tag_label('DecayCorrection')} is missing",
            "convertible are START, ADMIN and NONE",
        )
    _check_corrections(series, correction, notes)
    weight_g = _weight_kg(series, notes) * 1000.0
    dose = _dose_bq(series, notes)
    if correction == "ADMIN":
        notes.provenance["rule"] = "activity at injection over weight"
        return np.full(len(series), weight_g / dose)
    half_life = _half_life_s(series, notes)
    if correction == "START":
        notes.provenance["rule"] = "activity at the decay reference over weight"
        reference = reference_time(series, half_life, notes)
        decay_s = (reference - injection_time(series, reference, half_life, notes)).total_seconds()
        return np.full(len(series), weight_g / (dose * 2.0 ** (-decay_s / half_life)))
    notes.provenance["rule"] = "activity not decay-corrected, over weight, slice by slice"
    durations = frame_durations(series)
    if durations is None:
        raise SUVError(
            f"{tag_label('ActualFrameDuration')} is missing",
            "values without decay correction need the frame duration: restore the tag",
        )
    acquired = acquisition_times(series, notes)
    injected = injection_time(series, min(acquired), half_life, notes)
    decays = [
        (moment + timedelta(seconds=average_decay_time(duration, half_life)) - injected).total_seconds()
        for moment, duration in zip(acquired, durations, strict=True)
    ]
    return weight_g / (dose * 2.0 ** (-np.asarray(decays) / half_life))


def _check_corrections(series: SeriesHeaders, correction: str, notes: Notes) -> None:
    keyword = "CorrectedImage"
    done: set[str] | None = None
    for header in series.slices:
        value = header.get(keyword)
        tokens = [value] if isinstance(value, str) else list(value or [])
        here = {str(token).strip().upper() for token in tokens}
        done = here if done is None else done & here
    done = done or set()
    shown = "\\".join(sorted(done)) or "missing"
    if "ATTN" not in done:
        raise SUVError(
            f"{tag_label(keyword)} is {shown}: not attenuation-corrected", "take the attenuation-corrected series"
        )
    decayed = bool(done & {"DECY", "DECAY"})
    if correction != "NONE" and not decayed:
        raise SUVError(
            f"{tag_label(keyword)} is {shown}: lacks DECY, though {tag_label('DecayCorrection')} is {correction}",
            "correct one of the two tags",
        )
    if correction == "NONE" and decayed:
        notes.warn(f"{tag_label(keyword)} lists DECY, but {tag_label('DecayCorrection')} is NONE; NONE was believed")


def _weight_kg(series: SeriesHeaders, notes: Notes) -> float:
    weight = series.number("PatientWeight")
    label = tag_label("PatientWeight")
    remedy = "SUV needs the patient's weight in kg: enter it; none is assumed"
    if weight is None:
        raise SUVError(f"{label} is missing", remedy)
    if weight < 1.0:
        raise SUVError(f"{label} is {weight:g}", remedy)
    if weight > 1000.0:
        notes.warn(f"{label} is {weight:g}: taken as grams")
        notes.provenance["weight_read_as"] = "g"
        weight /= 1000.0
        if weight < 1.0:
            raise SUVError(f"{label} is {weight * 1000:g}", remedy)
    elif weight > 350.0:
        notes.warn(f"{label} is {weight:g} kg, which is hardly possible")
    notes.provenance["weight_kg"] = weight
    return weight


def _height_cm(series: SeriesHeaders, notes: Notes) -> float:
    height = series.number("PatientSize")
    label = tag_label("PatientSize")
    if height is None or height <= 0.0:
        raise SUVError(
            f"{label} is missing" if height is None else f"{label} is {height:g}",
            "this SUV normalisation needs the patient's height in m: enter it",
        )
    if 30.0 <= height <= 250.0:
        notes.warn(f"{label} is {height:g}: taken as cm")
        notes.provenance["height_read_as"] = "cm"
        height /= 100.0
    if not 0.3 <= height <= 2.5:
        raise SUVError(f"{label} is {height:g} m, which is hardly possible", "correct the tag")
    notes.provenance["height_m"] = height
    return height * 100.0


def _sex(series: SeriesHeaders) -> str:
    sex = series.text("PatientSex").upper()
    if sex not in ("M", "F", "O"):
        raise SUVError(
            f"{tag_label('PatientSex')} is {sex!r}" if sex else f"{tag_label('PatientSex')} is missing",
            "this SUV normalisation needs M, F or O: enter it",
        )
    return sex


def _dose_bq(series: SeriesHeaders, notes: Notes) -> float:
    dose = series.number("RadionuclideTotalDose", nested=True)
    label = tag_label("RadionuclideTotalDose")
    if dose is None or dose <= 0.0:
        raise SUVError(
            f"{label} is missing" if dose is None else f"{label} is {dose:g}",
            "SUV needs the injected activity in Bq: enter it; none is assumed",
        )
    if dose < 1e4:
        notes.warn(f"{label} is {dose:g}: taken as MBq")
        notes.provenance["dose_read_as"] = "MBq"
        dose *= 1e6
    elif dose < 1e6:
        notes.warn(f"{label} is {dose:g} Bq, which is very little")
    elif dose > 1e11:
        notes.warn(f"{label} is {dose:g} Bq, which is very much")
    notes.provenance["dose_bq"] = dose
    return dose


def _half_life_s(series: SeriesHeaders, notes: Notes) -> float:
    header_value = series.number("RadionuclideHalfLife", nested=True)
    named = _nuclides(series)
    label = tag_label("RadionuclideHalfLife")
    spoken = " and ".join(named)
    if header_value is None or header_value <= 0.0:
        if len(named) != 1:
            what = f"the nuclide is told as {spoken}" if named else "no known nuclide is named"
            raise SUVError(
                f"{label} is missing and in {tag_label('RadionuclideCodeSequence')} {what}",
                "enter the half-life in seconds",
            )
        header_value = HALF_LIVES_S[named[0]]
        notes.warn(f"{label} is missing; {header_value:g} s of {named[0]} was taken")
    fitting = [name for name in named if abs(header_value / HALF_LIVES_S[name] - 1.0) <= HALF_LIFE_TOLERANCE]
    if named and not fitting:
        known = ", ".join(f"{HALF_LIVES_S[name]:g} s" for name in named)
        raise SUVError(
            f"{label} is {header_value:g} s, but {spoken} has {known}",
            "correct the half-life (in seconds) or the radionuclide code",
        )
    if not named:
        notes.warn(f"the radionuclide is not told; {label} {header_value:g} s was taken as it is")
    elif len(named) > 1:
        notes.warn(f"the radionuclide is told as {spoken}; {label} {header_value:g} s belongs to {fitting[0]}")
    notes.provenance.update(radionuclide=fitting[0] if fitting else None, half_life_s=header_value)
    return header_value


def _nuclides(series: SeriesHeaders) -> list[str]:
    """Return the nuclides named by the code, the code's meaning and the radiopharmaceutical, each once, in that order.

    They may contradict each other: the code C-131A1 (Ga-66) with the meaning Ga-68 is met in practice.
    """
    item = series.radiopharmaceutical[0]
    names = []
    sequence = item.get("RadionuclideCodeSequence")
    if sequence:
        names.append(nuclide_from_code(read_text(sequence[0], "CodeValue")))
        names.append(nuclide_from_text(read_text(sequence[0], "CodeMeaning")))
    names.append(nuclide_from_text(read_text(item, "Radiopharmaceutical")))
    return list(dict.fromkeys(name for name in names if name is not None))
