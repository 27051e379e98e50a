"""CIPA as nnU-Net's plans build it: released form, sizes, protocol, precision, BatchNorm, weights of other patches."""

from __future__ import annotations

import copy
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from nnunet_h2a.networks import CIPA, crm, dcim, ss2d
from nnunet_h2a.networks.cipa import map_geometry
from nnunet_h2a.networks.crm import guess_map, resize_map_weights
from nnunet_h2a.networks.cvss import DropPath
from nnunet_h2a.networks.ss2d import SS1D, SS2D
from nnunet_h2a.networks.vss import MapGeometry, VSSEncoder
from tests.networks.cipa_small import CONV, SMALL, build, random, randomise, to_maps, to_tokens

TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}
RELEASED = Path(__file__).resolve().parents[2].parent / "shared" / "cipa-state-dict.txt"

#: Ours to released, in this order; the reverse of how the released weights are read.
RENAMED = (
    (r"^encoder\.", "backbone.vssm."),
    (r"^crm\.(\d)\.mlp", r"backbone.cross_mamba.\1.channel_weights.mlp"),
    (r"^dcim\.(\d)\.ct_convs", r"backbone.region_patch.\1.inner_convs"),
    (r"^dcim\.(\d)\.pet_convs", r"backbone.region_patch.\1.outer_convs"),
    (r"^dcim\.(\d)\.local_norm", r"backbone.channel_attn_mamba.\1.inner_norm1"),
    (r"^dcim\.(\d)\.local_scan", r"backbone.channel_attn_mamba.\1.inner_attn"),
    (r"^dcim\.(\d)\.region_norm", r"backbone.channel_attn_mamba.\1.outer_norm1"),
    (r"^dcim\.(\d)\.region_scan", r"backbone.channel_attn_mamba.\1.outer_attn"),
    (r"^decoder\.seg_layers\.0", "decode_head.output"),
    (r"^decoder\.", "decode_head."),
    (r"\.conv\.", ".conv2d."),
)


# ---- the released form


@pytest.mark.skipif(not RELEASED.is_file(), reason="needs ../shared/cipa-state-dict.txt beside the checkout")
def test_names_and_shapes_are_those_of_the_released_weights():
    with torch.device("meta"):
        network = CIPA(2, 8, 32, nn.Conv2d, 3, 2, num_classes=1)
    ours = {}
    for name, tensor in network.state_dict().items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        ours[name] = tuple(tensor.shape)
    released = {}
    for line in RELEASED.read_text().splitlines():
        name, shape = line.split(" ", 1)
        released[name] = tuple(int(n) for n in re.findall(r"\d+", shape))
    assert ours == released


@pytest.mark.parametrize(
    ("use_crm", "use_dcim", "published"),
    [(True, True, 54.572), (False, False, 33.92), (True, False, 36.32), (False, True, 52.17)],
)
def test_parameter_counts_are_the_published_ones(use_crm, use_dcim, published):
    with torch.device("meta"):
        network = CIPA(2, 8, 32, nn.Conv2d, 3, 2, num_classes=1, use_crm=use_crm, use_dcim=use_dcim)
    count = sum(p.numel() for p in network.parameters())
    assert round(count / 1e6, 3 if published == 54.572 else 2) == published
    assert use_crm != use_dcim or not use_crm or count == 54_572_198


def test_whole_network_is_its_blocks_in_the_described_order():
    network = randomise(build(num_classes=3))
    encoder, decoder = network.encoder, network.decoder
    x = random(2, 2, 64, 64)

    def encode(image):
        maps, t = [], encoder.patch_embed[2](to_tokens(encoder.patch_embed[0](image.expand(-1, 3, -1, -1))))
        for i, stage in enumerate(encoder.layers):
            for block in stage.blocks:
                t = t + block.op(block.norm(t))
            maps.append(encoder.get_submodule(f"outnorm{i}")(t))
            t = stage.downsample(t) if i < 3 else t
        return maps

    fused = []
    for i, (ct, pet) in enumerate(zip(encode(x[:, :1]), encode(x[:, 1:]), strict=True)):
        fused.append(ct + pet + network.dcim[i](*network.crm[i](ct, pet)))
    assert [m.shape[1] for m in fused] == [16, 8, 4, 2]
    t = decoder.layers_up[0](fused[3])
    for stage, skip in zip(decoder.layers_up[1:], fused[2::-1], strict=True):
        for block in stage.blocks:
            t = block(t + skip) if block is stage.blocks[0] else block(t)
        t = stage.upsample(t) if stage.upsample is not None else t
    t = to_maps(decoder.up(decoder.norm_up(t)))
    expected = torch.einsum("oc,bchw->bohw", decoder.seg_layers[0].weight[:, :, 0, 0], t)
    torch.testing.assert_close(network(x), expected, **TOLERANCE)


