"""Volumes that are resampled while they are read: the same as resampling them whole, and no more memory than needed."""

from __future__ import annotations

import itertools
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from dataset_conversion import resampling, slabs
from dataset_conversion.errors import ConversionError
from dataset_conversion.volume_file import VolumeFile

TILTED = sitk.VersorTransform((0.3, -0.2, 0.5), 0.4).GetMatrix()
IDENTITY = (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)
SIDEWAYS = (0.0, 0, 1, 0, -1.0, 0, 1.0, 0, 0)
UPSIDE_DOWN = (-1.0, 0, 0, 0, 1.0, 0, 0, 0, -1.0)


def volume(kind=np.int16, size=(23, 19, 17)) -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(1).integers(0, 100, size[::-1]).astype(kind))
    image.SetSpacing((1.1, 1.3, 2.0))
    image.SetOrigin((-12.0, 7.0, -31.0))
    return image


def save(tmp_path, image: sitk.Image) -> VolumeFile:
    path = str(tmp_path / "x.nii.gz")
    sitk.WriteImage(image, path)
    return VolumeFile(path)


def around_centre(image: sitk.Image, size, spacing, direction) -> resampling.Grid:
    centre = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
    half = np.array(direction).reshape(3, 3) @ (np.array(spacing) * (np.array(size) - 1) / 2)
    return resampling.Grid(size, spacing, tuple((np.array(centre) - half).tolist()), tuple(direction))


@pytest.mark.parametrize(
    "direction", [IDENTITY, SIDEWAYS, UPSIDE_DOWN, TILTED], ids=["", "sideways", "upside", "tilted"]
)
@pytest.mark.parametrize("spacing", [(0.71, 0.93, 0.57), (3.07, 4.11, 9.23)], ids=["finer", "coarser"])
@pytest.mark.parametrize("nearest", [False, True])
def test_read_onto_is_resampling(tmp_path, monkeypatch, direction, spacing, nearest):
    image = volume()
    grid = around_centre(image, (29, 31, 37), spacing, direction)
    source = save(tmp_path, image)
    expected = sitk.GetArrayFromImage(resampling.resampled(image, grid, -7.0, nearest, sitk.sitkFloat32))
    assert (expected == -7).any()
    assert (expected != -7).any()
    for held in (1, 5, 100):
        monkeypatch.setattr(slabs, "_HELD", held)
        moved = source.read_onto(grid, -7.0, nearest=nearest)
        assert resampling.same_grid(moved, grid)
        different = np.abs(sitk.GetArrayFromImage(moved) - expected) > 1e-3
        # On a border or half-way between voxels, rounding decides.
        assert different.mean() < (1e-3 if direction is TILTED else 1e-9)


@pytest.mark.parametrize("code", ["LPS", "RAS", "SLP", "AIR"])
@pytest.mark.parametrize("kind", [np.int16, np.float32, np.float64])
def test_on_one_lattice_nothing_is_interpolated(tmp_path, code, kind):
    """A crop, with axes turned or not, holds the file's values to the last bit."""
    image = volume(kind)
    if kind != np.int16:
        image = image / np.pi
    part = image[3:17, 2:19, 4:11]
    moved = save(tmp_path, image).read_onto(resampling.oriented_grid(part, code), 0.0, kind=image.GetPixelID())
    turned = resampling.oriented(part, code)
    assert resampling.same_grid(moved, turned)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(moved), sitk.GetArrayFromImage(turned))


def test_beyond_every_slice(tmp_path):
    grid = resampling.Grid((4, 5, 6), (1.0, 1.0, 1.0), (0.0, 0.0, 500.0), IDENTITY)
    moved = save(tmp_path, volume()).read_onto(grid, -1024.0)
    assert set(sitk.GetArrayFromImage(moved).ravel()) == {-1024.0}
    assert moved.GetPixelID() == sitk.sitkFloat32


@pytest.mark.parametrize("turn", [IDENTITY, UPSIDE_DOWN])
def test_every_slice_is_seen_once_and_in_order(tmp_path, turn):
    image, seen = volume(), []
    grid = around_centre(image, (9, 9, 3), (1.0, 1.0, 1.0), turn)
    save(tmp_path, image).read_onto(grid, 0.0, lambda index, values: seen.append((index, values.copy())))
    assert [index for index, _ in seen] == list(range(17))
    np.testing.assert_array_equal(np.stack([values for _, values in seen]), sitk.GetArrayFromImage(image))


