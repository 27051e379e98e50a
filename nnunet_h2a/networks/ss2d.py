"""Selective scans of a map in several directions (SS2D, any number of axes) and along a row of tokens (SS1D)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_h2a.networks.plan_geometry import spatial_dims
from nnunet_h2a.networks.precision import wide, without_autocast
from nnunet_h2a.networks.selective_scan import selective_scan

#: Range in which the step sizes (delta) start, log-uniformly, as in Mamba.
STEP_RANGE = (1e-3, 1e-1)


def axis_orders(dims: int) -> tuple[tuple[int, ...], ...]:
    """The axis orders in which a map is read, slowest axis first.

    Order k is the natural order rotated to the right by k: 0 ends with the last axis (row-major), 1 with the last
    but one, ..., dims - 1 with the first. In 2D (H, W): row-major, then (W, H), column-major; in 3D (D, H, W):
    (D, H, W), (W, D, H), (H, W, D).
    """
    natural = tuple(range(dims))
    return tuple(natural[dims - k :] + natural[: dims - k] for k in range(dims))


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """``conv(x)`` of a map whose channels lie last in memory; on a CPU in the weights' own type despite autocast.

    Of small maps, 3D ones above all, PyTorch's CPU build computes a bfloat16 convolution's weight gradient from memory
    that it has not written (seen with PyTorch 2.15): now and then it is NaN. On other devices PyTorch's own depth-wise
    kernels take maps whose channels come first; others it would leave to a general grouped convolution.
    """
    if x.device.type != "cpu":
        return conv(x.contiguous() if conv.groups > 1 else x)
    with without_autocast(x):
        return conv(x.to(conv.weight.dtype))


class SelectiveScanBlock(nn.Module):
    """Mamba's block around selective scans in one or more directions; :class:`SS2D` and :class:`SS1D` are its forms.

    Linear to 4C without bias, first half u, second half the gate z; on u the convolution, if there is one, and SiLU;
    the scans, whose results are put back to their tokens and summed; LayerNorm(2C); times SiLU(z); linear to C
    without bias.

    A direction k has rows ``x_proj_weight[k]`` that map a token's u to R values for delta, then N for B, then N for
    C; ``dt_projs_weight[k]`` maps the R values to delta, one per channel; ``dt_projs_bias[k]`` enters only inside
    the softplus. B and C serve all channels of their direction. ``A_logs`` and ``Ds`` hold one direction after the
    other (direction-major).

    From the inputs of the scans to their results everything is float32 whatever autocast says, projections
    included. Initialised as Mamba is: A = -(1 ... N), D = 1, softplus(bias) log-uniform in 1e-3 to 1e-1, delta's
    weights uniform in ± R^-0.5.

    Args:
        channels: C.
        orders: axis orders as :func:`axis_orders` gives them.
        both_ways: scan each order from its end as well: directions n to 2n - 1 are 0 to n - 1 reversed.
        conv: what u passes before SiLU, (batch, 2C, spatial...) to the same shape; None for nothing.
        state_size: N.
        scan_backend: as :func:`nnunet_h2a.networks.selective_scan.selective_scan` takes it.

    Shapes:
        (batch, spatial..., C) to the same shape.
    """

    def __init__(
        self,
        channels: int,
        orders: Sequence[Sequence[int]],
        both_ways: bool,
        conv: nn.Module | None,
        state_size: int,
        scan_backend: str,
    ) -> None:
        super().__init__()
        inner, rank = 2 * channels, math.ceil(channels / 16)
        self.channels, self.inner = channels, inner
        self.orders = [tuple(order) for order in orders]
        self.both_ways = both_ways
        self.directions = directions = len(self.orders) * (2 if both_ways else 1)
        self.rows = (rank, state_size, state_size)
        self.scan_backend = scan_backend

        self.x_proj_weight = nn.Parameter(torch.empty(directions, sum(self.rows), inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(directions, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(directions, inner))
        self.A_logs = nn.Parameter(torch.empty(directions * inner, state_size))
        self.Ds = nn.Parameter(torch.empty(directions * inner))
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv = conv
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self._initialise_scan()

    @torch.no_grad()
    def _initialise_scan(self) -> None:
        nn.init.uniform_(self.x_proj_weight, -(self.inner**-0.5), self.inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(self.rows[0] ** -0.5), self.rows[0] ** -0.5)
        low, high = (math.log(step) for step in STEP_RANGE)
        step = torch.exp(torch.rand_like(self.dt_projs_bias) * (high - low) + low)
        self.dt_projs_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.A_logs.copy_(torch.log(torch.arange(1, self.rows[1] + 1)).expand_as(self.A_logs))
        nn.init.ones_(self.Ds)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u = u.movedim(-1, 1)
        u = F.silu(u if self.conv is None else convolve(self.conv, u))
        with without_autocast(u):
            y = self._scan(wide(u))
        y = self.out_norm(y.to(self.out_norm.weight.dtype))
        return self.out_proj(y * F.silu(gate))

    def _scan(self, u: Tensor) -> Tensor:
        """All directions' scans of u (batch, inner, spatial...), summed: (batch, spatial..., inner)."""
        _, inner, *size = u.shape
        # A token's projections do not depend on its place in the sequence: they are taken once, then put in order.
        projected = F.linear(u.movedim(1, -1), wide(self.x_proj_weight).flatten(0, 1))
        projected = projected.unflatten(-1, (self.directions, sum(self.rows))).movedim((-2, -1), (0, 2))
        low_rank, b, c = projected.split(self.rows, dim=2)  # each (directions, batch, rows, spatial...)
        # One matrix product per direction over the tokens of the whole batch, however many maps it holds.
        low_rank = torch.stack([self._sequence(m, k).transpose(0, 1) for k, m in enumerate(low_rank)])
        delta = torch.einsum("kdr,krbl->bkdl", wide(self.dt_projs_weight), low_rank)
        y = selective_scan(
            torch.cat([self._sequence(u, k) for k in range(self.directions)], dim=1),
            delta.flatten(1, 2),
            -torch.exp(wide(self.A_logs)),
            torch.stack([self._sequence(m, k) for k, m in enumerate(b)], dim=1),
            torch.stack([self._sequence(m, k) for k, m in enumerate(c)], dim=1),
            D=wide(self.Ds),
            delta_bias=wide(self.dt_projs_bias).flatten(),
            delta_softplus=True,
            backend=self.scan_backend,
        ).unflatten(1, (self.directions, inner))
        if self.both_ways:
            y = y[:, : len(self.orders)] + y[:, len(self.orders) :].flip(-1)
        maps = [self._map(part, order, size) for part, order in zip(y.unbind(1), self.orders, strict=True)]
        return reduce(torch.add, maps)

    def _sequence(self, x: Tensor, direction: int) -> Tensor:
        """A map (batch, rows, spatial...) as direction ``direction`` reads it: (batch, rows, tokens)."""
        order = self.orders[direction % len(self.orders)]
        sequence = x.permute(0, 1, *(2 + axis for axis in order)).flatten(2)
        return sequence.flip(-1) if direction >= len(self.orders) else sequence

    @staticmethod
    def _map(sequence: Tensor, order: Sequence[int], size: Sequence[int]) -> Tensor:
        """A sequence (batch, inner, tokens) in ``order`` back on its map: (batch, spatial..., inner)."""
        x = sequence.unflatten(-1, [size[axis] for axis in order])
        return x.permute(0, *(2 + order.index(axis) for axis in range(len(order))), 1)

    def compute_conv_feature_map_size(self, tokens: int) -> int:
        """Elements that linear layers, convolution and scans write for a map of ``tokens`` tokens."""
        convolved = 0 if self.conv is None else self.inner
        per_direction = sum(self.rows) + 2 * self.inner  # projections, delta and the scan's result
        return tokens * (2 * self.inner + convolved + self.directions * per_direction + self.channels)


