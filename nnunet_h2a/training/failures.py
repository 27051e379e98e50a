"""What a training says when it cannot go on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunet_h2a.patch_sizes import MIN_FEATURE_MAP_EDGE, patches, stages_of
from nnunet_h2a.widths import FIXED_STAGES, published_features


class TrainingStopped(SystemExit):
    """A training that cannot go on; the reason is printed without a traceback, and the exit code is 1."""


class NonFiniteLoss(ArithmeticError):
    """The loss of a training step is NaN or infinite; raised before any gradient is computed."""


def stop_at_non_finite(loss: nn.Module) -> None:
    """Make a loss raise :class:`NonFiniteLoss` in training, before a gradient is computed from it."""

    def check(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if output.requires_grad and not torch.isfinite(output.detach()).all():
            raise NonFiniteLoss(str(float(output.detach())))

    loss.register_forward_hook(check)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value) if t.is_floating_point())


def first_non_finite(network: nn.Module, data: torch.Tensor) -> str:
    """Return in words what is the first thing that is not finite: images, a weight, or a layer's output.

    Args:
        network: not compiled, and not wrapped for several GPUs.
        data: the batch, on the network's device; autocast is as the caller has it.
    """
    if not _finite(data):
        bad = [str(c) for c in range(data.shape[1]) if not _finite(data[:, c])]
        return f"the images hold values that are not finite (channel {', '.join(bad)})"
    for name, parameter in network.named_parameters():
        if not _finite(parameter.detach()):
            return f"the weight {name} is not finite: an earlier step spoilt it"
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if not found and not _finite(output):
                largest = max((float(t.detach().abs().max()) for t in _tensors(inputs) if t.numel()), default=0.0)
                found.append(f"{name} ({type(module).__name__}), whose input is up to {largest:.3g}")

        return hook

    # Inner modules end before those around them, so that the first one heard of is the innermost.
    hooks = [module.register_forward_hook(look(name)) for name, module in network.named_modules() if name]
    # The other processes of a distributed training are not in this forward pass, and synchronised norms would wait.
    waiting = [m for m in network.modules() if isinstance(m, nn.SyncBatchNorm) and m.training]
    try:
        for module in waiting:
            module.training = False
        with torch.no_grad():
            network(data)
    finally:
        for hook in hooks:
            hook.remove()
        for module in waiting:
            module.training = True
    if found:
        return f"the first layer whose output is not finite is {found[0]}"
    return "all layers' outputs are finite, the loss itself is not"


def describe_checkpoints(folder: str | Path) -> str:
    """Return in words which checkpoints a training can go on from."""
    names = ("checkpoint_latest.pth", "checkpoint_best.pth")
    kept = [name for name in names if (Path(folder) / name).exists()]
    if not kept:
        return "no checkpoint had been written yet"
    return f"{' and '.join(kept)} in {folder} {'is' if len(kept) == 1 else 'are'} as before"


def non_finite_message(loss: str, where: str, what: str, cases: Sequence[str], folder: str | Path) -> str:
    """Return the lines for a loss that is not finite.

    Args:
        loss: its value.
        where: epoch and step.
        what: from :func:`first_non_finite`.
        cases: identifiers of the batch.
        folder: the fold's output folder.
    """
    return (
        f"training stopped: the loss is {loss} at {where}\n"
        f"  {what}\n"
        f"  cases of this batch: {', '.join(cases) or 'not told'}\n"
        f"  {describe_checkpoints(folder)}; after mending the cause go on with nnUNetv2_train … --c"
    )


def smaller_size(configuration: Mapping[str, Any], fixed_batch: bool) -> tuple[list[int], int]:
    """Return a patch and a batch of at most half the voxels per step.

    The batch is halved while it is more than 2, as nnU-Net's planner has it; then comes the largest of the planner's
    patches with half the voxels, which keeps the patch's shape to that of the images.

    Args:
        configuration: of the plan.
        fixed_batch: whether the trainer has a batch of its own.
    """
    patch, batch = [int(n) for n in configuration["patch_size"]], int(configuration["batch_size"])
    if batch > 2 and not fixed_batch:
        return patch, batch // 2
    half = math.prod(patch) / 2
    tried = patches(configuration["spacing"], configuration["median_image_size_in_voxels"], MIN_FEATURE_MAP_EDGE)
    for candidate in tried:
        if math.prod(candidate) <= half and all(n <= old for n, old in zip(candidate, patch, strict=True)):
            return candidate, batch
    longest = max(range(len(patch)), key=patch.__getitem__)
    return [n // 2 if axis == longest else n for axis, n in enumerate(patch)], batch


def out_of_memory_message(
    network: nn.Module, dataset: str, plans: str, configuration: Mapping[str, Any], name: str, fixed_batch: bool
) -> str:
    """Return the lines for a GPU without enough memory, with the command for a plan of half the size.

    Args:
        network: not compiled, and not wrapped for several GPUs.
        dataset: name of the dataset.
        plans: name of the plans.
        configuration: the plan's, with patch, batch, spacing and median shape.
        name: of the configuration.
        fixed_batch: whether the trainer takes a batch of its own, whatever the plan says.
    """
    kind, number = type(network).__name__, dataset.removeprefix("Dataset").partition("_")[0]
    architecture = configuration["architecture"]
    ours = architecture["network_class_name"].endswith(f".{kind}")
    patch, batch = smaller_size(configuration, fixed_batch)
    words = ["h2a_plan", "-d", number, "-c", name, "--network", kind, "-p", plans]
    if getattr(network, "modalities", "both") != "both":
        words += ["--modalities", network.modalities]
    words += ["--patch-size", *map(str, patch), "--batch-size", str(batch)]
    if ours:
        words += _widths(kind, architecture["arch_kwargs"], configuration["spacing"], patch)
    base = plans if ours else f"nnUNet{kind}Plans"
    smaller = f"{base.removesuffix('Plans')}SmallerPlans"
    shown = " x ".join(str(n) for n in configuration["patch_size"])
    whose = " (the trainer's own, whatever the plan says)" if fixed_batch else ""
    return (
        f"training stopped: the GPU has not enough memory for {kind} with patch {shown} and batch "
        f"{configuration['batch_size']}{whose}\n"
        f"  a plan of half the size: {' '.join([*words, '-o', smaller])}\n"
        f"  then train with -p {smaller}"
    )


def _widths(kind: str, arch_kwargs: Mapping[str, Any], spacing: Sequence[float], patch: Sequence[int]) -> list[str]:
    """Return h2a_plan's arguments for the channels of a plan of ours where they are not the published ones."""
    if kind in FIXED_STAGES:
        widths = arch_kwargs.get("widths")
        return [] if widths is None else ["--features", *map(str, widths)]
    # A smaller patch may allow fewer stages.
    allowed = stages_of(spacing, patch, MIN_FEATURE_MAP_EDGE)
    widths = list(arch_kwargs["features_per_stage"])[:allowed]
    if widths == published_features(kind, allowed):
        return []
    return ["--n-stages", str(len(widths)), "--features", *map(str, widths)]
