"""The NIfTI release of autoPET I and II to an nnU-Net raw dataset: ``h2a_convert_autopet``.

A study is a folder with SUV.nii.gz, SEG.nii.gz and CTres.nii.gz (CT on the PET grid; else CT.nii.gz). Data: Gatidis et
al. 2022, doi 10.7937/gkr0-xv29. Channel 0 is CT in HU, channel 1 PET in SUV as released, label 1 the lesions. The
released SUV is computed from the acquisition time of one bed (dataset-dependent error up to 19 %); it is not changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_conversion.cases import Case, CaseWriter, Discovery, Recipe, Refusal
from dataset_conversion.command import build_parser, execute
from dataset_conversion.errors import ConversionError
from dataset_conversion.raw_dataset import DatasetSpec, clean_identifier

if TYPE_CHECKING:
    import SimpleITK as sitk

SPEC = DatasetSpec(
    default_name="AutoPET",
    channel_names=("CT", "PET"),
    modalities=("CT", "PET"),
    labels={"background": 0, "tumor": 1},
    description="autoPET I and II, whole-body FDG-PET/CT: CT in HU, PET in SUV, lesions",
    reference="Gatidis et al. 2022, doi 10.7937/gkr0-xv29",
    licence="see the release",
)
_PARTS = ("CT", "CTres", "SUV", "SEG")
_ENDINGS = (".nii.gz", ".nii")
_PATIENT = re.compile(r"^PETCT_([0-9a-zA-Z]+)$")
_STUDY = re.compile(r"^(?P<month>\d{2})-(?P<day>\d{2})-(?P<year>\d{4})(?P<middle>-.*)?$")
_NUMBER = re.compile(r"-(\d{5})$")
_PIXEL_TYPES_AS_THEY_ARE = ("32-bit float", "64-bit float", "16-bit signed integer", "32-bit signed integer")


def find_studies(source: Path, progress: Callable[[], None]) -> dict[str, dict[str, str]]:
    """Return study folder -> part (``CT``, ``CTres``, ``SUV``, ``SEG``) -> file, for folders that hold a SUV or SEG."""
    from dataset_conversion.dicom_series import iterate_files

    studies: dict[str, dict[str, str]] = {}
    for path in iterate_files(source) if source.is_dir() else ():
        progress()
        folder, name = os.path.split(path)
        for part in _PARTS:
            if name in tuple(part + ending for ending in _ENDINGS):
                studies.setdefault(folder, {}).setdefault(part, path)
    return {folder: parts for folder, parts in studies.items() if "SUV" in parts or "SEG" in parts}


def identify(folder: str) -> tuple[str, str, str]:
    """Return (patient, case identifier, number) of a study folder.

    ``PETCT_<hex>/<MM-DD-YYYY>-NA-<description>-<5 digits>`` gives ``PETCT_<hex>``, ``fdg_<hex>_<YYYYMMDD>`` and the
    digits. Folders of other names give the parent's name as patient and both names as identifier.
    """
    path = Path(folder).absolute()
    patient = next((parent.name for parent in (path, *path.parents) if _PATIENT.match(parent.name)), path.parent.name)
    match = _PATIENT.match(patient)
    short = match.group(1) if match else clean_identifier(patient)
    study = _STUDY.match(path.name)
    number = _NUMBER.search(path.name)
    digits = number.group(1) if number else ""
    if study is None:
        name = clean_identifier(path.name)
        return patient, clean_identifier(f"fdg_{short}" if path.name == patient else f"fdg_{short}_{name}"), digits
    return patient, f"fdg_{short}_{study['year']}{study['month']}{study['day']}", digits


LOOKS_FOR = "SUV.nii.gz, SEG.nii.gz and CTres.nii.gz (or CT.nii.gz) of each study"


def discover(source: Path, options: Mapping[str, Any], progress: Callable[[], None]) -> Discovery:
    """Find the studies below ``source``, name them, and settle on the orientation most of them have."""
    named: dict[str, list[tuple[str, str, str, dict[str, str]]]] = {}
    for folder, parts in sorted(find_studies(source, progress).items()):
        patient, identifier, number = identify(folder)
        named.setdefault(identifier, []).append((folder, patient, number, parts))
    discovery = Discovery()
    for identifier, studies in sorted(named.items()):
        for folder, patient, number, parts in studies:
            # Two studies of a patient on one day differ in the five digits at the end of the folder's name.
            case_id = f"{identifier}_{number}" if len(studies) > 1 and number else identifier
            needed = {"SUV", "SEG"} | ({"CT"} if options["grid"] == "ct" else set())
            missing = sorted(needed - set(parts))
            if not {"CT", "CTres"} & set(parts):
                missing.append("CTres")
            if missing:
                files = ", ".join(f"{name}.nii.gz" for name in missing)
                discovery.refusals.append(Refusal(case_id, f"lacks {files}", "restore it", folder))
                continue
            payload = {"folder": os.path.relpath(folder, source), "parts": parts}
            discovery.cases.append(Case(case_id, patient, tuple(sorted(parts.values())), payload))
    _settle_orientation(discovery)
    if options["drop_negatives"]:
        _drop_negatives(discovery, progress)
    return discovery


def _settle_orientation(discovery: Discovery) -> None:
    """Give every case the orientation most have: nnU-Net ignores directions, and fitting files are kept as they are."""
    import SimpleITK as sitk

    counts: dict[str, int] = {}
    for case in discovery.cases:
        reader = sitk.ImageFileReader()
        reader.SetFileName(case.payload["parts"]["SUV"])
        try:
            reader.ReadImageInformation()
        except RuntimeError:
            # Reported with its reason when the case is converted.
            continue
        code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(reader.GetDirection())
        counts[code] = counts.get(code, 0) + 1
    usual = max(sorted(counts), key=lambda code: counts[code]) if counts else "LPS"
    discovery.cases = [
        replace(case, payload={**case.payload, "orientation": usual}, variant=usual) for case in discovery.cases
    ]


def _drop_negatives(discovery: Discovery, progress: Callable[[], None]) -> None:
    """Leave out studies without a lesion voxel, by their label: the release's diagnosis column is not reliable."""
    import SimpleITK as sitk

    kept = []
    for case in discovery.cases:
        progress()
        try:
            label = _read(case.payload["parts"]["SEG"])
            positive = bool(sitk.GetArrayViewFromImage(label).any())
        except ConversionError:
            positive = True
        if positive:
            kept.append(case)
        else:
            discovery.passed_over[case.case_id] = "no lesion (--drop-negatives)"
    discovery.cases = kept


