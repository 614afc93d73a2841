"""dx of every STE and dalpha of every rule, against float64 oracles.

Tolerances. Masked STEs (identity, relu, clipped_relu, trust): dx is bit-equal. STEs with a division or an exp: in
float32 and float64 within `3 + 2 * condition` ulps, where condition = |u g''(u) / g'(u)| is what the two roundings
of u = x / alpha grow to in g'(u) (|u / q| for reverse_exponential); in the half dtypes, computed in float32,
within 1 ulp of the dtype. dalpha: the error relative to the sum of the magnitudes added is at most 1e-5 (1e-12 in
float64).
"""

from __future__ import annotations

import math
from functools import cache

import oracle
import pytest
import torch

import coarsegrad as cg

RULES = (None, *oracle.ALPHA_GRADS)


@cache
def gradient_cases(dtype, rounding, bits):
    """Per channel and per tensor: (channel_dim, alpha, x, dy, the float64 oracle)."""
    alpha, x, dy = gradient_case(dtype, rounding, bits)
    per_channel = (0, alpha, x, dy)
    per_tensor = (None, alpha[2:3], x[2], dy[2])
    return [
        (dim, a, x, dy, oracle.Staircase64(x, a, bits, rounding, dim)) for dim, a, x, dy in (per_channel, per_tensor)
    ]


def gradient_case(dtype, rounding, bits):
    """alpha [C], x [C, m] on every threshold and around, far above and below; dy of ordinary size."""
    generator = torch.Generator().manual_seed(bits)
    alpha = torch.cat([torch.tensor([0.5, 1.0]), oracle.log_uniform(6, 1e-2, 1e1, seed=bits)])
    points = oracle.threshold_points(alpha, bits, dtype, rounding)[:, :120]
    top = oracle.levels(alpha, bits, dtype)[:, -1:]
    ends = torch.stack(oracle.ends(alpha, bits, dtype), 1).to(dtype)
    on = torch.cat([top, ends], 1)
    edge = torch.cat([oracle.down(on), on, oracle.up(on), torch.zeros_like(top), -torch.zeros_like(top)], 1)
    random = torch.randn(len(alpha), 203, generator=generator) * alpha[:, None] * 2**bits
    x = torch.cat([points, edge, random.to(dtype)], 1)
    return alpha, x, torch.randn(x.shape, generator=generator).to(dtype)


def gradients(x, alpha, dy, *, need_x=True, need_alpha=True, **options):
    """(dx, dalpha) of the public function; None where it was not asked for."""
    x = x.detach().clone().requires_grad_(need_x)
    alpha = alpha.detach().clone().requires_grad_(need_alpha)
    cg.qrelu(x, alpha, **options).backward(dy)
    return x.grad, alpha.grad


def assert_grad_x(dx, want, dtype, condition, slope, dy):
    """want is float64; see the head of the file for the bound."""
    assert dx.dtype == dtype
    exact = (slope == 0) | (slope == 1)
    assert torch.equal(dx.double()[exact], want.to(dtype).double()[exact])
    if exact.all():
        return
    error = (dx.double() - want).abs()
    if dtype in oracle.HALF_DTYPES:
        bound = oracle.ulp(want, dtype)
    else:
        ulps = (3 + 2 * condition) * (2 if dtype == torch.float64 else 1)  # the float64 oracle errs as much itself
        # exp may flush results below the normal range to zero
        bound = ulps * oracle.ulp(want, dtype) + dy.double().abs() * torch.finfo(dtype).tiny
    worst = (error / bound)[~exact].max()
    assert worst <= 1, f"dx is {worst:.2f} times its bound away"


def assert_grad_alpha(dalpha, want, magnitude, alpha_dtype, x_dtype):
    assert dalpha.dtype == alpha_dtype
    relative = 1e-12 if x_dtype == torch.float64 and alpha_dtype == torch.float64 else 1e-5
    relative += torch.finfo(alpha_dtype).eps / 2
    error = (dalpha.double() - want).abs()
    assert (error <= relative * magnitude).all(), (
        f"relative error {(error / magnitude).max():.2e}, allowed {relative:.2e}"
    )


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("alpha_grad", RULES)
@pytest.mark.parametrize("ste", oracle.STES)
def test_against_float64(backend, ste, alpha_grad, rounding, dtype, bits):
    """alpha_grad None is a fixed alpha. What is kept differs by rule, so dx is looked at under each."""
    options = dict(bits=bits, ste=ste, rounding=rounding, alpha_grad=alpha_grad or "exact")
    learned = alpha_grad is not None
    for channel_dim, alpha, x, dy, want in gradient_cases(dtype, rounding, bits):
        dx, dalpha = gradients(x, alpha, dy, need_alpha=learned, channel_dim=channel_dim, **options)
        assert_grad_x(dx, want.grad_x(dy, ste), dtype, want.condition(ste), want.slope(ste), dy)
        if learned:
            assert_grad_alpha(dalpha, *want.grad_alpha(dy, ste, alpha_grad), torch.float32, dtype)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("alpha_grad", RULES)