@pytest.mark.parametrize("scaled", [False, True])
def test_slope_and_intercept(tmp_path, scaled):
    stored = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)
    nifti = nibabel.Nifti1Image(stored, np.eye(4))
    if scaled:
        nifti.header.set_slope_inter(0.5, -3.0)
    nibabel.save(nifti, tmp_path / "x.nii")
    if scaled:
        # nibabel divides what it writes by the slope; the file is to hold these whole numbers.
        content = bytearray((tmp_path / "x.nii").read_bytes())
        content[352:] = stored.tobytes(order="F")
        (tmp_path / "x.nii").write_bytes(content)
    source = VolumeFile(str(tmp_path / "x.nii"))
    assert ("float" in source.pixel_type) == scaled
    moved = sitk.GetArrayFromImage(source.read_onto(source.grid, 0.0)).T
    np.testing.assert_array_equal(moved, stored * 0.5 - 3.0 if scaled else stored)


@pytest.mark.parametrize("where", [60, -1], ids=["in the voxels", "in the checksum"])
def test_a_file_cut_off_is_an_error_though_its_slices_are_not_needed(tmp_path, where):
    source = save(tmp_path, volume())
    path = tmp_path / "x.nii.gz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * where // 100] if where > 0 else content[:where])
    first = resampling.part_of(source.grid, np.zeros(3), np.array([4, 4, 1]))
    for read in (lambda: source.read_onto(first, 0.0), lambda: source.read_through(lambda index, values: None)):
        with pytest.raises(ConversionError, match=r"x\.nii\.gz: is cut off or damaged"):
            read()


def test_values_that_are_no_numbers_are_counted_over_all_slices(tmp_path):
    values = sitk.GetArrayFromImage(volume(np.float32))
    values[3, 2, 1], values[16, 0, 0] = np.nan, np.inf
    image = sitk.GetImageFromArray(values)
    with pytest.raises(ConversionError, match="holds 2 voxels that are no numbers"):
        save(tmp_path, image).read_onto(resampling.grid_of(image), 0.0)


MEASURE = """
import re, sys
from pathlib import Path
from dataset_conversion.resampling import Grid
from dataset_conversion.volume_file import VolumeFile
source = VolumeFile(sys.argv[1])
coarse = Grid((64, 64, 50), (8.0, 8.0, 8.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
source.read_onto(coarse, 0.0)
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_slices(tmp_path):
    peaks = []
    for slices in (40, 400):
        path = tmp_path / f"{slices}.nii.gz"
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((slices, 512, 512), np.int16)), str(path))
        command = [sys.executable, "-c", MEASURE, str(path)]
        measured = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(measured.stdout) / 1024)
    # Whole, the larger file takes 200 MB as int16 and 400 MB as float32.
    assert peaks[1] - peaks[0] < 20, peaks


def test_oriented_grid_is_the_grid_of_the_oriented_image():
    codes = ("LPS", "RAS", "ASL", "PIR", "SLA")
    for start, code in itertools.product(codes, codes):
        for tilt in (IDENTITY, TILTED):
            image = sitk.DICOMOrient(volume(), start)
            matrix = np.array(tilt).reshape(3, 3) @ np.array(image.GetDirection()).reshape(3, 3)
            image.SetDirection(matrix.ravel().tolist())
            grid, turned = resampling.oriented_grid(image, code), resampling.oriented(image, code)
            assert resampling.same_grid(grid, turned)
            assert resampling.same_lattice(grid, image)


@pytest.mark.parametrize("change", ["half a voxel", "half the spacing", "a little wider", "tilted"])
def test_another_lattice(change):
    image = volume()
    grid = resampling.grid_of(image)
    other = {
        "half a voxel": lambda: resampling.Grid(grid.size, grid.spacing, (-12.5, 7.0, -31.0), grid.direction),
        "half the spacing": lambda: resampling.Grid(grid.size, (0.55, 1.3, 2.0), grid.origin, grid.direction),
        "a little wider": lambda: resampling.Grid(grid.size, (1.11, 1.3, 2.0), grid.origin, grid.direction),
        "tilted": lambda: resampling.Grid(grid.size, grid.spacing, grid.origin, tuple(TILTED)),
    }[change]()
    assert resampling.same_lattice(grid, image)
    assert not resampling.same_lattice(other, image)
    assert not resampling.same_lattice(image, other)