def _read(path: str) -> sitk.Image:
    import SimpleITK as sitk

    _check_complete(path)
    try:
        image = sitk.ReadImage(path)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConversionError(f"cannot be read as NIfTI ({reason})", "restore the file", path) from error
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[..., 0]
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ConversionError(f"is no volume: its size is {image.GetSize()}", "a 3-D image is needed", path)
    return image


def _check_complete(path: str) -> None:
    """Raise for a cut-off or damaged compressed file, which ITK reads without complaint, as zeros from the cut on."""
    import gzip
    import zlib

    if not path.endswith(".gz"):
        return
    try:
        with gzip.open(path, "rb") as stream:
            while stream.read(1 << 22):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConversionError(f"is damaged ({error})", "restore the file", path) from error


def describe(case: Case, options: Mapping[str, Any]) -> str:
    """Return one line on what would be converted; no pixels are read."""
    parts = case.payload["parts"]
    ct = "CT" if options["grid"] == "ct" or "CTres" not in parts else "CTres"
    return f"{case.payload['folder']}: {ct}, SUV, SEG; patient {case.patient}"


def convert(case: Case, options: Mapping[str, Any], writer: CaseWriter) -> dict[str, Any]:
    """Convert one study; files that already fit are copied, not written anew."""
    import numpy as np
    import SimpleITK as sitk

    from dataset_conversion import resampling

    parts, wanted = case.payload["parts"], case.payload["orientation"]
    warnings: list[str] = []
    ct_path = parts["CT"] if options["grid"] == "ct" or "CTres" not in parts else parts["CTres"]
    ct, pet, seg = _read(ct_path), _read(parts["SUV"]), _read(parts["SEG"])
    if "CTres" not in parts and options["grid"] == "pet":
        warnings.append("CTres is missing; CT was resampled to the PET grid")
    values = set(np.unique(sitk.GetArrayViewFromImage(seg)).tolist())
    if not values <= {0, 1}:
        if len(values) > 2 or 0 not in values:
            shown = ", ".join(f"{value:g}" for value in sorted(values)[:5])
            raise ConversionError(f"holds label values {shown}", "0 and 1 are expected", parts["SEG"])
        warnings.append(f"lesions have the value {max(values):g} in SEG; written as 1")
    reference = ct if options["grid"] == "ct" else pet
    before = {"CT": resampling.grid_record(ct), "PET": resampling.grid_record(pet), "SEG": resampling.grid_record(seg)}
    label = sitk.Cast(seg != 0, sitk.sitkUInt8)
    resampled = {}
    outputs: dict[str, tuple[sitk.Image, str, float, bool]] = {
        "CT": (ct, ct_path, resampling.FILL_CT, False),
        "PET": (pet, parts["SUV"], resampling.FILL_PET, False),
        "label": (label, parts["SEG"], 0.0, True),
    }
    final: dict[str, sitk.Image] = {}
    for channel, (name, (image, path, fill, nearest)) in enumerate(outputs.items()):
        number = None if name == "label" else channel
        fits = resampling.same_grid(image, reference) and resampling.orientation_code(image) == wanted
        fits = fits and path.endswith(".nii.gz") and _taken_as_is(seg if name == "label" else image, name, values)
        resampled[name] = not resampling.same_grid(image, reference)
        if fits:
            writer.copy(path, number)
            final[name] = image
            continue
        moving = image if nearest else sitk.Cast(image, sitk.sitkFloat32)
        moved = resampling.oriented(resampling.onto_grid(moving, reference, fill, nearest)[0], wanted)
        final[name] = moved
        if number is None:
            writer.label(moved)
        else:
            writer.image(number, moved)
    lesion = int(np.count_nonzero(sitk.GetArrayViewFromImage(final["label"])))
    lost = int(np.count_nonzero(sitk.GetArrayViewFromImage(label)))
    if lost and not lesion:
        raise ConversionError("its lesions lie outside the images", "check the file's geometry", parts["SEG"])
    for name, was_resampled in resampled.items():
        if was_resampled:
            warnings.append(f"{name} was resampled to the {options['grid'].upper()} grid")
    return {
        "sources": {"folder": case.payload["folder"], "CT": os.path.basename(ct_path)},
        "geometry_before": before,
        "geometry_after": resampling.grid_record(final["PET"]),
        "resampled": resampled,
        "tumour_voxels": lesion,
        "tumour_ml": round(lesion * float(np.prod(reference.GetSpacing())) / 1000.0, 3),
        "highest_suv": round(float(sitk.GetArrayViewFromImage(final["PET"]).max()), 4),
        "warnings": warnings,
    }


def _taken_as_is(image: sitk.Image, name: str, values: set[float]) -> bool:
    """True for pixel types and label values nnU-Net reads as they are."""
    kind = image.GetPixelIDTypeAsString()
    if name == "label":
        return values <= {0, 1} and "integer" in kind
    return kind in _PIXEL_TYPES_AS_THEY_ARE


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``h2a_convert_autopet`` and return its exit code."""
    parser = build_parser(
        "h2a_convert_autopet",
        "Convert the NIfTI release of autoPET I/II (CTres, SUV, SEG per study folder) to $nnUNet_raw.",
        SPEC.default_name,
        "pet",
    )
    parser.add_argument("--drop-negatives", action="store_true", help="leave out studies without a lesion")
    arguments = parser.parse_args(argv)
    options = {"grid": arguments.grid, "drop_negatives": arguments.drop_negatives}
    recipe = Recipe("h2a_convert_autopet", SPEC, options, discover, convert, describe, LOOKS_FOR, unit="studies")
    return execute(recipe, arguments)
