"""Trainers of a few steps, found through ``nnUNet_extTrainer`` as a user's own are."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_h2a.trainers import (
    nnUNetTrainerCIPA,
    nnUNetTrainerCIPAPaper,
    nnUNetTrainerH2ASeg,
    nnUNetTrainerH2ASegPaper,
    nnUNetTrainerISANet,
    nnUNetTrainerISANetPaper,
    nnUNetTrainerISANetPET,
)


class _FewSteps:
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 3, 1

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, None


class nnUNetTrainerFewSteps(_FewSteps, nnUNetTrainer):
    pass


class nnUNetTrainerH2ASegFewSteps(_FewSteps, nnUNetTrainerH2ASeg):
    pass


class nnUNetTrainerISANetFewSteps(_FewSteps, nnUNetTrainerISANet):
    pass


class nnUNetTrainerISANetPETFewSteps(_FewSteps, nnUNetTrainerISANetPET):
    pass


class nnUNetTrainerCIPAFewSteps(_FewSteps, nnUNetTrainerCIPA):
    pass


class nnUNetTrainerH2ASegPaperFewSteps(_FewSteps, nnUNetTrainerH2ASegPaper):
    pass


class nnUNetTrainerISANetPaperFewSteps(_FewSteps, nnUNetTrainerISANetPaper):
    pass


class nnUNetTrainerCIPAPaperFewSteps(_FewSteps, nnUNetTrainerCIPAPaper):
    pass


class nnUNetTrainerH2ASegPoisoned(_FewSteps, nnUNetTrainerH2ASeg):
    """The PET of the second step of the second epoch holds an infinity."""

    def train_step(self, batch):
        if self.current_epoch == 1 and self._steps == 1:
            batch["data"][0, 1, 0] = float("inf")
        return super().train_step(batch)
