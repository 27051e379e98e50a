"""The papers' recipes as trainers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from nnunet_h2a.trainers import (
    nnUNetTrainerCIPA,
    nnUNetTrainerCIPAPaper,
    nnUNetTrainerH2ASegPaper,
    nnUNetTrainerISANetPaper,
)
from nnunet_h2a.training.augmentation.crop_resize import CropResizeTransform
from nnunet_h2a.training.augmentation.pipeline import is_a
from nnunet_h2a.training.losses import DiceBCELoss, DiceFocalLoss
from nnunet_h2a.training.mixup import Mixup
from nnunet_h2a.training.schedules import Cosine, CosineRestarts, Exponential, ScheduledLR
from tests.training.losses import REGIONS, plain_loss
from tests.training.test_losses import upsampled

PAPERS = {nnUNetTrainerH2ASegPaper: "H2ASeg", nnUNetTrainerISANetPaper: "ISANet", nnUNetTrainerCIPAPaper: "CIPA"}
every_paper = pytest.mark.parametrize("trainer_class", PAPERS, ids=lambda t: t.__name__)


def make(make_trainer, trainer_class, **kwargs):
    return make_trainer(trainer_class, plans=f"nnUNet{PAPERS[trainer_class]}Plans", **kwargs)


def batch_of(trainer, batch, classes=2, seed=0, maps=0):
    """Images and targets at full resolution in the form the data loader gives them."""
    generator = torch.Generator().manual_seed(seed)
    patch = trainer.configuration_manager.patch_size
    target = torch.randint(0, classes, (batch, maps or 1, *patch), generator=generator)
    data = torch.randn(batch, 2, *patch, generator=generator)
    return {"data": data, "target": [target.float()] if trainer.enable_deep_supervision else target.float()}


@pytest.mark.parametrize(
    ("trainer_class", "optimizer", "rate", "decay", "epochs", "batch"),
    [
        (nnUNetTrainerH2ASegPaper, torch.optim.Adam, 1e-4, 1e-5, 200, 2),
        (nnUNetTrainerISANetPaper, torch.optim.Adam, 3e-4, 0.0, 300, 1),
        (nnUNetTrainerCIPAPaper, torch.optim.AdamW, 6e-5, 1e-2, 50, 16),
    ],
)
def test_recipe(make_trainer, trainer_class, optimizer, rate, decay, epochs, batch):
    trainer = make(make_trainer, trainer_class)
    assert type(trainer.optimizer) is optimizer
    assert trainer.optimizer.param_groups[0]["weight_decay"] == decay
    assert trainer.optimizer.defaults["betas"] == ((0.9, 0.99) if batch == 1 else (0.9, 0.999))
    assert trainer.num_epochs == epochs
    assert trainer.batch_size == batch
    trainer.lr_scheduler.step(0)
    assert trainer.optimizer.param_groups[0]["lr"] == rate


@every_paper
@pytest.mark.parametrize("labels", ["labels", "regions", "ignore"])
def test_steps_lower_the_loss_and_reach_every_trained_parameter(make_trainer, trainer_class, labels):
    torch.manual_seed(0)
    regions = {"labels": REGIONS} if labels == "regions" else {}
    ignore = {"labels": {"background": 0, "tumor": 1, "ignore": 2}} if labels == "ignore" else {}
    trainer = make(make_trainer, trainer_class, **regions, **ignore)
    batch = batch_of(trainer, 2, 3 if ignore else 2, maps=2 if regions else 0)
    trainer.lr_scheduler.step(0)
    losses = []
    for _ in range(6):
        losses.append(float(trainer.train_step(batch)["loss"]))
        if trainer_class is nnUNetTrainerCIPAPaper:
            assert trainer.optimizer.param_groups[0]["lr"] <= 6e-5
    assert losses[-1] < losses[0]
    trained = [(n, p) for n, p in trainer.network.named_parameters() if p.requires_grad]
    assert [n for n, p in trained if p.grad is None] == []
    frozen = [n for n, p in trainer.network.named_parameters() if not p.requires_grad]
    assert all(n.startswith("decoder.seg_layers.") for n in frozen)
    assert bool(frozen) == (trainer_class is nnUNetTrainerISANetPaper)


def test_h2aseg_loss(make_trainer):
    """Eq. 5: weights n, n - 1, ... 1 of cross-entropy + Dice, every level up-sampled to full resolution."""
    trainer = make(make_trainer, nnUNetTrainerH2ASegPaper)
    batch = batch_of(trainer, 2)
    outputs, target = trainer.network(batch["data"]), batch["target"][0]
    assert len(outputs) == 3
    expected = sum(
        (3 - k) * plain_loss(upsampled(o.detach(), target.shape[2:]), target.long()).item()
        for k, o in enumerate(outputs)
    )
    # nnU-Net's Dice is one minus ours: a constant per level.
    found = trainer.loss(outputs, batch["target"]).item()
    assert found == pytest.approx(expected, rel=1e-4)
    assert trainer._get_deep_supervision_scales() == [[1.0, 1.0, 1.0]]
    assert trainer.enable_deep_supervision


def test_isanet_and_cipa_losses(make_trainer):
    for trainer_class, kind in ((nnUNetTrainerISANetPaper, DiceFocalLoss), (nnUNetTrainerCIPAPaper, DiceBCELoss)):
        trainer = make(make_trainer, trainer_class, labels=REGIONS)
        assert type(trainer.loss) is kind
        assert trainer.loss.regions
        assert not trainer.enable_deep_supervision


def test_cipa_decays_matrices_only(make_trainer):
    trainer = make(make_trainer, nnUNetTrainerCIPAPaper)
    decayed, free = trainer.optimizer.param_groups
    names = {id(p): n for n, p in trainer.network.named_parameters()}
    assert all(p.ndim > 1 for p in decayed["params"])
    left = {names[id(p)].rpartition(".")[2] for p in free["params"] if p.ndim > 1}
    assert left <= {"A_logs", "Ds", "dt_projs_bias"}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    plain = make_trainer(nnUNetTrainerCIPA, plans="nnUNetCIPAPlans").optimizer.param_groups[0]["params"]
    assert any(p.ndim == 1 for p in plain), "the plain trainer is as it was"


@pytest.mark.parametrize("resume", [0, 7])
def test_schedules_are_pytorchs(resume):
    """Against PyTorch's own schedulers, also when a training is resumed in between."""

    def curve(make_scheduler, optimizer, steps):
        rates = []
        scheduler = make_scheduler(optimizer)
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    def sgd():
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 3e-4)

    pairs = [
        (Exponential(0.99), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.99)),
        (
            CosineRestarts(25, 1e-6 / 3e-4),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 25, 1, 1e-6),
        ),
        (Cosine(1e-6), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 60, 3e-10)),
    ]
    for schedule, torchs in pairs:
        expected = curve(torchs, sgd(), 60)
        optimizer = sgd()
        scheduler = ScheduledLR(optimizer, 3e-4, 60, schedule)
        found = []
        for epoch in range(resume, 60):
            scheduler.step(epoch)
            found.append(optimizer.param_groups[0]["lr"])
        np.testing.assert_allclose(found, expected[resume:], rtol=1e-6)


