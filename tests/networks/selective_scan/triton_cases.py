"""What the Triton backend must compute, to be run in a process of its own: Triton decides at import how it runs.

Every case returns numbers for ``test_triton_scan`` to judge: relative errors against :func:`transcribed`, or 0.0 and
1.0 for what holds and what does not.
"""

from __future__ import annotations

import json
import sys
import time
import traceback

import torch
from torch.nn.functional import softplus

from nnunet_h2a.networks.selective_scan import selective_scan, triton_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
KERNELS = "nnunet_h2a.networks.selective_scan.triton_kernels"


def transcribed(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """The recurrence in float64, channel by channel and step by step."""
    u, delta, A, B, C = (x.double() for x in (u, delta, A, B, C))
    batch, channels, length = u.shape
    width = channels // B.shape[1]
    rows = []
    for sample in range(batch):
        for channel in range(channels):
            h = torch.zeros(A.shape[1], dtype=torch.float64)
            for t in range(length):
                step = delta[sample, channel, t] + (0 if delta_bias is None else delta_bias[channel].double())
                if delta_softplus:
                    step = softplus(step)
                b, c = B[sample, channel // width, :, t], C[sample, channel // width, :, t]
                h = torch.exp(step * A[channel]) * h + step * b * u[sample, channel, t]
                y = torch.dot(c, h)
                rows.append(y if D is None else y + D[channel].double() * u[sample, channel, t])
    return torch.stack(rows).reshape(batch, channels, length)


def arguments(batch, channels, groups, states, length, dtype=torch.float32, optional=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    A = -(0.1 + 2 * torch.rand(channels, states, generator=generator, dtype=torch.float64)).to(dtype)
    long = [normal(batch, channels, length), normal(batch, channels, length), A]
    long += [normal(batch, groups, states, length), normal(batch, groups, states, length)]
    return [*long, normal(channels), normal(channels)] if optional else [*long, None, None]


def errors(device, inputs, delta_softplus=True):
    """Errors of y and of all gradients, each relative to the largest value."""
    generator = torch.Generator().manual_seed(1)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    here = [None if x is None else x.detach().to(device).requires_grad_() for x in inputs]
    y = selective_scan(*here, delta_softplus, backend="triton")
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    expected_y = transcribed(*exact, delta_softplus)
    expected = torch.autograd.grad(expected_y, [x for x in exact if x is not None], dy.double(), allow_unused=True)
    found = torch.autograd.grad(y, [x for x in here if x is not None], dy.to(device))
    names = [name for name, x in zip(NAMES, inputs, strict=True) if x is not None]
    results = {"y": relative(y, expected_y)}
    assert y.dtype == inputs[0].dtype
    for name, gradient, right, x in zip(names, found, expected, [x for x in here if x is not None], strict=True):
        assert gradient.dtype == x.dtype
        assert gradient.shape == x.shape
        results[name] = relative(gradient, right)
    return results


def relative(found, expected):
    difference = (found.detach().cpu().double() - expected.detach()).abs().max()
    return (difference / expected.abs().max().clamp_min(1e-30)).item()


class Tile:
    """Tiles shorter than the backend's own choice, so that a short sequence has several chunks."""

    def __init__(self, chunk):
        self.chunk = chunk

    def __enter__(self):
        self.kept = triton_scan.chunk_length
        triton_scan.chunk_length = lambda length, states: self.chunk

    def __exit__(self, *_):
        triton_scan.chunk_length = self.kept


def one_step(device):
    return errors(device, arguments(2, 6, 2, 3, 1))


def without_options(device):
    inputs = arguments(2, 6, 3, 4, 7, optional=False)
    inputs[1] = inputs[1].abs()
    return errors(device, inputs, delta_softplus=False)


def own_tile(device):
    return errors(device, arguments(1, 2, 2, 4, 37))


def several_chunks(device):
    with Tile(16):
        return errors(device, arguments(1, 4, 2, 3, 37))


def one_step_beyond_a_chunk(device):
    with Tile(8):
        return errors(device, arguments(2, 2, 1, 4, 17))


def whole_chunks(device):
    with Tile(8):
        return errors(device, arguments(1, 2, 1, 2, 16))


def sixty_five_steps(device):
    with Tile(16):
        return errors(device, arguments(1, 3, 1, 3, 65))


def sixteen_states(device):
    return errors(device, arguments(1, 2, 1, 16, 11))


def one_state(device):
    with Tile(4):
        return errors(device, arguments(1, 3, 1, 1, 9))


def slices_of_a_group(device):
    """Groups of three channels in slices of two: dB and dC are sums of partial sums."""
    from nnunet_h2a.networks.selective_scan import triton_kernels

    kept, triton_kernels.SLICE = triton_kernels.SLICE, 2
    try:
        with Tile(4):
            return errors(device, arguments(2, 6, 2, 3, 7))
    finally:
        triton_kernels.SLICE = kept


def double(device):
    with Tile(8):
        return errors(device, arguments(1, 4, 2, 3, 13, dtype=torch.float64))


def half(device):
    return errors(device, arguments(1, 4, 2, 3, 9, dtype=torch.float16))


def bfloat(device):
    return errors(device, arguments(1, 4, 2, 3, 9, dtype=torch.bfloat16))


def half_with_float32_parameters(device):
    inputs = arguments(1, 4, 2, 3, 9)
    inputs[0] = inputs[0].half()
    return errors(device, inputs)


def strided(device):
    """Inputs that are not contiguous, and a gradient that is one number for all."""
    inputs = arguments(2, 4, 2, 3, 7)
    strided_inputs = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs[:5]] + inputs[5:]
    assert not any(x.is_contiguous() for x in strided_inputs[:5])
    results = errors(device, strided_inputs)
    here = [x.to(device).requires_grad_() for x in inputs]
    (gradient,) = torch.autograd.grad(selective_scan(*here, True, backend="triton").sum(), here[:1])
    exact = [x.double().requires_grad_() for x in inputs]
    (expected,) = torch.autograd.grad(transcribed(*exact, True).sum(), exact[:1])
    return results | {"u of the sum": relative(gradient, expected)}


def steps_of(delta, delta_softplus=False):
    def case(device):
        inputs = arguments(1, 2, 1, 3, 11)
        inputs[1] = delta(torch.rand(inputs[1].shape, generator=torch.Generator().manual_seed(2)))
        inputs[6] = None
        with Tile(4):
            return errors(device, inputs, delta_softplus)

    return case


def nearly_all_forgotten(device):
    """Steps after which 1e-5 of a state is left: the gradient of A is that small, and must be right all the same."""
    inputs = arguments(1, 2, 1, 3, 11)
    inputs[1] = 11 + torch.rand(inputs[1].shape, generator=torch.Generator().manual_seed(2))
    inputs[2] = -1 - 0.1 * inputs[2].abs()
    inputs[6] = None
    return errors(device, inputs, delta_softplus=False)


def softplus_and_its_derivative(device):
    """One step, one state and ones: y is softplus(delta), its gradient the sigmoid. Relative to every single value."""
    raw = torch.cat([torch.linspace(-80, 30, 23), torch.tensor([-1e-3, 0.0, 1e-3, 100.0, 1e4, 1e30])])
    ones, A = torch.ones(1, len(raw), 1), -torch.ones(len(raw), 1)
    delta = raw.reshape(1, -1, 1).to(device).requires_grad_()
    B = torch.ones(1, 1, 1, 1)
    y = selective_scan(*(x.to(device) for x in (ones, delta, A, B, B)), delta_softplus=True, backend="triton")
    (gradient,) = torch.autograd.grad(y.sum(), delta)
    exact = raw.double()
    right = torch.where(exact > 0, exact, 0) + torch.log1p(torch.exp(-exact.abs()))
    slope = torch.sigmoid(exact)
    found = (y.detach().cpu().double().flatten(), gradient.cpu().double().flatten())
    return {
        "softplus": ((found[0] - right).abs() / right).max().item(),
        "slope": ((found[1] - slope).abs() / slope).max().item(),
    }


def repeats_bit_for_bit(device):
    def run():
        here = [x.to(device).requires_grad_() for x in arguments(2, 4, 2, 3, 7)]
        y = selective_scan(*here, True, backend="triton")
        return [y, *torch.autograd.grad(y.square().sum(), here)]

    return {"differs": float(not all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True)))}


