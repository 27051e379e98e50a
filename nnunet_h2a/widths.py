"""The published widths of each network, for plans that do not give widths for it. Imports nothing."""

#: Channels of the first stage (per branch) and the most that any stage has; they double in between.
PUBLISHED_WIDTHS = {"H2ASeg": (8, 128), "ISANet": (16, 256), "CIPA": (96, 768)}

#: Networks whose number of stages does not follow the plan.
FIXED_STAGES = {"CIPA": 4}


def published_features(network: str, n_stages: int) -> list[int]:
    """Channels of each stage of ``network``, continued beyond the published number of stages.

    Args:
        network: class name, a key of :data:`PUBLISHED_WIDTHS`.
        n_stages: number of stages.
    """
    first, most = PUBLISHED_WIDTHS[network]
    return [min(first * 2**stage, most) for stage in range(n_stages)]
