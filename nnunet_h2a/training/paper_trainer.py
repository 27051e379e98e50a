"""What the trainers of the papers' recipes share."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size

from nnunet_h2a.training.fusion_trainer import FusionTrainer
from nnunet_h2a.training.mixup import Mixup


class PaperTrainer(FusionTrainer):
    """A paper's recipe inside nnU-Net's pipeline; put it in front of the network's trainer.

    What nnU-Net's pipeline decides and the papers do otherwise, for all of them:

    - spacing, patch and normalisation are the plan's (``h2a_plan --patch-size``, ``--pet-normalization`` of the
      converters);
    - a training patch is drawn from a random training case, and a third of a batch's patches from around foreground
      (one of two; with a batch of one, every third batch, by chance), where a paper takes the volume, a box or a slice;
    - gradients are clipped to a norm of 12, and on a GPU training is in mixed precision;
    - the checkpoint that counts is the last one (``checkpoint_best.pth`` is there too), and what it is measured on was
      not seen in training; folds are nnU-Net's unless splits_final.json says otherwise.

    An epoch is as many patches as there are training cases (training slices with a 2D plan), so that a number of
    epochs means what it means in a paper; but each is of a case drawn at random. Set :attr:`epoch_is_a_pass` to False
    for nnU-Net's 250 steps.
    """

    #: Number of patches in a step.
    paper_batch_size: ClassVar[int]
    fixed_batch_size = True
    #: Whether an epoch has as many steps as it takes to see as many patches as there are training cases.
    epoch_is_a_pass: ClassVar[bool] = True
    #: Probability and share of mixup, None for none.
    mixup: ClassVar[tuple[float, float] | None] = None
    #: Largest rotation in degrees, None for nnU-Net's.
    rotation: ClassVar[float | None] = None
    #: Whether patches are mirrored, in training and at inference.
    mirrors: ClassVar[bool] = True

    def _set_batch_size_and_oversample(self) -> None:
        self.configuration_manager.configuration["batch_size"] = self.paper_batch_size
        # nnU-Net rounds a third of one patch down to none.
        self.probabilistic_oversampling = self.paper_batch_size == 1
        super()._set_batch_size_and_oversample()

    def initialize(self) -> None:
        super().initialize()
        self._mixup = None
        if self.mixup is not None:
            manager = self.label_manager
            self._mixup = Mixup(*self.mixup, manager.num_segmentation_heads, manager.has_regions, manager.ignore_label)
        self.print_to_log_file(f"batch size: {self.paper_batch_size} (the recipe's, whatever the plan says)")

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        training, validation = super().get_tr_and_val_datasets()
        if self.epoch_is_a_pass:
            patches = len(training.identifiers)
            if len(self.configuration_manager.patch_size) == 2:
                patches = sum(training.load_case(name)[0].shape[1] for name in training.identifiers)
            self.num_iterations_per_epoch = max(1, math.ceil(patches / self.paper_batch_size))
            self.num_val_iterations_per_epoch = max(1, math.ceil(self.num_iterations_per_epoch / 5))
            self.print_to_log_file(f"an epoch is {patches} patches: {self.num_iterations_per_epoch} steps")
        return training, validation

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, bool, np.ndarray, Any]:
        rotation, dummy_2d, initial, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        patch = self.configuration_manager.patch_size
        if self.rotation is not None:
            angle = math.radians(self.rotation)
            rotation = (-angle, angle)
            initial = get_patch_size(patch, rotation, rotation, rotation, (0.85, 1.25))
            if dummy_2d:
                initial[0] = patch[0]
        if not self.mirrors:
            axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial, axes

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        schedule = self.recipe.schedule
        if schedule is not None and schedule.every_step:
            done = self._steps if self._epoch_of_steps == self.current_epoch else 0
            self.lr_scheduler.step(self.current_epoch + done / self.num_iterations_per_epoch)
        if self._mixup is not None:
            data = batch["data"].to(self.device, non_blocking=True)
            target = batch["target"]
            target = [t.to(self.device, non_blocking=True) for t in (target if isinstance(target, list) else [target])]
            data, mixed = self._mixup(data, target[0])
            batch = batch | {"data": data, "target": [mixed] if isinstance(batch["target"], list) else mixed}
        return super().train_step(batch)

    @property
    def kind_of_labels(self) -> tuple[bool, int | None]:
        """Whether classes are regions, and the ignore label: what the papers' losses want to know."""
        return self.label_manager.has_regions, self.label_manager.ignore_label
