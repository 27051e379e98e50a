"""Offers our trainers to nnU-Net's lookup.

nnU-Net imports every module of a folder in ``nnUNet_extTrainer`` as a top-level module and forgets it afterwards; a
class defined here would lose its module and could not be pickled. So the trainers live in ``nnunet_h2a.trainers`` and
only their names appear here. The variable reaches child processes of other environments too: where the package is
not installed, this module offers nothing instead of breaking their lookups.
"""

try:
    from nnunet_h2a.trainers import TRAINERS as _TRAINERS
except ModuleNotFoundError as _error:
    if _error.name != "nnunet_h2a":
        raise
    _TRAINERS = {}

globals().update(_TRAINERS)
