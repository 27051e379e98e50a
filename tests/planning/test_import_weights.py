"""h2a_import_weights: a checkpoint that nnUNetv2_train -pretrained_weights accepts, or one line that says why not."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_h2a.networks import CIPA
from nnunet_h2a.networks.cipa_weights import released_name
from nnunet_h2a.networks.crm import resize_map_weights
from nnunet_h2a.planning.import_weights import main
from nnunet_h2a.trainers import TRAINERS
from nnunet_h2a.training.architecture import PLANS_KEY, fusion_settings
from tests.networks import cipa_transcription as transcription

DATASET = "Dataset713_Slices"

#: The plan of a 2D U-Net as nnU-Net writes it, and one that names CIPA with few channels.
STAGES = {"n_stages": 4, "features_per_stage": [8, 8, 8, 8], "conv_op": "torch.nn.modules.conv.Conv2d",
          "kernel_sizes": [[3, 3]] * 4, "strides": [[1, 1], [2, 2], [2, 2], [2, 2]]}  # fmt: skip
UNET = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {**STAGES, "n_conv_per_stage": [2] * 4, "n_conv_per_stage_decoder": [2] * 3},
    "_kw_requires_import": ["conv_op"],
}
SMALL_CIPA = {
    "network_class_name": "nnunet_h2a.networks.CIPA",
    "arch_kwargs": {**STAGES, "widths": [16, 32, 32, 32], "depths": [1, 2, 1, 1], "decoder_depth": 1},
    "_kw_requires_import": ["conv_op"],
}


def configuration(patch, architecture):
    return {"patch_size": patch, "batch_size": 2, "spacing": [1.0] * len(patch), "architecture": architecture}


@pytest.fixture
def preprocessed(tmp_path, monkeypatch):
    """A dataset with plans, as far as the command looks at them."""
    folder = tmp_path / "nnUNet_preprocessed" / DATASET
    folder.mkdir(parents=True)
    plans = {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": {
            "2d": configuration([64, 96], UNET),
            "2d_small": configuration([64, 64], SMALL_CIPA),
            "3d_fullres": configuration([32, 32, 32], UNET),
        },
    }
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    labels = {"background": 0, "tumour": 1}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "PET", "1": "CT"}, "labels": labels}))
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    monkeypatch.chdir(tmp_path)
    return folder


def set_labels(folder, labels, **more):
    content = json.loads((folder / "dataset.json").read_text()) | {"labels": labels} | more
    (folder / "dataset.json").write_text(json.dumps(content))


def trainers_network(folder, key, heads) -> CIPA:
    """The network as the trainer builds it, with other random values than the command's."""
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans[PLANS_KEY] = fusion_settings(json.loads((folder / "dataset.json").read_text()), False)
    manager = PlansManager(plans)
    trainer = TRAINERS["nnUNetTrainerCIPA"]
    return trainer.build_network_architecture(manager, manager.get_configuration(key), 2, heads, True)


@pytest.fixture(scope="module")
def cipa_file(tmp_path_factory):
    """A file like the authors', with random weights."""
    network = CIPA(2, 4, 96, nn.Conv2d, 3, [1, 2, 2, 2], 1)
    shapes = {released_name(name): tensor.shape for name, tensor in network.state_dict().items()}
    path = tmp_path_factory.mktemp("released") / "CIPA.pth"
    weights = transcription.random_weights_like(shapes, seed=1)
    torch.save({"model": weights}, path)
    return path, weights


@pytest.fixture
def vmamba_files(tmp_path):
    """Files like VMamba's for the small network, with newer and with older names."""
    kwargs = SMALL_CIPA["arch_kwargs"] | {"conv_op": nn.Conv2d}
    network = CIPA(input_channels=2, num_classes=2, **kwargs)
    state = network.encoder.state_dict()
    shapes = {f"backbone.vssm.{n}": tensor.shape for n, tensor in state.items() if "outnorm" not in n}
    weights = transcription.random_weights_like(shapes, seed=2)
    ours = {name.replace("backbone.vssm.", ""): tensor for name, tensor in weights.items()}
    newer = {name.replace(".conv.", ".conv2d."): tensor for name, tensor in ours.items()}
    older = {}
    for name, tensor in newer.items():
        name = name.replace("patch_embed.0", "patch_embed.proj").replace("patch_embed.2", "patch_embed.norm")
        older[re.sub(r"(blocks\.\d+\.)norm", r"\1ln_1", name).replace(".op.", ".self_attention.")] = tensor
    newer["classifier.head.weight"] = older["head.weight"] = torch.zeros(1000, 32)
    older["norm.weight"] = torch.ones(32)
    torch.save({"model": newer}, tmp_path / "newer.pth")
    torch.save({"model": older}, tmp_path / "older.pth")
    return ours


