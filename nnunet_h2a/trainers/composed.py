"""Every network's trainer with augmentation of PET/CT, and with the variants that nnU-Net itself offers.

Each is a composition of two classes: our trainer and a mix-in, or our trainer and nnU-Net's variant.
"""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring

from nnunet_h2a.trainers.nnUNetTrainerCIPA import nnUNetTrainerCIPA
from nnunet_h2a.trainers.nnUNetTrainerH2ASeg import nnUNetTrainerH2ASeg
from nnunet_h2a.trainers.nnUNetTrainerISANet import nnUNetTrainerISANet
from nnunet_h2a.training.augmentation.mixins import KeepSUVMixin, MisalignmentMixin, ModalityDropoutMixin

_NETWORKS = (nnUNetTrainerH2ASeg, nnUNetTrainerISANet, nnUNetTrainerCIPA)
#: Suffix to what comes in front of the network's trainer and what comes behind it.
SUFFIXES: dict[str, tuple[tuple[type, ...], tuple[type, ...]]] = {
    "Misalign": ((MisalignmentMixin,), ()),
    "ModalityDropout": ((ModalityDropoutMixin,), ()),
    "KeepSUV": ((KeepSUVMixin,), ()),
    "PETCT": ((ModalityDropoutMixin, KeepSUVMixin, MisalignmentMixin), ()),
    "DA5": ((), (nnUNetTrainerDA5,)),
    "NoMirroring": ((), (nnUNetTrainerNoMirroring,)),
}


def compose(trainer: type[nnUNetTrainer], suffix: str) -> type[nnUNetTrainer]:
    """Return the class of a trainer with one of :data:`SUFFIXES`, named ``<trainer><suffix>``."""
    before, behind = SUFFIXES[suffix]
    names = " and ".join(kind.__name__ for kind in (*before, *behind))
    body = {"__module__": __name__, "__doc__": f"{trainer.__name__} with {names}."}
    return type(f"{trainer.__name__}{suffix}", (*before, trainer, *behind), body)


COMPOSED = {made.__name__: made for trainer in _NETWORKS for suffix in SUFFIXES for made in (compose(trainer, suffix),)}
# Named in this module, so that pickle finds them.
globals().update(COMPOSED)
