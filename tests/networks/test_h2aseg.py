"""What is H2ASeg's own when nnU-Net's plans build it; what holds for every network is in test_every_network.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_h2a.networks import H2ASeg
from nnunet_h2a.networks.h2aseg import attention_windows
from nnunet_h2a.networks.mcsa import BDSA
from tests.networks.plans import PLANS
from tests.networks.registry import REGISTRY

build = REGISTRY["H2ASeg"].build


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


def test_cascade_channels_reach_both_branches():
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


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_feature_map_size_counts_what_is_written(plan):
    network = build(plan, deep_supervision=True)
    written = 0

    def count(module, inputs, output):
        nonlocal written
        written += output.numel()

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
        ({"n_stages": 1}, "`n_stages` must be at least 2"),
        ({"kernel_sizes": [3, 3, 2]}, "odd"),
        ({"kernel_sizes": [[3, 3], [3, 3], [3, 3]]}, "`kernel_sizes`"),
        ({"strides": [2, 2, 2]}, "begin with 1"),
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