@pytest.mark.parametrize("ste", oracle.STES)
def test_inner_channels(backend, ste, alpha_grad, bits):
    """channel_dim=1 of a channels-last and of a contiguous image, odd sizes."""
    generator = torch.Generator().manual_seed(bits)
    alpha = oracle.log_uniform(13, 0.1, 1, seed=bits)
    shape, step = (3, 13, 5, 7), alpha[:, None, None]
    x = torch.randn(shape, generator=generator) * step * 2 ** (bits - 1)
    dy = torch.randn(shape, generator=generator)
    want = oracle.Staircase64(x, alpha, bits, "ceil", 1)
    learned = alpha_grad is not None
    for memory_format in (torch.contiguous_format, torch.channels_last):
        image, grad = x.contiguous(memory_format=memory_format), dy.contiguous(memory_format=memory_format)
        dx, dalpha = gradients(
            image,
            alpha,
            grad,
            need_alpha=learned,
            bits=bits,
            ste=ste,
            alpha_grad=alpha_grad or "exact",
            channel_dim=1,
        )
        assert dx.is_contiguous(memory_format=memory_format)
        assert_grad_x(dx, want.grad_x(dy, ste), torch.float32, want.condition(ste), want.slope(ste), dy)
        if learned:
            assert_grad_alpha(dalpha, *want.grad_alpha(dy, ste, alpha_grad), torch.float32, torch.float32)


