"""PCLT20K (lung cancer, 2D PET/CT slices as PNG) to an nnU-Net raw dataset: ``h2a_convert_pclt20k``.

Data: Mei et al. 2025 (CIPA, CVPR), 21,930 pairs of 605 patients. Channel 0 is CT, channel 1 PET, both 8-bit grey as
released (windowed by the authors, neither HU nor SUV), label 1 the tumour. The official lists train.txt and test.txt
decide what goes to imagesTr and imagesTs. ``--volumes`` stacks the slices of a patient for 3D networks.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_conversion.cases import Case, CaseWriter, Discovery, Recipe, Refusal
from dataset_conversion.command import build_parser, execute
from dataset_conversion.errors import ConversionError, UsageError
from dataset_conversion.files import list_files
from dataset_conversion.pclt20k_files import KINDS, Slice, find_slices, patient_of, read_lists, slice_number
from dataset_conversion.raw_dataset import DatasetSpec, clean_identifier

if TYPE_CHECKING:
    import numpy as np

SPEC = DatasetSpec(
    default_name="PCLT20K",
    channel_names=("CT", "PET"),
    modalities=("CT", "PET"),
    labels={"background": 0, "tumor": 1},
    description="PCLT20K, lung cancer PET/CT slices, 8-bit grey as released: CT, PET, tumour",
    reference="Mei et al. 2025, Cross-modal Interactive Perception Network with Mamba (CVPR)",
    licence="non-commercial, see the data set's agreement",
    file_ending=".png",
    reader="NaturalImage2DIO",
    fixed_scaling="rgb_to_0_1",
    listed=True,
    configuration="2d",
    trainer="nnUNetTrainerCIPA",
)
VOLUME_SPEC = replace(
    SPEC,
    default_name="PCLT20KVolumes",
    description="PCLT20K, lung cancer PET/CT slices stacked by patient, 8-bit grey as released: CT, PET, tumour",
    file_ending=".nii.gz",
    reader="SimpleITKIO",
    listed=False,
    configuration="3d_fullres",
)
LOOKS_FOR = "ID_CT.png, ID_PET.png and ID_mask.png of each slice, and train.txt and test.txt"
#: Foreground of a mask of 0 to 255, as in the authors' loader.
MASK_FROM = 128


def discover(source: Path, options: Mapping[str, Any], progress: Callable[[], None]) -> Discovery:
    """Find the slices below ``source`` and which list each is in."""
    faults: list[ConversionError] = []
    paths = list_files(source, progress, faults)
    slices = find_slices(paths)
    discovery = Discovery(spec=VOLUME_SPEC if options["volumes"] else SPEC)
    discovery.add_faults(faults)
    if not slices:
        return discovery
    lists = _lists(paths, slices, options, source, discovery)
    wanted = {name: found for name, found in slices.items() if name in lists}
    if len(wanted) < len(slices):
        unlisted = sorted(set(slices) - set(wanted))
        discovery.notes.append(f"{len(unlisted)} slices are in neither list and were left out (e.g. {unlisted[0]})")
    divided = {patient_of(name) for name, which in lists.items() if which == "test"}
    divided &= {patient_of(name) for name, which in lists.items() if which == "train"}
    if divided:
        discovery.notes.append(
            f"{len(divided)} patients are in both official lists (e.g. {min(divided)}): test results on them are not "
            "independent of training"
        )
    if options["volumes"]:
        _add_volumes(wanted, lists, divided, source, discovery)
    else:
        _add_slices(wanted, lists, source, discovery)
    return discovery


def _lists(
    paths: Sequence[str], slices: Mapping[str, Slice], options: Mapping[str, Any], source: Path, discovery: Discovery
) -> dict[str, str]:
    """Return slice -> ``train`` or ``test``; listed slices that are not there become refusals."""
    if options["lists"] == "ignore":
        return dict.fromkeys(slices, "train")
    lists = read_lists(paths)
    if lists is None:
        what = "has no train.txt and test.txt, the official lists"
        raise UsageError(what, "restore them, or --lists ignore to train on all", source)
    for name in sorted(set(lists) - set(slices)):
        what = f"is in {lists[name]}.txt and its files are not there"
        discovery.refusals.append(Refusal(clean_identifier(name), what, "restore its files"))
    return lists


def _missing(found: Slice) -> ConversionError | None:
    if found.fault is not None:
        return found.fault
    missing = [f"{found.name}_{kind}.png" for kind in KINDS if kind not in found.files]
    return ConversionError(f"lacks {' and '.join(missing)}", "restore the file") if missing else None


def _add_slices(slices: Mapping[str, Slice], lists: Mapping[str, str], source: Path, discovery: Discovery) -> None:
    for name, found in sorted(slices.items()):
        case_id, error = clean_identifier(name), _missing(found)
        if error is not None:
            discovery.refusals.append(Refusal(case_id, error.what, error.remedy, error.file or found.folder))
            continue
        payload = {"folder": os.path.relpath(found.folder, source), "slices": [found]}
        discovery.cases.append(Case(case_id, patient_of(name), tuple(sorted(found.files.values())), payload))
        if lists[name] == "test":
            discovery.test.add(case_id)


def _add_volumes(
    slices: Mapping[str, Slice], lists: Mapping[str, str], divided: set[str], source: Path, discovery: Discovery
) -> None:
    """One case per patient; of a patient in both lists the test slices only: the test set stays the official one."""
    stacks: dict[str, list[Slice]] = {}
    for name, found in slices.items():
        if patient_of(name) not in divided or lists[name] == "test":
            stacks.setdefault(patient_of(name), []).append(found)
    if divided:
        discovery.notes.append(f"volumes of these {len(divided)} patients hold their test slices only")
    for patient, members in sorted(stacks.items()):
        members.sort(key=lambda found: slice_number(found.name))
        case_id = clean_identifier(patient) or "patient"
        error = next((error for found in members if (error := _missing(found)) is not None), None) or _twice(members)
        if error is not None:
            discovery.refusals.append(Refusal(case_id, error.what, error.remedy, error.file or members[0].folder))
            continue
        files = tuple(sorted(path for found in members for path in found.files.values()))
        payload = {"folder": os.path.relpath(members[0].folder, source), "slices": members}
        discovery.cases.append(Case(case_id, patient, files, payload))
        if lists[members[0].name] == "test":
            discovery.test.add(case_id)


def _twice(slices: Sequence[Slice]) -> ConversionError | None:
    """Return the fault of two slices of one number, as ``0001_1`` and ``0001_01``."""
    for first, second in itertools.pairwise(slices):
        if slice_number(first.name)[0] == slice_number(second.name)[0]:
            what = f"has the number of {first.name}"
            return ConversionError(what, "remove one of the two", next(iter(second.files.values()), second.folder))
    return None


def describe(case: Case, options: Mapping[str, Any]) -> str:
    """Return one line on what would be converted; no pixels are read."""
    slices = case.payload["slices"]
    what = f"{len(slices)} slices, {slices[0].name} to {slices[-1].name}" if options["volumes"] else slices[0].name
    return f"{case.payload['folder']}: {what}; patient {case.patient}"


def convert(case: Case, options: Mapping[str, Any], writer: CaseWriter) -> dict[str, Any]:
    """Convert one slice, or one patient's slices into a volume; returns the record for the report."""
    return (_convert_volume if options["volumes"] else _convert_slice)(case, options, writer)


