"""ISA-Net's equations written out plainly in float64, as a second opinion on the implementation.

Loops over samples, channels and slices, explicit means, softmax and resampling; nothing is shared with the package
but the weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def convolve(x, layer, kernel_size):
    """Convolution of the input's size, its kernel as stated here and not as the layer has it."""
    assert tuple(layer.weight.shape[2:]) == tuple(kernel_size)
    function = {4: F.conv2d, 5: F.conv3d}[x.dim()]
    bias = None if layer.bias is None else layer.bias.double()
    return function(x, layer.weight.double(), bias, 1, [k // 2 for k in kernel_size])


def conv_norm_relu(layers, x, kernel_size):
    assert layers[0].bias is None
    x = convolve(x, layers[0], kernel_size)
    axes = tuple(range(2, x.dim()))
    shape = (1, -1, *[1] * len(axes))
    mean = x.mean(axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(axes, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + 1e-5)
    x = x * layers[1].weight.double().reshape(shape) + layers[1].bias.double().reshape(shape)
    return torch.where(x > 0, x, torch.zeros_like(x))


def resample_rows(plane, rows):
    """Linear resampling of a plane's first axis, samples at the centres of ``rows`` equal parts."""
    result = []
    for row in range(rows):
        position = min(max((row + 0.5) * plane.shape[0] / rows - 0.5, 0.0), plane.shape[0] - 1.0)
        below = math.floor(position)
        above = min(below + 1, plane.shape[0] - 1)
        result.append(plane[below] + (position - below) * (plane[above] - plane[below]))
    return torch.stack(result)


def weight_map(query, key):
    """Equations 5 to 8, map by map and plane by plane; (batch, channels, spatial...)."""
    result = torch.empty_like(query)
    for sample in range(query.shape[0]):
        for channel in range(query.shape[1]):
            q, k = query[sample, channel], key[sample, channel]
            rows, columns = q.shape[-2:]
            planes = zip(q.reshape(-1, rows, columns), k.reshape(-1, rows, columns), strict=True)
            u = torch.stack([a @ (b if rows == columns else resample_rows(b, columns)) for a, b in planes])
            u = torch.exp(u - u.max())
            result[sample, channel] = (u / u.sum()).reshape(q.shape)
    return result


def isa(module, x, kernel_size):
    """Equations 2 to 8 and the output convolution."""
    shape = (*x.shape[:2], *[1] * (x.dim() - 2))
    pooled = x.flatten(2).sum(-1) / x[0, 0].numel()
    hidden = pooled @ module.fc1.weight.double().T + module.fc1.bias.double()
    hidden = torch.where(hidden > 0, hidden, torch.zeros_like(hidden))
    assert hidden.shape[1] == 2 * x.shape[1]
    weights = 1 / (1 + torch.exp(-(hidden @ module.fc2.weight.double().T + module.fc2.bias.double())))
    scaled = weights.reshape(shape) * x
    query = conv_norm_relu(module.query, scaled, kernel_size)
    key = conv_norm_relu(module.key, scaled, [{1: 1, 3: 5, 5: 7}[k] for k in kernel_size])
    value = conv_norm_relu(module.value, scaled, [1] * len(kernel_size))
    both = torch.cat([weight_map(query, key) * value, x], dim=1)
    return convolve(both, module.fuse, [1] * len(kernel_size))


def residual(module, x, kernel_size):
    """Equation 1 without its pooling, twice."""
    x = conv_norm_relu(module.first, x, kernel_size) + conv_norm_relu(module.shortcut, x, [1] * len(kernel_size))
    return conv_norm_relu(module.second, x, kernel_size) + x


def pool(x, stride):
    """Maximum of each box of ``stride``."""
    for axis, step in enumerate(stride, start=2):
        x = torch.stack([x[(slice(None),) * axis + (slice(i, None, step),)] for i in range(step)]).amax(0)
    return x


def deconvolve(x, layer, stride):
    """Deconvolution with kernel = stride: each voxel becomes a box of its own."""
    assert tuple(layer.weight.shape[2:]) == tuple(stride)
    weight, dims = layer.weight.double(), len(stride)
    boxes = torch.tensordot(x, weight, dims=([1], [0]))  # batch, spatial..., channels, box...
    order = [0, dims + 1]
    for axis in range(dims):
        order += [1 + axis, dims + 2 + axis]
    size = [n * s for n, s in zip(x.shape[2:], stride, strict=True)]
    result = boxes.permute(order).reshape(x.shape[0], weight.shape[1], *size)
    return result + layer.bias.double().reshape(1, -1, *[1] * dims)


def isanet(network, x, kernels, strides, branches=("pet", "ct")):
    """Logits of all decoder levels, highest resolution first; kernels and strides per level and axis."""
    if x.shape[1] == 1:
        images = dict.fromkeys(branches, x)
    else:
        extra = [x[:, c] for c in range(x.shape[1]) if c not in (network.ct_channel, network.pet_channel)]
        images = {
            "ct": torch.stack([x[:, network.ct_channel], *extra], dim=1),
            "pet": torch.stack([x[:, network.pet_channel], *extra], dim=1),
        }
    skips = {}
    for branch in branches:
        x, skips[branch] = images[branch], []
        for level, module in enumerate(network.encoder.branches[branch]):
            x = residual(module.residual, pool(x, strides[level]), kernels[level])
            x = isa(module.isa, x, kernels[level])
            skips[branch].append(x)
    other = None
    for branch in branches:
        x, outputs = skips[branch][-1], {}
        for level in range(len(kernels) - 2, -1, -1):
            module = network.decoder.branches[branch][level]
            parts = [deconvolve(x, module.upsample, strides[level + 1]), skips[branch][level]]
            if other is not None:
                parts.append(other[level])
            x = isa(module.isa, residual(module.residual, torch.cat(parts, dim=1), kernels[level]), kernels[level])
            outputs[level] = x
        other = outputs
    return [
        convolve(other[level], network.decoder.seg_layers[level], [1] * len(strides[0]))
        for level in range(len(kernels) - 1)
    ]
