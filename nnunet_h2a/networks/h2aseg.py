"""H2ASeg: hierarchical adaptive interaction and weighting network for PET/CT segmentation (MICCAI 2024)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from nnunet_h2a.networks.mcsa import MCSA
from nnunet_h2a.networks.modalities import check_channels, split_modalities
from nnunet_h2a.networks.plan_geometry import (
    PerStage,
    check_odd,
    expand_features,
    expand_per_stage,
    spatial_dims,
    stage_map_sizes,
)
from nnunet_h2a.networks.precision import InstanceNorm
from nnunet_h2a.networks.residual import ResidualBlock, same_conv
from nnunet_h2a.networks.tamw import TAMW, foreground_probability

#: The paper's patch, lowest resolution first: 128 x 128 x 64 in the paper's own order.
PAPER_PATCH = {3: (64, 128, 128), 2: (128, 128)}

#: The level whose feature map is the attention window: the fifth in the paper, whose map is its 8 x 8 x 4 window.
WINDOW_LEVEL = 5


def attention_windows(patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Attention window of each level for a patch: the map of level min(5, n_stages), never larger than the level's.

    For the paper's patch and strides that is its 8 x 8 x 4 at every level; it divides every level's map exactly.

    Raises:
        ValueError: where the patch is not a multiple of the total stride.
    """
    maps = stage_map_sizes(patch_size, strides, "`patch_size`")
    window = maps[min(WINDOW_LEVEL, len(maps)) - 1]
    return [tuple(min(w, n) for w, n in zip(window, level, strict=True)) for level in maps]


