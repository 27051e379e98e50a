"""What every network's trainer must do: learn, reach all parameters, and build the same network again at inference."""

from __future__ import annotations

import json

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_h2a.networks import CIPA, H2ASeg, ISANet
from nnunet_h2a.trainers import (
    nnUNetTrainerCIPA,
    nnUNetTrainerH2ASeg,
    nnUNetTrainerISANet,
    nnUNetTrainerISANetCT,
    nnUNetTrainerISANetPET,
)
from nnunet_h2a.training.modalities import ChannelError
from tests.training.losses import REGIONS, plain_loss, targets_of

NETWORKS = {nnUNetTrainerH2ASeg: H2ASeg, nnUNetTrainerISANet: ISANet, nnUNetTrainerCIPA: CIPA}
every_trainer = pytest.mark.parametrize("trainer_class", NETWORKS, ids=lambda t: t.__name__)


def batch_of(trainer, classes=2, seed=0):
    """Images and targets as the trainer's data loader hands them out."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(2, trainer.num_input_channels, *trainer.configuration_manager.patch_size, generator=generator)
    if trainer.enable_deep_supervision:
        return {"data": data, "target": [t.float() for t in targets_of(trainer, classes)]}
    return {"data": data, "target": torch.randint(0, classes, (2, 1, *data.shape[2:]), generator=generator).float()}


def plans_of(trainer_class):
    return f"nnUNet{NETWORKS[trainer_class].__name__}Plans"


@every_trainer
def test_steps_lower_the_loss_and_reach_every_parameter(make_trainer, trainer_class):
    torch.manual_seed(0)
    trainer = make_trainer(trainer_class, plans=plans_of(trainer_class))
    assert isinstance(trainer.network, NETWORKS[trainer_class])
    batch = batch_of(trainer)
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert [n for n, p in trainer.network.named_parameters() if p.grad is None] == []


@every_trainer
def test_inference_builds_the_same_network_from_the_plans(make_trainer, trainer_class):
    trainer = make_trainer(
        trainer_class, channel_names={"0": "PET", "1": "CT"}, h2a_modalities=["PET", "CT"], initialize=False
    )
    written = PlansManager(json.loads(json.dumps(trainer.plans_manager.plans)))
    configuration = written.get_configuration("3d_fullres")
    arguments = (written, configuration, 2, 2, False)
    configuration.configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 4, 4]
    network = trainer_class.build_network_architecture(*arguments)
    assert (network.ct_channel, network.pet_channel) == (1, 0)
    again = trainer_class.build_network_architecture(*arguments)
    again.load_state_dict(network.state_dict())
    x = torch.randn(1, 2, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), network.eval()(x))


@every_trainer
def test_regions(make_trainer, trainer_class):
    trainer = make_trainer(trainer_class, plans=plans_of(trainer_class), labels=REGIONS)
    loss = trainer.loss.loss if trainer.enable_deep_supervision else trainer.loss
    assert type(loss).__name__ == "DC_and_BCE_loss"
    outputs = trainer.network(torch.randn(2, 2, 16, 16, 16))
    assert (outputs[0] if isinstance(outputs, list) else outputs).shape == (2, 2, 16, 16, 16)


@every_trainer
def test_the_stock_trainer_takes_the_plans(make_trainer, trainer_class):
    trainer = make_trainer(nnUNetTrainer, plans=plans_of(trainer_class))
    assert isinstance(trainer.network, NETWORKS[trainer_class])
    assert torch.isfinite(torch.tensor(float(trainer.train_step(batch_of(trainer))["loss"])))


def test_isanet_supervises_all_levels_but_the_deepest(make_trainer):
    trainer = make_trainer(nnUNetTrainerISANet, plans="nnUNetISANetPlans")
    batch = batch_of(trainer)
    outputs, targets = trainer.network(batch["data"]), [t.long() for t in batch["target"]]
    assert [o.shape[2:] for o in outputs] == [t.shape[2:] for t in targets] == [(16, 16, 16), (8, 8, 8)]
    expected = sum(w / 3 * plain_loss(o, t) for w, o, t in zip((2, 1), outputs, targets, strict=True))
    assert trainer.loss(outputs, targets).item() == pytest.approx(expected.item(), rel=1e-4)
    weights = nnUNetTrainerISANet.deep_supervision_weights(4)
    assert weights == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15])


def test_cipa_has_one_output_and_one_loss(make_trainer):
    trainer = make_trainer(nnUNetTrainerCIPA, plans="nnUNetCIPAPlans")
    assert not trainer.enable_deep_supervision
    batch = batch_of(trainer)
    trainer.network.eval()
    output = trainer.network(batch["data"])
    expected = plain_loss(output, batch["target"].long())
    assert trainer.loss(output, batch["target"]).item() == pytest.approx(expected.item(), rel=1e-4)


def test_cipas_decay_rates_have_no_weight_decay(make_trainer):
    trainer = make_trainer(nnUNetTrainerCIPA, plans="nnUNetCIPAPlans")
    decayed, free = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (trainer.recipe.weight_decay, 0)
    names = {id(p): name.rpartition(".")[2] for name, p in trainer.network.named_parameters()}
    assert {names[id(p)] for p in free["params"]} == {"A_logs", "Ds", "dt_projs_bias"}
    assert {names[id(p)] for p in decayed["params"]}.isdisjoint({"A_logs", "Ds", "dt_projs_bias"})
    assert len(decayed["params"]) + len(free["params"]) == len(names)


@pytest.mark.parametrize(("trainer_class", "kept"), [(nnUNetTrainerISANetPET, 1), (nnUNetTrainerISANetCT, 0)])
def test_one_modality_sees_its_channel_only(make_trainer, trainer_class, kept):
    trainer = make_trainer(trainer_class, plans="nnUNetISANetPlans")
    assert len(trainer.network.encoder.branches) == 1
    trainer.set_deep_supervision_enabled(False)
    x = torch.randn(1, 2, 16, 16, 16)
    other, same = x.clone(), x.clone()
    other[:, kept] += 1
    same[:, 1 - kept] += 1
    assert torch.equal(trainer.network(same), trainer.network(x))
    assert not torch.equal(trainer.network(other), trainer.network(x))


def test_one_modality_trains_on_a_dataset_that_has_no_other(make_trainer):
    alone = {"channel_names": {"0": "PET"}, "h2a_modalities": ["PET"]}
    trainer = make_trainer(nnUNetTrainerISANetPET, **alone)
    assert trainer.num_input_channels == 1
    assert trainer.plans_manager.plans["nnunet_h2a"]["modalities"] == "pet"
    trainer.train_step(batch_of(trainer))
    with pytest.raises(ChannelError, match=r"is \['PET'\], but this network takes CT alone"):
        make_trainer(nnUNetTrainerISANetCT, **alone, initialize=False)
    with pytest.raises(ChannelError, match="for PET alone there is nnUNetTrainerISANetPET"):
        make_trainer(nnUNetTrainerISANet, **alone, initialize=False)


def test_a_trainer_of_one_modality_refuses_plans_of_the_other():
    dataset = {"channel_names": {"0": "CT", "1": "PET"}}
    with pytest.raises(ChannelError, match="plans say modalities = 'ct', but nnUNetTrainerISANetPET trains"):
        nnUNetTrainerISANetPET.network_settings({"modalities": "ct"}, dataset, False)
    with pytest.raises(ChannelError, match="found 'PET' in the plans"):
        nnUNetTrainerISANet.network_settings({"modalities": "PET"}, dataset, False)
    assert "modalities" not in nnUNetTrainerISANet.network_settings({"modalities": "pet"}, dataset, False)
