"""The patches that nnU-Net's planner goes through."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

#: Smallest edge of the deepest feature map; nnU-Net's own planner uses it too.
MIN_FEATURE_MAP_EDGE = 4

#: nnU-Net's first patch, before it is cut to the images: this many voxels, shaped by the spacing.
FIRST_PATCH = {2: 2048**2, 3: 256**3}


def patches(spacing: Sequence[float], median_shape: Sequence[float], min_edge: int) -> Iterator[list[int]]:
    """Patches that nnU-Net's planner would try, largest first, down to the last with three stages.

    Isensee et al., Nature Methods 18 (2021), supplementary note 2: the first has the aspect ratio of the spacing and at
    most the median shape; then the axis is cut that is largest relative to the median shape, by as little as the
    number of poolings allows.

    Args:
        spacing: mm per axis.
        median_shape: voxels of the median image per axis.
        min_edge: smallest edge of the deepest map.
    """
    # No torch behind this import: the planner's topology is arithmetic on lists.
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    def topology(patch: Sequence[int]) -> tuple[int, list[int], list[int]]:
        _, strides, _, padded, divisor = get_pool_and_conv_props(spacing, patch, min_edge, 999999)
        return len(strides), [int(n) for n in padded], [int(n) for n in divisor]

    density = [1 / s for s in spacing]
    scale = (FIRST_PATCH[len(spacing)] / math.prod(density)) ** (1 / len(spacing))
    stages, patch, divisor = topology(
        [max(1, int(min(round(d * scale), m))) for d, m in zip(density, median_shape, strict=True)]
    )
    while stages >= 3:
        yield patch
        axis = max(range(len(patch)), key=lambda i: (patch[i] / median_shape[i], i))
        cut = [n - divisor[i] * (i == axis) for i, n in enumerate(patch)]
        if min(cut) < 1:
            return
        # A smaller patch may be pooled less often, and then less can be taken away.
        divisor = topology(cut)[2]
        stages, patch, divisor = topology([n - divisor[i] * (i == axis) for i, n in enumerate(patch)])


def stages_of(spacing: Sequence[float], patch: Sequence[int], min_edge: int) -> int:
    """Number of resolutions that nnU-Net gives a patch; arguments as those of :func:`patches`."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    return len(get_pool_and_conv_props(spacing, patch, min_edge, 999999)[1])
