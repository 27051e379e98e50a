"""PET/CT fusion networks as an nnU-Net v2 extension.

This module is imported at the start of every Python process of the environment (see ``nnunet_h2a._autoreg``), so it
imports nothing.
"""

__version__ = "0.1.0"
