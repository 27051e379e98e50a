"""What a network reads out of an nnU-Net plan: per-stage kernels and strides, and the size of every stage's map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

#: A per-stage setting as dynamic-network-architectures accepts it: one number for every stage and axis,
#: one per stage, or one per stage and axis.
PerStage = int | Sequence[int] | Sequence[Sequence[int]]


def spatial_dims(conv_op: type[nn.Module]) -> int:
    """Number of spatial axes that ``conv_op`` works on: 2 for ``nn.Conv2d``, 3 for ``nn.Conv3d``.

    Raises:
        ValueError: for any other operation.
    """
    for dims, op in ((2, nn.Conv2d), (3, nn.Conv3d)):
        if isinstance(conv_op, type) and issubclass(conv_op, op):
            return dims
    raise ValueError(f"`conv_op` must be torch.nn.Conv2d or torch.nn.Conv3d, got {conv_op!r}")


def expand_per_stage(value: PerStage, n_stages: int, dims: int, name: str) -> tuple[tuple[int, ...], ...]:
    """Write a per-stage setting out as ``n_stages`` tuples of ``dims`` positive integers.

    Args:
        value: one integer, ``n_stages`` integers, or ``n_stages`` sequences of ``dims`` integers.
        n_stages: number of stages of the network.
        dims: number of spatial axes.
        name: how the setting is called, for the error text.

    Raises:
        ValueError: where the lengths do not agree or an entry is not a positive integer.
    """
    stages = [value] * n_stages if _is_integer(value) else list(value)
    if len(stages) != n_stages:
        raise ValueError(f"`{name}` must have one entry for each of the {n_stages} stages, got {len(stages)}: {value}")
    expanded = []
    for entry in stages:
        axes = (entry,) * dims if _is_integer(entry) else tuple(entry)
        if len(axes) != dims or not all(_is_integer(a) and a > 0 for a in axes):
            raise ValueError(f"`{name}` entries must be positive integers, one or {dims} per stage, got {entry}")
        expanded.append(tuple(int(a) for a in axes))
    return tuple(expanded)


def expand_features(value: int | Sequence[int], n_stages: int) -> tuple[int, ...]:
    """Channels of each stage; one integer stands for all stages.

    Raises:
        ValueError: where the length is not ``n_stages`` or an entry is not a positive integer.
    """
    return tuple(stage[0] for stage in expand_per_stage(value, n_stages, 1, "features_per_stage"))


def check_odd(kernel_sizes: Sequence[Sequence[int]]) -> None:
    """Refuse even kernels: with them no symmetric padding keeps the map's size.

    Raises:
        ValueError: naming the first even kernel.
    """
    for stage in kernel_sizes:
        if any(k % 2 == 0 for k in stage):
            raise ValueError(f"`kernel_sizes` must be odd, got {list(stage)}")


def cumulative_strides(strides: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Down-sampling of each stage against the input, per axis."""
    total = [1] * len(strides[0])
    result = []
    for stage in strides:
        total = [t * s for t, s in zip(total, stage, strict=True)]
        result.append(tuple(total))
    return tuple(result)


def stage_map_sizes(size: Sequence[int], strides: Sequence[Sequence[int]], name: str) -> list[tuple[int, ...]]:
    """Size of each stage's feature map for an input of ``size`` (no batch, no channels).

    Args:
        size: spatial size of the input, in the plan's axis order.
        strides: per stage and axis.
        name: what ``size`` is, for the error text.

    Raises:
        ValueError: where an axis is not a multiple of its total stride, so that decoder and skips would not meet.
    """
    maps = []
    for total in cumulative_strides(strides):
        if len(total) != len(size) or any(n % t or n < t for n, t in zip(size, total, strict=True)):
            deepest = cumulative_strides(strides)[-1]
            raise ValueError(
                f"{name} {list(size)} does not fit: every axis must be a multiple of the total stride {list(deepest)}"
            )
        maps.append(tuple(n // t for n, t in zip(size, total, strict=True)))
    return maps


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__")
