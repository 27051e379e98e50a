"""Every network of the package, and what the matrix of tests must be told about it. One entry adds a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnunet_h2a.networks
from nnunet_h2a.networks import CIPA, H2ASeg, ISANet
from tests.networks.plans import PLANS, Plan


@dataclass(frozen=True)
class Entry:
    """One network.

    Attributes:
        network: its class.
        outputs: number of outputs with deep supervision on, from the number of stages.
        small: keywords that make it small where the plan's widths do not.
        scan_parameters: last parts of the names of parameters that ``initialize`` must leave alone.
    """

    network: type[nn.Module]
    outputs: Callable[[int], int]
    small: Mapping[str, Any] = field(default_factory=dict)
    scan_parameters: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.network.__name__

    def build(self, plan: Plan, **overrides: Any) -> nn.Module:
        """The network of a plan, initialised as nnU-Net does it; always the same weights."""
        torch.manual_seed(0)
        network = self.network(**plan.keywords(**self.small, **overrides))
        return network.apply(network.initialize)


ENTRIES = (
    Entry(H2ASeg, outputs=lambda stages: stages),
    Entry(ISANet, outputs=lambda stages: stages - 1),
    Entry(
        CIPA, outputs=lambda stages: 1,
        small={"widths": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "decoder_depth": 1},
        scan_parameters=("A_logs", "Ds", "dt_projs_bias", "dt_projs_weight", "x_proj_weight"),
    ),
)  # fmt: skip
REGISTRY = {entry.name: entry for entry in ENTRIES}

#: Plans whose steps take seconds; the plain run leaves them to their smaller likes.
SLOW = {"paper strides", "anisotropic 28x64x56", "seven stages", "2d seven stages"}


def exported() -> set[str]:
    """Names of all networks that the package exports; it exports functions too."""
    things = {name: getattr(nnunet_h2a.networks, name) for name in nnunet_h2a.networks.__all__}
    return {name for name, thing in things.items() if isinstance(thing, type) and issubclass(thing, nn.Module)}


def matrix(
    plans: Iterable[str] = PLANS, plain: Iterable[str] | None = None, slow: Iterable[str] = ()
) -> pytest.MarkDecorator:
    """Parametrise a test with ``entry`` and ``plan``: every network with every plan.

    Args:
        plans: names of the plans.
        slow: networks that need ``make test-full`` with every plan.
        plain: those that run with ``make test``; the others need ``make test-full``. All but the slow ones if None.
    """
    plain = set(plans) - SLOW if plain is None else set(plain)
    return pytest.mark.parametrize(
        ("entry", "plan"),
        [
            pytest.param(
                entry,
                PLANS[name],
                id=f"{entry.name}-{name}",
                marks=[] if name in plain and entry.name not in slow else [pytest.mark.full],
            )
            for entry in ENTRIES
            for name in plans
        ],
    )


every_network = pytest.mark.parametrize("entry", ENTRIES, ids=REGISTRY)


def loss_of(outputs: Tensor | list[Tensor]) -> Tensor:
    """Touches every output's every class unevenly; logits of zero, as of an empty image, have gradients too."""
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return sum((k + 1) * (o.float() - 1).square().mean() for k, o in enumerate(outputs))
