"""CIPA trained as its paper says."""

from __future__ import annotations

from typing import Any

from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import nn

from nnunet_h2a.trainers.nnUNetTrainerCIPA import nnUNetTrainerCIPA
from nnunet_h2a.training.augmentation.crop_resize import CropResizeTransform
from nnunet_h2a.training.augmentation.pipeline import INTENSITY, after_spatial, with_spatial, without
from nnunet_h2a.training.losses import DiceBCELoss
from nnunet_h2a.training.paper_trainer import PaperTrainer
from nnunet_h2a.training.recipe import OptimizerRecipe
from nnunet_h2a.training.schedules import Cosine


class nnUNetTrainerCIPAPaper(PaperTrainer, nnUNetTrainerCIPA):
    """The recipe of Mei et al., CVPR 2025 (arXiv 2503.17261), section 4, in nnU-Net's pipeline.

    From the paper: BCE + Dice, AdamW, learning rate 6e-5, 50 epochs, batch 16, flips and square crops of 0.7 to 0.9
    resized back (probability 0.5 each). The encoder starts from VMamba-Tiny's ImageNet weights:
    ``h2a_import_weights --vmamba FILE``, then ``-pretrained_weights``; without them it starts from nothing.

    From the released code: cosine from step to step down to 1e-6 of the learning rate, weight decay 1e-2 but none on
    biases, norms, decay rates and skips, Dice per image with 1 in numerator and denominator, no warm-up.

    Otherwise: parameters that the code leaves out of its optimiser by mistake are trained. The paper says flips and
    the code flips horizontally only, with shift, scale and aspect changed by up to 10 %; here nnU-Net mirrors along
    both axes with 0.5 each. Two softmax heads with cross-entropy are the BCE of one sigmoid. Inputs are normalised by
    the plan; the paper scales 8-bit values to [-1.6, 1.6]. With a 3D plan the crops are boxes. What all paper trainers
    share is in :class:`PaperTrainer`.
    """

    recipe = OptimizerRecipe("AdamW", learning_rate=6e-5, weight_decay=1e-2, schedule=Cosine(1e-6))
    epochs = 50
    paper_batch_size = 16

    def free_of_weight_decay(self, network: nn.Module) -> set[str]:
        """Biases and norms, and what the network itself wants so."""
        vectors = {name for name, parameter in network.named_parameters() if parameter.ndim <= 1}
        return super().free_of_weight_decay(network) | vectors

    def _build_loss(self) -> nn.Module:
        return DiceBCELoss(*self.kind_of_labels)

    @classmethod
    def get_training_transforms(cls, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """nnU-Net's transforms with mirroring and crops alone."""
        transforms = without(super().get_training_transforms(*args, **kwargs), INTENSITY)
        transforms = with_spatial(transforms, p_rotation=0.0, p_scaling=0.0)
        return after_spatial(transforms, RandomTransform(CropResizeTransform((0.7, 0.9)), 0.5))
