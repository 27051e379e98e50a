"""ISA-Net's blocks and the whole network against a plain float64 transcription, and what nnU-Net's plans ask of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_h2a.networks import ISANet
from nnunet_h2a.networks.isa import ISA, weight_map, widen_kernel
from nnunet_h2a.networks.plan_geometry import expand_per_stage
from nnunet_h2a.networks.precision import InstanceNorm
from nnunet_h2a.networks.ripm_drim import DRIM, RIPM, ResidualModule
from nnunet_h2a.widths import published_features
from tests.networks import isanet_transcription as transcription
from tests.networks.plans import PLANS, Plan
from tests.networks.test_h2aseg_equations import randomise

TOLERANCE = {"atol": 1e-9, "rtol": 1e-9}
CONV = {2: nn.Conv2d, 3: nn.Conv3d}


def build(plan: Plan, **overrides) -> ISANet:
    torch.manual_seed(0)
    network = ISANet(**plan.keywords(**overrides))
    network.apply(network.initialize)
    return network


def loss_of(outputs) -> torch.Tensor:
    """Touches every level's every class unevenly."""
    return sum((k + 1) * o.float().square().mean() for k, o in enumerate(outputs))


def geometry(plan: Plan):
    """Kernels and strides per level and axis."""
    stages, dims = len(plan.features), len(plan.patch)
    return (expand_per_stage(v, stages, dims, "") for v in (plan.kernel_sizes, plan.strides))


