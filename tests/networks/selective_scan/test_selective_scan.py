"""The selective scan: the recurrence by hand, the chunked backend against it, and which backend is taken."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from nnunet_h2a.networks.selective_scan import chunked, dispatch, selective_scan
from nnunet_h2a.networks.selective_scan.chunked import CHUNK, chunked_scan
from nnunet_h2a.networks.selective_scan.reference import reference_scan
from tests.networks.selective_scan.cases import DELTAS, assert_same, by_hand, make, values_and_gradients

#: batch, d, N, L, groups: one step, a prime, whole and broken chunks, one and several groups, N not a power of two.
SIZES = [(2, 4, 3, 1, 2), (1, 6, 4, 37, 3), (2, 8, 16, CHUNK, 4), (1, 4, 3, 2 * CHUNK, 1), (1, 6, 5, 3 * CHUNK + 7, 2)]


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("optional", [True, False])
def test_reference_is_the_recurrence_by_hand(softplus, optional):
    delta = DELTAS["random"] if softplus else (lambda z: 0.1 * z.abs())
    tensors = make(2, 4, 3, 9, 2, delta, optional=optional)
    torch.testing.assert_close(reference_scan(*tensors, softplus), by_hand(*tensors, softplus), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("softplus", [True, False])
def test_chunked_equals_reference_in_float64(size, optional, softplus):
    delta = DELTAS["random"] if softplus else (lambda z: 0.1 * z.abs())
    tensors = make(*size, delta, optional=optional)
    expected = values_and_gradients(reference_scan, tensors, softplus)
    assert_same(values_and_gradients(chunked_scan, tensors, softplus), expected, 1e-12)


@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS)
@pytest.mark.parametrize("size", SIZES)
def test_chunked_equals_reference_in_float32(size, delta):
    tensors = make(*size, delta, dtype=torch.float32)
    assert_same(values_and_gradients(chunked_scan, tensors), values_and_gradients(reference_scan, tensors), 1e-5)


@pytest.mark.parametrize("room", [1, 500, 5000])
def test_tiles_of_any_size_give_the_same(room, monkeypatch):
    tensors = make(5, 72, 4, 2 * CHUNK + 3, 2)
    expected = values_and_gradients(reference_scan, tensors)
    monkeypatch.setitem(chunked.TILE_NUMBERS, "cpu", room * CHUNK)
    assert_same(values_and_gradients(chunked_scan, tensors), expected, 1e-12)


def test_gradients_by_finite_differences():
    tensors = [t.requires_grad_() for t in make(2, 4, 2, 5, 2)]
    assert torch.autograd.gradcheck(lambda *t: chunked_scan(*t, True), tensors)
    torch.manual_seed(0)
    long = [t.requires_grad_() for t in make(1, 2, 2, CHUNK + 3, 1)]
    assert torch.autograd.gradcheck(lambda *t: chunked_scan(*t, True), long, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_is_float32_for_half_inputs(dtype):
    """A slowly decaying state sums many small steps: in half precision most of them would be lost."""
    tensors = make(1, 4, 2, 1500, 1, lambda z: z - 6, dtype=dtype)
    exact = reference_scan(*(t.double() for t in tensors), True)
    y = chunked_scan(*tensors, True)
    assert y.dtype == dtype
    # One rounding of the result, and nothing more.
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    gradients = values_and_gradients(chunked_scan, tensors)
    expected = values_and_gradients(reference_scan, [t.double() for t in tensors])
    for name, value in gradients.items():
        assert value.dtype == dtype
        assert (value.double() - expected[name]).abs().max() <= 4 * torch.finfo(dtype).eps * expected[name].abs().max()


def test_autocast_does_not_touch_the_scan():
    tensors = make(1, 4, 3, 20, 2, dtype=torch.float32)
    expected = selective_scan(*tensors, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan(*tensors, True), expected)


def test_half_images_with_float32_parameters():
    tensors = make(1, 4, 3, 20, 2, dtype=torch.float32)
    mixed = [t.half() if k in (0, 1, 3, 4) else t for k, t in enumerate(tensors)]
    gradients = values_and_gradients(chunked_scan, mixed)
    assert gradients["y"].dtype == gradients["dB"].dtype == torch.float16
    assert gradients["dA"].dtype == gradients["ddelta_bias"].dtype == torch.float32
    assert (gradients["dA"] - values_and_gradients(reference_scan, tensors)["dA"]).abs().max() < 0.05


def test_inputs_with_any_strides():
    u, *others = make(2, 6, 3, 20, 2)
    turned = u.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    flipped = [m if m is None else m.flip(0).flip(0) for m in others]
    assert not turned.is_contiguous()
    torch.testing.assert_close(chunked_scan(turned, *flipped, True), reference_scan(u, *others, True))


def test_only_the_gradients_that_are_asked_for():
    tensors = make(1, 4, 3, 20, 2)
    tensors[1].requires_grad_()
    chunked_scan(*tensors, True).sum().backward()
    assert tensors[1].grad is not None
    assert all(t.grad is None for k, t in enumerate(tensors) if k != 1)


def test_inference_keeps_no_states():
    tensors = make(1, 4, 3, 20, 2)
    assert torch.ops.nnunet_h2a.selective_scan_chunked(*tensors, True, False)[1].numel() == 0
    tensors[0].requires_grad_()
    with torch.no_grad():
        assert chunked_scan(*tensors, True).grad_fn is None


def test_operators_are_registered_properly():
    tensors = [t.requires_grad_() for t in make(2, 4, 3, CHUNK + 2, 2)]
    torch.library.opcheck(torch.ops.nnunet_h2a.selective_scan_chunked.default, (*tensors, True, True))
    tensors = [t.requires_grad_() for t in make(1, 4, 3, 5, 2, optional=False)[:5]]
    torch.library.opcheck(torch.ops.nnunet_h2a.selective_scan_chunked.default, (*tensors, None, None, True, True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiles_as_one_graph(backend):
    tensors = make(2, 4, 3, CHUNK + 5, 2, dtype=torch.float32)

    def network(*t):
        return selective_scan(t[0].sin(), *t[1:], True).cos()

    compiled = torch.compile(network, fullgraph=True, backend=backend)
    result = values_and_gradients(lambda *t: compiled(*t[:-1]), tensors)
    assert_same(result, values_and_gradients(lambda *t: network(*t[:-1]), tensors), 1e-5)
    torch._dynamo.reset()


MEMORY = """
import resource, sys, torch
from nnunet_h2a.networks.selective_scan.chunked import chunked_scan
def scan(d, n, length):
    t = [torch.randn(1, d, length), torch.randn(1, d, length) - 3, -torch.rand(d, n), torch.randn(1, 2, n, length),
         torch.randn(1, 2, n, length)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chunked_scan(*(x.requires_grad_() for x in t), None, None, True).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
scan(16, 4, 80)
print(scan(512, 16, 2048) * (1024 if sys.platform == "linux" else 1))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module on Windows")
def test_memory_is_that_of_inputs_and_kept_states():
    finished = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    inputs, everything = 4 * 512 * 2048, 4 * 512 * 16 * 2048
    # y and the gradients of y, u and delta, the states of 32 chunks, some tiles; an array of d N L is 67 MB.
    assert int(finished.stdout) < 4 * inputs + everything // CHUNK + 24e6 < everything


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(4, 20)}, r"`u` must be \(batch, d, L\)"),
        ({"u": torch.zeros(1, 4, 0)}, "no step"),
        ({"delta": torch.zeros(1, 4, 19)}, r"`delta` must have shape \(1, 4, 20\), got \(1, 4, 19\)"),
        ({"A": torch.zeros(3, 3)}, "`A` must be"),
        ({"B": torch.zeros(1, 3, 3, 20)}, "`B` must be .* divisor of d = 4"),
        ({"C": torch.zeros(1, 2, 4, 20)}, "`C` must have shape"),
        ({"D": torch.zeros(3)}, "`D` must have shape"),
        ({"delta_bias": torch.zeros(4, 1)}, "`delta_bias` must have shape"),
        ({"backend": "cuda"}, "`backend` .* got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(zip(("u", "delta", "A", "B", "C", "D", "delta_bias"), make(1, 4, 3, 20, 2), strict=True))
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**arguments, **change})


