"""The losses of the papers, for labels, regions and the ignore label."""

from nnunet_h2a.training.losses.dice_bce import DiceBCELoss
from nnunet_h2a.training.losses.dice_focal import DiceFocalLoss
from nnunet_h2a.training.losses.full_resolution import FullResolutionLoss
from nnunet_h2a.training.losses.one_hot import OneHotLoss, one_hot

__all__ = ["DiceBCELoss", "DiceFocalLoss", "FullResolutionLoss", "OneHotLoss", "one_hot"]
