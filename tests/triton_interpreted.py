"""Every Triton kernel against the reference, in Triton's interpreter; test_triton.py runs this.

Outputs, codes, mask bits and dx are bit-equal, but for reverse_exponential: its exp is another one than torch's, and dx
within 4 ulps in float32 and float64, 1 in the half dtypes. dalpha differs by the order of its sum: by 1e-5 of the sum
of magnitudes (1e-12 in float64).

The interpreter computes as a GPU does, by gpu_arithmetic.py, which triton_gpu_arithmetic.py tests.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from gpu_arithmetic import MODELS
from saved_for import saved_for

import coarsegrad as cg
from coarsegrad import integer, reference
from coarsegrad._types import ALPHA_GRADS, BUILT_IN, DTYPES, ROUNDINGS, MaskKind, wide_dtype
from coarsegrad.testing import hard_inputs, triton_ulps_apart, ulps_apart
from coarsegrad.triton import kernels, layer_kernels, layers, qrelu, signed, signed_kernels
from coarsegrad.triton.layer_kernels import _ceil_within
from coarsegrad.triton.staircase import code_by_guess, divide, narrow, refined_quotient, widen
from coarsegrad.triton.ste import exp_minus

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"

# The second has levels half-way between two numbers of bfloat16; those of the last ones collapse or overflow somewhere.
ALPHAS = (0.3, 1.01171875, 7e-8, 1e-39, 2e4, 3e38)


def same(a, b):
    assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0, 1e4, -1e4), b.nan_to_num(7.0, 1e4, -1e4))


def channels_of_hard_inputs(dtype, bits, rounding, alphas=ALPHAS):
    """alpha [C], x [C, m]."""
    alpha = torch.tensor(alphas, dtype=wide_dtype(dtype))
    return alpha, torch.stack([hard_inputs(a, bits, rounding, dtype) for a in alpha.tolist()])


def ordinary(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_forward(x, alpha, bits, rounding, mask, channel_dim=None):
    arguments = (alpha, bits, rounding, mask, True, channel_dim)
    for got, want in zip(qrelu.qrelu_forward(x, *arguments), reference.qrelu_forward(x, *arguments), strict=True):
        assert same(got, want)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype, rounding, bits):
    """Per channel and per tensor; the kind of mask goes round."""
    alpha, x = channels_of_hard_inputs(dtype, bits, rounding, ALPHAS if bits < 6 else ALPHAS[bits - 6 :: 3])
    assert_forward(x, alpha, bits, rounding, ("nothing", "positive", "inside", "state", "near")[bits % 5], 0)
    for i in range(0, len(alpha), 2 if bits < 5 else len(alpha)):
        assert_forward(x[i], alpha[i : i + 1], bits, rounding, "state")


@pytest.mark.parametrize("mask", ("positive", "inside", "state", "near"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_mask_codes_alone_in_place_and_back(dtype, mask):
    alpha, x = channels_of_hard_inputs(dtype, 3, "nearest")
    assert_forward(x, alpha, 3, "nearest", mask, 0)
    y, bits, codes = reference.qrelu_forward(x, alpha, 3, "nearest", mask, True, 0)
    assert same(qrelu.qrelu_codes(x, alpha, 3, "nearest", 0), codes)
    written = x.clone()
    for got, want in zip(qrelu.qrelu_forward_(written, alpha, 3, "nearest", mask, False, 0), (bits, codes[:0])):
        assert same(got, want)
    assert same(written, y)
    back = (codes, alpha, 3, list(x.shape), dtype, 0, torch.contiguous_format)
    assert same(qrelu.dequantize(*back), reference.dequantize(*back))


@pytest.mark.parametrize("bits", (1, 2, 4, 8))
def test_dequantize_every_width(bits):
    alpha, x = channels_of_hard_inputs(torch.bfloat16, bits, "ceil", ALPHAS[:2])
    codes = reference.qrelu_codes(x, alpha, bits, "ceil", 0)
    back = (codes, alpha, bits, list(x.shape), torch.bfloat16, 0, torch.contiguous_format)
    assert same(qrelu.dequantize(*back), reference.dequantize(*back))


@pytest.mark.parametrize("bits", (1, 2, 3, 8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_from_slopes(dtype, bits):
    x, dy = (ordinary(2, 3, 37, 11, dtype=dtype, seed=i).to(memory_format=torch.channels_last) for i in (0, 1))
    dy[:, 0, ::3] = float("inf")
    codes = reference.qrelu_codes(x, torch.tensor([0.3]), bits, "ceil", None)
    slopes = ordinary(2**bits, dtype=wide_dtype(dtype))
    slopes[0] = 0
    for given in (dy, dy[:0]):
        arguments = (given, codes if len(given) else codes[:0], slopes, bits)
        assert same(qrelu.backward_from_slopes(*arguments), reference.backward_from_slopes(*arguments))


def backward_arguments(x, alpha, dy, bits, ste, rounding, rule, channel_dim, need_x=True, scale=1.0):
    mask, codes, saves_x = saved_for(ste, rounding, rule, need_x)
    _, packed_mask, packed_codes = reference.qrelu_forward(x, alpha, bits, rounding, mask, codes, channel_dim)
    tensors = (
        dy,
        alpha if saves_x else None,
        x if saves_x else None,
        packed_mask if mask != MaskKind.nothing else None,
        packed_codes if codes else None,
    )
    return (*tensors, bits, ste, rounding, rule or "exact", scale, channel_dim, need_x, rule is not None)


def assert_backward(arguments):
    dy, ste = arguments[0], arguments[6]
    dx, dalpha = qrelu.qrelu_backward(*arguments)
    want_dx, want_dalpha = reference.qrelu_backward(*arguments)
    if ste == "reverse_exponential":
        assert ulps_apart(dx, want_dx).max() <= (1 if dx.element_size() == 2 else 4)
    else:
        assert same(dx, want_dx)
    assert (dalpha.shape, dalpha.dtype) == (want_dalpha.shape, want_dalpha.dtype)
    magnitude = dy.double().abs().sum() * 2 ** (arguments[5] + 3)
    if dalpha.numel():
        error = (dalpha - want_dalpha).abs().double()
        assert (error <= (1e-12 if dalpha.dtype == torch.float64 else 1e-5) * magnitude).all()
        assert dalpha.abs().max() > 0 or magnitude == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", (None, *ALPHA_GRADS))
@pytest.mark.parametrize("ste", BUILT_IN)
def test_backward(ste, rule, dtype):
    """Per channel and per tensor in turn; each STE with each rule and rounding is both, in two dtypes each."""
    for i, (rounding, bits) in enumerate(zip(ROUNDINGS, (1, 2, 5))):
        alpha, x = channels_of_hard_inputs(dtype, bits, rounding, (0.3, 0.5, 20.0))
        # Where u * g'(u) or a wide NaN would swallow the sum, there is nothing to compare.
        x = torch.where(x.isfinite() & (x.abs() < 30 * 2**bits), x, 0.25).to(dtype)
        dy = ordinary(*x.shape, dtype=dtype)
        per_channel = (i + DTYPES.index(dtype)) % 2 == 0
        some, channel_dim = ((x, alpha, dy), 0) if per_channel else ((x[0], alpha[:1], dy[0]), None)
        assert_backward(backward_arguments(*some, bits, ste, rounding, rule, channel_dim))


@pytest.mark.parametrize("ste", BUILT_IN)
def test_dx_of_special_values(ste):
    """A select, never a product: dy of inf and NaN; x of every special value."""
    for dtype in DTYPES:
        alpha, x = channels_of_hard_inputs(dtype, 2, "ceil", (0.3, 0.5))
        for value in (float("inf"), float("nan"), -1.0):
            dy = torch.full_like(x, value)
            dx, _ = qrelu.qrelu_backward(*(arguments := backward_arguments(x, alpha, dy, 2, ste, "ceil", None, 0)))
            want, _ = reference.qrelu_backward(*arguments)
            if ste == "reverse_exponential":
                assert ulps_apart(dx, want).max() <= 4
            else:
                assert same(dx, want)


@pytest.mark.parametrize("count", (0, 1, 7, 31, 33, 255, 1024, 2048, 4097))
def test_sizes(count):
    x, dy, alpha = ordinary(count), ordinary(count, seed=1), torch.tensor([0.4])
    for dtype in (torch.float32, torch.bfloat16):
        for bits in (1, 2, 4, 8):
            for mask in ("state", "near"):
                assert_forward(x.to(dtype), alpha, bits, "ceil", mask)
        for case in (("clipped_relu", None), ("relu", "exact"), ("clipped_relu", "three_valued"), ("relu", "chain")):
            ste, rule = case
            assert_backward(backward_arguments(x.to(dtype), alpha, dy.to(dtype), 2, ste, "ceil", rule, None))


SHAPES = (
    ((2, 3, 5, 7), 1, torch.channels_last),
    ((2, 3, 5, 7), 1, torch.contiguous_format),
    ((2, 67, 3, 3), 1, torch.channels_last),
    ((3, 5, 4, 2), 2, torch.channels_last),
    ((5, 1300), 0, torch.contiguous_format),
    ((70, 70), 1, torch.contiguous_format),
    ((3000, 2), 1, torch.contiguous_format),
    ((3, 2, 72), 1, torch.contiguous_format),
    ((40, 72), 1, torch.contiguous_format),
    ((2, 1, 9), 1, torch.contiguous_format),
    ((0, 3), 1, torch.contiguous_format),
)


@pytest.mark.parametrize("shape, channel_dim, memory_format", SHAPES)
def test_channels(shape, channel_dim, memory_format):
    x = ordinary(*shape).contiguous(memory_format=memory_format)
    dy = ordinary(*shape, seed=1).contiguous(memory_format=memory_format)
    alpha = torch.linspace(0.2, 0.9, shape[channel_dim])
    assert_forward(x, alpha, 3, "ceil", "inside", channel_dim)
    assert_forward(x, alpha, 3, "ceil", "near", channel_dim)
    for ste, rule in (
        ("relu", "exact"),
        ("clipped_relu", "two_valued"),
        ("log_tailed_relu", "chain"),
        ("trust", "exact"),
        ("trust", "two_valued"),
    ):
        for need_x in (True, False):
            assert_backward(backward_arguments(x, alpha, dy, 3, ste, "nearest", rule, channel_dim, need_x, scale=0.25))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((3, 2, 4104), (3, 2, 4103), (5, 2, 300), (2000, 16), (2000, 15)), ids=str)
def test_slices_of_many_tiles(shape, dtype, monkeypatch):
    """A slice goes on within a row of tiles and to the next ones."""
    monkeypatch.setattr(qrelu, "_SUM_PROGRAMS", 4)
    x, dy = ordinary(*shape, dtype=dtype), ordinary(*shape, dtype=dtype, seed=1)
    alpha = torch.linspace(0.2, 0.9, shape[1])
    for ste, rule, bits in (("relu", "exact", 1), ("clipped_relu", "three_valued", 2), ("relu", "chain", 2)):
        assert_backward(backward_arguments(x, alpha, dy, bits, ste, "ceil", rule, 1, need_x=False, scale=0.3))


def test_slices_and_views():
    whole, alpha = ordinary(40, 60), torch.tensor([0.4])
    for x in (whole[:, 1:], whole[3:, ::2], whole.t(), whole[0, 1:], ordinary(1).expand(50), ordinary(1)[0]):
        assert_forward(x, alpha, 2, "ceil", "state")
    copy, view = whole.clone(), whole[:, ::3]
    qrelu.qrelu_forward_(copy[:, ::3], alpha, 2, "ceil", "nothing", False, None)
    assert torch.equal(copy[:, ::3], reference.qrelu_forward(view, alpha, 2, "ceil", "nothing", False, None)[0])
    assert torch.equal(copy[:, 1::3], whole[:, 1::3]), "and nothing else is written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_alpha_on_a_gpu_makes_nan(dtype, monkeypatch):
    """On a CPU it is an error before; the kernels get it here as a GPU's would."""
    x = ordinary(40, dtype=dtype)
    with pytest.raises(ValueError, match="alpha must be finite and > 0"):
        qrelu.qrelu_forward(x, torch.tensor([-1.0]), 2, "ceil", "nothing", False, None)
    monkeypatch.setattr(qrelu, "checked_values", lambda alpha, wide: alpha.to(wide))
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        for rounding in ROUNDINGS:
            y = qrelu.qrelu_forward(x, torch.tensor([bad]), 2, rounding, "inside", True, None)[0]
            assert y.isnan().all()
    alpha = torch.tensor([0.5, float("nan")])
    y, *_ = qrelu.qrelu_forward(x.view(2, 20), alpha, 2, "ceil", "nothing", False, 0)
    assert not y[0].isnan().any() and y[1].isnan().all()