@pytest.fixture
def taken(monkeypatch):
    """Names of the backends that ran."""
    ran = []
    for name in ("reference", "chunked"):
        scan = getattr(dispatch, f"{name}_scan")
        monkeypatch.setattr(dispatch, f"{name}_scan", lambda *a, s=scan, n=name: ran.append(n) or s(*a))
    dispatch._say_once.cache_clear()
    return ran


def test_argument_beats_variable_beats_choice(taken, monkeypatch):
    tensors = make(1, 4, 3, 5, 2)
    selective_scan(*tensors, True)
    monkeypatch.setenv(dispatch.SWITCH, "reference")
    selective_scan(*tensors, True)
    selective_scan(*tensors, True, backend="chunked")
    assert taken == ["chunked", "reference", "chunked"]
    monkeypatch.setenv(dispatch.SWITCH, "fast")
    with pytest.raises(ValueError, match=r"NNUNET_H2A_SCAN.*got 'fast'"):
        selective_scan(*tensors, True)


def test_auto_says_once_what_it_took(taken, caplog):
    tensors = make(1, 4, 3, 5, 2)
    with caplog.at_level(logging.INFO, logger="nnunet_h2a"):
        for _ in range(3):
            selective_scan(*tensors, True)
    assert [r.getMessage() for r in caplog.records].count(caplog.records[0].getMessage()) == len(caplog.records) == 1
    assert "chunked" in caplog.text


def test_auto_says_it_in_a_compiled_network_too(taken, caplog):
    tensors = make(1, 4, 3, 5, 2)
    compiled = torch.compile(lambda *t: selective_scan(*t, True), fullgraph=True, backend="eager")
    with caplog.at_level(logging.INFO, logger="nnunet_h2a"):
        for _ in range(2):
            compiled(*tensors)
    assert [r.levelname for r in caplog.records if "backend chunked" in r.getMessage()] == ["INFO"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.ones(1, 4, 5, dtype=torch.int64)}, "`u` must be of a floating-point type"),
        ({"A": torch.ones(4, 0)}, "N at least 1"),
        ({"B": torch.ones(1, 0, 3, 5)}, "`B` must be"),
    ],
)
def test_tensors_without_a_scan_are_named(change, message):
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    with pytest.raises(ValueError, match=message):
        selective_scan(**dict(zip(names, make(1, 4, 3, 5, 1), strict=True)) | change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the kernels work")
@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_a_backend_that_cannot_work_says_why(backend):
    with pytest.raises(RuntimeError, match=f"'{backend}' does not work here: .*CUDA"):
        selective_scan(*make(1, 4, 3, 5, 2), True, backend=backend)
