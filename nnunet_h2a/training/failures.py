"""What a training says when it cannot go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


class TrainingStopped(SystemExit):
    """A training that cannot go on; the reason is printed without a traceback, and the exit code is 1."""


class NonFiniteLoss(ArithmeticError):
    """The loss of a training step is NaN or infinite; raised before any gradient is computed."""


def stop_at_non_finite(loss: nn.Module) -> None:
    """Make a loss raise :class:`NonFiniteLoss` in training, where weights would take the NaN over."""

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
    try:
        with torch.no_grad():
            network(data)
    finally:
        for hook in hooks:
            hook.remove()
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


def out_of_memory_message(network: str, dataset: str, configuration: Mapping[str, Any], name: str) -> str:
    """Return the lines for a GPU without enough memory, with the command for a plan of half the size.

    Args:
        network: name of the network's class.
        dataset: name of the dataset.
        configuration: the plan's, with ``patch_size`` and ``batch_size``.
        name: of the configuration.
    """
    patch, batch = list(configuration["patch_size"]), int(configuration["batch_size"])
    if batch > 2:
        smaller = f"--batch-size {batch // 2}"
    else:
        longest = max(range(len(patch)), key=patch.__getitem__)
        smaller = "--patch-size " + " ".join(str(n // 2 if i == longest else n) for i, n in enumerate(patch))
    number = dataset.removeprefix("Dataset").partition("_")[0]
    return (
        f"training stopped: the GPU has not enough memory for {network} with patch "
        f"{' x '.join(str(n) for n in patch)} and batch {batch}\n"
        f"  a smaller plan: h2a_plan -d {number} -c {name} --network {network} {smaller}\n"
        "  then train with -p and the plans that it names"
    )
