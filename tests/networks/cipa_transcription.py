"""CIPA written out plainly in float64 for weights with the authors' names: a second opinion on the implementation.

One image pair at a time through the shared encoder, the scan one token after another, means and variances spelled
out. Maps are (batch, height, width, channels). Nothing is shared with the package. BatchNorm uses its running
statistics and there is no stochastic depth. Widths, depths and state sizes are read off the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5
STAGES = 4
#: Edge of a region of DCIM, in CT tokens.
REGION = 4


class Weights:
    """A view of the weights below one name."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def at(self, *names: str | int) -> Weights:
        return Weights(self.tensors, self.prefix + "".join(f"{name}." for name in names))

    def count(self, name: str) -> int:
        """Length of the list of modules called ``name``."""
        pattern = re.compile(re.escape(self.prefix + name) + r"\.(\d+)\.")
        return 1 + max(int(found.group(1)) for key in self.tensors if (found := pattern.match(key)))


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def softplus(x):
    return torch.logaddexp(x, torch.zeros_like(x))


def layer_norm(w, x):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPSILON) * w["weight"] + w["bias"]


def linear(w, x):
    y = x @ w["weight"].T
    return y + w["bias"] if "bias" in w else y


def convolve(w, x, stride=1, padding=0, groups=1):
    y = F.conv2d(x.permute(0, 3, 1, 2), w["weight"], None, stride, padding, groups=groups).permute(0, 2, 3, 1)
    return y + w["bias"] if "bias" in w else y


def batch_norm(w, x):
    return (x - w["running_mean"]) / torch.sqrt(w["running_var"] + EPSILON) * w["weight"] + w["bias"]


def bilinear_twice(x):
    x = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=False)
    return x.permute(0, 2, 3, 1)


def scan(w, u):
    """S6 of every direction over tokens that are in its order already.

    ``u`` and the result: (batch, directions, tokens, width).
    """
    directions, width, rank = w["dt_projs_weight"].shape
    a = -torch.exp(w["A_logs"]).reshape(directions, width, -1)
    skip = w["Ds"].reshape(directions, width)
    states = a.shape[-1]
    rows = torch.einsum("kcd,bkld->lbkc", w["x_proj_weight"], u)
    delta_rows, b, c = rows[..., :rank], rows[..., rank : rank + states], rows[..., rank + states :]
    assert c.shape[-1] == states
    delta = softplus(torch.einsum("kdr,lbkr->lbkd", w["dt_projs_weight"], delta_rows) + w["dt_projs_bias"])
    inputs = u.permute(2, 0, 1, 3)
    h = u.new_zeros(u.shape[0], directions, width, states)
    outputs = []
    for token in range(len(inputs)):
        step, value = delta[token], inputs[token]
        h = torch.exp(step[..., None] * a) * h + (step * value)[..., None] * b[token][:, :, None, :]
        outputs.append((h * c[token][:, :, None, :]).sum(-1) + skip * value)
    return torch.stack(outputs, dim=2)


def four_orders(height, width):
    """Pixel numbers in the order in which each direction meets them."""
    rows = [r * width + c for r in range(height) for c in range(width)]
    columns = [r * width + c for c in range(width) for r in range(height)]
    return torch.tensor([rows, columns, rows[::-1], columns[::-1]])


def ss2d(w, x):
    batch, height, width, _ = x.shape
    u, z = linear(w.at("in_proj"), x).chunk(2, dim=-1)
    u = silu(convolve(w.at("conv2d"), u, padding=1, groups=u.shape[-1])).flatten(1, 2)
    orders = four_orders(height, width)
    scanned = scan(w, torch.stack([u[:, order] for order in orders], dim=1))
    total = torch.zeros_like(u)
    for direction, order in enumerate(orders):
        total[:, order] += scanned[:, direction]
    y = layer_norm(w.at("out_norm"), total.reshape(batch, height, width, -1)) * silu(z)
    return linear(w.at("out_proj"), y)


