"""CIPA: cross-modal interactive perception network with Mamba for lung tumour segmentation in PET/CT (CVPR 2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_h2a.networks.crm import CRM
from nnunet_h2a.networks.cvss import CVSSDecoder
from nnunet_h2a.networks.dcim import DCIM
from nnunet_h2a.networks.modalities import check_channels, split_modalities
from nnunet_h2a.networks.plan_geometry import PerStage, expand_features, expand_per_stage, spatial_dims
from nnunet_h2a.networks.vss import MapGeometry, VSSEncoder, pad_to_multiple

#: The paper's input, and the patch assumed in 3D, which is not the paper's.
DEFAULT_PATCH = {2: (512, 512), 3: (64, 128, 128)}

#: Stages of encoder and decoder, whatever the plan.
STAGES = 4

#: Channels that the encoder's images have: one modality, repeated, as ImageNet's weights ask.
IMAGE_CHANNELS = 3


def map_geometry(strides: Sequence[Sequence[int]]) -> MapGeometry:
    """Strides of patch embedding and mergings: the paper's in 2D, the plan's anisotropy in 3D.

    In 2D the embedding has stride 4 and each merging 2, whatever the plan. In 3D the embedding's stride along an axis
    is the product of the strides of the plan's first three stages, at most 4; merging k (1 to 3) has the stride of the
    plan's stage 3 + k (counted from 1), at most 2, or 2 along every axis where the plan has no such stage.

    Args:
        strides: per stage and axis, as a plan has them.
    """
    dims = len(strides[0])
    if dims == 2:
        return MapGeometry((4, 4), ((2, 2),) * (STAGES - 1))
    embedding = tuple(min(4, math.prod(s)) for s in zip(*strides[:3], strict=True))
    deeper = [tuple(min(2, s) for s in stage) for stage in strides[3 : 2 + STAGES]]
    return MapGeometry(embedding, tuple(deeper + [(2,) * dims] * (STAGES - 1 - len(deeper))))


class CIPA(nn.Module):
    """CIPA for any nnU-Net plan: the paper's network in 2D, an extension of it in 3D.

    Mei, Shao, Zhao, Liu, Xiao, Zhang and Zou, "Cross-Modal Interactive Perception Network with Mamba for Lung Tumor
    Segmentation in PET-CT Images", CVPR 2025 (arXiv 2503.17261). Section 3.1: the encoder, shared by both modalities;
    section 3.2: CRM; section 3.3: DCIM; the decoder is Sigma's (arXiv 2404.04256).

    Both modalities, each repeated to three channels, go through one encoder as one batch (:class:`VSSEncoder`). At
    each of four stages :class:`CRM` weights the channels of both maps X_ct and X_pet, :class:`DCIM` lets the rectified
    maps interact, and the stage's output is X_ct + X_pet + DCIM, X being the maps before CRM. The decoder
    (:class:`CVSSDecoder`) turns the four outputs into logits.

    Where paper and released code differ the code is followed, because the released weights belong to it: X + W X in
    CRM instead of W X; X_ct + X_pet beside DCIM's result; no MLP in the VSS blocks.

    Differs from the released code: inputs of any size (zero-padded at their ends to a multiple of the total stride, 32
    in 2D, and the logits cropped; that code works on square inputs); DCIM on any map; BatchNorm on a single value; two
    switches leave CRM or DCIM out, and without DCIM a stage's output is the sum of the (rectified) maps.

    3D is new work, not the paper's: the same blocks with three axes, six scan directions (:class:`SS2D`), regions of
    4 x 4 x 4 tokens, trilinear up-sampling. The maps follow the plan's strides (:func:`map_geometry`), so that a
    region of the embedded map is about a cube in mm.

    Args:
        input_channels: channels of the input, CT and PET included. Further channels (the previous stage of
            ``3d_cascade_fullres``) go to both modalities' images, behind their three channels.
        n_stages: number of stages of the plan. The network has four; in 2D the plan's stages, widths, kernels and
            strides are accepted and change nothing, in 3D the strides shape the maps.
        features_per_stage: of the plan, unused.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        kernel_sizes: of the plan, unused.
        strides: of the plan, per stage and axis; used in 3D.
        num_classes: number of logits, background included unless ``region_based``.
        deep_supervision: return a list of one. There are no auxiliary heads.
        patch_size: the size that the network will see, in the plan's axis order. It sizes CRM's weights. None stands
            for 512 x 512, the paper's, or (64, 128, 128) in 3D.
        ct_channel: number of the CT channel in the input.
        pet_channel: number of the PET channel.
        region_based: accepted as every network here does; the logits are the same.
        use_crm: False leaves CRM out; then inputs of any size fit.
        use_dcim: False leaves DCIM out.
        widths: channels of the four stages; the paper's by default. CRM's tokens are as wide as the first.
        depths: blocks of the encoder's four stages.
        decoder_depth: blocks of each decoder stage.
        drop_path: largest rate of stochastic depth, in the decoder only.
        scan_backend: see :func:`nnunet_h2a.networks.selective_scan.selective_scan`.

    Shapes:
        input (batch, input_channels, spatial...); with CRM its size must be ``patch_size`` (or pad to the same size).
        Output: raw logits (batch, num_classes, spatial...), or with deep supervision a list of one such tensor.

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
        use_crm: bool = True,
        use_dcim: bool = True,
        widths: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 9, 2),
        decoder_depth: int = 4,
        drop_path: float = 0.1,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        dims = spatial_dims(conv_op)
        for name, count in (("n_stages", n_stages), ("num_classes", num_classes), ("decoder_depth", decoder_depth)):
            if count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}")
        for name, values in (("widths", widths), ("depths", depths)):
            if len(values) != STAGES or any(v < 1 for v in values):
                raise ValueError(f"`{name}` must be {STAGES} positive integers, got {values}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"`drop_path` must be at least 0 and less than 1, got {drop_path}")
        check_channels(input_channels, ct_channel, pet_channel)
        expand_features(features_per_stage, n_stages)
        expand_per_stage(kernel_sizes, n_stages, dims, "kernel_sizes")
        self.geometry = map_geometry(expand_per_stage(strides, n_stages, dims, "strides"))
        self.patch_size = DEFAULT_PATCH[dims] if patch_size is None else tuple(int(n) for n in patch_size)
        self.padded_patch = self.geometry.padded(self.patch_size, "`patch_size`")
        self.ct_channel, self.pet_channel = ct_channel, pet_channel
        self.use_crm, self.use_dcim = use_crm, use_dcim

        self.encoder = VSSEncoder(
            IMAGE_CHANNELS + input_channels - 2, widths, depths, conv_op, self.geometry, scan_backend
        )
        maps = self.geometry.maps(self.padded_patch) if use_crm else []
        self.crm = nn.ModuleList(CRM(size, widths[0], scan_backend) for size in maps)
        self.dcim = nn.ModuleList(DCIM(width, conv_op, scan_backend) for width in (widths if use_dcim else []))
        self.decoder = CVSSDecoder(
            widths, decoder_depth, conv_op, self.geometry, num_classes, deep_supervision, drop_path, scan_backend
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        size = x.shape[2:]
        self._check_input(size)
        modalities = split_modalities(pad_to_multiple(x, self.geometry.total), self.ct_channel, self.pet_channel)
        repeat = [0] * IMAGE_CHANNELS + list(range(1, x.shape[1] - 1))
        maps = self.encoder(torch.cat([image[:, repeat] for image in modalities]))
        logits = self.decoder([self._fuse(stage, *m.chunk(2)) for stage, m in enumerate(maps)])
        inside = (slice(None), slice(None), *(slice(n) for n in size))
        return [level[inside] for level in logits] if isinstance(logits, list) else logits[inside]

    def _fuse(self, stage: int, ct: Tensor, pet: Tensor) -> Tensor:
        """A stage's output from both modalities' maps; all (batch, map..., width)."""
        rectified = self.crm[stage](ct, pet) if self.use_crm else (ct, pet)
        if not self.use_dcim:
            return rectified[0] + rectified[1]
        return ct + pet + self.dcim[stage](*rectified)

    def _check_input(self, size: Sequence[int]) -> None:
        if self.use_crm and self.geometry.padded(size, "an input of size") != self.padded_patch:
            raise ValueError(
                f"an input of size {list(size)} does not fit; build the network with patch_size={list(size)} "
                f"(CRM's weights belong to the maps of patch_size={list(self.patch_size)})"
            )

    def no_weight_decay(self) -> set[str]:
        """Names of the scans' parameters that weight decay must leave alone: decay rates, skips and biases of delta.

        Decay would draw A = -exp(A_logs) to -1 and D to 0, and the step sizes to softplus(0).
        """
        return {
            name for name, _ in self.named_parameters() if name.rpartition(".")[2] in ("A_logs", "Ds", "dt_projs_bias")
        }

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that convolutions, linear layers and scans write for one sample, as nnU-Net's planner asks.

        Args:
            input_size: spatial size of the input, without batch and channels.
        """
        maps = self.geometry.maps(self.geometry.padded(input_size, "`input_size`"))
        total = 2 * self.encoder.compute_conv_feature_map_size(maps) + self.decoder.compute_conv_feature_map_size(maps)
        total += sum(
            crm.compute_conv_feature_map_size(width)
            for crm, width in zip(self.crm, self.encoder.output_channels, strict=self.use_crm)
        )
        return total + sum(
            dcim.compute_conv_feature_map_size(size) for dcim, size in zip(self.dcim, maps, strict=self.use_dcim)
        )

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initial weights, for ``network.apply``; parameters of scans and scales keep what their constructors set.

        * linear layers and convolutions with kernel 1 (classifier, gates): normal with standard deviation 0.02,
          truncated, biases 0, as VMamba does;
        * LayerNorm and BatchNorm: 1 and 0;
        * depth-wise convolutions (before the scans): PyTorch's own, as Mamba does;
        * other convolutions, which activations or norms follow: He; their biases stay PyTorch's own. Were that of the
          patch embedding 0, empty parts of an image (padding) would stay exactly 0 through the whole encoder, and
          every LayerNorm would multiply their gradients by eps^-0.5 = 316.
        """
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d | nn.Conv3d) and math.prod(module.kernel_size) == 1
        ):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.Conv3d) and module.groups == 1:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
