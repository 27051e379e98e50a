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
    import numpy as np
    import SimpleITK as sitk

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
#: The organisers computed SUV with an assumed weight of 75 kg (list_approx_weight.txt of voreille/hecktor).
APPROXIMATE_WEIGHT = tuple(f"{centre}{number:03d}" for centre in ("HMR", "CHMR") for number in (5, 16, 24, 29, 30, 34))
# A mask may end a voxel before or after its CT; its tumour may not lie outside.
_LOST_AT_MOST = 0.01
_HIGHEST_SUV = 3000.0
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
    from dataset_conversion.nifti import fits_as_it_is, read_image

    files, orientation = case.payload["files"], case.payload["orientation"]
    images = {name: read_image(path) for name, path in files.items()}
    warnings = _checked(case, images)
    reference, how = _reference(images["CT"], images["PT"], case.payload["box"], options)
    warnings += [how] if how else []
    if resampling.is_oblique(reference):
        warnings.append("the grid is oblique; nnU-Net ignores the direction, so it is kept as it is")
    covered = resampling.overlap(reference, images["PT"])
    if covered < 0.99:
        warnings.append(f"the PET covers {covered:.1%} of the grid; SUV is 0 elsewhere")
    record: dict[str, Any] = {
        "sources": {
            "folder": case.payload["folder"],
            "centre": case.group,
            **{name: os.path.basename(path) for name, path in files.items()},
        },
        "suv": AS_RELEASED,
        "geometry_before": {name: resampling.grid_record(image) for name, image in images.items()},
    }
    if "label" in images:
        warnings += _check_label(case, images["label"], images["CT"], reference)
    resampled = {}
    fills = {"CT": (0, resampling.FILL_CT), "PT": (1, resampling.FILL_PET), "label": (None, 0.0)}
    for name, image in images.items():
        channel, fill = fills[name]
        resampled[name] = not resampling.same_grid(image, reference)
        if not resampled[name] and fits_as_it_is(image, files[name], name == "label", orientation):
            writer.take(files[name], channel)
            continue
        nearest = name == "label"
        kind = sitk.sitkUInt8 if nearest else sitk.sitkFloat32
        moved = resampling.onto_grid(image, reference, fill, nearest, kind)[0]
        moved = resampling.oriented(moved, orientation)
        if nearest:
            writer.label(moved)
            images[name] = moved
        else:
            writer.image(channel, moved)
    if "label" in images:
        values = sitk.GetArrayViewFromImage(images["label"])
        counts = {
            name: int(np.count_nonzero(values == value)) for name, value in case.payload["labels"].items() if value
        }
        voxel_ml = float(np.prod(reference.GetSpacing())) / 1000.0
        record["tumour_voxels"] = sum(counts.values())
        record["tumour_ml"] = {name: round(count * voxel_ml, 3) for name, count in counts.items()}
        warnings += [f"has no {name}" for name, count in counts.items() if not count]
    return {
        **record,
        "geometry_after": resampling.grid_record(resampling.oriented(reference, orientation)),
        "resampled": resampled,
        "warnings": warnings,
    }


def _checked(case: Case, images: Mapping[str, sitk.Image]) -> list[str]:
    """Check values and places of a patient's images; returns warnings.

    Raises:
        ConversionError: CT and PET lie apart, or the label holds other values than its edition's.
    """
    import numpy as np
    import SimpleITK as sitk

    from dataset_conversion import resampling

    warnings = []
    files = case.payload["files"]
    resampling.check_same_place(images["CT"], images["PT"], files["PT"])
    ct, pet = (sitk.GetArrayViewFromImage(images[name]) for name in ("CT", "PT"))
    if ct.min() > -200:
        warnings.append(f"the lowest value of the CT is {ct.min():g}: not in HU?")
    if pet.max() > _HIGHEST_SUV or pet.max() < 0.5:
        warnings.append(f"the highest value of the PET is {pet.max():.4g}: not in SUV?")
    if patient_key(case.patient) in APPROXIMATE_WEIGHT:
        warnings.append("its SUV was computed by the organisers with an assumed weight of 75 kg")
    if "label" in images:
        values = set(np.unique(sitk.GetArrayViewFromImage(images["label"])).tolist())
        allowed = set(case.payload["labels"].values())
        if not values <= allowed:
            shown = ", ".join(f"{value:g}" for value in sorted(values - allowed)[:5])
            expected = ", ".join(str(value) for value in sorted(allowed))
            raise ConversionError(f"holds label values {shown}", f"{expected} are expected", files["label"])
    return warnings


def _reference(
    ct: sitk.Image, pet: sitk.Image, box: Sequence[float] | None, options: Mapping[str, Any]
) -> tuple[sitk.Image, str]:
    """Return the grid that is wanted, and in words how its region was found."""
    import numpy as np

    from dataset_conversion import regions

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
        found, by = regions.head_and_neck(pet)
        how = f"head and neck were found by {by}"
        region = regions.intersection(region, found)
    if (region[1] <= region[0]).any():
        raise ConversionError("the box it is to be cropped to lies outside CT or PET", "check the box and the geometry")
    if spacing is not None:
        return regions.grid_of(region, tuple(spacing)), how
    return regions.cropped(base, region), how


def _check_label(case: Case, label: sitk.Image, ct: sitk.Image, reference: sitk.Image) -> list[str]:
    """Return warnings on a label of another size than its CT, and on tumour outside the region.

    Raises:
        ConversionError: tumour lies outside the CT, or all of it outside the region.
    """
    import numpy as np
    import SimpleITK as sitk

    from dataset_conversion import resampling

    path, warnings = case.payload["files"]["label"], []
    if not resampling.same_grid(label, ct):
        difference = resampling.describe_difference(label, ct)
        warnings.append(f"label and CT differ ({difference}); the label was placed by physical coordinates")
    voxels: np.ndarray = np.argwhere(sitk.GetArrayViewFromImage(label))[:, ::-1]
    if not len(voxels):
        return [*warnings, "has no tumour"]
    outside = 1.0 - resampling.fraction_inside(voxels, label, ct)
    if outside > _LOST_AT_MOST:
        what = f"{outside:.1%} of its tumour lies outside the CT"
        raise ConversionError(what, "check the label's geometry", path)
    lost = 1.0 - resampling.fraction_inside(voxels, label, reference)
    if lost == 1.0:
        raise ConversionError("all of its tumour lies outside the region", "use another --crop", path)
    if lost:
        warnings.append(f"{lost:.2%} of the tumour lies outside the region and is cut off")
    return warnings


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
    options = {name: getattr(arguments, name) for name in ("grid", "spacing", "crop", "bbox")}
    recipe = Recipe("h2a_convert_hecktor", SPEC, options, discover, convert, describe, LOOKS_FOR)
    return execute(recipe, arguments)
