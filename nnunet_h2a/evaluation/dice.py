"""Dice of predicted masks against truth, case by case."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk


def dice(truth: np.ndarray, predicted: np.ndarray) -> float | None:
    """Dice coefficient of two binary masks of one shape.

    Returns:
        2 |A and B| / (|A| + |B|); None where the truth is empty, as the autoPET challenges leave such cases out.

    Raises:
        ValueError: where the shapes differ.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"masks differ in shape: truth {truth.shape}, prediction {predicted.shape}")
    truth, predicted = truth.astype(bool), predicted.astype(bool)
    if not truth.any():
        return None
    return float(2 * np.count_nonzero(truth & predicted) / (np.count_nonzero(truth) + np.count_nonzero(predicted)))


def read_mask(path: Path) -> np.ndarray:
    """A label file as a boolean array (z, y, x): everything that is not background."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))) > 0


def score_folder(truth_folder: Path, predicted_folder: Path, file_ending: str = ".nii.gz") -> dict[str, float | None]:
    """Dice of every case in ``truth_folder``; None for cases without foreground.

    Raises:
        FileNotFoundError: where a prediction is missing.
        ValueError: where truth and prediction differ in shape.
    """
    scores = {}
    for truth in sorted(truth_folder.glob(f"*{file_ending}")):
        predicted = predicted_folder / truth.name
        if not predicted.exists():
            raise FileNotFoundError(f"{predicted} is missing: predict this case first")
        scores[truth.name.removesuffix(file_ending)] = dice(read_mask(truth), read_mask(predicted))
    return scores


def mean_dice(scores: dict[str, float | None]) -> float | None:
    """Mean over the cases that have a Dice; None where none has."""
    defined = [score for score in scores.values() if score is not None]
    return float(np.mean(defined)) if defined else None
