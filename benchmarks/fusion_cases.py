"""Phantom cases whose lesions neither PET nor CT alone tells apart.

Four kinds of blobs lie at random places in fat: hot and dense (lesions), hot and fatty, cold and dense, and (as CT has
textures and PET has background) pale variations of both. All kinds have one distribution of sizes, shapes and numbers,
one range of uptake if hot and one range of density if dense, so that a blob of one modality is a lesion once in
``1 + DECOYS`` times, whatever its looks. PET is blurred and noisy and is moved against CT by a few millimetres, as by
breathing, so that fusion is not a logical "and" of two masks.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter, shift

SHAPE, SPACING_MM = (36, 36, 36), 4.0
LESIONS = (2, 3)
#: Hot fatty and cold dense blobs for each lesion.
DECOYS = 2
RADIUS_MM = (9.0, 15.0)
HOT_SUV, BACKGROUND_SUV = (2.5, 7.0), 0.9
DENSE_HU, FAT_HU = (-10.0, 60.0), -95.0
PET_FWHM_MM, PET_NOISE, CT_NOISE_HU = 8.0, 0.45, 40.0
SHIFT_MM = 7.0
LABELS = {"background": 0, "lesion": 1}


def make_case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CT in HU, PET in SUV and the lesions of a case, (z, y, x)."""
    rng = np.random.default_rng([731, seed])
    lesions = int(rng.integers(LESIONS[0], LESIONS[1] + 1))
    kinds = ["lesion"] * lesions + ["hot", "dense"] * (DECOYS * lesions)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), -1) * SPACING_MM
    ct = FAT_HU + 15 * gaussian_filter(rng.normal(size=SHAPE), 2) / 0.05 * 0.5
    pet = BACKGROUND_SUV * np.exp(0.3 * gaussian_filter(rng.normal(size=SHAPE), 3) / 0.03 * 0.5)
    taken, label = np.zeros(SHAPE, bool), np.zeros(SHAPE, np.uint8)
    for kind in kinds:
        mask = _blob(rng, grid, taken)
        if mask is None:
            continue
        taken |= gaussian_filter(mask.astype(np.float32), 1.0) > 0.02
        if kind != "hot":
            ct[mask] = rng.uniform(*DENSE_HU)
        if kind != "dense":
            pet[mask] = rng.uniform(*HOT_SUV)
        if kind == "lesion":
            label[mask] = 1
    pet = gaussian_filter(pet, PET_FWHM_MM / 2.355 / SPACING_MM)
    pet = shift(pet, rng.uniform(-SHIFT_MM, SHIFT_MM, 3) / SPACING_MM, order=1, mode="nearest")
    pet = np.clip(pet + rng.normal(0, PET_NOISE, SHAPE) * np.sqrt(np.clip(pet, 0.05, None)), 0, None)
    ct = gaussian_filter(ct, 0.4) + rng.normal(0, CT_NOISE_HU, SHAPE)
    return ct.astype(np.float32), pet.astype(np.float32), label


def _blob(rng: np.random.Generator, grid: np.ndarray, taken: np.ndarray) -> np.ndarray | None:
    """A turned ellipsoid that touches no other; None where there is no room."""
    for _ in range(200):
        axes = rng.uniform(*RADIUS_MM, 3)
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        centre = rng.uniform(axes.max(), np.array(SHAPE) * SPACING_MM - axes.max())
        mask = (((grid - centre) @ turn / axes) ** 2).sum(-1) <= 1
        if not (mask & taken).any():
            return mask
    return None


#: What a network is given; the other channel is the same number everywhere.
INPUTS = ("both", "PET", "CT")


def write_dataset(folder: Path, training: int, validation: int, inputs: str) -> None:
    """An nnU-Net raw dataset with one fold.

    Args:
        folder: ``$nnUNet_raw/DatasetXXX_Name``.
        training: number of cases to train on.
        validation: number of cases to validate on.
        inputs: one of :data:`INPUTS`.
    """
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = [f"case_{number:03d}" for number in range(training + validation)]
    for number, name in enumerate(names):
        ct, pet, label = make_case(number)
        if inputs == "PET":
            ct = np.full_like(ct, FAT_HU)
        if inputs == "CT":
            pet = np.full_like(pet, BACKGROUND_SUV)
        for array, path in (
            (ct, f"imagesTr/{name}_0000.nii.gz"),
            (pet, f"imagesTr/{name}_0001.nii.gz"),
            (label, f"labelsTr/{name}.nii.gz"),
        ):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((SPACING_MM,) * 3)
            sitk.WriteImage(image, str(folder / path))
    (folder / "splits_final.json").write_text(json.dumps([{"train": names[:training], "val": names[training:]}]))
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "CT", "1": "PET"}, "labels": LABELS, "numTraining": len(names),
        "file_ending": ".nii.gz",
    }, indent=2))  # fmt: skip
