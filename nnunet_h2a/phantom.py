"""Synthetic PET/CT cases that look like small whole-body studies and need both modalities to be segmented.

Everything hot is alike on PET: lesions, brain, heart, kidneys, bladder and patches of brown fat draw their SUV from
one range. Everything of a lesion's density is alike on CT: lesions, muscle, liver and cold benign nodules share one
range of HU. Only what is hot *and* has the density of soft tissue is a lesion.

Cases are written as the NIfTI release of autoPET I/II lays them out, so that ``h2a_convert_autopet`` reads them as it
reads the real thing: CT on a grid of its own, CT resampled to PET, PET in Bq/ml, SUV and lesion mask. The bodies are
small (about 26 x 20 x 48 cm) to keep CPU runs short; positions, sizes, uptakes and noise are drawn from the seed.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

#: SUV range of lesions and of every physiological or benign uptake that must not be told apart by PET.
HOT_SUV = (4.0, 10.0)
#: HU range of lesions and of the soft tissue that must not be told apart by CT.
SOFT_TISSUE_HU = (72.0, 90.0)

PET_SIZE = (64, 48, 80)
PET_SPACING = (4.0728, 4.0728, 6.0)
CT_SIZE = (144, 108, 128)
CT_SPACING = (1.9531, 1.9531, 3.75)
PET_FWHM_MM = 7.0

FAT_HU, LUNG_HU, BONE_HU, AIR_HU = -100.0, -800.0, 350.0, -1000.0
LESION_RADIUS_MM = (13.0, 22.0)

STUDY_FOLDER = "{day:%m-%d-%Y}-NA-PET-CT Ganzkoerper  primaer mit KM-{number:05d}"
METADATA_CSV = "Clinical Metadata FDG PET_CT Lesions.csv"


@dataclass(frozen=True)
class Blob:
    """A union of ellipsoids with one density and one uptake.

    Centres and half axes are in mm, x to the left, y to the back, z to the head, the origin in the body's centre.
    """

    name: str
    centres: tuple[tuple[float, float, float], ...]
    half_axes: tuple[tuple[float, float, float], ...]
    hu: float
    suv: float

    def reach(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner of the bounding box, in mm."""
        centres, axes = np.array(self.centres), np.array(self.half_axes)
        return (centres - axes).min(0), (centres + axes).max(0)


@dataclass
class PhantomCase:
    """One study: what it is made of and its images. Arrays are (z, y, x)."""

    blobs: list[Blob]
    ct: sitk.Image
    ct_resampled: sitk.Image
    suv: sitk.Image
    label: sitk.Image
    regions: dict[str, np.ndarray] = field(repr=False)
    """Masks on the PET grid: ``lesion``, ``physiological``, ``brown_fat``, ``benign``, ``muscle``, ``liver``."""


def make_case(seed: int, lesions: int | None = None) -> PhantomCase:
    """Draw one study.

    Args:
        seed: decides everything.
        lesions: number of lesions, fewer where the body has no room; None draws 0 (one case in six) to 4.

    Returns:
        The study on its CT and PET grids, both in LAS orientation as the autoPET release has them.
    """
    rng = np.random.default_rng([20240, seed])
    if lesions is None:
        lesions = 0 if rng.random() < 1 / 6 else int(rng.integers(1, 5))
    blobs = _draw_body(rng, lesions)
    ct_grid, pet_grid = _grid(CT_SIZE, CT_SPACING), _grid(PET_SIZE, PET_SPACING)

    ct_array, _, _ = _rasterise(blobs, ct_grid)
    ct_array = gaussian_filter(ct_array, [0.6 / s for s in reversed(CT_SPACING)]) + rng.normal(0, 12, ct_array.shape)
    ct = _image(np.clip(ct_array, -1024, 3000).astype(np.float32), ct_grid)

    _, uptake, owner = _rasterise(blobs, pet_grid)
    uptake = gaussian_filter(uptake, [PET_FWHM_MM / 2.355 / s for s in reversed(PET_SPACING)])
    uptake = uptake + rng.normal(0, 1, uptake.shape) * 0.12 * np.sqrt(np.clip(uptake, 0.02, None))
    suv = _image(np.clip(uptake, 0, None).astype(np.float32), pet_grid)

    regions = {name: np.isin(owner, [i for i, b in enumerate(blobs) if b.name == name]) for name in _REGION_NAMES}
    label = _image(regions["lesion"].astype(np.uint8), pet_grid)
    ct_resampled = sitk.Resample(ct, suv, sitk.Transform(), sitk.sitkLinear, -1024.0, sitk.sitkFloat32)
    return PhantomCase(blobs, ct, ct_resampled, suv, label, regions)


