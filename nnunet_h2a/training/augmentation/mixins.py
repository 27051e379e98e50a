"""PET/CT augmentation as mix-ins for any trainer: put one in front of the trainer's class.

    class nnUNetTrainerMine(ModalityDropoutMixin, MisalignmentMixin, nnUNetTrainerH2ASeg):
        pass

They add to the transforms of the trainer behind them, nnU-Net's, DA5's or a paper's, and change nothing at inference.
The trainer may be nnU-Net's own, too: the channels are found by name as our trainers find them.
"""

from __future__ import annotations

from typing import Any, ClassVar

from batchgeneratorsv2.transforms.spatial.channel_misalignment import ChannelMisalignmentTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from nnunet_h2a.training.augmentation.modality_dropout import ModalityDropoutTransform
from nnunet_h2a.training.augmentation.on_channels import OnChannelsTransform
from nnunet_h2a.training.augmentation.pipeline import RESCALING, after_intensity, after_spatial, wrapped
from nnunet_h2a.training.augmentation.uptake_noise import UptakeNoiseTransform
from nnunet_h2a.training.modalities import channel_roles


class MisalignmentMixin:
    """CT and PET that do not quite fit: the CT is moved against PET and label.

    PET is acquired over minutes of free breathing, CT in seconds. The label stays with the PET, which shows what is
    contoured; where tumours were drawn on CT, name the PET channel in :attr:`misaligned`.
    """

    #: The channel that moves.
    misaligned: ClassVar[str] = "ct"
    #: Probability of a shift, and of a rotation, of a sample.
    misalignment_probability: ClassVar[float] = 0.2
    #: Largest shift along z (or the plan's first axis) and in the plane, in mm, rounded to whole voxels. Where the CT
    #: has moved away, it is 0 (after normalisation).
    largest_shift_mm: ClassVar[tuple[float, float]] = (8.0, 4.0)
    #: Largest rotation about any axis, in degrees.
    largest_rotation: ClassVar[float] = 2.0

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """Return the transforms with the misalignment after rotation, scaling and cropping."""
        transforms = super().get_training_transforms(*args, **kwargs)
        channel = channel_roles(self.dataset_json)[0 if self.misaligned == "ct" else 1]
        spacing = self.configuration_manager.spacing[-len(self.configuration_manager.patch_size) :]
        along, across = self.largest_shift_mm
        largest = [across] * len(spacing)
        if len(spacing) == 3:
            largest[0] = along
        move = ChannelMisalignmentTransform(
            im_channels_2_misalign=(channel,), squeezing_zyx=(0.0,) * len(spacing), p_squeeze=0.0,
            rotation_ax_cor_sag=(self.largest_rotation,) * len(spacing), rad_or_deg="deg",
            p_rotation=self.misalignment_probability,
            shift_zyx=tuple(round(mm / s) for mm, s in zip(largest, spacing, strict=True)),
            p_shift=self.misalignment_probability,
        )  # fmt: skip
        return after_spatial(transforms, move)


class ModalityDropoutMixin:
    """Now and then the CT or the PET is missing (0 after normalisation), so that a model degrades gracefully.

    To predict without a modality, give nnU-Net an image of a constant in its place where that normalises to 0: the mean
    of a channel that is z-scored, or the mean that the plans say for CT.
    """

    #: Probability of a sample missing one of the two.
    dropout_probability: ClassVar[float] = 0.2

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """Return the transforms with the dropout after all changes of values."""
        transforms = super().get_training_transforms(*args, **kwargs)
        return after_intensity(
            transforms, ModalityDropoutTransform(channel_roles(self.dataset_json), self.dropout_probability)
        )


class KeepSUVMixin:
    """Leaves SUV its scale: brightness, contrast and gamma change the CT alone.

    They would tell the network that SUV means nothing, which is right for a magnetic resonance image. The PET gets what
    scanners do to it and its mean survives: nnU-Net's blur, resolution and noise, and noise in proportion to uptake.
    """

    #: Probability of noise in proportion to uptake.
    uptake_noise_probability: ClassVar[float] = 0.2

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """Return the transforms with those of the scale kept from the PET."""
        transforms = super().get_training_transforms(*args, **kwargs)
        ct, pet = channel_roles(self.dataset_json)
        transforms = wrapped(transforms, RESCALING, lambda transform: OnChannelsTransform(transform, [ct]))
        return after_intensity(transforms, RandomTransform(UptakeNoiseTransform(pet), self.uptake_noise_probability))
