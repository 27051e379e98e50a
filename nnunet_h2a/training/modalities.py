"""Which channel of a dataset is CT and which is PET."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CT_NAMES = frozenset({"ct", "ctres"})
PET_NAMES = frozenset({"pet", "pt", "suv"})

#: Key of dataset.json that says what each channel is, whatever ``channel_names`` calls it to get a normalisation.
MODALITIES_KEY = "h2a_modalities"


class ChannelError(ValueError):
    """The dataset does not say which one channel is CT and which one is PET."""


def channel_roles(dataset_json: Mapping[str, Any], modalities: str = "both") -> tuple[int | None, int | None]:
    """Numbers of the CT and the PET channel.

    ``h2a_modalities``, a list with one entry per channel, decides where dataset.json has it; otherwise
    ``channel_names`` decides. Names are compared without regard to case: CT or CTres, and PET, PT or SUV.

    Args:
        dataset_json: content of an nnU-Net dataset.json.
        modalities: ``"both"``; ``"ct"`` or ``"pet"`` where one is enough. The other may then be missing.

    Returns:
        ``(ct_channel, pet_channel)``; None for a modality that the dataset does not have.

    Raises:
        ChannelError: unless there is one channel for each modality that is needed, and no further one.
    """
    channel_names = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    if not isinstance(channel_names, Mapping) or not all(str(key).isdigit() for key in channel_names):
        raise ChannelError(
            'dataset.json: "channel_names" must give a name for each channel number, as in '
            f'{{"0": "CT", "1": "PET"}}, found {channel_names!r}'
        )
    names = [str(channel_names[key]) for key in sorted(channel_names, key=int)]
    source = "channel_names"
    if MODALITIES_KEY in dataset_json:
        source = MODALITIES_KEY
        listed = dataset_json[MODALITIES_KEY]
        if not isinstance(listed, (list, tuple)) or len(listed) != len(names):
            raise ChannelError(
                f'dataset.json: "{MODALITIES_KEY}" must list one modality for each of the {len(names)} channels '
                f"{names}, found {listed!r}"
            )
        names = [str(name) for name in listed]
    kinds = [name.strip().casefold() for name in names]
    ct = [number for number, kind in enumerate(kinds) if kind in CT_NAMES]
    pet = [number for number, kind in enumerate(kinds) if kind in PET_NAMES]
    if modalities not in ("both", "ct", "pet"):
        raise ChannelError(f"modalities must be 'both', 'ct' or 'pet', found {modalities!r} in the plans")
    if modalities != "both" and len(names) == 1:
        if len({"ct": ct, "pet": pet}[modalities]) == 1:
            return (0, None) if ct else (None, 0)
        raise ChannelError(
            f"dataset.json: {source} is {names}, but this network takes {modalities.upper()} alone; if the channel is "
            f'{modalities.upper()}, add "{MODALITIES_KEY}": ["{modalities.upper()}"]'
        )
    if modalities == "both" and len(names) == 1 and len(ct) + len(pet) == 1:
        kind = "CT" if ct else "PET"
        raise ChannelError(
            f"dataset.json: {source} is {names}, but a fusion network needs CT and PET; for {kind} alone there is "
            f"nnUNetTrainerISANet{kind}"
        )
    if len(names) != 2 or len(ct) != 1 or len(pet) != 1:
        raise ChannelError(
            f"dataset.json: {source} is {names}, but a PET/CT fusion network needs exactly two image channels, one CT "
            f"({'/'.join(sorted(CT_NAMES))}) and one PET ({'/'.join(sorted(PET_NAMES))}), in any order. If a channel "
            f'is named otherwise to choose its normalisation, add for example "{MODALITIES_KEY}": ["CT", "PET"]'
        )
    return ct[0], pet[0]
