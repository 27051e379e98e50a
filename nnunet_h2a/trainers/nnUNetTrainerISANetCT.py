"""nnU-Net's trainer for ISA-Net's CT branch alone."""

from __future__ import annotations

from typing import ClassVar

from nnunet_h2a.trainers.nnUNetTrainerISANet import nnUNetTrainerISANet


class nnUNetTrainerISANetCT(nnUNetTrainerISANet):
    """:class:`nnUNetTrainerISANet` with CT alone: one branch, as in the CT row of the paper's Table 1.

    The dataset may have both channels, of which CT is taken, or CT alone.
    """

    network_options: ClassVar[dict[str, str]] = {"modalities": "ct"}
