"""What the trainers of all fusion networks share: nnU-Net's trainer with the network's own optimiser and levels."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_h2a.training.architecture import PLANS_KEY, check_same_channels, fusion_settings
from nnunet_h2a.training.recipe import OptimizerRecipe


class FusionTrainer(nnUNetTrainer):
    """nnU-Net's trainer for a network with a CT and a PET branch.

    Everything is nnU-Net's (data, augmentation, sampling, epochs, Dice + cross-entropy or BCE, validation) but the
    optimiser's settings and deep supervision, which covers all levels.

    Subclasses set :attr:`recipe` and define ``build_network_architecture`` and ``deep_supervision_weights``.
    """

    #: Optimiser settings.
    recipe: ClassVar[OptimizerRecipe]
    #: Number of epochs where it is not nnU-Net's 1000.
    epochs: ClassVar[int | None] = None

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - the signature must be nnU-Net's
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = self.recipe.learning_rate
        self.weight_decay = self.recipe.weight_decay
        if self.epochs is not None:
            self.num_epochs = self.epochs
        # Inference sees plans and checkpoint only, so the plans must say which channel is which.
        settings = fusion_settings(dataset_json, self.label_manager.has_regions)
        check_same_channels(self.configuration_manager.network_arch_init_kwargs, settings)
        self.plans_manager.plans[PLANS_KEY] = settings

    def initialize(self) -> None:
        super().initialize()
        # nnU-Net's log shows the plan's architecture, which is that of its own U-Net for a stock plan.
        network = self.network.module if self.is_ddp else self.network
        parameters = sum(p.numel() for p in network.parameters())
        name = type(getattr(network, "_orig_mod", network)).__name__
        self.print_to_log_file(f"network: {name}, {parameters / 1e6:.2f} million parameters; recipe: {self.recipe}")

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        return self.recipe.build(self.network.parameters(), self.num_epochs)

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        # nnU-Net leaves the deepest level out of the targets; its loss would then drop that prediction without a word.
        if not self.enable_deep_supervision:
            return None
        strides = np.vstack(self.configuration_manager.pool_op_kernel_sizes)
        return [[float(s) for s in scale] for scale in 1 / np.cumprod(strides, axis=0)]

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if self.enable_deep_supervision:
            loss.weight_factors = tuple(self.deep_supervision_weights(len(self._get_deep_supervision_scales())))
        return loss

    @staticmethod
    def deep_supervision_weights(n_levels: int) -> list[float]:
        """Weight of each level's loss, highest resolution first; they sum to 1."""
        raise NotImplementedError("each network's trainer says how its levels weigh")
