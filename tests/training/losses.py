"""Labels, targets and the loss in plain float64, for the trainers' tests."""

from __future__ import annotations

import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

LABELS = {"background": 0, "tumor": 1}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}


def targets_of(trainer, classes, batch=2):
    """Targets at all levels, made by nnU-Net's own transform from one segmentation."""
    generator = torch.Generator().manual_seed(1)
    patch = trainer.configuration_manager.patch_size
    segmentation = torch.randint(0, classes, (batch, 1, *patch), generator=generator)
    transform = DownsampleSegForDSTransform(ds_scales=trainer._get_deep_supervision_scales())
    samples = [transform(segmentation=s)["segmentation"] for s in segmentation]
    return [torch.stack([s[level] for s in samples]) for level in range(len(samples[0]))]


def plain_loss(logits, target):
    """Dice + cross-entropy as nnU-Net defines them (no background in Dice, one Dice per sample), in float64."""
    logits, target = logits.double(), target[:, 0].long()
    p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    entropy = -torch.log(p.gather(1, target[:, None])).mean()
    scores = []
    for sample in range(logits.shape[0]):
        for c in range(1, logits.shape[1]):
            truth = (target[sample] == c).double()
            overlap = 2 * (p[sample, c] * truth).sum() + 1e-5
            scores.append(overlap / (p[sample, c].sum() + truth.sum() + 1e-5))
    return entropy - torch.stack(scores).mean()
