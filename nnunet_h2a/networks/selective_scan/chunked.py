"""The selective scan in plain PyTorch, tile by tile: fast on a CPU, exact anywhere, and sparing with memory.

Autograd never sees a step. Forward keeps the state at the beginning of every chunk of :data:`CHUNK` steps; backward
computes the states of a chunk again from there and walks it from its end. A tile is one chunk of some samples and
channels, small enough for its (steps, N, channels) arrays to stay in the processor's cache. Memory is thus the inputs,
their gradients and batch d N L / CHUNK numbers of state; an array of batch d N L is never made.

Both directions are registered operators, so that ``torch.compile(fullgraph=True)`` takes them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Steps between two states that forward keeps.
CHUNK = 64

#: Numbers in one (steps, N, channels) array of a tile: some megabytes on a CPU, where several of them must fit the
#: cache together; a GPU wants long arrays, because each operation costs a launch.
TILE_NUMBERS = {"cpu": 2**19, "cuda": 2**25}


def chunked_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """The backend ``chunked``; arguments and result as in :func:`nnunet_h2a.networks.selective_scan.selective_scan`."""
    inputs = (u, delta, A, B, C, D, delta_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return torch.ops.nnunet_h2a.selective_scan_chunked(*inputs, delta_softplus, keep)[0]


@dataclass(frozen=True)
class _Tile:
    """Some samples, and of every group some channels."""

    samples: slice
    channels: slice


class _Scan:
    """The inputs as (batch, G, channels of a group, L), and what of them a tile needs.

    Arrays of a tile are (steps, samples, G, N, channels), channels fastest, so that B and C, which all channels of a
    group share, multiply whole rows and are summed over by matrix products.
    """

    def __init__(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor | None, softplus: bool
    ) -> None:
        self.kind = torch.float64 if u.dtype == torch.float64 else torch.float32
        self.groups, self.n = B.shape[1], A.shape[1]
        self.batch, self.length = u.shape[0], u.shape[2]
        self.width = u.shape[1] // self.groups
        self.u, self.delta = self.grouped(u), self.grouped(delta)
        # exp2 is the faster function: exp(delta A) = exp2(delta A / ln 2).
        self.rates = A.to(self.kind).view(self.groups, self.width, self.n).transpose(1, 2)
        self.binary_rates = self.rates / math.log(2)
        # (L, batch, G, 1, N)
        self.B, self.C = (m.to(self.kind).permute(3, 0, 1, 2).unsqueeze(3) for m in (B, C))
        self.bias = None if bias is None else bias.to(self.kind).view(self.groups, 1, self.width)
        self.softplus = softplus
        self.chunks = -(-self.length // CHUNK)
        self.buffers: dict[str, Tensor] = {}

    def grouped(self, x: Tensor) -> Tensor:
        """(batch, d, L) as (L, batch, G, 1, channels), a view."""
        return x.unflatten(1, (self.groups, self.width)).permute(3, 0, 1, 2).unsqueeze(3)

    def tiles(self) -> Iterator[_Tile]:
        """All tiles of one chunk."""
        room = max(TILE_NUMBERS.get(self.u.device.type, 2**25) // (min(CHUNK, self.length) * self.n * self.groups), 1)
        # Channels in whole vector registers; samples together only where all channels of a sample leave room.
        channels = self.width if room >= self.width else max(room // 16 * 16, 16)
        samples = max(room // self.width, 1)
        for first in range(0, self.batch, samples):
            for channel in range(0, self.width, channels):
                yield _Tile(slice(first, first + samples), slice(channel, channel + channels))

    def steps(self, chunk: int) -> slice:
        """Steps of a chunk."""
        return slice(chunk * CHUNK, min((chunk + 1) * CHUNK, self.length))

    def take(self, x: Tensor, tile: _Tile, steps: slice) -> Tensor:
        """A tile of u or delta: (steps, samples, G, 1, channels), contiguous, in the state's type."""
        return x[steps, tile.samples, :, :, tile.channels].contiguous().to(self.kind)

    def step_sizes(self, tile: _Tile, steps: slice) -> tuple[Tensor, Tensor]:
        """delta before and after bias and softplus."""
        raw = self.take(self.delta, tile, steps)
        if self.bias is not None:
            raw = raw + self.bias[:, :, tile.channels]
        return raw, F.softplus(raw) if self.softplus else raw

    def buffer(self, name: str, x: Tensor) -> Tensor:
        """An array (steps, samples, G, N, channels) for the tile that ``x`` belongs to, the same memory every time.

        Fresh memory for every tile would cost more than the arithmetic: the system has to clear each page.
        """
        shape = (*x.shape[:3], self.n, x.shape[4])
        if name not in self.buffers or self.buffers[name].numel() < math.prod(shape):
            self.buffers[name] = x.new_empty(math.prod(shape))
        return self.buffers[name][: math.prod(shape)].view(shape)

    def states(self, tile: _Tile, steps: slice, size: Tensor, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Decay exp(delta A) and state of every step of a tile, from the state before it."""
        decay = torch.mul(size, self.binary_rates[:, :, tile.channels], out=self.buffer("decay", x)).exp2_()
        state = torch.mul(size * x, self.B[steps, tile.samples].transpose(3, 4), out=self.buffer("state", x))
        before = first
        for a, h in zip(decay.unbind(0), state.unbind(0), strict=True):
            before = h.addcmul_(a, before)
        return decay, state


def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scan = _Scan(u, delta, A, B, C, delta_bias, delta_softplus)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    grouped_y = scan.grouped(y)
    kept = u.new_empty(_kept_shape(scan) if keep else (0,), dtype=scan.kind)
    weights = None if D is None else D.to(scan.kind).view(scan.groups, 1, scan.width)
    for tile in scan.tiles():
        state = None
        for chunk in range(scan.chunks):
            steps = scan.steps(chunk)
            x = scan.take(scan.u, tile, steps)
            _, size = scan.step_sizes(tile, steps)
            if state is None:
                state = x.new_zeros(*x.shape[1:3], scan.n, x.shape[4])
            if keep:
                kept[chunk, tile.samples, :, :, tile.channels] = state
            _, states = scan.states(tile, steps, size, x, state)
            state = states[-1].clone()
            out = scan.C[steps, tile.samples] @ states
            if weights is not None:
                out.addcmul_(weights[:, :, tile.channels], x)
            grouped_y[steps, tile.samples, :, :, tile.channels] = out.to(u.dtype)
    return y, kept


def _kept_shape(scan: _Scan) -> tuple[int, ...]:
    return (scan.chunks, scan.batch, scan.groups, scan.n, scan.width)


def _backward(
    dy: Tensor, kept: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D and delta_bias; the last two are empty where there is none.

    With g_t the gradient of h_t: g_t = C_t dy_t + a_{t+1} g_{t+1}, a = exp(delta A). Then dC_t = dy_t h_t,
    dB_t = g_t delta_t u_t, d(delta_t u_t) = g_t B_t, and with m_t = g_t a_t h_{t-1}: d(delta_t) = m_t A and
    dA = m_t delta_t.
    """
    scan = _Scan(u, delta, A, B, C, delta_bias, delta_softplus)
    grouped_dy = scan.grouped(dy)
    du, ddelta = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta))
    grouped_du, grouped_ddelta = scan.grouped(du), scan.grouped(ddelta)
    dB, dC = (u.new_zeros(scan.length, scan.batch, scan.groups, scan.n, 1, dtype=scan.kind) for _ in range(2))
    dA = torch.zeros(scan.groups, scan.n, scan.width, dtype=scan.kind, device=u.device)
    dbias, dD = (torch.zeros(scan.groups, 1, scan.width, dtype=scan.kind, device=u.device) for _ in range(2))
    weights = None if D is None else D.to(scan.kind).view(scan.groups, 1, scan.width)
    for tile in scan.tiles():
        rates = scan.rates[:, :, tile.channels]
        after = None
        for chunk in reversed(range(scan.chunks)):
            steps = scan.steps(chunk)
            x, gradient = scan.take(scan.u, tile, steps), scan.take(grouped_dy, tile, steps)
            raw, size = scan.step_sizes(tile, steps)
            first = kept[chunk, tile.samples, :, :, tile.channels]
            decay, states = scan.states(tile, steps, size, x, first)
            dC[steps, tile.samples] += states @ gradient.transpose(3, 4)
            adjoint = torch.mul(gradient, scan.C[steps, tile.samples].transpose(3, 4), out=scan.buffer("adjoint", x))
            if after is not None:
                adjoint[-1] += after
            decays, adjoints = decay.unbind(0), adjoint.unbind(0)
            for t in range(len(adjoints) - 2, -1, -1):
                adjoints[t].addcmul_(decays[t + 1], adjoints[t + 1])
            after = decays[0] * adjoints[0]
            dB[steps, tile.samples] += adjoint @ (size * x).transpose(3, 4)
            product = scan.B[steps, tile.samples] @ adjoint
            # m_t in the place of the adjoint: g_t a_t h_{t-1}.
            adjoint.mul_(decay)
            adjoint[0].mul_(first)
            adjoint[1:].mul_(states[:-1])
            torch.mul(adjoint, size, out=states)
            dA[:, :, tile.channels] += states.sum((0, 1))
            dsize = adjoint.mul_(rates).sum(3, keepdim=True).addcmul_(product, x)
            if scan.softplus:
                dsize.mul_(torch.sigmoid(raw))
            dx = product.mul_(size)
            if weights is not None:
                dx.addcmul_(weights[:, :, tile.channels], gradient)
                dD[:, :, tile.channels] += (gradient * x).sum((0, 1))
            if scan.bias is not None:
                dbias[:, :, tile.channels] += dsize.sum((0, 1))
            grouped_du[steps, tile.samples, :, :, tile.channels] = dx.to(u.dtype)
            grouped_ddelta[steps, tile.samples, :, :, tile.channels] = dsize.to(delta.dtype)

    def matrices(gradient: Tensor, like: Tensor) -> Tensor:
        return gradient[..., 0].permute(1, 2, 3, 0).to(like.dtype).contiguous()

    def vector(gradient: Tensor, like: Tensor | None) -> Tensor:
        return u.new_empty(0) if like is None else gradient.flatten().to(like.dtype)

    # Contiguous, as promised to the compiler: with one group the reshape alone would be a view with swapped strides.
    dA = dA.transpose(1, 2).reshape(A.shape).to(A.dtype).contiguous()
    return du, ddelta, dA, matrices(dB, B), matrices(dC, C), vector(dD, D), vector(dbias, delta_bias)