def test_two_runs_give_the_same_bits():
    x, dy = ordinary(3, 5, 700), ordinary(3, 5, 700, seed=1)
    for alpha, channel_dim in ((torch.tensor([0.4]), None), (torch.linspace(0.2, 0.9, 5), 1)):
        arguments = backward_arguments(x, alpha, dy, 3, "log_tailed_relu", "ceil", "chain", channel_dim)
        one, two = (qrelu.qrelu_backward(*arguments) for _ in range(2))
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_what_does_not_fit_is_refused():
    x, alpha = ordinary(40), torch.tensor([0.4])
    arguments = backward_arguments(x, alpha, x, 2, "clipped_relu", "ceil", None, None)
    with pytest.raises(ValueError, match="mask must be a uint8 tensor of 5 bytes"):
        qrelu.qrelu_backward(*arguments[:3], arguments[3][:4], *arguments[4:])
    with pytest.raises(ValueError, match="codes must be a uint8 tensor of 10 bytes"):
        short = torch.zeros(9, dtype=torch.uint8)
        qrelu.dequantize(short, alpha, 2, [40], torch.float32, None, torch.contiguous_format)
    with pytest.raises(ValueError, match="x, of grad_y's shape and dtype, and alpha must be given"):
        qrelu.qrelu_backward(x, None, None, None, None, 2, "relu", "ceil", "chain", 1.0, None, True, True)


