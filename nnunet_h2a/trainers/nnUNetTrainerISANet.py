"""nnU-Net's trainer for ISA-Net."""

from __future__ import annotations

from nnunet_h2a.networks.isanet import ISANet
from nnunet_h2a.training.fusion_trainer import FusionTrainer
from nnunet_h2a.training.recipe import OptimizerRecipe


class nnUNetTrainerISANet(FusionTrainer):
    """nnU-Net's recipe with ISA-Net.

    Huang et al. 2022 supervise the full resolution only, with Dice + focal loss. Here every level of CT's decoder is
    supervised with nnU-Net's Dice + cross-entropy (BCE for regions) against its label at that level's resolution.
    The weights are nnU-Net's, halved from level to level, but the deepest of these levels keeps its weight, which
    nnU-Net sets to 0: its head would get no gradient.

    The optimiser is nnU-Net's own: ISA-Net learnt with it and not with AdamW; see docs/optimizer.md for the table.
    """

    network_class = ISANet
    recipe = OptimizerRecipe("SGD", learning_rate=1e-2, weight_decay=3e-5)
    supervise_deepest = False

    @staticmethod
    def deep_supervision_weights(n_levels: int) -> list[float]:
        """1, 1/2, 1/4, … over their sum, highest resolution first."""
        total = sum(2.0**-level for level in range(n_levels))
        return [2.0**-level / total for level in range(n_levels)]