def test_released_weights_as_a_starting_point(preprocessed, cipa_file, tmp_path, capsys):
    path, weights = cipa_file
    assert main(["--cipa", str(path), "-d", "713", "-o", "start.pth"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("warning: CRM's weights") == 1
    assert "its first map is 16 x 24, not 128 x 128" in printed.out
    command = "nnUNetv2_train 713 2d 0 -tr nnUNetTrainerCIPA -p nnUNetPlans -pretrained_weights start.pth"
    assert f"next:\n  {command}\n" in printed.out
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["start.pth"]

    network = trainers_network(preprocessed, "2d", 2)
    load_pretrained_weights(network, "start.pth")
    state, written = network.state_dict(), torch.load("start.pth", weights_only=True)["network_weights"]
    assert set(state) == set(written)
    for name, tensor in written.items():
        expected = weights[released_name(name)]
        if found := re.fullmatch(r"crm\.(\d)\.mlp\.(0\.weight|0\.bias|1\.weight)", name):
            stage = int(found.group(1))
            expected = resize_map_weights(expected, (128 >> stage,) * 2, (16 >> stage, 24 >> stage))
        if ".seg_layers." in name:
            expected = torch.cat([torch.zeros_like(expected), expected])
        else:
            assert torch.equal(state[name], tensor), name
        assert torch.equal(tensor, expected), name


def test_at_the_released_size_the_network_is_the_released_one(preprocessed, cipa_file, capsys):
    path, weights = cipa_file
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    plans["configurations"]["2d"]["patch_size"] = [512, 512]
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert main(["--cipa", str(path), "-d", DATASET, "-o", "start.pth"]) == 0
    assert "warning" not in capsys.readouterr().out
    written = torch.load("start.pth", weights_only=True)["network_weights"]
    head = written.pop("decoder.seg_layers.0.weight")
    assert all(torch.equal(tensor, weights[released_name(name)]) for name, tensor in written.items())
    features = torch.randn(2, 96, 8, 8)
    released = torch.sigmoid(nn.functional.conv2d(features, weights["decode_head.output.weight"]))
    softmax = torch.softmax(nn.functional.conv2d(features, head), dim=1)
    torch.testing.assert_close(softmax[:, 1:], released)


@pytest.mark.parametrize(
    ("labels", "more", "heads", "kept"),
    [
        ({"background": 0, "primary": 1, "node": 2}, {}, 3, False),
        ({"background": 0, "whole": [1, 2], "core": 2}, {"regions_class_order": [1, 2]}, 2, False),
        ({"background": 0, "whole": [1, 2]}, {"regions_class_order": [1]}, 1, True),
    ],
    ids=["three classes", "two regions", "one region"],
)
def test_heads_for_other_labels(preprocessed, cipa_file, capsys, labels, more, heads, kept):
    path, weights = cipa_file
    set_labels(preprocessed, labels, **more)
    assert main(["--cipa", str(path), "-d", "713", "-o", "start.pth"]) == 0
    head = torch.load("start.pth", weights_only=True)["network_weights"]["decoder.seg_layers.0.weight"]
    assert head.shape == (heads, 96, 1, 1)
    assert torch.equal(head[:1], weights["decode_head.output.weight"]) == kept
    assert (f"fresh initial values for {heads} classes" in capsys.readouterr().out) != kept


def test_both_vmamba_namings_write_the_same_bits(preprocessed, vmamba_files, capsys):
    for naming in ("newer", "older"):
        arguments = ["--vmamba", f"{naming}.pth", "-d", "713", "-c", "2d_small", "-o", f"from_{naming}.pth"]
        assert main(arguments) == 0
        assert f"{len(vmamba_files)} tensors of the encoder from {naming}.pth" in capsys.readouterr().out
    newer, older = (torch.load(f"from_{n}.pth", weights_only=True)["network_weights"] for n in ("newer", "older"))
    assert list(newer) == list(older)
    assert all(torch.equal(newer[name], older[name]) for name in newer)
    for name, tensor in vmamba_files.items():
        assert torch.equal(newer[f"encoder.{name}"], tensor), name
    network = trainers_network(preprocessed, "2d_small", 2)
    load_pretrained_weights(network, "from_older.pth")
    state = network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in newer.items() if ".seg_layers." not in name)
    # The rest is what the trainer's network begins with.
    assert all(newer[f"encoder.outnorm{i}.weight"].eq(1).all() for i in range(4))
    assert newer["decoder.seg_layers.0.weight"].std() > 0
    assert newer["dcim.0.local_scan.A_logs"][0, :3].exp().tolist() == pytest.approx([1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vmamba", "no.pth"], "no.pth: no such file"),
        (["--vmamba", "."], ".: is a folder"),
        (["-d", "714"], "nnUNetv2_plan_and_preprocess -d 714"),
        (["-p", "Missing"], "has no plans Missing; it has nnUNetPlans (-p)"),
        (["-c", "2d_large"], "has no configuration 2d_large; it has 2d, 2d_small, 3d_fullres (-c)"),
        (["-c", "3d_fullres"], "configuration 3d_fullres is 3D and the released weights are 2D"),
        (["-tr", "nnUNetTrainer"], "-tr nnUNetTrainer: no such trainer in this package; for CIPA there is nnUNetTr"),
        (["-tr", "nnUNetTrainerH2ASeg", "-c", "2d"], "trains H2ASeg and the weights are CIPA's"),
        (["-c", "2d"], "newer.pth: not the weights of VMamba-Tiny"),
        (["-o", "."], "is a folder: name the file"),
        (["-o", "no/start.pth"], "the folder no does not exist"),
        (["-o", "newer.pth"], "would overwrite the file to read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(preprocessed, vmamba_files, tmp_path, capsys, arguments, message):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["--vmamba", "newer.pth", "-d", "713", "-c", "2d_small", "-o", "start.pth", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset.json": {"channel_names": {"0": "CT", "1": "CT"}}}, "exactly two image channels"),
        ({"dataset.json": {"channel_names": {"0": "CT", "1": "PET"}}}, "the plans say ct_channel 1"),
    ],
)
def test_channels_are_checked_as_the_trainer_does(preprocessed, vmamba_files, capsys, change, message):
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    plans["configurations"]["2d_small"]["architecture"]["arch_kwargs"] |= {"ct_channel": 1, "pet_channel": 0}
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    for name, content in change.items():
        (preprocessed / name).write_text(json.dumps(json.loads((preprocessed / name).read_text()) | content))
    assert main(["--vmamba", "newer.pth", "-d", "713", "-c", "2d_small", "-o", "start.pth"]) == 2
    assert message in capsys.readouterr().err


