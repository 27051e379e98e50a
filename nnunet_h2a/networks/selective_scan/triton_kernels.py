"""The selective scan's Triton kernels and their launches; imports Triton, so import it only where it is wanted.

The steps of a sequence are cut into chunks of T. A program holds one (N, T) tile: one channel's N states over one
chunk. In it the recurrence h_t = a_t h_{t-1} + x_t, with a_t = exp(delta_t A) and x_t = delta_t B_t u_t, is an
associative scan of the pairs (a_t, x_t) along T, so nothing is divided and no step waits for memory; the state that
enters the chunk is added with the decay since then. The adjoint g_t = C_t dy_t + a_{t+1} g_{t+1} is the same scan
backwards.

* ``_forward_kernel``, a program per sample and channel, walks the chunks, writes y and the state at each chunk's start.
* ``_adjoint_kernel``, likewise but from the last chunk to the first, writes what later chunks want of each chunk's
  last state: the adjoint at every chunk's end.
* ``_gradient_kernel``, a program per sample, group, chunk and ``SLICE`` channels of the group, knows the states on
  both sides of its chunk, recomputes h and g inside it channel by channel, and sums dB and dC over its channels in
  registers.

The backward pass keeps states in registers instead of a scratch buffer because a Triton program that writes global
memory and reads it back has a race unless it adds barriers of its own: a tile may be spread over the threads
differently when it is read. dB, dC, dA, dD and the bias's gradient leave as partial sums that PyTorch adds up, not as
atomic additions, so a run repeats bit for bit; of dB and dC there are ceil(d / G / SLICE) each, N / SLICE as large as u
in float32, of the others one per sample and chunk.

Every program works on whole rows of contiguous tensors. N is padded to a power of two with states that stay 0, the
last chunk with steps of length 0, which leave a state as it is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Channels whose share of dB and dC one program sums.
SLICE = 64

#: Terms of artanh's series: its remainder at 1/3 is below float64's last digit.
SERIES = tl.constexpr(17)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to full relative precision for every x, with nothing that overflows.

    It is max(x, 0) + log(1 + e) with e = exp(-|x|) in (0, 1]. A device's fast log loses small e, so log(1 + e) is
    2 artanh(s) with s = e / (2 + e) <= 1/3, whose series needs sums and products only.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    square = s * s
    series = square * 0.0
    for k in tl.static_range(SERIES):
        series = series * square + 1.0 / (2 * SERIES - 1 - 2 * k)
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def _sigmoid(x):
    """softplus's derivative."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _compose(decay, value, later_decay, later_value):
    """Two pieces of the recurrence h -> decay h + value, one after the other."""
    return decay * later_decay, later_decay * value + later_value


@triton.jit
def _load(pointers, mask, KIND: tl.constexpr):
    return tl.load(pointers, mask=mask, other=0.0).to(KIND)


@triton.jit
def _scalar(pointer, index, KIND: tl.constexpr):
    """A channel's entry of D or of the bias; 0 where there is none."""
    value = tl.zeros((), KIND)
    if pointer is not None:
        value = tl.load(pointer + index).to(KIND)
    return value


@triton.jit
def _step(raw, inside, SOFTPLUS: tl.constexpr):
    """Step lengths; 0 outside the sequence."""
    step = raw
    if SOFTPLUS:
        step = _softplus(raw)
    return tl.where(inside, step, 0.0)


@triton.jit
def _forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, y_ptr, starts_ptr,
    channels, groups, length,
    N: tl.constexpr, STATES: tl.constexpr, T: tl.constexpr, SOFTPLUS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = row % channels
    # The row of B and C: sample * groups + the channel's group.
    pair = row // channels * groups + channel // (channels // groups)
    n = tl.arange(0, STATES)
    column = tl.arange(0, T)
    matrix_rows = (pair * N + n) * length
    rates = _load(A_ptr + channel * N + n, n < N, KIND)
    weight = _scalar(D_ptr, channel, KIND)
    bias = _scalar(bias_ptr, channel, KIND)
    chunks = tl.cdiv(length, T)
    state = tl.zeros((STATES,), KIND)
    for chunk in range(0, chunks):
        tl.store(starts_ptr + (row * chunks + chunk) * N + n, state, mask=n < N)
        t = chunk * T + column
        inside = t < length
        tile = matrix_rows[:, None] + t[None, :]
        in_tile = (n < N)[:, None] & inside[None, :]
        step = _step(_load(delta_ptr + row * length + t, inside, KIND) + bias, inside, SOFTPLUS)
        u = _load(u_ptr + row * length + t, inside, KIND)
        decay = tl.exp(rates[:, None] * step[None, :])
        value = _load(B_ptr + tile, in_tile, KIND) * (step * u)[None, :]
        decay, value = tl.associative_scan((decay, value), 1, _compose)
        states = value + decay * state[:, None]
        y = tl.sum(states * _load(C_ptr + tile, in_tile, KIND), 0) + weight * u
        tl.store(y_ptr + row * length + t, y, mask=inside)
        state = tl.sum(tl.where((column == T - 1)[None, :], states, 0.0), 1)