def ss1d(w, tokens):
    u, gate = linear(w.at("in_proj"), tokens).chunk(2, dim=-1)
    y = layer_norm(w.at("out_norm"), scan(w, silu(u)[:, None])[:, 0]) * silu(gate)
    return linear(w.at("out_proj"), y)


def merge_patches(w, x):
    _, height, width, _ = x.shape
    x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
    return linear(w.at("reduction"), layer_norm(w.at("norm"), torch.cat(parts, dim=-1)))


def encoder(w, image):
    """The four stages' outputs for an image (batch, height, width)."""
    x = layer_norm(w.at("patch_embed", 2), convolve(w.at("patch_embed", 0), torch.stack([image] * 3, -1), stride=4))
    outputs = []
    for stage in range(STAGES):
        layer = w.at("layers", stage)
        for number in range(layer.count("blocks")):
            block = layer.at("blocks", number)
            x = x + ss2d(block.at("op"), layer_norm(block.at("norm"), x))
        outputs.append(layer_norm(w.at(f"outnorm{stage}"), x))
        if stage < STAGES - 1:
            x = merge_patches(layer.at("downsample"), x)
    return outputs


def crm(w, ct, pet):
    """Channel rectification: a weight for each channel of each modality, added to 1."""
    tokens = torch.cat([ct, pet], dim=-1).flatten(1, 2).transpose(1, 2)
    hidden = gelu(linear(w.at(1), layer_norm(w.at(0), tokens)))
    hidden = ss1d(w.at(3), hidden)
    weight = torch.sigmoid(linear(w.at(5), layer_norm(w.at(4), hidden)))[..., 0]
    weight_ct, weight_pet = weight.chunk(2, dim=1)
    return ct + weight_ct[:, None, None] * ct, pet + weight_pet[:, None, None] * pet


def conv_bn_relu(w, x, strides):
    for number, stride in enumerate(strides):
        x = convolve(w.at(3 * number), x, stride=stride, padding=1)
        x = batch_norm(w.at(3 * number + 1), x).clamp(min=0)
    return x


def dcim(convolutions, mamba, ct, pet):
    ct = conv_bn_relu(convolutions.at("inner_convs"), ct, (1, 1))
    pet = conv_bn_relu(convolutions.at("outer_convs"), pet, (1, 2, 2, 1))
    pet = pet + ss2d(mamba.at("outer_attn"), layer_norm(mamba.at("outer_norm1"), pet))
    batch, height, width, channels = ct.shape
    ct = F.pad(ct, (0, 0, 0, -width % REGION, 0, -height % REGION))
    rows, columns = ct.shape[1] // REGION, ct.shape[2] // REGION
    assert pet.shape == (batch, rows, columns, channels)
    fused = torch.zeros_like(ct)
    for row in range(rows):
        for column in range(columns):
            box = (
                slice(None),
                slice(row * REGION, (row + 1) * REGION),
                slice(column * REGION, (column + 1) * REGION),
            )
            region = ct[box]
            normed = layer_norm(mamba.at("inner_norm1"), region.reshape(batch, -1)).reshape(region.shape)
            fused[box] = region + ss2d(mamba.at("inner_attn"), normed) + pet[:, row, column][:, None, None]
    return fused[:, :height, :width]


def channel_attention(w, x):
    f = convolve(w.at(2), gelu(convolve(w.at(0), x, padding=1)), padding=1)

    def g(v):
        return silu(v @ w.at(3)["fc.0.weight"].flatten(1).T) @ w.at(3)["fc.2.weight"].flatten(1).T

    gate = torch.sigmoid(g(f.mean((1, 2))) + g(f.amax((1, 2))))
    return f * gate[:, None, None]


def cvss(w, x):
    x = x * w["scale1"] + ss2d(w.at("op"), layer_norm(w.at("norm1"), x))
    return channel_attention(w.at("conv_blk", "cab"), layer_norm(w.at("norm2"), x)) + x * w["scale2"]