def test_cipas_rate_falls_from_step_to_step(make_trainer):
    trainer = make(make_trainer, nnUNetTrainerCIPAPaper)
    trainer.num_iterations_per_epoch, trainer.current_epoch = 4, 10
    trainer.on_train_epoch_start()
    batch, rates = batch_of(trainer, 2), []
    for _ in range(4):
        trainer.train_step(batch)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    share = [(1 + math.cos(math.pi * (40 + step) / 200)) / 2 for step in range(4)]
    np.testing.assert_allclose(rates, [6e-5 * (1e-6 + (1 - 1e-6) * s) for s in share], rtol=1e-9)


@every_paper
def test_an_epoch_has_as_many_patches_as_there_are_training_cases(make_trainer, trainer_class, workspace):
    trainer = make(make_trainer, trainer_class)
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    trainer.preprocessed_dataset_folder_base = str(workspace.preprocessed)
    trainer.preprocessed_dataset_folder = str(workspace.preprocessed / trainer.configuration_manager.data_identifier)
    trainer.dataset_class = infer_dataset_class(trainer.preprocessed_dataset_folder)
    training, _ = trainer.get_tr_and_val_datasets()
    assert len(training.identifiers) == 4
    assert trainer.num_iterations_per_epoch == {1: 4, 2: 2, 16: 1}[trainer.paper_batch_size]


