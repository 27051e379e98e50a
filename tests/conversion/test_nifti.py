"""Volumes are read whole or refused, and written so that others read the same."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from dataset_conversion.errors import ConversionError
from dataset_conversion.nifti import read_image, write_image

OBLIQUE = (0.98, 0.0, -0.199, 0.0, 1.0, 0.0, 0.199, 0.0, 0.98)
KINDS = [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64]


def image(kind=np.float32, direction=(1.0, 0, 0, 0, 1, 0, 0, 0, 1)) -> sitk.Image:
    values = (np.random.default_rng(3).random((5, 6, 7)) * 100).astype(kind)
    result = sitk.GetImageFromArray(values)
    result.SetSpacing((2.0364201, 2.0364201, 3.0))
    result.SetOrigin((-407.3, 12.25, -1203.5))
    matrix = np.array(direction).reshape(3, 3)
    result.SetDirection(np.linalg.qr(matrix)[0].ravel().tolist() if abs(matrix[0, 0]) < 1 else matrix.ravel().tolist())
    return result


def assert_same(read: sitk.Image, expected: sitk.Image) -> None:
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read), sitk.GetArrayFromImage(expected))
    np.testing.assert_allclose(read.GetSpacing(), expected.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(read.GetOrigin(), expected.GetOrigin(), rtol=1e-6)
    np.testing.assert_allclose(read.GetDirection(), expected.GetDirection(), atol=1e-6)


@pytest.mark.parametrize("direction", [(1.0, 0, 0, 0, 1, 0, 0, 0, 1), (1.0, 0, 0, 0, -1, 0, 0, 0, 1), OBLIQUE])
@pytest.mark.parametrize("kind", KINDS)
def test_simpleitk_and_nibabel_read_what_was_written(tmp_path, kind, direction):
    path = str(tmp_path / "x.nii.gz")
    written = image(kind, direction)
    write_image(written, path)
    assert_same(sitk.ReadImage(path), written)
    assert sitk.ReadImage(path).GetPixelID() == written.GetPixelID()
    other = nibabel.load(path)
    np.testing.assert_array_equal(np.asanyarray(other.dataobj).T, sitk.GetArrayFromImage(written))
    voxel = written.TransformIndexToPhysicalPoint((6, 2, 4))
    np.testing.assert_allclose((other.affine @ (6, 2, 4, 1))[:3] * (-1, -1, 1), voxel, rtol=1e-5)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_simpleitk_wrote(tmp_path, kind, ending):
    path = str(tmp_path / f"x{ending}")
    sitk.WriteImage(image(kind), path, useCompression=ending == ".nii.gz")
    assert_same(read_image(path), image(kind))


def test_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_image(image(), str(tmp_path / f"{name}.nii.gz"))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("endianness", ["<", ">"])
def test_slope_and_intercept_apply(tmp_path, endianness):
    header = nibabel.Nifti1Header(endianness=endianness)
    stored = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    header.set_data_dtype(np.int16)
    content = nibabel.Nifti1Image(stored, np.diag([2.0, 2, 2, 1]), header)
    content.header.set_slope_inter(0.5, -10)
    nibabel.save(content, tmp_path / "x.nii.gz")
    read = sitk.GetArrayFromImage(read_image(str(tmp_path / "x.nii.gz")))
    np.testing.assert_allclose(read, sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "x.nii.gz"))))


def test_fourth_axis_of_one(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5, 1), np.float32), np.diag([2.0, 3, 4, 1])), tmp_path / "x.nii")
    read = read_image(str(tmp_path / "x.nii"))
    assert (read.GetSize(), read.GetSpacing()) == ((3, 4, 5), (2.0, 3.0, 4.0))


def _cut(content: bytes) -> bytes:
    return content[: len(content) - 40]


def _flipped_bit(content: bytes) -> bytes:
    place = len(content) - 200
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha"])
@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:300], _cut, lambda c: b"\0" * 400], ids=[
    "empty", "header cut", "end cut", "zeros"])  # fmt: skip
def test_damaged(tmp_path, damage, ending):
    path = tmp_path / f"x{ending}"
    sitk.WriteImage(image(), str(path), useCompression=ending == ".nii.gz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConversionError, match=r"is empty|cut off|cannot be read") as error:
        read_image(str(path))
    assert error.value.file == str(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_flipped_bit_in_compressed_file(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    sitk.WriteImage(image(), str(path), useCompression=True)
    assert_same(read_image(str(path)), image())
    path.write_bytes(_flipped_bit(path.read_bytes()))
    with pytest.raises(ConversionError, match=r"cut off or damaged|cannot be read"):
        read_image(str(path))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(tmp_path, bad):
    values = sitk.GetArrayFromImage(image())
    values[1, 2, 3] = values[2, 2, 2] = bad
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "x.nii.gz"))
    with pytest.raises(ConversionError, match=r"holds 2 voxels that are no numbers \(NaN or infinite\)"):
        read_image(str(tmp_path / "x.nii.gz"))


def test_opposite_infinities(tmp_path):
    values = sitk.GetArrayFromImage(image())
    values[0, 0, :2] = np.inf, -np.inf
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "x.nii"))
    with pytest.raises(ConversionError, match="holds 2 voxels"):
        read_image(str(tmp_path / "x.nii"))


def test_no_volume(tmp_path):
    sitk.WriteImage(sitk.Image(4, 5, sitk.sitkUInt8), str(tmp_path / "x.nii"))
    sitk.WriteImage(sitk.Image([4, 5, 6], sitk.sitkVectorFloat32, 3), str(tmp_path / "y.nii"))
    for name in ("x.nii", "y.nii"):
        with pytest.raises(ConversionError, match="is no volume"):
            read_image(str(tmp_path / name))


def test_missing_files(tmp_path):
    os.symlink(tmp_path / "nowhere", tmp_path / "link.nii.gz")
    for name, what in (("none.nii.gz", "is not there"), ("link.nii.gz", "is a link to a file that is not there")):
        with pytest.raises(ConversionError, match=what):
            read_image(str(tmp_path / name))


def test_wrong_direction(tmp_path):
    """Axes that are not perpendicular: ITK refuses them, and so do we, in one line."""
    affine = np.diag([2.0, 2, 2, 1])
    affine[0, 1] = 1.5
    content = nibabel.Nifti1Image(np.ones((3, 4, 5), np.float32), affine)
    content.set_qform(None, 0)
    content.set_sform(affine, 1)
    nibabel.save(content, tmp_path / "x.nii.gz")
    with pytest.raises(ConversionError, match="cannot be read as an image") as error:
        read_image(str(tmp_path / "x.nii.gz"))
    assert "\n" not in str(error.value)


def forms(path, sform=None, qform=None, size=(30, 40, 50), pixdim=True):
    """A file with two geometries, each with its code."""
    content = nibabel.Nifti1Image(np.ones(size, np.float32), None)
    content.set_sform(sform if sform is None else np.array(sform, float), 0 if sform is None else 1)
    content.set_qform(qform if qform is None else np.array(qform, float), 0 if qform is None else 1)
    if qform is None and pixdim:
        content.header["pixdim"][1:4] = np.linalg.norm(np.array(sform)[:3, :3], axis=0)
    nibabel.save(content, path)
    return str(path)


def test_a_sheared_sform_beside_a_qform(tmp_path):
    """Gantry tilt that ITK does not see, because it takes the qform, which cannot be sheared."""
    straight = np.diag([2.0, 2, 2, 1])
    tilted = straight.copy()
    tilted[1, 2] = 0.3
    with pytest.raises(ConversionError, match=r"sform is sheared \(gantry tilt\?\), by 14\.7 mm at a corner"):
        read_image(forms(tmp_path / "x.nii.gz", tilted, straight))
    rounding = straight.copy()
    rounding[1, 2] = 1e-4
    assert read_image(forms(tmp_path / "y.nii.gz", rounding, straight)).GetSize() == (30, 40, 50)


@pytest.mark.parametrize("change", ["moved", "mirrored", "another spacing"])
def test_forms_that_contradict(tmp_path, change):
    first, second = np.diag([2.0, 2, 2, 1]), np.diag([2.0, 2, 2, 1])
    if change == "moved":
        second[0, 3] = 20
    if change == "mirrored":
        second[0, 0], second[0, 3] = -2, 30
    if change == "another spacing":
        second[2, 2] = 3
    for number, (sform, qform) in enumerate([(first, second), (second, first)]):
        with pytest.raises(ConversionError, match="its sform, qform and pixdim do not agree: "):
            read_image(forms(tmp_path / f"{number}.nii.gz", sform, qform))
        assert read_image(forms(tmp_path / f"{number}s.nii.gz", sform)).GetSize() == (30, 40, 50)
        assert read_image(forms(tmp_path / f"{number}q.nii.gz", None, qform)).GetSize() == (30, 40, 50)


def test_an_sform_whose_spacing_is_not_pixdims(tmp_path):
    """ITK would take the voxels for cubes of 1 mm."""
    with pytest.raises(ConversionError, match=r"its sform, qform and pixdim do not agree: 49\.0 mm apart"):
        read_image(forms(tmp_path / "x.nii.gz", np.diag([2.0, 2, 2, 1]), pixdim=False))


def test_micrometres(tmp_path):
    content = nibabel.Nifti1Image(np.ones((3, 4, 5), np.float32), np.diag([2000.0, 2000, 3000, 1]))
    content.header.set_xyzt_units("micron")
    nibabel.save(content, tmp_path / "x.nii.gz")
    assert read_image(str(tmp_path / "x.nii.gz")).GetSpacing() == pytest.approx((2, 2, 3))


@pytest.mark.parametrize("spacing", [2000.0, 0.002])
def test_spacing_that_is_no_millimetres(tmp_path, spacing):
    path = forms(tmp_path / "x.nii.gz", np.diag([spacing, spacing, spacing, 1]))
    with pytest.raises(ConversionError, match=r"its spacing is .* mm; 0\.05 to 50\.0 mm is believed"):
        read_image(path)


@pytest.mark.parametrize("field", [80, 280, 268])
def test_geometry_that_is_no_numbers(tmp_path, field, capfd):
    """NaN in pixdim, srow_x or qoffset_x; nothing is printed by ITK."""
    path = tmp_path / "x.nii"
    forms(path, np.diag([2.0, 2, 2, 1]), np.diag([2.0, 2, 2, 1]))
    content = bytearray(path.read_bytes())
    content[field : field + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    with pytest.raises(ConversionError, match="geometry that is no numbers"):
        read_image(str(path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_header_that_claims_more_than_there_can_be(tmp_path, ending):
    """No array of that size is asked for."""
    path = tmp_path / "x.nii"
    forms(path, np.diag([2.0, 2, 2, 1]))
    content = bytearray(path.read_bytes())
    content[40:48] = np.array([3, 30000, 30000, 30000], np.int16).tobytes()
    target = tmp_path / f"y{ending}"
    target.write_bytes(gzip.compress(bytes(content)) if ending == ".nii.gz" else bytes(content))
    with pytest.raises(ConversionError, match=r"is cut off or damaged \(its header claims 108000000000352 bytes"):
        read_image(str(target))


def test_without_isal(tmp_path, monkeypatch):
    """Where ISA-L has no wheel, zlib does the same work: other bytes, the same volume."""
    import dataset_conversion.nifti as module
    from dataset_conversion import nifti_forms, nifti_stream

    for place in (module, nifti_stream, nifti_forms):
        monkeypatch.setattr(place, "gzip_module", lambda: gzip)
    path = str(tmp_path / "x.nii.gz")
    write_image(image(), path)
    assert_same(read_image(path), image())
    assert_same(sitk.ReadImage(path), image())


def test_a_full_disk_is_an_error(tmp_path):
    """/dev/full takes nothing: what SimpleITK's own writer leaves cut off in silence."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    os.symlink("/dev/full", tmp_path / "x.nii.gz")
    with pytest.raises(OSError, match="No space left"):
        write_image(image(), str(tmp_path / "x.nii.gz"))


@pytest.mark.parametrize("offset", [0, 348, 351])
def test_voxels_that_begin_in_the_header(tmp_path, offset):
    """Programs differ in where they then begin to read."""
    path = tmp_path / "x.nii"
    sitk.WriteImage(image(), str(path))
    content = bytearray(path.read_bytes())
    content[108:112] = np.float32(offset).tobytes()
    path.write_bytes(content)
    with pytest.raises(ConversionError, match="vox_offset is"):
        read_image(str(path))


def test_more_than_three_axes(tmp_path):
    from dataset_conversion.nifti import usual_orientation

    path, flat = str(tmp_path / "x.nii.gz"), str(tmp_path / "flat.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5, 2), np.float32), np.eye(4)), path)
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5, 1), np.float32), np.eye(4)), flat)
    assert read_image(flat).GetSize() == (3, 4, 5)
    assert usual_orientation([path, flat]) == "RAS"
    assert usual_orientation([path]) == "LPS", "what is no volume has no say"
    with pytest.raises(ConversionError, match="is no volume"):
        read_image(path)
