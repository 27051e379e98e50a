"""The phantom: the layout of the autoPET release, and cases that need both modalities."""

from __future__ import annotations

import re

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_h2a.phantom import METADATA_CSV, make_case, write_autopet


def dice(truth, predicted):
    """Dice of two masks."""
    return 2 * (truth & predicted).sum() / (truth.sum() + predicted.sum())


@pytest.fixture(scope="module")
def cases():
    return [make_case(seed) for seed in range(12)]


def pooled(cases, channel, *regions):
    """Voxels of a channel in any of the regions, over all cases."""
    images = [sitk.GetArrayFromImage(getattr(case, channel)) for case in cases]
    return np.concatenate([image[case.regions[r]] for image, case in zip(images, cases, strict=True) for r in regions])


def separability(first, second):
    """Probability that a value of the first set exceeds one of the second (area under the ROC curve)."""
    order = np.argsort(np.concatenate([first, second]), kind="stable")
    ranks = np.empty(order.size)
    ranks[order] = np.arange(1, order.size + 1)
    return (ranks[: first.size].sum() - first.size * (first.size + 1) / 2) / (first.size * second.size)


def test_lesions_look_like_other_uptake_on_pet(cases):
    lesion, other = pooled(cases, "suv", "lesion"), pooled(cases, "suv", "physiological", "brown_fat")
    # Lesions are smaller, so blurring lowers them a little; that is all.
    assert 0.2 < separability(lesion, other) < 0.7
    assert separability(lesion, pooled(cases, "suv", "muscle", "liver", "benign")) > 0.95


def test_lesions_look_like_other_soft_tissue_on_ct(cases):
    lesion = pooled(cases, "ct_resampled", "lesion")
    assert 0.35 < separability(lesion, pooled(cases, "ct_resampled", "muscle", "liver", "benign")) < 0.65
    assert separability(lesion, pooled(cases, "ct_resampled", "physiological", "brown_fat")) > 0.9


def test_both_modalities_together_find_the_lesions_and_neither_does_alone(cases):
    """Best threshold rules: hot and dense finds lesions; hot alone, or dense alone, does not."""
    both, pet_only, ct_only = [], [], []
    for case in cases:
        truth = case.regions["lesion"]
        if not truth.any():
            continue
        suv, hu = sitk.GetArrayFromImage(case.suv), sitk.GetArrayFromImage(case.ct_resampled)
        thresholds = np.linspace(1, 8, 15)
        both.append(max(dice(truth, (suv > t) & (hu > 58) & (hu < 110)) for t in thresholds))
        pet_only.append(max(dice(truth, suv > t) for t in thresholds))
        ct_only.append(max(dice(truth, (hu > low) & (hu < 110)) for low in (50, 60, 70, 80)))
    assert np.mean(both) > 0.6
    assert np.mean(pet_only) < 0.4
    assert np.mean(ct_only) < 0.1


def test_the_seed_decides_everything():
    first, second, other = make_case(4), make_case(4), make_case(5)
    for name in ("ct", "ct_resampled", "suv", "label"):
        ours, again = (sitk.GetArrayFromImage(getattr(case, name)) for case in (first, second))
        assert np.array_equal(ours, again)
    assert not np.array_equal(sitk.GetArrayFromImage(first.suv), sitk.GetArrayFromImage(other.suv))


def test_some_cases_are_free_of_lesions_and_the_number_can_be_asked_for(cases):
    assert not all(case.regions["lesion"].any() for case in [*cases, *(make_case(s) for s in range(12, 24))])
    assert not make_case(1, lesions=0).regions["lesion"].any()
    assert make_case(1, lesions=2).regions["lesion"].any()


def test_layout_of_the_release(tmp_path):
    studies = write_autopet(tmp_path, patients=3, seed=2, second_study_every=3)
    assert len(studies) == 4
    assert len({study.parent for study in studies}) == 3
    for study in studies:
        assert re.fullmatch(r"PETCT_[0-9a-f]{10}", study.parent.name)
        assert re.fullmatch(r"\d\d-\d\d-\d{4}-NA-PET-CT Ganzkoerper  primaer mit KM-\d{5}", study.name)
        assert study.parent.parent.name == "FDG-PET-CT-Lesions"
        images = {name: sitk.ReadImage(str(study / f"{name}.nii.gz")) for name in ("CT", "CTres", "PET", "SUV", "SEG")}
        for name in ("CTres", "PET", "SEG"):
            for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
                assert getattr(images[name], geometry)() == getattr(images["SUV"], geometry)()
        assert images["CT"].GetSize() != images["SUV"].GetSize()
        assert sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(images["SUV"].GetDirection()) == "LAS"
        assert len(set(images["SUV"].GetSpacing())) > 1
        suv, activity = (sitk.GetArrayFromImage(images[name]) for name in ("SUV", "PET"))
        factor = activity[suv > 0.1] / suv[suv > 0.1]
        assert factor.min() > 1000
        assert np.ptp(factor) / factor.max() < 1e-5
    rows = (tmp_path / METADATA_CSV).read_text().splitlines()
    assert len(rows) == 1 + 3 * len(studies)
