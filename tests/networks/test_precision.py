"""Instance normalisation and convolution: PyTorch's numbers and derivatives, but where these are of no use."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nnunet_h2a.networks.precision import Conv3d, InstanceNorm


def maps(dtype=torch.float64, size=(4, 5, 6)):
    generator = torch.Generator().manual_seed(0)
    return (3 + 2 * torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def gradient(function, x, dy):
    (dx,) = torch.autograd.grad(function(x), x, dy)
    return dx


@pytest.mark.parametrize("size", [(4, 5, 6), (7, 5)])
def test_derivative_is_pytorchs(size):
    x = maps(size=size)
    dy = torch.randn_like(x)
    torch.testing.assert_close(
        gradient(InstanceNorm(), x, dy), gradient(F.instance_norm, x, dy), atol=1e-12, rtol=1e-12
    )
    assert torch.autograd.gradcheck(InstanceNorm(), (maps(size=(2, 3)),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_derivative_in_half_precision(dtype):
    """Against float64, with a mean far from 0: deviations kept in half precision would be off by several roundings."""
    x = (maps(size=(16, 16, 16)).detach() + 50).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    exact = gradient(F.instance_norm, x.detach().double().requires_grad_(), dy.double())
    assert gradient(InstanceNorm(), x, dy).dtype == dtype
    error = (gradient(InstanceNorm(), x, dy).double() - exact).abs().max()
    assert error < torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.3, -1000.0])
def test_constant_maps_pass_no_gradient(dtype, value):
    x = maps(dtype).detach()
    x[0, 1] = value
    x.requires_grad_()
    dx = gradient(InstanceNorm(), x, torch.randn_like(x))
    assert not dx[0, 1].any()
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    assert all(m.any() for m in dx[others])


def test_faint_maps_are_not_taken_for_constant():
    """Ten times below eps in variance, where the norm itself begins to fade them out."""
    x = (maps().detach() * 5e-4).requires_grad_()
    dy = torch.randn_like(x)
    torch.testing.assert_close(gradient(InstanceNorm(), x, dy), gradient(F.instance_norm, x, dy), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_is_pytorchs(dtype):
    x = maps(dtype).detach()
    tolerance = 2 * torch.finfo(dtype).eps
    exact = F.instance_norm(x.double())
    torch.testing.assert_close(InstanceNorm()(x).double(), exact, atol=2 * tolerance, rtol=tolerance)


@pytest.mark.usefixtures("no_lucky_memory")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "kernel"), [((2, 4, 4), 3), ((4, 4, 4), 5), ((2, 2, 12), 3)])
def test_half_precision_convolution_of_a_small_map(size, kernel, dtype):
    torch.manual_seed(0)
    conv = Conv3d(16, 16, kernel, padding=kernel // 2)
    x = torch.randn(1, 16, *size)
    with torch.autocast("cpu", dtype):
        y = conv(x)
        y.float().square().sum().backward()
    assert y.dtype == dtype
    exact = F.conv3d(x.double(), conv.weight.double(), conv.bias.double(), 1, kernel // 2).detach()
    torch.testing.assert_close(y.double(), exact, atol=2 * torch.finfo(dtype).eps * exact.abs().max().item(), rtol=0)
    found = conv.weight.grad.double()
    weight = conv.weight.detach().double().requires_grad_()
    F.conv3d(x.double(), weight, conv.bias.detach().double(), 1, kernel // 2).square().sum().backward()
    assert (found - weight.grad).abs().max() < 4 * torch.finfo(dtype).eps * weight.grad.abs().max()


def test_a_convolution_in_half_precision_itself():
    conv = Conv3d(2, 2, 3, padding=1).bfloat16()
    assert conv(torch.randn(1, 2, 3, 3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_compiles_without_graph_breaks():
    x = maps(torch.float32)
    compiled = torch.compile(InstanceNorm(), fullgraph=True, backend="aot_eager")
    dy = torch.randn_like(x)
    torch.testing.assert_close(gradient(compiled, x, dy), gradient(InstanceNorm(), x, dy))
    torch._dynamo.reset()
