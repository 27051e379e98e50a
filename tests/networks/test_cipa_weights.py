"""CIPA with weights of the authors' names: the same numbers as the plain transcription; files are read safely."""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from nnunet_h2a.networks import CIPA, load_cipa_checkpoint
from nnunet_h2a.networks.cipa_weights import (
    WeightsFileError,
    load_vmamba_encoder,
    our_name,
    released_name,
    vmamba_name,
)
from tests.conftest import ROOT
from tests.networks import cipa_transcription as transcription

LISTING = ROOT.parent / "shared" / "cipa-state-dict.txt"
needs_listing = pytest.mark.skipif(not LISTING.exists(), reason="needs ../shared/cipa-state-dict.txt")

#: Some of the released file's tensors, at least one of every kind: its name, ours, its shape.
FACTS = [
    ("backbone.vssm.patch_embed.0.weight", "encoder.patch_embed.0.weight", (96, 3, 4, 4)),
    ("backbone.vssm.patch_embed.2.bias", "encoder.patch_embed.2.bias", (96,)),
    ("backbone.vssm.layers.2.blocks.8.norm.weight", "encoder.layers.2.blocks.8.norm.weight", (384,)),
    ("backbone.vssm.layers.2.blocks.8.op.x_proj_weight", "encoder.layers.2.blocks.8.op.x_proj_weight", (4, 56, 768)),
    ("backbone.vssm.layers.3.blocks.1.op.A_logs", "encoder.layers.3.blocks.1.op.A_logs", (6144, 16)),
    ("backbone.vssm.layers.0.blocks.0.op.conv2d.weight", "encoder.layers.0.blocks.0.op.conv.weight", (192, 1, 3, 3)),
    ("backbone.vssm.layers.1.downsample.reduction.weight", "encoder.layers.1.downsample.reduction.weight", (384, 768)),
    ("backbone.vssm.outnorm3.weight", "encoder.outnorm3.weight", (768,)),
    ("backbone.cross_mamba.0.channel_weights.mlp.0.weight", "crm.0.mlp.0.weight", (16384,)),
    ("backbone.cross_mamba.3.channel_weights.mlp.1.weight", "crm.3.mlp.1.weight", (96, 256)),
    ("backbone.cross_mamba.2.channel_weights.mlp.3.dt_projs_weight", "crm.2.mlp.3.dt_projs_weight", (1, 192, 6)),
    ("backbone.channel_attn_mamba.2.inner_norm1.weight", "dcim.2.local_norm.weight", (6144,)),
    ("backbone.channel_attn_mamba.0.inner_attn.conv2d.bias", "dcim.0.local_scan.conv.bias", (192,)),
    ("backbone.channel_attn_mamba.1.outer_norm1.bias", "dcim.1.region_norm.bias", (192,)),
    ("backbone.channel_attn_mamba.3.outer_attn.Ds", "dcim.3.region_scan.Ds", (6144,)),
    ("backbone.region_patch.1.inner_convs.3.weight", "dcim.1.ct_convs.3.weight", (192, 48, 3, 3)),
    ("backbone.region_patch.0.outer_convs.10.running_var", "dcim.0.pet_convs.10.running_var", (96,)),
    ("backbone.region_patch.0.outer_convs.1.num_batches_tracked", "dcim.0.pet_convs.1.num_batches_tracked", ()),
    ("decode_head.layers_up.0.expand.weight", "decoder.layers_up.0.expand.weight", (1536, 768)),
    ("decode_head.layers_up.1.blocks.3.scale2", "decoder.layers_up.1.blocks.3.scale2", (384,)),
    ("decode_head.layers_up.3.blocks.0.op.A_logs", "decoder.layers_up.3.blocks.0.op.A_logs", (768, 4)),
    (
        "decode_head.layers_up.2.blocks.1.conv_blk.cab.3.fc.0.weight",
        "decoder.layers_up.2.blocks.1.conv_blk.cab.3.fc.0.weight",
        (6, 192, 1, 1),
    ),
    ("decode_head.layers_up.2.upsample.linear.weight", "decoder.layers_up.2.upsample.linear.weight", (96, 192)),
    ("decode_head.norm_up.weight", "decoder.norm_up.weight", (96,)),
    ("decode_head.up.linear2.weight", "decoder.up.linear2.weight", (96, 96)),
    ("decode_head.output.weight", "decoder.seg_layers.0.weight", (1, 96, 1, 1)),
]


