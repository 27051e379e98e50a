"""The backend that calls the user's mamba_ssm.

mamba_ssm is no dependency and is not run here: stand-ins for it are imported, and the one whose results are looked at
computes the recurrence itself after checking its arguments as mamba_ssm's compiled code does. Whether mamba_ssm's own
numbers are right is not tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from nnunet_h2a.networks.selective_scan import mamba, selective_scan
from nnunet_h2a.networks.selective_scan.reference import reference_scan

ROOT = Path(__file__).resolve().parents[3]

INTERFACE = "mamba_ssm/ops/selective_scan_interface.py"


def on_cuda(dtype=torch.float32):
    """All that ``why_not`` looks at, for machines without a GPU."""
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)


#: Files of an installation and what must stand in the answer; None for no objection.
INSTALLATIONS = {
    "none": ({}, ["mamba_ssm, or a package that it needs, is not installed", "No module named 'mamba_ssm'", "pip"]),
    "without the compiled scan": (
        # From the release on that leaves it out, the interface can be imported all the same.
        {INTERFACE: "selective_scan_cuda = None\nselective_scan_fn = print\n"},
        ["compiled Mamba-1 scan (selective_scan_cuda) is not installed", "MAMBA_KEEP_CUDA_BUILD=TRUE", "auto"],
    ),
    "older, without the compiled scan": (
        {INTERFACE: "import selective_scan_cuda\nselective_scan_fn = print\n"},
        ["compiled Mamba-1 scan (selective_scan_cuda) is not installed"],
    ),
    "built for another PyTorch": (
        {
            INTERFACE: "selective_scan_fn = print\n",
            "selective_scan_cuda.py": "raise ImportError('undefined symbol: _Z')",
        },
        ["cannot be loaded (ImportError: undefined symbol: _Z)", "build it for this PyTorch"],
    ),
    "without a package that it needs": (
        {INTERFACE: "import einops_of_nobody\n", "selective_scan_cuda.py": ""},
        ["No module named 'einops_of_nobody'"],
    ),
    "of another interface": ({INTERFACE: "", "selective_scan_cuda.py": ""}, ["AttributeError", "selective_scan_fn"]),
    "whole": ({INTERFACE: "selective_scan_fn = print\n", "selective_scan_cuda.py": ""}, None),
}


@pytest.fixture
def _forget():
    """Each of these tests asks anew, and leaves no answer behind."""
    mamba._load.cache_clear()
    yield
    mamba._load.cache_clear()


@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize("name", INSTALLATIONS)
def test_installations_are_told_apart(name, tmp_path, monkeypatch):
    files, expected = INSTALLATIONS[name]
    for module in [m for m in sys.modules if m.split(".")[0] in ("mamba_ssm", "selective_scan_cuda")]:
        monkeypatch.delitem(sys.modules, module)
    # Hides an installation that this machine may have.
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p) / "mamba_ssm").exists())])
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    before = set(sys.modules)
    try:
        problem = mamba.why_not(on_cuda())
        assert mamba.why_not(on_cuda()) == problem
    finally:
        for module in set(sys.modules) - before:
            del sys.modules[module]
    if expected is None:
        assert problem is None
    else:
        assert all(part in problem for part in expected), problem
        with pytest.raises(RuntimeError, match="mamba_ssm does not work here"):
            mamba.scan(*arguments())


def test_cpu_tensors_and_float64_are_refused_with_the_cure():
    assert "'chunked'" in mamba.why_not(torch.zeros(1))
    assert "float64" in mamba.why_not(on_cuda(torch.float64))
    with pytest.raises(RuntimeError, match="'mamba_ssm' does not work here: it needs tensors on a CUDA device"):
        selective_scan(*arguments(), backend="mamba_ssm")


def test_nothing_of_mamba_ssm_is_loaded_before_it_is_asked_for(tmp_path):
    (tmp_path / "mamba_ssm.py").write_text("raise SystemExit('mamba_ssm was loaded')")
    (tmp_path / "selective_scan_cuda.py").write_text("raise SystemExit('selective_scan_cuda was loaded')")
    program = (
        "import torch; from nnunet_h2a.networks.selective_scan import selective_scan;"
        "selective_scan(*torch.zeros(2, 1, 1, 1), torch.zeros(1, 1), *torch.zeros(2, 1, 1, 1, 1))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def arguments(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    batch, channels, groups, states, length = 2, 4, 2, 3, 5

    def normal(*shape):
        # Not contiguous, as a permuted feature map is not.
        return torch.randn(*shape[::-1], generator=generator).to(dtype).permute(*reversed(range(len(shape))))

    u, delta = normal(batch, channels, length), normal(batch, channels, length)
    return [u, delta, -normal(channels, states).abs(), *(normal(batch, groups, states, length) for _ in range(2)),
            normal(channels), normal(channels)]  # fmt: skip


@pytest.fixture
def stand_in(_forget, monkeypatch):
    """A mamba_ssm whose function asks of its arguments what the compiled one asks, but for the device."""
    seen = []

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        seen.append({"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias})
        assert u.dtype in (torch.float32, torch.float16, torch.bfloat16)
        assert delta.dtype == B.dtype == C.dtype == u.dtype
        assert all(x.stride(-1) == 1 for x in (u, delta, B, C))
        for parameter in (A, D, delta_bias):
            assert parameter is None or (parameter.dtype == torch.float32 and parameter.is_contiguous())
        assert z is None
        assert return_last_state is False
        return reference_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)

    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops", "selective_scan_cuda"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    assert mamba.why_not(on_cuda()) is None
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_one_type_go_in_as_they_are(stand_in, dtype):
    inputs = arguments(dtype)
    y = mamba.scan(*inputs, True)
    assert y.dtype == dtype
    assert stand_in[0]["u"].dtype == dtype
    torch.testing.assert_close(y, reference_scan(*inputs, True))
    for name, tensor in zip(stand_in[0], inputs, strict=True):
        torch.testing.assert_close(stand_in[0][name], tensor, check_dtype=False, check_stride=False, atol=0, rtol=0)


def test_tensors_of_several_types_go_in_as_float32_and_gradients_come_back_in_theirs(stand_in):
    inputs = arguments()
    inputs[0], inputs[3] = inputs[0].half(), inputs[3].bfloat16()
    inputs[5] = inputs[5].half()
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = mamba.scan(*inputs, True)
    assert y.dtype == torch.float16
    assert stand_in[0]["u"].dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference_scan(*exact, True)
    torch.testing.assert_close(y.double(), expected, atol=2e-3, rtol=2e-3)
    gradients = torch.autograd.grad(y.sum(), inputs)
    for gradient, right, x in zip(gradients, torch.autograd.grad(expected.sum(), exact), inputs, strict=True):
        assert gradient.dtype == x.dtype
        torch.testing.assert_close(gradient.double(), right, atol=2e-2, rtol=2e-2)


def test_options_may_be_left_out(stand_in):
    inputs = [*arguments()[:5], None, None]
    inputs[1] = inputs[1].abs()
    torch.testing.assert_close(mamba.scan(*inputs), reference_scan(*inputs))
    assert stand_in[0]["D"] is None
    assert stand_in[0]["delta_bias"] is None


def test_more_states_than_its_kernels_take_are_refused(stand_in):
    inputs = arguments()[:5]
    A = -torch.ones(4, 257)
    matrices = torch.ones(2, 2, 257, 5)
    with pytest.raises(RuntimeError, match="at most 256 states, got 257"):
        mamba.scan(inputs[0], inputs[1], A, matrices, matrices)
    assert not stand_in
