"""Every network where it is used: compiled, trained by several processes, exported to ONNX."""

from __future__ import annotations

import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_h2a.widths import published_features
from tests.networks.plans import PLANS, Plan
from tests.networks.registry import ENTRIES, REGISTRY, Entry, every_network, loss_of, matrix

#: Two levels hold every kind of block and compile in a third of the time of four.
TOYS = {"3d": Plan((8, 8, 8), (2, 2), (1, 2)), "2d": Plan((16, 16), (2, 2), (1, 2))}

#: Sizes that a user would export first: five levels.
EXPORTED = {
    "64x64": Plan((64, 64), (4, 4, 8, 8, 8), (1, 2, 2, 2, 2)),
    "16x32x32": Plan((16, 32, 32), (4, 4, 8, 8, 8), (1, 2, 2, 2, 2)),
}

#: What the plain run exports, small; the full run exports every network at either size and at its published widths.
PLAIN_EXPORTS = {"H2ASeg": "16x32x32"}


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
# Tracing CIPA takes a minute.
@matrix(plain=("2d 36x44",), slow=("CIPA",))
def test_compiles_without_graph_breaks(entry, plan):
    network = entry.build(plan, deep_supervision=True)
    compiled = torch.compile(network, fullgraph=True, backend="eager")

    def run(module):
        # Stochastic depth must draw the same numbers in both.
        torch.manual_seed(2)
        return module(plan.input())

    for deep_supervision in (True, False):
        network.decoder.deep_supervision = deep_supervision
        torch.testing.assert_close(run(compiled), run(network))
    network.eval()
    torch.testing.assert_close(run(compiled), run(network))


class _Types(TorchDispatchMode):
    """Notes the types of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {item.dtype for item in tree_leaves(result) if isinstance(item, torch.Tensor)}
        return result


@every_network
@pytest.mark.parametrize("plan", TOYS.values(), ids=TOYS)
def test_no_tensor_is_float64(entry, plan):
    """Apple's GPUs (``-device mps``) have none, and on others it is slow."""
    network = entry.build(plan, deep_supervision=True)
    with _Types() as types:
        loss_of(network(plan.input())).backward()
    assert torch.float32 in types.seen
    assert not types.seen & {torch.float64, torch.complex128}


@pytest.mark.full
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("plan", TOYS.values(), ids=TOYS)
@every_network
def test_inductor(entry, plan):
    """Machine code, which takes a compiler one to five minutes; the plain run compiles the scan alone this far.

    In float64: rounding in float32 sends a value near the kink of a LeakyReLU to its other side now and then, and on
    maps as small as these one such voxel changes gradients by per cents.
    """
    network = entry.build(plan, deep_supervision=True).double()
    x = plan.input().double()
    expected, compiled = ({}, {})
    for module, gradients in ((network, expected), (torch.compile(network, fullgraph=True), compiled)):
        network.zero_grad()
        torch.manual_seed(2)
        # Generated code draws other random numbers than PyTorch's, unless told otherwise.
        with torch._inductor.config.patch(fallback_random=True):
            loss_of(module(x)).backward()
        gradients.update((name, parameter.grad.clone()) for name, parameter in network.named_parameters())
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(compiled[name], gradient, atol=1e-8 * largest, rtol=1e-6, msg=name)


def train(entry: Entry, rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Three steps on data of this rank's own: the parameters before and after."""
    plan = PLANS["three stages"]
    network = entry.build(plan, deep_supervision=True)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    parallel = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(parallel(plan.input(seed=10 * rank + step))).backward()
        optimizer.step()
    return before, [parameter.detach() for parameter in network.parameters()]


def worker(rank: int, folder: Path) -> None:
    """One of two processes; it trains the networks one after the other, so that they share the start-up."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    for name, entry in REGISTRY.items():
        try:
            result = train(entry, rank)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}_{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(worker, (folder,), nprocs=2)
    return folder


@every_network
def test_two_processes_train_one_network(entry, trained):
    """Without find_unused_parameters: every parameter takes part in every step, with all outputs in the loss."""
    results = [torch.load(trained / f"{entry.name}_{rank}") for rank in (0, 1)]
    for result in results:
        assert not isinstance(result, str), result
    (before, ours), (_, theirs) = results
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in ours)
    assert not all(torch.equal(a, b) for a, b in zip(before, ours, strict=True))


def count_nodes(graph: onnx.GraphProto) -> int:
    """Nodes of a graph and of the bodies of its loops."""
    bodies = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return len(graph.node) + sum(map(count_nodes, bodies))


def check_export(network: nn.Module, plan: Plan, file: Path, **options: Any) -> tuple[int, int]:
    """Export, run with onnxruntime, compare with PyTorch; returns opset and number of nodes."""
    network.eval()
    x = plan.input(batch=1)
    with torch.no_grad():
        expected = network(x)
    torch.onnx.export(network, (x,), file, dynamo=True, verbose=False, **options)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # A fresh network's logits may be small, and then so is what they may differ by.
    tolerance = 1e-3 * min(1, expected.std().item())
    assert tolerance > 0
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=tolerance, rtol=0)
    onnx.checker.check_model(str(file))
    model = onnx.load(file, load_external_data=False)
    (opset,) = model.opset_import
    assert opset.domain == "", "needs operators that are not ONNX's own"
    return opset.version, count_nodes(model.graph)


@pytest.mark.parametrize(
    ("entry", "size"),
    [
        pytest.param(
            entry,
            size,
            id=f"{entry.name}-{size}",
            marks=[] if PLAIN_EXPORTS.get(entry.name) == size else pytest.mark.full,
        )
        for entry in ENTRIES
        for size in EXPORTED
    ],
)
def test_onnx(entry, size, tmp_path):
    """In 2D without the exporter's optimisation, which takes most of its time and is checked in the test below.

    In 3D it cannot be left out: without it a convolution without bias gets one of the wrong shape (PyTorch 2.15).
    """
    plan, optimize = EXPORTED[size], size == "16x32x32"
    opset, _ = check_export(entry.build(plan), plan, tmp_path / "network.onnx", optimize=optimize)
    assert opset >= 18


@pytest.mark.full
@pytest.mark.parametrize("size", EXPORTED)
@every_network
def test_onnx_of_the_published_network(entry, size, tmp_path):
    """The figures that docs/onnx.md states; a scan that is unrolled would have tens of thousands of nodes."""
    plan = replace(EXPORTED[size], features=published_features(entry.name, 5))
    torch.manual_seed(0)
    network = entry.network(**plan.keywords())
    network.apply(network.initialize)
    opset, nodes = check_export(network, plan, tmp_path / "network.onnx")
    print(f"{entry.name} {size}: opset {opset}, {nodes} nodes")
    assert nodes < 10_000