# alpha = 1/2, 2 bits, so q = 3 and L = 0, 1/2, 1, 3/2; dy = 1 everywhere.
HAND_X = [-1.0, -0.0, 0.25, 0.5, 0.75, 1.5, 2.0, 3.0]
HAND_CODES = {
    "ceil": [0, 0, 1, 1, 2, 3, 3, 3],
    "nearest": [0, 0, 0, 1, 1, 3, 3, 3],
    "hwgq": [0, 0, 1, 1, 1, 3, 3, 3],
}
HAND_SLOPES = {
    "identity": [1, 1, 1, 1, 1, 1, 1, 1],
    "relu": [0, 0, 1, 1, 1, 1, 1, 1],
    "clipped_relu": [0, 0, 1, 1, 1, 1, 0, 0],
    "log_tailed_relu": [0, 0, 1, 1, 1, 1, 1 / 2, 1 / 4],
    "reverse_exponential": [0, 0] + [math.exp(-u / 3) for u in (0.5, 1, 1.5, 3, 4, 6)],
    "trust": [0, 1, 1, 1, 1, 1, 0, 0],
}


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("ste", oracle.STES)
def test_hand_worked_points(backend, ste, rounding):
    x, alpha, dy = torch.tensor(HAND_X), torch.tensor([0.5]), torch.ones(len(HAND_X))
    slope, code = HAND_SLOPES[ste], HAND_CODES[rounding]
    state = [0, 0, 1, 1, 1, 1, 2, 2]
    by_rule = {
        "exact": sum(code),
        "three_valued": sum((0, 2, 3)[s] for s in state),
        "two_valued": sum((0, 0, 3)[s] for s in state),
        "chain": sum(c - 2 * v * g for c, v, g in zip(code, HAND_X, slope, strict=True)),
    }
    for alpha_grad, want in by_rule.items():
        dx, dalpha = gradients(x, alpha, dy, bits=2, ste=ste, rounding=rounding, alpha_grad=alpha_grad)
        assert dx.tolist() == pytest.approx(slope, rel=1e-6)
        assert dalpha.tolist() == pytest.approx([want], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("alpha_grad", RULES)
@pytest.mark.parametrize("ste", oracle.STES)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_a_select_not_a_product(backend, dtype, ste, alpha_grad):
    """Where g' is 0 dx is 0 though dy is inf or NaN; where g' is 1 dx is dy, whatever it is."""
    alpha = torch.tensor([0.5])
    points = [-1.0, 0.0, 0.2, 1.4, 9.0]  # two below, two inside, one above, at 2 bits
    x = torch.tensor(points, dtype=dtype).repeat(4)
    dy = torch.tensor([math.inf, -math.inf, math.nan, -0.0], dtype=dtype).repeat_interleave(len(points))
    dx, _ = gradients(
        x, alpha, dy, need_alpha=alpha_grad is not None, bits=2, ste=ste, alpha_grad=alpha_grad or "exact"
    )
    slope = oracle.Staircase64(x, alpha, 2, "ceil").slope(ste)
    masked = dx[slope == 0]
    assert oracle.same_bits(masked, torch.zeros_like(masked)), "0, not dy * 0, which would be -0 for a dy of -0"
    assert oracle.same_bits(dx[slope == 1], dy[slope == 1])


@pytest.mark.parametrize("ste", oracle.STES)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_the_smallest_positive_x_is_above_zero(backend, dtype, ste):
    """x / alpha underflows to 0, and yet x > 0: every g' is 1 there."""
    smallest = oracle.up(torch.zeros(9, dtype=dtype))
    dy = torch.linspace(-3, 3, 9, dtype=dtype)
    for alpha_grad in (None, "exact", "three_valued"):
        dx, _ = gradients(
            smallest,
            torch.tensor([1e4]),
            dy,
            need_alpha=alpha_grad is not None,
            bits=4,
            ste=ste,
            alpha_grad=alpha_grad or "exact",
        )
        assert torch.equal(dx, dy)


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("alpha_grad", RULES)
@pytest.mark.parametrize("ste", oracle.STES)
def test_nan_and_infinities_in_x(backend, ste, alpha_grad, rounding):
    """The gradient at NaN passes, as torch.relu's; at +inf and -inf it is the limit of the formula."""
    x, dy = torch.tensor([math.nan, math.inf, -math.inf]), torch.tensor([2.0, 3.0, 5.0])
    dx, _ = gradients(
        x,
        torch.tensor([0.5]),
        dy,
        need_alpha=alpha_grad is not None,
        bits=2,
        ste=ste,
        rounding=rounding,
        alpha_grad=alpha_grad or "exact",
    )
    at_infinity = {"identity": [3.0, 5.0], "relu": [3.0, 0.0]}.get(ste, [0.0, 0.0])
    assert dx.tolist() == [2.0, *at_infinity]


@pytest.mark.parametrize("ste", oracle.STES)
def test_grad_alpha_of_nan_and_infinities_in_x(backend, ste):
    """NaN's code is q and its state is inside; +inf is above the top; -inf adds nothing."""
    alpha, dy = torch.tensor([0.5]), torch.tensor([2.0, 3.0, 5.0])
    x = torch.tensor([math.nan, math.inf, -math.inf])
    for alpha_grad, want in (
        ("exact", 3 * 2 + 3 * 3),
        ("three_valued", 2 * 2 + 3 * 3),
        ("two_valued", 3 * 3),
    ):
        _, dalpha = gradients(x, alpha, dy, bits=2, ste=ste, alpha_grad=alpha_grad)
        assert dalpha.tolist() == [want]
    if ste in ("relu", "clipped_relu"):
        _, dalpha = gradients(x[2:], alpha, dy[2:], bits=2, ste=ste, alpha_grad="chain")
        assert dalpha.tolist() == [0.0], "u * g'(u) is 0 where g' is 0, though u is -inf"
    if ste == "clipped_relu":
        _, dalpha = gradients(x[1:], alpha, dy[1:], bits=2, ste=ste, alpha_grad="chain")
        assert dalpha.tolist() == [9.0], "above the top g' is 0 and A is q, though u is inf"


@pytest.mark.parametrize("alpha_grad", oracle.ALPHA_GRADS)
def test_elements_below_zero_add_nothing_to_grad_alpha(backend, alpha_grad):
    """A is 0 for x <= 0: a select too, so an infinite dy there does not reach alpha."""
    x = torch.tensor([-1.0, 0.0, -0.0, 0.7, 9.0])
    dy = torch.tensor([math.inf, math.nan, -math.inf, 1.0, 1.0])
    _, dalpha = gradients(x, torch.tensor([0.5]), dy, bits=2, alpha_grad=alpha_grad)
    want = {"exact": 2 + 3.0, "three_valued": 2 + 3.0, "two_valued": 3.0, "chain": 2 - 1.4 + 3.0}[alpha_grad]
    assert dalpha.item() == pytest.approx(want, rel=1e-6)
    if alpha_grad == "two_valued":  # A is 0 inside as well
        dy[3] = math.inf
        assert gradients(x, torch.tensor([0.5]), dy, bits=2, alpha_grad=alpha_grad)[1].item() == 3


@pytest.mark.parametrize("alpha_grad", oracle.ALPHA_GRADS)
@pytest.mark.parametrize("channel_dim", [None, 0])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_an_infinite_dy_among_many(backend, dtype, channel_dim, alpha_grad):
    """Whole chunks of the sums: where A is 0 infinity does not reach alpha, and elsewhere it does."""
    x = torch.tensor([-1.0, 0.7, 9.0]).repeat(2, 15_000)[:, :44_003].to(dtype)
    alpha = torch.tensor([0.5] * (2 if channel_dim == 0 else 1))
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    staircase = oracle.Staircase64(x, alpha, 2, "ceil", channel_dim)
    want, size = staircase.grad_alpha(dy, "clipped_relu", alpha_grad)
    for at, infinite in ((0, False), (30_000, False), (30_001, alpha_grad != "two_valued"), (30_002, True)):
        one = dy.clone()
        one[0, at] = math.inf
        _, dalpha = gradients(x, alpha, one, bits=2, alpha_grad=alpha_grad, channel_dim=channel_dim)
        if infinite:
            assert abs(dalpha[0].item()) == math.inf
        if not infinite or channel_dim == 0:
            first = int(infinite)
            assert_grad_alpha(dalpha[first:], want[first:], size[first:], torch.float32, dtype)


@pytest.mark.parametrize("ste", ["clipped_relu", "relu", "identity"])
@pytest.mark.parametrize("alpha_grad", oracle.ALPHA_GRADS)
@pytest.mark.parametrize("features", [64, 192])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_many_rows_of_features(backend, dtype, features, alpha_grad, ste):
    """Features in whole blocks, which are summed down the rows, through several chunks that begin at any of them."""
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(400, features, generator=generator).to(dtype)
    dy = torch.randn(x.shape, generator=generator).to(dtype)
    alpha = oracle.log_uniform(features, 0.1, 1, seed=features)
    want = oracle.Staircase64(x, alpha, 2, "ceil", 1)
    terms = want.grad_alpha(dy, ste, alpha_grad)
    if (ste, alpha_grad) != ("identity", "chain"):  # of which A is not 0 below 0
        dy[(x <= 0) & (torch.rand(x.shape, generator=generator) < 0.01)] = math.inf
    dx, dalpha = gradients(x, alpha, dy, bits=2, ste=ste, alpha_grad=alpha_grad, channel_dim=1)
    assert_grad_x(dx, want.grad_x(dy, ste), dtype, want.condition(ste), want.slope(ste), dy)
    assert_grad_alpha(dalpha, *terms, torch.float32, dtype)


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("step", [0.3, 1.7, 41 / 4096, 3e-37])
def test_large_exponents_are_rounded_as_the_formula_says(backend, step, bits):
    """u and u / q are numbers of float32: an ulp of either would be as many of g' as the exponent is large."""
    alpha, q = torch.tensor([step]), 2**bits - 1
    x = alpha * q * torch.linspace(0.01, 80, 64 * 65 + 5)
    dx, _ = gradients(x, alpha, torch.ones_like(x), need_alpha=False, bits=bits, ste="reverse_exponential")
    want = (-(x / alpha / q).double()).exp()
    assert ((dx.double() - want).abs() <= 3 * oracle.ulp(want, torch.float32)).all()


@pytest.mark.parametrize("need_alpha", [False, True])
@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("alpha_grad", oracle.ALPHA_GRADS)
@pytest.mark.parametrize("ste", oracle.STES)
def test_whichever_input_needs_a_gradient(backend, ste, alpha_grad, need_x, need_alpha):
    alpha, x, dy = gradient_case(torch.float32, "ceil", 2)
    leaf = x.clone().requires_grad_(need_x)
    step = alpha.clone().requires_grad_(need_alpha)
    y = cg.qrelu(leaf, step, 2, ste=ste, alpha_grad=alpha_grad, channel_dim=0)
    assert y.requires_grad == (need_x or need_alpha)
    assert oracle.same_bits(y, oracle.output(x, alpha, 2, "ceil", 0))
    if not y.requires_grad:
        return
    y.backward(dy)
    want = oracle.Staircase64(x, alpha, 2, "ceil", 0)
    assert (leaf.grad is None) != need_x and (step.grad is None) != need_alpha
    if need_x:
        assert_grad_x(leaf.grad, want.grad_x(dy, ste), x.dtype, want.condition(ste), want.slope(ste), dy)
    if need_alpha:
        assert_grad_alpha(step.grad, *want.grad_alpha(dy, ste, alpha_grad), torch.float32, torch.float32)


@pytest.mark.parametrize("alpha_grad", oracle.ALPHA_GRADS)
@pytest.mark.parametrize("alpha_dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_grad_alpha_has_alphas_dtype(backend, dtype, alpha_dtype, alpha_grad):
    alpha = torch.tensor([0.3, 0.7], dtype=alpha_dtype)
    x = torch.randn(2, 77, generator=torch.Generator().manual_seed(0)).to(dtype)
    dy = torch.randn(2, 77, generator=torch.Generator().manual_seed(1)).to(dtype)
    for channel_dim, x, alpha, dy in ((0, x, alpha, dy), (None, x[0], alpha[:1], dy[0])):
        _, dalpha = gradients(x, alpha, dy, bits=2, alpha_grad=alpha_grad, channel_dim=channel_dim)
        want = oracle.Staircase64(x, alpha, 2, "ceil", channel_dim).grad_alpha(dy, "clipped_relu", alpha_grad)
        assert_grad_alpha(dalpha, *want, alpha_dtype, dtype)


@pytest.mark.parametrize("alpha_grad", oracle.ALPHA_GRADS)
def test_alpha_scale(backend, alpha_grad):
    """A number scales dalpha and nothing else; "lsq" is 1 / sqrt(n q), n the elements of one sample."""
    x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
    dy = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))
    want, size = oracle.Staircase64(x, torch.tensor([0.3]), 3, "ceil").grad_alpha(dy, "clipped_relu", alpha_grad)
    plain, _ = gradients(x, torch.tensor([0.3]), dy, bits=3, alpha_grad=alpha_grad)
    for given, factor in ((0.25, 0.25), (-2.0, -2.0), (0.0, 0.0), ("lsq", 1 / math.sqrt(4 * 5 * 7))):
        dx, dalpha = gradients(x, torch.tensor([0.3]), dy, bits=3, alpha_grad=alpha_grad, alpha_scale=given)
        assert torch.equal(dx, plain)
        assert ((dalpha.double() - factor * want).abs() <= 1e-5 * size * abs(factor)).all()


