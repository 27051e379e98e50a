"""nnU-Net's trainer for ISA-Net's PET branch alone."""

from __future__ import annotations

from typing import ClassVar

from nnunet_h2a.trainers.nnUNetTrainerISANet import nnUNetTrainerISANet


class nnUNetTrainerISANetPET(nnUNetTrainerISANet):
    """:class:`nnUNetTrainerISANet` with PET alone: one branch, as in the PET row of the paper's Table 1.

    The dataset may have both channels, of which PET is taken, or PET alone.
    """

    network_options: ClassVar[dict[str, str]] = {"modalities": "pet"}
