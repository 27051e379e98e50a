"""The ``_5epochs``, ``_250epochs``, … variants of every trainer, for the lengths that nnU-Net itself offers."""

from __future__ import annotations

from nnunet_h2a.trainers.nnUNetTrainerCIPA import nnUNetTrainerCIPA
from nnunet_h2a.trainers.nnUNetTrainerCIPAPaper import nnUNetTrainerCIPAPaper
from nnunet_h2a.trainers.nnUNetTrainerH2ASeg import nnUNetTrainerH2ASeg
from nnunet_h2a.trainers.nnUNetTrainerH2ASegPaper import nnUNetTrainerH2ASegPaper
from nnunet_h2a.trainers.nnUNetTrainerISANet import nnUNetTrainerISANet
from nnunet_h2a.trainers.nnUNetTrainerISANetCT import nnUNetTrainerISANetCT
from nnunet_h2a.trainers.nnUNetTrainerISANetPaper import nnUNetTrainerISANetPaper
from nnunet_h2a.trainers.nnUNetTrainerISANetPET import nnUNetTrainerISANetPET
from nnunet_h2a.training.fusion_trainer import FusionTrainer

LENGTHS = (1, 5, 10, 20, 50, 100, 250, 500, 750, 2000, 4000, 8000)


def epoch_variants(trainer: type[FusionTrainer]) -> dict[str, type[FusionTrainer]]:
    """Subclasses of ``trainer`` that differ in the number of epochs only, by name."""
    variants = {}
    for epochs in LENGTHS:
        name = f"{trainer.__name__}_{epochs}epoch{'s' if epochs > 1 else ''}"
        body = {"__module__": __name__, "__doc__": f"{trainer.__name__} for {epochs} epochs.", "epochs": epochs}
        variants[name] = type(name, (trainer,), body)
    return variants


_TRAINERS = (
    nnUNetTrainerH2ASeg,
    nnUNetTrainerH2ASegPaper,
    nnUNetTrainerISANet,
    nnUNetTrainerISANetPaper,
    nnUNetTrainerISANetPET,
    nnUNetTrainerISANetCT,
    nnUNetTrainerCIPA,
    nnUNetTrainerCIPAPaper,
)
VARIANTS = {name: variant for trainer in _TRAINERS for name, variant in epoch_variants(trainer).items()}
# Named in this module, so that pickle finds them.
globals().update(VARIANTS)