@pytest.mark.parametrize("shape", [(6, 4, 5), (7,), (0, 3), (3, 0), ()], ids=str)
def test_lsq_as_compiled_code_asks_for_it(backend, shape):
    """By infinity, for which a kernel counts the elements itself: the same bits."""
    x, dy = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = []
    for scale in (cg.reference.lsq_scale(x, 3), math.inf):
        alpha = torch.tensor([0.3]).requires_grad_()
        y = torch.ops.coarsegrad.qrelu(x, alpha, 3, "relu", "ceil", "three_valued", scale, None)
        found += torch.autograd.grad(y, alpha, dy)
    assert torch.equal(*found) and found[0].isfinite() and (found[0] != 0 or not x.numel())


def test_identity_chain_below_zero(backend):
    """identity passes below zero, so chain's A is c - u there as well: -u."""
    x, dy = torch.tensor([-3.0, -0.5]), torch.tensor([1.0, 10.0])
    _, dalpha = gradients(x, torch.tensor([0.5]), dy, bits=2, ste="identity", alpha_grad="chain")
    assert dalpha.tolist() == [6.0 + 10.0]


@pytest.mark.parametrize("alpha_grad", oracle.ALPHA_GRADS)
def test_the_half_dtypes_sum_in_float32(backend, alpha_grad):
    """4096 equal terms: a half-precision sum would stall long before the end."""
    x = torch.full((4096,), 0.7)
    x[::2] = 9.0
    for dtype in oracle.HALF_DTYPES:
        want = oracle.Staircase64(x.to(dtype), torch.tensor([0.5]), 2, "ceil")
        dy = torch.full((4096,), 0.37, dtype=dtype)
        _, dalpha = gradients(x.to(dtype), torch.tensor([0.5]), dy, bits=2, alpha_grad=alpha_grad)
        assert_grad_alpha(dalpha, *want.grad_alpha(dy, "clipped_relu", alpha_grad), torch.float32, dtype)


