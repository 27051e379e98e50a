"""ISA-Net's attention: a weight for every channel, then a weight for every position of every channel's map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_h2a.networks.conv_norm_relu import conv_norm_relu
from nnunet_h2a.networks.precision import wide, without_autocast


def widen_kernel(kernel_size: Sequence[int]) -> tuple[int, ...]:
    """The kernel of the key branch: two more along each axis where the plan's kernel is more than 1.

    5x5x5 for the paper's 3x3x3; (1, 5, 5) for (1, 3, 3), because a plan says 1 where the voxels are too far apart to
    be convolved.
    """
    return tuple(k + 2 if k > 1 else 1 for k in kernel_size)


def weight_map(query: Tensor, key: Tensor) -> Tensor:
    """W of equations 5 to 8: U = X_q . X_k over the last two axes, then softmax over all positions of each map.

    (…, y, z) . (…, z, z') needs y = z. Where a map's last two axes differ, X_k's y axis is resampled to z linearly
    (corners not aligned), so that U keeps the shape of X_q.

    Args:
        query: X_q, (batch, channels, spatial...).
        key: X_k, of the same shape.

    Returns:
        W, of the same shape; the positions of each map sum to 1.
    """
    rows, columns = key.shape[-2:]
    if rows != columns:
        planes = key.flatten(1, -3)
        square = F.interpolate(planes, size=(columns, columns), mode="bilinear", align_corners=False)
        key = square.unflatten(1, key.shape[1:-2])
    scores = torch.matmul(query, key)
    return torch.softmax(scores.flatten(2), dim=-1).reshape(query.shape)


class ISA(nn.Module):
    """Improved spatial attention module of one level.

    Huang et al., "ISA-Net", Comput. Methods Programs Biomed. 226:107129, 2022 (arXiv 2211.02256), section 2,
    equations 2 to 8. For a map X of C channels:

        M = sigmoid(FC2(ReLU(FC1(mean over the map of X)))),  X_c = M * X            (2, 3; 2C and C units)
        X_q, X_k, X_v = ReLU(InstanceNorm(conv X_c)), kernels 3x3x3, 5x5x5, 1x1x1    (4)
        U = X_q . X_k, the matrix product of each map's last two axes                (5)
        W = softmax of U over all positions of a map                                 (6 to 8)
        output = 1x1x1 convolution of concat(W * X_v, X) to C channels

    The output has no equation: it is the released code's, X is the module's input before the channel weights, and
    neither norm nor activation follows ("ReLU for all convolutions" in the paper would cover it).

    The mean of W is 1 / number of positions, 3e-7 for 144^3: where the softmax spreads, W * X_v is tiny beside X.
    U has no 1 / sqrt(z) either, so that the softmax is often peaked: then W * X_v is a few isolated voxels of a map,
    and a channel whose peak falls where X_v is 0 gives its queries and keys no gradient. The paper has no factor
    against either, so there is none here. fp16 would round most of a spread W * X_v to 0; therefore matrix product,
    softmax, W * X_v and its half of the output convolution are float32 under autocast (float64 for float64 maps),
    and the two halves of that convolution are computed apart and added.

    Nothing of the attention is kept for the backward pass but X_q, X_k and X_v, which their ReLUs keep anyway: U and
    W are computed a second time. The module so keeps eight maps of the size of X, its input included, all of the
    type in which its convolutions and norms run.

    Differs from the paper: sizes follow the plan. 3x3x3 is the plan's kernel, 5x5x5 is :func:`widen_kernel` of it;
    planes that are not square see :func:`weight_map`. In 2D the map itself is the plane. Differs from the released
    code, which takes the channel weights out of the graph (``tolist``), so that FC1 and FC2 never learn.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        channels: C.
        kernel_size: of the query branch, per axis, odd.

    Shapes:
        input and output (batch, C, spatial...).
    """

    def __init__(self, conv_op: type[nn.Module], channels: int, kernel_size: Sequence[int]) -> None:
        super().__init__()
        self.channels = channels
        self.fc1 = nn.Linear(channels, 2 * channels)
        self.fc2 = nn.Linear(2 * channels, channels)
        self.query = conv_norm_relu(conv_op, channels, channels, kernel_size)
        self.key = conv_norm_relu(conv_op, channels, channels, widen_kernel(kernel_size))
        self.value = conv_norm_relu(conv_op, channels, channels, (1,) * len(kernel_size))
        self.fuse = conv_op(2 * channels, channels, 1, bias=True)

    def channel_weights(self, x: Tensor) -> Tensor:
        """M of equation 2, (batch, C), in (0, 1); at least float32 up to the weights' own type."""
        with without_autocast(x):
            mean = x.mean(tuple(range(2, x.dim())), dtype=wide(x[:0]).dtype).to(self.fc1.weight.dtype)
            return torch.sigmoid(self.fc2(F.relu(self.fc1(mean))))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.channel_weights(x).to(x.dtype)
        scaled = weights.reshape(*weights.shape, *[1] * (x.dim() - 2)) * x
        attention_kernel, input_kernel = self.fuse.weight.chunk(2, dim=1)
        arguments = (self.query(scaled), self.key(scaled), self.value(scaled), attention_kernel)
        if torch.is_grad_enabled():
            attended = checkpoint(_attend_and_project, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            attended = _attend_and_project(*arguments)
        projected = _convolve(x, input_kernel, self.fuse.bias)
        return projected + attended.to(projected.dtype)

    def compute_conv_feature_map_size(self, map_size: Sequence[int]) -> int:
        """Elements that three branches, matrix product and both halves of the output convolution write per sample."""
        return (3 + 1 + 2) * self.channels * math.prod(map_size)


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    return {4: F.conv2d, 5: F.conv3d}[x.dim()](x, kernel, bias)


def _attend_and_project(query: Tensor, key: Tensor, value: Tensor, kernel: Tensor) -> Tensor:
    """The output convolution's half for W * X_v, float32 or float64."""
    with without_autocast(query):
        return _convolve(weight_map(wide(query), wide(key)) * wide(value), wide(kernel))
