"""Learning rates as functions of the time in epochs, so that a resumed training goes on as if never interrupted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch


class Schedule(Protocol):
    """What part of the highest learning rate is used when."""

    #: Whether the learning rate changes from step to step and not only from epoch to epoch.
    every_step: ClassVar[bool]

    def __call__(self, epoch: float, epochs: int) -> float:
        """Return the factor at a time in epochs, of a training of so many epochs."""
        ...


@dataclass(frozen=True)
class Exponential:
    """``gamma`` to the power of the epoch."""

    gamma: float
    every_step: ClassVar[bool] = False

    def __call__(self, epoch: float, epochs: int) -> float:
        """See :class:`Schedule`."""
        return self.gamma ** math.floor(epoch)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine over the training, from 1 to ``lowest``, step by step."""

    lowest: float = 0.0
    every_step: ClassVar[bool] = True

    def __call__(self, epoch: float, epochs: int) -> float:
        """See :class:`Schedule`."""
        return self.lowest + (1 - self.lowest) * (1 + math.cos(math.pi * min(epoch / epochs, 1.0))) / 2


@dataclass(frozen=True)
class CosineRestarts:
    """Half a cosine from 1 to ``lowest``, begun again every ``period`` epochs."""

    period: int
    lowest: float = 0.0
    every_step: ClassVar[bool] = False

    def __call__(self, epoch: float, epochs: int) -> float:
        """See :class:`Schedule`."""
        phase = math.floor(epoch) % self.period / self.period
        return self.lowest + (1 - self.lowest) * (1 + math.cos(math.pi * phase)) / 2


class ScheduledLR(torch.optim.lr_scheduler.LRScheduler):
    """Sets the learning rate by a :class:`Schedule`; nnU-Net calls ``step(epoch)`` when an epoch begins.

    Args:
        optimizer: whose learning rate is set.
        learning_rate: the highest.
        epochs: of the whole training.
        schedule: see above.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, learning_rate: float, epochs: int, schedule: Schedule) -> None:
        self.learning_rate, self.epochs, self.schedule = learning_rate, epochs, schedule
        self._epoch = -1.0
        super().__init__(optimizer)

    def step(self, epoch: float | None = None) -> None:
        """Set the learning rate of a time in epochs; of the next whole one where None."""
        self._epoch = math.floor(self._epoch) + 1 if epoch is None else epoch
        rate = self.learning_rate * self.schedule(self._epoch, self.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._last_lr = [rate] * len(self.optimizer.param_groups)