class H2ASegEncoder(nn.Module):
    """Two residual encoders whose maps meet in MCSA at every level; see :class:`H2ASeg`.

    Shapes:
        ``ct`` and ``pet`` (batch, in_channels, spatial...); returns one (CT map, PET map) per level, each
        (batch, C_k, spatial / total stride ...), highest resolution first.
    """

    def __init__(
        self,
        in_channels: int,
        features: Sequence[int],
        conv_op: type[nn.Module],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        windows: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.conv_op = conv_op
        self.output_channels = list(features)
        self.kernel_sizes = [list(k) for k in kernel_sizes]
        self.strides = [list(s) for s in strides]
        self.windows = [tuple(w) for w in windows]
        levels = range(len(features))

        def branch() -> nn.ModuleList:
            widths = [in_channels, *features]
            return nn.ModuleList(
                ResidualBlock(conv_op, widths[k], widths[k + 1], kernel_sizes[k], strides[k], stem=k == 0)
                for k in levels
            )

        self.ct, self.pet = branch(), branch()
        self.mcsa = nn.ModuleList(MCSA(features[k], conv_op, kernel_sizes[k], windows[k]) for k in levels)

    def forward(self, ct: Tensor, pet: Tensor) -> list[tuple[Tensor, Tensor]]:
        skips = []
        for ct_block, pet_block, mcsa in zip(self.ct, self.pet, self.mcsa, strict=True):
            ct, pet = mcsa(ct_block(ct), pet_block(pet))
            skips.append((ct, pet))
        return skips

    def check_input(self, size: Sequence[int]) -> None:
        """Refuse an input whose maps are not whole numbers of windows.

        Raises:
            ValueError: naming the input's size, the level and its window.
        """
        maps = stage_map_sizes(size, self.strides, "an input of size")
        for level, (map_size, window) in enumerate(zip(maps, self.windows, strict=True), start=1):
            if any(n % w for n, w in zip(map_size, window, strict=True)):
                raise ValueError(
                    f"an input of size {list(size)} does not fit: its map at level {level} is {list(map_size)}, not a "
                    f"multiple of the attention window {list(window)}; build the network with patch_size={list(size)}"
                )


class H2ASegDecoder(nn.Module):
    """H2ASeg's decoder: up-sampling, target-aware modality weighting and a residual block per level, a head on each.

    ``deep_supervision`` may be switched at any time: on, all levels' logits come out; off, the first level's alone.
    The heads live in ``seg_layers``, highest resolution first, whatever the mode.

    Shapes:
        ``skips`` as :class:`H2ASegEncoder` returns them; returns logits (batch, num_classes, spatial...) or a list.
    """

    def __init__(
        self, encoder: H2ASegEncoder, num_classes: int, deep_supervision: bool, independent_classes: bool
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.num_classes = num_classes
        self.independent_classes = independent_classes
        widths, kernels, conv_op = encoder.output_channels, encoder.kernel_sizes, encoder.conv_op
        self.mode = {2: "bilinear", 3: "trilinear"}[spatial_dims(conv_op)]
        shallow = range(len(widths) - 1)
        fused = [2 * (widths[k] + widths[k + 1]) for k in shallow]
        self.tamw = nn.ModuleList(TAMW(fused[k]) for k in shallow)
        self.stages = nn.ModuleList(ResidualBlock(conv_op, fused[k], 2 * widths[k], kernels[k]) for k in shallow)
        self.seg_layers = nn.ModuleList(
            nn.Sequential(InstanceNorm(), nn.PReLU(), same_conv(conv_op, 2 * width, num_classes, kernel))
            for width, kernel in zip(widths, kernels, strict=True)
        )

    def forward(self, skips: list[tuple[Tensor, Tensor]]) -> Tensor | list[Tensor]:
        decoded = torch.cat(skips[-1], dim=1)
        logits = [self.seg_layers[-1](decoded)]
        for level in reversed(range(len(self.stages))):
            ct, pet = skips[level]
            foreground = foreground_probability(self._upsample(logits[-1], ct), self.independent_classes)
            features = torch.cat([pet, ct, self._upsample(decoded, ct)], dim=1)
            decoded = self.stages[level](self.tamw[level](features, foreground))
            logits.append(self.seg_layers[level](decoded))
        return logits[::-1] if self.deep_supervision else logits[-1]

    def _upsample(self, x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[2:], mode=self.mode, align_corners=False)


class H2ASeg(nn.Module):
    """H2ASeg for any nnU-Net plan, 2D or 3D.

    Lu, Chen, Zhang, Li and Xia, "H2ASeg: Hierarchical Adaptive Interaction and Weighting Network for Tumor
    Segmentation in PET/CT Images", MICCAI 2024 (arXiv 2403.18339). Section 2.1: MCSA with BDSA (equation 1);
    section 2.2: TAMW (equations 2 to 4); section 2.3: deep supervision (equation 5, left to the trainer). Written
    from the paper.

    Two residual encoders (CT, PET) do not share weights. At each level their maps pass through :class:`MCSA`, whose
    output goes down and is the skip. The decoder starts from both deepest maps side by side and at each level
    up-samples, weights channels with :class:`TAMW` by the deeper level's prediction (not detached) and applies a
    residual block to 2 C_k channels. Each level has a head: InstanceNorm, PReLU, convolution.

    Differs from the paper: sizes follow the plan. The window, 8 x 8 x 4 at every level in the paper, is the size of
    level min(5, n_stages)'s map, never larger than the level's own, which is the paper's for the paper's patch; a
    3x3x3 convolution is the plan's kernel of that level; up-sampling uses the plan's stride and does not align
    corners (the paper does not say). Differs from the released code: see :class:`MCSA`, :class:`BDSA`,
    :class:`TAMW`, :class:`ResidualBlock`; that code fixes patch, strides and five levels, and has dropout of 0.5.

    Args:
        input_channels: channels of the input, CT and PET included. Further channels (the previous stage of
            ``3d_cascade_fullres``) go to both branches.
        n_stages: number of levels, at least 2.
        features_per_stage: C_k per branch; the paper's are 8, 16, 32, 64, 128. The decoder has twice as many.
        conv_op: ``nn.Conv3d`` or ``nn.Conv2d``.
        kernel_sizes: per level and axis, odd.
        strides: per level and axis; the first must be 1.
        num_classes: number of logits, background included unless ``region_based``.
        deep_supervision: return the logits of all levels, highest resolution first.
        patch_size: the size that the network will see, in the plan's axis order. It sizes the attention windows, and
            with them some weights. None stands for the paper's patch, (64, 128, 128), or (128, 128) in 2D.
        ct_channel: number of the CT channel in the input.
        pet_channel: number of the PET channel.
        region_based: classes are independent (one sigmoid each), as nnU-Net trains regions. With one class it is so.

    Shapes:
        input (batch, input_channels, spatial...), each axis such that every level's map is a whole number of windows
        (``patch_size`` is, and multiples of it). Output: raw logits (batch, num_classes, spatial...), or with deep
        supervision a list of ``n_stages`` such tensors at spatial / total stride.

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
        ct_channel: int = 0,
        pet_channel: int = 1,
        region_based: bool = False,
    ) -> None:
        super().__init__()
        dims = spatial_dims(conv_op)
        if n_stages < 2:
            raise ValueError(f"`n_stages` must be at least 2, got {n_stages}")
        if num_classes < 1:
            raise ValueError(f"`num_classes` must be at least 1, got {num_classes}")
        check_channels(input_channels, ct_channel, pet_channel)
        features = expand_features(features_per_stage, n_stages)
        kernels = expand_per_stage(kernel_sizes, n_stages, dims, "kernel_sizes")
        stage_strides = expand_per_stage(strides, n_stages, dims, "strides")
        check_odd(kernels)
        if any(s != 1 for s in stage_strides[0]):
            raise ValueError(f"`strides` must begin with 1: the first level has full resolution, got {strides}")
        self.patch_size = PAPER_PATCH[dims] if patch_size is None else tuple(int(n) for n in patch_size)
        self.ct_channel, self.pet_channel = ct_channel, pet_channel
        windows = attention_windows(self.patch_size, stage_strides)
        if math.prod(stage_map_sizes(self.patch_size, stage_strides, "`patch_size`")[-1]) == 1:
            warnings.warn(
                f"H2ASeg's deepest map is a single voxel for patch_size {list(self.patch_size)}: instance "
                "normalisation makes it constant, so that level cannot contribute; use fewer stages or a larger patch",
                stacklevel=2,
            )
        self.encoder = H2ASegEncoder(input_channels - 1, features, conv_op, kernels, stage_strides, windows)
        self.decoder = H2ASegDecoder(
            self.encoder, num_classes, deep_supervision, independent_classes=region_based or num_classes == 1
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        self.encoder.check_input(x.shape[2:])
        ct, pet = split_modalities(x, self.ct_channel, self.pet_channel)
        return self.decoder(self.encoder(ct, pet))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that convolutions, projections and attentions write for one sample, as nnU-Net's planner asks.

        Args:
            input_size: spatial size of the input, without batch and channels.
        """
        encoder, decoder = self.encoder, self.decoder
        maps = stage_map_sizes(input_size, encoder.strides, "`input_size`")
        total = 0
        for ct_block, pet_block, mcsa, size in zip(encoder.ct, encoder.pet, encoder.mcsa, maps, strict=True):
            total += sum(block.compute_conv_feature_map_size(size) for block in (ct_block, pet_block, mcsa))
            total += decoder.num_classes * math.prod(size)
        for stage, size in zip(decoder.stages, maps[:-1], strict=True):
            total += stage.compute_conv_feature_map_size(size)
        return total

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """He initialisation of a convolution for PReLU at its initial slope; other modules keep PyTorch's own."""
        InitWeights_He(0.25)(module)