def build(patch, widths=(32, 64, 96, 128), depths=(1, 2, 1, 1), num_classes=3, **options) -> CIPA:
    """CIPA as a plan of six stages builds it, with few channels."""
    return CIPA(
        2, 6, 8, nn.Conv2d, 3, [1, 2, 2, 2, 2, 2], num_classes, patch_size=patch, widths=widths, depths=depths,
        decoder_depth=2, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def released_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes that the released file must have, from the network."""
    network = CIPA(2, 4, 96, nn.Conv2d, 3, [1, 2, 2, 2], 1)
    return {released_name(name): tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def stand_in(shapes):
    """Tensors of these shapes that take no room in a file."""
    return {
        name: torch.zeros((), dtype=torch.long if "num_batches" in name else torch.float32).expand(shape)
        for name, shape in shapes.items()
    }


def test_names_shapes_and_numbers_of_the_published_network(released_shapes):
    for there, ours, shape in FACTS:
        assert our_name(there) == ours
        assert released_name(ours) == there
        assert released_shapes[there] == shape, there
    assert len(released_shapes) == 848
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(math.prod(s) for n, s in released_shapes.items() if not n.endswith(buffers)) == 54_572_198
    assert our_name("backbone.other.0.weight") is None
    assert our_name("encoder.outnorm0.weight") is None


@needs_listing
def test_every_released_tensor_has_its_place(released_shapes):
    listing = transcription.read_listing(LISTING)
    assert listing == released_shapes
    for name in listing:
        assert released_name(our_name(name)) == name


@pytest.mark.parametrize(
    ("patch", "widths", "channels"),
    [
        ((128, 128), (32, 64, 96, 128), (0, 1)),
        ((64, 96), (32, 64, 96, 128), (1, 0)),  # the deepest maps are no whole number of regions
        ((70, 106), (16, 30, 60, 64), (0, 1)),  # padded; widths that no power of two divides
    ],
)
def test_whole_network_is_the_transcription(patch, widths, channels):
    network = build(patch, widths, ct_channel=channels[0], pet_channel=channels[1]).double().eval()
    shapes = {released_name(name): tensor.shape for name, tensor in network.state_dict().items()}
    weights = transcription.random_weights_like(shapes, seed=3)
    network.load_state_dict({our_name(name): tensor for name, tensor in weights.items()})
    x = torch.randn(2, 2, *patch, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        result = network(x)
    expected = transcription.cipa(weights, x[:, channels[0]], x[:, channels[1]])
    assert expected.std() > 0.1
    torch.testing.assert_close(result, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.full
@needs_listing
def test_released_size_in_float32_is_the_transcription(tmp_path):
    weights = transcription.random_weights(LISTING, seed=0)
    torch.save({"model": weights}, tmp_path / "CIPA.pth")
    network = load_cipa_checkpoint(tmp_path / "CIPA.pth")
    x = torch.randn(1, 2, 512, 512, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        result = network(x)
    assert result.shape == (1, 1, 512, 512)
    torch.testing.assert_close(result.double(), transcription.cipa(weights, x[:, 0], x[:, 1]), atol=1e-4, rtol=0)


def test_a_released_checkpoint_fills_every_tensor(tmp_path, released_shapes):
    weights = transcription.random_weights_like(released_shapes, seed=5)
    torch.save({"model": weights}, tmp_path / "CIPA.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = load_cipa_checkpoint(tmp_path / "CIPA.pth")
    state = network.state_dict()
    assert len(state) == len(weights)
    for name, tensor in weights.items():
        assert torch.equal(state[our_name(name)], tensor), name
    assert not network.training
    assert not network.decoder.deep_supervision
    assert (network.ct_channel, network.pet_channel, network.patch_size) == (0, 1, (512, 512))


def test_what_the_training_script_saves_beside_the_weights_is_ignored(tmp_path, released_shapes):
    content = {
        "model": {f"module.{name}": tensor for name, tensor in stand_in(released_shapes).items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 6e-5}]},
        "epoch": 49,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(lr=6e-5, device="cuda", output_dir=None),
    }
    torch.save(content, tmp_path / "CIPA.pth")
    network = load_cipa_checkpoint(str(tmp_path / "CIPA.pth"))
    assert all(not tensor.any() for tensor in network.state_dict().values())


class RunsCode:
    """Unpickled, creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write(path: Path, content) -> None:
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)