@pytest.mark.parametrize(
    "size", [(2, 5, 5), (3, 4, 6), (2, 6, 4), (2, 1, 3), (2, 3, 1), (1, 1, 1), (5, 5), (4, 6), (7, 3)]
)
def test_weight_map_is_equations_5_to_8(size):
    query, key = 3 * torch.rand(2, 2, 3, *size, dtype=torch.float64)
    result = weight_map(query, key)
    assert result.shape == query.shape
    torch.testing.assert_close(result, transcription.weight_map(query, key), **TOLERANCE)
    torch.testing.assert_close(result.flatten(2).sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_weight_map_multiplies_the_last_two_axes():
    """One query in row 1, column 2, and one key in row 2: U is the key's row 2, put into row 1."""
    query, key = torch.zeros(1, 1, 1, 3, 3), torch.zeros(1, 1, 1, 3, 3)
    query[..., 1, 2] = 1
    key[..., 2, :] = torch.tensor([5.0, 6.0, 7.0])
    expected = torch.zeros(3, 3)
    expected[1] = torch.tensor([5.0, 6.0, 7.0])
    torch.testing.assert_close(weight_map(query, key)[0, 0, 0], torch.softmax(expected.flatten(), 0).reshape(3, 3))


@pytest.mark.parametrize(
    ("size", "kernel"),
    [
        ((4, 6, 6), (3, 3, 3)),
        ((3, 4, 7), (1, 3, 3)),
        ((3, 7, 4), (3, 3, 3)),
        ((6, 6), (3, 3)),
        ((5, 8), (5, 3)),
        ((2, 1, 1), (3, 3, 3)),
    ],
)
def test_isa_is_equations_2_to_8(size, kernel):
    module = randomise(ISA(CONV[len(size)], 3, kernel))
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(module(x), transcription.isa(module, x, kernel), **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(module(x), transcription.isa(module, x, kernel), **TOLERANCE)
    # What is computed twice for the backward pass must give the plain formula's gradients.
    parameters = [x, *module.parameters()]
    weights = torch.randn(module(x).shape, dtype=torch.float64)
    ours = torch.autograd.grad((module(x) * weights).sum(), parameters)
    plain = torch.autograd.grad((transcription.isa(module, x, kernel) * weights).sum(), parameters)
    for result, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(result, expected, **TOLERANCE)


def test_the_key_kernel_is_wider_where_the_plan_convolves():
    assert [widen_kernel(k) for k in ((3, 3, 3), (1, 3, 3), (3, 3), (5, 1))] == [(5, 5, 5), (1, 5, 5), (5, 5), (7, 1)]


@pytest.mark.parametrize(("size", "kernel"), [((3, 4, 5), (3, 3, 3)), ((4, 5, 6), (1, 3, 3)), ((6, 5), (3, 5))])
def test_residual_module_is_equation_1(size, kernel):
    module = randomise(ResidualModule(CONV[len(size)], 2, 3, kernel))
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    torch.testing.assert_close(module(x), transcription.residual(module, x, kernel), **TOLERANCE)


@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm_is_pytorchs(affine):
    ours, theirs = InstanceNorm(channels=3 if affine else None), nn.InstanceNorm3d(3, affine=affine)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(ours.double()(x), theirs(x), **TOLERANCE)
    assert torch.isfinite(ours(torch.randn(2, 3, 1, 1, 1, dtype=torch.float64))).all()


@pytest.mark.parametrize("modalities", ["both", "pet", "ct"])
@pytest.mark.parametrize("name", ["three stages", "anisotropic 28x64x56", "cascade", "2d", "2d anisotropic"])
def test_whole_network_is_the_transcription(name, modalities):
    plan = PLANS[name]
    network = randomise(build(plan, deep_supervision=True, modalities=modalities))
    x = plan.input(batch=1, dtype=torch.float64)
    branches = ("pet", "ct") if modalities == "both" else (modalities,)
    with torch.no_grad():
        expected = transcription.isanet(network, x, *geometry(plan), branches)
        results = network(x)
        assert len(results) == len(plan.features) - 1
        for result, level in zip(results, expected, strict=True):
            torch.testing.assert_close(result, level, atol=1e-7, rtol=1e-7)


def test_one_channel_is_the_named_modality():
    plan = PLANS["three stages"]
    x = plan.input(batch=1, dtype=torch.float64)
    for modality, channel in (("ct", 0), ("pet", 1)):
        alone = randomise(build(plan, input_channels=1, modalities=modality))
        picked = build(plan, modalities=modality).double()
        picked.load_state_dict(alone.state_dict())
        swapped = build(plan, modalities=modality, ct_channel=1, pet_channel=0).double()
        swapped.load_state_dict(alone.state_dict())
        with torch.no_grad():
            expected = transcription.isanet(alone, x[:, channel : channel + 1], *geometry(plan), (modality,))[0]
            torch.testing.assert_close(alone(x[:, channel : channel + 1]), expected, atol=1e-7, rtol=1e-7)
            assert torch.equal(picked(x), alone(x[:, channel : channel + 1]))
            assert torch.equal(swapped(x[:, [1, 0]]), picked(x))


@pytest.mark.parametrize(("modality", "channel"), [("ct", 0), ("pet", 1)])
def test_a_cascade_without_the_other_modality(modality, channel):
    """One image channel and two of the previous stage, as with both images but the other left out."""
    plan = PLANS["cascade"]
    x = plan.input(batch=1)
    with_both = build(plan, modalities=modality)
    other = {"ct": "pet_channel", "pet": "ct_channel"}[modality]
    alone = build(plan, input_channels=3, modalities=modality, **{f"{modality}_channel": 2, other: None})
    alone.load_state_dict(with_both.state_dict())
    assert torch.equal(alone(x[:, [2, 3, channel]]), with_both(x))


@pytest.mark.parametrize("modality", ["ct", "pet"])
def test_a_single_branch_has_no_trace_of_the_other(modality):
    network = build(PLANS["three stages"], deep_supervision=True, modalities=modality)
    other = {"ct": "pet", "pet": "ct"}[modality]
    assert not [name for name, _ in network.named_parameters() if f".{other}." in name]
    outputs = network(PLANS["three stages"].input())
    loss_of(outputs).backward()
    assert all(p.grad is not None for p in network.parameters())
    x = PLANS["three stages"].input()
    changed = x.clone()
    changed[:, {"ct": 1, "pet": 0}[modality]] += 1
    assert torch.equal(network(changed)[0], network(x)[0])


def test_pet_reaches_ct_at_every_level_and_not_the_other_way_round():
    plan = PLANS["three stages"]
    network = build(plan, deep_supervision=True)
    x = plan.input(batch=1).requires_grad_()
    for logits in network(x):
        (gradient,) = torch.autograd.grad(logits.square().sum(), x, retain_graph=True)
        assert gradient[:, 0].abs().sum() > 0
        assert gradient[:, 1].abs().sum() > 0
    seen = {}
    for branch in ("ct", "pet"):
        for level in network.decoder.branches[branch]:
            level.register_forward_hook(lambda m, i, o, branch=branch: seen.setdefault(branch, []).append(o))
    network(x)
    for pet in seen["pet"]:
        (gradient,) = torch.autograd.grad(pet.square().sum(), x, retain_graph=True)
        assert gradient[:, 0].abs().sum() == 0


def paper_parameters(branch: str) -> int:
    """The paper's network counted by hand: five levels, 16 to 256 channels."""

    def residual(inputs, c):
        return 27 * inputs * c + inputs * c + 27 * c * c + 3 * 2 * c

    def isa(c):
        channel_attention = c * 2 * c + 2 * c + 2 * c * c + c
        return channel_attention + (27 + 125 + 1) * c * c + 3 * 2 * c + 2 * c * c + c

    widths = [16, 32, 64, 128, 256]
    total = sum(residual(i, c) + isa(c) for i, c in zip([1, *widths[:-1]], widths, strict=True))
    maps = 3 if branch == "ct" else 2
    for below, c in zip(widths[1:], widths[:-1], strict=True):
        total += 8 * below * c + c + residual(maps * c, c) + isa(c)
    return total


def test_the_papers_network():
    assert published_features("ISANet", 7) == [16, 32, 64, 128, 256, 256, 256]
    network = ISANet(
        input_channels=2, n_stages=5, features_per_stage=published_features("ISANet", 5), conv_op=nn.Conv3d,
        kernel_sizes=3, strides=(1, 2, 2, 2, 2), num_classes=2, deep_supervision=True,
    )  # fmt: skip
    heads = sum(2 * c + 2 for c in (16, 32, 64, 128))
    total = sum(p.numel() for p in network.parameters())
    assert total == paper_parameters("ct") + paper_parameters("pet") + heads == 46_774_088
    with torch.no_grad():
        outputs = network(torch.randn(1, 2, 32, 32, 32))
    assert [tuple(o.shape) for o in outputs] == [(1, 2, 32 >> k, 32 >> k, 32 >> k) for k in range(4)]


def test_state_is_the_same_in_both_modes():
    plan = PLANS["anisotropic 28x64x56"]
    network = build(plan, deep_supervision=True)
    x = plan.input(batch=1)
    with torch.no_grad():
        several = network(x)
        network.decoder.deep_supervision = False
        single = network(x)
    assert [tuple(o.shape[2:]) for o in several] == [(28, 64, 56), (28, 32, 28), (14, 16, 14)]
    assert torch.equal(single, several[0])
    assert list(build(plan).state_dict()) == list(network.state_dict())
    heads = [key for key in network.state_dict() if key.startswith("decoder.seg_layers.")]
    assert len(heads) == 2 * 3


def test_every_parameter_learns_the_channel_weights_too():
    plan = Plan((16, 16, 16), (8, 8, 8), (1, 2, 2))
    network = build(plan, deep_supervision=True)
    loss_of(network(plan.input())).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_float32_under_autocast(dtype, monkeypatch):
    """From the same branches' outputs, W and W * X_v must not know that autocast is on."""
    seen = []

    def record(query, key):
        seen.append((query.dtype, key.dtype, weight_map(query, key)))
        return seen[-1][2]

    monkeypatch.setattr("nnunet_h2a.networks.isa.weight_map", record)
    torch.manual_seed(0)
    module = ISA(nn.Conv3d, 4, (3, 3, 3))
    with torch.no_grad():
        # W spread over all positions, as in a large map, and small values: fp16 has no digits for W * X_v.
        for branch in (module.query, module.key):
            branch[1].weight.mul_(1e-2)
        module.value[1].weight.mul_(1e-3)
    x = torch.randn(1, 4, 16, 16, 16)
    branches = {}
    for name in ("query", "key", "value"):
        getattr(module, name).register_forward_hook(lambda m, i, o, name=name: branches.update({name: o}))
    with torch.autocast("cpu", dtype):
        module(x).sum().backward()
    assert branches["query"].dtype == dtype
    assert {(q, k, w.dtype) for q, k, w in seen} == {(torch.float32, torch.float32, torch.float32)}
    query, key, value = (branches[name].detach().double() for name in ("query", "key", "value"))
    expected = transcription.weight_map(query, key)
    torch.testing.assert_close(seen[0][2].detach().double(), expected, atol=0, rtol=1e-5)
    # The gradient of the attended half of the output convolution sees W * X_v with all its digits.
    assert (expected * value).max() < torch.finfo(torch.float16).tiny
    attended = (expected * value).flatten(2).sum(-1)
    torch.testing.assert_close(
        module.fuse.weight.grad[:, :4].flatten(1).double(), attended.expand(4, 4), atol=0, rtol=1e-4
    )


@pytest.mark.parametrize("largest", [40.0, 1e3])
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "anisotropic 28x64x56"), (torch.float16, "cascade")])
def test_extreme_inputs_stay_finite(dtype, name, largest):
    plan = PLANS[name]
    network = build(plan, deep_supervision=True)
    x = plan.input(batch=1) * (largest / 40)
    assert x.max() == largest
    with torch.autocast("cpu", dtype):
        outputs = network(x)
        loss_of(outputs).backward()
    assert all(torch.isfinite(o).all() for o in outputs)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("size", [(1, 4, 16, 16, 16), (1, 4, 8, 16, 24)])
