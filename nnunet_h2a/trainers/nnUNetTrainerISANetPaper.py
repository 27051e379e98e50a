"""ISA-Net trained as its paper says."""

from __future__ import annotations

from typing import Any

from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_h2a.trainers.nnUNetTrainerISANet import nnUNetTrainerISANet
from nnunet_h2a.training.augmentation.pipeline import INTENSITY, with_spatial, without
from nnunet_h2a.training.losses import DiceFocalLoss
from nnunet_h2a.training.paper_trainer import PaperTrainer
from nnunet_h2a.training.recipe import OptimizerRecipe
from nnunet_h2a.training.schedules import CosineRestarts


class nnUNetTrainerISANetPaper(PaperTrainer, nnUNetTrainerISANet):
    """The recipe of Huang et al. 2022 (arXiv 2211.02256), sections 3 and 4, in nnU-Net's pipeline.

    From the paper: Dice + focal loss (eq. 9 to 11) of the full resolution alone, Adam with betas 0.9 and 0.99,
    learning rate 3e-4, 300 epochs, batch 1, rotation by up to 45 degrees (probability 0.5), mirroring (0.5), mixup
    with lambda 0.5 (0.2); its input is 144 mm of 1 mm voxels (``h2a_plan --patch-size 144 144 144``).

    Otherwise than in the paper: the learning rate, "decayed by 1e-6 after every 25 epochs and then reinitialised",
    falls by half a cosine to 1e-6 and begins again every 25 epochs, as in the public HECKTOR 2020 code it builds on.
    Rotation is about all three axes at once (the paper does not say about which); mirroring is nnU-Net's, along each
    axis with 0.5. Mixup's partner is the patch of the step before, and one map per class is mixed. Values
    are normalised by the plan: the paper clips CT to [-1024, 1024] and divides by 1024, PET is z-scored per image
    (nnU-Net's for a channel named PET). The paper keeps the model that is best on the test fold; here the last counts.
    The heads below full resolution are not trained. What all paper trainers share is in :class:`PaperTrainer`.
    """

    recipe = OptimizerRecipe(
        "Adam", learning_rate=3e-4, weight_decay=0.0, betas=(0.9, 0.99), schedule=CosineRestarts(25, 1e-6 / 3e-4)
    )
    epochs = 300
    deep_supervision = False
    paper_batch_size = 1
    mixup = (0.2, 0.5)
    rotation = 45.0

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """Return the network; heads below full resolution get no gradient here and must not wait for one."""
        network = super().build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        if not network.decoder.deep_supervision:
            for head in network.decoder.seg_layers[1:]:
                head.requires_grad_(False)
        return network

    def _build_loss(self) -> nn.Module:
        return DiceFocalLoss(*self.kind_of_labels)

    @classmethod
    def get_training_transforms(cls, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """nnU-Net's transforms with rotation and mirroring alone."""
        transforms = without(super().get_training_transforms(*args, **kwargs), INTENSITY)
        return with_spatial(transforms, p_rotation=0.5, p_rot_per_axis=1.0, p_scaling=0.0)
