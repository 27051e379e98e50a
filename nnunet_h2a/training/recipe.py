"""How a network is optimised: optimiser, learning rate, weight decay and warm-up, in nnU-Net's epochs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn

from nnunet_h2a.training.schedules import Schedule, ScheduledLR


@dataclass(frozen=True)
class OptimizerRecipe:
    """Optimiser settings of a trainer.

    Args:
        optimizer: ``"SGD"`` is nnU-Net's, with Nesterov momentum 0.99; ``"Adam"`` and ``"AdamW"`` are PyTorch's.
        learning_rate: at its highest.
        weight_decay: of the optimiser.
        warmup_epochs: epochs over which the learning rate rises linearly before nnU-Net's polynomial decay; never
            more than a tenth of the training.
        betas: of Adam and AdamW.
        schedule: in place of the polynomial decay and its warm-up.
    """

    optimizer: Literal["SGD", "Adam", "AdamW"]
    learning_rate: float
    weight_decay: float
    warmup_epochs: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule | None = None

    def build(
        self, parameters: Iterable[nn.Parameter] | list[dict[str, Any]], num_epochs: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Optimiser and scheduler as ``nnUNetTrainer.configure_optimizers`` returns them."""
        if self.optimizer == "SGD":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameters, self.learning_rate, weight_decay=self.weight_decay, momentum=0.99, nesterov=True
            )
        else:
            kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[self.optimizer]
            optimizer = kind(parameters, self.learning_rate, betas=self.betas, weight_decay=self.weight_decay)
        if self.schedule is not None:
            return optimizer, ScheduledLR(optimizer, self.learning_rate, num_epochs, self.schedule)
        return optimizer, WarmupPolyLR(optimizer, self.learning_rate, num_epochs, self.warmup_epochs)


def parameter_groups(network: nn.Module, weight_decay: float, free: set[str]) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: what is free of weight decay apart from the rest.

    Args:
        network: whose parameters.
        weight_decay: of all that are not free of it.
        free: names of parameters.
    """
    named = list(network.named_parameters())
    groups = [{"params": [p for name, p in named if name not in free], "weight_decay": weight_decay}]
    if free:
        groups.append({"params": [p for name, p in named if name in free], "weight_decay": 0.0})
    return groups


class WarmupPolyLR(PolyLRScheduler):
    """nnU-Net's polynomial decay after a linear rise over the first epochs.

    The learning rate is a function of the epoch alone, so that a resumed training goes on as if never interrupted.

    Args:
        optimizer: whose learning rate is set.
        initial_lr: the highest learning rate.
        max_steps: number of epochs.
        warmup_epochs: length of the rise; at most ``max_steps // 10``.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, initial_lr: float, max_steps: int, warmup_epochs: int = 0
    ) -> None:
        self.warmup_epochs = min(warmup_epochs, max_steps // 10)
        super().__init__(optimizer, initial_lr, max_steps)

    def step(self, current_step: int | None = None) -> None:
        super().step(current_step)
        epoch = self.ctr - 1 if current_step is None or current_step == -1 else current_step
        if epoch < self.warmup_epochs:
            for group in self.optimizer.param_groups:
                group["lr"] *= (epoch + 1) / (self.warmup_epochs + 1)
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