def test_the_attention_keeps_no_map_of_its_own_for_the_backward_pass(size):
    """Input, scaled input, and for each of three branches what its norm and its ReLU keep: eight maps."""
    module = ISA(nn.Conv3d, 4, (3, 3, 3))
    x = torch.randn(size, requires_grad=True)
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    maps = [tensor for tensor in storages.values() if tensor.numel() == x.numel()]
    assert len(maps) == 8
    assert max(tensor.numel() for tensor in storages.values()) == x.numel()


class WrittenElements(TorchDispatchMode):
    """Counts the elements that convolutions and matrix products of maps write."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.bmm):
            self.elements += result.numel()
        return result


@pytest.mark.parametrize("modalities", ["both", "pet"])
@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("name", ["three stages", "anisotropic 28x64x56", "2d anisotropic"])
def test_feature_map_size_counts_what_is_written(name, deep_supervision, modalities):
    plan = PLANS[name]
    network = build(plan, deep_supervision=deep_supervision, modalities=modalities)
    with torch.no_grad(), WrittenElements() as written:
        network(plan.input(batch=1))
    assert network.compute_conv_feature_map_size(plan.patch) == written.elements


def test_compiles_without_graph_breaks():
    plan = Plan((4, 8, 12), (2, 4, 4), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), kernel_sizes=((1, 3, 3), 3, 3))
    network = build(plan, deep_supervision=True)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x = plan.input(batch=1)
    loss_of(compiled(x)).backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    loss_of(network(x)).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    network.decoder.deep_supervision = False
    torch.testing.assert_close(compiled(x), network(x))
    torch._dynamo.reset()


def test_pooling_and_deconvolution_follow_the_stride():
    level = RIPM(nn.Conv3d, 1, 2, (1, 3, 3), (1, 2, 3))
    assert level(torch.randn(1, 1, 4, 8, 9)).shape == (1, 2, 4, 4, 3)
    up = DRIM(nn.Conv3d, 4, 2, (3, 3, 3), (1, 2, 3), other_maps=2)
    other = torch.randn(1, 2, 4, 8, 9)
    assert up(torch.randn(1, 4, 4, 4, 3), other, other).shape == (1, 2, 4, 8, 9)


def test_a_single_deepest_voxel_is_warned_about_and_runs():
    with pytest.warns(UserWarning, match="single voxel"):
        network = ISANet(2, 4, (2, 2, 4, 4), nn.Conv3d, 3, (1, 2, 2, 2), 2, True, patch_size=(8, 8, 8))
    loss_of(network(torch.randn(1, 2, 8, 8, 8))).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_initialisation_is_hes_for_relu():
    torch.manual_seed(0)
    network = ISANet(2, 2, (32, 32), nn.Conv3d, 3, (1, 2), 2)
    network.apply(network.initialize)
    convolution = network.encoder.branches["ct"][1].residual.first[0]
    assert convolution.weight.std().item() == pytest.approx((2 / (27 * 32)) ** 0.5, rel=0.02)
    assert network.decoder.seg_layers[0].bias.abs().max() == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"conv_op": nn.Conv1d}, "`conv_op`"),
        ({"n_stages": 1}, "`n_stages`"),
        ({"features_per_stage": [4, 8]}, "`features_per_stage` must have one entry for each of the 3"),
        ({"kernel_sizes": [3, 3, 2]}, "`kernel_sizes` must be odd"),
        ({"kernel_sizes": [[3, 3], [3, 3], [3, 3]]}, "`kernel_sizes`"),
        ({"strides": [2, 2, 2]}, "`strides` must begin with 1"),
        ({"strides": [1, 2]}, "`strides`"),
        ({"num_classes": 0}, "`num_classes`"),
        ({"input_channels": 1}, "`input_channels` must be at least 2"),
        ({"input_channels": 0, "modalities": "pet"}, "`input_channels`"),
        ({"ct_channel": 1, "pet_channel": 1}, "`ct_channel` and `pet_channel`"),
        ({"pet_channel": 2}, "`ct_channel` and `pet_channel`"),
        ({"pet_channel": 2, "modalities": "pet"}, "`ct_channel` and `pet_channel`"),
        ({"pet_channel": 2, "ct_channel": None, "modalities": "pet"}, "`pet_channel` must be one of the 2 input"),
        ({"ct_channel": None, "pet_channel": None, "modalities": "ct"}, "`ct_channel` must be one of the 2 input"),
        ({"pet_channel": None}, "`ct_channel` and `pet_channel` must be channel numbers, got 0 and None"),
        ({"pet_channel": None, "modalities": "pet"}, "`ct_channel` and `pet_channel` must be channel numbers"),
        ({"patch_size": [16, 16, 22]}, r"`patch_size` \[16, 16, 22\] does not fit"),
        ({"patch_size": [16, 16]}, r"`patch_size` \[16, 16\] does not fit"),
        ({"modalities": "mr"}, "`modalities` must be one of both, pet, ct, got 'mr'"),
    ],
)
def test_bad_arguments_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        ISANet(**PLANS["three stages"].keywords(**overrides))


@pytest.mark.parametrize("size", [(16, 16, 26), (2, 16, 24), (16, 18, 16)])
def test_an_input_that_does_not_fit_is_named(size):
    network = build(PLANS["three stages"])
    with pytest.raises(ValueError, match=rf"input of size \[{size[0]}, {size[1]}, {size[2]}\] does not fit"):
        network(torch.randn(1, 2, *size))
