"""H2ASeg's cross-modal attention: BDSA between two token maps, and MCSA, its use between and inside windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_h2a.networks.precision import InstanceNorm, convolution
from nnunet_h2a.networks.residual import same_conv
from nnunet_h2a.networks.windows import merge_windows, partition_windows

#: Most windows that go into one attention call: CUDA's kernels put them on a grid axis of 65,535 blocks.
MOST_WINDOWS_AT_ONCE = 32768


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of any number of windows; all (windows, heads, tokens, channels)."""
    parts = (part.split(MOST_WINDOWS_AT_ONCE) for part in (q, k, v))
    results = [F.scaled_dot_product_attention(*part) for part in zip(*parts, strict=True)]
    return results[0] if len(results) == 1 else torch.cat(results)


class BDSA(nn.Module):
    """Bi-directional spatial attention between CT and PET tokens, both directions.

    Lu et al., "H2ASeg", MICCAI 2024, section 2.1, equation 1. For source features E_s and target features E_t, both
    (C, n tokens): K_s, V_s from E_s and Q_s, Q_t, K_t, V_t from E_t by 1x1 convolutions without bias, and

        A_self = V_s softmax(Q_s^T K_s / sqrt(C))^T,   A_cross = V_t softmax(Q_t^T K_t / sqrt(C))^T

    with the softmax over the keys (the names are the paper's). [A_self, A_cross], 2C channels, goes back to its grid
    and through a convolution to C channels: the new target features. It runs with (source, target) = (PET, CT) and
    (CT, PET), each with weights of its own.

    Same numbers, cheaper: each branch's six projections (four as the target of one direction, two as the source of
    the other) are one matrix product, and the four attentions are one ``scaled_dot_product_attention`` call, which
    keeps no n x n matrix.

    Differs from the released code, which averages the two attentions instead of concatenating them, reduces Q and K
    to C/4 channels at two levels, convolves with 1x1x1 and drops out attention weights; the paper has none of these.
    Both take the scale from the channels of Q.

    Args:
        channels: C.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        kernel_size: of the output convolution, per axis; zero-padded at the grid's border.

    Shapes:
        ``ct``, ``pet`` (batch, n, C) with n the product of ``grid``; returns CT and PET features (batch, C, grid...).
    """

    #: Order of the six projections in the rows of ``project_ct`` and ``project_pet``: first those that this branch
    #: gives as the target of its own direction, then those that it gives as the source of the other direction.
    PROJECTIONS = ("q_source", "q_target", "k_target", "v_target", "k_source", "v_source")

    def __init__(self, channels: int, conv_op: type[nn.Module], kernel_size: Sequence[int]) -> None:
        super().__init__()
        self.channels = channels
        self.project_ct = nn.Linear(channels, 6 * channels, bias=False)
        self.project_pet = nn.Linear(channels, 6 * channels, bias=False)
        self.out_ct = same_conv(conv_op, 2 * channels, channels, kernel_size)
        self.out_pet = same_conv(conv_op, 2 * channels, channels, kernel_size)

    def forward(self, ct: Tensor, pet: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        batch, tokens, channels = ct.shape
        ct_parts = self.project_ct(ct).reshape(batch, tokens, 6, channels).transpose(1, 2).unbind(1)
        pet_parts = self.project_pet(pet).reshape(batch, tokens, 6, channels).transpose(1, 2).unbind(1)
        ct_q_source, ct_q_target, ct_k_target, ct_v_target, ct_k_source, ct_v_source = ct_parts
        pet_q_source, pet_q_target, pet_k_target, pet_v_target, pet_k_source, pet_v_source = pet_parts
        attended = attend(
            torch.stack([ct_q_source, ct_q_target, pet_q_source, pet_q_target], dim=1),
            torch.stack([pet_k_source, ct_k_target, ct_k_source, pet_k_target], dim=1),
            torch.stack([pet_v_source, ct_v_target, ct_v_source, pet_v_target], dim=1),
        )
        attended = attended.transpose(2, 3).reshape(batch, 2, 2 * channels, *grid)
        return self.out_ct(attended[:, 0]), self.out_pet(attended[:, 1])

    def compute_conv_feature_map_size(self, tokens: int) -> int:
        """Elements that projections, attentions and output convolutions write, for ``tokens`` tokens per branch."""
        return (6 + 2 + 1) * 2 * self.channels * tokens


class MCSA(nn.Module):
    """Multi-scale cross-modal spatial attention of one level: between windows, then inside windows.

    Lu et al., "H2ASeg", MICCAI 2024, section 2.1, figure 2. For a window w:

    1. inter-window: a convolution with kernel = stride = w (one per branch, with bias) pools each window to one
       token; BDSA over all tokens; linear up-sampling back; add to the input; InstanceNorm, PReLU.
    2. intra-window: BDSA inside each window, its convolution zero-padded at the window's border; add to the result
       of 1; InstanceNorm, PReLU.

    Additions, norms and activations are the released code's; the paper does not give them. Differs from that code:
    it uses MCSA at two of five levels only (plain BDSA over the whole map at the deepest two, nothing at the first)
    and pools with a cube of side min(w); here, as the paper's text has it, every level and the window's own shape.
    Up-sampling does not align corners, so that a token stays at its window's centre.

    Where the window is the whole map there is one token: its softmax is 1, and the queries and keys between windows
    get zero (not missing) gradients.

    Args:
        channels: C of either branch.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        kernel_size: of the output convolutions, per axis.
        window: w, per axis.

    Shapes:
        ``ct`` and ``pet`` (batch, C, spatial...), each axis a multiple of the window's; returns the same shapes.
    """

    def __init__(
        self, channels: int, conv_op: type[nn.Module], kernel_size: Sequence[int], window: Sequence[int]
    ) -> None:
        super().__init__()
        self.channels = channels
        self.window = tuple(window)
        self.mode = {2: "bilinear", 3: "trilinear"}[len(self.window)]
        self.pool_ct = convolution(conv_op, channels, channels, self.window, self.window)
        self.pool_pet = convolution(conv_op, channels, channels, self.window, self.window)
        self.inter = BDSA(channels, conv_op, kernel_size)
        self.intra = BDSA(channels, conv_op, kernel_size)
        self.inter_ct, self.inter_pet, self.intra_ct, self.intra_pet = (
            nn.Sequential(InstanceNorm(), nn.PReLU()) for _ in range(4)
        )

    def forward(self, ct: Tensor, pet: Tensor) -> tuple[Tensor, Tensor]:
        size = ct.shape[2:]
        ct_tokens, pet_tokens = self.pool_ct(ct), self.pool_pet(pet)
        grid = ct_tokens.shape[2:]
        inter_ct, inter_pet = self.inter(
            ct_tokens.flatten(2).transpose(1, 2), pet_tokens.flatten(2).transpose(1, 2), grid
        )
        ct = self.inter_ct(ct + self._upsample(inter_ct, size))
        pet = self.inter_pet(pet + self._upsample(inter_pet, size))
        intra_ct, intra_pet = self.intra(
            partition_windows(ct, self.window), partition_windows(pet, self.window), self.window
        )
        ct = self.intra_ct(ct + merge_windows(intra_ct, size))
        pet = self.intra_pet(pet + merge_windows(intra_pet, size))
        return ct, pet

    def _upsample(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(x, size=tuple(size), mode=self.mode, align_corners=False)

    def compute_conv_feature_map_size(self, map_size: Sequence[int]) -> int:
        """Elements that convolutions, projections and attentions write for one sample."""
        voxels = math.prod(map_size)
        windows = voxels // math.prod(self.window)
        pooled = 2 * self.channels * windows
        return (
            pooled
            + self.inter.compute_conv_feature_map_size(windows)
            + self.intra.compute_conv_feature_map_size(voxels)
        )
