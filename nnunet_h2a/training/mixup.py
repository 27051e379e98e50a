"""Mixing a batch with the one before it."""

from __future__ import annotations

import torch

from nnunet_h2a.training.losses.one_hot import one_hot


class Mixup:
    """Mixes images and labels of a training step with those of the step before, now and then.

    Zhang et al. 2018, as Huang et al. 2022 use it: x = lambda x_1 + (1 - lambda) x_2, and the same for the label as
    one map per class. The partner is the sample of the step before: another random patch, which costs nothing.

    Args:
        probability: of a step being mixed.
        share: lambda.
        n_classes: labels with background; for regions the number of regions.
        regions: whether targets are one map per region already.
        ignore_label: see :class:`~nnunet_h2a.training.losses.OneHotLoss`; a voxel ignored in either does not count.
    """

    def __init__(
        self, probability: float, share: float, n_classes: int, regions: bool, ignore_label: int | None
    ) -> None:
        self.probability, self.share = probability, share
        self._n_classes, self._regions, self._ignore_label = n_classes, regions, ignore_label
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, data: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch, mixed or as it is.

        Args:
            data: shape (batch, channels, spatial...).
            target: labels, shape (batch, 1, spatial...), or one map per region.
        """
        before, self._before = self._before, (data, target)
        if before is None or before[0].shape != data.shape or torch.rand(1).item() >= self.probability:
            return data, target
        mixed = self.share * self._maps(target) + (1 - self.share) * self._maps(before[1])
        return self.share * data + (1 - self.share) * before[0], mixed

    def _maps(self, target: torch.Tensor) -> torch.Tensor:
        if self._regions:
            return target.float()
        return one_hot(target, self._n_classes, self._ignore_label, torch.float32)
