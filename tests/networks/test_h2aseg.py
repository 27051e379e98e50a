"""H2ASeg as nnU-Net's plans build it: sizes, gradients, precision, compilation, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from nnunet_h2a.networks import H2ASeg
from nnunet_h2a.networks.h2aseg import attention_windows
from tests.networks.plans import PLANS, Plan

plan_matrix = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
HALF_MAX = 65504


def build(plan, **overrides):
    torch.manual_seed(0)
    network = H2ASeg(**plan.keywords(**overrides))
    network.apply(network.initialize)
    return network


def loss_of(outputs):
    """Touches every level's every class unevenly."""
    return sum((k + 1) * o.float().square().mean() for k, o in enumerate(outputs))


def test_the_papers_network():
    network = H2ASeg(
        input_channels=2, n_stages=5, features_per_stage=(8, 16, 32, 64, 128), conv_op=nn.Conv3d, kernel_sizes=3,
        strides=(1, 2, 2, 2, 2), num_classes=2, deep_supervision=True,
    )  # fmt: skip
    assert network.patch_size == (64, 128, 128)
    assert network.encoder.windows == [(4, 8, 8)] * 5
    x = torch.randn(1, 2, 64, 128, 128)
    with torch.no_grad():
        outputs = network(x)
    assert [tuple(o.shape) for o in outputs] == [(1, 2, 64 >> k, 128 >> k, 128 >> k) for k in range(5)]


@pytest.mark.parametrize(
    ("patch", "strides", "windows"),
    [
        ((128, 128, 128), [1, 2, 2, 2, 2, 2], [(8, 8, 8)] * 5 + [(4, 4, 4)]),
        (
            (28, 256, 224), [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
            [(7, 16, 14)] * 5 + [(7, 8, 7)],
        ),
        ((96, 160, 160), [1, 2, 2, 2, 2, [1, 2, 2]], [(6, 10, 10)] * 5 + [(6, 5, 5)]),
        ((512, 512), [1, 2, 2, 2, 2, 2, 2, 2], [(32, 32)] * 5 + [(16, 16), (8, 8), (4, 4)]),
        ((32, 32, 32), [1, 2, 2], [(8, 8, 8)] * 3),
    ],
)  # fmt: skip
def test_windows_divide_every_level(patch, strides, windows):
    axes = [[s] * len(patch) if isinstance(s, int) else s for s in strides]
    assert attention_windows(patch, axes) == windows


@plan_matrix
def test_shapes_gradients_and_state_in_both_modes(plan):
    network = build(plan, deep_supervision=True)
    keys = list(network.state_dict())
    size = plan.patch
    expected = []
    for stride in plan.strides:
        size = tuple(n // (stride if isinstance(stride, int) else stride[i]) for i, n in enumerate(size))
        expected.append((2, plan.num_classes, *size))
    for step in range(2):
        network.zero_grad(set_to_none=True)
        outputs = network(plan.input(seed=step))
        assert [tuple(o.shape) for o in outputs] == expected
        loss_of(outputs).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    network.decoder.deep_supervision = False
    single = network(plan.input())
    assert single.shape == expected[0]
    network.decoder.deep_supervision = True
    torch.testing.assert_close(network(plan.input())[0], single)
    assert list(build(plan, deep_supervision=False).state_dict()) == keys


@plan_matrix
def test_bfloat16_autocast(plan):
    network = build(plan, deep_supervision=True)
    reference = network(plan.input())[0]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(plan.input())
        loss_of(outputs).backward()
    assert all(torch.isfinite(o).all() for o in outputs)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    difference = (outputs[0].float() - reference).abs().mean() / reference.abs().mean()
    assert difference < 0.15, f"bf16 differs from float32 by {difference:.3f} of the mean logit"


@pytest.mark.parametrize("name", ["regions", "one class", "cascade"])
def test_float16_autocast(name):
    plan = PLANS[name]
    network = build(plan, deep_supervision=True)
    with torch.autocast("cpu", torch.float16):
        outputs = network(plan.input(batch=1))
        loss_of(outputs).backward()
    assert all(torch.isfinite(o).all() for o in outputs)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@plan_matrix
def test_activations_fit_into_float16(plan):
    network = build(plan, deep_supervision=True)
    largest = {}

    def record(name):
        def hook(module, inputs, output):
            for tensor in output if isinstance(output, tuple | list) else [output]:
                if isinstance(tensor, torch.Tensor):
                    largest[name] = max(largest.get(name, 0), tensor.abs().max().item())

        return hook

    for name, module in network.named_modules():
        module.register_forward_hook(record(name))
    with torch.no_grad():
        network(plan.input())
    assert len(largest) > 50
    assert max(largest.values()) < HALF_MAX, max(largest, key=largest.get)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(plan, id=name, marks=[] if name in {"paper strides", "regions", "2d"} else pytest.mark.full)
        for name, plan in PLANS.items()
    ],
)
def test_compiles_without_graph_breaks(plan):
    network = build(plan, deep_supervision=True)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(plan.input()), network(plan.input()))
    network.decoder.deep_supervision = False
    torch.testing.assert_close(compiled(plan.input()), network(plan.input()))
    torch._dynamo.reset()


