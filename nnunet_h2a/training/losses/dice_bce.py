"""CIPA's loss."""

from __future__ import annotations

import torch

from nnunet_h2a.training.losses.one_hot import OneHotLoss, mean_over_voxels, soft_dice


class DiceBCELoss(OneHotLoss):
    """Binary cross-entropy + Dice of every image.

    Mei et al., CVPR 2025 (arXiv 2503.17261), section 4 and the released training script, for one tumour class with
    probability p and target g::

        L_bce  = mean(-g log(p) - (1 - g) log(1 - p))
        L_dice = mean over images of 1 - (2 sum(p g) + 1) / (sum(p) + sum(g) + 1)

    With several labels the first is cross-entropy, which for two is the same; Dice is averaged over foreground classes.

    Args:
        regions, ignore_label: see :class:`OneHotLoss`.
        smooth: in numerator and denominator of Dice.
    """

    def __init__(self, regions: bool, ignore_label: int | None = None, smooth: float = 1.0) -> None:
        super().__init__(regions, ignore_label)
        self.smooth = smooth

    def compute(
        self, log_p: torch.Tensor, log_q: torch.Tensor | None, target: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """See :meth:`OneHotLoss.compute`."""
        p = log_p.exp()
        if log_q is None:
            entropy = mean_over_voxels((-target * log_p).sum(1, keepdim=True), valid)
            p, target = p[:, 1:], target[:, 1:]
        else:
            entropy = mean_over_voxels(-target * log_p - (1 - target) * log_q, valid)
        return entropy + 1 - soft_dice(p, target, valid, self.smooth, 0.0).mean()