@pytest.mark.parametrize("dtype", oracle.HALF_DTYPES, ids=str)
@pytest.mark.parametrize("ste", ["clipped_relu", "log_tailed_relu"])
def test_the_top_is_the_rounded_level(backend, dtype, ste):
    """The gate compares with L[q] as the dtype has it: x = L[q] is inside though q * alpha is below it."""
    alpha = oracle.log_uniform(200, 1e-2, 1e1, seed=5)
    top = oracle.levels(alpha, 3, dtype)[:, -1:]
    x = torch.cat([oracle.down(top), top, oracle.up(top)], 1)
    assert (top.float() > 7 * alpha[:, None]).any() and (top.float() < 7 * alpha[:, None]).any()
    dx, dalpha = gradients(x, alpha, torch.ones_like(x), bits=3, ste=ste, alpha_grad="two_valued", channel_dim=0)
    if ste == "clipped_relu":
        assert torch.equal(dx, torch.tensor([1.0, 1.0, 0.0], dtype=dtype).expand(200, 3))
    assert torch.equal(dalpha, torch.full((200,), 7.0)), "only the point above the top adds q"


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("dtype", oracle.HALF_DTYPES, ids=str)
@pytest.mark.parametrize("ste", ["log_tailed_relu", "reverse_exponential"])
def test_every_number_of_16_bits(backend, ste, dtype, bits):
    """In order, so that all of a block is far above the top, infinite or NaN; then some of a block."""
    patterns = oracle.every_value(dtype)
    generator = torch.Generator().manual_seed(bits)
    few = patterns[torch.randperm(2**16, generator=generator)[:512]]
    moderate = torch.randn(2**14, generator=generator).to(dtype)
    mixed = torch.cat([few, moderate])[torch.randperm(2**14 + 512, generator=generator)]
    x, alpha = torch.cat([patterns, mixed]), torch.tensor([0.3])
    dy = torch.randn(x.shape, generator=generator).to(dtype)
    dx, _ = gradients(x, alpha, dy, need_alpha=False, bits=bits, ste=ste)
    want = oracle.Staircase64(x, alpha, bits, "ceil")
    assert torch.equal(dx[x.isnan()], dy[x.isnan()])
    slope, grad_x = want.slope(ste), want.grad_x(dy, ste)
    tiny = torch.finfo(torch.float32).tiny  # below, g' may be flushed to zero
    small = (slope > 0) & (slope < 2 * tiny)
    assert ((dx.double() - grad_x).abs() <= 2 * tiny * dy.double().abs())[small].all()
    rest = ~small & ~x.isnan()
    assert_grad_x(dx[rest], grad_x[rest], dtype, None, slope[rest], dy[rest])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("ste", ["log_tailed_relu", "reverse_exponential"])
