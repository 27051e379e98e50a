"""The memory of a training step, counted without computing it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from nnunet_h2a.networks import CIPA, H2ASeg, ISANet
from nnunet_h2a.planning.memory import GIB, OPTIMISER_BYTES, StepMemory, count_step
from tests.conftest import ROOT

CASES = {
    "H2ASeg 3D": (H2ASeg, (16, 32, 32), (4, 8, 16)),
    "ISANet 3D": (ISANet, (16, 32, 32), (4, 8, 16)),
    "CIPA 2D": (CIPA, (64, 64), (4, 8, 16)),
}


def builder(cls, patch, features):
    conv_op = nn.Conv3d if len(patch) == 3 else nn.Conv2d
    options = {"widths": [8, 16, 16, 32]} if cls is CIPA else {}
    return lambda: cls(
        input_channels=2, n_stages=3, features_per_stage=list(features), conv_op=conv_op, kernel_sizes=3,
        strides=[1, 2, 2], num_classes=2, deep_supervision=True, patch_size=list(patch), **options,
    )  # fmt: skip


def really_kept(network, images):
    """Bytes of weights, images, outputs and what autograd keeps, with real tensors, by autograd's own hooks."""
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = network(images)
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        loss = sum(output.float().softmax(1).square().mean() for output in outputs)
    for tensor in (*network.parameters(), *network.buffers(), images, *outputs, loss):
        note(tensor)
    return sum(storages.values())


@pytest.mark.parametrize(("cls", "patch", "features"), CASES.values(), ids=CASES)
def test_counted_is_kept(cls, patch, features):
    torch.manual_seed(0)
    build = builder(cls, patch, features)
    counted = count_step(build, patch, 2, amp=False)
    network = build()
    assert counted.parameters == sum(p.numel() for p in network.parameters())
    real = really_kept(network, torch.randn(2, 2, *patch))
    assert counted.kept == pytest.approx(real, rel=0.05)
    assert counted.beyond > 0


@pytest.mark.parametrize(("cls", "patch", "features"), CASES.values(), ids=CASES)
def test_half_precision_is_what_autocast_keeps(cls, patch, features):
    """The CPU's autocast, which can run here, leaves other operations in float32 than a GPU's: hence the 20 %."""
    build = builder(cls, patch, features)
    counted = count_step(build, patch, 2)
    torch.manual_seed(0)
    network = build()
    with torch.autocast("cpu", torch.bfloat16):
        real = really_kept(network, torch.randn(2, 2, *patch))
    assert counted.kept == pytest.approx(real, rel=0.2)


@pytest.mark.parametrize(
    ("cls", "patch", "features"),
    [pytest.param(*case, id=name, marks=[] if "H2A" in name else pytest.mark.full) for name, case in CASES.items()],
)
def test_half_precision_keeps_less_and_more_patches_more(cls, patch, features):
    build = builder(cls, patch, features)
    one, three = (count_step(build, patch, batch, amp=False) for batch in (1, 3))
    half = count_step(build, patch, 3)
    assert half.parameters == one.parameters == three.parameters
    patches = [(item.kept - item.weights) for item in (one, three)]
    assert patches[1] == pytest.approx(3 * patches[0], rel=0.1)
    # CIPA's scans are float32 whatever autocast says.
    assert half.kept - half.weights < (1.02 if cls is CIPA else 0.7) * patches[1]
    assert not torch.is_autocast_enabled("cuda")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("network", "patch", "batch"),
    [
        pytest.param("H2ASeg", "32x48x64", 2, marks=pytest.mark.full),
        pytest.param("ISANet", "32x48x64", 2, marks=pytest.mark.full),
        pytest.param("CIPA", "32x48x48", 1, marks=pytest.mark.full),
        pytest.param("CIPA", "96x128", 3, marks=pytest.mark.full),
        pytest.param("stock", "48x64x64", 2, marks=pytest.mark.full),
    ],
)
def test_the_peak_of_real_training_steps_is_predicted(monkeypatch, network, patch, batch):
    """The process's peak memory in float32 on the CPU, whose libraries take about 0.2 GiB for themselves."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory

    counted, found = (memory.child([network, patch, str(batch), what]) for what in ("count", "measure"))
    assert counted["tensors"] + 0.2 * GIB == pytest.approx(found["peak"], rel=0.15)


def test_gpu_memory_is_more_than_the_tensors_and_grows_with_voxels():
    step = StepMemory(parameters=10**6, weights=4 * 10**6, kept=104 * 10**6, beyond=30 * 10**6)
    assert step.tensors == 134 * 10**6 + OPTIMISER_BYTES * 10**6
    assert step.peak > step.tensors
    twice = step.scaled(2)
    assert (twice.weights, twice.kept) == (step.weights, 204 * 10**6)
    assert twice.beyond == 4 * 10**6 + 2 * 26 * 10**6
    # Where little is kept, the optimiser's own step is the peak: weights, gradients and as much again.
    tiny = StepMemory(parameters=10**6, weights=4 * 10**6, kept=5 * 10**6, beyond=4 * 10**6)
    assert tiny.tensors == (4 + 4 + 4) * 10**6 + OPTIMISER_BYTES * 10**6
