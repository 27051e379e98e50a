"""Signs in the headers of a series that it is not one complete series: merged, or short of slices at an end.

Positions show gaps, double and irregular slices (``dicom_series``); what they cannot show is looked for here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dataset_conversion.errors import ConversionError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_SAME_IN_A_SERIES = ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "SeriesNumber", "SeriesDescription")


def check_one_series(name: str, headers: Sequence[Dataset], paths: Sequence[str]) -> None:
    """Raise where files of one SeriesInstanceUID come from several series.

    Args:
        name: of the series, for messages.
        headers: of its files, in slice order.
        paths: of its files, alike.

    Raises:
        ConversionError: files differ in what a series has in common, or are numbered twice.
    """
    for keyword in _SAME_IN_A_SERIES:
        values = [str(header.get(keyword) or "").strip() for header in headers]
        odd = next((index for index, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            what = f"{name} holds several series under one UID: {keyword} is {values[odd]!r} and {values[0]!r}"
            raise ConversionError(what, "give each series a UID of its own, or keep one", paths[odd])
    numbers = [(str(h.get("InstanceNumber") or ""), str(h.get("AcquisitionNumber") or "")) for h in headers]
    seen: dict[tuple[str, str], str] = {}
    for number, path in zip(numbers, paths, strict=True):
        if number[0] and number in seen:
            what = f"{name} holds several series under one UID: it has the InstanceNumber {number[0]} twice, also in "
            raise ConversionError(what + seen[number], "keep the files of one", path)
        seen[number] = path
    acquisitions = [number[1] for number in numbers]
    changes = sum(a != b for a, b in itertools.pairwise(acquisitions))
    renumbered = len({number[0] for number in numbers}) < len(numbers)
    if renumbered and changes >= len(set(acquisitions)):
        # Acquisitions one above the other may be numbered anew; interleaved ones are different images.
        what = f"{name} holds interleaved acquisitions under one UID"
        raise ConversionError(what, "keep the files of one", paths[0])


def check_complete(name: str, headers: Sequence[Dataset], paths: Sequence[str], notes: list[str]) -> None:
    """Check that no slice is missing at an end, where gaps do not show it.

    Raises:
        ConversionError: (0054,0081) NumberOfSlices says that there are more.
    """
    stated = headers[0].get("NumberOfSlices")
    try:
        expected = int(stated) if stated is not None else None
    except (TypeError, ValueError):
        expected = None
    if expected is not None and expected > len(headers):
        what = f"{name} lacks slices: (0054,0081) NumberOfSlices is {expected}, {len(headers)} are there"
        raise ConversionError(what, "restore the missing files", paths[0])
    numbers = []
    for header in headers:
        try:
            numbers.append(int(header.get("InstanceNumber")))
        except (TypeError, ValueError):
            return
    first, last = min(numbers), max(numbers)
    if first > 1 or last - first + 1 > len(numbers):
        notes.append(f"{len(headers)} slices are numbered {first} to {last}: some may be missing at an end")