def _convert_slice(case: Case, options: Mapping[str, Any], writer: CaseWriter) -> dict[str, Any]:
    import numpy as np

    (found,) = case.payload["slices"]
    warnings: list[str] = []
    pictures = {kind: read_grey(found.files[kind]) for kind in KINDS}
    shape = _same_size(found, pictures)
    for channel, kind in enumerate(("CT", "PET")):
        values, plain = pictures[kind]
        if plain:
            writer.take(found.files[kind], channel)
        else:
            writer.grey_levels(channel, values)
            warnings.append(f"the {kind} is stored as colour with equal channels; written as grey")
    mask = _mask(pictures["mask"][0], found.files["mask"])
    writer.grey_levels(None, mask)
    return {
        "sources": {"folder": case.payload["folder"]},
        "geometry_before": {"size": [shape[1], shape[0]]},
        "geometry_after": {"size": [shape[1], shape[0]]},
        "tumour_voxels": int(np.count_nonzero(mask)),
        "warnings": warnings,
    }


def _convert_volume(case: Case, options: Mapping[str, Any], writer: CaseWriter) -> dict[str, Any]:
    import numpy as np
    import SimpleITK as sitk

    slices = case.payload["slices"]
    stacks: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    first: tuple[int, ...] = ()
    for found in slices:
        pictures = {kind: read_grey(found.files[kind]) for kind in KINDS}
        shape = _same_size(found, pictures)
        if first and shape != first:
            what = f"has {shape[1]} x {shape[0]} pixels, the patient's first slice {first[1]} x {first[0]}"
            raise ConversionError(what, "restore the file", found.files["CT"])
        first = shape
        for kind, (values, _) in pictures.items():
            stacks[kind].append(_mask(values, found.files[kind]) if kind == "mask" else values)
    numbers = [slice_number(found.name)[0] for found in slices]
    warnings = []
    gaps = [b - a for a, b in itertools.pairwise(numbers) if b - a != 1]
    if gaps:
        warnings.append(f"its slice numbers have {len(gaps)} gaps; what is there was stacked without them")
    for channel, kind in ((0, "CT"), (1, "PET"), (None, "mask")):
        image = sitk.GetImageFromArray(np.stack(stacks[kind]))
        image.SetSpacing(options["spacing"])
        if channel is None:
            writer.label(image)
        else:
            writer.image(channel, image)
    size = [first[1], first[0], len(slices)]
    return {
        "sources": {"folder": case.payload["folder"], "slices": [found.name for found in slices]},
        "geometry_before": {"size": [first[1], first[0]], "slices": len(slices)},
        "geometry_after": {"size": size, "spacing": list(options["spacing"])},
        "tumour_voxels": int(np.count_nonzero(np.stack(stacks["mask"]))),
        "warnings": warnings,
    }


