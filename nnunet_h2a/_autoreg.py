"""Adds our shim folder to nnU-Net's ``nnUNet_extTrainer``; runs at the start of every Python process.

Imported from ``nnunet_h2a_lookup.pth`` in site-packages, so it must be quick and must never raise. What it does and
how to switch it off: docs/trainer-lookup.md.
"""

import os

#: nnU-Net's list of folders that it searches for trainers, separated by ``os.pathsep``.
VARIABLE = "nnUNet_extTrainer"
#: Set to 0, false, no or off to keep the environment as it is.
SWITCH = "NNUNET_H2A_AUTOREGISTER"


def shim_folder() -> str:
    """The folder that nnU-Net is to scan: it holds nothing but the shim."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "_nnunet_ext")


def register() -> None:
    """Append :func:`shim_folder` to ``nnUNet_extTrainer`` where it is not in it, unless switched off.

    Folders that the user has set stay, and stay first.
    """
    if os.environ.get(SWITCH, "").strip().lower() in ("0", "false", "no", "off"):
        return
    folder = shim_folder()
    present = os.environ.get(VARIABLE, "")
    if folder not in present.split(os.pathsep):
        os.environ[VARIABLE] = os.pathsep.join([present, folder]) if present else folder