def test_dx_does_not_depend_on_the_numbers_beside_it(backend, ste, dtype):
    """A NaN or a huge number takes another way to its slope; those around it keep their bits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20 * 64 + 7, generator=generator).mul(3).to(dtype)
    dy = torch.randn(x.shape, generator=generator).to(dtype)
    odd = torch.zeros(x.shape, dtype=torch.bool)
    odd[5::64] = odd[40::128] = True
    alone, _ = gradients(x, torch.tensor([0.3]), dy, need_alpha=False, bits=2, ste=ste)
    for value in (math.nan, math.inf, -math.inf, torch.finfo(dtype).max):
        dx, _ = gradients(torch.where(odd, value, x), torch.tensor([0.3]), dy, need_alpha=False, bits=2, ste=ste)
        assert oracle.same_bits(dx[~odd], alone[~odd])


@pytest.mark.parametrize("ste", oracle.STES)
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
def test_levels_that_overflow(backend, rounding, ste):
    """float16, alpha = 1000, 8 bits: L[66..255] are infinite, so nothing finite is above the top."""
    x = torch.tensor([500.0, 1000.0, 60000.0, 65504.0, math.inf, -1.0], dtype=torch.float16)
    dy, alpha = torch.ones(6, dtype=torch.float16), torch.tensor([1000.0])
    for alpha_grad in ("exact", "three_valued", "two_valued"):
        dx, dalpha = gradients(x, alpha, dy, bits=8, ste=ste, rounding=rounding, alpha_grad=alpha_grad)
        want = oracle.Staircase64(x, alpha, 8, rounding)
        assert_grad_alpha(dalpha, *want.grad_alpha(dy, ste, alpha_grad), torch.float32, torch.float16)
        finite = slice(0, 4)
        error = (dx.double() - want.grad_x(dy, ste)).abs()[finite]
        assert (error <= oracle.ulp(want.grad_x(dy, ste), torch.float16)[finite]).all()
