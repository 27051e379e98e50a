"""HECKTOR 2020 to 2026 to an nnU-Net raw dataset: ``h2a_convert_hecktor``.

Data: Andrearczyk et al. 2023, doi 10.1016/j.media.2023.102972 and the challenges' reports. Channel 0 is CT in HU,
channel 1 PET in SUVbw as released (never rescaled), labels GTVp 1 and GTVn 2 (2020 and 2021: GTVt 1). Labels are
placed by physical coordinates: 48 of the 524 training masks of 2022 have one slice or row more than their CT.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_conversion.autopet_release import AS_RELEASED
from dataset_conversion.cases import Case, CaseWriter, Discovery, Recipe, Refusal
from dataset_conversion.command import build_parser, execute
from dataset_conversion.errors import ConversionError, UsageError
from dataset_conversion.files import list_files
from dataset_conversion.hecktor_layouts import Found, find_layout, patient_key, read_boxes
from dataset_conversion.raw_dataset import DatasetSpec

if TYPE_CHECKING:
    from dataset_conversion.resampling import Grid
    from dataset_conversion.volume_file import VolumeFile

SPEC = DatasetSpec(
    default_name="HECKTOR",
    channel_names=("CT", "PET"),
    modalities=("CT", "PET"),
    labels={"background": 0, "GTVp": 1, "GTVn": 2},
    description="HECKTOR, head-and-neck FDG-PET/CT: CT in HU, PET in SUV, primary tumour and lymph nodes",
    reference="Andrearczyk et al. 2023, doi 10.1016/j.media.2023.102972",
    licence="see the challenge's end user agreement",
)
OLD_SPEC = replace(
    SPEC,
    labels={"background": 0, "GTVt": 1},
    description="HECKTOR 2020/21, head-and-neck FDG-PET/CT: CT in HU, PET in SUV, primary tumour",
)
CROPS = ("none", "overlap", "bbox", "head-neck")
LOOKS_FOR = "ID__CT, ID__PT and ID (2022 on) or ID_ct, ID_pt and ID_ct_gtvt (2020/21) as .nii.gz"
_SPOKEN = {"CT": "its CT", "PT": "its PET", "label": "its label"}


def discover(source: Path, options: Mapping[str, Any], progress: Callable[[], None]) -> Discovery:
    """Find the patients below ``source`` and, for ``--crop bbox``, their boxes."""
    from dataset_conversion.nifti import usual_orientation

    faults: list[ConversionError] = []
    paths = list_files(source, progress, faults)
    layout = find_layout(paths, source)
    discovery = Discovery(spec=OLD_SPEC if layout.old else SPEC)
    discovery.add_faults(faults)
    if not layout.patients:
        return discovery
    boxes = {}
    if options["crop"] == "bbox":
        boxes = read_boxes([options["bbox"]] if options["bbox"] else layout.tables)
        if not boxes:
            what = "--crop bbox: no CSV with PatientID, x1, x2, … z2 was found"
            raise UsageError(what, "name it: --bbox FILE", source)
    orientation = usual_orientation([found.files["CT"] for found in layout.patients if "CT" in found.files])
    for found in layout.patients:
        error = _fault(found, options, boxes)
        if error is not None:
            discovery.refusals.append(Refusal(found.case_id, error.what, error.remedy, error.file or found.folder))
            continue
        box = boxes.get(patient_key(found.patient))
        payload = {
            "patient": found.patient,
            "folder": os.path.relpath(found.folder, source),
            "files": found.files,
            "box": box,
            "orientation": orientation,
            "labels": dict(discovery.spec.labels),
        }
        discovery.cases.append(
            Case(
                found.case_id,
                found.patient,
                tuple(sorted(found.files.values())),
                payload,
                variant=f"{orientation} {box}",
                group=found.centre,
                labelled="label" in found.files,
            )
        )
        if found.is_test:
            discovery.test.add(found.case_id)
    return discovery


def _fault(found: Found, options: Mapping[str, Any], boxes: Mapping[str, Any]) -> ConversionError | None:
    needed = ("CT", "PT") if found.is_test else ("CT", "PT", "label")
    missing = [_SPOKEN[name] for name in needed if name not in found.files]
    if missing:
        return ConversionError(f"lacks {' and '.join(missing)}", "restore the file")
    box = boxes.get(patient_key(found.patient))
    if options["crop"] == "bbox" and box is None:
        return ConversionError("has no box in the CSV file", "add its row, or use another --crop")
    return box if isinstance(box, ConversionError) else found.fault


def describe(case: Case, options: Mapping[str, Any]) -> str:
    """Return one line on what would be converted; no pixels are read."""
    names = ", ".join(os.path.basename(path) for path in case.payload["files"].values())
    return f"{case.payload['folder']}: {names}; centre {case.group or 'not known'}"


def convert(case: Case, options: Mapping[str, Any], writer: CaseWriter) -> dict[str, Any]:
    """Convert one patient; returns the record for the report."""
    import numpy as np
    import SimpleITK as sitk

    from dataset_conversion import resampling
    from dataset_conversion.hecktor_checks import LabelCheck, Range, value_warnings
    from dataset_conversion.volume_file import VolumeFile

    files = case.payload["files"]
    # Geometry first; voxels pass by slice for slice, for a CT may be twenty times as large as what is wanted of it.
    volumes = {name: VolumeFile(path) for name, path in files.items()}
    ct, pet = volumes["CT"].grid, volumes["PT"].grid
    resampling.check_same_place(ct, pet, files["PT"])
    region, how = _reference(volumes, case.payload["box"], options)
    reference = resampling.oriented_grid(region, case.payload["orientation"])
    warnings = [how] if how else []
    if resampling.is_oblique(reference):
        warnings.append("the grid is oblique; nnU-Net ignores the direction, so it is kept as it is")
    covered = resampling.overlap(reference, pet)
    if covered < 0.99:
        warnings.append(f"the PET covers {covered:.1%} of the grid; SUV is 0 elsewhere")
    record: dict[str, Any] = {
        "sources": {
            "folder": case.payload["folder"],
            "centre": case.group,
            **{name: os.path.basename(path) for name, path in files.items()},
        },
        "suv": AS_RELEASED,
        "geometry_before": {name: resampling.grid_record(volume.grid) for name, volume in volumes.items()},
        "geometry_after": resampling.grid_record(reference),
        "resampled": {
            name: not resampling.same_lattice(region, volume.grid, resampling.SAME_GRID_VOXELS)
            for name, volume in volumes.items()
        },
    }
    ranges = {"CT": Range(), "PT": Range()}
    for channel, (name, seen) in enumerate(ranges.items()):
        fill = resampling.FILL_CT if name == "CT" else resampling.FILL_PET
        if volumes[name].fits(False) and resampling.same_grid(volumes[name].grid, reference):
            volumes[name].read_through(seen)
            writer.take(files[name], channel)
        else:
            writer.image(channel, volumes[name].read_onto(reference, fill, seen))
    warnings += value_warnings(ranges["CT"], ranges["PT"], case.patient, files["PT"])
    record["highest_suv"] = round(ranges["PT"].highest, 4)
    if "label" in volumes:
        label, labels = volumes["label"], case.payload["labels"]
        check = LabelCheck(label, labels, ct, pet, reference)
        if label.fits(True) and resampling.same_grid(label.grid, reference):
            label.read_through(check)
            warnings += check.warnings()
            writer.take(files["label"], None)
            counts = check.counts
        else:
            moved = label.read_onto(reference, 0.0, check, nearest=True, kind=sitk.sitkUInt8)
            warnings += check.warnings()
            writer.label(moved)
            values = sitk.GetArrayViewFromImage(moved)
            counts = {value: int(np.count_nonzero(values == value)) for value in labels.values()}
        voxel_ml = float(np.prod(reference.spacing)) / 1000.0
        named = {name: counts[value] for name, value in labels.items() if value}
        record["tumour_voxels"] = sum(named.values())
        record["tumour_ml"] = {name: round(count * voxel_ml, 3) for name, count in named.items()}
        warnings += [f"has no {name}" for name, count in named.items() if not count]
    return {**record, "warnings": warnings}


def _reference(
    volumes: Mapping[str, VolumeFile], box: Sequence[float] | None, options: Mapping[str, Any]
) -> tuple[Grid, str]:
    """Return the grid that is wanted, and in words how its region was found."""
    import numpy as np

    from dataset_conversion import regions

    ct, pet = volumes["CT"].grid, volumes["PT"].grid
    base = ct if options["grid"] == "ct" else pet
    crop, spacing, how = options["crop"], options["spacing"], ""
    if crop == "none" and spacing is None:
        return base, ""
    region = regions.extent(base)
    if crop != "none":
        region = regions.intersection(regions.extent(ct), regions.extent(pet))
    if crop == "bbox":
        region = regions.intersection(region, np.array(box).reshape(3, 2).T)
    if crop == "head-neck":
        smooth = volumes["PT"].read_onto(regions.working_grid(pet), 0.0)
        found, by = regions.head_and_neck(smooth)
        how = f"head and neck were found by {by}"
        region = regions.intersection(region, found)
    if (region[1] <= region[0]).any():
        raise ConversionError("the box it is to be cropped to lies outside CT or PET", "check the box and the geometry")
    if spacing is not None:
        return regions.grid_in(region, tuple(spacing)), how
    return regions.cropped(base, region), how


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``h2a_convert_hecktor`` and return its exit code."""
    parser = build_parser(
        "h2a_convert_hecktor",
        "Convert HECKTOR 2020/21, 2022, 2025 or 2026 (CT, PET in SUV and labels as NIfTI) to $nnUNet_raw.",
        SPEC.default_name,
        "ct",
        ("patient", "centre", "622"),
    )
    parser.add_argument(
        "--spacing",
        nargs=3,
        type=float,
        metavar=("X", "Y", "Z"),
        help="resample all to this spacing in mm instead of --grid's (linear, labels nearest)",
    )
    parser.add_argument(
        "--crop",
        choices=CROPS,
        default="none",
        help="none; overlap: to where both CT and PET are; bbox: to the boxes of 2020/21; head-neck: to 200 x 200 x "
        "310 mm from the brain downwards, found in the PET (default: none)",
    )
    parser.add_argument("--bbox", metavar="FILE", help="the CSV of boxes (default: those below SOURCE)")
    arguments = parser.parse_args(argv)
    if arguments.spacing is not None and not all(0.1 <= value <= 50.0 for value in arguments.spacing):
        parser.error("--spacing: three numbers from 0.1 to 50 mm are needed")
    if arguments.bbox and arguments.crop != "bbox":
        parser.error("--bbox goes with --crop bbox")
    options = {name: getattr(arguments, name) for name in ("grid", "spacing", "crop", "bbox")}
    recipe = Recipe("h2a_convert_hecktor", SPEC, options, discover, convert, describe, LOOKS_FOR)
    return execute(recipe, arguments)
