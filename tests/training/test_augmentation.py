"""PET/CT transforms, and the mix-ins that put them among nnU-Net's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.channel_misalignment import ChannelMisalignmentTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_h2a.trainers import TRAINERS
from nnunet_h2a.trainers.composed import SUFFIXES
from nnunet_h2a.training.augmentation.mixins import KeepSUVMixin, MisalignmentMixin, ModalityDropoutMixin
from nnunet_h2a.training.augmentation.modality_dropout import ModalityDropoutTransform
from nnunet_h2a.training.augmentation.on_channels import OnChannelsTransform
from nnunet_h2a.training.augmentation.pipeline import RESCALING, is_a, with_spatial
from nnunet_h2a.training.augmentation.uptake_noise import UptakeNoiseTransform


def transforms_of(trainer, **changes):
    rotation, dummy, initial, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    made = trainer.get_training_transforms(
        trainer.configuration_manager.patch_size, rotation, trainer._get_deep_supervision_scales(), axes, dummy,
        foreground_labels=[1], **changes,
    )  # fmt: skip
    return made, initial


def kinds(transforms):
    return [type(getattr(t, "transform", t)).__name__ for t in transforms.transforms]


class StockMisalign(MisalignmentMixin, nnUNetTrainer):
    pass


def test_misalignment_moves_ct_alone_by_millimetres(make_trainer):
    trainer = make_trainer(StockMisalign, initialize=False)
    transforms, _ = transforms_of(trainer)
    place = [i for i, t in enumerate(transforms.transforms) if isinstance(t, ChannelMisalignmentTransform)]
    spatial = [i for i, t in enumerate(transforms.transforms) if isinstance(t, SpatialTransform)]
    assert place == [spatial[0] + 1]
    move = transforms.transforms[place[0]]
    spacing = trainer.configuration_manager.spacing
    assert move.shiftZYX == tuple(round(mm / s) for mm, s in zip((8, 4, 4), spacing, strict=True))
    assert move.im_channels_2_misalign == (0,)
    move.p_shift = move.p_rotation = 1.0
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.randn(2, 16, 16, 16)
    after = move(image=before.clone())["image"]
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])


def test_misalignment_finds_the_channel_by_name(make_trainer):
    swapped = {"channel_names": {"0": "PET", "1": "CT"}, "h2a_modalities": ["PET", "CT"]}
    transforms, _ = transforms_of(make_trainer(StockMisalign, initialize=False, **swapped))
    (move,) = [t for t in transforms.transforms if isinstance(t, ChannelMisalignmentTransform)]
    assert move.im_channels_2_misalign == (1,)


def test_modality_dropout():
    torch.manual_seed(0)
    transform = ModalityDropoutTransform((0, 1), 0.3, value=-2.0)
    missing = []
    for _ in range(3000):
        image = transform(image=torch.ones(3, 2, 2))["image"]
        gone = [c for c in range(3) if (image[c] == -2).all()]
        assert all((image[c] == 1).all() for c in range(3) if c not in gone)
        missing.append(tuple(gone))
    shares = {gone: missing.count(gone) / 3000 for gone in set(missing)}
    assert set(shares) == {(), (0,), (1,)}
    assert shares[(0,)] == pytest.approx(0.15, abs=0.02)
    assert shares[(1,)] == pytest.approx(0.15, abs=0.02)
    with pytest.raises(ValueError, match=r"probability is 1\.5"):
        ModalityDropoutTransform((0,), 1.5)


def test_uptake_noise_keeps_the_mean_and_grows_with_uptake():
    torch.manual_seed(0)
    image = torch.zeros(2, 3, 200, 200)
    image[1] = torch.tensor([0.0, 4.0, 16.0])[:, None, None] - 0.5
    noisy = UptakeNoiseTransform(1, (0.1, 0.1))(image=image.clone())["image"]
    assert torch.equal(noisy[0], image[0])
    added = noisy[1] - image[1]
    np.testing.assert_allclose(added.mean((1, 2)), 0, atol=0.01)
    np.testing.assert_allclose(added.std((1, 2)), [0, 0.2, 0.4], rtol=0.02)
    with pytest.raises(ValueError, match="strength is"):
        UptakeNoiseTransform(1, (0.2, 0.1))


class _AddOne(BasicTransform):
    def apply(self, data_dict, **params):
        data_dict["image"] = data_dict["image"] + 1
        return data_dict


def test_on_channels():
    sample = {"image": torch.zeros(3, 2, 2), "segmentation": torch.ones(1, 2, 2)}
    out = OnChannelsTransform(_AddOne(), [0, 2])(**sample)
    assert out["image"][:, 0, 0].tolist() == [1, 0, 1]
    assert torch.equal(out["segmentation"], sample["segmentation"])


@pytest.mark.parametrize("name", ["nnUNetTrainerH2ASegKeepSUV", "nnUNetTrainerH2ASegPETCT", "DA5"])
def test_nothing_changes_the_scale_of_suv(make_trainer, name):
    """nnU-Net's and DA5's brightness, contrast and gamma reach the CT only: the PET's values survive them."""

    class KeepSUVDA5(KeepSUVMixin, TRAINERS["nnUNetTrainerH2ASegDA5"]):
        pass

    trainer = make_trainer(KeepSUVDA5 if name == "DA5" else TRAINERS[name], plans="nnUNetH2ASegPlans", initialize=False)
    transforms, _ = transforms_of(trainer)
    rescaling = [t for t in transforms.transforms if isinstance(t, OnChannelsTransform)]
    assert len(rescaling) == {"DA5": 6}.get(name, 4)
    assert not [t for t in transforms.transforms if is_a(t, RESCALING)], "none is left outside the wrapper"
    torch.manual_seed(0)
    np.random.seed(0)
    image, changed = torch.rand(2, 16, 16, 16), 0
    for _ in range(40):
        sample = {"image": image.clone()}
        for transform in rescaling:
            sample = transform(**sample)
        assert torch.equal(sample["image"][1], image[1])
        changed += not torch.equal(sample["image"][0], image[0])
    assert changed > 10
    assert any(is_a(t, [UptakeNoiseTransform]) for t in transforms.transforms)


