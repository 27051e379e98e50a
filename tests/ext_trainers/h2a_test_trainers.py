"""Trainers of a few steps, found through ``nnUNet_extTrainer`` as a user's own are."""

import os
import random
import signal

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_h2a.trainers import (
    TRAINERS,
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


class _Reseeded(_FewSteps):
    """Three epochs, each from a seed of its own, with a checkpoint after each; killed at ``H2A_TEST_KILL``."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.save_every = 3, 1

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        random.seed(self.current_epoch)
        np.random.seed(self.current_epoch)
        torch.manual_seed(self.current_epoch)

    def train_step(self, batch):
        result = super().train_step(batch)
        if os.environ.get("H2A_TEST_KILL") == f"{self.current_epoch} {self._steps}":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def initialize(self):
        torch.manual_seed(0)
        super().initialize()


class _Frozen(_FewSteps):
    """Learns nothing."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), 0.0), super().configure_optimizers()[1]


class _Compiled(_FewSteps):
    def _do_i_compile(self):
        return True


class _ShortOnly:
    """Few steps, and the trainer's own mirroring."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1


for _network in ("H2ASeg", "ISANet", "CIPA"):
    for _mixin in (_Reseeded, _Frozen, _Compiled):
        _name = f"nnUNetTrainer{_network}{_mixin.__name__[1:]}"
        globals()[_name] = type(_name, (_mixin, TRAINERS[f"nnUNetTrainer{_network}"]), {})
    for _suffix in ("DA5", "NoMirroring", "PETCT"):
        _name = f"nnUNetTrainer{_network}{_suffix}"
        globals()[f"{_name}FewSteps"] = type(f"{_name}FewSteps", (_ShortOnly, TRAINERS[_name]), {})
