"""CIPA's decoder: channel-aware VSS blocks (CVSS), expansion and up-sampling, on maps with channels last."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_h2a.networks.plan_geometry import spatial_dims
from nnunet_h2a.networks.precision import wide
from nnunet_h2a.networks.ss2d import SS2D, convolve
from nnunet_h2a.networks.vss import MapGeometry

#: State size of the decoder's scans.
STATE_SIZE = 4


class DropPath(nn.Module):
    """Stochastic depth: in training, a sample's branch is zeroed with probability ``rate``, else divided by 1 - rate.

    Huang et al., "Deep Networks with Stochastic Depth" (ECCV 2016). A dropped branch is multiplied by 0 and not
    skipped, so that its parameters receive a (zero) gradient in every step, as DistributedDataParallel needs.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class ChannelGate(nn.Module):
    """f * sigmoid(g(mean of f over space) + g(maximum of f over space)), one shared g.

    g: 1 x 1 convolution to floor(C / 30) channels, SiLU, 1 x 1 convolution back, both without bias.

    Shapes:
        (batch, C, spatial...) to the same shape.
    """

    def __init__(self, channels: int, conv_op: type[nn.Module]) -> None:
        super().__init__()
        hidden = max(1, channels // 30)
        self.fc = nn.Sequential(
            conv_op(channels, hidden, 1, bias=False), nn.SiLU(), conv_op(hidden, channels, 1, bias=False)
        )

    def forward(self, f: Tensor) -> Tensor:
        axes = tuple(range(2, f.dim()))
        mean = f.mean(axes, keepdim=True, dtype=wide(f[:0]).dtype).to(f.dtype)
        return f * torch.sigmoid(self.fc(mean) + self.fc(f.amax(axes, keepdim=True)))


class CAB(nn.Module):
    """Channel attention block: 3 x 3 convolution to C/3, GELU, 3 x 3 convolution to C, :class:`ChannelGate`.

    Shapes:
        (batch, C, spatial...) to the same shape.
    """

    def __init__(self, channels: int, conv_op: type[nn.Module]) -> None:
        super().__init__()
        hidden = max(1, channels // 3)
        self.cab = nn.Sequential(
            conv_op(channels, hidden, 3, padding=1),
            nn.GELU(),
            conv_op(hidden, channels, 3, padding=1),
            ChannelGate(channels, conv_op),
        )

    def forward(self, x: Tensor) -> Tensor:
        reduce, activation, restore, gate = self.cab
        return gate(convolve(restore, activation(convolve(reduce, x))))

    def compute_conv_feature_map_size(self, tokens: int) -> int:
        """Elements that the convolutions write for one sample; the gate's run twice on one token."""
        gate = 2 * sum(layer.out_channels for layer in (self.cab[3].fc[0], self.cab[3].fc[2]))
        return tokens * (self.cab[0].out_channels + self.cab[2].out_channels) + gate


class CVSSBlock(nn.Module):
    """Channel-aware VSS block: x' = x * scale1 + SS2D(LN(x)); CAB(LN(x')) + x' * scale2.

    Wan et al., "Sigma: Siamese Mamba Network for Multi-Modal Semantic Segmentation" (arXiv 2404.04256), section 3.4,
    which CIPA's decoder takes over. Stochastic depth is on the SS2D branch; the scales begin at 1.

    Args:
        channels: C.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        drop_path: probability that the SS2D branch is dropped in training.
        scan_backend: see :class:`SelectiveScanBlock`.

    Shapes:
        (batch, spatial..., C) to the same shape.
    """

    def __init__(self, channels: int, conv_op: type[nn.Module], drop_path: float, scan_backend: str = "auto") -> None:
        super().__init__()
        self.scale1 = nn.Parameter(torch.ones(channels))
        self.norm1 = nn.LayerNorm(channels)
        self.op = SS2D(channels, conv_op, STATE_SIZE, scan_backend)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(channels)
        self.conv_blk = CAB(channels, conv_op)
        self.scale2 = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale1 + self.drop_path(self.op(self.norm1(x)))
        return self.conv_blk(self.norm2(x).movedim(-1, 1)).movedim(1, -1) + x * self.scale2

    def compute_conv_feature_map_size(self, tokens: int) -> int:
        """Elements that convolutions, linear layers and scans write for one sample."""
        return self.op.compute_conv_feature_map_size(tokens) + self.conv_blk.compute_conv_feature_map_size(tokens)


class PatchExpand(nn.Module):
    """Double the map: linear layer without bias, space from channels, LayerNorm.

    The linear layer's channels are (row offset, column offset, channel), the channel fastest: not the order of
    PyTorch's pixel shuffle. Only axes whose factor is 2 grow.

    Shapes:
        (batch, spatial..., channels) to (batch, spatial * factor ..., out_channels).
    """

    def __init__(self, channels: int, out_channels: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = tuple(factors)
        self.expand = nn.Linear(channels, math.prod(self.factors) * out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, *size, _ = x.shape
        dims = len(size)
        x = self.expand(x).reshape(batch, *size, *self.factors, -1)
        interleaved = [axis for i in range(dims) for axis in (1 + i, 1 + dims + i)]
        x = x.permute(0, *interleaved, 1 + 2 * dims)
        return self.norm(x.reshape(batch, *(n * f for n, f in zip(size, self.factors, strict=True)), x.shape[-1]))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation of (batch, spatial..., channels) to ``size``, corners not aligned."""
    if tuple(x.shape[1:-1]) == tuple(size):
        return x
    mode = {2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(x.movedim(-1, 1), size=tuple(size), mode=mode, align_corners=False).movedim(1, -1)


def enlarge(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Linear interpolation of (batch, spatial..., channels) by whole factors per axis."""
    return resize(x, [n * f for n, f in zip(x.shape[1:-1], factors, strict=True)])


class UpSample(nn.Module):
    """Linear layer without bias, linear interpolation by ``factors``, LayerNorm.

    Shapes:
        (batch, spatial..., channels) to (batch, spatial * factor ..., out_channels).
    """

    def __init__(self, channels: int, out_channels: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = tuple(factors)
        self.linear = nn.Linear(channels, out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(enlarge(self.linear(x), self.factors))


class FinalUpSample(nn.Module):
    """From the first stage's map to the input's: twice a linear layer without bias and a doubling, then LayerNorm.

    Where the patch embedding is not 4 along an axis (3D plans), the first step takes the factor 2 if it is even, or
    else all of it, and the second what is left.

    Shapes:
        (batch, spatial..., channels) to (batch, spatial * embedding ..., channels).
    """

    def __init__(self, channels: int, embedding: Sequence[int]) -> None:
        super().__init__()
        self.first = tuple(2 if e % 2 == 0 else e for e in embedding)
        self.second = tuple(e // f for e, f in zip(embedding, self.first, strict=True))
        self.linear1 = nn.Linear(channels, channels, bias=False)
        self.linear2 = nn.Linear(channels, channels, bias=False)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = enlarge(self.linear1(x), self.first)
        return self.norm(enlarge(self.linear2(x), self.second))


class CVSSStage(nn.Module):
    """CVSS blocks and, but for the first stage, the up-sampling that leads to the next finer one."""

    def __init__(
        self,
        channels: int,
        conv_op: type[nn.Module],
        drop_path: Sequence[float],
        upsample: UpSample | None,
        scan_backend: str,
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(CVSSBlock(channels, conv_op, rate, scan_backend) for rate in drop_path))
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.upsample is None else self.upsample(x)


class CVSSDecoder(nn.Module):
    """CIPA's decoder: expansion of stage 4, then CVSS blocks at stages 3, 2 and 1, then four-fold up-sampling.

    Each stage adds the encoder's fused map to what comes from below (resized to it where an odd map was merged).
    There is one head, a 1 x 1 convolution without bias at full resolution: ``seg_layers[0]``. Deep supervision only
    decides whether its logits come out in a list of one. Module names are those of the released weights.

    Stochastic depth grows linearly from 0 over stages 1, 2, 3 and a fourth without blocks: stage 1, which runs last,
    has the smallest rates, and the last quarter of the rates is not used.

    Args:
        widths: channels of the four stages.
        depth: blocks of each stage.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        geometry: strides of embedding and mergings.
        num_classes: number of logits.
        deep_supervision: return a list.
        drop_path: the largest rate of stochastic depth.
        scan_backend: see :class:`SelectiveScanBlock`.

    Shapes:
        four maps (batch, map..., width), highest resolution first, to logits (batch, num_classes, spatial...) or a
        list of one, spatial = first map * embedding.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depth: int,
        conv_op: type[nn.Module],
        geometry: MapGeometry,
        num_classes: int,
        deep_supervision: bool,
        drop_path: float,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        spatial_dims(conv_op)
        self.deep_supervision = deep_supervision
        self.num_classes = num_classes
        blocks = len(widths) * depth
        rates = [drop_path * k / (blocks - 1) for k in range(blocks)]
        self.layers_up = nn.ModuleList([PatchExpand(widths[3], widths[2], geometry.merges[2])])
        for i in (2, 1, 0):
            upsample = UpSample(widths[i], widths[i - 1], geometry.merges[i - 1]) if i > 0 else None
            self.layers_up.append(
                CVSSStage(widths[i], conv_op, rates[i * depth : (i + 1) * depth], upsample, scan_backend)
            )
        self.norm_up = nn.LayerNorm(widths[0])
        self.up = FinalUpSample(widths[0], geometry.embedding)
        self.seg_layers = nn.ModuleList([conv_op(widths[0], num_classes, 1, bias=False)])

    def forward(self, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
        x = self.layers_up[0](maps[-1])
        for stage, skip in zip(self.layers_up[1:], reversed(maps[:-1]), strict=True):
            x = stage(resize(x, skip.shape[1:-1]) + skip)
        logits = self.seg_layers[0](self.up(self.norm_up(x)).movedim(-1, 1))
        return [logits] if self.deep_supervision else logits

    def compute_conv_feature_map_size(self, maps: Sequence[Sequence[int]]) -> int:
        """Elements that convolutions, linear layers and scans write for one sample with these stages' maps."""
        tokens = [math.prod(m) for m in maps]
        total = tokens[3] * self.layers_up[0].expand.out_features
        for i, stage in zip((2, 1, 0), self.layers_up[1:], strict=True):
            total += sum(block.compute_conv_feature_map_size(tokens[i]) for block in stage.blocks)
            if stage.upsample is not None:
                total += tokens[i] * stage.upsample.linear.out_features
        middle = tokens[0] * math.prod(self.up.first)
        total += (tokens[0] + middle) * self.up.linear1.out_features
        return total + middle * math.prod(self.up.second) * self.num_classes
