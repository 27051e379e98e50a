"""nnUNetTrainerH2ASeg in this process: its loss, what it puts into the plans, what it does with any plan."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.variants.training_length import nnUNetTrainer_Xepochs
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_h2a.networks import H2ASeg
from nnunet_h2a.trainers import TRAINERS, nnUNetTrainerH2ASeg
from nnunet_h2a.training.architecture import PLANS_KEY, fusion_architecture
from nnunet_h2a.training.modalities import ChannelError
from tests.training.losses import LABELS, REGIONS, plain_loss, targets_of


def test_loss_covers_all_levels_with_the_weights_of_equation_5(make_trainer):
    trainer = make_trainer()
    x = torch.randn(2, 2, *trainer.configuration_manager.patch_size)
    outputs, targets = trainer.network(x), targets_of(trainer, 2)
    assert [o.shape[2:] for o in outputs] == [t.shape[2:] for t in targets]
    expected = sum(w / 6 * plain_loss(o, t) for w, o, t in zip((3, 2, 1), outputs, targets, strict=True))
    assert trainer.loss(outputs, targets).item() == pytest.approx(expected.item(), rel=1e-4)
    # The deepest level counts: nnU-Net's own scales would leave it out.
    outputs[-1] = outputs[-1] + torch.tensor([3.0, -3.0]).reshape(1, 2, 1, 1, 1)
    assert trainer.loss(outputs, targets).item() != pytest.approx(expected.item(), rel=1e-3)


def test_paper_weights():
    assert nnUNetTrainerH2ASeg.deep_supervision_weights(5) == pytest.approx([5 / 15, 4 / 15, 3 / 15, 2 / 15, 1 / 15])
    assert nnUNetTrainerH2ASeg.deep_supervision_weights(7)[0] == pytest.approx(7 / 28)


def test_regions_are_independent_sigmoids(make_trainer):
    trainer = make_trainer(labels=REGIONS)
    assert trainer.network.decoder.independent_classes
    assert type(trainer.loss.loss).__name__ == "DC_and_BCE_loss"
    assert trainer.network(torch.randn(1, 2, 16, 16, 16))[0].shape[1] == 2
    assert not make_trainer(labels=LABELS).network.decoder.independent_classes


def test_ignored_voxels_do_not_count(make_trainer):
    """Regions with an ignore label: the targets' last channel marks what is left out of the loss."""
    trainer = make_trainer(labels=REGIONS | {"ignore": 3}, regions_class_order=[1, 2])
    assert trainer.label_manager.ignore_label == 3
    x = torch.randn(2, 2, *trainer.configuration_manager.patch_size)
    outputs = [o.detach().requires_grad_() for o in trainer.network(x)]
    assert {o.shape[1] for o in outputs} == {2}
    targets = [torch.cat([(o > 0).float(), torch.zeros_like(o[:, :1])], dim=1) for o in outputs]
    for target in targets:
        target[:, -1, target.shape[2] // 2 :] = 1
    loss = trainer.loss(outputs, targets)
    loss.backward()
    for output in outputs:
        half = output.shape[2] // 2
        assert output.grad[:, :, :half].abs().min() > 0
        assert output.grad[:, :, half:].abs().max() == 0


def test_a_step_reaches_every_parameter_and_lowers_the_loss(make_trainer):
    torch.manual_seed(0)
    trainer = make_trainer()
    patch = trainer.configuration_manager.patch_size
    data = torch.randn(2, 2, *patch)
    targets = [t.float() for t in targets_of(trainer, 2)]
    before = {n: p.detach().clone() for n, p in trainer.network.named_parameters()}
    losses = [float(trainer.train_step({"data": data, "target": targets})["loss"]) for _ in range(8)]
    assert losses[-1] < losses[0]
    # Query and key weights between windows get zero gradients where the window is the whole map; all others move.
    for name, parameter in trainer.network.named_parameters():
        assert parameter.grad is not None, name
        assert not torch.equal(parameter, before[name]) or ".inter.project" in name, name


def test_the_order_of_the_channels_stands_in_the_plans(make_trainer):
    trainer = make_trainer(channel_names={"0": "PET", "1": "CT"}, h2a_modalities=["PET", "CT"])
    assert (trainer.network.ct_channel, trainer.network.pet_channel) == (1, 0)
    written = json.loads(json.dumps(trainer.plans_manager.plans))
    assert written[PLANS_KEY] == {"ct_channel": 1, "pet_channel": 0, "region_based": False}
    manager = PlansManager(written)
    rebuilt = nnUNetTrainerH2ASeg.build_network_architecture(
        manager, manager.get_configuration("3d_fullres"), 2, 2, False
    )
    rebuilt.load_state_dict(trainer.network.state_dict())
    trainer.set_deep_supervision_enabled(False)
    x = torch.randn(1, 2, 16, 16, 16)
    assert torch.equal(rebuilt(x), trainer.network(x))


def test_plans_of_another_channel_order_are_refused(make_trainer):
    with pytest.raises(ChannelError, match=r"plans say ct_channel 0, dataset.json says 1: .* h2a_plan"):
        make_trainer(plans="nnUNetH2ASegPlans", h2a_modalities=["PET", "CT"], initialize=False)


def test_cascade_channels_are_added_to_both_branches(make_trainer):
    """nnU-Net asks for one more channel per foreground label in 3d_cascade_fullres."""
    trainer = make_trainer(initialize=False)
    network = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 4, 3, True)
    assert {branch[0].main[0].in_channels for branch in (network.encoder.ct, network.encoder.pet)} == {3}


