"""`dsq` and `stable_qat`, which follow the thresholds: against their papers, and against thresholds of any rounding."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from packing_cases import assert_same, build, gradients
from saved_bytes import Kept

import coarsegrad as cg

K, AMPLITUDE = math.log(2 / 0.2 - 1), 0.21 * math.sqrt(2) * math.pi
SLOPES = {
    "dsq": lambda d: K / (1 - 0.2) / 2 * (1 - torch.tanh(K * d) ** 2),
    "stable_qat": lambda d: (1 - AMPLITUDE * torch.sin(math.pi * d)) / (1 + AMPLITUDE * torch.sin(math.pi * d)),
}


def grad_x(x, dy, bits, ste, rounding, alpha=1.0, **options):
    leaf = x.clone().requires_grad_()
    cg.qrelu(leaf, alpha, bits, ste=ste, rounding=rounding, **options).backward(dy)
    return leaf.grad


def soft_staircase(u, q):
    """Of the paper on soft quantization: between two levels a tanh, stretched to reach both."""
    low = u.detach().floor().clamp(0, q - 1)
    return low + 0.5 + 0.5 * torch.tanh(K * (u - low - 0.5)) / math.tanh(K / 2)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_dsq_is_the_derivative_of_the_soft_staircase(reference_or_native, bits):
    q = 2**bits - 1
    u = (torch.rand(2000, generator=torch.Generator().manual_seed(bits), dtype=torch.float64) * q).requires_grad_()
    (want,) = torch.autograd.grad(soft_staircase(u, q).sum(), u)
    dx = grad_x(u.detach(), torch.ones_like(u), bits, "dsq", "nearest")
    torch.testing.assert_close(dx, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_stable_qat_is_the_papers_function_of_x_and_its_rounding(reference_or_native, bits):
    q = 2**bits - 1
    u = torch.rand(2000, generator=torch.Generator().manual_seed(bits), dtype=torch.float64) * q
    wave = AMPLITUDE * torch.cos(math.pi * (u + u.round()))
    dx = grad_x(u, torch.ones_like(u), bits, "stable_qat", "nearest")
    torch.testing.assert_close(dx, (1 - wave) / (1 + wave), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("ste", oracle.SOFT_STES)
def test_the_slope_is_that_of_the_distance_to_a_threshold(reference_or_native, ste, rounding, dtype, bits):
    """Thresholds of the ideal staircase, alpha a power of two. u is exact then, and errs in what is left: g'."""
    q, alpha = 2**bits - 1, torch.tensor([0.5])
    generator = torch.Generator().manual_seed(bits)
    x = torch.rand(1500, generator=generator).mul(0.75 * q).to(dtype)
    x = torch.cat([x, -x[:50], oracle.threshold_points(alpha, bits, dtype, rounding)[0], oracle.special_values(dtype)])
    dy = torch.randn(x.shape, generator=generator).to(dtype)
    u, edges = x.double() / 0.5, oracle.thresholds(torch.ones(1), bits, torch.float64, rounding)[0]
    d = (u[:, None] - edges).abs().amin(1).clamp(max=0.5)
    slope = torch.where((u > 0) & (u <= q), SLOPES[ste](d), 0.0)
    slope = torch.where(u.isnan(), 1.0, slope)
    want = torch.where(slope == 0, 0.0, dy.double() * slope)
    dx = grad_x(x, dy, bits, ste, rounding, alpha)
    assert dx.dtype == dtype and torch.equal(dx == 0, want.to(dtype) == 0)
    ulps = 1 if dtype in oracle.HALF_DTYPES else 32 if dtype == torch.float64 else 8  # float64 errs here as well
    bound = ulps * oracle.ulp(want, dtype)
    assert ((dx.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("ste", oracle.SOFT_STES)
def test_a_select_not_a_product(reference_or_native, ste):
    x = torch.tensor([-1.0, 0.0, -math.inf, math.inf, 9.0])
    for value in (math.inf, math.nan):
        assert torch.equal(grad_x(x, torch.full((5,), value), 2, ste, "ceil", 0.5), torch.zeros(5))


@pytest.mark.parametrize("ste", oracle.SOFT_STES)
def test_what_is_saved(reference_or_native, ste):
    x, alpha = torch.randn(1003), torch.tensor([0.4])
    for rule in (None, *oracle.ALPHA_GRADS):
        learned = alpha.clone().requires_grad_(rule is not None)
        with Kept(learned) as kept:
            y = cg.qrelu(x.requires_grad_(), learned, 2, ste=ste, alpha_grad=rule or "exact")
        assert y.requires_grad and kept.bytes == 4 * x.numel()
    with pytest.raises(ValueError, match=f"inplace.*{ste}"):
        cg.qrelu(x * 1, alpha, 2, ste=ste, inplace=True)


@pytest.mark.parametrize("ste", oracle.SOFT_STES)
def test_compiled_and_packed(reference_or_native, ste):
    torch._dynamo.reset()
    for rounding in oracle.ROUNDINGS:
        model, x = build("mlp", ste=ste, rounding=rounding)
        want = gradients(model, x)
        assert any(g.count_nonzero() for g in want.values())
        assert_same(gradients(model, x, cg.packed_activations()), want)
        model.compile(fullgraph=True, backend="aot_eager")
        assert_same(gradients(model, x), want)
