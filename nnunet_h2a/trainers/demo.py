"""Trainers for ``h2a_demo``: a few hundred steps with a fixed seed, to show that all parts work on a CPU in minutes.

They are no recipe for real data: nnU-Net's own length, augmentation and mirroring are cut down.
"""

from __future__ import annotations

import random
from typing import ClassVar

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_h2a.trainers.nnUNetTrainerH2ASeg import nnUNetTrainerH2ASeg
from nnunet_h2a.training.recipe import OptimizerRecipe

DEMO_ITERATIONS, DEMO_VALIDATION_ITERATIONS, DEMO_SEED = 40, 4, 0


class _DemoMixin:
    """Cuts an nnU-Net trainer down to the demo's length and optimises it by ``recipe``.

    Subclasses set :attr:`demo_epochs`: as many as the network needs to learn with any seed.
    """

    demo_epochs: ClassVar[int]

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - the signature must be nnU-Net's
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.demo_epochs
        self.num_iterations_per_epoch = DEMO_ITERATIONS
        self.num_val_iterations_per_epoch = DEMO_VALIDATION_ITERATIONS
        self.initial_lr, self.weight_decay = self.recipe.learning_rate, self.recipe.weight_decay
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(DEMO_SEED)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        return self.recipe.build(self.network.parameters(), self.num_epochs)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        # None, not (): an empty tuple breaks nnU-Net's prediction. Mirroring would make it eight times as long.
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, None


class nnUNetTrainerDemo(_DemoMixin, nnUNetTrainer):
    """The stock nnU-Net trainer for the demo."""

    recipe = OptimizerRecipe("AdamW", learning_rate=2e-3, weight_decay=1e-5)
    demo_epochs = 20


class nnUNetTrainerH2ASegDemo(_DemoMixin, nnUNetTrainerH2ASeg):
    """:class:`nnUNetTrainerH2ASeg` for the demo, with its own recipe."""

    demo_epochs = 12