def compiles_to_one_graph(device):
    """Captured whole, with autograd and without, also where u's length is left open."""

    def network(*inputs):
        return selective_scan(*inputs, True, backend="triton").tanh()

    results = {}
    for dynamic, lengths in ((False, [9]), (True, [9, 12])):
        compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for length in lengths:
            here = [x.to(device).requires_grad_() for x in arguments(1, 2, 1, 2, length)]
            y, right = compiled(*here), network(*here)
            results[f"y, {dynamic}, {length}"] = (y - right).abs().max().item()
            pairs = zip(torch.autograd.grad(y.sum(), here), torch.autograd.grad(right.sum(), here), strict=True)
            results[f"gradients, {dynamic}, {length}"] = max((a - b).abs().max().item() for a, b in pairs)
    with torch.inference_mode():
        results["inference"] = (compiled(*here) - right).abs().max().item()
    return results


def operators_are_as_registered(device):
    """PyTorch's own check of schema, gradients' registration and shapes without data, for both operators."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for optional in (True, False):
        here = [
            None if x is None else x.to(device).requires_grad_() for x in arguments(1, 2, 1, 3, 5, optional=optional)
        ]
        ops = torch.ops.nnunet_h2a
        torch.library.opcheck(ops.selective_scan_triton.default, (*here, True, 4), test_utils=checks)
        here = [None if x is None else x.detach() for x in here]
        y, starts = ops.selective_scan_triton(*here, True, 4)
        torch.library.opcheck(
            ops.selective_scan_triton_backward.default, (y, *here, True, 4, starts), test_utils=checks
        )
    return {}


def trial_accepts_right_numbers(device):
    with torch.inference_mode():
        problems = [triton_scan.trial(device, kind, states=2, length=20) for kind in (torch.float32, torch.float64)]
    assert problems == [None, None], problems
    return {}


def trial_refuses_wrong_numbers_and_failures(device):
    from nnunet_h2a.networks.selective_scan import triton_kernels

    kept = triton_kernels.backward

    def wrong(*inputs):
        gradients = kept(*inputs)
        gradients[3][0, 0, 0, 0] = float("nan")
        return gradients

    def failing(*inputs):
        raise RuntimeError("Failed to find\nC compiler.")

    try:
        triton_kernels.backward = wrong
        problem = triton_scan.trial(device, torch.float32, states=2, length=20)
        assert "the gradient of B: nan" in problem, problem
        triton_kernels.backward = failing
        problem = triton_scan.trial(device, torch.float32, states=2, length=20)
        assert "Failed to find C compiler" in problem, problem
    finally:
        triton_kernels.backward = kept
    return {}


def backend_works_here(device):
    assert triton_scan.why_not(torch.zeros(1, device=device)) is None
    assert triton_scan.why_not(torch.zeros(1, device=device, dtype=torch.float64)) is None
    return {}


#: Case and the largest number that it may return.
CASES = {
    "one step": (one_step, 1e-5),
    "neither D nor bias nor softplus": (without_options, 1e-5),
    "the backend's own tile": (own_tile, 1e-5),
    "several chunks": (several_chunks, 1e-5),
    "one step beyond a chunk": (one_step_beyond_a_chunk, 1e-5),
    "whole chunks": (whole_chunks, 1e-5),
    "65 steps": (sixty_five_steps, 1e-5),
    "16 states": (sixteen_states, 1e-5),
    "one state": (one_state, 1e-5),
    "slices of a group": (slices_of_a_group, 1e-5),
    "float64": (double, 1e-12),
    "float16": (half, 2 * torch.finfo(torch.float16).eps),
    "bfloat16": (bfloat, 2 * torch.finfo(torch.bfloat16).eps),
    "float16 with float32 parameters": (half_with_float32_parameters, 2 * torch.finfo(torch.float16).eps),
    "strided": (strided, 1e-5),
    "steps of 0": (steps_of(lambda r: 0 * r), 1e-5),
    "steps of 1e-6": (steps_of(lambda r: 1e-6 * r), 1e-5),
    "steps of 1e4": (steps_of(lambda r: 1e4 * r), 1e-5),
    "steps from 1e-6 to 1e4": (steps_of(lambda r: 10 ** (10 * r - 6)), 1e-5),
    "softplus from -1e4 to 1e4": (steps_of(lambda r: 2e4 * (r - 0.5), delta_softplus=True), 1e-5),
    "nearly all forgotten": (nearly_all_forgotten, 1e-5),
    "softplus and its derivative": (softplus_and_its_derivative, 1e-5),
    "repeats bit for bit": (repeats_bit_for_bit, 0.0),
    "compiles to one graph": (compiles_to_one_graph, 1e-6),
    "operators are as registered": (operators_are_as_registered, 0.0),
    "trial accepts right numbers": (trial_accepts_right_numbers, 0.0),
    "trial refuses wrong numbers and failures": (trial_refuses_wrong_numbers_and_failures, 0.0),
    "backend works here": (backend_works_here, 0.0),
}


def main(device: str) -> None:
    """Run all cases and write one line of JSON for each."""
    assert KERNELS not in sys.modules, "the package loads the kernels before anything asks for them"
    torch.set_num_threads(1)
    for name, (case, _) in CASES.items():
        begin = time.perf_counter()
        try:
            outcome = {"numbers": case(device)}
        except Exception:
            outcome = {"failure": traceback.format_exc()}
        print(json.dumps({"case": name, "seconds": round(time.perf_counter() - begin, 2)} | outcome), flush=True)
