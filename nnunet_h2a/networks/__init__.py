"""PET/CT fusion networks with the constructor protocol of dynamic-network-architectures."""

from nnunet_h2a.networks.h2aseg import H2ASeg

__all__ = ["H2ASeg"]
