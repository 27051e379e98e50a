"""Maximum-intensity projections of PET with masks outlined."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

#: Grey scale of a PET projection: white is 0, black is this SUV and more.
SUV_WINDOW = 10.0

TRUTH_COLOUR, PREDICTION_COLOUR = "tab:green", "tab:red"


def write_mip_png(pet: Path, truth: Path, predictions: Mapping[str, Path], target: Path, title: str = "") -> None:
    """Draw the PET's frontal projection once per prediction, truth and prediction outlined.

    Seen from the front, head up, the patient's left on the right, with the voxels' true proportions.

    Args:
        pet: image in SUV.
        truth: label file on the same grid.
        predictions: label file of each model, by name; one panel each.
        target: PNG file to write.
        title: shown above the panels.
    """
    # The object interface of matplotlib: no pyplot, no display, no global state.
    from matplotlib.figure import Figure

    pet_image = _oriented(pet)
    width, height = (pet_image.GetSize()[i] * pet_image.GetSpacing()[i] for i in (0, 2))
    projection = _frontal_projection(pet_image)
    figure = Figure(figsize=(3.2 * max(1, len(predictions)), 3.2 * height / width + 0.7), layout="constrained")
    panels = figure.subplots(1, len(predictions), squeeze=False)[0]
    outline = _frontal_projection(_oriented(truth)) > 0
    for panel, (name, path) in zip(panels, predictions.items(), strict=True):
        panel.imshow(
            projection, cmap="gray_r", vmin=0, vmax=SUV_WINDOW, extent=(0, width, 0, height), interpolation="bilinear"
        )
        _outline(panel, outline, width, height, TRUTH_COLOUR)
        _outline(panel, _frontal_projection(_oriented(path)) > 0, width, height, PREDICTION_COLOUR)
        panel.set_title(name, fontsize=9)
        panel.set_axis_off()
    figure.suptitle(f"{title}\ngreen: truth, red: prediction", fontsize=8)
    figure.savefig(target, dpi=110, bbox_inches="tight", facecolor="white")


def _oriented(path: Path) -> sitk.Image:
    return sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")


def _frontal_projection(image: sitk.Image) -> np.ndarray:
    """Maximum along the sagittal ray, (z, x) with the head first."""
    return sitk.GetArrayFromImage(image).max(axis=1)[::-1]


def _outline(panel, mask: np.ndarray, width: float, height: float, colour: str) -> None:
    if mask.any():
        # Row 0 of the projection is the head, the panel's y axis points up.
        panel.contour(
            np.pad(mask[::-1], 1), [0.5], colors=[colour], linewidths=1.2,
            extent=_padded_extent(mask.shape, width, height),
        )  # fmt: skip


def _padded_extent(shape: tuple[int, ...], width: float, height: float) -> tuple[float, float, float, float]:
    """Extent of the sample points of a mask padded by one pixel: contour places values at pixel centres."""
    half_x, half_y = width / shape[1] / 2, height / shape[0] / 2
    return (-half_x, width + half_x, -half_y, height + half_y)
