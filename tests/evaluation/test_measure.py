"""Measures of one case against their definitions, an independent library, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from nnunet_h2a.evaluation import surfaces
from nnunet_h2a.evaluation.images import image_distances
from nnunet_h2a.evaluation.lesions import detection_f1, find_lesions, matches
from nnunet_h2a.evaluation.measure import (
    DUMMIES,
    ELEMENTS,
    IMAGES,
    LESIONS,
    SURFACES,
    SWAPPED,
    VOXELS,
    measure,
    measure_and_label,
)
from nnunet_h2a.evaluation.surfaces import distances_between, surface_points
from tests.evaluation.brute import border, directed, pairs_above, random_pair, untouched

EVERYTHING = (LESIONS, SURFACES, VOXELS, ELEMENTS, SWAPPED, IMAGES, DUMMIES)
SEEDS = range(60)


@pytest.mark.parametrize("seed", SEEDS)
def test_against_the_definitions(seed):
    truth, predicted, spacing = random_pair(np.random.default_rng(seed))
    m = measure(truth, predicted, spacing, EVERYTHING)
    both = ((truth, predicted), (~truth, predicted), (truth, ~predicted), (~truth, ~predicted))
    assert (m.tp, m.fp, m.fn, m.tn) == tuple(int((a & b).sum()) for a, b in both)
    assert m.voxel_ml == pytest.approx(math.prod(spacing) / 1000, rel=1e-12)
    assert (m.lesions, m.lesions - m.found_lesions, m.missed_voxels) == untouched(truth, predicted)
    assert (m.predicted_lesions, m.false_lesions, m.false_voxels) == untouched(predicted, truth)
    if not (truth.any() and predicted.any()):
        assert {m.hd, m.hd95, m.pooled_hd95, m.assd, m.element_hd95, m.pooled_hd95_voxels} == {None}
        return
    points = border(truth), border(predicted)
    there, back = directed(*points, spacing), directed(*points[::-1], spacing)
    assert m.hd == pytest.approx(max(there.max(), back.max()), rel=1e-12)
    assert m.hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-12)
    assert m.pooled_hd95 == pytest.approx(np.percentile([*there, *back], 95), rel=1e-12)
    assert m.assd == pytest.approx((there.mean() + back.mean()) / 2, rel=1e-12)
    voxels = [*directed(*points, (1, 1, 1)), *directed(*points[::-1], (1, 1, 1))]
    assert m.pooled_hd95_voxels == pytest.approx(np.percentile(voxels, 95), rel=1e-12)


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")
@pytest.mark.parametrize("seed", SEEDS)
def test_surface_elements_against_the_challenges_library(seed):
    library = pytest.importorskip("surface_distance", reason="surface-distance is not installed")
    truth, predicted, spacing = random_pair(np.random.default_rng(seed))
    if not (truth.any() and predicted.any()):
        return
    m = measure(truth, predicted, spacing, EVERYTHING)
    if truth.shape.count(1) == 1:
        # The library has a two-dimensional form of its own, for pictures.
        flat = truth.shape.index(1)
        truth, predicted = truth.squeeze(flat), predicted.squeeze(flat)
        spacing = tuple(s for axis, s in enumerate(spacing) if axis != flat)
    for ours, order in ((m.element_hd95, spacing), (m.swapped_element_hd95, spacing[::-1])):
        theirs = library.compute_robust_hausdorff(library.compute_surface_distances(truth, predicted, order), 95)
        assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_of_one_slice_is_a_picture(axis):
    """Discs in one slice, whose inside is no surface; a flat lesion in a volume of several slices is all surface."""
    library = pytest.importorskip("surface_distance", reason="surface-distance is not installed")
    rows, columns = np.mgrid[:90, :80]
    one, other = (np.hypot(rows - 45, columns - middle) < 30 for middle in (35, 45))
    truth, predicted = np.expand_dims(one, axis), np.expand_dims(other, axis)
    spacing = np.insert([2.0, 1.5], axis, 7.0)
    m = measure(truth, predicted, spacing, EVERYTHING)
    distances = library.compute_surface_distances(one, other, (2.0, 1.5))
    assert m.element_hd95 == pytest.approx(library.compute_robust_hausdorff(distances, 95), rel=1e-9)
    contours = [mask & ~ndimage.binary_erosion(mask) for mask in (one, other)]
    there, back = (
        ndimage.distance_transform_edt(~contours[1 - k], sampling=(2.0, 1.5))[contours[k]] for k in (0, 1)
    )  # fmt: skip
    assert m.assd == pytest.approx((there.mean() + back.mean()) / 2)
    assert m.hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert m.hd95 > 10
    room = np.insert([0, 0], axis, 3)
    thick = [np.pad(mask, [(n, n) for n in room]) for mask in (truth, predicted)]
    assert measure(*thick, spacing, EVERYTHING).assd < m.assd / 3


@pytest.mark.parametrize("seed", SEEDS)
def test_images(seed):
    truth, predicted, _ = random_pair(np.random.default_rng(seed))
    for image, found in enumerate(image_distances(truth, predicted)):
        one, other = (border(mask[image : image + 1], axes=(1, 2)) for mask in (truth, predicted))
        if len(one) and len(other):
            both = [*directed(one, other, (1, 1, 1)), *directed(other, one, (1, 1, 1))]
            assert found == pytest.approx(np.percentile(both, 95), rel=1e-12)
        else:
            assert found == (None if len(one) or len(other) else 0)


def test_images_as_published():
    truth, predicted = np.zeros((3, 300, 300), bool), np.zeros((3, 300, 300), bool)
    truth[0, 253, 260] = predicted[1, 5, 5] = True
    assert image_distances(truth, predicted) == [None, None, 0]
    # The pixel (256, 256) is 3 rows and 4 columns away.
    assert image_distances(truth, predicted, as_published=True) == [5, None, 0]
    assert image_distances(truth[:, :256], predicted[:, :256], as_published=True)[0] is None


def test_lesions_by_hand():
    truth, predicted = np.zeros((2, 3, 12), bool), np.zeros((2, 3, 12), bool)
    truth[0, 0, :2] = truth[0, 2, 4:9] = truth[1, 0, 11] = True
    # Joined over an edge, and so one component; one corner further it would be two.
    truth[1, 1, 9] = True
    predicted[0, 0, 1] = predicted[0, 2, 11] = predicted[0, 2, 5] = True
    common = np.flatnonzero(truth & predicted)
    lesions, others = find_lesions(truth, common, keep_labels=True), find_lesions(predicted, common)
    assert sorted(lesions.voxels) == [1, 1, 2, 5]
    assert sorted(lesions.voxels[lesions.touched]) == [2, 5]
    assert (len(lesions), lesions.missed_voxels, len(others), others.missed_voxels) == (4, 2, 3, 1)
    assert np.array_equal(np.bincount(lesions.labels), lesions.voxels)
    assert np.array_equal(lesions.positions, np.flatnonzero(truth))
    assert others.labels is None
    assert detection_f1(lesions, others) == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    nothing = find_lesions(truth & False, common[:0])
    assert detection_f1(nothing, nothing) is None
    assert detection_f1(find_lesions(truth, common[:0]), nothing) == 0


def test_lesions_that_belong_together():
    """The first true lesion is split and takes the larger part; the second shares a prediction with the third."""
    truth, predicted = np.zeros((1, 3, 30), bool), np.zeros((1, 3, 30), bool)
    truth[0, 0, 0:9] = truth[0, 0, 12:15] = truth[0, 0, 17:22] = truth[0, 2, 28] = True
    predicted[0, 0, 0:3] = predicted[0, 0, 4:9] = predicted[0, 0, 12:22] = predicted[0, 2, 0] = True
    masks, common = (truth, predicted), np.flatnonzero(truth & predicted)
    both = tuple(find_lesions(mask, common, keep_labels=True) for mask in masks)
    assert [len(lesions) for lesions in both] == [4, 4]
    assert matches(both) == [1, None, 2, None]
    assert matches(both[::-1]) == [None, 0, 2, None]


def test_lesions_that_overlap_enough():
    """Of HECKTOR 2025: a part of 5 of 14 voxels (0.36) is enough, one of 3 of 10 (0.3) is not."""
    truth, predicted = np.zeros((1, 5, 40), bool), np.zeros((1, 5, 40), bool)
    truth[0, 0, 0:14] = predicted[0, 0, 9:14] = True
    truth[0, 2, 0:10] = predicted[0, 2, 7:10] = True
    # Both halves of this one are more than enough, and it is one lesion.
    truth[0, 4, 0:10] = predicted[0, 4, 0:5] = predicted[0, 4, 6:10] = True
    assert measure(truth, predicted, (1, 1, 1), (LESIONS,)).overlapping_lesions == 2
    assert measure(predicted, truth, (1, 1, 1), (LESIONS,)).overlapping_lesions == 2


@pytest.mark.parametrize("seed", range(30))
def test_overlapping_lesions_against_every_way_to_pair_them(seed):
    rng = np.random.default_rng(seed)
    truth = rng.random((3, 6, 6)) < 0.12
    predicted = truth ^ (rng.random(truth.shape) < 0.08)
    found = measure(truth, predicted, (1, 1, 1), (LESIONS,)).overlapping_lesions
    assert found == pairs_above(truth, predicted, 0.3)


@pytest.mark.parametrize("length", [12, 200])
def test_lesions_are_handed_on_where_they_lie_in_the_volume(length):
    """In a large volume only the box of the masks is looked at; positions are those of the volume all the same."""
    truth, predicted = np.zeros((7, 9, length), bool), np.zeros((7, 9, length), bool)
    truth[2:4, 3:6, 5:8] = truth[5, 8, 1] = True
    predicted[3:6, 3:6, 6:9] = predicted[0, 2, 10] = True
    _, both = measure_and_label(truth, predicted, (1.0, 1.0, 1.0), (LESIONS,))
    for mask, lesions in zip((truth, predicted), both, strict=True):
        assert np.array_equal(lesions.positions, np.flatnonzero(mask))
        assert len(lesions) == 2
    assert matches(both) == [1, None]
    assert measure_and_label(truth, predicted, (1.0, 1.0, 1.0), (), keep_labels=False)[1] is None


def test_edges_and_corners_connect_as_in_the_challenge():
    mask = np.zeros((2, 2, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 0] = True
    assert len(find_lesions(mask, np.array([], int))) == 1
    mask[1, 1, 0], mask[1, 1, 1] = False, True
    assert len(find_lesions(mask, np.array([], int))) == 2


@pytest.mark.parametrize("seed", range(20))
def test_tree_and_transform_agree(seed, monkeypatch):
    truth, predicted, spacing = random_pair(np.random.default_rng(seed), largest=20)
    if not (truth.any() and predicted.any()):
        return
    points = surface_points(truth), surface_points(predicted)
    monkeypatch.setattr(surfaces, "_TRANSFORM_SECONDS", 0)
    transform = distances_between(*points, spacing)
    tree = distances_between(*points, spacing, room=0)
    np.testing.assert_allclose(tree.from_truth, transform.from_truth, rtol=1e-12)
    np.testing.assert_allclose(tree.from_predicted, transform.from_predicted, rtol=1e-12)


def test_ignored_voxels_are_no_background():
    truth = np.zeros((2, 2, 2), bool)
    assert measure(truth, truth, (1, 1, 1), (), ignored=3).tn == 5


def test_shapes_that_differ():
    with pytest.raises(ValueError, match=r"truth \(1, 2, 3\), prediction \(3, 2, 1\)"):
        measure(np.zeros((1, 2, 3), bool), np.zeros((3, 2, 1), bool), (1, 1, 1), ())
