"""A training that cannot go on says why."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from nnunet_h2a.planning.plan import main
from nnunet_h2a.trainers import (
    nnUNetTrainerCIPA,
    nnUNetTrainerCIPAPaper,
    nnUNetTrainerH2ASeg,
    nnUNetTrainerISANet,
    nnUNetTrainerISANetPET,
)
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


def run_out_of_memory(trainer, monkeypatch, tmp_path):
    """The error that PyTorch raises is raised here without a GPU; what comes of it is real."""

    def forward(x):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    patch = trainer.configuration_manager.patch_size
    target = torch.zeros(1, 1, *patch)
    batch = {"data": torch.zeros(1, 2, *patch), "target": [target] if trainer.enable_deep_supervision else target}
    monkeypatch.setattr(trainer.network, "forward", forward)
    return stopped(trainer, batch, tmp_path)


@pytest.mark.parametrize(
    ("trainer_class", "plans", "options", "sizes"),
    [
        (nnUNetTrainerH2ASeg, "Mine", ["--features", "4", "8", "16", "--n-stages", "3"], (8, (32, 32, 32))),
        pytest.param(
            nnUNetTrainerH2ASeg,
            "Mine",
            ["--features", "4", "8", "16", "32", "--n-stages", "4"],
            (2, (40, 48, 48)),
            marks=pytest.mark.full,
        ),
        (nnUNetTrainerH2ASeg, "nnUNetPlans", None, None),
        pytest.param(
            nnUNetTrainerISANetPET, "Mine", ["--modalities", "pet"], (2, (32, 48, 48)), marks=pytest.mark.full
        ),
        pytest.param(
            nnUNetTrainerCIPA, "Mine", ["--features", "8", "8", "16", "16"], (3, (24, 24, 24)), marks=pytest.mark.full
        ),
        (nnUNetTrainerCIPAPaper, "Mine", ["--features", "8", "8", "16", "16"], (2, (32, 32, 32))),
    ],
    ids=["batch", "patch", "stock plans", "one modality", "CIPA", "batch of its own"],
)
def test_out_of_memory(
    make_trainer, workspace, preprocessed_copy, monkeypatch, tmp_path, capsys, trainer_class, plans, options, sizes
):
    """The command that is printed makes a plan of the same network with at most half the voxels."""
    name = trainer_class.network_class.__name__

    def plan(arguments):
        monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed_copy.parent))
        return main(arguments)

    if options is not None:
        batch, patch = sizes
        arguments = ["-d", "711", "-c", "3d_fullres", "--network", name, "-o", plans, "--batch-size", str(batch)]
        assert plan([*arguments, "--patch-size", *map(str, patch), *options]) == 0
    trainer = make_trainer(trainer_class, plans=plans, folder=preprocessed_copy)
    before = dict(trainer.configuration_manager.configuration)
    network = trainer.network
    message = run_out_of_memory(trainer, monkeypatch, tmp_path)
    shown = " x ".join(map(str, before["patch_size"]))
    assert f"the GPU has not enough memory for {name} with patch {shown} and batch {before['batch_size']}" in message
    assert ("the trainer's own" in message) == (trainer_class is nnUNetTrainerCIPAPaper)
    (command,) = [line.partition("size: ")[2] for line in message.splitlines() if "h2a_plan" in line]
    capsys.readouterr()
    assert plan(command.split()[1:]) == 0, capsys.readouterr().err
    assert "replacing" not in capsys.readouterr().out
    smaller = command.split()[-1]
    content = json.loads((preprocessed_copy / f"{smaller}.json").read_text())["configurations"]["3d_fullres"]
    voxels = [math.prod(c["patch_size"]) * c["batch_size"] for c in (before, content)]
    assert 0.2 * voxels[0] < voxels[1] <= 0.5 * voxels[0]
    if trainer_class is nnUNetTrainerCIPAPaper:
        assert content["patch_size"] != before["patch_size"]
    made = make_trainer(trainer_class, plans=smaller, folder=preprocessed_copy).network
    assert getattr(made, "modalities", "both") == getattr(network, "modalities", "both")
    if name == "CIPA":
        kwargs = [c["architecture"]["arch_kwargs"] for c in (before, content)]
        assert kwargs[0]["widths"] == kwargs[1]["widths"]
    else:
        widths = [n.encoder.output_channels for n in (network, made)]
        assert list(widths[1]) == list(widths[0])[: len(widths[1])]
