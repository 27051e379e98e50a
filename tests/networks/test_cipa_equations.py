"""CIPA's blocks against plain float64 transcriptions: loops over tokens, regions and parities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnunet_h2a.networks.crm import CRM, resize_map_weights
from nnunet_h2a.networks.cvss import CAB, CVSSBlock, FinalUpSample, PatchExpand, UpSample
from nnunet_h2a.networks.dcim import DCIM
from nnunet_h2a.networks.ss2d import SS1D, SS2D
from nnunet_h2a.networks.vss import PatchMerging
from tests.networks.cipa_small import CONV, random, randomise, to_maps, to_tokens

TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}


def paths(size):
    """For each direction the positions in the order in which it reads them, spelt out."""
    if len(size) == 2:
        height, width = size
        forward = [
            [(i, j) for i in range(height) for j in range(width)],
            [(i, j) for j in range(width) for i in range(height)],
        ]
    else:
        depth, height, width = size
        forward = [
            [(i, j, k) for i in range(depth) for j in range(height) for k in range(width)],
            [(i, j, k) for k in range(width) for i in range(depth) for j in range(height)],
            [(i, j, k) for j in range(height) for k in range(width) for i in range(depth)],
        ]
    return forward + [path[::-1] for path in forward]


def scan_one(block, direction, u):
    """One direction's scan of tokens u (tokens, inner), one token and one channel's state after the other."""
    inner, rank, n = block.inner, block.dt_projs_weight.shape[2], block.A_logs.shape[1]
    channels = slice(direction * inner, (direction + 1) * inner)
    decay, skip = -torch.exp(block.A_logs[channels]), block.Ds[channels]
    state, outputs = torch.zeros(inner, n, dtype=u.dtype), []
    for token in u:
        rows = block.x_proj_weight[direction] @ token
        delta = block.dt_projs_weight[direction] @ rows[:rank] + block.dt_projs_bias[direction]
        delta = torch.log1p(torch.exp(delta))
        b, c = rows[rank : rank + n], rows[rank + n :]
        state = torch.exp(delta[:, None] * decay) * state + delta[:, None] * b[None] * token[:, None]
        outputs.append(state @ c + skip * token)
    return torch.stack(outputs)


def ss2d_transcribed(block, x):
    """SS2D of one map (spatial..., channels)."""
    size, inner = x.shape[:-1], block.inner
    projected = x @ block.in_proj.weight.T
    u, z = projected[..., :inner], projected[..., inner:]
    padded = torch.zeros(*(n + 2 for n in size), inner, dtype=x.dtype)
    padded[tuple(slice(1, -1) for _ in size)] = u
    convolved = torch.empty_like(u)
    for place in itertools.product(*(range(n) for n in size)):
        around = padded[tuple(slice(p, p + 3) for p in place)].movedim(-1, 0)
        convolved[place] = (around * block.conv.weight[:, 0]).flatten(1).sum(1) + block.conv.bias
    u = convolved * torch.sigmoid(convolved)
    total = torch.zeros_like(u)
    for direction, path in enumerate(paths(size)):
        scanned = scan_one(block, direction, torch.stack([u[place] for place in path]))
        for place, y in zip(path, scanned, strict=True):
            total[place] += y
    normed = F.layer_norm(total, (inner,), block.out_norm.weight, block.out_norm.bias, 1e-5)
    return (normed * z * torch.sigmoid(z)) @ block.out_proj.weight.T


@pytest.mark.parametrize("size", [(3, 4), (1, 1), (2, 3, 4)])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_ss2d_is_the_sum_of_its_directions_scans(size, backend):
    block = randomise(SS2D(18, CONV[len(size)], state_size=3, scan_backend=backend))
    assert block.x_proj_weight.shape == (2 * len(size), 2 + 3 + 3, 36)
    x = random(2, *size, 18)
    expected = torch.stack([ss2d_transcribed(block, sample) for sample in x])
    torch.testing.assert_close(block(x), expected, **TOLERANCE)


@pytest.mark.parametrize("size", [(3, 4), (2, 3, 4)])
def test_directions_on_a_labelled_map(size):
    block = SS2D(1, CONV[len(size)])
    labels = torch.arange(math.prod(size)).reshape(size)
    assert block.directions == len(paths(size))
    for direction, path in enumerate(paths(size)):
        read = block._sequence(labels[None, None], direction)[0, 0]
        assert read.tolist() == [labels[place].item() for place in path]


def test_column_major_in_figures():
    block = SS2D(1, nn.Conv2d)
    read = [block._sequence(torch.tensor([[[[0, 1, 2], [3, 4, 5]]]]), k).flatten().tolist() for k in range(4)]
    assert read == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]


def test_ss1d_is_one_scan_with_silu_on_both_halves():
    block = randomise(SS1D(5))
    x = random(2, 7, 5)
    u, gate = F.silu(x @ block.in_proj.weight.T).split(10, dim=-1)
    y = torch.stack([scan_one(block, 0, sample) for sample in u])
    y = F.layer_norm(y, (10,), block.out_norm.weight, block.out_norm.bias, 1e-5)
    torch.testing.assert_close(block(x), (y * gate) @ block.out_proj.weight.T, **TOLERANCE)


def test_scans_start_as_mambas():
    torch.manual_seed(0)
    block = SS2D(32, nn.Conv2d)
    torch.testing.assert_close(-torch.exp(block.A_logs), -torch.arange(1.0, 17.0).expand(4 * 64, 16))
    assert (block.Ds == 1).all()
    step = F.softplus(block.dt_projs_bias)
    assert step.min() > 0.99e-3
    assert step.max() < 0.101
    assert (step.log().mean() - math.log(1e-2)).abs() < 0.3
    assert 0.9 * 2**-0.5 < block.dt_projs_weight.abs().max() <= 2**-0.5


def test_merging_takes_the_parities_in_the_released_order():
    merging = PatchMerging(1, 4, (2, 2)).double()
    rows = torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7]], dtype=torch.float64)
    seen = []
    merging.norm.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    merging(rows[None, ..., None])
    assert seen[0].tolist() == [[[[0, 4, 1, 5], [2, 6, 3, 7]]]]
    seen.clear()
    merging(rows[None, :1, :3, None])  # an odd map: zeros at the bottom and on the right
    assert seen[0].tolist() == [[[[0, 0, 1, 0], [2, 0, 0, 0]]]]


def test_merging_of_some_axes_in_3d():
    merging = PatchMerging(3, 6, (1, 2, 2))
    seen = []
    merging.norm.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    x = torch.randn(2, 3, 4, 6, 3)
    assert merging(x).shape == (2, 3, 2, 3, 6)
    expected = [x[:, :, 0::2, 0::2], x[:, :, 1::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 1::2]]
    assert torch.equal(seen[0], torch.cat(expected, dim=-1))
    whole = PatchMerging(3, 6, (2, 2, 2))
    whole.norm.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    x = torch.randn(1, 2, 2, 2, 3)
    whole(x)
    order = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
    assert torch.equal(seen[1].flatten(), torch.cat([x[0, i, j, k] for i, j, k in order]))


def test_expansion_has_the_channel_fastest():
    expand = randomise(PatchExpand(5, 3, (2, 2)))
    x = random(2, 3, 4, 5)
    wide = x @ expand.expand.weight.T
    expected = torch.empty(2, 6, 8, 3, dtype=torch.float64)
    for row, column in itertools.product(range(2), range(2)):
        start = (2 * row + column) * 3
        expected[:, row::2, column::2] = wide[..., start : start + 3]
    expected = F.layer_norm(expected, (3,), expand.norm.weight, expand.norm.bias, 1e-5)
    torch.testing.assert_close(expand(x), expected, **TOLERANCE)
    assert PatchExpand(5, 3, (1, 2, 2))(torch.randn(1, 2, 3, 4, 5)).shape == (1, 2, 6, 8, 3)


def test_crm_weights_each_channel_by_its_map():
    module = randomise(CRM((3, 4), width=5))
    ct, pet = random(2, 2, 3, 4, 6)
    norm, linear, _, scan, last_norm, last, _ = module.mlp
    tokens = torch.stack([m[:, i, j] for i in range(3) for j in range(4) for m in [torch.cat([ct, pet], dim=-1)]], -1)
    tokens = F.layer_norm(tokens, (12,), norm.weight, norm.bias, 1e-5) @ linear.weight.T + linear.bias
    tokens = scan(0.5 * tokens * (1 + torch.erf(tokens / math.sqrt(2))))
    tokens = F.layer_norm(tokens, (5,), last_norm.weight, last_norm.bias, 1e-5) @ last.weight.T + last.bias
    weights = torch.sigmoid(tokens)[:, None, None, :, 0]
    for result, x, w in zip(module(ct, pet), (ct, pet), weights.split(6, dim=-1), strict=True):
        torch.testing.assert_close(result, x + w * x, **TOLERANCE)


def conv_norm_relu(layers, x):
    """Convolution, BatchNorm by its running statistics, ReLU, from a row of modules."""
    for conv, norm in zip(layers[0::3], layers[1::3], strict=True):
        x = {4: F.conv2d, 5: F.conv3d}[x.dim()](x, conv.weight, conv.bias, conv.stride, 1)
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = norm.weight / torch.sqrt(norm.running_var + 1e-5)
        x = F.relu((x - norm.running_mean.reshape(shape)) * scale.reshape(shape) + norm.bias.reshape(shape))
    return x


@pytest.mark.parametrize("size", [(8, 4), (6, 9), (1, 1), (3, 5, 4)])
def test_dcim_scans_each_region_as_an_image_of_its_own(size):
    module = randomise(DCIM(16, CONV[len(size)], scan_backend="reference"))
    assert [m.out_channels for m in module.pet_convs[0::3]] == [1, 2, 4, 16]
    assert [m.stride[0] for m in module.pet_convs[0::3]] == [1, 2, 2, 1]
    ct, pet = random(2, 1, *size, 16)
    tokens = to_tokens(conv_norm_relu(module.pet_convs, to_maps(pet)))
    grid = tuple(math.ceil(n / 4) for n in size)
    assert tokens.shape == (1, *grid, 16)
    norm = module.region_norm
    tokens = tokens + module.region_scan(F.layer_norm(tokens, (16,), norm.weight, norm.bias, 1e-5))
    convolved = to_tokens(conv_norm_relu(module.ct_convs, to_maps(ct)))
    padded = torch.zeros(1, *(4 * g for g in grid), 16, dtype=torch.float64)
    padded[(slice(None), *(slice(n) for n in size))] = convolved
    norm = module.local_norm
    for place in itertools.product(*(range(g) for g in grid)):
        inside = (slice(None), *(slice(4 * p, 4 * p + 4) for p in place))
        region = padded[inside]
        row = F.layer_norm(region.reshape(-1), (region.numel(),), norm.weight, norm.bias, 1e-5)
        padded[inside] = region + module.local_scan(row.reshape(region.shape)) + tokens[(0, *place)]
    expected = padded[(slice(None), *(slice(n) for n in size))]
    torch.testing.assert_close(module(ct, pet), expected, **TOLERANCE)


@pytest.mark.parametrize("size", [(3, 4), (2, 3, 4)])
def test_cab_gates_by_mean_and_maximum(size):
    module = randomise(CAB(64, CONV[len(size)]))
    first, _, second, gate = module.cab
    assert (first.out_channels, gate.fc[0].out_channels) == (21, 2)
    x = random(2, 64, *size)
    convolve = {2: F.conv2d, 3: F.conv3d}[len(size)]
    f = convolve(F.gelu(convolve(x, first.weight, first.bias, padding=1)), second.weight, second.bias, padding=1)

    def g(v):
        return F.silu(v @ gate.fc[0].weight.flatten(1).T) @ gate.fc[2].weight.flatten(1).T

    flat = f.flatten(2)
    weights = torch.sigmoid(g(flat.mean(2)) + g(flat.max(2).values))
    torch.testing.assert_close(module(x), (flat * weights[:, :, None]).reshape(f.shape), **TOLERANCE)


def test_cvss_block():
    block = randomise(CVSSBlock(6, nn.Conv2d, drop_path=0.5))
    assert block.op.A_logs.shape == (4 * 12, 4)
    x = random(2, 3, 4, 6)
    between = x * block.scale1 + block.op(block.norm1(x))
    expected = to_tokens(block.conv_blk(to_maps(block.norm2(between)))) + between * block.scale2
    torch.testing.assert_close(block(x), expected, **TOLERANCE)


def doubled(x):
    """Linear interpolation to twice the size of every axis but the first and the last, edges repeated."""
    for axis in range(1, x.dim() - 1):
        x = x.movedim(axis, 0)
        before, after = torch.cat([x[:1], x[:-1]]), torch.cat([x[1:], x[-1:]])
        x = torch.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], dim=1).flatten(0, 1).movedim(0, axis)
    return x


@pytest.mark.parametrize("size", [(3, 4), (2, 3, 4)])
def test_up_sampling_is_linear_with_corners_not_aligned(size):
    x = random(2, *size, 6)
    module = randomise(UpSample(6, 3, (2,) * len(size)))
    expected = module.norm(doubled(x @ module.linear.weight.T))
    torch.testing.assert_close(module(x), expected, **TOLERANCE)
    module = randomise(FinalUpSample(6, (4,) * len(size)))
    expected = module.norm(doubled(doubled(x @ module.linear1.weight.T) @ module.linear2.weight.T))
    torch.testing.assert_close(module(x), expected, **TOLERANCE)


def resized_map(x, size):
    """A batch of maps interpolated to ``size``, antialiased, by PyTorch's own function for two axes."""
    return F.interpolate(x[:, None], size, mode="bilinear", align_corners=False, antialias=True)[:, 0]


