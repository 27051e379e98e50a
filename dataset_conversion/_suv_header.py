"""Reading the tags SUV conversion needs, from all slices of one PET series, with errors that name tag and value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta
from typing import Any

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from dataset_conversion.errors import ConversionError

_TM = re.compile(r"^(\d{2}):?(\d{2})?:?(\d{2})?(\.\d+)?$")
_DA = re.compile(r"^(\d{4})[.-]?(\d{2})[.-]?(\d{2})$")
_DT = re.compile(r"^(\d{8})(\d{2})(\d{2})(\d{2})?(\.\d+)?([+-]\d{4})?$")
_DT_WITHOUT_TIME = re.compile(r"^\d{4}(\d{2}){0,3}([+-]\d{4})?$")
_OFFSET = re.compile(r"^([+-])(\d{2})(\d{2})$")


class SUVError(ConversionError):
    """SUV cannot be computed from these headers: names the tag, its value, and what would make it convertible."""


class SUVWarning(UserWarning):
    """SUV was computed, and something in the headers had to be chosen or looks doubtful."""


def tag_label(keyword: str) -> str:
    """Return ``(gggg,eeee) Keyword`` for a DICOM keyword."""
    tag = tag_for_keyword(keyword)
    return keyword if tag is None else f"({tag >> 16:04X},{tag & 0xFFFF:04X}) {keyword}"


def _plain(value: Any) -> Any:
    """Strip pydicom's wrappers that hold nothing: None for empty values, the element of a one-element list."""
    if value is None or isinstance(value, (str, bytes)):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return None if len(value) == 0 else (value[0] if len(value) == 1 else list(value))
    return value


def _text(value: Any) -> str:
    """Return an element's value as text without padding, "" for an empty one; of VR UN the bytes are decoded."""
    value = _plain(value)
    if isinstance(value, bytes):
        value = value.decode("ascii", errors="replace")
    return "" if value is None else str(value).strip(" \t\r\n\0")


def read_text(header: Dataset, keyword: str) -> str:
    """Return the element as stripped text, "" where it is missing or empty."""
    try:
        return _text(header.get(keyword))
    except (ValueError, TypeError, AttributeError, NotImplementedError, OverflowError) as error:
        raise SUVError(f"{tag_label(keyword)} cannot be read ({error})", "correct the tag") from error


def read_number(header: Dataset, keyword: str) -> float | None:
    """Return the element as a finite float, None where it is missing or empty."""
    text = read_text(header, keyword)
    return None if text == "" else parse_number(text, tag_label(keyword))


