"""H2ASeg's blocks and the whole network against a plain float64 transcription of the equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_h2a.networks import H2ASeg
from nnunet_h2a.networks.mcsa import BDSA, MCSA, MOST_WINDOWS_AT_ONCE, attend
from nnunet_h2a.networks.precision import InstanceNorm
from nnunet_h2a.networks.tamw import TAMW, foreground_probability
from nnunet_h2a.networks.windows import merge_windows, partition_windows
from tests.networks import transcription
from tests.networks.plans import PLANS

TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that none hides at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module.double()


@pytest.mark.parametrize("grid", [(2, 3, 4), (1, 1, 1), (5, 3)])
def test_bdsa_is_equation_1_in_both_directions(grid):
    channels, batch = 4, 2
    module = randomise(BDSA(channels, nn.Conv3d if len(grid) == 3 else nn.Conv2d, (3,) * len(grid)))
    tokens = torch.Size(grid).numel()
    ct, pet = torch.randn(2, batch, tokens, channels, dtype=torch.float64)
    new_ct, new_pet = module(ct, pet, grid)
    for sample in range(batch):
        expected = transcription.bdsa(module, ct[sample].T, pet[sample].T, grid)
        torch.testing.assert_close(new_ct[sample], expected[0], **TOLERANCE)
        torch.testing.assert_close(new_pet[sample], expected[1], **TOLERANCE)


def test_attention_of_many_windows_is_that_of_each():
    q, k, v = torch.randn(3, MOST_WINDOWS_AT_ONCE + 3, 1, 2, 1, dtype=torch.float64)
    expected = torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
    torch.testing.assert_close(attend(q, k, v), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("size", "window"), [((4, 6, 8), (2, 3, 4)), ((4, 4, 4), (4, 4, 4)), ((2, 4, 4), (1, 2, 4)), ((6, 8), (3, 4))]
)
def test_mcsa_is_inter_then_intra_window_attention(size, window):
    module = randomise(MCSA(3, nn.Conv3d if len(size) == 3 else nn.Conv2d, (3,) * len(size), window))
    ct, pet = torch.randn(2, 2, 3, *size, dtype=torch.float64)
    for result, expected in zip(module(ct, pet), transcription.mcsa(module, ct, pet), strict=True):
        torch.testing.assert_close(result, expected, **TOLERANCE)


def test_tamw_is_equations_2_to_4():
    module = randomise(TAMW(8))
    features = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64)
    for p in (torch.rand(2, 1, 3, 4, 5), torch.zeros(2, 1, 3, 4, 5), torch.ones(2, 1, 3, 4, 5)):
        expected = transcription.tamw(module, features, p.double())
        torch.testing.assert_close(module(features, p.double()), expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["three stages", "anisotropic 28x64x56", "regions", "one class", "cascade", "2d"])
def test_whole_network_is_the_transcription(name):
    plan = PLANS[name]
    network = randomise(H2ASeg(**plan.keywords(deep_supervision=True)))
    x = plan.input(batch=1, dtype=torch.float64)
    with torch.no_grad():
        expected = transcription.h2aseg(network, x, plan.region_based or plan.num_classes == 1)
        for result, level in zip(network(x), expected, strict=True):
            torch.testing.assert_close(result, level, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("independent", [False, True])
def test_foreground_probability_is_exact_and_has_a_gradient_at_extreme_logits(independent):
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64) * 3
    expected = transcription.foreground(logits, independent)
    torch.testing.assert_close(foreground_probability(logits, independent), expected, **TOLERANCE)
    extreme = torch.tensor([-3e4, -20.0, 0.0, 20.0, 3e4]).repeat(3, 1)[None].requires_grad_()
    p = foreground_probability(extreme, independent)
    p.sum().backward()
    assert p.dtype == torch.float32
    assert torch.isfinite(p).all()
    assert ((p >= 0) & (p <= 1)).all()
    assert torch.isfinite(extreme.grad).all()


def test_the_prediction_that_steers_tamw_is_not_detached():
    plan = PLANS["three stages"]
    network = H2ASeg(**plan.keywords())
    network(plan.input()).square().mean().backward()
    # Deep supervision is off: the deeper heads can only be reached through P.
    for head in network.decoder.seg_layers[1:]:
        assert head[2].weight.grad.abs().sum() > 0


def test_windows_are_row_major_boxes_and_return_to_their_places():
    x = torch.arange(2 * 3 * 4 * 6 * 4).reshape(2, 3, 4, 6, 4)
    tokens = partition_windows(x, (2, 3, 2))
    assert tokens.shape == (2 * 2 * 2 * 2, 12, 3)
    torch.testing.assert_close(tokens[1], x[0, :, 0:2, 0:3, 2:4].flatten(1).T)
    torch.testing.assert_close(tokens[8 + 4 + 2], x[1, :, 2:4, 3:6, 0:2].flatten(1).T)
    windows = tokens.transpose(1, 2).reshape(-1, 3, 2, 3, 2)
    torch.testing.assert_close(merge_windows(windows, (4, 6, 4)), x)


def test_instance_norm_is_pytorchs_and_accepts_one_voxel():
    x = torch.randn(2, 3, 4, 5, 6)
    torch.testing.assert_close(InstanceNorm()(x), nn.InstanceNorm3d(3)(x))
    assert InstanceNorm()(torch.randn(2, 3, 1, 1, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_instance_norm_keeps_statistics_in_float32(dtype):
    """A mean far from 0 over many voxels: sums in half precision would be wrong by far more than one rounding."""
    x = (torch.randn(1, 2, 32, 32, 32) + 8).to(dtype)
    exact = F.instance_norm(x.double())
    assert (InstanceNorm()(x).double() - exact).abs().max() < 2 * torch.finfo(dtype).eps * exact.abs().max()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_attention_never_holds_an_n_by_n_matrix():
    tokens, channels = 4096, 4
    module = BDSA(channels, nn.Conv3d, (3, 3, 3))
    ct, pet = torch.randn(2, 1, tokens, channels, requires_grad=True)
    with LargestTensor() as seen:
        sum(new.sum() for new in module(ct, pet, (16, 16, 16))).backward()
    assert seen.elements <= 4 * 6 * tokens * channels < tokens * tokens / 10
