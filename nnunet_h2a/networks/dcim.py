"""CIPA's dynamic cross-modality interaction module (DCIM): CT voxels meet the PET region that they lie in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnunet_h2a.networks.plan_geometry import spatial_dims
from nnunet_h2a.networks.ss2d import SS2D, convolve
from nnunet_h2a.networks.vss import pad_to_multiple
from nnunet_h2a.networks.windows import partition_windows

#: Side of a region in tokens of the CT map.
REGION = 4


def batch_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """``norm(x)``, also where PyTorch refuses: in training with one value per channel.

    One value has no variance: it is normalised with the running statistics, which it leaves alone. A function and not
    a subclass of BatchNorm, because ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` would replace the subclass.

    Args:
        norm: BatchNorm or SyncBatchNorm.
        x: (batch, channels, spatial...).
    """
    if not norm.training or x.numel() > x.shape[1]:
        return norm(x)
    if isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        if dist.get_world_size(norm.process_group) > 1:
            # Several processes make a batch, and this one must not leave the others waiting for its statistics.
            return norm(x)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


class ConvBatchNormReLU(nn.Sequential):
    """Convolution, BatchNorm, ReLU, once or several times; works down to a single value per channel."""

    def forward(self, x: Tensor) -> Tensor:
        for i in range(0, len(self), 3):
            x = self[i + 2](batch_norm(self[i + 1], convolve(self[i], x)))
        return x


def conv_batch_norm_relu(
    conv_op: type[nn.Module], channels: Sequence[int], strides: Sequence[int]
) -> ConvBatchNormReLU:
    """As many convolutions (kernel 3, with bias, padding 1), each with BatchNorm and ReLU, as there are strides.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        channels: of the input and of each convolution's output.
        strides: of each convolution.
    """
    norm_op = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[spatial_dims(conv_op)]
    layers = []
    for i, stride in enumerate(strides):
        conv = conv_op(channels[i], channels[i + 1], 3, stride, padding=1)
        layers += [conv, norm_op(channels[i + 1]), nn.ReLU()]
    return ConvBatchNormReLU(*layers)


def merge_regions(tokens: Tensor, grid: Sequence[int], region: Sequence[int]) -> Tensor:
    """Put regions back to their places.

    Args:
        tokens: (batch, regions, tokens, channels), regions and the tokens inside them in row-major order.
        grid: number of regions per axis.
        region: tokens per axis.

    Returns:
        (batch, grid * region ..., channels).
    """
    batch, channels, dims = tokens.shape[0], tokens.shape[-1], len(grid)
    interleaved = [axis for i in range(dims) for axis in (1 + i, 1 + dims + i)]
    x = tokens.reshape(batch, *grid, *region, channels).permute(0, *interleaved, 1 + 2 * dims)
    return x.reshape(batch, *(g * r for g, r in zip(grid, region, strict=True)), channels)


class DCIM(nn.Module):
    """Dynamic cross-modality interaction: local scans of CT, a scan of PET's regions, and their sum.

    Mei et al., CVPR 2025 (arXiv 2503.17261), section 3.3, equations 6 to 10; layers as the released weights have them.

    * CT: two convolutions C to C/4 to C (each 3 x 3, BatchNorm, ReLU). The map is cut into regions of 4 x 4 tokens;
      tokens + SS2D(LayerNorm over all values of the region), each region an image of its own: its convolution sees
      zeros beyond the border, its scans begin anew.
    * PET: four such convolutions C to C/16, with stride 2 to C/8, with stride 2 to C/4, to C: one token per region;
      tokens + SS2D(LayerNorm).
    * Each CT token, back at its pixel, plus its region's PET token.

    Differs from the released code, which works on square maps whose side is a multiple of 4: a CT map of another size
    is zero-padded at its ends after its convolutions, and the result is cropped. PET's two strided convolutions
    give one token per region of the padded map. In 3D (not in the paper) a region is 4 x 4 x 4 tokens.

    Args:
        channels: C.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        scan_backend: see :class:`SelectiveScanBlock`.

    Shapes:
        ``ct`` and ``pet`` (batch, map..., C) to (batch, map..., C).
    """

    def __init__(self, channels: int, conv_op: type[nn.Module], scan_backend: str = "auto") -> None:
        super().__init__()
        self.region = (REGION,) * spatial_dims(conv_op)
        sixteenth, eighth, quarter = (max(1, channels // part) for part in (16, 8, 4))
        self.ct_channels = [channels, quarter, channels]
        self.pet_channels = [channels, sixteenth, eighth, quarter, channels]
        self.ct_convs = conv_batch_norm_relu(conv_op, self.ct_channels, (1, 1))
        self.pet_convs = conv_batch_norm_relu(conv_op, self.pet_channels, (1, 2, 2, 1))
        self.local_norm = nn.LayerNorm(math.prod(self.region) * channels)
        self.local_scan = SS2D(channels, conv_op, scan_backend=scan_backend)
        self.region_norm = nn.LayerNorm(channels)
        self.region_scan = SS2D(channels, conv_op, scan_backend=scan_backend)

    def forward(self, ct: Tensor, pet: Tensor) -> Tensor:
        size = ct.shape[1:-1]
        pet = self.pet_convs(pet.movedim(-1, 1)).movedim(1, -1)
        pet = pet + self.region_scan(self.region_norm(pet))
        grid = pet.shape[1:-1]

        ct = partition_windows(pad_to_multiple(self.ct_convs(ct.movedim(-1, 1)), self.region), self.region)
        images = self.local_norm(ct.flatten(1)).unflatten(1, (*self.region, ct.shape[-1]))
        ct = ct + self.local_scan(images).flatten(1, -2)

        tokens = ct.unflatten(0, (pet.shape[0], math.prod(grid))) + pet.flatten(1, -2).unsqueeze(2)
        return merge_regions(tokens, grid, self.region)[(slice(None), *(slice(n) for n in size))]

    def compute_conv_feature_map_size(self, map_size: Sequence[int]) -> int:
        """Elements that convolutions, linear layers and scans write for one sample."""
        tokens = math.prod(map_size)
        half, grid = (math.prod(-(-n // step) for n in map_size) for step in (2, REGION))
        written = tokens * sum(self.ct_channels[1:])
        written += sum(n * c for n, c in zip((tokens, half, grid, grid), self.pet_channels[1:], strict=True))
        written += self.local_scan.compute_conv_feature_map_size(grid * math.prod(self.region))
        return written + self.region_scan.compute_conv_feature_map_size(grid)