class SS2D(SelectiveScanBlock):
    """VMamba's SS2D: selective scans of a map along each axis order, forwards and backwards.

    Liu et al., "VMamba: Visual State Space Model" (arXiv 2401.10166), as CIPA (Mei et al., CVPR 2025, section 3)
    uses it. In 2D four directions: 0 row-major (W fastest), 1 column-major (H fastest), 2 and 3 the reverses of 0
    and 1. u passes a depth-wise 3 x 3 convolution (bias, zero padding) before SiLU.

    In 3D, which the papers do not have, six directions: 0 row-major (last axis fastest), 1 with the last axis but one
    fastest, 2 with the first axis fastest (:func:`axis_orders`), 3 to 5 the reverses; the convolution is 3 x 3 x 3.

    Args:
        channels: C.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        state_size: N, 16 but for the decoder's 4.
        scan_backend: see :class:`SelectiveScanBlock`.

    Shapes:
        (batch, spatial..., C) to the same shape. Each map of the batch is scanned on its own.
    """

    def __init__(
        self, channels: int, conv_op: type[nn.Module], state_size: int = 16, scan_backend: str = "auto"
    ) -> None:
        inner = 2 * channels
        conv = conv_op(inner, inner, 3, padding=1, groups=inner)
        super().__init__(channels, axis_orders(spatial_dims(conv_op)), True, conv, state_size, scan_backend)


class SS1D(SelectiveScanBlock):
    """One forward scan along a row of tokens, without a convolution: the scan of CIPA's CRM.

    Mei et al., CVPR 2025 (arXiv 2503.17261), section 3.2.

    Args:
        channels: C.
        state_size: N.
        scan_backend: see :class:`SelectiveScanBlock`.

    Shapes:
        (batch, tokens, C) to the same shape.
    """

    def __init__(self, channels: int, state_size: int = 16, scan_backend: str = "auto") -> None:
        super().__init__(channels, [(0,)], False, None, state_size, scan_backend)
