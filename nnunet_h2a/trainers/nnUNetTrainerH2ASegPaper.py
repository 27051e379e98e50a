"""H2ASeg trained as its paper says."""

from __future__ import annotations

from typing import Any

from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_h2a.trainers.nnUNetTrainerH2ASeg import nnUNetTrainerH2ASeg
from nnunet_h2a.training.augmentation.pipeline import INTENSITY, with_spatial, without
from nnunet_h2a.training.losses import FullResolutionLoss
from nnunet_h2a.training.paper_trainer import PaperTrainer
from nnunet_h2a.training.recipe import OptimizerRecipe
from nnunet_h2a.training.schedules import Exponential


class nnUNetTrainerH2ASegPaper(PaperTrainer, nnUNetTrainerH2ASeg):
    """The recipe of Lu et al., MICCAI 2024 (arXiv 2403.18339), section 3, in nnU-Net's pipeline.

    From the paper: loss = sum over k of (n + 1 - k) (cross-entropy + Dice) of the logits up-sampled to full resolution
    (eq. 5; weights not normalised), Adam, learning rate 1e-4, weight decay 1e-5, 200 epochs, batch 2; its patch is
    128 x 128 x 64 (``h2a_plan --patch-size 64 128 128``) at 3 x 2 x 2 mm in autoPET, 1 mm in HECKTOR.

    From the released code, where the paper is silent: learning rate times 0.99 after every epoch, rotation with a
    probability of 0.8 as the only augmentation (by nnU-Net's angles; its own are not known), no mirroring.

    Otherwise than in the paper and the code: Dice is nnU-Net's (the paper cites V-Net's with squared denominator);
    cross-entropy of two softmax heads is the paper's BCE, regions have BCE; several tumour labels stay several. The
    code takes two patches of each of two cases a step, half of them from around foreground, and crops to where PET is
    above its minimum; nnU-Net draws two patches, one of them from around foreground, and crops to what is not zero.
    What all paper trainers share is in :class:`PaperTrainer`.
    """

    recipe = OptimizerRecipe("Adam", learning_rate=1e-4, weight_decay=1e-5, schedule=Exponential(0.99))
    epochs = 200
    paper_batch_size = 2
    mirrors = False

    def _get_deep_supervision_scales(self) -> list[list[float]]:
        # Every level is compared with the label at full resolution.
        return [[1.0] * len(self.configuration_manager.patch_size)]

    def _build_loss(self) -> nn.Module:
        # nnU-Net's own of one prediction: without its wrapper for several resolutions.
        self.enable_deep_supervision = False
        try:
            loss = nnUNetTrainer._build_loss(self)
        finally:
            self.enable_deep_supervision = True
        return FullResolutionLoss(loss)

    @classmethod
    def get_training_transforms(cls, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """nnU-Net's transforms with rotation alone."""
        transforms = without(super().get_training_transforms(*args, **kwargs), INTENSITY)
        return with_spatial(transforms, p_rotation=0.8, p_scaling=0.0)
