"""How much GPU memory a training step takes, counted without a GPU.

The step's forward pass runs on fake CUDA tensors under autocast: shapes and types are PyTorch's own, nothing is
computed. Whatever is alive afterwards is what autograd keeps for the backward pass. What the backward pass takes beyond
that is counted on fake CPU tensors, because PyTorch's engine needs a driver to go backwards on CUDA ones.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_h2a.networks.selective_scan.dispatch import SWITCH

GIB = 2**30

#: Bytes that PyTorch's allocator rounds to.
_BLOCK = 512

#: PROVISIONAL, until they are measured on GPUs with benchmarks/memory.py: what CUDA and its libraries take for
#: themselves, and by how much a step's peak exceeds the tensors that are counted (workspaces of convolutions, blocks
#: that the allocator cannot use again).
CUDA_CONTEXT = 0.8 * GIB
OVERHEAD = 1.15

#: Adam's two averages of each parameter, float32.
OPTIMISER_BYTES = 8


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step, the optimiser's state not counted.

    Attributes:
        parameters: number of the network's parameters.
        weights: bytes of parameters and buffers.
        kept: bytes alive after the forward pass: weights, images and what autograd keeps.
        beyond: bytes that the backward pass takes at its peak beyond those, gradients included.
    """

    parameters: int
    weights: int
    kept: int
    beyond: int

    @property
    def tensors(self) -> int:
        """Bytes of all tensors at the step's peak: in the backward pass, or where Adam steps with what it needs."""
        gradients = adam = 4 * self.parameters
        return max(self.kept + self.beyond, self.weights + gradients + adam) + OPTIMISER_BYTES * self.parameters

    @property
    def peak(self) -> int:
        """Bytes of GPU memory, by constants that are provisional (:data:`OVERHEAD`, :data:`CUDA_CONTEXT`)."""
        return int(self.tensors * OVERHEAD + CUDA_CONTEXT)

    def scaled(self, factor: float) -> StepMemory:
        """For ``factor`` times as many voxels per step: what is not weights, gradients or the optimiser's grows so."""
        gradients = min(self.beyond, 4 * self.parameters)
        return StepMemory(
            self.parameters,
            self.weights,
            self.weights + round((self.kept - self.weights) * factor),
            gradients + round((self.beyond - gradients) * factor),
        )


class _Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor):
                self._take(item.untyped_storage())
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed(_: weakref.ref) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)


class _FusedAttention(torch.autograd.Function):
    """The shapes that a fused attention kernel makes and keeps; without a GPU PyTorch would count n x n weights."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


class _WithFusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            if torch.is_autocast_enabled(query.device.type):
                kind = torch.get_autocast_dtype(query.device.type)
                query, key, value = query.to(kind), key.to(kind), value.to(kind)
            return _FusedAttention.apply(query, key, value)
        return func(*args, **(kwargs or {}))


@contextmanager
def _plain_scan() -> Iterator[None]:
    """The scan in PyTorch: on a GPU Triton's keeps the same tensors, and it would ask for a real one here."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "chunked"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


@contextmanager
def _half_precision(device: str) -> Iterator[None]:
    """Autocast to float16 for a device that need not be there."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.float16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def count_step(
    build: Callable[[], nn.Module], patch_size: Sequence[int], batch_size: int, channels: int = 2, amp: bool = True
) -> StepMemory:
    """Count the memory of a training step with nnU-Net's kind of loss on every output.

    Args:
        build: makes the network.
        patch_size: voxels.
        batch_size: patches per step.
        channels: of the input.
        amp: half precision as nnU-Net uses it on a GPU.
    """
    kept, peaks, weights, parameters = {}, {}, 0, 0
    for device in ("cuda", "cpu") if amp else ("cpu",):
        with _plain_scan(), FakeTensorMode(), _Alive() as alive, _WithFusedAttention(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device(device):
                network = build()
                images = torch.empty(batch_size, channels, *patch_size)
                parameters = sum(p.numel() for p in network.parameters())
                weights = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
                with _half_precision(device) if amp else torch.autocast(device, enabled=False):
                    outputs = network(images)
                    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
                    loss = sum(output.float().softmax(1).square().mean() for output in outputs)
            kept[device] = alive.now
            if device == "cpu":
                loss.backward()
                peaks[device] = alive.peak
            del network, images, outputs, loss
    on_gpu = kept.get("cuda", kept["cpu"])
    return StepMemory(parameters, weights, on_gpu, max(0, peaks["cpu"] - kept["cpu"]))
