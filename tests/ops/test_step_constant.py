"""Coarse gradients that are constant on a stair: g' at the code, from the codes alone."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from saved_bytes import Kept
from saved_for import saved_for

import coarsegrad as cg
from coarsegrad import reference

pytestmark = pytest.mark.usefixtures("reference_or_native")
STEP = "reverse_exponential_step"


def codes_of(x, alpha, bits, rounding):
    return torch.bucketize(x, reference.thresholds(torch.tensor([alpha]), bits, x.dtype, rounding)[0])


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_the_gradient_is_the_formula(bits, rounding):
    q = 2**bits - 1
    x = torch.cat([torch.linspace(-1, 1.5 * q * 0.3, 1001), torch.tensor([math.inf, -math.inf])]).requires_grad_()
    dy = torch.randn_like(x)
    y = cg.qrelu(x, 0.3, bits, ste=STEP, rounding=rounding)
    assert torch.equal(y, cg.qrelu(x, 0.3, bits, rounding=rounding))
    (grad,) = torch.autograd.grad(y, x, dy)
    c = codes_of(x.detach(), 0.3, bits, rounding)
    want = torch.where(c > 0, dy * torch.exp(-c / q), 0.0)
    torch.testing.assert_close(grad, want, rtol=1e-6, atol=0)
    assert set(c.tolist()) == set(range(q + 1))


def test_the_reference_of_the_whole_backward_says_the_same():
    """To the bit for dx; the sums of alpha are another order of the same terms."""
    x, alpha, dy = torch.randn(1000), torch.tensor([0.3]), torch.randn(1000)
    for rule in (None, "exact", "three_valued", "two_valued"):
        leaf, learned = x.clone().requires_grad_(), alpha.clone().requires_grad_(rule is not None)
        cg.qrelu(leaf, learned, 2, ste=STEP, alpha_grad=rule or "exact", alpha_scale=0.5).backward(dy)
        mask, codes, _ = saved_for(STEP, "ceil", rule)
        _, mask, codes = reference.qrelu_forward(x, alpha, 2, "ceil", mask, codes, None)
        saved = (mask, codes, 2, STEP, "ceil", rule or "exact", 0.5, None, True, rule is not None)
        want_x, want_alpha = reference.qrelu_backward(dy, None, None, *saved)
        assert torch.equal(leaf.grad, want_x)
        if rule:
            torch.testing.assert_close(learned.grad, want_alpha, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_16_bit_number_times_any_slope(bits, dtype):
    """The reference's bits, for slopes of any kind: a signalling NaN, which must not round to inf, is still a NaN."""
    kinds = [0x7FFFFFFF, 0x7F800001, 0, 0x3F800000, -8388609, 0x7F800000, 1, 0x3F808000]
    slopes = torch.tensor(kinds * 32, dtype=torch.int32).view(torch.float32)[: 2**bits]
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).repeat(2 ** min(bits, 3))
    codes = torch.arange(every.numel()) // 2**16 % 2**bits
    width = {1: 1, 2: 2, 3: 4, 4: 4, 8: 8}[bits]
    packed = sum(part << i * width for i, part in enumerate(codes.view(-1, 8 // width).unbind(1))).to(torch.uint8)
    found = torch.ops.coarsegrad.backward_from_slopes(every, packed, slopes, bits)
    with cg.use_backend("reference"):
        right = torch.ops.coarsegrad.backward_from_slopes(every, packed, slopes, bits)
    assert torch.equal(found.isnan(), right.isnan())
    numbers = ~right.isnan()
    assert torch.equal(found[numbers].view(torch.int16), right[numbers].view(torch.int16))


def test_slopes_that_do_not_fit_are_refused():
    dy, codes, op = torch.randn(8), torch.zeros(2, dtype=torch.uint8), torch.ops.coarsegrad.backward_from_slopes
    for slopes, bits, error in (
        (torch.ones(3), 2, "slopes"),
        (torch.ones(8), 2, "slopes"),
        (torch.ones(4, dtype=torch.float64), 2, "slopes"),
        (torch.ones(4), 9, "bits"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            op(dy, codes, slopes, bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_bounds_hold_for_every_x(bits):
    """1/e <= g' <= exp(-1/q) for x > 0, without a bound on x; reverse_exponential has none below there."""
    q = 2**bits - 1
    x = torch.logspace(-30, 30, 500).requires_grad_()
    (grad,) = torch.autograd.grad(cg.qrelu(x, 0.3, bits, ste=STEP).sum(), x)
    assert grad.min() >= math.exp(-1) * (1 - 1e-6) and grad.max() <= math.exp(-1 / q) * (1 + 1e-6)
    (smooth,) = torch.autograd.grad(cg.qrelu(x, 0.3, bits, ste="reverse_exponential").sum(), x)
    assert smooth.min() == 0
    ratio = (grad / smooth)[(x < 0.3 * q) & (x > 0)]  # on the stairs with two ends g' is off by at most one stair
    assert ratio.max() <= 1 + 1e-6 and ratio.min() >= math.exp(-1 / q) * (1 - 1e-5)
    assert cg.check_ste(STEP, bits)


def test_what_is_not_positive_gets_nothing_and_inf_stays_out():
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0], requires_grad=True)
    y = cg.qrelu(x, 0.3, 2, ste=STEP)
    (grad,) = torch.autograd.grad(y, x, torch.tensor([math.inf, math.nan, math.inf, 1.0]))
    assert torch.equal(grad, torch.tensor([0, 0, 0, math.exp(-1)]))


@pytest.mark.parametrize("alpha_grad", oracle.ALPHA_GRADS)
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_bytes_and_alpha(alpha_grad, bits):
    n, width = 1003, oracle.CODE_WIDTH[bits]
    x = torch.randn(n, requires_grad=True)
    for learned in (False, True):
        alpha = torch.tensor([0.3], requires_grad=learned)
        with Kept(alpha) as kept:
            y = cg.qrelu(x, alpha, bits, ste=STEP, alpha_grad=alpha_grad)
        packed, state = math.ceil(n * width / 8), math.ceil(n * 2 / 8)
        want = packed if not learned or alpha_grad == "exact" else packed + state
        assert kept.bytes == (4 * n if learned and alpha_grad == "chain" else want)
        y.sum().backward()
        if learned and alpha_grad != "chain":
            twin = torch.tensor([0.3], requires_grad=True)
            cg.qrelu(x.detach(), twin, bits, ste="clipped_relu", alpha_grad=alpha_grad).sum().backward()
            assert torch.equal(alpha.grad, twin.grad)


def test_chain_is_the_chain_rule_through_it():
    x, alpha = torch.rand(50) * 2 - 0.5, torch.tensor([0.3], requires_grad=True)
    cg.qrelu(x, alpha, 2, ste=STEP, alpha_grad="chain").sum().backward()
    c = codes_of(x, 0.3, 2, "ceil")
    g = torch.where(c > 0, torch.exp(-c / 3), 0.0)
    assert alpha.grad.item() == pytest.approx((c - x / 0.3 * g).sum().item(), rel=1e-4)


def test_in_place_and_per_channel_and_channels_last():
    alpha = torch.tensor([0.2, 0.3, 0.4])
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(2, 3, 4, 5)
    (want,) = torch.autograd.grad(cg.qrelu(x, alpha, 2, ste=STEP, channel_dim=1), x, dy)
    (got,) = torch.autograd.grad(cg.qrelu(x * 1, alpha, 2, ste=STEP, channel_dim=1, inplace=True), x, dy)
    assert torch.equal(got, want) and want.any()
    for i, a in enumerate(alpha.tolist()):
        part = x.detach()[:, i].contiguous().requires_grad_()
        (grad,) = torch.autograd.grad(cg.qrelu(part, a, 2, ste=STEP), part, dy[:, i])
        assert torch.equal(grad, want[:, i])


def test_second_derivative():
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    w = torch.randn(40, dtype=torch.float64, requires_grad=True)
    (gx,) = torch.autograd.grad((cg.qrelu(x, 0.3, 2, ste=STEP) * w).sum(), x, create_graph=True)
    (gw,) = torch.autograd.grad(gx.sum(), w)
    assert torch.equal(gw * w.detach(), gx.detach())


def test_packed_and_fused():
    """b bits in all, as the next layer's input is in the same codes."""
    x, weight = torch.randn(64, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    alpha = torch.tensor([0.3])

    def pair():
        return F.linear(cg.qrelu(x, alpha, 2, ste=STEP), weight)

    want = torch.autograd.grad(pair().square().sum(), [x, weight])
    with Kept(x, weight) as kept, cg.packed_activations():
        out = pair()
    assert kept.bytes == 64 * 16 * 2 // 8 + 4
    for got, expected in zip(torch.autograd.grad(out.square().sum(), [x, weight]), want):
        assert torch.equal(got, expected)
    with Kept(weight, alpha) as kept:
        out = cg.qrelu_linear(x, alpha, weight, None, 2, ste=STEP)
    assert kept.bytes == 64 * 16 * 2 // 8
    for got, expected in zip(torch.autograd.grad(out.square().sum(), [x, weight]), want):
        assert torch.equal(got, expected)


def test_compiled():
    torch._dynamo.reset()
    x, alpha = torch.randn(64, requires_grad=True), torch.tensor([0.3])
    compiled = torch.compile(lambda x: cg.qrelu(x, alpha, 2, ste=STEP), fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, lambda x: cg.qrelu(x, alpha, 2, ste=STEP)))
    assert torch.equal(got, want)


def test_one_of_your_own():
    with cg.register_ste("tail", lambda u, q: torch.where(u <= 0, 0.0, 1 / (1 + u)), needs="codes"):
        x = torch.tensor([-1.0, 0.1, 0.4, 9.0], requires_grad=True)
        with Kept() as kept:
            y = cg.qrelu(x, 0.3, 2, ste="tail")
        assert kept.bytes == 1
        y.sum().backward()
        assert torch.equal(x.grad, torch.tensor([0, 1 / 2, 1 / 3, 1 / 4]))


def test_the_slopes_of_your_own_are_made_once():
    """For each number of bits and dtype, and anew for another STE of the name."""

    def slope_times(factor, calls):
        def slope(u, q):
            calls.append((u.dtype, q))
            return factor * (u + 1)

        return slope

    for factor in (1, 2):
        calls = []
        with cg.register_ste("linear", slope_times(factor, calls), needs="codes"):
            calls.clear()
            for dtype in (torch.float32, torch.bfloat16, torch.float64) * 2:
                x = torch.tensor([-1.0, 0.1, 9.0], dtype=dtype, requires_grad=True)
                (grad,) = torch.autograd.grad(cg.qrelu(x, 0.3, 2, ste="linear").sum(), x)
                assert grad.tolist() == [factor * 1, factor * 2, factor * 4]
        assert calls == [(torch.float32, 3), (torch.float64, 3)]


def test_compiled_of_your_own():
    torch._dynamo.reset()
    with cg.register_ste("tail", lambda u, q: torch.where(u <= 0, 0.0, 1 / (1 + u)), needs="codes"):
        x, alpha = torch.randn(64, requires_grad=True), torch.tensor([0.3], requires_grad=True)
        grads = []
        for f in (lambda x, a: cg.qrelu(x, a, 2, ste="tail"),) * 2:
            compiled = torch.compile(f, fullgraph=True, backend="aot_eager") if grads else f
            grads.append(torch.autograd.grad(compiled(x, alpha).sum(), [x, alpha]))
        assert all(map(torch.equal, *grads)) and grads[0][0].any()


def test_training_moves_the_same_way():
    """The two forms of the gradient are a small angle apart."""
    torch.manual_seed(0)
    x = torch.randn(20000).requires_grad_()
    dy = torch.randn(20000)
    grads = [torch.autograd.grad(cg.qrelu(x, 0.1666, 4, ste=ste), x, dy)[0] for ste in (STEP, "reverse_exponential")]
    assert F.cosine_similarity(*grads, dim=0) > 0.999