def test_a_dataset_that_is_not_pet_ct_is_refused(make_trainer):
    with pytest.raises(ChannelError, match="T1"):
        make_trainer(channel_names={"0": "T1", "1": "T2"}, h2a_modalities=["T1", "T2"], initialize=False)


def test_widths_are_the_papers_for_a_stock_plan_and_the_plans_for_ours(make_trainer):
    assert make_trainer().network.encoder.output_channels == [8, 16, 32]
    assert make_trainer(plans="nnUNetH2ASegPlans").network.encoder.output_channels == [2, 4, 4]


def test_any_unet_plan_gives_its_geometry():
    residual = {
        "n_stages": 6, "features_per_stage": [32, 64, 128, 256, 320, 320], "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[1, 3, 3]] + [[3, 3, 3]] * 5, "strides": [[1, 1, 1], [1, 2, 2]] + [[2, 2, 2]] * 4,
        "n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "norm_op": "torch.nn.InstanceNorm3d",
    }  # fmt: skip
    name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    ours = fusion_architecture(H2ASeg, name, residual, [32, 224, 192])
    assert ours == {
        "n_stages": 6, "features_per_stage": [8, 16, 32, 64, 128, 128], "conv_op": residual["conv_op"],
        "kernel_sizes": residual["kernel_sizes"], "strides": residual["strides"], "patch_size": [32, 224, 192],
    }  # fmt: skip
    with pytest.raises(ValueError, match="does not say conv_op, kernel_sizes"):
        fusion_architecture(H2ASeg, "some.Primus", {"n_stages": 1, "strides": [1]}, [32, 32, 32])
    with pytest.raises(ValueError, match=r"made for nnunet_h2a\.networks\.Another"):
        fusion_architecture(H2ASeg, "nnunet_h2a.networks.Another", residual, [32, 32, 32])


def test_pretrained_weights_of_another_number_of_classes(make_trainer, tmp_path):
    source, target = make_trainer(), make_trainer(labels={"background": 0, "a": 1, "b": 2})
    file = tmp_path / "checkpoint.pth"
    torch.save({"network_weights": source.network.state_dict()}, file)
    heads = copy.deepcopy(target.network.decoder.seg_layers.state_dict())
    load_pretrained_weights(target.network, file)
    for key, value in target.network.state_dict().items():
        if key.startswith("decoder.seg_layers."):
            assert torch.equal(value, heads[key.removeprefix("decoder.seg_layers.")])
        else:
            assert torch.equal(value, source.network.state_dict()[key])


def test_checkpoint_resumes(make_trainer, tmp_path):
    trainer = make_trainer()
    batch = {"data": torch.randn(2, 2, 16, 16, 16), "target": [t.float() for t in targets_of(trainer, 2)]}
    trainer.train_step(batch)
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    expected = float(trainer.train_step(batch)["loss"])
    resumed = make_trainer()
    resumed.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert float(resumed.train_step(batch)["loss"]) == expected
    for ours, theirs in zip(resumed.network.parameters(), trainer.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("network", ["H2ASeg", "ISANet", "CIPA"])
def test_training_lengths_are_nnunets(network):
    stock = {n.removeprefix("nnUNetTrainer") for n in vars(nnUNetTrainer_Xepochs) if n.startswith("nnUNetTrainer_")}
    prefix = f"nnUNetTrainer{network}"
    ours = {n.removeprefix(prefix) for n in TRAINERS if n.startswith(f"{prefix}_")}
    assert ours == stock


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_are_importable_classes(name):
    assert pickle.loads(pickle.dumps(TRAINERS[name])) is TRAINERS[name]


def test_epoch_variant_trains_that_long(make_trainer):
    trainer = make_trainer(TRAINERS["nnUNetTrainerH2ASeg_5epochs"], initialize=False)
    assert trainer.num_epochs == 5
    assert make_trainer(initialize=False).num_epochs == 1000
    assert np.isclose(trainer.initial_lr, nnUNetTrainerH2ASeg.recipe.learning_rate)
