"""The selective scan by Triton kernels (see ``triton_kernels``), as operators that autograd and torch.compile know."""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from torch import Tensor

from nnunet_h2a.networks.selective_scan.reference import reference_scan

logger = logging.getLogger(__name__)

#: Longest and shortest tile in steps, and the elements (padded states times steps) that a tile should have.
LONGEST, SHORTEST, ELEMENTS = 128, 16, 1024

#: How far the trial run on a device may be from the reference, relative to the largest value.
TRIAL_TOLERANCE = 1e-3

FORWARD = "nnunet_h2a::selective_scan_triton"
BACKWARD = "nnunet_h2a::selective_scan_triton_backward"


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """The selective scan on a GPU; arguments and result are those of ``selective_scan``.

    The backward pass recomputes the states: apart from its arguments it keeps those at the chunks' starts, ceil(L / T)
    per channel, T being :func:`chunk_length`. Equal inputs give equal bits. It cannot be differentiated twice.
    """
    chunk = chunk_length(u.shape[2], A.shape[1])
    y, _ = torch.ops.nnunet_h2a.selective_scan_triton(u, delta, A, B, C, D, delta_bias, delta_softplus, chunk)
    return y


def why_not(u: Tensor) -> str | None:
    """Why the kernels do not work for tensors like ``u``, and the cure; None if they do.

    The first call for a CUDA device compiles the kernels and compares a small scan and its gradients with the
    reference, so that a missing compiler, a GPU that Triton does not support or wrong numbers are found here and not
    in training. Later calls look the answer up. CPU tensors are for Triton's interpreter (TRITON_INTERPRET=1), where
    no trial run is made.
    """
    if u.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it takes floating-point tensors, not {u.dtype}; convert them"
    return _why_not(str(u.device), u.dtype == torch.float64)


@torch.compiler.assume_constant_result
def _why_not(device: str, double: bool) -> str | None:
    # torch.compile runs this function instead of tracing into it, and does not look into a cached one.
    return _why_not_once(device, double, os.environ.get("TRITON_INTERPRET", ""))


@cache
def _why_not_once(device: str, double: bool, interpreter: str) -> str | None:
    on_cuda = device.startswith("cuda")
    if not on_cuda and interpreter.lower() not in ("1", "true", "on", "yes", "y"):
        return f"it needs tensors on a CUDA device, not on {device}; move them or take the backend 'chunked'"
    try:
        # Triton is loaded here: it need not be installed, and a broken installation fails with any kind of error.
        from nnunet_h2a.networks.selective_scan import triton_kernels
    except Exception as error:
        return (
            f"Triton cannot be loaded ({_one_line(error)}); install the Triton that belongs to this PyTorch or take "
            "the backend 'chunked'"
        )
    if triton_kernels.INTERPRETED:
        return None
    if not on_cuda:
        return "Triton was loaded before TRITON_INTERPRET was set; set it before Python starts"
    problem = trial(device, torch.float64 if double else torch.float32)
    if problem is not None:
        logger.warning("selective scan: the Triton kernels are not used on %s: %s", device, problem)
    return problem


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def trial(device: str, kind: torch.dtype, states: int = 16, length: int = 100) -> str | None:
    """Run a small scan and its gradients on ``device``; what is wrong with it, or None.

    Args:
        kind: float32 or float64.
        states: N; with 16 states and 100 steps the tile is the one of most networks, and there are two chunks.
    """
    from nnunet_h2a.networks.selective_scan import triton_kernels

    def wave(*shape: int) -> Tensor:
        # Not random numbers: the user's generators must stay as they are.
        count = torch.Size(shape).numel()
        return torch.sin(torch.arange(1, count + 1, dtype=torch.float64, device="cpu") * (1 + count % 7)).reshape(shape)

    try:
        # Inference mode and no_grad may be on where a network is first called.
        with torch.inference_mode(False), torch.enable_grad():
            u, delta, dy = wave(1, 2, length), wave(1, 2, length), wave(1, 2, length)
            A = -1 - torch.arange(2 * states, dtype=torch.float64, device="cpu").reshape(2, states) / states
            B, C = wave(1, 2, states, length), wave(1, 2, states, length).flip(-1)
            inputs = [x.requires_grad_() for x in (u, delta, A, B, C, wave(2), wave(2) - 2)]
            y = reference_scan(*inputs, delta_softplus=True)
            expected = [y, *torch.autograd.grad(y, inputs, dy)]
            there = [x.detach().to(device, kind) for x in inputs]
            chunk = chunk_length(length, states)
            y, starts = triton_kernels.forward(*there, True, chunk, kind)
            found = [y, *triton_kernels.backward(dy.to(device, kind), *there, True, chunk, kind, starts)]
            for name, right, here in zip("y u delta A B C D delta_bias".split(), expected, found, strict=True):
                error = ((here.cpu().double() - right).abs().max() / right.abs().max()).item()
                # Not `error > tolerance`, which NaN would pass.
                if not error < TRIAL_TOLERANCE:
                    return (
                        f"a trial run gave wrong numbers (relative error of {'' if name == 'y' else 'the gradient of '}"
                        f"{name}: {error:.1e}); take the backend 'chunked' and report this with your GPU and Triton"
                    )
    except Exception as error:
        return (
            f"a trial run failed ({_one_line(error)}); Triton needs a GPU that it supports and a C compiler: install "
            "what the message names or take the backend 'chunked'"
        )
    return None


