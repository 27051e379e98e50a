"""The selective scan by the user's own installation of mamba_ssm, where that has the compiled Mamba-1 scan."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

#: Largest N that mamba_ssm's kernels take.
MOST_STATES = 256

#: mamba_ssm's installation with the compiled scan, and the same over one that is there without it.
INSTALL = "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation mamba-ssm"
REBUILD = f"{INSTALL} --no-cache-dir --force-reinstall --no-deps"


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
    """mamba_ssm's ``selective_scan_fn``; arguments and result are those of ``selective_scan``.

    mamba_ssm wants u, delta, B and C of one type and A, D and delta_bias in float32. Where the four differ they go in
    as float32, so that nothing is rounded. Its gradients of B and C are sums by atomic additions, which need not
    repeat bit for bit. torch.compile breaks the graph here (``fullgraph=True`` fails): mamba_ssm's function is no
    operator that PyTorch knows. ``auto`` therefore never takes this backend.

    Raises:
        RuntimeError: where mamba_ssm's scan cannot be loaded or N is above 256.
    """
    function, problem = _load()
    if function is None:
        raise RuntimeError(f"the selective scan of mamba_ssm does not work here: {problem}")
    if A.shape[1] > MOST_STATES:
        raise RuntimeError(
            f"mamba_ssm's scan takes at most {MOST_STATES} states, got {A.shape[1]}; take another backend"
        )
    kind = u.dtype if delta.dtype == B.dtype == C.dtype == u.dtype else torch.float32
    result = u.dtype
    u, delta, B, C = (x.to(kind).contiguous() for x in (u, delta, B, C))
    A, D, delta_bias = (None if x is None else x.float().contiguous() for x in (A, D, delta_bias))
    y = function(u, delta, A, B, C, D=D, delta_bias=delta_bias, delta_softplus=delta_softplus)
    return y.to(result)


def why_not(u: Tensor) -> str | None:
    """Why mamba_ssm's scan does not work for tensors like ``u``, and the cure; None if it does.

    The first call for a CUDA tensor loads mamba_ssm; later calls look the answer up.
    """
    if u.device.type != "cuda":
        return f"it needs tensors on a CUDA device, not on {u.device}; move them or take the backend 'chunked'"
    if u.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {u.dtype}; convert them or take another backend"
    return _why_not_loaded()


@torch.compiler.assume_constant_result
def _why_not_loaded() -> str | None:
    # torch.compile runs this function instead of tracing into the imports.
    return _load()[1]


@cache
def _load() -> tuple[Callable[..., Tensor] | None, str | None]:
    """mamba_ssm's function, or None and what is wrong.

    mamba_ssm can be imported without its compiled part: after release 2.3.2.post1 a plain installation leaves the
    Mamba-1 scan out (state-spaces/mamba, pull request 977), and its function then fails when it is called.
    """
    try:
        # mamba_ssm first: where it is missing, so is its compiled part, and the message must name the former.
        interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        importlib.import_module("selective_scan_cuda")
        return interface.selective_scan_fn, None
    except ModuleNotFoundError as error:
        if error.name == "selective_scan_cuda":
            return None, (
                "its compiled Mamba-1 scan (selective_scan_cuda) is not installed; build it with the CUDA toolkit of "
                f"this PyTorch ({REBUILD}) or leave the backend to 'auto'"
            )
        return None, (
            f"mamba_ssm, or a package that it needs, is not installed ({error}); install it ({INSTALL}) or leave the "
            "backend to 'auto'"
        )
    except Exception as error:
        # A library built for another PyTorch or CUDA can fail with any kind of error while it is loaded.
        return None, (
            f"mamba_ssm cannot be loaded ({' '.join(f'{type(error).__name__}: {error}'.split())[:300]}); build it for "
            f"this PyTorch ({REBUILD}) or leave the backend to 'auto'"
        )