def write_autopet(root: Path, patients: int, seed: int = 0, second_study_every: int = 5) -> list[Path]:
    """Write studies in the layout of the autoPET I/II NIfTI release below ``root``; existing files are replaced.

    ``root/FDG-PET-CT-Lesions/PETCT_<10 hex>/<MM-DD-YYYY>-NA-PET-CT Ganzkoerper  primaer mit KM-<5 digits>/`` holds
    CT, CTres, PET (Bq/ml), SUV and SEG; the release's metadata table lies beside it.

    Args:
        root: folder to write below.
        patients: number of patients.
        seed: decides all cases.
        second_study_every: every n-th patient gets a second study, half a year later.

    Returns:
        The study folders, patient by patient.
    """
    release = root / "FDG-PET-CT-Lesions"
    studies, rows = [], []
    for patient, day, number, case_seed in _schedule(patients, seed, second_study_every):
        case = make_case(case_seed)
        folder = release / patient / STUDY_FOLDER.format(day=day, number=number)
        folder.mkdir(parents=True, exist_ok=True)
        bq_per_ml_per_suv = 4000.0 + 50.0 * (case_seed % 40)
        images = {
            "CT": case.ct,
            "CTres": case.ct_resampled,
            "PET": case.suv * bq_per_ml_per_suv,
            "SUV": case.suv,
            "SEG": case.label,
        }
        for name, image in images.items():
            sitk.WriteImage(image, str(folder / f"{name}.nii.gz"), useCompression=True, compressionLevel=1)
        positive = bool(case.regions["lesion"].any())
        for modality in ("CT", "PT", "SEG"):
            rows.append([
                patient, f"{day.month}/{day.day}/{day.year}", modality,
                f"./FDG-PET-CT-Lesions/{patient}/{folder.name}/{modality}", "MELANOMA" if positive else "NEGATIVE",
                "F" if case_seed % 2 else "M", 40 + case_seed % 40,
            ])  # fmt: skip
        studies.append(folder)
    with (root / METADATA_CSV).open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["Subject ID", "Study Date", "Modality", "File Location", "diagnosis", "sex", "age"])
        writer.writerows(rows)
    return studies


def _schedule(patients: int, seed: int, second_study_every: int) -> Iterator[tuple[str, date, int, int]]:
    """Patient folder, study date, study number and case seed of every study."""
    for index in range(patients):
        rng = np.random.default_rng([7, seed, index])
        patient = "PETCT_" + "".join(f"{d:x}" for d in rng.integers(0, 16, 10))
        first = date(2003, 1, 1) + timedelta(days=int(rng.integers(0, 2000)))
        visits = 2 if second_study_every and index % second_study_every == second_study_every - 1 else 1
        for visit in range(visits):
            yield (
                patient, first + timedelta(days=182 * visit), int(rng.integers(0, 100000)),
                int(rng.integers(0, 2**31)),
            )  # fmt: skip


_REGION_NAMES = ("lesion", "physiological", "brown_fat", "benign", "muscle", "liver")


def _draw_body(rng: np.random.Generator, lesions: int) -> list[Blob]:
    """The parts of one body, later ones covering earlier ones."""
    scale = rng.uniform(0.92, 1.06)

    def near(x: float, y: float, z: float, jitter: float = 5.0) -> tuple[float, float, float]:
        return tuple(float(c * scale + d) for c, d in zip((x, y, z), rng.uniform(-jitter, jitter, 3), strict=True))

    def axes(x: float, y: float, z: float) -> tuple[float, float, float]:
        return tuple(float(a * scale * f) for a, f in zip((x, y, z), rng.uniform(0.92, 1.08, 3), strict=True))

    def hot() -> float:
        return float(rng.uniform(*HOT_SUV))

    def soft() -> float:
        return float(rng.uniform(*SOFT_TISSUE_HU))

    def part(name: str, centre: tuple, half: tuple, hu: float, suv: float) -> Blob:
        return Blob(name, (centre,), (half,), hu, suv)

    trunk, shift = axes(112, 82, 215), near(0, 0, -35, 3)
    head = near(0, -4, 180, 4)
    head_axes = axes(62, 70, 58)
    body = [
        part("fat", shift, trunk, FAT_HU, 0.35),
        part("muscle", shift, tuple(a - 16 for a in trunk), soft(), 0.8),
        part("muscle", head, head_axes, soft(), 0.8),
        part("bone", head, tuple(a - 6 for a in head_axes), 800.0, 0.6),
        part("physiological", head, tuple(a - 14 for a in head_axes), 30.0, hot()),
        part("lung", near(-45, 0, 60), axes(34, 46, 58), LUNG_HU, 0.4),
        part("lung", near(45, 0, 60), axes(34, 46, 58), LUNG_HU, 0.4),
        part("physiological", near(14, -14, 42), axes(26, 26, 28), 25.0, hot()),
        part("liver", near(-38, -8, -32), axes(42, 44, 30), soft(), 2.0),
        part("physiological", near(-46, 34, -88), axes(16, 15, 28), 20.0, hot()),
        part("physiological", near(46, 34, -82), axes(16, 15, 28), 20.0, hot()),
        part("physiological", near(0, -26, -186), axes(26, 22, 22), 5.0, hot()),
        part("bone", near(0, 52, -40, 2), axes(12, 12, 170), BONE_HU, 0.9),
    ]
    # Lesions keep out of the lungs as well: air at their border would widen nnU-Net's CT clipping window so far that
    # soft tissues would look alike in it.
    taken = [blob.reach() for blob in body if blob.name in ("physiological", "lung")]
    small = [("lesion", soft, hot)] * lesions
    small += [("brown_fat", lambda: FAT_HU + float(rng.uniform(-8, 8)), hot)] * int(rng.integers(1, 4))
    small += [("benign", soft, lambda: float(rng.uniform(0.5, 1.0)))] * int(rng.integers(1, 4))
    for name, hu, suv in small:
        blob = _place(rng, name, hu(), suv(), shift, trunk, taken)
        if blob is not None:
            taken.append(blob.reach())
            body.append(blob)
    return body


