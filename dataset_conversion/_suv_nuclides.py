"""Half-lives of the radionuclides met in PET, found by the codes and names that DICOM headers carry."""

from __future__ import annotations

import re

# Seconds. F-18 and Ga-68 as QIBA and the DICOM world use them, the others from ENSDF evaluations; header values within
# HALF_LIFE_TOLERANCE of these are taken from the header.
HALF_LIVES_S: dict[str, float] = {
    "C-11": 1221.8,
    "N-13": 597.9,
    "O-14": 70.6,
    "O-15": 122.24,
    "F-18": 6586.2,
    "Na-22": 82_080_000.0,
    "K-38": 458.2,
    "Sc-43": 14_007.6,
    "Sc-44": 14_292.0,
    "Ti-45": 11_088.0,
    "Mn-51": 2772.0,
    "Mn-52": 483_062.4,
    "Fe-52": 29_790.0,
    "Cu-60": 1422.0,
    "Cu-61": 11_998.8,
    "Cu-62": 580.2,
    "Cu-64": 45_723.6,
    "Zn-62": 33_094.8,
    "Ga-66": 34_164.0,
    "Ga-68": 4062.6,
    "As-72": 93_600.0,
    "Se-73": 25_740.0,
    "Br-75": 5802.0,
    "Br-76": 58_320.0,
    "Rb-82": 75.45,
    "Y-86": 53_064.0,
    "Y-90": 230_580.0,
    "Zr-89": 282_276.0,
    "Nb-90": 52_560.0,
    "Tc-94m": 3120.0,
    "I-124": 360_806.4,
    "Tb-152": 63_000.0,
}
HALF_LIFE_TOLERANCE = 0.02

# DICOM PS3.16 CID 4020, SNOMED RT style, SNOMED CT and DCM codes.
_CODES: dict[str, str] = {
    "C-105A1": "C-11", "40565003": "C-11",
    "C-107A1": "N-13", "21576001": "N-13",
    "C-1018C": "O-14", "424875009": "O-14",
    "C-B1038": "O-15", "129504001": "O-15",
    "C-111A1": "F-18", "77004003": "F-18",
    "C-155A1": "Na-22", "71633006": "Na-22",
    "C-135A4": "K-38", "423764008": "K-38",
    "126605": "Sc-43", "126600": "Sc-44",
    "C-166A2": "Ti-45", "75696008": "Ti-45",
    "126601": "Mn-51", "C-149A1": "Mn-52", "37225000": "Mn-52",
    "C-130A1": "Fe-52", "69089000": "Fe-52",
    "C-127A4": "Cu-60", "425364008": "Cu-60",
    "C-127A1": "Cu-61", "71425003": "Cu-61",
    "C-127A5": "Cu-62", "422934004": "Cu-62",
    "C-127A2": "Cu-64", "3932008": "Cu-64",
    "C-141A1": "Zn-62", "65054007": "Zn-62",
    "C-131A1": "Ga-66", "79477007": "Ga-66",
    "C-131A3": "Ga-68", "35337001": "Ga-68",
    "C-115A2": "As-72", "2705002": "As-72",
    "C-116A2": "Se-73", "87437000": "Se-73",
    "C-113A1": "Br-75", "17910003": "Br-75",
    "C-113A2": "Br-76", "79523006": "Br-76",
    "C-159A2": "Rb-82", "79197006": "Rb-82",
    "C-162A3": "Y-86", "10738001": "Y-86",
    "C-162A7": "Y-90", "14691008": "Y-90",
    "C-168A4": "Zr-89", "63360001": "Zr-89",
    "126603": "Nb-90",
    "C-163AA": "Tc-94m", "424079002": "Tc-94m",
    "C-114A5": "I-124", "40937006": "I-124",
    "126606": "Tb-152",
}  # fmt: skip

_ELEMENTS: dict[str, str] = {
    "carbon": "C", "nitrogen": "N", "oxygen": "O", "fluorine": "F", "fluor": "F", "sodium": "Na", "potassium": "K",
    "scandium": "Sc", "titanium": "Ti", "manganese": "Mn", "iron": "Fe", "copper": "Cu", "zinc": "Zn",
    "gallium": "Ga", "arsenic": "As", "selenium": "Se", "bromine": "Br", "rubidium": "Rb", "yttrium": "Y",
    "zirconium": "Zr", "niobium": "Nb", "technetium": "Tc", "iodine": "I", "terbium": "Tb",
}  # fmt: skip
_MASS_FIRST = re.compile(r"\^?\b(\d{1,3}m?)\^?\s*[-_]?\s*([A-Za-z]+)")
_MASS_LAST = re.compile(r"([A-Za-z]+)\s*[-_^]*\s*\[?\^?(\d{1,3}m?)\^?\b")
_FLUORINE_TRACERS = ("fluorodeoxyglucose", "fludeoxyglucose", "fdg")


def nuclide_from_code(code: str) -> str | None:
    """Return e.g. ``F-18`` for a code value of (0054,0300), None where it is not known."""
    return _CODES.get(code.strip().upper())


def nuclide_from_text(text: str) -> str | None:
    """Return e.g. ``F-18`` for names such as ``^18^Fluorine``, ``18F``, ``F-18``, ``Fluorine F^18^``; else None."""
    found = set()
    for pattern, mass_group, name_group in ((_MASS_FIRST, 1, 2), (_MASS_LAST, 2, 1)):
        for match in pattern.finditer(text):
            name = match.group(name_group)
            symbol = _ELEMENTS.get(name.lower(), name.capitalize())
            nuclide = f"{symbol}-{match.group(mass_group).lower()}"
            if nuclide in HALF_LIVES_S:
                found.add(nuclide)
    if not found and any(name in text.lower() for name in _FLUORINE_TRACERS):
        # FDG is made with F-18 wherever PET is done.
        return "F-18"
    return found.pop() if len(found) == 1 else None
