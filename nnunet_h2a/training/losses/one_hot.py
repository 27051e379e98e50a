"""Targets as one map per class, hard or mixed, and what every loss on them shares."""

from __future__ import annotations

import torch
from torch import nn

from nnunet_h2a.networks.precision import wide, without_autocast


def one_hot(target: torch.Tensor, n_classes: int, ignore_label: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Return a label map as one map per class; with an ignore label, a last map says where it is.

    nnU-Net's targets of region-based training have this form already.

    Args:
        target: labels, shape (batch, 1, spatial...), of any type.
        n_classes: number of labels, background included and the ignore label not.
        ignore_label: label that does not count, or None.
        dtype: type of the result.

    Returns:
        0 and 1, shape (batch, n_classes [+ 1], spatial...); all maps of classes are 0 at ignored voxels.
    """
    labels = target[:, 0].long()
    maps = n_classes
    if ignore_label is not None:
        labels = torch.where(labels == ignore_label, n_classes, labels)
        maps += 1
    shape = (target.shape[0], maps, *target.shape[2:])
    return torch.zeros(shape, dtype=dtype, device=target.device).scatter_(1, labels[:, None], 1)


class OneHotLoss(nn.Module):
    """A loss of probabilities against one map per class.

    It is computed in float32 (float64 for float64 logits) whatever autocast says: squares and sums of half-precision
    probabilities over millions of voxels overflow or vanish.

    Args:
        regions: whether classes are regions, one sigmoid each; else labels with one softmax, the first of them
            background.
        ignore_label: label that does not count, None where there is none. For regions it only says that there is one.
    """

    def __init__(self, regions: bool, ignore_label: int | None = None) -> None:
        super().__init__()
        self.regions, self.ignore_label = regions, ignore_label

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss, a scalar.

        Args:
            logits: shape (batch, classes, spatial...).
            target: labels, shape (batch, 1, spatial...); or one map per class, values 0 to 1 (mixed targets, regions),
                shape (batch, classes, spatial...), with an ignore label one more map that is above 0 at ignored voxels.
        """
        with without_autocast(logits):
            logits = wide(logits)
            if not self.regions and target.shape[1] == 1:
                target = one_hot(target, logits.shape[1], self.ignore_label, logits.dtype)
            target = target.to(logits.dtype)
            valid = None
            if self.ignore_label is not None:
                valid = (target[:, -1:] == 0).to(logits.dtype)
                target = target[:, :-1]
            if self.regions:
                log_p, log_q = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
            else:
                log_p, log_q = logits.log_softmax(1), None
            return self.compute(log_p, log_q, target, valid)

    def compute(
        self, log_p: torch.Tensor, log_q: torch.Tensor | None, target: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the loss.

        Args:
            log_p: logarithms of the probabilities, shape (batch, classes, spatial...).
            log_q: logarithms of 1 - p for regions, None for labels.
            target: shape of ``log_p``, 0 to 1.
            valid: 1 where voxels count, shape (batch, 1, spatial...), None where all do.
        """
        raise NotImplementedError


def mean_over_voxels(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of values (batch, classes, spatial...) over voxels and classes; 0 where no voxel counts."""
    if valid is None:
        return values.mean()
    return (values * valid).sum() / (valid.sum() * values.shape[1]).clamp(min=1)


def soft_dice(
    p: torch.Tensor, target: torch.Tensor, valid: torch.Tensor | None, smooth: float, epsilon: float
) -> torch.Tensor:
    """Return (2 sum p t + smooth) / (sum p + sum t + smooth + epsilon) of every image and class, (batch, classes)."""
    if valid is not None:
        p, target = p * valid, target * valid
    axes = tuple(range(2, p.ndim))
    return (2 * (p * target).sum(axes) + smooth) / (p.sum(axes) + target.sum(axes) + smooth + epsilon)
