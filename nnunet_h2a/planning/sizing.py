"""Patch and batch that fit a GPU: nnU-Net's way from large patches to small, with the memory of the network itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # h2a_plan needs torch only where it counts
    from nnunet_h2a.planning.memory import StepMemory

#: GiB of the GPUs that ``--preset`` stands for.
PRESETS = {"S": 8, "M": 16, "L": 24}

#: Part of the GPU's memory that a plan may fill: the prediction is not exact, and displays and others take some.
USABLE = 0.9

#: nnU-Net's rules: at least two patches per step, and no more than 5 % of the dataset's voxels in one.
MIN_BATCH = 2
MOST_OF_DATASET = 0.05

#: A plan whose network has been counted; a ValueError says why there is no network for such a size.
Count = Callable[[Sequence[int], int], "StepMemory"]


@dataclass(frozen=True)
class Size:
    """What was chosen.

    Attributes:
        patch_size: voxels, in the plans' axis order.
        batch_size: patches per step.
        memory: counted for exactly this size.
        reason: one line that says what limits it.
    """

    patch_size: list[int]
    batch_size: int
    memory: StepMemory
    reason: str


class DoesNotFit(ValueError):
    """No size of the network fits the memory; the message says what the smallest one takes."""


def choose_size(
    candidates: Sequence[Sequence[int]],
    dataset_voxels: float,
    gpu_memory: float,
    count: Count,
    batch_size: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Size:
    """The largest patch that fits, and then the largest batch.

    Counting takes seconds to a minute, so that the sizes to count are chosen by those counted before.

    Args:
        candidates: patches, largest first; one alone if the patch is given.
        dataset_voxels: of all training cases together, in the plan's spacing.
        gpu_memory: of the GPU, in GiB.
        count: counts a step of a patch and a batch; a ValueError where the network cannot have such a size.
        batch_size: if it is given.
        say: takes a line for each size that is counted.

    Raises:
        DoesNotFit: where no candidate does.
    """
    from nnunet_h2a.planning.memory import GIB

    usable = gpu_memory * USABLE * GIB
    least = batch_size or MIN_BATCH
    counted: dict[int, StepMemory] = {}

    def measure(index: int) -> StepMemory:
        memory = count(candidates[index], least)
        counted[index] = memory
        say(_line(candidates[index], least, memory))
        return memory

    def guess(low: int, high: int) -> int:
        """The first candidate from ``low`` to ``high`` that should fit, by the nearest one that has been counted."""
        for index in range(low, high):
            nearest = min(counted, key=lambda i: abs(i - index))
            ratio = math.prod(candidates[index]) / math.prod(candidates[nearest])
            if counted[nearest].scaled(ratio).peak <= usable:
                return index
        return high

    # Candidates before `low` do not fit; `high` does, where it is below the number of candidates.
    low, high = 0, len(candidates)
    index = len(candidates) // 2
    while low < high:
        if measure(index).peak <= usable:
            high = index
        else:
            low = index + 1
        index = guess(low, high)
        if index == high:
            # All before it are said not to fit: the next larger one proves it.
            index = high - 1
    if high == len(candidates):
        smallest = len(candidates) - 1
        given = ["a smaller --patch-size"] * (len(candidates) == 1) + ["a smaller --batch-size"] * bool(
            batch_size is not None and batch_size > 1
        )
        cures = ", ".join([*given, "fewer --features", "another network"])
        raise DoesNotFit(
            f"{_line(candidates[smallest], least, counted[smallest])}, and {gpu_memory:g} GiB leave "
            f"{usable / GIB:.2f}: take a GPU with more memory, {cures}"
        )
    patch, memory = list(candidates[high]), counted[high]
    if batch_size is not None:
        return Size(patch, batch_size, memory, "batch as asked for")
    allowed = max(MIN_BATCH, round(dataset_voxels * MOST_OF_DATASET / math.prod(patch)))
    batch, most = MIN_BATCH, allowed
    while batch < most and (larger := min(most, _batch_that_fits(memory, batch, usable))) > batch:
        bigger = count(patch, larger)
        say(_line(patch, larger, bigger))
        if bigger.peak > usable:
            most = larger - 1
        else:
            batch, memory = larger, bigger
    if high:
        reason = f"the next larger patch, {' x '.join(map(str, candidates[high - 1]))}, does not fit"
    elif batch == allowed:
        reason = "a larger patch would exceed the median image, a larger batch 5 % of the dataset in one step"
    else:
        reason = "a larger patch would exceed the median image, a larger batch does not fit"
    if len(candidates) == 1:
        reason = "patch as asked for"
    return Size(patch, batch, memory, reason)


def _batch_that_fits(memory: StepMemory, batch: int, usable: float) -> int:
    """The largest batch whose memory should fit, by that of another batch."""
    largest = batch
    while memory.scaled((largest + 1) / batch).peak <= usable:
        largest += 1
    return largest


def _line(patch: Sequence[int], batch: int, memory: StepMemory) -> str:
    return f"patch {' x '.join(map(str, patch))}, batch {batch}: {memory.peak / 2**30:.1f} GiB"


def network_memory(
    configuration: dict[str, Any], input_channels: int, output_channels: int, patch_size: Sequence[int], batch_size: int
) -> StepMemory:
    """Count a training step of the network that a configuration of a plan names.

    Args:
        configuration: with ``architecture``.
        input_channels: as nnU-Net counts them, a cascade's included.
        output_channels: segmentation heads.
        patch_size: voxels.
        batch_size: patches per step.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    from nnunet_h2a.planning.memory import count_step

    architecture = configuration["architecture"]
    return count_step(
        lambda: get_network_from_plans(
            architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"],
            input_channels, output_channels, allow_init=False, deep_supervision=True,
        ),
        patch_size, batch_size, input_channels,
    )  # fmt: skip