def test_released_weights_do_not_go_into_another_network(preprocessed, cipa_file, vmamba_files, tmp_path, capsys):
    path, _ = cipa_file
    assert main(["--cipa", str(path), "-d", "713", "-c", "2d_small", "-o", "start.pth"]) == 2
    error = capsys.readouterr().err
    assert "not the published CIPA: encoder.patch_embed.0.weight is [16, 3, 4, 4] in it and [96, 3, 4, 4]" in error
    assert main(["--cipa", "newer.pth", "-d", "713", "-o", "start.pth"]) == 2
    assert "newer.pth: not the weights of CIPA at 512 x 512" in capsys.readouterr().err
    assert not (tmp_path / "start.pth").exists()


def test_a_full_disk_leaves_the_old_file(preprocessed, vmamba_files, tmp_path, monkeypatch, capsys):
    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    (tmp_path / "start.pth").write_bytes(b"old")
    assert main(["--vmamba", "newer.pth", "-d", "713", "-c", "2d_small", "-o", "start.pth"]) == 2
    assert capsys.readouterr().err == "error: start.pth cannot be written: No space left on device\n"
    assert (tmp_path / "start.pth").read_bytes() == b"old"
    assert not list(tmp_path.glob("*.part"))


def test_one_source_is_needed(capsys):
    for arguments in ([], ["--cipa", "a.pth", "--vmamba", "b.pth"]):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "-d", "713", "-o", "start.pth"])
        assert stopped.value.code == 2
        assert "--cipa" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, nnunet_h2a.planning.import_weights as command\n"
        "command.build_parser().format_help()\n"
        "assert not {'torch', 'nnunetv2', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