def expand_patches(w, x):
    y = linear(w.at("expand"), x)
    batch, height, width, channels = y.shape
    quarter = channels // 4
    expanded = y.new_zeros(batch, 2 * height, 2 * width, quarter)
    for row in range(2):
        for column in range(2):
            start = (2 * row + column) * quarter
            expanded[:, row::2, column::2] = y[..., start : start + quarter]
    return layer_norm(w.at("norm"), expanded)


def decoder(w, stages):
    x = expand_patches(w.at("layers_up", 0), stages[-1])
    for number, skip in enumerate(reversed(stages[:-1]), start=1):
        layer = w.at("layers_up", number)
        x = x + skip
        for block in range(layer.count("blocks")):
            x = cvss(layer.at("blocks", block), x)
        if number < STAGES - 1:
            up = layer.at("upsample")
            x = layer_norm(up.at("norm"), bilinear_twice(linear(up.at("linear"), x)))
    x = layer_norm(w.at("norm_up"), x)
    x = bilinear_twice(linear(w.at("up", "linear1"), x))
    x = bilinear_twice(linear(w.at("up", "linear2"), x))
    return convolve(w.at("output"), layer_norm(w.at("up", "norm"), x))


@torch.no_grad()
def cipa(weights: Mapping[str, Tensor], ct: Tensor, pet: Tensor) -> Tensor:
    """Logits (batch, classes, height, width) for CT and PET (batch, height, width)."""
    w = Weights({name: tensor.double() for name, tensor in weights.items()})
    height, width = ct.shape[1:]
    ct, pet = (F.pad(image.double(), (0, -width % 32, 0, -height % 32)) for image in (ct, pet))
    fused = []
    backbone = w.at("backbone")
    both = zip(encoder(backbone.at("vssm"), ct), encoder(backbone.at("vssm"), pet), strict=True)
    for stage, (x_ct, x_pet) in enumerate(both):
        rectified = crm(backbone.at("cross_mamba", stage, "channel_weights", "mlp"), x_ct, x_pet)
        interaction = dcim(backbone.at("region_patch", stage), backbone.at("channel_attn_mamba", stage), *rectified)
        fused.append(x_ct + x_pet + interaction)
    logits = decoder(w.at("decode_head"), fused).permute(0, 3, 1, 2)
    return logits[..., :height, :width]


def read_listing(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from lines such as ``decode_head.output.weight (1, 96, 1, 1)``."""
    shapes = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, shape = line.split(" ", 1)
        shapes[name] = tuple(int(n) for n in re.findall(r"\d+", shape))
    return shapes


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A float32 tensor in the range of a trained network's, told by the tensor's name; none is left at 0 or 1."""
    kind = name.rsplit(".", 1)[-1]
    if kind == "num_batches_tracked":
        return torch.tensor(1000)
    noise = torch.randn(shape, generator=generator)
    if kind == "running_var":
        return 0.5 + torch.rand(shape, generator=generator)
    if kind == "A_logs":
        return torch.log(torch.arange(1.0, shape[-1] + 1)) + 0.2 * noise
    if kind == "dt_projs_bias":
        # The inverse of softplus, for steps between 0.001 and 0.1.
        step = torch.exp(torch.rand(shape, generator=generator) * math.log(100) + math.log(1e-3))
        return step + torch.log(-torch.expm1(-step))
    if kind == "Ds" or kind.startswith("scale") or (kind == "weight" and len(shape) == 1):
        return 1 + 0.3 * noise
    if kind in ("bias", "running_mean"):
        return 0.2 * noise
    if kind in ("x_proj_weight", "dt_projs_weight"):
        return noise / math.sqrt(shape[-1])
    assert kind == "weight", name
    return noise / math.sqrt(math.prod(shape[1:]))


def random_weights_like(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random weights for names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: random_tensor(name, tuple(shape), generator) for name, shape in shapes.items()}


def random_weights(listing: Path, seed: int) -> dict[str, Tensor]:
    """Random weights for a file of names and shapes."""
    return random_weights_like(read_listing(listing), seed)
