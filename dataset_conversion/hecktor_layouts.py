"""Finding HECKTOR's patients on disk, whichever edition: by what the files are called, never by a year.

2020 and 2021: ``CHGJ007_ct.nii.gz``, ``CHGJ007_pt.nii.gz``, ``CHGJ007_ct_gtvt.nii.gz`` and a CSV of bounding boxes.
2022: ``imagesTr/CHUM-001__CT.nii.gz``, ``…__PT.nii.gz``, ``labelsTr/CHUM-001.nii.gz``. 2025 and 2026: all three in a
folder of the patient. IDs have ``-``, ``_`` or nothing between centre and number.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataset_conversion.errors import ConversionError, UsageError
from dataset_conversion.nifti import ending_of
from dataset_conversion.raw_dataset import clean_identifier

_OLD_IMAGE = re.compile(r"^(?P<patient>[^_].*?)_(?P<kind>ct|pt)$")
_OLD_LABEL = re.compile(r"^(?P<patient>[^_].*?)_(?:ct_)?gtvt$")
_IMAGE = re.compile(r"^(?P<patient>.+)__(?P<kind>CT|PT)$")
_ID = re.compile(r"^(?P<centre>[A-Za-z]+)[-_ ]?(?P<number>\d+)$")
_TRAINING_FOLDER = re.compile(r"^imagestr$|(?<![a-z])train(ing|set)?(?![a-z])", re.IGNORECASE)
_TEST_FOLDER = re.compile(r"^imagests$|(?<![a-z])test(ing|set|s)?(?![a-z])", re.IGNORECASE)
_BOX_COLUMNS = ("x1", "x2", "y1", "y2", "z1", "z2")

Box = tuple[float, float, float, float, float, float]


@dataclass
class Found:
    """One patient's files.

    Attributes:
        patient: ID as the files have it.
        folder: where the CT is.
        files: ``CT``, ``PT`` and ``label`` to path, those there are.
        is_test: True where a folder's name says so.
        fault: why it cannot be converted, where that shows at once.
    """

    patient: str
    folder: str
    files: dict[str, str] = field(default_factory=dict)
    is_test: bool = False
    fault: ConversionError | None = None

    def add(self, kind: str, path: str) -> None:
        """Note a file; two of one kind (compressed and not) are a fault."""
        if kind in self.files:
            what = f"is there twice, also as {self.files[kind]}"
            self.fault = ConversionError(what, "remove one of the two", path)
        self.files[kind] = path

    @property
    def case_id(self) -> str:
        """``<CENTRE>_<number>``, or the ID cleaned where it has another form."""
        match = _ID.match(self.patient)
        return f"{match['centre'].upper()}_{match['number']}" if match else clean_identifier(self.patient)

    @property
    def centre(self) -> str:
        """The letters before the number, or ``""``."""
        match = _ID.match(self.patient)
        return match["centre"].upper() if match else ""


@dataclass
class Layout:
    """What was found.

    Attributes:
        patients: by folder and ID.
        old: True for the editions of 2020 and 2021, with one tumour label.
        tables: CSV files.
    """

    patients: list[Found]
    old: bool
    tables: list[str]


def find_layout(paths: Sequence[str], source: Path) -> Layout:
    """Sort files into patients.

    Raises:
        UsageError: files of both kinds of editions are there.
    """
    new: dict[tuple[str, str], Found] = {}
    old: dict[tuple[str, str], Found] = {}
    volumes: dict[tuple[str, str], list[str]] = {}
    old_labels: dict[tuple[str, str], list[str]] = {}
    tables = []
    for path in paths:
        folder, name = os.path.split(path)
        ending = ending_of(name)
        if name.lower().endswith(".csv"):
            tables.append(path)
        if not ending:
            continue
        stem = name[: -len(ending)]
        volumes.setdefault((folder, stem), []).append(path)
        for pattern, target in ((_IMAGE, new), (_OLD_IMAGE, old)):
            match = pattern.match(stem)
            if match is not None:
                found = target.setdefault((folder, match["patient"]), Found(match["patient"], folder))
                found.add(match["kind"].upper(), path)
                break
        else:
            match = _OLD_LABEL.match(stem)
            if match is not None:
                old_labels.setdefault((folder, match["patient"]), []).append(path)
    if new and old:
        raise UsageError(
            f"holds two editions ({len(old)} patients named as in 2020/21, {len(new)} as from 2022 on)",
            "give -i the folder of one",
            source,
        )
    for (folder, patient), found in old.items():
        for label in old_labels.pop((folder, patient), ()):
            found.add("label", label)
    for (folder, patient), found in new.items():
        beside = os.path.join(os.path.dirname(folder), os.path.basename(folder).replace("images", "labels", 1))
        place = (folder, patient) if (folder, patient) in volumes else (beside, patient)
        for label in volumes.pop(place, ()):
            found.add("label", label)
    patients = [found for _, found in sorted({**new, **old}.items())]
    patients += _labels_alone({**volumes, **old_labels} if not new else volumes, patients)
    folders = {found.folder: os.path.relpath(found.folder, source).split(os.sep) for found in patients}
    told = any(_TRAINING_FOLDER.search(part) for parts in folders.values() for part in parts)
    for found in patients:
        # The source's own name counts where no folder in it says more.
        own = [] if told else [source.absolute().name]
        found.is_test = any(_TEST_FOLDER.search(part) for part in (*own, *folders[found.folder]))
    return Layout(_once(patients), bool(old), tables)


def _labels_alone(volumes: Mapping[tuple[str, str], Sequence[str]], patients: Sequence[Found]) -> list[Found]:
    """Return the patients of whom there is a label and no image; ``volumes`` that belong to nobody yet, by name."""
    known = {found.case_id for found in patients}
    alone = []
    for (folder, name), paths in sorted(volumes.items()):
        label = Found(name, folder, {"label": paths[0]})
        if _ID.match(name) and label.case_id not in known:
            known.add(label.case_id)
            alone.append(label)
    return alone


def _once(patients: Sequence[Found]) -> list[Found]:
    """Return patients that several folders hold (the tasks of 2025) once: where the label is, else the first."""
    by_id: dict[str, list[Found]] = {}
    for found in patients:
        by_id.setdefault(found.case_id, []).append(found)
    kept = []
    for copies in by_id.values():
        complete = [found for found in copies if {"CT", "PT", "label"} <= set(found.files)]
        # Several complete copies stay, and are refused as sharing an identifier: they may differ.
        kept += complete or copies[:1]
    return kept


def read_boxes(tables: Sequence[str]) -> dict[str, Box | ConversionError]:
    """Return patient key -> bounding box (x1, x2, y1, y2, z1, z2; mm, LPS) of all CSV files that hold some.

    A patient whose box is no six numbers, or differs between two rows, gets the error instead.

    Raises:
        ConversionError: a file cannot be read.
    """
    boxes: dict[str, Box | ConversionError] = {}
    for path in tables:
        try:
            with open(path, newline="", encoding="utf-8-sig", errors="replace") as stream:
                rows = list(csv.DictReader(stream))
        except (OSError, csv.Error) as error:
            raise ConversionError(f"cannot be read ({error})", "restore the file", path) from error
        if not rows or not {"PatientID", *_BOX_COLUMNS} <= {str(key).strip() for key in rows[0]}:
            continue
        for row in rows:
            clean = {str(key).strip(): str(value or "").strip() for key, value in row.items()}
            if not clean["PatientID"]:
                continue
            key = patient_key(clean["PatientID"])
            try:
                box = _box(clean, path)
            except ConversionError as error:
                boxes[key] = error
                continue
            if boxes.setdefault(key, box) != box:
                what = f"has another box of {clean['PatientID']} than another row or CSV file"
                boxes[key] = ConversionError(what, "take out the one that does not count", path)
    return boxes


def _box(row: Mapping[str, str], path: str) -> Box:
    try:
        x1, x2, y1, y2, z1, z2 = (float(row[column]) for column in _BOX_COLUMNS)
    except ValueError as error:
        raise ConversionError(f"the box of {row['PatientID']} is no six numbers", "correct the row", path) from error
    if not (x1 < x2 and y1 < y2 and z1 < z2):
        raise ConversionError(f"the box of {row['PatientID']} is empty", "correct the row", path)
    return x1, x2, y1, y2, z1, z2


def patient_key(patient: str) -> str:
    """Return an ID without what editions write differently."""
    return re.sub(r"[^A-Za-z0-9]", "", patient).upper()
