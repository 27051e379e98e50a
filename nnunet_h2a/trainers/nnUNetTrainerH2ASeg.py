"""nnU-Net's trainer for H2ASeg."""

from __future__ import annotations

from nnunet_h2a.networks.h2aseg import H2ASeg
from nnunet_h2a.training.fusion_trainer import FusionTrainer
from nnunet_h2a.training.recipe import OptimizerRecipe


class nnUNetTrainerH2ASeg(FusionTrainer):
    """nnU-Net's recipe with H2ASeg and its loss.

    Lu et al., MICCAI 2024, equation 5: all levels are supervised, level k of K with weight K + 1 - k, here normalised
    to sum 1. The loss of a level is nnU-Net's Dice + cross-entropy (BCE for regions) against its label at that
    level's resolution; the paper up-samples all predictions to full resolution instead.

    Optimiser, learning rate and warm-up are those with which H2ASeg learnt reliably within nnU-Net's schedule; see
    docs/optimizer.md for the table.
    """

    network_class = H2ASeg
    recipe = OptimizerRecipe("AdamW", learning_rate=1e-3, weight_decay=1e-5, warmup_epochs=10)

    @staticmethod
    def deep_supervision_weights(n_levels: int) -> list[float]:
        """K, K - 1, ..., 1 over their sum, highest resolution first (equation 5)."""
        total = n_levels * (n_levels + 1) / 2
        return [(n_levels - level) / total for level in range(n_levels)]