@torch.library.custom_op("nnunet_h2a::selective_scan_chunked", mutates_args=())
def _operator(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(u, delta, A, B, C, D, delta_bias, delta_softplus, keep)


@_operator.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, keep):
    kind = torch.float64 if u.dtype == torch.float64 else torch.float32
    chunks = (u.shape[2] + CHUNK - 1) // CHUNK
    shape = (chunks, u.shape[0], B.shape[1], A.shape[1], u.shape[1] // B.shape[1]) if keep else (0,)
    return torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(shape, dtype=kind)


@torch.library.custom_op("nnunet_h2a::selective_scan_chunked_backward", mutates_args=())
def _backward_operator(
    dy: Tensor, kept: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(dy, kept, u, delta, A, B, C, D, delta_bias, delta_softplus)


@_backward_operator.register_fake
def _(dy, kept, u, delta, A, B, C, D, delta_bias, delta_softplus):
    like = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta, A, B, C)]
    return (*like, *(u.new_empty(0) if t is None else torch.empty_like(t) for t in (D, delta_bias)))


def _setup(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(output[1], *tensors)


def _gradients(ctx, dy, _):
    kept, *tensors = ctx.saved_tensors
    gradients = torch.ops.nnunet_h2a.selective_scan_chunked_backward(dy, kept, *tensors, ctx.delta_softplus)
    given = [g if t is not None else None for g, t in zip(gradients, tensors, strict=True)]
    return (*given, None, None)


_operator.register_autograd(_gradients, setup_context=_setup)