@triton.jit
def _adjoint_kernel(
    delta_ptr, A_ptr, C_ptr, bias_ptr, dy_ptr, ends_ptr,
    channels, groups, length,
    N: tl.constexpr, STATES: tl.constexpr, T: tl.constexpr, SOFTPLUS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = row % channels
    pair = row // channels * groups + channel // (channels // groups)
    n = tl.arange(0, STATES)
    column = tl.arange(0, T)
    matrix_rows = (pair * N + n) * length
    rates = _load(A_ptr + channel * N + n, n < N, KIND)
    bias = _scalar(bias_ptr, channel, KIND)
    chunks = tl.cdiv(length, T)
    adjoint = tl.zeros((STATES,), KIND)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        tl.store(ends_ptr + (row * chunks + chunk) * N + n, adjoint, mask=n < N)
        t = chunk * T + column
        inside = t < length
        step = _step(_load(delta_ptr + row * length + t, inside, KIND) + bias, inside, SOFTPLUS)
        dy = _load(dy_ptr + row * length + t, inside, KIND)
        c = _load(C_ptr + matrix_rows[:, None] + t[None, :], (n < N)[:, None] & inside[None, :], KIND)
        # The entering state reaches step t with the decay of all steps up to t.
        decay = tl.exp(rates[:, None] * tl.cumsum(step, 0)[None, :])
        adjoint = tl.sum(c * dy[None, :] * decay, 1) + tl.exp(rates * tl.sum(step, 0)) * adjoint


@triton.jit
def _gradient_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, dy_ptr, starts_ptr, ends_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr,
    pairs, channels, groups, length, slices,
    N: tl.constexpr, STATES: tl.constexpr, T: tl.constexpr, SLICE: tl.constexpr,
    SOFTPLUS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(length, T)
    program = tl.program_id(0).to(tl.int64)
    chunk = program % chunks
    part = program // chunks % slices
    pair = program // chunks // slices
    width = channels // groups
    n = tl.arange(0, STATES)
    column = tl.arange(0, T)
    t = chunk * T + column
    inside = t < length
    # Steps before and after, both inside the chunk: the scans need a_t shifted by one, with nothing at the border.
    has_before = inside & (column > 0)
    has_after = (t + 1 < length) & (column < T - 1)
    tile = ((pair * N + n) * length)[:, None] + t[None, :]
    in_tile = (n < N)[:, None] & inside[None, :]
    b = _load(B_ptr + tile, in_tile, KIND)
    c = _load(C_ptr + tile, in_tile, KIND)
    b_before = _load(B_ptr + tile - 1, (n < N)[:, None] & has_before[None, :], KIND)
    db = tl.zeros((STATES, T), KIND)
    dc = tl.zeros((STATES, T), KIND)
    for member in range(part * SLICE, tl.minimum(part * SLICE + SLICE, width)):
        channel = pair % groups * width + member
        row = pair // groups * channels + channel
        here = row * length + t
        of_chunk = row * chunks + chunk
        rates = _load(A_ptr + channel * N + n, n < N, KIND)[:, None]
        weight = _scalar(D_ptr, channel, KIND)
        bias = _scalar(bias_ptr, channel, KIND)
        u = _load(u_ptr + here, inside, KIND)
        dy = _load(dy_ptr + here, inside, KIND)
        raw = _load(delta_ptr + here, inside, KIND) + bias
        step = _step(raw, inside, SOFTPLUS)
        step_before = _step(_load(delta_ptr + here - 1, has_before, KIND) + bias, has_before, SOFTPLUS)
        step_after = _step(_load(delta_ptr + here + 1, has_after, KIND) + bias, has_after, SOFTPLUS)

        u_before = _load(u_ptr + here - 1, has_before, KIND)
        decay, value = tl.associative_scan(
            (tl.exp(rates * step_before[None, :]), b_before * (step_before * u_before)[None, :]), 1, _compose
        )
        start = _load(starts_ptr + of_chunk * N + n, n < N, KIND)
        before = value + decay * start[:, None]
        # The decayed state by itself, not state - input: after a long step little is left of it, and the difference
        # would be rounding alone.
        carried = tl.exp(rates * step[None, :]) * before
        state = carried + b * (step * u)[None, :]

        decay, value = tl.associative_scan(
            (tl.exp(rates * step_after[None, :]), c * dy[None, :]), 1, _compose, reverse=True
        )
        end = _load(ends_ptr + of_chunk * N + n, n < N, KIND)
        adjoint = value + decay * end[:, None]

        dc += state * dy[None, :]
        db += adjoint * (step * u)[None, :]
        through_b = tl.sum(adjoint * b, 0)
        through_decay = adjoint * carried
        tl.store(dA_ptr + of_chunk * N + n, tl.sum(through_decay * step[None, :], 1), mask=n < N)
        tl.store(du_ptr + here, through_b * step + weight * dy, mask=inside)
        ddelta = tl.sum(through_decay * rates, 0) + through_b * u
        if SOFTPLUS:
            ddelta *= _sigmoid(raw)
        tl.store(ddelta_ptr + here, ddelta, mask=inside)
        if D_ptr is not None:
            tl.store(dD_ptr + of_chunk, tl.sum(dy * u, 0))
        if bias_ptr is not None:
            # 0 beyond the sequence, where b, dy and the adjoint are.
            tl.store(dbias_ptr + of_chunk, tl.sum(ddelta, 0))
    partial = part * pairs * N * length + tile
    tl.store(dB_ptr + partial, db, mask=in_tile)
    tl.store(dC_ptr + partial, dc, mask=in_tile)


#: Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1 when this module was imported): on any device.
INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


def _constants(kind: torch.dtype, states: int, chunk: int, softplus: bool) -> dict:
    """The compile-time arguments that all kernels share, and how many warps share a tile."""
    padded = triton.next_power_of_2(states)
    return {
        "N": states,
        "STATES": padded,
        "T": chunk,
        "SOFTPLUS": softplus,
        "KIND": tl.float64 if kind == torch.float64 else tl.float32,
        # Eight of a tile's elements to a thread: the gradients' kernel keeps about a dozen tiles in registers.
        "num_warps": max(1, min(padded * chunk // 256, 8)),
    }


def _on(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _small(kind: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Parameters in the state's type."""
    return [None if tensor is None else tensor.to(kind).contiguous() for tensor in tensors]


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
    softplus: bool, chunk: int, kind: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scan and what its backward pass keeps.

    Args:
        u: (batch, d, L); ``delta``, ``A``, ``B``, ``C``, ``D`` and ``bias`` as in ``selective_scan``.
        chunk: steps per tile, a power of two.
        kind: the state's type, float32 or float64.

    Returns:
        y, (batch, d, L) in u's type, and the states at the chunks' starts, (batch, d, chunks, N) in ``kind``.
    """
    batch, channels, length = u.shape
    states = A.shape[1]
    u, delta, B, C = (x.contiguous() for x in (u, delta, B, C))
    A, D, bias = _small(kind, A, D, bias)
    y = torch.empty_like(u)
    starts = u.new_empty((batch, channels, triton.cdiv(length, chunk), states), dtype=kind)
    with _on(u):
        _forward_kernel[(batch * channels,)](
            u, delta, A, B, C, D, bias, y, starts, channels, B.shape[1], length,
            **_constants(kind, states, chunk, softplus),
        )  # fmt: skip
    return y, starts


def backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
    softplus: bool, chunk: int, kind: torch.dtype, starts: Tensor,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of u, delta, A, B, C, D and the bias, each in its tensor's type; None for D or bias None.

    Args:
        dy: the result's gradient, (batch, d, L).
        starts: what :func:`forward` returned for the same arguments.
    """
    batch, channels, length = u.shape
    groups, states = B.shape[1:3]
    chunks = starts.shape[2]
    slices = triton.cdiv(channels // groups, SLICE)
    kinds = [None if x is None else x.dtype for x in (A, B, C, D, bias)]
    dy, u, delta, B, C = (x.contiguous() for x in (dy, u, delta, B, C))
    A, D, bias = _small(kind, A, D, bias)
    ends, dA = torch.empty_like(starts), torch.empty_like(starts)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dB, dC = (u.new_empty((slices, *B.shape), dtype=kind) for _ in range(2))
    dD, dbias = (None if x is None else u.new_empty((batch, channels, chunks), dtype=kind) for x in (D, bias))
    constants = _constants(kind, states, chunk, softplus)
    with _on(u):
        _adjoint_kernel[(batch * channels,)](delta, A, C, bias, dy, ends, channels, groups, length, **constants)
        _gradient_kernel[(batch * groups * slices * chunks,)](
            u, delta, A, B, C, D, bias, dy, starts, ends, du, ddelta, dA, dB, dC, dD, dbias,
            batch * groups, channels, groups, length, slices, SLICE=SLICE, **constants,
        )  # fmt: skip
    sums = [dA.sum((0, 2)), dB.sum(0), dC.sum(0), *(None if x is None else x.sum((0, 2)) for x in (dD, dbias))]
    return [du, ddelta, *(None if x is None else x.to(k) for x, k in zip(sums, kinds, strict=True))]
