"""Projections with outlines: what is drawn, and where."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread

from nnunet_h2a.reporting.mip import write_mip_png


@pytest.fixture
def write(tmp_path):
    """Write an array (z, y, x) as an image with anisotropic voxels in a given orientation."""

    def _write(name, array, orientation="LPS"):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((4.0, 4.0, 8.0))
        path = tmp_path / f"{name}.nii.gz"
        sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(path))
        return path

    return _write


def box(z, x, shape=(20, 12, 16)):
    """A mask with a box of 4 voxels a side at (z, x)."""
    mask = np.zeros(shape, np.uint8)
    mask[z : z + 4, 4:8, x : x + 4] = 1
    return mask


def colours(path):
    """Where green and red lines are, each (row, column) as shares of the picture."""
    picture = imread(path)[..., :3]
    red = (picture[..., 0] - picture[..., 1]) > 0.35
    green = (picture[..., 1] - picture[..., 0]) > 0.25
    return [np.argwhere(mask) / picture.shape[:2] for mask in (green, red)]


def test_truth_is_green_and_prediction_red(write, tmp_path):
    pet = write("pet", np.random.default_rng(0).random((20, 12, 16)).astype(np.float32))
    truth, prediction, nothing = write("truth", box(14, 2)), write("model", box(3, 10)), write("none", box(3, 10) * 0)
    write_mip_png(pet, truth, {"model": prediction}, tmp_path / "both.png")
    green, red = colours(tmp_path / "both.png")
    # The truth is near the head (high z, so above) and on the patient's right (low x, so left).
    assert green[:, 0].mean() < red[:, 0].mean() - 0.2
    assert green[:, 1].mean() < red[:, 1].mean() - 0.2
    write_mip_png(pet, truth, {"model": nothing}, tmp_path / "none.png")
    green, red = colours(tmp_path / "none.png")
    assert len(green) > 50
    assert len(red) == 0


def test_orientation_of_the_files_does_not_matter(write, tmp_path):
    pet = np.random.default_rng(0).random((20, 12, 16)).astype(np.float32)
    for orientation in ("LPS", "LAS", "RAI"):
        files = [write(f"{n}_{orientation}", a, orientation) for n, a in (("pet", pet), ("truth", box(14, 2)))]
        write_mip_png(*files, {"model": files[1]}, tmp_path / f"{orientation}.png")
    first = imread(tmp_path / "LPS.png")
    for orientation in ("LAS", "RAI"):
        assert np.array_equal(imread(tmp_path / f"{orientation}.png"), first)


def test_one_panel_per_prediction(write, tmp_path):
    pet, truth = write("pet", np.ones((20, 12, 16), np.float32)), write("truth", box(14, 2))
    for count in (1, 3):
        write_mip_png(pet, truth, {str(i): truth for i in range(count)}, tmp_path / f"{count}.png")
    assert imread(tmp_path / "3.png").shape[1] > 2 * imread(tmp_path / "1.png").shape[1]
