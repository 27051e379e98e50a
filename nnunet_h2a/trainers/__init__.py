"""The trainers that ``nnUNetv2_train -tr`` accepts."""

from nnunet_h2a.trainers.demo import nnUNetTrainerDemo, nnUNetTrainerH2ASegDemo
from nnunet_h2a.trainers.nnUNetTrainerH2ASeg import nnUNetTrainerH2ASeg
from nnunet_h2a.trainers.training_length import VARIANTS

#: Every trainer by name; the shim that nnU-Net scans offers these.
TRAINERS = {
    trainer.__name__: trainer for trainer in (nnUNetTrainerH2ASeg, nnUNetTrainerDemo, nnUNetTrainerH2ASegDemo)
} | VARIANTS

__all__ = ["TRAINERS", "nnUNetTrainerDemo", "nnUNetTrainerH2ASeg", "nnUNetTrainerH2ASegDemo"]
