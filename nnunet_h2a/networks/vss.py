"""VMamba's encoder: patch embedding, VSS blocks and patch merging, on maps with channels last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_h2a.networks.plan_geometry import spatial_dims
from nnunet_h2a.networks.ss2d import SS2D


@dataclass(frozen=True)
class MapGeometry:
    """How the four stages' maps lie in the input.

    Args:
        embedding: per axis, kernel and stride of the patch embedding.
        merges: for each of the three mergings, the factor per axis, 1 or 2.
    """

    embedding: tuple[int, ...]
    merges: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> tuple[int, ...]:
        """Down-sampling of the last stage against the input, per axis."""
        return tuple(e * math.prod(m) for e, *m in zip(self.embedding, *self.merges, strict=True))

    def padded(self, size: Sequence[int], name: str) -> tuple[int, ...]:
        """``size`` rounded up to multiples of :attr:`total`.

        Raises:
            ValueError: for another number of axes, or an axis without voxels; ``name`` says what ``size`` is.
        """
        if len(size) != len(self.embedding) or any(n < 1 for n in size):
            raise ValueError(f"{name} {list(size)} does not fit: it must have {len(self.embedding)} positive axes")
        return tuple(-(-n // t) * t for n, t in zip(size, self.total, strict=True))

    def maps(self, padded: Sequence[int]) -> list[tuple[int, ...]]:
        """Size of each stage's map for an input of ``padded`` size."""
        maps = [tuple(n // e for n, e in zip(padded, self.embedding, strict=True))]
        for merge in self.merges:
            maps.append(tuple(n // m for n, m in zip(maps[-1], merge, strict=True)))
        return maps


def pad_to_multiple(x: Tensor, multiple: Sequence[int], channels_last: bool = False) -> Tensor:
    """Pad the spatial axes with zeros at their ends to multiples of ``multiple``; ``x`` itself if they are.

    Args:
        x: (batch, channels, spatial...), or with ``channels_last`` (batch, spatial..., channels).
        multiple: per spatial axis.
        channels_last: where the channels are.
    """
    size = x.shape[1:-1] if channels_last else x.shape[2:]
    missing = [-n % m for n, m in zip(size, multiple, strict=True)]
    if not any(missing):
        return x
    pairs = [amount for n in reversed(missing) for amount in (0, n)]
    return F.pad(x, [0, 0, *pairs] if channels_last else pairs)


class ChannelsLast(nn.Module):
    """(batch, channels, spatial...) to (batch, spatial..., channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


class VSSBlock(nn.Module):
    """x + SS2D(LayerNorm(x)); CIPA's blocks have no MLP and no stochastic depth.

    Shapes:
        (batch, spatial..., channels) to the same shape.
    """

    def __init__(self, channels: int, conv_op: type[nn.Module], scan_backend: str = "auto") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.op = SS2D(channels, conv_op, scan_backend=scan_backend)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.op(self.norm(x))


class PatchMerging(nn.Module):
    """Half the map: the parities of each axis side by side, LayerNorm, linear without bias.

    The parities' order is that of the released weights: (row, column) (0, 0), (1, 0), (0, 1), (1, 1), the first
    axis's parity fastest. Only axes whose factor is 2 have parities. Odd maps are zero-padded at their ends.

    Args:
        channels: of the input.
        out_channels: of the output, in the paper twice as many.
        factors: per axis, 1 or 2.

    Shapes:
        (batch, spatial..., channels) to (batch, spatial / factor ..., out_channels).
    """

    def __init__(self, channels: int, out_channels: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = tuple(factors)
        merged = math.prod(self.factors) * channels
        self.norm = nn.LayerNorm(merged)
        self.reduction = nn.Linear(merged, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, self.factors, channels_last=True)
        batch, *size, channels = x.shape
        dims = len(size)
        split = [part for n, f in zip(size, self.factors, strict=True) for part in (n // f, f)]
        grid, parities = [1 + 2 * i for i in range(dims)], [2 + 2 * i for i in reversed(range(dims))]
        x = x.reshape(batch, *split, channels).permute(0, *grid, *parities, 1 + 2 * dims).flatten(1 + dims)
        return self.reduction(self.norm(x))


class VSSStage(nn.Module):
    """VSS blocks and, but for the last stage, the merging that leads to the next; see :class:`VSSEncoder`."""

    def __init__(
        self, channels: int, depth: int, conv_op: type[nn.Module], downsample: PatchMerging | None, scan_backend: str
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(VSSBlock(channels, conv_op, scan_backend) for _ in range(depth)))
        self.downsample = downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map after the blocks, and the next stage's input."""
        x = self.blocks(x)
        return x, x if self.downsample is None else self.downsample(x)


class VSSEncoder(nn.Module):
    """VMamba-Tiny's encoder without its MLPs, as CIPA uses it for both modalities.

    Patch embedding (convolution with kernel = stride, with bias, LayerNorm), four stages of :class:`VSSBlock`,
    :class:`PatchMerging` between them. A stage's output is its own LayerNorm of the map; merging takes the map
    before that norm. Module names are those of the released weights.

    Args:
        in_channels: of the input.
        widths: channels of the four stages.
        depths: blocks of the four stages.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        geometry: strides of embedding and mergings.
        scan_backend: see :class:`SelectiveScanBlock`.

    Shapes:
        (batch, in_channels, spatial...) to four maps (batch, map..., width), highest resolution first.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        conv_op: type[nn.Module],
        geometry: MapGeometry,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        spatial_dims(conv_op)
        self.output_channels = list(widths)
        self.patch_embed = nn.Sequential(
            conv_op(in_channels, widths[0], geometry.embedding, geometry.embedding),
            ChannelsLast(),
            nn.LayerNorm(widths[0]),
        )
        mergings = [
            *(PatchMerging(widths[i], widths[i + 1], factors) for i, factors in enumerate(geometry.merges)),
            None,
        ]
        self.layers = nn.ModuleList(
            VSSStage(width, depth, conv_op, merging, scan_backend)
            for width, depth, merging in zip(widths, depths, mergings, strict=True)
        )
        for i, width in enumerate(widths):
            self.add_module(f"outnorm{i}", nn.LayerNorm(width))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embed(x)
        outputs = []
        for i, stage in enumerate(self.layers):
            output, x = stage(x)
            outputs.append(getattr(self, f"outnorm{i}")(output))
        return outputs

    def compute_conv_feature_map_size(self, maps: Sequence[Sequence[int]]) -> int:
        """Elements that convolutions, linear layers and scans write for one image with these stages' maps."""
        tokens = [math.prod(m) for m in maps]
        total = tokens[0] * self.output_channels[0]
        for i, stage in enumerate(self.layers):
            total += sum(block.op.compute_conv_feature_map_size(tokens[i]) for block in stage.blocks)
            if i > 0:
                total += tokens[i] * self.output_channels[i]
        return total