@triton.jit
def _divide_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, divide(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def numbers_of_all_magnitudes(count, seed):
    """float32, uniform in their bits."""
    words = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(seed))
    return words.to(torch.int32).view(torch.float32)


def test_divide():
    a, b = numbers_of_all_magnitudes(2**17, 0), numbers_of_all_magnitudes(2**17, 1).abs()
    special = torch.tensor([0.0, -0.0, 1.0, 3e38, 1e-45, 1.1754944e-38, float("inf"), float("nan")])
    a[: 8 * 8], b[: 8 * 8] = special.repeat(8), torch.where(special == 0, 7.0, special).abs().repeat_interleave(8)
    out, want = torch.empty_like(a), a / b
    _divide_kernel[(1,)](a, b, out, BLOCK=2**17)
    normal = want.abs() >= torch.finfo(torch.float32).tiny
    assert torch.equal(out[normal], want[normal]) and normal.sum() > 2**15
    assert torch.equal(out.isnan(), want.isnan())
    rest = ~normal & ~want.isnan()
    assert ulps_apart(out[rest], want[rest]).max() <= 1


@triton.jit
def _refined_quotient_kernel(a_ptr, b_ptr, out_ptr, error, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    b = tl.load(b_ptr + at)
    inverse = ((1.0 / b).to(tl.int32, bitcast=True) + error).to(tl.float32, bitcast=True)
    tl.store(out_ptr + at, refined_quotient(tl.load(a_ptr + at), b, inverse))


@pytest.mark.parametrize("error", range(-2, 3))
def test_a_quotient_does_not_depend_on_the_last_bits_of_the_inverse(error):
    """As an inverse is an approximation on a GPU."""
    b = torch.randint(2**23, 2**24, (2**17,), generator=torch.Generator().manual_seed(0))
    b[:512] = torch.cat([2**23 + torch.arange(256), 2**24 - 1 - torch.arange(256)])
    a = numbers_of_all_magnitudes(2**17, 1)
    a = torch.where(a.isfinite() & (a.abs() > 2.0**-100), a, 1.0)
    # a / b as near to half-way between two numbers as can be: m * b is 2**25 * a - 1, m odd of 25 bits.
    m = torch.tensor([pow(odd, -1, 2**25) * -1 % 2**25 for odd in (b | 1).tolist()[: 2**14]])
    hard = (m * (b[: 2**14] | 1) + 1) // 2**25
    found = (m >= 2**24) & (hard >= 2**23)
    assert found.sum() > 1000
    a[: 2**14] = torch.where(found, hard.float(), a[: 2**14])
    b[: 2**14] |= found
    b = b.float() / 2**23
    out = torch.empty_like(a)
    _refined_quotient_kernel[(1,)](a, b, out, error, BLOCK=2**17)
    assert torch.equal(out, a / b)


@triton.jit
def _round_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, narrow(tl.load(x_ptr + at), tl.bfloat16))


