"""What nnU-Net asks of every network: sizes, gradients, precision, state, channels, errors. On every plan."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunet_h2a.networks.plan_geometry import cumulative_strides, expand_per_stage
from nnunet_h2a.trainers import TRAINERS
from nnunet_h2a.widths import PUBLISHED_WIDTHS
from tests.networks.plans import PLANS
from tests.networks.registry import REGISTRY, every_network, exported, loss_of, matrix

HALF_MAX = 65504

#: A gradient beyond is as useless as an infinite one; those here are below 1e4.
GRADIENT_MAX = 1e6

#: Factor that takes Plan.input's hot spots from 40 to 1000 standard deviations.
EXTREME = 25

#: fp16 on a CPU is emulated: 16^3 voxels take a second, larger maps minutes.
FLOAT16_PLANS = ("regions", "one class", "cascade", "2d", "2d anisotropic", "2d 36x44")


def inputs_of(plan, batch=2):
    """nnU-Net's range, far beyond it, and an empty image."""
    x = plan.input(batch=batch)
    return {"usual": x, "extreme": EXTREME * x, "constant": torch.zeros_like(x)}


def output_sizes(entry, plan):
    """Spatial size of each output with deep supervision on."""
    stages = len(plan.features)
    strides = cumulative_strides(expand_per_stage(plan.strides, stages, len(plan.patch), "strides"))
    sizes = [tuple(n // t for n, t in zip(plan.patch, total, strict=True)) for total in strides]
    return sizes[: entry.outputs(stages)]


def other_order(entry, plan, network):
    """The same weights with PET first, and the permutation that takes an input there."""
    swapped = entry.build(plan, ct_channel=1, pet_channel=0).eval()
    swapped.load_state_dict(network.state_dict())
    return swapped, [1, 0, *range(2, plan.input_channels)]


def test_every_exported_network_is_in_the_matrix_and_has_trainer_and_widths():
    assert set(REGISTRY) == exported() == set(PUBLISHED_WIDTHS)
    assert all(TRAINERS[f"nnUNetTrainer{name}"].network_class is entry.network for name, entry in REGISTRY.items())


@every_network
def test_constructor_has_the_protocol_of_dynamic_network_architectures(entry):
    parameters = inspect.signature(entry.network).parameters
    protocol = [
        "input_channels", "n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "num_classes",
        "deep_supervision",
    ]  # fmt: skip
    assert list(parameters)[: len(protocol)] == protocol
    assert parameters["deep_supervision"].default is False
    own = {"patch_size": None, "ct_channel": 0, "pet_channel": 1, "region_based": False}
    for name, default in own.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == default
    for name in list(parameters)[len(protocol) :]:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is not inspect.Parameter.empty


@matrix()
def test_stock_nnunet_builds_it_from_a_plans_file(entry, plan):
    keywords = plan.keywords(**entry.small)
    channels, classes = keywords.pop("input_channels"), keywords.pop("num_classes")
    keywords["conv_op"] = f"torch.nn.modules.conv.{keywords['conv_op'].__name__}"
    for deep_supervision in (True, False):
        torch.manual_seed(0)
        network = get_network_from_plans(
            f"nnunet_h2a.networks.{entry.name}", json.loads(json.dumps(keywords)), ["conv_op"], channels, classes,
            deep_supervision=deep_supervision,
        )  # fmt: skip
        assert type(network) is entry.network
        assert network.decoder.deep_supervision is deep_supervision
        ours = entry.build(plan, deep_supervision=deep_supervision).state_dict()
        assert all(torch.equal(ours[name], value) for name, value in network.state_dict().items())


@matrix()
def test_shapes_gradients_and_state_in_both_modes(entry, plan):
    network = entry.build(plan, deep_supervision=True)
    keys = list(network.state_dict())
    expected = [(2, plan.num_classes, *size) for size in output_sizes(entry, plan)]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    for step in range(3):
        outputs = network(plan.input(seed=step))
        assert isinstance(outputs, list)
        assert [tuple(o.shape) for o in outputs] == expected
        assert all(o.dtype == torch.float32 and torch.isfinite(o).all() for o in outputs)
        if step == 2:
            break
        optimizer.zero_grad(set_to_none=True)
        loss_of(outputs).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        optimizer.step()
    network.eval().decoder.deep_supervision = False
    single = network(plan.input())
    assert single.shape == expected[0]
    network.decoder.deep_supervision = True
    torch.testing.assert_close(network(plan.input())[0], single, atol=0, rtol=0)
    other = entry.build(plan, deep_supervision=False).eval()
    assert list(other.state_dict()) == keys
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(other(plan.input()), single, atol=0, rtol=0)


def check_step(network, x, dtype):
    """Forward and backward under autocast: finite logits, gradients that a step can use. Returns the logits."""
    network.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype):
        outputs = network(x)
        loss_of(outputs).backward()
    assert all(torch.isfinite(o).all() for o in outputs)
    bad = [name for name, p in network.named_parameters() if not (p.grad.abs() < GRADIENT_MAX).all()]
    assert not bad
    return outputs


@pytest.mark.usefixtures("no_lucky_memory")
@matrix(plain=("regions", "cascade", "anisotropic 12x32x24", "2d 36x44"))
def test_bfloat16_autocast(entry, plan):
    network = entry.build(plan, deep_supervision=True)
    for kind, x in inputs_of(plan).items():
        torch.manual_seed(1)
        reference = network(x)[0]
        outputs = check_step(network, x, torch.bfloat16)
        if kind == "usual":
            difference = (outputs[0].float() - reference).abs().mean() / reference.abs().mean()
            assert difference < 0.15, f"bf16 differs from float32 by {difference:.3f} of the mean logit"


@pytest.mark.usefixtures("no_lucky_memory")
@matrix(FLOAT16_PLANS, plain=("cascade", "2d 36x44"))
def test_float16_autocast(entry, plan):
    network = entry.build(plan, deep_supervision=True)
    for x in inputs_of(plan).values():
        check_step(network, x, torch.float16)


@matrix()
def test_activations_fit_into_float16(entry, plan):
    """Every module's output at initialisation, the logits' included, on images of either range."""
    network = entry.build(plan, deep_supervision=True)
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
        for x in inputs_of(plan).values():
            network(x)
    assert len(largest) > 50
    assert max(largest.values()) < HALF_MAX, max(largest, key=largest.get)


@matrix(("one class", "2d 36x44"))
def test_a_network_in_bfloat16_runs(entry, plan):
    network = entry.build(plan).bfloat16()
    output = network(plan.input(dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert torch.isfinite(output).all()


@matrix(("regions", "2d 36x44"))
def test_output_is_raw_logits(entry, plan):
    """Logits are linear in the last convolution's weights; probabilities would not be."""
    network = entry.build(plan).eval()
    head = [m for m in network.decoder.seg_layers[0].modules() if isinstance(m, nn.Conv2d | nn.Conv3d)][-1]
    before = network(plan.input())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter *= 1024
    torch.testing.assert_close(network(plan.input()), 1024 * before)


@matrix(("three stages", "anisotropic 12x32x24", "2d 36x44"))
def test_inference_gives_tensors_of_its_own(entry, plan):
    """nnU-Net adds the mirrored predictions to the first in place."""
    network = entry.build(plan).eval()
    x = plan.input()
    with torch.no_grad():
        expected = network(x)
    with torch.inference_mode():
        kept = x.clone()
        first = network(x)
        assert torch.equal(first, expected)
        first += torch.flip(network(torch.flip(x, (2,))), (2,))
        first.mul_(100).sub_(7)
        assert torch.equal(network(x), expected)
        assert torch.equal(x, kept)


@matrix(("three stages", "2d 36x44"))
def test_a_sample_does_not_depend_on_its_batch(entry, plan):
    network = entry.build(plan).eval()
    x = plan.input(batch=3)
    with torch.no_grad():
        alone = torch.cat([network(sample) for sample in x.split(1)])
        torch.testing.assert_close(network(x), alone, atol=1e-5, rtol=1e-5)


@matrix(("three stages", "2d 36x44"))
def test_channels_by_name_give_the_same_bits(entry, plan):
    network, x = entry.build(plan).eval(), plan.input()
    swapped, order = other_order(entry, plan, network)
    assert torch.equal(network(x), swapped(x[:, order]))
    assert not torch.equal(network(x), swapped(x))


@matrix(("cascade",))
def test_the_previous_stage_of_a_cascade_is_used_in_any_channel_order(entry, plan):
    network, x = entry.build(plan).eval(), plan.input()
    swapped, order = other_order(entry, plan, network)
    assert torch.equal(network(x), swapped(x[:, order]))
    for channel in range(2, plan.input_channels):
        changed = x.clone()
        changed[:, channel] += 1 + torch.rand_like(changed[:, channel])
        assert not torch.allclose(network(changed), network(x)), channel


@matrix()
def test_feature_map_size_is_at_least_what_convolutions_write(entry, plan):
    network = entry.build(plan, deep_supervision=True)
    written = 0

    def count(module, inputs, output):
        nonlocal written
        written += output.numel()

    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for module in network.modules():
        if isinstance(module, convolutions):
            module.register_forward_hook(count)
    with torch.no_grad():
        network.eval()(plan.input(batch=1))
    size = network.compute_conv_feature_map_size(plan.patch)
    assert type(size) is int
    assert size >= written > 0
    # Attention, linear layers and scans come on top; CIPA, with twelve times its convolutions, has most of them.
    assert size < 16 * written
    # Four times the patch: networks that pad may pad twice the patch to no more than the patch itself.
    assert network.compute_conv_feature_map_size([4 * n for n in plan.patch]) > size


@matrix(("three stages", "2d 36x44"))
def test_initialize_leaves_parameters_of_our_own_modules_alone(entry, plan):
    """It runs after the constructor, which knows better how scans and scales begin."""
    network = entry.build(plan)
    own = {
        f"{path}.{name}" if path else name
        for path, module in network.named_modules()
        if not type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Conv3d)
        for name, _ in module.named_parameters(recurse=False)
    }
    assert {name.rpartition(".")[2] for name in own} >= set(entry.scan_parameters)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    network.apply(network.initialize)
    network.apply(network.initialize)
    changed = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert not changed & own
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


@matrix(("three stages", "2d 36x44"))
def test_copies_and_pickles(entry, plan):
    network, x = entry.build(plan).eval(), plan.input()
    assert torch.equal(copy.deepcopy(network)(x), network(x))
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))


