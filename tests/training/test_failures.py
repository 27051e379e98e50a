"""A training that cannot go on says why."""

from __future__ import annotations

import copy

import pytest
import torch

from nnunet_h2a.trainers import nnUNetTrainerCIPA, nnUNetTrainerH2ASeg, nnUNetTrainerISANet
from nnunet_h2a.training.failures import TrainingStopped, first_non_finite
from tests.training.test_every_trainer import batch_of, every_trainer, plans_of

KEYS = ["fdg_a_20200101", "fdg_b_20200102"]


def weights_of(trainer):
    return copy.deepcopy(trainer.network.state_dict())


def stopped(trainer, batch, tmp_path):
    """The message with which a step ends; weights and checkpoints are as they were."""
    trainer.output_folder = str(tmp_path)
    trainer.log_file = str(tmp_path / "log.txt")
    before = weights_of(trainer)
    with pytest.raises(TrainingStopped) as stop:
        trainer.train_step(batch | {"keys": KEYS})
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name, value in trainer.network.state_dict().items():
        assert name.endswith(statistics) or torch.equal(value, before[name]), name
    message = str(stop.value)
    assert message in (tmp_path / "log.txt").read_text()
    return message


@every_trainer
def test_images_that_are_not_finite(make_trainer, trainer_class, tmp_path):
    trainer = make_trainer(trainer_class, plans=plans_of(trainer_class))
    trainer.current_epoch = 3
    batch = batch_of(trainer)
    trainer.train_step(batch | {"keys": KEYS})
    (tmp_path / "checkpoint_latest.pth").write_bytes(b"good")
    poisoned = batch | {"data": batch["data"].clone()}
    poisoned["data"][0, 1, 5] = float("nan")
    message = stopped(trainer, poisoned, tmp_path)
    assert "training stopped: the loss is nan at epoch 3, step 2" in message
    assert "the images hold values that are not finite (channel 1)" in message
    assert "cases of this batch: fdg_a_20200101, fdg_b_20200102" in message
    assert "checkpoint_latest.pth in" in message
    assert (tmp_path / "checkpoint_latest.pth").read_bytes() == b"good"


@pytest.mark.parametrize(
    ("trainer_class", "layer"),
    [
        (nnUNetTrainerH2ASeg, "encoder.pet.1.main.2"),
        (nnUNetTrainerISANet, "encoder.branches.1.stages.1.residual.0.conv"),
        (nnUNetTrainerCIPA, "decoder.seg_layers.0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_layer_is_named(make_trainer, trainer_class, layer, tmp_path):
    """Finite weights that overflow in one layer: that one is named, not those that hand the infinity on."""
    trainer = make_trainer(trainer_class, plans=plans_of(trainer_class))
    names = [n for n, m in trainer.network.named_modules() if isinstance(m, torch.nn.modules.conv._ConvNd)]
    layer = layer if layer in names else names[len(names) // 2]
    with torch.no_grad():
        trainer.network.get_submodule(layer).weight.fill_(3e38)
    message = stopped(trainer, batch_of(trainer), tmp_path)
    assert f"the first layer whose output is not finite is {layer} (" in message
    assert "no checkpoint had been written yet" in message


def test_a_spoilt_weight_is_named(make_trainer):
    trainer = make_trainer(nnUNetTrainerH2ASeg, plans="nnUNetH2ASegPlans")
    name, parameter = list(trainer.network.named_parameters())[7]
    with torch.no_grad():
        parameter[...] = float("nan")
    assert first_non_finite(trainer.network, batch_of(trainer)["data"]) == (
        f"the weight {name} is not finite: an earlier step spoilt it"
    )


def test_a_loss_of_its_own_making(make_trainer, tmp_path):
    trainer = make_trainer(nnUNetTrainerH2ASeg, plans="nnUNetH2ASegPlans")
    batch = batch_of(trainer)
    trainer.loss.loss.weight_ce = float("inf")
    assert "all layers' outputs are finite, the loss itself is not" in stopped(trainer, batch, tmp_path)


def test_validation_goes_on(make_trainer):
    """nnU-Net looks at the loss of validation and learns nothing from it."""
    trainer = make_trainer(nnUNetTrainerH2ASeg, plans="nnUNetH2ASegPlans")
    batch = batch_of(trainer)
    batch["data"][:] = float("nan")
    with torch.no_grad():
        assert not torch.isfinite(torch.tensor(float(trainer.validation_step(batch)["loss"])))


@pytest.mark.parametrize(
    ("batch_size", "patch", "smaller"),
    [(8, [16, 16, 16], "--batch-size 4"), (2, [16, 32, 16], "--patch-size 16 16 16")],
)
def test_out_of_memory(make_trainer, monkeypatch, tmp_path, batch_size, patch, smaller):
    """The error that PyTorch raises is raised here without a GPU; what comes of it is real."""
    trainer = make_trainer(nnUNetTrainerH2ASeg, plans="nnUNetH2ASegPlans")
    trainer.configuration_manager.configuration |= {"batch_size": batch_size, "patch_size": patch}

    def forward(x):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    batch = batch_of(make_trainer(nnUNetTrainerH2ASeg, plans="nnUNetH2ASegPlans"))
    monkeypatch.setattr(trainer.network, "forward", forward)
    message = stopped(trainer, batch, tmp_path)
    shown = " x ".join(map(str, patch))
    assert f"the GPU has not enough memory for H2ASeg with patch {shown} and batch {batch_size}" in message
    assert f"h2a_plan -d 711 -c 3d_fullres --network H2ASeg {smaller}\n" in message
