"""ISA-Net: improved spatial attention network for PET/CT tumour segmentation (Huang et al., 2022)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from nnunet_h2a.networks.modalities import check_channels, split_modalities
from nnunet_h2a.networks.plan_geometry import (
    PerStage,
    check_odd,
    expand_features,
    expand_per_stage,
    spatial_dims,
    stage_map_sizes,
)
from nnunet_h2a.networks.ripm_drim import DRIM, RIPM

#: Values of ``modalities``, and the branches each has, in the order in which their decoders run.
BRANCHES = {"both": ("pet", "ct"), "pet": ("pet",), "ct": ("ct",)}


def image_channels(
    input_channels: int, modalities: str, ct_channel: int | None, pet_channel: int | None
) -> tuple[int | None, int | None]:
    """Numbers of the CT and the PET channel of an input, None for a modality that it does not have.

    Args:
        input_channels: channels of the input.
        modalities: key of :data:`BRANCHES`. Where it names one modality, the other's channel may be None, and the
            only channel of an input is that modality whatever the numbers say.
        ct_channel: number of the CT channel.
        pet_channel: number of the PET channel.

    Raises:
        ValueError: naming the numbers found.
    """
    numbers = {"ct": ct_channel, "pet": pet_channel}
    if modalities != "both":
        (own,) = BRANCHES[modalities]
        other = {"ct": "pet", "pet": "ct"}[own]
        if input_channels == 1:
            numbers = {own: 0, other: None}
        if numbers[other] is None:
            if numbers[own] not in range(input_channels):
                raise ValueError(
                    f"`{own}_channel` must be one of the {input_channels} input channels, got {numbers[own]}"
                )
            return numbers["ct"], numbers["pet"]
    if ct_channel is None or pet_channel is None:
        raise ValueError(
            f"`ct_channel` and `pet_channel` must be channel numbers, got {ct_channel} and {pet_channel}; only the "
            f"modality that `modalities` leaves out may be None, and it is {modalities!r}"
        )
    check_channels(input_channels, ct_channel, pet_channel)
    return ct_channel, pet_channel


class ISANetEncoder(nn.Module):
    """One encoder per modality, levels of :class:`RIPM`; see :class:`ISANet`.

    Shapes:
        ``images`` by modality, (batch, in_channels, spatial...); returns by modality one map per level,
        (batch, C_k, spatial / total stride ...), highest resolution first.
    """

    def __init__(
        self,
        branches: Sequence[str],
        in_channels: int,
        features: Sequence[int],
        conv_op: type[nn.Module],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.conv_op = conv_op
        self.output_channels = list(features)
        self.kernel_sizes = [list(k) for k in kernel_sizes]
        self.strides = [list(s) for s in strides]
        widths = [in_channels, *features]
        self.branches = nn.ModuleDict(
            {
                branch: nn.ModuleList(
                    RIPM(conv_op, widths[k], widths[k + 1], kernel_sizes[k], strides[k]) for k in range(len(features))
                )
                for branch in branches
            }
        )

    def forward(self, images: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        skips: dict[str, list[Tensor]] = {}
        for branch, levels in self.branches.items():
            x, skips[branch] = images[branch], []
            for level in levels:
                x = level(x)
                skips[branch].append(x)
        return skips


class ISANetDecoder(nn.Module):
    """One decoder per modality, levels of :class:`DRIM`, and a head on each level of the last; see :class:`ISANet`.

    A branch's level concatenates its deconvolved path, its skip and, behind another branch, that one's output of the
    same level. ``deep_supervision`` may be switched at any time: on, the logits of all levels but the bottleneck
    come out; off, the first level's alone. The heads live in ``seg_layers``, highest resolution first, whatever the
    mode.

    Shapes:
        ``skips`` as :class:`ISANetEncoder` returns them; returns logits (batch, num_classes, spatial...) or a list.
    """

    def __init__(self, encoder: ISANetEncoder, num_classes: int, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.num_classes = num_classes
        widths, kernels, conv_op = encoder.output_channels, encoder.kernel_sizes, encoder.conv_op
        levels = range(len(widths) - 1)
        self.branches = nn.ModuleDict(
            {
                branch: nn.ModuleList(
                    DRIM(conv_op, widths[k + 1], widths[k], kernels[k], encoder.strides[k + 1], other_maps=1 + before)
                    for k in levels
                )
                for before, branch in enumerate(encoder.branches)
            }
        )
        self.seg_layers = nn.ModuleList(conv_op(widths[k], num_classes, 1, bias=True) for k in levels)

    def forward(self, skips: Mapping[str, list[Tensor]]) -> Tensor | list[Tensor]:
        outputs: list[list[Tensor]] = []
        for branch, levels in self.branches.items():
            x = skips[branch][-1]
            decoded: list[Tensor] = []
            for k in reversed(range(len(levels))):
                x = levels[k](x, skips[branch][k], *(other[k] for other in outputs))
                decoded.insert(0, x)
            outputs.append(decoded)
        if self.deep_supervision:
            return [head(x) for head, x in zip(self.seg_layers, outputs[-1], strict=True)]
        return self.seg_layers[0](outputs[-1][0])


class ISANet(nn.Module):
    """ISA-Net for any nnU-Net plan, 2D or 3D.

    Huang, Zou, Wang, Ma, Zou and Zhang, "ISA-Net: Improved spatial attention network for PET-CT tumor segmentation",
    Computer Methods and Programs in Biomedicine 226:107129, 2022 (arXiv 2211.02256). Written from the paper; where
    it is silent, from what the released code does.

    Two U-Nets (PET, CT) do not share weights. A level of an encoder (:class:`RIPM`) is maximum pooling, a residual
    module and an ISA module; a level of a decoder (:class:`DRIM`) a deconvolution, a residual module and an ISA
    module. PET is a complete U-Net. CT's decoder concatenates at every level its deconvolved path, its skip and the
    PET decoder's output of that level: 3C channels, which the residual module takes to C. The bottlenecks are not
    fused. A 1x1x1 convolution on CT's decoder gives the logits.

    Differs from the paper: sizes follow the plan; five levels, 16 to 256 channels, 3x3x3 kernels and pooling by 2
    are the paper's. It has no deep supervision; here each level of CT's decoder has its 1x1x1 head, and those below
    the first are used in training only. Kernels of 5x5x5, planes that are not square: see :class:`ISA`. Differs from
    the released code, which does not run as published: it calls ISA modules in bottlenecks and decoders only, has
    one residual block per decoder level, shares the deconvolutions between the two decoders, and its channel weights
    never learn. What has no norm behind it (deconvolution, output convolution of ISA, head) has a bias, as there.

    Args:
        input_channels: channels of the input, CT and PET included. Further channels (the previous stage of
            ``3d_cascade_fullres``) go to every branch. 1 is allowed where ``modalities`` names one modality.
        n_stages: number of levels, at least 2.
        features_per_stage: C_k per branch; the paper's are 16, 32, 64, 128, 256.
        conv_op: ``nn.Conv3d`` or ``nn.Conv2d``.
        kernel_sizes: per level and axis, odd.
        strides: per level and axis; the first must be 1.
        num_classes: number of logits, background included unless ``region_based``.
        deep_supervision: return the logits of all levels but the deepest, highest resolution first.
        patch_size: the size that the network will see; only checked. No weight depends on it.
        ct_channel: number of the CT channel in the input; None where there is none (``modalities="pet"``).
        pet_channel: number of the PET channel; None where there is none (``modalities="ct"``).
        region_based: accepted as by all fusion networks; the logits are the same.
        modalities: ``"both"``, or ``"pet"`` or ``"ct"`` for that branch alone (the paper's PET and CT rows): its
            decoder concatenates path and skip and has the heads. The other modality's channel, where the input has
            one, is left out; the only channel of an input is taken as the named modality.

    Shapes:
        input (batch, input_channels, spatial...), each axis a multiple of the total stride. Output: raw logits
        (batch, num_classes, spatial...), or with deep supervision a list of ``n_stages - 1`` such tensors at
        spatial / total stride.

    Raises:
        ValueError: for arguments that do not go together, or an input that does not fit.
    """

    def __init__(
        self,
        input_channels: int,
        n_stages: int,
        features_per_stage: int | Sequence[int],
        conv_op: type[nn.Module],
        kernel_sizes: PerStage,
        strides: PerStage,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        patch_size: Sequence[int] | None = None,
        ct_channel: int | None = 0,
        pet_channel: int | None = 1,
        region_based: bool = False,
        modalities: str = "both",
    ) -> None:
        super().__init__()
        dims = spatial_dims(conv_op)
        if n_stages < 2:
            raise ValueError(f"`n_stages` must be at least 2, got {n_stages}")
        if num_classes < 1:
            raise ValueError(f"`num_classes` must be at least 1, got {num_classes}")
        if modalities not in BRANCHES:
            raise ValueError(f"`modalities` must be one of {', '.join(BRANCHES)}, got {modalities!r}")
        self.modalities = modalities
        self.ct_channel, self.pet_channel = image_channels(input_channels, modalities, ct_channel, pet_channel)
        features = expand_features(features_per_stage, n_stages)
        kernels = expand_per_stage(kernel_sizes, n_stages, dims, "kernel_sizes")
        stage_strides = expand_per_stage(strides, n_stages, dims, "strides")
        check_odd(kernels)
        if any(s != 1 for s in stage_strides[0]):
            raise ValueError(f"`strides` must begin with 1: the first level has full resolution, got {strides}")
        if patch_size is not None and math.prod(stage_map_sizes(patch_size, stage_strides, "`patch_size`")[-1]) == 1:
            warnings.warn(
                f"ISANet's deepest map is a single voxel for patch_size {list(patch_size)}: instance normalisation "
                "makes it constant, so that level cannot contribute; use fewer stages or a larger patch",
                stacklevel=2,
            )
        left_out = self.ct_channel is not None and self.pet_channel is not None
        self.encoder = ISANetEncoder(
            BRANCHES[modalities], input_channels - int(left_out), features, conv_op, kernels, stage_strides
        )
        self.decoder = ISANetDecoder(self.encoder, num_classes, deep_supervision)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        stage_map_sizes(x.shape[2:], self.encoder.strides, "an input of size")
        # Where a modality is missing, the other stands in for it, so that no channel is left out of its branch.
        ct_channel = self.pet_channel if self.ct_channel is None else self.ct_channel
        pet_channel = self.ct_channel if self.pet_channel is None else self.pet_channel
        ct, pet = split_modalities(x, ct_channel, pet_channel)
        return self.decoder(self.encoder({"ct": ct, "pet": pet}))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that convolutions and ISA's matrix products write for one sample, as nnU-Net's planner asks.

        As in nnU-Net's own networks, the heads below the first count only with deep supervision on.

        Args:
            input_size: spatial size of the input, without batch and channels.
        """
        decoder = self.decoder
        maps = stage_map_sizes(input_size, self.encoder.strides, "`input_size`")
        supervised = maps[:-1] if decoder.deep_supervision else maps[:1]
        total = sum(decoder.num_classes * math.prod(size) for size in supervised)
        for levels in self.encoder.branches.values():
            total += sum(level.compute_conv_feature_map_size(size) for level, size in zip(levels, maps, strict=True))
        for levels in decoder.branches.values():
            total += sum(
                level.compute_conv_feature_map_size(size) for level, size in zip(levels, maps[:-1], strict=True)
            )
        return total

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """He initialisation of a convolution for ReLU; other modules keep PyTorch's own."""
        InitWeights_He(0.0)(module)