def chunk_length(length: int, states: int) -> int:
    """T, the steps of a tile: a power of two, 1024 / N within 16 to 128, below twice the sequence's length."""
    chunk = LONGEST
    while chunk > SHORTEST and (chunk * states > ELEMENTS or chunk >= 2 * length):
        chunk //= 2
    return chunk


def _state_type(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _forward(u, delta, A, B, C, D, delta_bias, delta_softplus, chunk):
    from nnunet_h2a.networks.selective_scan import triton_kernels

    return triton_kernels.forward(u, delta, A, B, C, D, delta_bias, delta_softplus, chunk, _state_type(u))


def _forward_shapes(u, delta, A, B, C, D, delta_bias, delta_softplus, chunk):
    batch, channels, length = u.shape
    chunks = (length + chunk - 1) // chunk
    return u.new_empty(u.shape), u.new_empty((batch, channels, chunks, A.shape[1]), dtype=_state_type(u))


def _backward(dy, u, delta, A, B, C, D, delta_bias, delta_softplus, chunk, starts):
    from nnunet_h2a.networks.selective_scan import triton_kernels

    kind = _state_type(u)
    gradients = triton_kernels.backward(dy, u, delta, A, B, C, D, delta_bias, delta_softplus, chunk, kind, starts)
    # An operator cannot return None among tensors.
    return tuple(u.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _backward_shapes(dy, u, delta, A, B, C, D, delta_bias, delta_softplus, chunk, starts):
    inputs = (u, delta, A, B, C, D, delta_bias)
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _keep(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.chunk = inputs
    ctx.save_for_backward(*tensors, output[1])


def _gradients(ctx, dy, _):
    *tensors, starts = ctx.saved_tensors
    gradients = torch.ops.nnunet_h2a.selective_scan_triton_backward(dy, *tensors, ctx.delta_softplus, ctx.chunk, starts)
    return *(None if x is None else g for x, g in zip(tensors, gradients, strict=True)), None, None


def _register() -> None:
    """Make the operators known to PyTorch; their kernels are loaded with the first call."""
    tensors = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias"
    options = "bool delta_softplus, int chunk"
    forward = torch.library.custom_op(
        FORWARD, _forward, mutates_args=(), schema=f"({tensors}, {options}) -> (Tensor, Tensor)"
    )
    forward.register_fake(_forward_shapes)
    forward.register_autograd(_gradients, setup_context=_keep)
    backward = torch.library.custom_op(
        BACKWARD,
        _backward,
        mutates_args=(),
        schema=f"(Tensor dy, {tensors}, {options}, Tensor starts) -> ({', '.join(['Tensor'] * 7)})",
    )
    backward.register_fake(_backward_shapes)


_register()
