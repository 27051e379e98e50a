"""Which input channels go to the CT branch and which to the PET branch."""

from __future__ import annotations

import torch
from torch import Tensor


def check_channels(input_channels: int, ct_channel: int, pet_channel: int) -> None:
    """Refuse channel numbers that do not name two different input channels.

    Raises:
        ValueError: naming the numbers found.
    """
    if input_channels < 2:
        raise ValueError(f"`input_channels` must be at least 2 (one CT, one PET), got {input_channels}")
    if ct_channel == pet_channel or not all(0 <= c < input_channels for c in (ct_channel, pet_channel)):
        raise ValueError(
            f"`ct_channel` and `pet_channel` must be two different channels of 0..{input_channels - 1}, "
            f"got {ct_channel} and {pet_channel}"
        )


def split_modalities(x: Tensor, ct_channel: int, pet_channel: int) -> tuple[Tensor, Tensor]:
    """Split a network input into what the CT branch and what the PET branch sees.

    Each branch gets its own modality first and then, in their order, all channels that are neither CT nor PET:
    the one-hot segmentation of the previous stage that nnU-Net appends for ``3d_cascade_fullres``.

    Args:
        x: (batch, input_channels, spatial...).
        ct_channel: number of the CT channel.
        pet_channel: number of the PET channel.

    Returns:
        CT input and PET input, each (batch, input_channels - 1, spatial...).
    """
    extra = [x[:, c : c + 1] for c in range(x.shape[1]) if c not in (ct_channel, pet_channel)]
    ct, pet = x[:, ct_channel : ct_channel + 1], x[:, pet_channel : pet_channel + 1]
    return torch.cat([ct, *extra], dim=1), torch.cat([pet, *extra], dim=1)
