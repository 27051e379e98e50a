"""The papers' losses against loops over voxels in float64, with every kind of target nnU-Net has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nnunet_h2a.training.losses import DiceBCELoss, DiceFocalLoss, FullResolutionLoss, one_hot

IGNORE = 9


def softmax(values):
    powers = [math.exp(v) for v in values]
    return [p / sum(powers) for p in powers]


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def voxels_of(logits, target):
    """Logits and targets (one map per class) of every voxel that counts, image by image, as plain numbers.

    The target's last map says which voxels do not count; None for its shape says that all do.
    """
    classes = logits.shape[1]
    images = []
    for image_logits, image_target in zip(logits, target, strict=True):
        z = image_logits.reshape(classes, -1).T.tolist()
        t = image_target.reshape(image_target.shape[0], -1).T.tolist()
        pairs = zip(z, t, strict=True)
        images.append([(a, b[:classes]) for a, b in pairs if len(b) == classes or b[classes] == 0])
    return images


def dice_of(p, t, numerator, denominator):
    overlap = sum(a * b for a, b in zip(p, t, strict=True))
    return 1 - (2 * overlap + numerator) / (sum(p) + sum(t) + denominator)


def plain(images, regions, point, numerator, denominator):
    """A loss of voxels averaged over all of them, plus Dice averaged over images and foreground classes."""
    points, dices = [], []
    for image in images:
        probability = [[sigmoid(v) for v in z] if regions else softmax(z) for z, _ in image]
        for p, (_, t) in zip(probability, image, strict=True):
            points += point(p, t)
        for c in range(0 if regions else 1, len(image[0][0])):
            dices.append(dice_of([p[c] for p in probability], [t[c] for _, t in image], numerator, denominator))
    return sum(points) / len(points) + sum(dices) / len(dices)


def focal_of(regions):
    def focal(p, t):
        if regions:
            return [
                -0.5 * (1 - a) ** 2 * b * math.log(a) - 0.5 * a**2 * (1 - b) * math.log(1 - a)
                for a, b in zip(p, t, strict=True)
            ]
        return [-0.5 * sum(b * (1 - a) ** 2 * math.log(a) for a, b in zip(p, t, strict=True))]

    return focal


def entropy_of(regions):
    def entropy(p, t):
        if regions:
            return [-b * math.log(a) - (1 - b) * math.log(1 - a) for a, b in zip(p, t, strict=True)]
        return [-sum(b * math.log(a) for a, b in zip(p, t, strict=True))]

    return entropy


LOSSES = {"dice + focal": (DiceFocalLoss, focal_of, 0.0, 1e-5), "dice + BCE": (DiceBCELoss, entropy_of, 1.0, 1.0)}


def case(kind, spatial, dtype=torch.float64):
    """Logits, target in nnU-Net's form and the same as one map per class, for a kind of dataset."""
    generator = torch.Generator().manual_seed(3)
    classes = 2 if kind.startswith("one") else 3
    logits = 3 * torch.randn(2, classes, *spatial, generator=generator, dtype=torch.float64)
    ignore = "ignore" in kind
    if kind.startswith("regions"):
        maps = torch.randint(0, 2, (2, classes + ignore, *spatial), generator=generator)
        return logits.to(dtype), maps, maps.double(), True
    labels = torch.randint(0, classes, (2, 1, *spatial), generator=generator)
    labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.2, IGNORE, labels) if ignore else labels
    maps = [labels == c for c in range(classes)] + ([labels == IGNORE] if ignore else [])
    maps = torch.cat(maps, 1).double()
    if "mixed" in kind:
        other = maps.roll(1, 0)
        maps = 0.5 * maps + 0.5 * other
        return logits.to(dtype), maps, maps, False
    return logits.to(dtype), labels.to(torch.int16), maps, False