def error_of(path: Path, load) -> str:
    """The one line with which reading a wrong file ends."""
    with pytest.raises(WeightsFileError) as caught:
        load(path)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    return message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a PyTorch checkpoint, or is cut short"),
        (b"<html>404: Not Found</html>", "is not a PyTorch checkpoint, or is cut short"),
        (bytes(range(256)) * 40, "is not a PyTorch checkpoint, or is cut short"),
        ([torch.zeros(3)], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({}, "holds no tensors"),
        ({"model": {}}, "holds no tensors"),
        ({"model": 3}, "its entry 'model' is a int, not a tensor"),
        ({"network_weights": {"a": torch.zeros(1)}, "epoch": 3}, "its entry 'network_weights' is a dict, not a tensor"),
        ({"model": {"a": torch.zeros(1), "b": [1]}}, "its entry 'b' is a list, not a tensor"),
    ],
    ids=lambda value: repr(value)[:25],
)
def test_a_file_that_is_no_checkpoint(tmp_path, content, said):
    write(tmp_path / "weights.pth", content)
    message = error_of(tmp_path / "weights.pth", load_cipa_checkpoint)
    assert said in message
    assert "backbone.vssm.patch_embed.0.weight" in message


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.3, 0.5, 0.999])
def test_a_truncated_file(tmp_path, zipped, kept):
    path = tmp_path / "weights.pth"
    tensors = {str(i): torch.randn(100) for i in range(30)}
    torch.save({"model": tensors}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    message = error_of(path, load_cipa_checkpoint)
    assert "cut short" in message
    assert "so that backbone.vssm.patch_embed.0.weight and all after it are missing" in message


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "no.pth"))):
        load_cipa_checkpoint(tmp_path / "no.pth")
    assert "is a folder" in error_of(tmp_path, load_cipa_checkpoint)


@pytest.mark.parametrize("protocol", ["torch", "plain pickle"])
def test_code_in_a_file_is_not_run(tmp_path, protocol):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    content = {"model": {"a": torch.zeros(1)}, "args": RunsCode(trace)}
    write(path, content if protocol == "torch" else pickle.dumps(content["args"], protocol=2))
    message = error_of(path, load_cipa_checkpoint)
    assert not trace.exists()
    assert "could run any code" in message
    assert "Path" in message or "getattr" in message


MAP_WEIGHT = "backbone.cross_mamba.1.channel_weights.mlp.1.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decode_head.norm_up.weight": None}, "decode_head.norm_up.weight of shape [96] is missing"),
        (
            {"backbone.vssm.outnorm1.bias": None, "decode_head.norm_up.weight": None},
            "backbone.vssm.outnorm1.bias of shape [192] is missing (and 1 more)",
        ),
        # A smaller map must be refused here, although CRM can adapt.
        ({MAP_WEIGHT: torch.zeros(96, 1024)}, f"{MAP_WEIGHT} has shape [96, 1024] instead of [96, 4096]"),
        ({"decode_head.output.weight": torch.zeros(2, 96, 1, 1)}, "has shape [2, 96, 1, 1] instead of [1, 96, 1, 1]"),
        ({"decode_head.output.bias": torch.zeros(1)}, "decode_head.output.bias of shape [1] is unexpected"),
        ({"encoder.outnorm0.weight": torch.zeros(96)}, "encoder.outnorm0.weight of shape [96] is unexpected"),
        ({"decode_head.norm_up.bias": torch.zeros(96).long()}, "decode_head.norm_up.bias holds torch.int64 instead of"),
        ({"decode_head.norm_up.bias": torch.zeros(96).to_sparse()}, "decode_head.norm_up.bias is a sparse tensor"),
        ({"decode_head.norm_up.bias": torch.full((96,), torch.nan)}, "norm_up.bias holds values that are not finite"),
    ],
    ids=["missing", "two missing", "map", "misshapen", "unexpected", "our own name", "integers", "sparse", "NaN"],
)
def test_a_checkpoint_with_a_tensor_wrong(tmp_path, released_shapes, change, said):
    tensors = stand_in(released_shapes) | change
    torch.save({"model": {name: t for name, t in tensors.items() if t is not None}}, tmp_path / "CIPA.pth")
    assert said in error_of(tmp_path / "CIPA.pth", load_cipa_checkpoint)


