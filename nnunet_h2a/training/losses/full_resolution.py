"""Deep supervision against the label at full resolution, as H2ASeg's paper has it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nnunet_h2a.networks.precision import wide, without_autocast

_LINEAR = {4: "bilinear", 5: "trilinear"}


class FullResolutionLoss(nn.Module):
    """Weighted sum of a loss over predictions of several resolutions, each up-sampled to the label's.

    Lu et al. 2024 (arXiv 2403.18339), eq. 5: L = sum over k = 1 ... n of (n + 1 - k) L(upsample(P^k), label). The
    weights are not normalised. Up-sampling is linear with align_corners False, as in the network.

    nnU-Net's own deep supervision compares each prediction with the label at the prediction's resolution instead.

    Args:
        loss: of logits (batch, classes, spatial...) and target at full resolution.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the loss, a scalar.

        Args:
            outputs: logits, highest resolution first.
            targets: of which the first, at full resolution, is used.
        """
        target, n = targets[0], len(outputs)
        total = outputs[0].new_zeros((), dtype=wide(outputs[0]).dtype)
        with without_autocast(outputs[0]):
            for level, logits in enumerate(outputs):
                logits = wide(logits)
                if logits.shape[2:] != target.shape[2:]:
                    mode = _LINEAR[logits.ndim]
                    logits = nn.functional.interpolate(logits, target.shape[2:], mode=mode, align_corners=False)
                total = total + (n - level) * self.loss(logits, target)
        return total