@pytest.mark.parametrize("network", ["H2ASeg", "ISANet", "CIPA"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_variant_makes_patches(make_trainer, network, suffix):
    """With every variant: what the network is given has its shape, and nnU-Net's order of transforms holds."""
    trainer = make_trainer(TRAINERS[f"nnUNetTrainer{network}{suffix}"], plans=f"nnUNet{network}Plans", initialize=False)
    plain = make_trainer(TRAINERS[f"nnUNetTrainer{network}"], plans=f"nnUNet{network}Plans", initialize=False)
    trainer.enable_deep_supervision = plain.enable_deep_supervision
    transforms, initial = transforms_of(trainer)
    torch.manual_seed(1)
    np.random.seed(1)
    for _ in range(3):
        out = transforms(
            image=torch.randn(2, *initial), segmentation=torch.randint(0, 2, (1, *initial)).to(torch.int16)
        )
        assert out["image"].shape[1:] == tuple(trainer.configuration_manager.patch_size)
        assert torch.isfinite(out["image"]).all()
    stock, ours = kinds(transforms_of(plain)[0]), kinds(transforms)
    if suffix == "NoMirroring":
        assert "MirrorTransform" in stock
        assert "MirrorTransform" not in ours
        assert trainer.inference_allowed_mirroring_axes is None
    elif suffix == "DA5":
        assert "OneOfTransform" in ours
    else:
        added = [k for k in ours if k not in stock]
        assert set(added) <= {
            "ChannelMisalignmentTransform", "ModalityDropoutTransform", "OnChannelsTransform", "UptakeNoiseTransform",
            "RandomTransform",
        }  # fmt: skip
        assert ours.index("RemoveLabelTransform") > max(ours.index(k) for k in added)
    assert type(trainer).recipe == type(plain).recipe


def test_the_cascade_is_left_alone(make_trainer):
    """The previous stage's one-hot channels come after what the mix-ins touch."""
    trainer = make_trainer(TRAINERS["nnUNetTrainerH2ASegPETCT"], initialize=False)
    ours = kinds(transforms_of(trainer, is_cascaded=True)[0])
    assert ours.index("MoveSegAsOneHotToDataTransform") > ours.index("ModalityDropoutTransform")


def test_dropout_in_front_of_any_trainer(make_trainer):
    class Mine(ModalityDropoutMixin, nnUNetTrainer):
        dropout_probability = 1.0

    transforms, initial = transforms_of(make_trainer(Mine, initialize=False))
    sample = {"image": torch.rand(2, *initial) + 1, "segmentation": torch.zeros(1, *initial, dtype=torch.int16)}
    out = transforms(**sample)["image"]
    assert sum(bool((out[c] == 0).all()) for c in range(2)) == 1


def test_a_pipeline_that_is_not_nnunets_is_an_error(make_trainer):
    transforms, _ = transforms_of(make_trainer(nnUNetTrainer, initialize=False))
    with pytest.raises(ValueError, match=r"do not know \['p_shear'\]"):
        with_spatial(transforms, p_shear=1.0)
    transforms.transforms = [t for t in transforms.transforms if not isinstance(t, SpatialTransform)]
    with pytest.raises(ValueError, match="has 0 SpatialTransforms"):
        with_spatial(transforms, p_rotation=1.0)
    assert isinstance(transforms.transforms[0], RandomTransform)
