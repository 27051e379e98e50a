"""PET quantities by hand and by loops over voxels."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import ndimage

from nnunet_h2a.evaluation.lesions import find_lesions
from nnunet_h2a.evaluation.pet import PEAK_RADIUS, agreement, lesion_quantities, patient_quantities


def quantities(pet, mask, spacing, other=None):
    lesions = find_lesions(mask, np.flatnonzero(mask & (mask if other is None else other)), keep_labels=True)
    return lesion_quantities(pet, lesions, spacing)


def test_a_millilitre():
    assert 4 / 3 * np.pi * PEAK_RADIUS**3 == pytest.approx(1000)


@pytest.mark.parametrize("seed", range(5))
def test_against_loops(seed):
    rng = np.random.default_rng(seed)
    spacing = tuple(rng.uniform(1.5, 4, 3))
    pet = rng.gamma(2, 2, (9, 12, 10)).astype(np.float32)
    mask = np.zeros(pet.shape, bool)
    mask[0:3, 0:4, 0:2] = mask[5:9, 6:11, 4:9] = True
    other = np.zeros(pet.shape, bool)
    other[0, 0, 0] = True
    found = quantities(pet, mask, spacing, other)
    boxes = [np.s_[0:3, 0:4, 0:2], np.s_[5:9, 6:11, 4:9]]
    assert len(found) == 2

    def peak(centre):
        inside = [
            point for point in product(*map(range, pet.shape))
            if np.linalg.norm((np.array(point) - centre) * spacing) <= PEAK_RADIUS
        ]  # fmt: skip
        return np.mean([pet[point].astype(float) for point in inside])

    for lesion, box in zip(found, boxes, strict=True):
        inside = pet[box].astype(float)
        start = np.array([part.start for part in box])
        hottest = start + np.unravel_index(inside.argmax(), inside.shape)
        assert lesion["volume_ml"] == pytest.approx(inside.size * np.prod(spacing) / 1000)
        assert lesion["suv_max"] == inside.max()
        assert lesion["suv_mean"] == pytest.approx(inside.mean())
        assert lesion["tlg"] == pytest.approx(inside.sum() * np.prod(spacing) / 1000)
        assert lesion["suv_peak"] == pytest.approx(peak(hottest))
        assert lesion["suv_peak_global"] == pytest.approx(
            max(peak(start + offset) for offset in product(*map(range, inside.shape)))
        )
        assert [lesion[axis] for axis in "zyx"] == pytest.approx(start + (np.array(inside.shape) - 1) / 2)
    assert [lesion["found"] for lesion in found] == [True, False]
    patient = patient_quantities(found, spacing)
    assert patient["tmtv_ml"] == pytest.approx(mask.sum() * np.prod(spacing) / 1000)
    assert patient["suv_mean"] == pytest.approx(pet[mask].astype(float).mean())
    assert patient["tlg"] == pytest.approx(patient["tmtv_ml"] * patient["suv_mean"])
    assert patient["suv_max"] == pet[mask].max()
    assert patient["suv_peak"] == max(lesion["suv_peak"] for lesion in found)
    assert patient["lesions"] == 2
    assert patient["dmax_mm"] == pytest.approx(
        np.linalg.norm([(found[0][axis] - found[1][axis]) * s for axis, s in zip("zyx", spacing, strict=True)])
    )


def test_spheres_everywhere_against_a_convolution():
    """Lesions of one voxel all over the volume, its faces, edges and corners included."""
    rng = np.random.default_rng(0)
    spacing = (3.0, 2.0, 2.2)
    pet = rng.gamma(2, 2, (13, 19, 16)).astype(np.float32)
    mask = np.zeros(pet.shape, bool)
    mask[::3, ::3, ::3] = True
    reach = [int(PEAK_RADIUS / s) for s in spacing]
    axes = np.meshgrid(*(np.arange(-r, r + 1) * s for r, s in zip(reach, spacing, strict=True)), indexing="ij")
    sphere = (np.sqrt(sum(axis**2 for axis in axes)) <= PEAK_RADIUS).astype(float)
    sums, counts = (ndimage.convolve(v, sphere, mode="constant") for v in (pet.astype(float), np.ones(pet.shape)))
    found = quantities(pet, mask, spacing)
    assert len(found) == mask.sum() == 5 * 7 * 6
    for lesion in found:
        voxel = tuple(int(lesion[axis]) for axis in "zyx")
        assert lesion["suv_peak"] == pytest.approx(sums[voxel] / counts[voxel])


def test_of_equally_hot_voxels_the_one_in_warmer_surroundings_has_the_peak():
    pet = np.ones((1, 1, 40), np.float32)
    mask = np.ones(pet.shape, bool)
    pet[0, 0, 5] = pet[0, 0, 30] = 9
    pet[0, 0, 31] = 8
    (lesion,) = quantities(pet, mask, (3, 3, 3))
    # Two voxels of 3 mm on either side lie within 6.2 mm.
    assert lesion["suv_peak"] == pytest.approx((1 + 1 + 9 + 8 + 1) / 5)


def test_no_lesions_and_one():
    pet = np.ones((2, 2, 2), np.float32)
    nothing = patient_quantities(quantities(pet, np.zeros(pet.shape, bool), (1, 1, 1)), (1, 1, 1))
    assert nothing == {
        "tmtv_ml": 0, "tlg": 0, "lesions": 0, "suv_max": None, "suv_mean": None, "suv_peak": None,
        "suv_peak_global": None, "dmax_mm": None,
    }  # fmt: skip
    one = np.zeros(pet.shape, bool)
    one[0, 0, 0] = True
    assert patient_quantities(quantities(pet, one, (1, 1, 1)), (1, 1, 1))["dmax_mm"] == 0


def test_agreement():
    found = agreement([1, 2, 3, None, 5], [2, 2, 5, 4, None])
    differences = np.array([1, 0, 2])
    assert found["n"] == 3
    assert found["bias"] == pytest.approx(1)
    assert found["upper"] == pytest.approx(1 + 1.96 * differences.std(ddof=1))
    assert found["lower"] == pytest.approx(1 - 1.96 * differences.std(ddof=1))
    assert agreement([None], [1]) == {"n": 0, "bias": None, "lower": None, "upper": None}
    assert agreement([1], [3]) == {"n": 1, "bias": 2, "lower": None, "upper": None}