@every_paper
def test_augmentation(make_trainer, trainer_class):
    trainer = make(make_trainer, trainer_class)
    rotation, dummy, initial, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    transforms = trainer.get_training_transforms(
        trainer.configuration_manager.patch_size, rotation, trainer._get_deep_supervision_scales(), axes, dummy
    ).transforms
    kinds = [type(getattr(t, "transform", t)).__name__ for t in transforms]
    mirrors = any(isinstance(t, MirrorTransform) for t in transforms)
    (spatial,) = [t for t in transforms if isinstance(t, SpatialTransform)]
    assert spatial.p_scaling == 0
    assert not [k for k in kinds if "Noise" in k or "Blur" in k or "Contrast" in k or "Gamma" in k or "Bright" in k]
    assert kinds[-1] == ("DownsampleSegForDSTransform" if trainer.enable_deep_supervision else "RemoveLabelTransform")
    if trainer_class is nnUNetTrainerH2ASegPaper:
        assert spatial.p_rotation == 0.8
        assert not mirrors
        assert trainer.inference_allowed_mirroring_axes is None
    if trainer_class is nnUNetTrainerISANetPaper:
        assert spatial.p_rotation == 0.5
        assert spatial.rotation == pytest.approx((-math.pi / 4, math.pi / 4))
        assert min(initial) > max(trainer.configuration_manager.patch_size)
        assert mirrors
        np.random.seed(0)
        torch.manual_seed(0)
        image = torch.zeros(2, *initial)
        drawn = [spatial.get_parameters(image=image)["affine"] for _ in range(400)]
        assert 0.42 < np.mean([affine is not None for affine in drawn]) < 0.58
    if trainer_class is nnUNetTrainerCIPAPaper:
        assert spatial.p_rotation == 0
        (crop,) = [t for t in transforms if is_a(t, [CropResizeTransform])]
        assert isinstance(crop, RandomTransform)
        assert crop.apply_probability == 0.5
        assert mirrors
    sample = {"image": torch.randn(2, *initial), "segmentation": torch.randint(0, 2, (1, *initial)).to(torch.int16)}
    out = trainer.get_training_transforms(
        trainer.configuration_manager.patch_size, rotation, trainer._get_deep_supervision_scales(), axes, dummy
    )(**sample)
    assert out["image"].shape[1:] == tuple(trainer.configuration_manager.patch_size)


def test_mixup():
    torch.manual_seed(0)
    images = [torch.randn(2, 2, 4, 4, 4) for _ in range(3)]
    labels = [torch.randint(0, 2, (2, 1, 4, 4, 4)) for _ in range(3)]
    always = Mixup(1.0, 0.25, 2, False, None)
    data, target = always(images[0], labels[0])
    assert data is images[0], "the first step has no step before"
    assert target is labels[0]
    data, target = always(images[1], labels[1])
    torch.testing.assert_close(data, 0.25 * images[1] + 0.75 * images[0])
    foreground = 0.25 * (labels[1] == 1) + 0.75 * (labels[0] == 1)
    torch.testing.assert_close(target[:, 1:], foreground)
    torch.testing.assert_close(target.sum(1), torch.ones(2, 4, 4, 4))
    data, _ = always(images[2], labels[2])
    torch.testing.assert_close(data, 0.25 * images[2] + 0.75 * images[1], msg="unmixed images are kept, not mixed ones")
    regions = Mixup(1.0, 0.5, 2, True, None)
    maps = [torch.randint(0, 2, (2, 2, 4, 4, 4)).bool() for _ in range(2)]
    regions(images[0], maps[0])
    torch.testing.assert_close(regions(images[1], maps[1])[1], 0.5 * maps[0].float() + 0.5 * maps[1].float())
    ignored = Mixup(1.0, 0.5, 2, False, 2)
    ignored(images[0], torch.full((2, 1, 4, 4, 4), 2))
    assert (ignored(images[1], labels[1])[1][:, -1] > 0).all(), "ignored in one is ignored in the mixture"


def test_mixup_comes_as_often_as_it_should(make_trainer):
    trainer = make(make_trainer, nnUNetTrainerISANetPaper)
    torch.manual_seed(1)
    data, target = torch.zeros(1, 2, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2)
    mixed = sum(trainer._mixup(data, target)[1].shape[1] == 2 for _ in range(2000))
    assert 0.17 < mixed / 2000 < 0.23


def test_crop_and_resize():
    """The same box of image and label, of 0.7 to 0.9 of the patch, inside it, enlarged to the patch."""
    torch.manual_seed(0)
    transform = CropResizeTransform((0.7, 0.9))
    ramp = torch.stack(torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij"))
    label = (ramp[:1] >= 10).to(torch.int16)
    edges = []
    for _ in range(200):
        out = transform(image=ramp.clone(), segmentation=label.clone())
        assert out["image"].shape == ramp.shape
        assert out["segmentation"].dtype == torch.int16
        rows = out["image"][0, :, 0]
        edges.append((float(rows[-1] - rows[0] + 1) / 20, float(rows[0])))
        agree = (out["segmentation"][0, :, 0] == (rows >= 9.5)).float().mean()
        assert agree > 0.94
    parts, starts = np.array(edges).T
    assert 0.65 < parts.min() < 0.75 < 0.85 < parts.max() < 0.95
    assert starts.min() < 1 < 4 < starts.max()
    with pytest.raises(ValueError, match="scale is"):
        CropResizeTransform((0.9, 0.7))
