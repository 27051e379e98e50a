"""ISA-Net's loss."""

from __future__ import annotations

import torch

from nnunet_h2a.training.losses.one_hot import OneHotLoss, mean_over_voxels, soft_dice


class DiceFocalLoss(OneHotLoss):
    """Dice + focal loss.

    Huang et al. 2022 (arXiv 2211.02256), eq. 9 to 11, for one tumour class with probability p and target g::

        L_dice  = 1 - 2 sum(p g) / (sum(p) + sum(g) + epsilon)
        L_focal = mean(-alpha (1 - p)^gamma g log(p) - (1 - alpha) p^gamma (1 - g) log(1 - p))

    Eq. 10 prints alpha as an exponent; the factor of Lin et al. 2017 is meant. The paper does not say over what focal
    is summed; the mean over voxels is taken, and epsilon is nnU-Net's. With several labels, focal is the sum over
    labels of ``-alpha g_c (1 - p_c)^gamma log(p_c)``: for two of them and alpha 0.5 the formula above. With regions it
    is the formula above, averaged over regions. Dice is per image, averaged over images and foreground classes.

    Args:
        regions, ignore_label: see :class:`OneHotLoss`.
        alpha: weight of the foreground in focal; with labels of every label.
        gamma: exponent of focal.
        epsilon: in Dice's denominator.
    """

    def __init__(
        self,
        regions: bool,
        ignore_label: int | None = None,
        alpha: float = 0.5,
        gamma: float = 2.0,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__(regions, ignore_label)
        self.alpha, self.gamma, self.epsilon = alpha, gamma, epsilon

    def compute(
        self, log_p: torch.Tensor, log_q: torch.Tensor | None, target: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """See :meth:`OneHotLoss.compute`."""
        p = log_p.exp()
        if log_q is None:
            focal = mean_over_voxels((-self.alpha * target * (1 - p) ** self.gamma * log_p).sum(1, keepdim=True), valid)
            p, target = p[:, 1:], target[:, 1:]
        else:
            positive = -self.alpha * target * log_q.exp() ** self.gamma * log_p
            negative = -(1 - self.alpha) * (1 - target) * p**self.gamma * log_q
            focal = mean_over_voxels(positive + negative, valid)
        return 1 - soft_dice(p, target, valid, 0.0, self.epsilon).mean() + focal
