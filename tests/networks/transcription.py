"""H2ASeg's equations written out plainly in float64, as a second opinion on the fast implementation.

Loops, explicit softmax, explicit means and n x n matrices; nothing is shared with the package but the weights.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F


def convolve(x, layer):
    function = {4: F.conv2d, 5: F.conv3d}[x.dim()]
    return function(x, layer.weight.double(), layer.bias.double(), layer.stride, layer.padding)


def upsample(x, size):
    mode = {4: "bilinear", 5: "trilinear"}[x.dim()]
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=False)


def norm_prelu(x, prelu):
    axes = tuple(range(2, x.dim()))
    mean = x.mean(axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(axes, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + 1e-5)
    return torch.where(x >= 0, x, prelu.weight.double() * x)


def bdsa_one_direction(source, target, weights, out_layer, grid):
    """Equation 1 for one direction; source and target (C, n), weights a dict of (C, C) matrices."""
    channels = source.shape[0]
    k_s, v_s = weights["k_s"] @ source, weights["v_s"] @ source
    q_s, q_t = weights["q_s"] @ target, weights["q_t"] @ target
    k_t, v_t = weights["k_t"] @ target, weights["v_t"] @ target

    def attend(q, k, v):
        scores = q.T @ k / math.sqrt(channels)  # query x key
        scores = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
        return v @ (scores / scores.sum(dim=1, keepdim=True)).T

    both = torch.cat([attend(q_s, k_s, v_s), attend(q_t, k_t, v_t)])
    return convolve(both.reshape(1, 2 * channels, *grid), out_layer)[0]


def bdsa(module, ct, pet, grid):
    """Both directions for one sample: (C, n) maps of CT and PET to (C, grid...)."""
    channels = ct.shape[0]
    rows_ct = dict(zip(module.PROJECTIONS, module.project_ct.weight.double().split(channels), strict=True))
    rows_pet = dict(zip(module.PROJECTIONS, module.project_pet.weight.double().split(channels), strict=True))

    def direction(target_rows, source_rows):
        return {
            "q_s": target_rows["q_source"], "q_t": target_rows["q_target"],
            "k_t": target_rows["k_target"], "v_t": target_rows["v_target"],
            "k_s": source_rows["k_source"], "v_s": source_rows["v_source"],
        }  # fmt: skip

    new_ct = bdsa_one_direction(pet, ct, direction(rows_ct, rows_pet), module.out_ct, grid)
    new_pet = bdsa_one_direction(ct, pet, direction(rows_pet, rows_ct), module.out_pet, grid)
    return new_ct, new_pet


def mcsa(module, ct, pet):
    """MCSA for a batch, window by window."""
    size = ct.shape[2:]
    grid = [n // w for n, w in zip(size, module.window, strict=True)]
    ct_tokens, pet_tokens = convolve(ct, module.pool_ct), convolve(pet, module.pool_pet)
    assert list(ct_tokens.shape[2:]) == grid
    inter = [bdsa(module.inter, c.flatten(1), p.flatten(1), grid) for c, p in zip(ct_tokens, pet_tokens, strict=True)]
    ct = norm_prelu(ct + upsample(torch.stack([i[0] for i in inter]), size), module.inter_ct[1])
    pet = norm_prelu(pet + upsample(torch.stack([i[1] for i in inter]), size), module.inter_pet[1])
    new_ct, new_pet = torch.zeros_like(ct), torch.zeros_like(pet)
    for sample in range(ct.shape[0]):
        for corner in itertools.product(*(range(0, n, w) for n, w in zip(size, module.window, strict=True))):
            box = tuple(slice(c, c + w) for c, w in zip(corner, module.window, strict=True))
            where = (sample, slice(None), *box)
            new_ct[where], new_pet[where] = bdsa(
                module.intra, ct[where].flatten(1), pet[where].flatten(1), module.window
            )
    return norm_prelu(ct + new_ct, module.intra_ct[1]), norm_prelu(pet + new_pet, module.intra_pet[1])


def mlp(module, x):
    first, second = module[0], module[2]
    hidden = torch.tanh(x @ first.weight.double().T + first.bias.double())
    return torch.tanh(hidden @ second.weight.double().T + second.bias.double())


def tamw(module, features, p):
    """Equations 2 to 4."""
    fore, back = p * features, (1 - p) * features
    axes = tuple(range(2, features.dim()))
    shape = (*features.shape[:2], *[1] * len(axes))
    w_fore = mlp(module.foreground_mlp, fore.mean(axes)).reshape(shape)
    w_back = mlp(module.background_mlp, back.mean(axes)).reshape(shape)
    return features + w_fore * fore + w_back * back


def foreground(logits, independent):
    if independent:
        return 1 - (1 - torch.sigmoid(logits)).prod(dim=1, keepdim=True)
    exponentials = torch.exp(logits)
    return 1 - exponentials[:, :1] / exponentials.sum(dim=1, keepdim=True)


def residual(block, x, stem):
    if stem:
        inner = convolve(x, block.main[0])
        return convolve(norm_prelu(inner, block.main[2]), block.main[3]) + convolve(x, block.skip[0])
    inner = convolve(norm_prelu(x, block.main[1]), block.main[2])
    main = convolve(norm_prelu(inner, block.main[4]), block.main[5])
    return main + convolve(norm_prelu(x, block.skip[1]), block.skip[2])


def h2aseg(network, x, independent):
    """All levels' logits, highest resolution first."""
    extra = [x[:, c] for c in range(x.shape[1]) if c not in (network.ct_channel, network.pet_channel)]
    ct = torch.stack([x[:, network.ct_channel], *extra], dim=1)
    pet = torch.stack([x[:, network.pet_channel], *extra], dim=1)
    skips = []
    for level, module in enumerate(network.encoder.mcsa):
        ct = residual(network.encoder.ct[level], ct, level == 0)
        pet = residual(network.encoder.pet[level], pet, level == 0)
        ct, pet = mcsa(module, ct, pet)
        skips.append((ct, pet))

    def head(level, decoded):
        layers = network.decoder.seg_layers[level]
        return convolve(norm_prelu(decoded, layers[1]), layers[2])

    decoded = torch.cat(skips[-1], dim=1)
    predictions = [head(len(skips) - 1, decoded)]
    for level in reversed(range(len(skips) - 1)):
        ct, pet = skips[level]
        p = foreground(upsample(predictions[0], ct.shape[2:]), independent)
        features = torch.cat([pet, ct, upsample(decoded, ct.shape[2:])], dim=1)
        decoded = residual(network.decoder.stages[level], tamw(network.decoder.tamw[level], features, p), False)
        predictions.insert(0, head(level, decoded))
    return predictions
