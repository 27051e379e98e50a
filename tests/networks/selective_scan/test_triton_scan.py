"""The Triton backend: its numbers in Triton's interpreter and, where there is one, on a GPU; its refusals."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnunet_h2a.networks.selective_scan import selective_scan, triton_scan
from tests.networks.selective_scan.triton_cases import CASES, KERNELS

ROOT = Path(__file__).resolve().parents[3]

triton = pytest.importorskip("triton", reason="Triton is not installed (it comes with PyTorch on Linux)")


@functools.cache
def outcomes(device: str) -> dict[str, dict]:
    """Every case's outcome, from one process: Triton must know before it is loaded whether it interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if device == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    place = "cpu" if device == "interpreter" else "cuda"
    program = f"from tests.networks.selective_scan.triton_cases import main; main({place!r})"
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-5000:]
    found = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith('{"case"')]
    return {outcome["case"]: outcome for outcome in found}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", ["interpreter", "cuda"])
def test_case(device, case):
    """See ``triton_cases``."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernels ran in Triton's interpreter only")
    outcome = outcomes(device)[case]
    assert "failure" not in outcome, outcome["failure"]
    for what, number in outcome["numbers"].items():
        # NaN fails, too.
        assert number <= CASES[case][1], f"{what}: {number}"


def kernels():
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("TRITON_INTERPRET is set: the kernels are not Triton's to compile")
    from nnunet_h2a.networks.selective_scan import triton_kernels

    return triton_kernels


@pytest.mark.parametrize("kernel", ["_forward_kernel", "_adjoint_kernel", "_gradient_kernel"])
@pytest.mark.parametrize(
    ("architecture", "inputs", "kind", "states", "length", "optional"),
    [(80, "fp32", "fp32", 16, 4096, True), (90, "bf16", "fp32", 3, 9, False), (90, "fp64", "fp64", 4, 100, True)],
)
def test_kernels_compile_for_nvidia_without_a_gpu(
    kernel, architecture, inputs, kind, states, length, optional, tmp_path, monkeypatch
):
    """The interpreter accepts more than the compiler; this needs neither a GPU nor a driver."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(kernels(), kernel)
    chunk = triton_scan.chunk_length(length, states)
    constants = kernels()._constants(torch.float64 if kind == "fp64" else torch.float32, states, chunk, True)
    warps = constants.pop("num_warps")
    constants |= {"SLICE": 64} if kernel == "_gradient_kernel" else {}
    parameters = {"A_ptr", "D_ptr", "bias_ptr", "starts_ptr", "ends_ptr", "dA_ptr", "dB_ptr", "dC_ptr", "dD_ptr"}
    parameters |= {"dbias_ptr"}
    signature = {}
    for name in function.arg_names:
        if name in ("D_ptr", "bias_ptr", "dD_ptr", "dbias_ptr") and not optional:
            constants[name] = None
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{kind if name in parameters else inputs}"
        else:
            signature[name] = "i32"
    compiled = triton.compile(
        triton.compiler.ASTSource(function, signature, constexprs=constants),
        target=triton.backends.compiler.GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps},
    )
    assert compiled.asm["cubin"]
    # Sums by atomic additions would make runs differ.
    assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])


def test_tiles_are_powers_of_two_that_fit():
    for states in (1, 3, 4, 16, 100, 256, 1000):
        for length in (1, 7, 16, 17, 64, 65, 16384):
            chunk = triton_scan.chunk_length(length, states)
            assert chunk in (16, 32, 64, 128)
            assert chunk == 16 or (chunk < 2 * length and chunk * states <= 1024)
    assert triton_scan.chunk_length(16384, 16) == 64
    assert triton_scan.chunk_length(16, 16) == 16


@pytest.fixture
def _forget():
    """Each of these tests asks anew, and leaves no answer behind."""
    triton_scan._why_not_once.cache_clear()
    yield
    triton_scan._why_not_once.cache_clear()


CUDA = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)


@pytest.mark.usefixtures("_forget")
class TestWhyNot:
    def test_a_cpu_tensor_is_refused_with_the_cure(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert "'chunked'" in triton_scan.why_not(torch.zeros(1))
        inputs = [torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1), *torch.zeros(2, 1, 1, 1, 1)]
        with pytest.raises(RuntimeError, match="'triton' does not work here: it needs tensors on a CUDA device"):
            selective_scan(*inputs, backend="triton")

    def test_a_type_without_fractions_is_refused(self):
        assert "int32" in triton_scan.why_not(torch.zeros(1, dtype=torch.int32))

    @pytest.mark.parametrize("module", ["triton", "triton.language"])
    def test_a_missing_triton_is_named(self, monkeypatch, module):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, KERNELS, raising=False)
        monkeypatch.delattr("nnunet_h2a.networks.selective_scan.triton_kernels", raising=False)
        problem = triton_scan.why_not(CUDA)
        assert "Triton cannot be loaded (ModuleNotFoundError" in problem
        assert "install" in problem

    def test_an_interpreter_switched_on_too_late_is_named(self, monkeypatch):
        kernels()
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert "before Python starts" in triton_scan.why_not(torch.zeros(1))

    def test_a_failing_device_is_found_once_and_logged(self, monkeypatch, caplog):
        kernels()
        asked = []

        def failing(*inputs):
            asked.append(inputs)
            raise OSError("no kernel image\nis available")

        monkeypatch.setattr(KERNELS + ".forward", failing)
        # Where there is no GPU the trial ends before it reaches the kernel.
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
        with caplog.at_level("WARNING"):
            problems = [triton_scan.why_not(CUDA) for _ in range(3)]
        assert len(asked) == 1
        assert problems[0] == problems[2]
        assert "OSError: no kernel image is available" in problems[0]
        assert "C compiler" in problems[0]
        assert [record.levelname for record in caplog.records] == ["WARNING"]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
    def test_a_cuda_tensor_where_there_is_no_driver_is_an_answer_and_no_error(self):
        kernels()
        assert "trial run failed" in triton_scan.why_not(CUDA)
