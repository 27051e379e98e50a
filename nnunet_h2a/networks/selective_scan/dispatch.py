"""One function for the selective scan, whatever computes it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from nnunet_h2a.networks.precision import without_autocast
from nnunet_h2a.networks.selective_scan import export, mamba, triton_scan
from nnunet_h2a.networks.selective_scan.chunked import chunked_scan
from nnunet_h2a.networks.selective_scan.reference import reference_scan

logger = logging.getLogger(__name__)

#: Environment variable that chooses the backend where the argument leaves it to ``auto``.
SWITCH = "NNUNET_H2A_SCAN"

BACKENDS = ("reference", "chunked", "triton", "mamba_ssm")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Mamba's selective scan (S6): h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t, h_0 = 0.

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), equation 2 with
    the discretisation that its software uses: exp(delta A) for A and delta B for B.

    Args:
        u: input, (batch, d, L); float16, bfloat16, float32 or float64.
        delta: step sizes, (batch, d, L), before ``delta_bias`` and softplus.
        A: decay rates, (d, N), negative.
        B: input matrices, (batch, G, N, L); group g serves channels g d/G to (g + 1) d/G - 1.
        C: output matrices, (batch, G, N, L).
        D: weights of the input in the output, (d), or None.
        delta_bias: added to ``delta``, (d), or None.
        delta_softplus: take softplus(delta + delta_bias).
        backend: ``"reference"`` (plain recurrence, for tests and export), ``"chunked"`` (PyTorch, any device),
            ``"triton"`` (CUDA), ``"mamba_ssm"`` (CUDA, the user's own installation) or ``"auto"``: the environment
            variable ``NNUNET_H2A_SCAN``, else the fastest that works for these tensors.

    Returns:
        y, (batch, d, L), in u's type. The state is float32 (float64 for float64 input) whatever the inputs and
        autocast say.

    Raises:
        ValueError: for shapes that do not go together or an unknown backend.
        RuntimeError: where the backend asked for does not work here, with the reason.
    """
    _check(u, delta, A, B, C, D, delta_bias)
    scan = _choose(backend, u)
    with without_autocast(u):
        return scan(u, delta, A, B, C, D, delta_bias, delta_softplus)


def _choose(backend: str, u: Tensor) -> Callable[..., Tensor]:
    """The function behind a backend's name, for tensors like ``u``."""
    if backend == "auto":
        backend = os.environ.get(SWITCH) or "auto"
    if backend == "auto" and _exporting():
        return export.export_scan if export.available() else reference_scan
    if backend == "auto":
        backend = "triton" if u.is_cuda and triton_scan.why_not(u) is None else "chunked"
        _say(backend, u.device.type)
    if backend == "reference":
        return reference_scan
    if backend == "chunked":
        return chunked_scan
    if backend in ("triton", "mamba_ssm"):
        module = triton_scan if backend == "triton" else mamba
        if problem := module.why_not(u):
            raise RuntimeError(f"the selective scan's backend '{backend}' does not work here: {problem}")
        return module.scan
    raise ValueError(f"`backend` (or {SWITCH}) must be auto, {', '.join(BACKENDS)}; got {backend!r}")


def _exporting() -> bool:
    """Whether a graph is being exported, in which only PyTorch's own operations may stand."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


@torch.compiler.assume_constant_result
def _say(backend: str, device: str) -> None:
    # torch.compile runs this function instead of tracing into it, and does not look into a cached one.
    _say_once(backend, device)


@cache
def _say_once(backend: str, device: str) -> None:
    logger.info("selective scan on %s: backend %s (%s=... chooses another)", device, backend, SWITCH)


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> None:
    """Refuse shapes that do not go together.

    Raises:
        ValueError: naming the tensor, its shape and the shape it must have.
    """
    if not u.is_floating_point():
        raise ValueError(f"`u` must be of a floating-point type, got {u.dtype}")
    if u.dim() != 3:
        raise ValueError(f"`u` must be (batch, d, L), got {tuple(u.shape)}")
    batch, channels, length = u.shape
    if length == 0:
        raise ValueError(f"`u` has no step to scan: {tuple(u.shape)}")
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"`A` must be (d, N) with d = {channels} and N at least 1, got {tuple(A.shape)}")
    if B.dim() != 4 or B.shape[1] == 0 or channels % B.shape[1]:
        raise ValueError(f"`B` must be (batch, G, N, L) with G a divisor of d = {channels}, got {tuple(B.shape)}")
    matrices = (batch, B.shape[1], A.shape[1], length)
    wanted = {"delta": (delta, (batch, channels, length)), "B": (B, matrices), "C": (C, matrices)}
    wanted |= {"D": (D, (channels,)), "delta_bias": (delta_bias, (channels,))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}")
