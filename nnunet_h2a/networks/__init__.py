"""PET/CT fusion networks with the constructor protocol of dynamic-network-architectures."""

from nnunet_h2a.networks.cipa import CIPA
from nnunet_h2a.networks.cipa_weights import load_cipa_checkpoint
from nnunet_h2a.networks.h2aseg import H2ASeg
from nnunet_h2a.networks.isanet import ISANet

__all__ = ["CIPA", "H2ASeg", "ISANet", "load_cipa_checkpoint"]