@pytest.mark.parametrize(("use_crm", "use_dcim"), [(False, False), (True, False), (False, True)])
def test_switches_leave_modules_out(use_crm, use_dcim):
    network = randomise(build(use_crm=use_crm, use_dcim=use_dcim))
    assert (len(network.crm), len(network.dcim)) == (4 * use_crm, 4 * use_dcim)
    ct, pet = random(2, 1, 16, 16, 4)
    expected = (
        network.dcim[0](ct, pet) + ct + pet if use_dcim else sum(network.crm[0](ct, pet) if use_crm else (ct, pet))
    )
    torch.testing.assert_close(network._fuse(0, ct, pet), expected, **TOLERANCE)
    network.float().train()(torch.randn(2, 2, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


# ---- sizes


@pytest.mark.parametrize("size", [(40, 70), (33, 32), (64, 96), (20, 40, 33)])
def test_any_size_is_padded_at_its_end_and_cropped(size):
    padded = tuple(-(-n // 32) * 32 for n in size)
    x = torch.randn(1, 2, *size)
    by_hand = torch.zeros(1, 2, *padded)
    by_hand[(..., *(slice(n) for n in size))] = x
    for options in ({"use_crm": False}, {"patch": size}):
        network = build(**{"patch": padded, **options}).eval()
        with torch.no_grad():
            logits, expected = network(x), network(by_hand)
        assert logits.shape == (1, 2, *size)
        assert torch.equal(logits, expected[(..., *(slice(n) for n in size))])


def test_an_input_of_another_size_is_named_unless_there_is_no_crm():
    network = build((40, 64))
    assert network.padded_patch == (64, 64)
    network(torch.randn(1, 2, 50, 33))  # pads to the same maps
    with pytest.raises(ValueError, match=r"input of size \[64, 65\] does not fit; .* patch_size=\[64, 65\]"):
        network(torch.randn(1, 2, 64, 65))
    with pytest.raises(ValueError, match=r"input of size \[8, 64, 64\] does not fit"):
        network(torch.randn(1, 2, 8, 64, 64))
    assert build((40, 64), use_crm=False)(torch.randn(1, 2, 64, 65)).shape == (1, 2, 64, 65)


def test_maps_that_do_not_double_are_met():
    """An encoder of its own may merge odd maps; the decoder resizes to the skip."""
    network = build(use_crm=False)
    encoder = network.encoder
    maps = encoder(torch.randn(2, 3, 36, 20))
    assert [tuple(m.shape[1:3]) for m in maps] == [(9, 5), (5, 3), (3, 2), (2, 1)]
    assert network.decoder(maps).shape == (2, 2, 36, 20)


@pytest.mark.parametrize(
    ("strides", "embedding", "merges"),
    [
        ([1, 2, 2, 2, 2, 2], (4, 4, 4), [(2, 2, 2)] * 3),
        ([1, 2, 2], (4, 4, 4), [(2, 2, 2)] * 3),
        ([1, 2], (2, 2, 2), [(2, 2, 2)] * 3),
        ([[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]], (1, 4, 4), [(2, 2, 2)] * 2 + [(1, 2, 2)]),
        ([[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2], [1, 2, 2]], (2, 4, 4),
         [(2, 2, 2), (1, 2, 2), (1, 2, 2)]),
        ([1, 4, 3, [1, 3, 4]], (4, 4, 4), [(1, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ([[1, 1, 1], [1, 3, 2], [1, 1, 1]], (1, 3, 2), [(2, 2, 2)] * 3),
    ],
)  # fmt: skip
def test_3d_maps_follow_the_plan(strides, embedding, merges):
    axes = [[s] * 3 if isinstance(s, int) else s for s in strides]
    geometry = map_geometry(axes)
    assert geometry == MapGeometry(embedding, tuple(merges))
    assert map_geometry([s[:2] for s in axes]) == MapGeometry((4, 4), ((2, 2),) * 3)
    patch = tuple(2 * t - (t > 2) for t in geometry.total)
    network = build(patch, strides=strides, deep_supervision=True)
    (logits,) = network(torch.randn(2, 2, *patch))
    assert logits.shape == (2, 2, *patch)
    logits.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_default_patches():
    with torch.device("meta"):
        flat, solid = (CIPA(2, 3, 32, CONV[dims], 3, (1, 2, 2), 2, **SMALL) for dims in (2, 3))
    assert flat.patch_size == (512, 512)
    assert solid.patch_size == (64, 128, 128)
    assert [module.map_size for module in solid.crm] == [(16, 32, 32), (8, 16, 16), (4, 8, 8), (2, 4, 4)]


def test_2d_plans_change_nothing():
    torch.manual_seed(0)
    first = CIPA(2, 8, 32, nn.Conv2d, 3, 2, 2, patch_size=(32, 64), **SMALL).eval()
    torch.manual_seed(0)
    second = CIPA(
        2, 3, (8, 16, 24), nn.Conv2d, ((1, 3), (3, 3), (5, 5)), ((1, 1), (1, 2), (2, 2)), 2,
        patch_size=(32, 64), region_based=True, **SMALL,
    ).eval()  # fmt: skip
    x = torch.randn(1, 2, 32, 64)
    assert torch.equal(first(x), second(x))
    assert list(first.state_dict()) == list(second.state_dict())


# ---- nnU-Net's protocol


def test_deep_supervision_is_a_list_of_one():
    network = build(deep_supervision=True).eval()
    keys, x = list(network.state_dict()), torch.randn(1, 2, 64, 64)
    (logits,) = network(x)
    network.decoder.deep_supervision = False
    assert torch.equal(network(x), logits)
    assert list(build().state_dict()) == keys


def test_channels_by_name_and_cascade_channels_reach_the_shared_encoder():
    network = build(input_channels=4).eval()
    assert network.encoder.patch_embed[0].in_channels == 3 + 2
    swapped = build(input_channels=4, ct_channel=2, pet_channel=0).eval()
    seen = []
    network.encoder.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 4, 64, 64)
    with torch.no_grad():
        logits = network(x)
        assert torch.equal(swapped(x[:, [1, 2, 0, 3]]), logits)
    assert torch.equal(seen[0], torch.cat([x[:, [0, 0, 0, 2, 3]], x[:, [1, 1, 1, 2, 3]]]))
    assert not torch.equal(swapped(x), logits)


@pytest.mark.parametrize("patch", [(64, 96), (32, 64, 32)])
@pytest.mark.parametrize("switches", [{}, {"use_crm": False, "use_dcim": False}])
def test_feature_map_size_counts_what_is_written(patch, switches, monkeypatch):
    strides = [[1] * len(patch), [1, 2, 2][-len(patch) :], [2] * len(patch)]
    network = build(patch, strides=strides, **switches)
    written = 0

    def scan(u, delta, A, B, C, **options):
        # What goes in was written by the projections: delta of every channel, and B's, C's and delta's R rows.
        nonlocal written
        block_rank = math.ceil(u.shape[1] / B.shape[1] / 2 / 16)
        written += 2 * u.numel() + B.numel() + C.numel() + block_rank * u.shape[0] * B.shape[1] * u.shape[2]
        return u

    def count(module, inputs, output):
        nonlocal written
        # Both modalities are one sample of the network; the encoder's batch counts them already.
        written += output.numel()

    monkeypatch.setattr(ss2d, "selective_scan", scan)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(count)
    with torch.no_grad():
        network.eval()(torch.randn(1, 2, *patch))
    assert network.compute_conv_feature_map_size(patch) == written
    assert network.compute_conv_feature_map_size([n - 1 for n in patch]) == written


def test_initialisation_leaves_the_scans_alone():
    torch.manual_seed(0)
    network = CIPA(2, 3, 8, nn.Conv2d, 3, 1, 2, patch_size=(64, 64), **SMALL)
    before = copy.deepcopy(network.state_dict())
    network.apply(network.initialize)
    scan = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds", "scale1", "scale2", "op.conv.weight")
    for name, tensor in network.state_dict().items():
        if name.endswith(scan):
            assert torch.equal(tensor, before[name]), name
        if name.endswith(("in_proj.weight", "expand.weight", "seg_layers.0.weight")):
            assert not torch.equal(tensor, before[name]), name
            assert tensor.abs().max() < 0.1, name
    # Otherwise padding would stay 0 through all LayerNorms, whose gradient is eps^-0.5 there.
    assert (network.encoder.patch_embed[0].bias != 0).all()


def test_no_weight_decay_names_the_scans_parameters():
    network = build()
    names = {name for name, _ in network.named_parameters()}
    exempt = network.no_weight_decay()
    assert exempt <= names
    assert exempt == {n for n in names if n.endswith((".A_logs", ".Ds", ".dt_projs_bias"))}
    blocks = sum(isinstance(m, SS2D | SS1D) for m in network.modules())
    assert len(exempt) == 3 * blocks == 3 * (5 + 4 + 8 + 3)


@pytest.mark.parametrize("extreme", [1.0, 1e3])
@pytest.mark.parametrize("patch", [(64, 64), (32, 32, 32)])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_is_finite_and_scans_are_float32(patch, kind, extreme, monkeypatch):
    network, seen = build(patch), set()
    original = ss2d.selective_scan

    def scan(*tensors, D, delta_bias, **options):
        seen.update(t.dtype for t in (*tensors, D, delta_bias))
        return original(*tensors, D=D, delta_bias=delta_bias, **options)

    monkeypatch.setattr(ss2d, "selective_scan", scan)
    x = extreme * torch.randn(1, 2, *patch)
    x[0, 1] = x[0, 1].clamp(min=-0.5)
    with torch.autocast("cpu", kind):
        logits = network(x)
        logits.float().square().mean().backward()
    assert logits.dtype == kind
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    assert all(torch.isfinite(b).all() for b in network.buffers())
    assert seen == {torch.float32}


def test_bfloat16_is_close_to_float32():
    network = build().eval()
    x = torch.randn(2, 2, 64, 64)
    with torch.no_grad():
        expected = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x).float()
        pure = network.bfloat16()(x.bfloat16()).float()
    for result in (logits, pure):
        assert (result - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_batch_statistics_are_float32_under_autocast():
    """At a mean of 200 and a deviation of 0.1 bfloat16 has one digit; the statistics must not be taken in it."""
    layers = dcim.conv_batch_norm_relu(nn.Conv2d, [1, 2], [1])
    with torch.no_grad():
        layers[0].weight.zero_()
        layers[0].weight[:, 0, 1, 1] = 1
        layers[0].bias.fill_(200)
    x = 0.1 * torch.randn(4, 1, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        layers(x)
    torch.testing.assert_close(layers[1].running_mean, torch.full((2,), 20.0), atol=0.05, rtol=0)


@pytest.mark.full
@pytest.mark.parametrize("patch", [(40, 64), (32, 32, 32)])
def test_compiles_without_graph_breaks(patch):
    """In training, where BatchNorm and stochastic depth have branches, and where a map is one value."""
    network = build(patch, depths=(1, 1, 1, 1), deep_supervision=True)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x = torch.randn(1, 2, *patch)
    torch.manual_seed(0)
    expected = network(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), expected)
    torch._dynamo.reset()


def test_copies_and_pickles():
    network, x = build().eval(), torch.randn(1, 2, 64, 64)
    assert torch.equal(copy.deepcopy(network)(x), network(x))
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"conv_op": nn.Conv1d}, "`conv_op`"),
        ({"n_stages": 0}, "`n_stages`"),
        ({"features_per_stage": [4, 8]}, "`features_per_stage` must have one entry for each of the 3"),
        ({"kernel_sizes": [[3, 3, 3], 3, 3]}, "`kernel_sizes`"),
        ({"strides": [1, 2]}, "`strides`"),
        ({"num_classes": 0}, "`num_classes`"),
        ({"input_channels": 1}, "at least 2"),
        ({"ct_channel": 1, "pet_channel": 1}, "two different channels"),
        ({"pet_channel": 2}, "two different channels"),
        ({"patch_size": [16, 16, 16]}, r"`patch_size` \[16, 16, 16\] does not fit"),
        ({"patch_size": [16, 0]}, r"`patch_size` \[16, 0\] does not fit"),
        ({"widths": (8, 16, 32)}, "`widths`"),
        ({"depths": (2, 2, 0, 2)}, "`depths`"),
        ({"decoder_depth": 0}, "`decoder_depth`"),
        ({"drop_path": 1.0}, "`drop_path`"),
    ],
)
def test_bad_arguments_are_named(overrides, message):
    arguments = {
        "input_channels": 2, "n_stages": 3, "features_per_stage": 8, "conv_op": nn.Conv2d, "kernel_sizes": 3,
        "strides": (1, 2, 2), "num_classes": 2, "patch_size": (32, 32), **SMALL,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        CIPA(**{**arguments, **overrides})


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="`backend`"):
        build(scan_backend="magic")(torch.randn(1, 2, 64, 64))


# ---- stochastic depth and BatchNorm


def test_stochastic_depth_grows_over_stages_1_to_3_and_an_unused_fourth():
    with torch.device("meta"):
        network = CIPA(2, 3, 8, nn.Conv2d, 3, 1, 2)
    rates = [block.drop_path.rate for stage in network.decoder.layers_up[1:] for block in stage.blocks]
    step = 0.1 / 15
    stage_3, stage_2, stage_1 = ([k * step for k in range(first, first + 4)] for first in (8, 4, 0))
    assert rates == pytest.approx(stage_3 + stage_2 + stage_1)
    assert [s.blocks[0].norm1.normalized_shape[0] for s in network.decoder.layers_up[1:]] == [384, 192, 96]
    assert sum(isinstance(m, DropPath) for m in network.modules()) == 12


def test_drop_path_zeroes_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    y = drop(x)
    per_sample = y.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert sorted(set(per_sample[:, 0].tolist())) == pytest.approx([0, 1 / 0.75])
    assert abs(y.mean().item() - 1) < 0.05
    assert torch.equal(drop.eval()(x), x)


def test_a_dropped_branch_still_receives_gradients(monkeypatch):
    network = build(drop_path=0.9)
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.zeros(*size))
    network(torch.randn(2, 2, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    dropped = network.decoder.layers_up[1].blocks[0]
    assert dropped.drop_path.rate > 0
    assert not dropped.op.in_proj.weight.grad.any()


@pytest.mark.parametrize("synchronised", [False, True])
def test_one_value_per_channel_is_normalised_by_the_running_statistics(synchronised):
    network = build((32, 32))
    if synchronised:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    layers = network.dcim[3].ct_convs
    norm = layers[1]
    assert isinstance(norm, nn.SyncBatchNorm) == synchronised
    with torch.no_grad():
        norm.running_mean.fill_(0.3)
        norm.running_var.fill_(4.0)
    x = torch.randn(1, layers[0].in_channels, 1, 1)
    normed = dcim.batch_norm(norm, layers[0](x))
    torch.testing.assert_close(normed, (layers[0](x) - 0.3) / math.sqrt(4 + 1e-5))
    assert norm.num_batches_tracked == 0
    assert (norm.running_var == 4).all()
    network(torch.randn(1, 2, 32, 32)).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    assert all(torch.isfinite(b).all() for b in network.buffers())
    assert network.dcim[0].ct_convs[1].num_batches_tracked == 1
    # Two values are a batch.
    pair = dcim.batch_norm(norm, layers[0](torch.randn(2, layers[0].in_channels, 1, 1)))
    torch.testing.assert_close(pair.sum(0), torch.zeros_like(pair[0]), atol=1e-5, rtol=0)
    assert norm.num_batches_tracked == 1


# ---- CRM's weights on another patch size


@pytest.mark.parametrize(
    ("positions", "like", "expected"),
    [
        (16384, (96, 96), (128, 128)), (16384, (96, 64), (128, 128)), (24, (2, 3), (4, 6)), (6, (32, 48), (2, 3)),
        (64, (2, 4, 4), (4, 4, 4)), (16384, (2, 4, 4), (16, 32, 32)), (24, (5, 5), None), (24, (3, 7), None),
        (1, (2, 3), (1, 1)), (256, (16, 64), (8, 32)),
    ],
)  # fmt: skip
def test_the_old_map_is_guessed(positions, like, expected):
    assert guess_map(positions, like) == expected


def test_weights_of_another_patch_size_are_adapted_with_a_warning():
    source, target = build((64, 64)), build((128, 64))
    weights = source.state_dict()
    with pytest.warns(UserWarning, match=r"crm\.\d\.mlp\.\d\.\w+ belongs to a map of .* interpolated") as caught:
        target.load_state_dict(weights)
    assert len(caught) == 3 * 4
    loaded = target.state_dict()
    for name, tensor in loaded.items():
        stage = int(name[4]) if name.startswith("crm.") else None
        if name.endswith(crm.CRM.MAP_WEIGHTS):
            side = 16 >> stage
            expected = resize_map_weights(weights[name], (side, side), (2 * side, side))
            torch.testing.assert_close(tensor, expected)
        else:
            assert torch.equal(tensor, weights[name]), name
    assert weights["crm.0.mlp.0.weight"].shape == (256,)  # the caller's dictionary is left alone
    assert torch.isfinite(target(torch.randn(1, 2, 128, 64))).all()


def test_weights_of_an_unknown_map_are_refused_by_name():
    target = build((64, 64))
    weights = build((64, 96)).state_dict()
    with pytest.raises(ValueError, match=r"crm\.0\.mlp\.0\.weight has 384 positions"):
        target.load_state_dict(weights)


def test_encoder_alone_names_its_operation():
    with pytest.raises(ValueError, match="`conv_op`"):
        VSSEncoder(3, (4, 4, 4, 4), (1, 1, 1, 1), nn.Conv1d, MapGeometry((4, 4), ((2, 2),) * 3))
