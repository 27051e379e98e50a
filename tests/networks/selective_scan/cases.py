"""Inputs of the selective scan, and its recurrence as plain loops over numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")

#: How delta is drawn: what training starts from, and what a diverging or a dead network gives.
DELTAS = {
    "random": lambda z: z - 2,
    "tiny": lambda z: 1e-7 * z - 18,
    "huge": lambda z: 200 * z,
    "zero": lambda z: torch.zeros_like(z),
}


def make(
    batch: int, d: int, n: int, length: int, groups: int, delta: Callable[[Tensor], Tensor] = DELTAS["random"],
    dtype: torch.dtype = torch.float64, optional: bool = True, seed: int = 0,
) -> list[Tensor | None]:  # fmt: skip
    """The seven tensors, in the order of :data:`NAMES`."""
    generator = torch.Generator().manual_seed(seed + length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [
        normal(batch, d, length), delta(normal(batch, d, length)),
        -torch.arange(1, n + 1, dtype=torch.float64).repeat(d, 1) * torch.rand(d, 1, generator=generator).double(),
        normal(batch, groups, n, length), normal(batch, groups, n, length), normal(d), 0.1 * normal(d),
    ]  # fmt: skip
    return [t.to(dtype) if optional or name not in ("D", "delta_bias") else None
            for name, t in zip(NAMES, tensors, strict=True)]  # fmt: skip


def by_hand(u, delta, A, B, C, D, delta_bias, softplus):
    """The recurrence number by number in Python floats."""
    batch, d, length = u.shape
    per_group, n = d // B.shape[1], A.shape[1]
    y = torch.zeros(batch, d, length, dtype=torch.float64)
    for sample in range(batch):
        for c in range(d):
            h = [0.0] * n
            for t in range(length):
                step = float(delta[sample, c, t]) + (0.0 if delta_bias is None else float(delta_bias[c]))
                if softplus:
                    step = max(step, 0.0) + math.log1p(math.exp(-abs(step)))
                x, total = float(u[sample, c, t]), 0.0
                for k in range(n):
                    matrix_b, matrix_c = (float(m[sample, c // per_group, k, t]) for m in (B, C))
                    h[k] = math.exp(step * float(A[c, k])) * h[k] + step * matrix_b * x
                    total += matrix_c * h[k]
                y[sample, c, t] = total + (0.0 if D is None else float(D[c]) * x)
    return y


def values_and_gradients(
    scan: Callable[..., Tensor], tensors: list[Tensor | None], softplus: bool = True
) -> dict[str, Tensor]:
    """Result and gradient of every tensor, for an output gradient that weighs every number differently."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = scan(*leaves, softplus)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).cos().to(y)
    y.backward(weights)
    return {"y": y.detach()} | {f"d{n}": t.grad for n, t in zip(NAMES, leaves, strict=True) if t is not None}


def assert_same(result: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal within ``tolerance`` of the largest number of each tensor (at least 1)."""
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.isfinite(result[name]).all(), name
        assert result[name].dtype == value.dtype, name
        difference = (result[name].double() - value.double()).abs().max().item()
        assert difference <= tolerance * max(1.0, value.abs().max().item()), f"{name} differs by {difference}"
