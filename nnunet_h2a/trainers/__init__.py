"""The trainers that ``nnUNetv2_train -tr`` accepts."""

from nnunet_h2a.trainers.composed import COMPOSED
from nnunet_h2a.trainers.demo import nnUNetTrainerDemo, nnUNetTrainerH2ASegDemo
from nnunet_h2a.trainers.nnUNetTrainerCIPA import nnUNetTrainerCIPA
from nnunet_h2a.trainers.nnUNetTrainerCIPAPaper import nnUNetTrainerCIPAPaper
from nnunet_h2a.trainers.nnUNetTrainerH2ASeg import nnUNetTrainerH2ASeg
from nnunet_h2a.trainers.nnUNetTrainerH2ASegPaper import nnUNetTrainerH2ASegPaper
from nnunet_h2a.trainers.nnUNetTrainerISANet import nnUNetTrainerISANet
from nnunet_h2a.trainers.nnUNetTrainerISANetCT import nnUNetTrainerISANetCT
from nnunet_h2a.trainers.nnUNetTrainerISANetPaper import nnUNetTrainerISANetPaper
from nnunet_h2a.trainers.nnUNetTrainerISANetPET import nnUNetTrainerISANetPET
from nnunet_h2a.trainers.training_length import VARIANTS

_PLAIN = (
    nnUNetTrainerCIPA,
    nnUNetTrainerCIPAPaper,
    nnUNetTrainerH2ASeg,
    nnUNetTrainerH2ASegPaper,
    nnUNetTrainerISANet,
    nnUNetTrainerISANetPaper,
    nnUNetTrainerISANetCT,
    nnUNetTrainerISANetPET,
    nnUNetTrainerDemo,
    nnUNetTrainerH2ASegDemo,
)

#: Every trainer by name; the shim that nnU-Net scans offers these.
TRAINERS = {trainer.__name__: trainer for trainer in _PLAIN} | VARIANTS | COMPOSED

__all__ = ["TRAINERS", *(trainer.__name__ for trainer in _PLAIN)]