@every_network
@pytest.mark.parametrize("name", ["three stages", "2d 36x44"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"conv_op": nn.Conv1d}, "`conv_op`"),
        ({"num_classes": 0}, "`num_classes`"),
        ({"n_stages": 0}, "`n_stages`"),
        ({"features_per_stage": [4, 8]}, "`features_per_stage` must have one entry for each of the 3"),
        ({"kernel_sizes": [3, 3]}, "`kernel_sizes`"),
        ({"strides": [1, 2]}, "`strides`"),
        ({"input_channels": 1}, "at least 2"),
        ({"ct_channel": 1, "pet_channel": 1}, "two different channels"),
        ({"pet_channel": 2}, "two different channels"),
        ({"ct_channel": -1}, "two different channels"),
        ({"patch_size": [16]}, r"\[16\] does not fit"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_are_named(entry, name, overrides, message):
    with pytest.raises(ValueError, match=message):
        entry.network(**PLANS[name].keywords(**entry.small, **overrides))


@matrix(("three stages", "2d 36x44", "2d"))
def test_an_input_that_does_not_fit_is_named(entry, plan):
    network = entry.build(plan)
    size = [*plan.patch[:-1], plan.patch[-1] + 33]
    with pytest.raises(ValueError, match=rf"input of size \[{', '.join(map(str, size))}\] does not fit"):
        network(torch.randn(1, plan.input_channels, *size))