def _place(
    rng: np.random.Generator,
    name: str,
    hu: float,
    suv: float,
    trunk_centre: Sequence[float],
    trunk: Sequence[float],
    taken: list[tuple[np.ndarray, np.ndarray]],
) -> Blob | None:
    """A lumpy blob somewhere in the trunk that keeps 8 mm away from all ``taken`` boxes; None without room."""
    for _ in range(200):
        radius = rng.uniform(*LESION_RADIUS_MM)
        direction = rng.normal(size=3)
        direction *= rng.uniform(0.25, 1) ** (1 / 3) / np.linalg.norm(direction)
        centre = np.array(trunk_centre) + direction * (np.array(trunk) - radius - 4)
        offsets = [np.zeros(3)] + [rng.uniform(-0.6, 0.6, 3) * radius for _ in range(2)]
        blob = Blob(
            name,
            tuple(tuple(float(v) for v in centre + o) for o in offsets),
            tuple(tuple(float(v) for v in radius * f * rng.uniform(0.85, 1.1, 3)) for f in (1.0, 0.7, 0.6)),
            hu,
            suv,
        )
        low, high = blob.reach()
        if low[2] < -PET_SIZE[2] * PET_SPACING[2] / 2:
            continue
        if all(np.any(low - 8 > other_high) or np.any(high + 8 < other_low) for other_low, other_high in taken):
            return blob
    return None


def _grid(size: Sequence[int], spacing: Sequence[float]) -> sitk.Image:
    """An empty LAS image centred on the body: the y axis runs from back to front."""
    grid = sitk.Image([int(n) for n in size], sitk.sitkUInt8)
    grid.SetSpacing(spacing)
    direction = (1, 0, 0, 0, -1, 0, 0, 0, 1)
    grid.SetDirection(direction)
    half = [(n - 1) * s / 2 for n, s in zip(size, spacing, strict=True)]
    grid.SetOrigin([-half[0], half[1], -half[2]])
    return grid


def _image(array: np.ndarray, grid: sitk.Image) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(grid)
    return image


def _rasterise(blobs: list[Blob], grid: sitk.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU, SUV and the number of the topmost blob (-1 is air), each (z, y, x), at the grid's voxel centres."""
    size, spacing, origin = grid.GetSize(), grid.GetSpacing(), grid.GetOrigin()
    signs = [grid.GetDirection()[4 * i] for i in range(3)]
    axes = [origin[i] + signs[i] * spacing[i] * np.arange(size[i]) for i in range(3)]
    shape = size[::-1]
    hu, suv, owner = np.full(shape, AIR_HU), np.zeros(shape), np.full(shape, -1, dtype=np.int16)
    for number, blob in enumerate(blobs):
        low, high = blob.reach()
        picks = [np.flatnonzero((axes[i] >= low[i]) & (axes[i] <= high[i])) for i in range(3)]
        if any(p.size == 0 for p in picks):
            continue
        box = tuple(slice(p[0], p[-1] + 1) for p in reversed(picks))
        x, y, z = (axes[i][picks[i]] for i in range(3))
        inside = np.zeros((len(z), len(y), len(x)), dtype=bool)
        for (cx, cy, cz), (ax, ay, az) in zip(blob.centres, blob.half_axes, strict=True):
            distance = (
                ((z - cz) / az)[:, None, None] ** 2 + ((y - cy) / ay)[None, :, None] ** 2
                + ((x - cx) / ax)[None, None, :] ** 2
            )  # fmt: skip
            inside |= distance <= 1
        hu[box][inside], suv[box][inside], owner[box][inside] = blob.hu, blob.suv, number
    return hu, suv, owner