def test_inductor():
    """Two levels hold every kind of block, and compile in a third of the time of four."""
    plan = Plan((8, 8, 8), (2, 2), (1, 2))
    network = build(plan, deep_supervision=True)
    compiled = torch.compile(network, fullgraph=True)
    x = plan.input(batch=1)
    loss_of(compiled(x)).backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    loss_of(network(x)).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)
    torch._dynamo.reset()


def test_channels_by_name_give_the_same_bits():
    plan = PLANS["three stages"]
    ct_first = build(plan)
    pet_first = build(plan, ct_channel=1, pet_channel=0)
    pet_first.load_state_dict(ct_first.state_dict())
    x = plan.input()
    assert torch.equal(ct_first(x), pet_first(x[:, [1, 0]]))
    assert not torch.equal(ct_first(x), pet_first(x))


def test_cascade_channels_reach_both_branches_in_any_channel_order():
    plan = PLANS["cascade"]
    network = build(plan)
    x = plan.input()
    ct, pet = network.encoder.ct[0].main[0], network.encoder.pet[0].main[0]
    seen = {}
    ct.register_forward_hook(lambda m, i, o: seen.update(ct=i[0].clone()))
    pet.register_forward_hook(lambda m, i, o: seen.update(pet=i[0].clone()))
    network(x)
    assert torch.equal(seen["ct"], x[:, [0, 2, 3]])
    assert torch.equal(seen["pet"], x[:, [1, 2, 3]])
    swapped = build(plan, ct_channel=1, pet_channel=0)
    swapped.load_state_dict(network.state_dict())
    assert torch.equal(swapped(x[:, [1, 0, 2, 3]]), network(x))


@plan_matrix
def test_feature_map_size_counts_what_is_written(plan):
    network = build(plan, deep_supervision=True)
    written = 0

    def count(module, inputs, output):
        nonlocal written
        written += output.numel()

    from nnunet_h2a.networks.mcsa import BDSA

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(count)
        elif isinstance(module, BDSA):
            for projection in (module.project_ct, module.project_pet):
                projection.register_forward_hook(count)
            # The four attentions are the inputs of the two output convolutions.
            for layer in (module.out_ct, module.out_pet):
                layer.register_forward_hook(lambda m, inputs, output: count(m, inputs, inputs[0]))
    with torch.no_grad():
        network(plan.input(batch=1))
    assert network.compute_conv_feature_map_size(plan.patch) == written


def test_copies_and_pickles():
    plan = PLANS["three stages"]
    network, x = build(plan), plan.input()
    assert torch.equal(copy.deepcopy(network)(x), network(x))
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))


def test_half_network_runs():
    plan = PLANS["one class"]
    assert torch.isfinite(build(plan).bfloat16()(plan.input(dtype=torch.bfloat16))).all()


def test_larger_inputs_of_whole_windows_fit():
    plan = PLANS["three stages"]
    assert build(plan)(torch.randn(1, 2, 32, 16, 48)).shape == (1, 2, 32, 16, 48)


def test_a_single_deepest_voxel_is_warned_about_and_runs():
    with pytest.warns(UserWarning, match="single voxel"):
        network = H2ASeg(2, 4, (2, 2, 4, 4), nn.Conv3d, 3, (1, 2, 2, 2), 2, patch_size=(8, 8, 8))
    network(torch.randn(1, 2, 8, 8, 8)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"conv_op": nn.Conv1d}, "`conv_op`"),
        ({"n_stages": 1}, "`n_stages`"),
        ({"features_per_stage": [4, 8]}, "`features_per_stage` must have one entry for each of the 3"),
        ({"kernel_sizes": [3, 3, 2]}, "odd"),
        ({"kernel_sizes": [[3, 3], [3, 3], [3, 3]]}, "`kernel_sizes`"),
        ({"strides": [2, 2, 2]}, "begin with 1"),
        ({"strides": [1, 2]}, "`strides`"),
        ({"num_classes": 0}, "`num_classes`"),
        ({"input_channels": 1}, "at least 2"),
        ({"ct_channel": 1, "pet_channel": 1}, "two different channels"),
        ({"pet_channel": 2}, "two different channels"),
        ({"patch_size": [16, 16, 22]}, r"\[16, 16, 22\] does not fit"),
        ({"patch_size": [16, 16]}, r"\[16, 16\] does not fit"),
    ],
)
def test_bad_arguments_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        H2ASeg(**PLANS["three stages"].keywords(**overrides))


@pytest.mark.parametrize("size", [(16, 16, 26), (8, 16, 24), (16, 16, 28)])
def test_an_input_that_does_not_fit_is_named(size):
    network = build(PLANS["three stages"])
    with pytest.raises(ValueError, match=rf"input of size \[{size[0]}, {size[1]}, {size[2]}\] does not fit"):
        network(torch.randn(1, 2, *size))
