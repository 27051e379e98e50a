"""Learning rate over the epochs."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_h2a.training.recipe import OptimizerRecipe, WarmupPolyLR


def learning_rates(scheduler, optimizer, epochs):
    rates = []
    for epoch in epochs:
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.fixture
def parameters():
    return [torch.nn.Parameter(torch.zeros(1))]


def test_linear_rise_then_nnunets_decay(parameters):
    optimizer, scheduler = OptimizerRecipe("AdamW", 1e-3, 0.0, warmup_epochs=10).build(parameters, 1000)
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = learning_rates(scheduler, optimizer, range(1000))
    decay = [1e-3 * (1 - epoch / 1000) ** 0.9 for epoch in range(1000)]
    assert rates[10:] == pytest.approx(decay[10:])
    assert rates[:10] == pytest.approx([decay[e] * (e + 1) / 11 for e in range(10)])


def test_without_warmup_it_is_nnunets_scheduler(parameters):
    optimizer, scheduler = OptimizerRecipe("SGD", 1e-2, 3e-5).build(parameters, 50)
    assert isinstance(optimizer, torch.optim.SGD)
    rates = learning_rates(scheduler, optimizer, range(50))
    stock_optimizer = torch.optim.SGD(parameters, 1e-2)
    assert rates == learning_rates(PolyLRScheduler(stock_optimizer, 1e-2, 50), stock_optimizer, range(50))


@pytest.mark.parametrize(("epochs", "warmup"), [(1000, 10), (50, 5), (5, 0), (1, 0)])
def test_warmup_is_at_most_a_tenth(parameters, epochs, warmup):
    assert WarmupPolyLR(torch.optim.SGD(parameters, 1.0), 1.0, epochs, warmup_epochs=10).warmup_epochs == warmup


def test_a_resumed_training_has_the_same_learning_rate(parameters):
    recipe = OptimizerRecipe("AdamW", 1e-3, 0.0, warmup_epochs=10)
    optimizer, scheduler = recipe.build(parameters, 100)
    whole = learning_rates(scheduler, optimizer, range(100))
    optimizer, scheduler = recipe.build(parameters, 100)
    assert learning_rates(scheduler, optimizer, range(4, 100)) == whole[4:]
