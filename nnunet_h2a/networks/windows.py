"""Non-overlapping windows of a feature map, as rows of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def partition_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """Cut a map into windows and write each as tokens.

    Args:
        x: (batch, channels, spatial...); each axis a multiple of the window's.
        window: window size per axis.

    Returns:
        (batch * windows, tokens, channels); windows and the tokens inside them in row-major order.
    """
    batch, channels, *size = x.shape
    dims = len(size)
    split = [n for s, w in zip(size, window, strict=True) for n in (s // w, w)]
    grid_axes = [2 + 2 * i for i in range(dims)]
    x = x.reshape(batch, channels, *split).permute(0, *grid_axes, *[a + 1 for a in grid_axes], 1)
    return x.reshape(-1, math.prod(window), channels)


def merge_windows(windows: Tensor, size: Sequence[int]) -> Tensor:
    """Put windows back to their places.

    Args:
        windows: (batch * windows, channels, window...), in the order of :func:`partition_windows`.
        size: spatial size of the map.

    Returns:
        (batch, channels, size...).
    """
    _, channels, *window = windows.shape
    dims = len(window)
    grid = [s // w for s, w in zip(size, window, strict=True)]
    x = windows.reshape(-1, *grid, channels, *window)
    interleaved = [axis for i in range(dims) for axis in (1 + i, 2 + dims + i)]
    return x.permute(0, 1 + dims, *interleaved).reshape(-1, channels, *size)
