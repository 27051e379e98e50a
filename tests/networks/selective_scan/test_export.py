"""The selective scan in exported graphs: one loop node of any length, with the recurrence's numbers."""

from __future__ import annotations

import warnings

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from nnunet_h2a.networks.selective_scan import dispatch, export, selective_scan
from nnunet_h2a.networks.selective_scan.export import export_scan
from tests.networks.selective_scan.cases import DELTAS, by_hand, make

INPUTS = ("u", "delta", "B", "C")


class Scans(nn.Module):
    """Two scans in a row, so that names of two loops could clash; A, D and the bias are the module's own."""

    def __init__(self, tensors, softplus):
        super().__init__()
        *_, self.A, _, _, self.D, self.bias = (None if t is None else nn.Buffer(t) for t in tensors)
        self.softplus = softplus

    def forward(self, u, delta, B, C):
        y = selective_scan(u, delta, self.A, B, C, self.D, self.bias, self.softplus)
        return selective_scan(y, delta, self.A, B, C, None, None, self.softplus)


def case(length, softplus=True, optional=True):
    delta = DELTAS["random"] if softplus else (lambda z: 0.1 * z.abs())
    tensors = make(2, 6, 3, length, 2, delta, optional=optional)
    expected = by_hand(by_hand(*tensors, softplus), *tensors[1:5], None, None, softplus)
    single = [None if t is None else t.float() for t in tensors]
    inputs = tuple(single[i] for i in (0, 1, 3, 4))
    return Scans(single, softplus).eval(), inputs, expected


def run(file, inputs):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)})
    return torch.from_numpy(y).double()


def kinds(file):
    """Operator of every node, without those in the loops' bodies."""
    return [node.op_type for node in onnx.load(file).graph.node]


@pytest.mark.parametrize(("softplus", "optional"), [(True, True), (False, False)])
@pytest.mark.parametrize("length", [1, 11])
def test_the_operator_is_the_recurrence_by_hand(length, softplus, optional):
    delta = DELTAS["random"] if softplus else (lambda z: 0.1 * z.abs())
    tensors = make(2, 6, 3, length, 2, delta, optional=optional)
    torch.testing.assert_close(export_scan(*tensors, softplus), by_hand(*tensors, softplus), atol=1e-12, rtol=1e-12)


def test_onnx_has_one_loop_for_each_scan_whatever_the_length(tmp_path):
    module, inputs, expected = case(37)
    file = tmp_path / "scans.onnx"
    torch.onnx.export(module, inputs, file, dynamo=True, verbose=False)
    torch.testing.assert_close(run(file, inputs), expected, atol=1e-5, rtol=1e-5)
    assert kinds(file).count("Scan") == 2
    assert len(kinds(file)) < 40


def test_onnx_with_a_batch_of_any_size(tmp_path):
    module, inputs, expected = case(7, softplus=False, optional=False)
    file = tmp_path / "batch.onnx"
    batch = {0: torch.export.Dim.DYNAMIC}
    torch.onnx.export(module, inputs, file, dynamo=True, verbose=False, dynamic_shapes=[batch] * 4)
    torch.testing.assert_close(run(file, inputs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(file, [t[:1] for t in inputs]), expected[:1], atol=1e-5, rtol=1e-5)


def test_the_exporter_by_tracing_unrolls(tmp_path):
    module, inputs, expected = case(4)
    file = tmp_path / "traced.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is on its way out, and says so
        torch.onnx.export(module, inputs, file, dynamo=False)
    torch.testing.assert_close(run(file, inputs), expected, atol=1e-5, rtol=1e-5)
    assert "Scan" not in kinds(file)


def test_an_exported_program_holds_the_loop():
    module, inputs, expected = case(6)
    program = torch.export.export(module, inputs)
    assert sum(node.target is torch.ops.higher_order.scan for node in program.graph.nodes) == 2
    torch.testing.assert_close(program.module()(*inputs).double(), expected, atol=1e-5, rtol=1e-5)


def test_older_releases_unroll(monkeypatch):
    monkeypatch.setattr(export, "FIRST_TORCH", "1000")
    module, inputs, _ = case(3)
    program = torch.export.export(module, inputs)
    assert all(node.target is not torch.ops.higher_order.scan for node in program.graph.nodes)


def test_a_backend_that_is_asked_for_is_exported(monkeypatch):
    monkeypatch.setenv(dispatch.SWITCH, "reference")
    module, inputs, _ = case(3)
    program = torch.export.export(module, inputs)
    assert all(node.target is not torch.ops.higher_order.scan for node in program.graph.nodes)