def imagenet_file(path: Path, network: CIPA, older: bool) -> dict[str, torch.Tensor]:
    """Write random weights of the encoder as VMamba's authors do; return them by our names."""
    shapes = {
        f"backbone.vssm.{name}": tensor.shape
        for name, tensor in network.encoder.state_dict().items()
        if "outnorm" not in name
    }
    weights = transcription.random_weights_like(shapes, seed=7)
    theirs = {}
    for name, tensor in weights.items():
        key = name[len("backbone.vssm.") :].replace("op.conv.", "op.conv2d.")
        if older:
            key = key.replace("patch_embed.0", "patch_embed.proj").replace("patch_embed.2", "patch_embed.norm")
            key = key.replace(".op.", ".self_attention.")
            key = re.sub(r"(blocks\.\d+\.)norm", r"\1ln_1", key)
        theirs[key] = tensor
    prefix = "" if older else "classifier."
    theirs |= {f"{prefix}norm.weight": torch.ones(5), f"{prefix}head.weight": torch.ones(1000, 5)}
    torch.save({"model": theirs}, path)
    return {name.replace("backbone.vssm.", "encoder."): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("older", [False, True])
def test_imagenet_weights_fill_the_encoder_and_nothing_else(tmp_path, older):
    network = build((64, 64))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights = imagenet_file(tmp_path / "vmamba.pth", network, older)
    loaded = load_vmamba_encoder(network, tmp_path / "vmamba.pth")
    assert sorted(loaded) == sorted(weights)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights.get(name, before[name])), name
    assert {name for name in before if name.startswith("encoder.") and name not in weights} == {
        f"encoder.outnorm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")
    }


def test_older_and_newer_names():
    for older, newer, ours in (
        ("patch_embed.proj.weight", "patch_embed.0.weight", "encoder.patch_embed.0.weight"),
        ("patch_embed.norm.bias", "patch_embed.2.bias", "encoder.patch_embed.2.bias"),
        ("layers.2.blocks.8.ln_1.weight", "layers.2.blocks.8.norm.weight", "encoder.layers.2.blocks.8.norm.weight"),
        (
            "layers.0.blocks.1.self_attention.conv2d.bias",
            "layers.0.blocks.1.op.conv2d.bias",
            "encoder.layers.0.blocks.1.op.conv.bias",
        ),
        (
            "layers.1.downsample.norm.weight",
            "layers.1.downsample.norm.weight",
            "encoder.layers.1.downsample.norm.weight",
        ),
    ):
        assert vmamba_name(older) == vmamba_name(newer) == ours


def test_an_encoder_of_another_size_is_refused(tmp_path):
    path = tmp_path / "vmamba.pth"
    imagenet_file(path, build((64, 64), depths=(1, 1, 1, 1)), older=True)
    message = error_of(path, lambda p: load_vmamba_encoder(build((64, 64)), p))
    assert "VMamba-Tiny" in message
    assert ": layers.1.blocks.1.norm.weight of shape [64] is missing (and 12 more)" in message
    content = torch.load(path)["model"] | {"layers.0.blocks.0.mlp.fc1.weight": torch.zeros(4, 4)}
    torch.save({"model": content}, path)
    message = error_of(path, lambda p: load_vmamba_encoder(build((64, 64), depths=(1, 1, 1, 1)), p))
    assert "layers.0.blocks.0.mlp.fc1.weight of shape [4, 4] is unexpected" in message
    content["layers.0.blocks.0.norm.weight"] = torch.zeros(32)
    torch.save({"model": content}, path)
    message = error_of(path, lambda p: load_vmamba_encoder(build((64, 64), depths=(1, 1, 1, 1)), p))
    assert "holds the same tensor twice" in message