def read_grey(path: str) -> tuple[np.ndarray, bool]:
    """Read an 8-bit picture.

    Args:
        path: PNG; grey, or colour (with or without opacity) whose three channels are equal.

    Returns:
        uint8 of shape (rows, columns), and True where the file itself is plain 8-bit grey.

    Raises:
        ConversionError: it cannot be read, or is real colour or of another depth.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
            mode, kind = picture.mode, picture.format
            if mode in ("1", "P", "LA"):
                # Palettes and black-and-white: what is shown, not what is stored.
                picture = picture.convert("RGB" if mode == "P" else "L")
            values = np.asarray(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConversionError(f"cannot be read as a picture ({error})", "restore the file", path) from error
    if values.dtype != np.uint8 or values.ndim not in (2, 3):
        raise ConversionError(f"is no 8-bit grey picture (mode {mode})", "8-bit grey is needed", path)
    if values.ndim == 3:
        channels = values[..., :3]
        if (channels != channels[..., :1]).any():
            raise ConversionError("is a colour picture", "grey is needed: equal red, green and blue", path)
        values = np.ascontiguousarray(channels[..., 0])
    return values, mode == "L" and kind == "PNG"


def _same_size(found: Slice, pictures: Mapping[str, tuple[np.ndarray, bool]]) -> tuple[int, int]:
    shapes = {kind: values.shape for kind, (values, _) in pictures.items()}
    for kind in ("PET", "mask"):
        if shapes[kind] != shapes["CT"]:
            sizes = " and ".join(f"{shape[1]} x {shape[0]}" for shape in (shapes[kind], shapes["CT"]))
            raise ConversionError(f"{kind} and CT differ in size: {sizes}", "restore the file", found.files[kind])
    return shapes["CT"]


def _mask(values: np.ndarray, path: str) -> np.ndarray:
    """Return 0 and 1; a mask is stored as 0 and 255 (edges may be in between), or as 0 and 1.

    Raises:
        ConversionError: it holds neither, as a label map of several classes does.
    """
    import numpy as np

    highest = int(values.max())
    if highest <= 1:
        return values
    if highest < MASK_FROM:
        remedy = "masks of 0 and 255, or of 0 and 1, are expected"
        raise ConversionError(f"its highest value is {highest}", remedy, path)
    return (values >= MASK_FROM).astype(np.uint8)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``h2a_convert_pclt20k`` and return its exit code."""
    parser = build_parser(
        "h2a_convert_pclt20k",
        "Convert PCLT20K (PNG slices with train.txt and test.txt) to $nnUNet_raw: 2D images as PNG, or volumes.",
        SPEC.default_name,
        None,
        ("patient", "622"),
    )
    parser.add_argument(
        "--volumes", action="store_true", help="stack the slices of each patient into a NIfTI volume for 3D networks"
    )
    parser.add_argument(
        "--spacing",
        nargs=3,
        type=float,
        metavar=("X", "Y", "Z"),
        help="voxel spacing of --volumes in mm; the PNG files do not have it (default: 1 1 1)",
    )
    parser.add_argument(
        "--lists",
        choices=("official", "ignore"),
        default="official",
        help="train.txt and test.txt decide (official), or all slices are for training (ignore) (default: official)",
    )
    arguments = parser.parse_args(argv)
    if arguments.spacing is not None and not arguments.volumes:
        parser.error("--spacing goes with --volumes")
    arguments.spacing = arguments.spacing or [1.0, 1.0, 1.0]
    if not all(0.01 <= value <= 100.0 for value in arguments.spacing):
        parser.error("--spacing: three numbers from 0.01 to 100 mm are needed")
    options = {name: getattr(arguments, name) for name in ("volumes", "spacing", "lists")}
    recipe = Recipe("h2a_convert_pclt20k", SPEC, options, discover, convert, describe, LOOKS_FOR, unit="slices")
    if arguments.volumes:
        recipe = replace(recipe, spec=VOLUME_SPEC, unit="patients")
    return execute(recipe, arguments)
