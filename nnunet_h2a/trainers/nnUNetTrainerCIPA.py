"""nnU-Net's trainer for CIPA."""

from __future__ import annotations

from nnunet_h2a.networks.cipa import CIPA
from nnunet_h2a.training.fusion_trainer import FusionTrainer
from nnunet_h2a.training.recipe import OptimizerRecipe


class nnUNetTrainerCIPA(FusionTrainer):
    """nnU-Net's recipe with CIPA, in 2D as published or, for 3D plans, with its extension to volumes.

    Mei et al., CVPR 2025. The network has no auxiliary heads, so there is no deep supervision: one Dice +
    cross-entropy (BCE for regions) at full resolution, where the paper has BCE + Dice of one sigmoid.

    The scans' decay rates, skips and step biases are trained without weight decay; the released training script leaves
    them, and the projections around them, out of its optimiser altogether. The learning rate is for a network that
    starts from random weights; docs/optimizer.md says what was tried.
    """

    network_class = CIPA
    deep_supervision = False
    recipe = OptimizerRecipe("AdamW", learning_rate=1e-3, weight_decay=1e-2, warmup_epochs=10)
