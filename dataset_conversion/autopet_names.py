"""Names of autoPET's patients and studies, as DICOM, folders and files have them, to clean case identifiers.

``<tracer>_<patient>_<YYYYMMDD>`` is free of collisions over the 1611 studies of autoPET III.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dataset_conversion.raw_dataset import clean_identifier

TRACERS = ("fdg", "psma")
_PATIENT = re.compile(r"^(PETCT|PSMA)_([0-9a-zA-Z]+)$", re.IGNORECASE)
_PREFIX_TRACER = {"petct": "fdg", "psma": "psma"}
_STUDY_FOLDER = re.compile(r"^(?P<month>\d{2})-(?P<day>\d{2})-(?P<year>\d{4})(?P<middle>-.*)?$")
_RELEASED = re.compile(
    r"^(?P<tracer>[a-zA-Z]+)_(?P<patient>[0-9a-zA-Z]+)_"
    r"(?:(?P<month>\d{2})-(?P<day>\d{2})-(?P<year>\d{4})|(?P<year2>\d{4})-(?P<month2>\d{2})-(?P<day2>\d{2}))(?P<rest>.*)$"
)
_NUMBER = re.compile(r"-(\d{5})$")


@dataclass(frozen=True)
class StudyName:
    """What a study is called.

    Attributes:
        identifier: clean case identifier.
        patient: the patient, the same for all studies of one.
        tracer: ``fdg``, ``psma`` or ``""`` where the name does not say.
        number: the five digits that tell studies of one day apart, or ``""``.
    """

    identifier: str
    patient: str
    tracer: str
    number: str = ""


def of_folder(folder: str) -> StudyName:
    """Name a study by its folder, ``PETCT_<hex>/<MM-DD-YYYY>-NA-<description>-<5 digits>``.

    Folders of other names give the parent's name as patient and both names as identifier.
    """
    path = Path(folder).absolute()
    patient = patient_of_folder(folder, path.parent.name)
    tracer, short = _split_patient(patient)
    study, number = _STUDY_FOLDER.match(path.name), _NUMBER.search(path.name)
    digits = number.group(1) if number else ""
    if study is not None:
        rest = f"{study['year']}{study['month']}{study['day']}"
    else:
        rest = "" if path.name == patient else clean_identifier(path.name)
    return StudyName(_joined(tracer or "fdg", short, rest), patient, tracer or "fdg", digits)


def patient_of_folder(folder: str, otherwise: str = "") -> str:
    """Return the nearest folder name that is a patient's (``PETCT_…``, ``PSMA_…``), else ``otherwise`` or the last."""
    path = Path(folder).absolute()
    found = next((parent.name for parent in (path, *path.parents) if _PATIENT.match(parent.name)), "")
    return found or otherwise or path.name


def of_dicom(patient_id: str, study_date: str, study_uid: str, tracer: str) -> StudyName:
    """Name a study by its DICOM header; ``tracer`` counts where the PatientID does not say."""
    named, short = _split_patient(patient_id)
    tracer = named or tracer
    # TCIA names a study's folder by the last five digits of its UID.
    number = re.sub(r"\D", "", study_uid)[-5:]
    date = re.sub(r"\D", "", study_date)[:8]
    return StudyName(_joined(tracer or "pet", short, date or number), patient_id, tracer, number)


def of_file(name: str) -> StudyName:
    """Name a study by the identifier that autoPET III to V gave it."""
    match = _RELEASED.match(name)
    if match is None:
        fields = name.split("_")
        tracer = fields[0].lower() if fields[0].lower() in TRACERS else ""
        patient = "_".join(fields[:2]) if tracer and len(fields) > 1 else name
        return StudyName(clean_identifier(name), patient, tracer)
    tracer = match["tracer"].lower()
    date = "".join(match[part] or match[f"{part}2"] for part in ("year", "month", "day"))
    number = _NUMBER.search(match["rest"])
    patient = f"{tracer}_{match['patient']}"
    return StudyName(
        _joined(tracer, match["patient"], date), patient, tracer if tracer in TRACERS else "",
        number.group(1) if number else "",
    )  # fmt: skip


def told_apart(names: list[StudyName]) -> list[str]:
    """Return case identifiers, with the number where several studies share patient and day."""
    counts = Counter(name.identifier for name in names)
    return [
        f"{name.identifier}_{name.number}" if counts[name.identifier] > 1 and name.number else name.identifier
        for name in names
    ]


def _split_patient(patient: str) -> tuple[str, str]:
    match = _PATIENT.match(patient)
    if match is None:
        return "", clean_identifier(patient) or "patient"
    return _PREFIX_TRACER[match.group(1).lower()], match.group(2)


def _joined(*parts: str) -> str:
    return clean_identifier("_".join(part for part in parts if part))