KINDS = [
    "one class",
    "classes",
    "classes, ignore",
    "regions",
    "regions, ignore",
    "one class, mixed",
    "classes, ignore, mixed",
]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spatial", [(3, 4, 5), (4, 6)], ids=["3D", "2D"])
def test_formula(name, kind, spatial):
    loss, point, numerator, denominator = LOSSES[name]
    logits, target, maps, regions = case(kind, spatial)
    expected = plain(voxels_of(logits, maps), regions, point(regions), numerator, denominator)
    found = loss(regions, IGNORE if "ignore" in kind else None)(logits, target)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient(name, kind):
    loss = LOSSES[name][0]
    logits, target, _, regions = case(kind, (2, 2, 2))
    function = loss(regions, IGNORE if "ignore" in kind else None)
    assert torch.autograd.gradcheck(lambda x: function(x, target), logits.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_two_labels_are_one_region(name):
    """Two softmax heads (0, z) and one sigmoid of z: the paper's binary formula either way."""
    loss = LOSSES[name][0]
    z, target = torch.randn(2, 1, 4, 5, 6, dtype=torch.float64), torch.randint(0, 2, (2, 1, 4, 5, 6))
    heads = torch.cat([torch.zeros_like(z), z], 1)
    assert loss(False)(heads, target).item() == pytest.approx(loss(True)(z, target).item(), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 60000.0])
@pytest.mark.parametrize("regions", [False, True])
def test_half_precision(name, dtype, scale, regions):
    """Sums over 2 million voxels and logits at the end of float16: finite, with finite gradients, near float64's."""
    loss = LOSSES[name][0](regions)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.rand(1, 2, 128, 128, 128, generator=generator) - 0.5).mul(scale).to(dtype).requires_grad_()
    target = torch.randint(0, 2, (1, 2 if regions else 1, 128, 128, 128), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(logits, target)
    found.backward()
    assert found.dtype == torch.float32
    assert torch.isfinite(found)
    assert torch.isfinite(logits.grad).all()
    assert found.item() == pytest.approx(loss(logits.detach().double(), target).item(), rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("regions", [False, True])
def test_nothing_to_learn_from(name, regions):
    """No foreground, or every voxel ignored: a finite loss, and no gradient from ignored voxels."""
    loss = LOSSES[name][0](regions, IGNORE)
    logits = torch.randn(1, 2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    empty = torch.zeros(1, 3 if regions else 1, 4, 4, 4)
    assert torch.isfinite(loss(logits, empty))
    ignored = empty.clone()
    ignored[:, -1] = 1 if regions else IGNORE
    found = loss(logits, ignored)
    found.backward()
    assert torch.isfinite(found)
    assert not logits.grad.any()


def test_one_hot():
    labels = torch.tensor([[[0, 2], [IGNORE, 1]]]).unsqueeze(0)
    maps = one_hot(labels, 3, IGNORE, torch.float32)
    assert maps.shape == (1, 4, 2, 2)
    np.testing.assert_array_equal(maps.argmax(1)[0], [[0, 2], [3, 1]])
    assert (maps.sum(1) == 1).all()


@pytest.mark.parametrize("spatial", [(8, 8, 8), (4, 8, 16), (8, 8)])
def test_full_resolution(spatial):
    """Eq. 5 of H2ASeg: weights n, n - 1, ... 1, logits up-sampled by hand (every voxel's position, float64)."""
    generator = torch.Generator().manual_seed(2)
    sizes = [tuple(max(1, s // f) for s in spatial) for f in (1, 2, 4)]
    outputs = [torch.randn(2, 2, *size, generator=generator, dtype=torch.float64) for size in sizes]
    target = torch.randint(0, 2, (2, 1, *spatial), generator=generator)
    inner = DiceBCELoss(False)
    expected = sum((3 - k) * inner(upsampled(logits, spatial), target).item() for k, logits in enumerate(outputs))
    found = FullResolutionLoss(inner)(outputs, [target, target[..., ::2]])
    assert found.item() == pytest.approx(expected, rel=1e-10)
    half = FullResolutionLoss(inner)([o.half().requires_grad_() for o in outputs], [target])
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(expected, rel=1e-2)


def upsampled(logits, spatial):
    """Linear interpolation at voxel centres, one axis after the other."""
    values = logits.numpy()
    for axis, size in enumerate(spatial, start=2):
        old = values.shape[axis]
        position = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(position).astype(int)
        high, weight = np.minimum(low + 1, old - 1), position - low
        weight = weight.reshape([-1 if a == axis else 1 for a in range(values.ndim)])
        values = np.take(values, low, axis) * (1 - weight) + np.take(values, high, axis) * weight
    return torch.from_numpy(values)