def test_what_the_interpreter_rounds_to_bfloat16_is_what_hardware_does():
    """Every upper half of a float32, with every kind of a lower one: 0, below, at and above a half."""
    upper = torch.arange(2**16)[:, None] << 16
    x = (upper + torch.tensor([0, 1, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xDCBA, 0xFFFF])).flatten()
    x = torch.where(x < 2**31, x, x - 2**32).to(torch.int32).view(torch.float32)
    out = torch.empty_like(x, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, out, BLOCK=2**19)
    want = x.to(torch.bfloat16)
    number = ~x.isnan()
    assert torch.equal(out.isnan(), ~number)
    assert torch.equal(out.view(torch.int16)[number], want.view(torch.int16)[number])


@triton.jit
def _guess_kernel(x_ptr, out_ptr, alpha_ptr, error, BITS: tl.constexpr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, alpha = tl.load(x_ptr + at), tl.load(alpha_ptr)
    inverse = ((1.0 / alpha).to(tl.int32, bitcast=True) + error).to(tl.float32, bitcast=True)
    tl.store(out_ptr + at, code_by_guess(widen(x), alpha, inverse, x.dtype, BITS, ROUNDING).to(tl.int32))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_half_has_its_code_whatever_the_last_bits_of_the_inverse(dtype, rounding):
    """8 bits are the hardest: where k * alpha just exceeds a power of two, levels move by most of a stair."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    number = ~x.isnan()
    for alpha in (1.0, 1.00393, 1.00787, 1.9843, 0.3, 0.0123):
        alpha = torch.tensor([alpha])
        want = reference.qrelu_codes(x[number], alpha, 8, rounding, None)
        for error in (-4, 0, 4):
            out = torch.empty(x.shape, dtype=torch.int32)
            _guess_kernel[(1,)](x, out, alpha, error, BITS=8, ROUNDING=rounding, BLOCK=2**16)
            assert torch.equal(out[number].to(torch.uint8), want)


@triton.jit
def _exp_minus_kernel(t_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, exp_minus(tl.load(t_ptr + at)))


@pytest.mark.parametrize("dtype, most", ((torch.float32, 2), (torch.float64, 3)))
def test_exp_minus(dtype, most):
    end = 110 if dtype == torch.float32 else 760
    t = torch.cat([torch.linspace(0, end, 6144), torch.logspace(-30, 2, 2047), torch.tensor([float("inf")])]).to(dtype)
    out = torch.empty_like(t)
    _exp_minus_kernel[(1,)](t, out, BLOCK=8192)
    want = torch.exp(-t.double()).to(dtype)
    assert ulps_apart(out, want).max() <= most


@triton.jit
def soft_tail(u, q):
    return tl.where(u > 0, 1 / (1 + u / q), 0.0)


@triton.jit
def half_slope(u, q):
    return tl.where(u > 0, 0.5, 0.0)


@triton.jit
def wrong(u, q):
    return tl.where(u > 0, 0.25, 0.0)


OWN = (
    (soft_tail, lambda u, q: torch.where(u <= 0, 0.0, 1 / (1 + u / q)), "x"),
    (half_slope, lambda u, q: torch.where(u > 0, 0.5, 0.0).to(u.dtype), "positive"),
    (soft_tail, lambda u, q: torch.where(u <= 0, 0.0, 1 / (1 + u / q)), "codes"),
)


@pytest.mark.parametrize("arithmetic", ("rounded", "gpu"))
@pytest.mark.parametrize("rule", (None, *ALPHA_GRADS))
@pytest.mark.parametrize("function, gprime, needs", OWN, ids=("soft_tail", "half_slope", "by_codes"))
def test_an_own_ste_runs_in_triton(function, gprime, needs, rule, arithmetic, monkeypatch):
    """Within 2 ulps where a quotient is rounded; a GPU errs in both divisions of soft_tail, one by a literal."""
    divides = arithmetic == "gpu" and function is soft_tail
    if arithmetic == "rounded":
        monkeypatch.delitem(MODELS, "fdiv")
    x, dy = ordinary(60), ordinary(60, seed=1)
    results = []
    with cg.register_ste("own", gprime, needs=needs, triton=function):
        assert triton_ulps_apart("own") <= (8 if divides else 2)
        assert triton_ulps_apart("own", 8, torch.float64) <= 2
        for backend in ("reference", "triton"):
            leaf, alpha = x.clone().requires_grad_(), torch.tensor([0.4], requires_grad=rule is not None)
            with cg.use_backend(backend), monkeypatch.context() as patch:
                if backend == "triton":
                    patch.setattr(reference, "qrelu_backward", None)
                cg.qrelu(leaf, alpha, 2, ste="own", alpha_grad=rule or "exact").backward(dy)
            results.append((leaf.grad, alpha.grad))
    (dx, dalpha), (dx_triton, dalpha_triton) = results
    assert ulps_apart(dx, dx_triton).max() <= (8 if divides and (needs == "x" or rule == "chain") else 2)
    if rule is not None:
        assert dalpha_triton.item() == pytest.approx(dalpha.item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    "dtype, bits", [(torch.float32, 1), (torch.float32, 4), (torch.float64, 2), (torch.float64, 8)]
)
@pytest.mark.parametrize("ste", [ste.name for ste in cg.stes().values() if isinstance(ste.triton, str)])
def test_stes_that_follow_the_thresholds(ste, dtype, bits):
    """Under each rounding, around each threshold and level and between them. Another exponential, another sine."""
    assert triton_ulps_apart(ste, bits, dtype) <= 8
    x, dy = ordinary(500, dtype=dtype).abs() * 2**bits, ordinary(500, dtype=dtype, seed=1)
    for rounding in ROUNDINGS:
        found = []
        for backend in ("reference", "triton"):
            leaf, alpha = x.clone().requires_grad_(), torch.tensor([0.4], requires_grad=True)
            with cg.use_backend(backend):
                cg.qrelu(leaf, alpha, bits, ste=ste, rounding=rounding, alpha_grad="chain").backward(dy)
            found.append((leaf.grad, alpha.grad))
        assert ulps_apart(found[0][0], found[1][0]).max() <= 8
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-4)


def test_a_wrong_triton_form_is_seen():
    with cg.register_ste("own", OWN[1][1], triton=wrong):
        assert triton_ulps_apart("own") > 1000


def test_an_own_ste_without_a_triton_form_runs_on_the_reference():
    leaf = ordinary(20).requires_grad_()
    with cg.register_ste("own", OWN[1][1]), cg.use_backend("triton"):
        cg.qrelu(leaf, torch.tensor([0.4]), 2, ste="own").sum().backward()
        assert torch.equal(leaf.grad, 0.5 * (leaf > 0))
        with pytest.raises(ValueError, match="has no Triton form"):
            triton_ulps_apart("own")


@triton.jit
def _ceil_kernel(v_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, _ceil_within(tl.load(v_ptr + at), 15.0))


def test_the_code_of_a_layer_is_the_ceiling_of_subnormals_too():
    v = torch.tensor([-1e30, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 0.5, 1.0, 1.0000001, 14.0, 14.5, 15.0, 15.5, 1e30])
    v = torch.cat([v, torch.tensor([float("inf")])])
    out = torch.empty(16, dtype=torch.int32)
    _ceil_kernel[(1,)](v, out, BLOCK=16)
    assert out.tolist() == v.ceil().clamp(0, 15).int().tolist()


def test_tiles_of_layers_larger_than_one():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (130, 257), generator=g, dtype=torch.uint8)
    weight = torch.randint(0, 256, (70, 160), generator=g, dtype=torch.uint8)
    layer = (codes, weight, 8, 4, torch.rand(70, generator=g) - 0.5, torch.rand(70, generator=g))
    assert same(layers.integer_linear_float(*layer), integer.KERNELS["integer_linear_float"](*layer))
    images = codes[:, :256].reshape(2, 65, 16, 16)[:, :64]
    layer = (images, weight[:, :32], 8, 1, *layer[4:], None, 255, [2, 2], [1, 2], [1, 0], [2, 1], 2)
    assert same(layers.integer_conv2d(*layer), integer.KERNELS["integer_conv2d"](*layer))


def test_every_kernel_is_used():
    """A kernel that no launch needs would be tested by nothing."""
    for module, launcher in ((kernels, qrelu), (layer_kernels, layers), (signed_kernels, signed)):
        source = open(launcher.__file__).read()
        for name in vars(module):
            assert not name.endswith("_kernel") or f"kernels.{name}[" in source, name