@pytest.mark.parametrize(("old", "new"), [((2, 3), (4, 6)), ((8, 8), (4, 2)), ((5, 7), (8, 3))])
def test_map_weights_of_another_size_answer_as_the_old_ones_did(old, new):
    positions = math.prod(old)
    layer, norm, picture = random(2, positions), random(positions), random(3, *new)
    resized = resize_map_weights(layer, old, new)
    answers = resized_map(picture, old).flatten(1) @ layer.T
    torch.testing.assert_close(picture.flatten(1) @ resized.T, answers, **TOLERANCE)
    torch.testing.assert_close(resized.sum(1), layer.sum(1), **TOLERANCE)
    expected = resized_map(norm.reshape(1, *old), new).flatten()
    torch.testing.assert_close(resize_map_weights(norm, old, new), expected, **TOLERANCE)


def test_map_weights_in_3d_and_of_other_types():
    weight = random(2, 64)
    halved = resize_map_weights(weight, (4, 4, 4), (2, 2, 2))
    torch.testing.assert_close(halved.sum(1), weight.sum(1), **TOLERANCE)
    weight = random(2, 6)
    assert torch.equal(resize_map_weights(weight, (2, 3), (2, 3)), weight)
    assert resize_map_weights(weight.half(), (2, 3), (3, 3)).dtype == torch.float16
    with pytest.raises(ValueError, match=r"shape \[2, 6\] is not one over a map of \[3, 3\]"):
        resize_map_weights(weight, (3, 3), (4, 4))
    with pytest.raises(ValueError, match="both have 2 or both have 3 axes"):
        resize_map_weights(weight, (2, 3), (1, 2, 3))