def parse_number(text: str, label: str) -> float:
    """Return ``text`` as a finite float or raise an SUVError that names ``label``."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SUVError(f"{label} is {text!r}, not a number", "correct the tag")
    return number


def read_private_text(header: Dataset, group: int, element: int, creator: str) -> tuple[str, bool]:
    """Return (text, by_number) of private element ``(group, xx<element>)`` of ``creator``.

    The block is found by its creator element, in any case and padding, for exports that know no private tags write it
    as bytes (VR UN). De-identification often deletes or empties that element; only then is the tag read where vendors
    put it, in block 10 (``by_number`` is True). A block that belongs to another creator is never read.
    """
    elements = []
    by_number = False
    creators = {}
    for block in range(0x10, 0x100):
        if (group, block) in header:
            creators[block] = _text(header[group, block].value).casefold()
    for block, name in creators.items():
        if name == creator.casefold():
            elements.append((group, (block << 8) | element))
    if not elements and not creators.get(0x10):
        elements.append((group, 0x1000 | element))
        by_number = True
    for tag in elements:
        if tag not in header:
            continue
        try:
            text = _text(header[tag].value)
        except (ValueError, TypeError) as error:
            label = f"({group:04X},{tag[1]:04X})"
            raise SUVError(f"{label} of {creator} cannot be read ({error})", "correct the tag") from error
        if text:
            return text, by_number
    return "", False


class SeriesHeaders:
    """The headers of one PET series; every getter checks that the slices agree.

    Args:
        headers: one pydicom Dataset per slice (pixel data not needed), in the caller's order.
    """

    def __init__(self, headers: Sequence[Dataset]) -> None:
        self.slices: list[Dataset] = list(headers)
        if not self.slices:
            raise SUVError("no slice headers were given", "give one header per slice of the PET series")
        self._radiopharmaceutical: list[Dataset] | None = None

    def __len__(self) -> int:
        return len(self.slices)

    @property
    def radiopharmaceutical(self) -> list[Dataset]:
        """The single item of (0054,0016) of every slice, in slice order."""
        if self._radiopharmaceutical is None:
            items = []
            for header in self.slices:
                sequence = header.get("RadiopharmaceuticalInformationSequence")
                if not sequence:
                    raise SUVError(
                        f"{tag_label('RadiopharmaceuticalInformationSequence')} is missing",
                        "SUV needs the injected dose and time it holds: restore the sequence",
                    )
                if len(sequence) > 1:
                    raise SUVError(
                        f"{tag_label('RadiopharmaceuticalInformationSequence')} has {len(sequence)} items",
                        "only series of one radiopharmaceutical can be converted",
                    )
                items.append(sequence[0])
            self._radiopharmaceutical = items
        return self._radiopharmaceutical

    def _datasets(self, nested: bool) -> list[Dataset]:
        return self.radiopharmaceutical if nested else self.slices

    def texts(self, keyword: str, nested: bool = False) -> list[str]:
        """Return the text of every slice."""
        return [read_text(header, keyword) for header in self._datasets(nested)]

    def text(self, keyword: str, nested: bool = False) -> str:
        """Return the one text all slices share, "" where no slice has it."""
        values = sorted(set(self.texts(keyword, nested)))
        if len(values) > 1:
            shown = ", ".join(repr(value) for value in values[:3])
            raise SUVError(
                f"{tag_label(keyword)} differs between the slices of the series ({shown})",
                "give the slices of one series only, or correct the tag",
            )
        return values[0]

    def numbers(self, keyword: str) -> list[float | None]:
        """Return the number of every slice, None where it is missing."""
        return [read_number(header, keyword) for header in self.slices]

    def number(self, keyword: str, nested: bool = False) -> float | None:
        """Return the one number all slices share (to 1e-6 relative), None where no slice has it."""
        values = [read_number(header, keyword) for header in self._datasets(nested)]
        known = [value for value in values if value is not None]
        if not known:
            return None
        if len(known) < len(values) or max(known) - min(known) > 1e-6 * max(abs(value) for value in known):
            shown = ", ".join(sorted({repr(value) for value in values})[:3])
            raise SUVError(
                f"{tag_label(keyword)} differs between the slices of the series ({shown})",
                "give the slices of one series only, or correct the tag",
            )
        return known[0]

    def per_slice(self, reader: Callable[[Dataset], Any]) -> list[Any]:
        """Return ``reader(header)`` of every slice."""
        return [reader(header) for header in self.slices]


def parse_time(text: str, label: str) -> timedelta:
    """Return a DICOM TM (also ``HH:MM:SS`` and shortened forms) as time since midnight."""
    match = _TM.match(text)
    if match is not None:
        hours, minutes, seconds = (int(part or 0) for part in match.groups()[:3])
        if hours < 24 and minutes < 60 and seconds <= 60:
            fraction = float(match.group(4) or 0.0)
            return timedelta(hours=hours, minutes=minutes, seconds=seconds + fraction)
    raise SUVError(f"{label} is {text!r}, not a DICOM time", "correct the tag to HHMMSS")


def parse_date(text: str, label: str) -> datetime:
    """Return a DICOM DA as the datetime of its midnight."""
    match = _DA.match(text)
    if match is not None:
        try:
            day = date(*(int(part) for part in match.groups()))
            return datetime(day.year, day.month, day.day)
        except ValueError:
            pass
    raise SUVError(f"{label} is {text!r}, not a DICOM date", "correct the tag to YYYYMMDD")


def parse_datetime(text: str, label: str, utc_offset: str = "") -> datetime:
    """Return a DICOM DT as naive local datetime.

    A DT that carries its offset from UTC is moved to the series' own zone ``utc_offset`` (0008,0201) where that is
    known; else the clock time is taken as written, for the DA and TM tags it is compared with have no zone either.
    """
    match = _DT.match(text)
    if match is None and _DT_WITHOUT_TIME.match(text):
        raise SUVError(f"{label} is {text!r}: its time of day is missing", "add it: YYYYMMDDHHMMSS")
    if match is None:
        raise SUVError(f"{label} is {text!r}, not a DICOM date-time", "correct the tag to YYYYMMDDHHMMSS")
    day, hours, minutes, seconds, fraction, offset = match.groups()
    moment = parse_date(day, label) + parse_time(hours + minutes + (seconds or "00") + (fraction or ""), label)
    if offset and _OFFSET.match(utc_offset):
        moment += _offset(utc_offset) - _offset(offset)
    return moment


def _offset(text: str) -> timedelta:
    match = _OFFSET.match(text)
    if match is None:
        return timedelta(0)
    sign, hours, minutes = match.groups()
    span = timedelta(hours=int(hours), minutes=int(minutes))
    return -span if sign == "-" else span
