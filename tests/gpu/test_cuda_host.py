"""The CUDA kernels against the reference, run on the CPU (tests/cpp/cuda_host.h): every kernel, dtype and rule."""

from __future__ import annotations

import functools
import itertools
import math

import cuda_host
import pytest
import torch
from cuda_host import ALPHA_GRADS, DTYPES, MASKS, ROUNDINGS, STES, Case
from paths import ROOT
from saved_for import saved_for

from coarsegrad import reference
from coarsegrad._types import MaskKind, wide_dtype
from coarsegrad.testing import hard_inputs, ulps_apart

pytestmark = pytest.mark.skipif(cuda_host.why_not() is not None, reason=str(cuda_host.why_not()))

SIZES = (0, 1, 31, 32, 33, 255, 4097, 100_003)
ALPHAS = (0.5, 0.3, 1.7, 0.0154, 41.0, 3e-5)
# (channels, inner, rows): the innermost dimension, by element and by pack; short runs, runs of whole packs and blocks;
# one row; one channel.
CHANNELS = (
    *((5, 1, 67), (70, 1, 9), (8, 1, 67), (264, 1, 9)),
    *((3, 5, 61), (2, 49, 7), (4, 64, 9), (2, 3000, 2), (40, 8, 1), (1, 3, 20)),
)
# Not regular in these dtypes: levels that collapse or overflow, or a reciprocal that does.
IRREGULAR = {
    torch.float32: (1e-40, 1e38),
    torch.bfloat16: (1e-40, 1e38),
    torch.float16: (4e-8, 3e4),
    torch.float64: (1e-310, 1e307),
}
# g' of these has a quotient or an exponential, which are not rounded alike everywhere.
X_STES = ("log_tailed_relu", "reverse_exponential")
ULPS = {torch.float32: 6, torch.float64: 12, torch.bfloat16: 1, torch.float16: 1}

# In what is asked for again and again.
hard_inputs = functools.cache(hard_inputs)

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    build = tmp_path_factory.mktemp("cuda_host")
    cuda_host.configure(ROOT, build, "-Og")
    return cuda_host.build(build)


def make_x(dtype, alpha, bits, rounding, count, seed, finite=False):
    """Numbers on and beside the thresholds first, as many as there is room for, then random ones; shuffled."""
    generator = torch.Generator().manual_seed(seed)
    hard = hard_inputs(alpha, bits, rounding, dtype)
    hard = hard[torch.randperm(hard.numel(), generator=generator)][: count // 2]
    spread = alpha * 2**bits
    random = (torch.randn(count - hard.numel(), generator=generator, dtype=torch.float64) * spread).to(dtype)
    x = torch.cat([hard, random])[torch.randperm(count, generator=generator)]
    return torch.where(x.abs() < 1e30, x, 1.0).to(dtype) if finite else x


def make_grad(dtype, count, seed):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def alpha_tensor(values, dtype):
    return torch.tensor(values, dtype=wide_dtype(dtype))


def forward_case(x, alpha, bits, rounding, mask, codes, *, y=True, in_place=False, shape=None, **settings):
    """A forward of 1-d x; with `shape`, of [rows, channels, inner] with an alpha for each channel."""
    channel_dim = None if shape is None else 1
    shaped = x if shape is None else x.view(shape)
    out_y, out_mask, out_codes = reference.qrelu_forward(shaped, alpha, bits, rounding, mask, codes, channel_dim)
    expected = {"x" if in_place else "y": out_y.reshape(-1)} if y else {}
    if mask != "nothing":
        expected["mask"] = out_mask
    if codes:
        expected["codes"] = out_codes
    if shape is not None:
        settings |= {"channels": shape[1], "inner": shape[2]}
    return Case(
        "forward", x.dtype, bits, x.numel(), {"alpha": alpha, "x": x}, expected, rounding=rounding, mask=mask,
        expected=expected, **settings,
    )  # fmt: skip


def dequantize_case(codes, alpha, bits, shape, dtype, channel_dim, **settings):
    y = reference.dequantize(codes, alpha, bits, list(shape), dtype, channel_dim, torch.contiguous_format).reshape(-1)
    if channel_dim is not None:
        settings |= {"channels": shape[1], "inner": shape[2]}
    return Case(
        "dequantize", dtype, bits, y.numel(), {"alpha": alpha, "codes": codes}, {"y": y}, expected={"y": y}, **settings
    )


def backward_case(x, grad_y, alpha, bits, ste, rounding, alpha_grad, need_grad_x=True, *, shape=None, **settings):
    """A backward from what `saved` lists; expected holds grad_x, grad_alpha and grad_alpha's error bound."""
    channel_dim = None if shape is None else 1
    scale = 0.37
    mask_kind, saves_codes, saves_x = saved_for(ste, rounding, alpha_grad, need_grad_x)
    shaped = [t if shape is None else t.view(shape) for t in (x, grad_y)]
    _, mask, codes = reference.qrelu_forward(shaped[0], alpha, bits, rounding, mask_kind, saves_codes, channel_dim)
    inputs = {"grad_y": grad_y}
    if saves_x:
        inputs |= {"x": x, "alpha": alpha}
    if mask_kind != MaskKind.nothing:
        inputs["mask"] = mask
    if saves_codes:
        inputs["codes"] = codes

    def gradients(dy):
        return reference.qrelu_backward(
            dy, alpha if saves_x else None, shaped[0] if saves_x else None,
            mask if mask_kind != MaskKind.nothing else None, codes if saves_codes else None, bits, ste, rounding,
            alpha_grad or "exact", scale, channel_dim, need_grad_x, alpha_grad is not None,
        )  # fmt: skip

    grad_x, grad_alpha = gradients(shaped[1])
    expected, outputs = {}, {}
    if need_grad_x:
        expected["grad_x"] = outputs["grad_x"] = grad_x.reshape(-1)
    if alpha_grad is not None:
        expected["grad_alpha"] = outputs["grad_alpha"] = grad_alpha
        if x.numel():
            # Every term is at most |dy| times this, under chain with u g'(u) beside the code.
            u = x.double().abs().max() / alpha.double().min()
            most = 2**bits + (u if alpha_grad == "chain" else 0)
            size = scale * grad_y.double().abs().view(shape or (1, 1, -1)).sum((0, 2)) * most
        else:
            size = torch.zeros(alpha.numel(), dtype=torch.float64)
        expected["bound"] = size * (1e-14 if x.dtype == torch.float64 else 1e-6) + 1e-300
    if shape is not None:
        settings |= {"channels": shape[1], "inner": shape[2]}
    return Case(
        "backward", x.dtype, bits, x.numel(), inputs, outputs, rounding=rounding, mask=MASKS[mask_kind], ste=ste,
        alpha_grad=alpha_grad or "exact", scale=scale, expected=expected, **settings,
    )  # fmt: skip


def same(a, b):
    """Equal to the bit, but that any NaN equals any NaN."""
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    nan = a.isnan()
    if not torch.equal(nan, b.isnan()):
        return False
    a, b = (torch.cat([t.masked_fill(nan, 0).double(), t.masked_fill(nan, 0).signbit().double()]) for t in (a, b))
    return torch.equal(a, b)


def wrong_outputs(case, result):
    """The names of the outputs that are not what the reference says."""
    wrong = []
    for name, got in result.items():
        want = case.expected[name]
        if name == "grad_alpha":
            right = ((got.double() - want.double()).abs() <= case.expected["bound"]).all()
        elif name == "grad_x" and case.ste in X_STES:
            right = (ulps_apart(got, want) <= ULPS[case.dtype]).all()
        else:
            right = same(got, want)
        if not right:
            wrong.append(name)
    return wrong


def check(program, cases):
    for case, result in zip(cases, cuda_host.run(program, cases), strict=True):
        wrong = wrong_outputs(case, result)
        assert not wrong, (
            wrong,
            case.op,
            case.dtype,
            case.bits,
            case.count,
            case.rounding,
            case.mask,
            case.ste,
            case.alpha_grad,
            case.channels,
            case.inner,
            case.offset,
            case.inputs.get("alpha"),
        )


def forward_cases(dtype, sizes=SIZES[:-1], all_bits=range(1, 9)):
    """Every kernel of the forward at every number of bits, and at every size, aligned and not."""
    sizes, numbers = itertools.cycle(sizes), itertools.count()
    for rounding, mask, codes, bits in itertools.product(ROUNDINGS, MASKS, (False, True), all_bits):
        for size in (next(sizes), next(sizes)):
            n = next(numbers)
            alpha = alpha_tensor([ALPHAS[n % len(ALPHAS)]], dtype)
            x = make_x(dtype, alpha.item(), bits, rounding, size, n)
            yield forward_case(
                x, alpha, bits, rounding, mask, codes, y=not codes or n % 3 > 0, in_place=codes and n % 3 == 1,
                offset=n % 2 * (1 + n % 3), seed=n,
            )  # fmt: skip


def dequantize_cases(dtype, sizes=SIZES[:-1]):
    numbers = itertools.count()
    for bits, size in itertools.product(range(1, 9), sizes):
        n = next(numbers)
        alpha = alpha_tensor([ALPHAS[n % len(ALPHAS)]], dtype)
        x = make_x(dtype, alpha.item(), bits, "ceil", size, n)
        codes = reference.qrelu_codes(x, alpha, bits, "ceil", None)
        yield dequantize_case(codes, alpha, bits, (size,), dtype, None, offset=n % 2, seed=n)


def backward_from_slopes_cases(dtype, sizes=SIZES[:-1], all_bits=range(1, 9)):
    """A slope is now and then 0, where dy is infinite too."""
    for n, (bits, size) in enumerate(itertools.product(all_bits, sizes)):
        x = make_x(dtype, 0.3, bits, "ceil", size, n)
        codes = reference.qrelu_codes(x, alpha_tensor([0.3], dtype), bits, "ceil", None)
        slopes = make_grad(wide_dtype(dtype), 2**bits, n)
        slopes[n % 3 :: 3] = 0
        grad_y = make_grad(dtype, size, n + 1)
        grad_y[::7] = math.inf
        grad_x = reference.backward_from_slopes(grad_y, codes, slopes, bits)
        inputs = {"grad_y": grad_y, "codes": codes, "slopes": slopes}
        yield Case(
            "backward_from_slopes", dtype, bits, size, inputs, {"grad_x": grad_x}, expected={"grad_x": grad_x},
            offset=n % 2, seed=n,
        )  # fmt: skip


def backward_cases(dtype, sizes=SIZES[:-1], all_bits=range(1, 9), roundings=ROUNDINGS):
    """Every STE with every rule for alpha, and without; all widths of codes; grad_alpha alone too."""
    numbers = itertools.count()
    for ste, rounding, alpha_grad in itertools.product(STES, roundings, (None, *ALPHA_GRADS)):
        if ste == "identity" and alpha_grad is None:
            continue  # nothing is kept and dx is dy
        for bits in all_bits:
            n = next(numbers)
            size = sizes[n % len(sizes)]
            alpha = alpha_tensor([ALPHAS[n % len(ALPHAS)]], dtype)
            x = make_x(dtype, alpha.item(), bits, rounding, size, n, finite=alpha_grad == "chain")
            yield backward_case(
                x, make_grad(dtype, size, n), alpha, bits, ste, rounding, alpha_grad,
                need_grad_x=alpha_grad is None or n % 5 > 0, offset=n // 2 % 2, seed=n,
            )  # fmt: skip


def channel_cases(dtype):
    numbers = itertools.count()
    for (channels, inner, rows), bits, rounding in itertools.product(CHANNELS, (2, 8), ROUNDINGS):
        n = next(numbers)
        alpha = alpha_tensor([ALPHAS[(n + i) % 5] for i in range(channels)], dtype)
        shape, count = (rows, channels, inner), rows * channels * inner
        x = torch.stack([make_x(dtype, a.item(), bits, rounding, rows * inner, n + i).view(rows, inner)
                         for i, a in enumerate(alpha)], 1).reshape(-1)  # fmt: skip
        settings = {"shape": shape, "offset": n % 2, "seed": n}
        yield forward_case(x, alpha, bits, rounding, MASKS[n % len(MASKS)], n % 3 == 0, **settings)
        codes = reference.qrelu_codes(x.view(shape), alpha, bits, rounding, 1)
        yield dequantize_case(codes, alpha, bits, shape, dtype, 1, offset=n % 2, seed=n)
        grad_y = make_grad(dtype, count, n)
        yield backward_case(x, grad_y, alpha, bits, X_STES[n % 2], rounding, None, **settings)
        for alpha_grad in ALPHA_GRADS:
            finite = torch.where(x.abs() < 1e30, x, 1.0).to(dtype) if alpha_grad == "chain" else x
            ste = STES[(n + len(alpha_grad)) % len(STES)]
            yield backward_case(finite, grad_y, alpha, bits, ste, rounding, alpha_grad, n % 5 > 0, **settings)


@by_dtype
def test_forward(program, dtype):
    check(program, list(forward_cases(dtype)))


@by_dtype
def test_dequantize(program, dtype):
    check(program, list(dequantize_cases(dtype)))


@by_dtype
def test_backward_from_slopes(program, dtype):
    check(program, list(backward_from_slopes_cases(dtype)))


@by_dtype
def test_backward(program, dtype):
    check(program, list(backward_cases(dtype)))


@by_dtype
def test_channels(program, dtype):
    check(program, list(channel_cases(dtype)))


@by_dtype
def test_many_blocks(program, dtype):
    cases = [
        *forward_cases(dtype, SIZES[-1:], (2,)),
        *dequantize_cases(dtype, SIZES[-1:]),
        *backward_from_slopes_cases(dtype, SIZES[-1:]),
        *backward_cases(dtype, SIZES[-1:], (2,), ROUNDINGS[:1]),
    ]
    check(program, cases)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_every_number_of_16_bits(program, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    cases = []
    for n, (bits, rounding) in enumerate(itertools.product(range(1, 9), ROUNDINGS)):
        # The last two: where the distance of numbers is largest beside alpha, at the 8-bit levels of bfloat16; and in
        # float16, alpha at its least.
        for value in (*torch.logspace(-6, 4, 3, base=math.e).tolist(), 256 / 129, 2.0**-24):
            cases.append(forward_case(x, alpha_tensor([value], dtype), bits, rounding, MASKS[n % len(MASKS)], True))
    check(program, cases)


@by_dtype
def test_irregular_alpha(program, dtype):
    cases = []
    for value, bits, rounding in itertools.product(IRREGULAR[dtype], (2, 4, 8), ROUNDINGS):
        alpha = alpha_tensor([value], dtype)
        x = make_x(dtype, value, bits, rounding, 999, bits)
        cases.append(forward_case(x, alpha, bits, rounding, "inside", True))
        cases.append(forward_case(x, alpha, bits, rounding, "state", False))
        pair = alpha_tensor([value, 0.5], dtype)
        x = make_x(dtype, value, bits, rounding, 2 * 8200, bits)
        cases.append(forward_case(x, pair, bits, rounding, "inside", True, shape=(1, 2, 8200)))
        cases.append(forward_case(x, pair, bits, rounding, "positive", False, shape=(8200, 2, 1)))
    check(program, cases)


def irregular_backward_cases(dtype):
    """From x: with one such alpha, and with another beside it, by pack and innermost."""
    cases = []
    for value, ste, alpha_grad in itertools.product(IRREGULAR[dtype], X_STES, (None, "exact", "two_valued")):
        for alpha, shape in (([value], None), ([value, 0.5], (1, 2, 8200)), ([value, 0.5] * 4, (999, 8, 1))):
            count = math.prod(shape or (9001,))
            x, grad_y = make_x(dtype, value, 2, "ceil", count, 1), make_grad(dtype, count, 2)
            alpha = alpha_tensor(alpha, dtype)
            cases.append(backward_case(x, grad_y, alpha, 2, ste, "ceil", alpha_grad, shape=shape))
    return cases


@by_dtype
def test_irregular_alpha_backward(program, dtype):
    check(program, irregular_backward_cases(dtype))


def illegal_alpha_cases(dtype):
    """Expected of y is NaN in channel 0, and elsewhere what it is without an illegal alpha beside it."""
    cases = []
    x = make_x(dtype, 0.5, 2, "ceil", 4 * 2053, 0)
    good = alpha_tensor([0.5], dtype)
    for value, (channels, inner) in itertools.product((0.0, -1.0, math.nan, math.inf), ((4, 2053), (4, 1), (1, 1))):
        alpha = alpha_tensor([value, 0.5, 0.5, 0.5][:channels], dtype)
        illegal = torch.arange(x.numel()) // inner % channels == 0
        common = {"channels": channels, "inner": inner}
        for rounding in ROUNDINGS:
            y = reference.qrelu_forward(x, good, 2, rounding, "nothing", False, None)[0].masked_fill(illegal, math.nan)
            inputs = {"alpha": alpha, "x": x}
            cases.append(
                Case("forward", dtype, 2, x.numel(), inputs, {"y": y}, rounding=rounding, expected={"y": y}, **common)
            )
        codes = reference.qrelu_codes(x, good, 2, "ceil", None)
        y = reference.dequantize(codes, good, 2, list(x.shape), dtype, None, torch.contiguous_format)
        y = y.masked_fill(illegal, math.nan)
        inputs = {"alpha": alpha, "codes": codes}
        cases.append(Case("dequantize", dtype, 2, x.numel(), inputs, {"y": y}, expected={"y": y}, **common))
    return cases


@by_dtype
def test_illegal_alpha_makes_its_channel_nan(program, dtype):
    check(program, illegal_alpha_cases(dtype))


def select_cases(dtype):
    """Infinite and NaN dy where the gate is shut, or A is 0: they leave no trace."""
    x, grad_y = -torch.ones(777, dtype=dtype), torch.full((777,), math.inf, dtype=dtype)
    grad_y[::2] = math.nan
    alpha = alpha_tensor([0.5], dtype)
    cases = []
    for ste, alpha_grad in itertools.product(STES[1:], ALPHA_GRADS):
        case = backward_case(x, grad_y, alpha, 2, ste, "ceil", alpha_grad)
        case.expected = {name: torch.zeros_like(wanted) for name, wanted in case.outputs.items()} | {"bound": 0}
        cases.append(case)
    return cases


@by_dtype
def test_masked_gradients_are_selects(program, dtype):
    check(program, select_cases(dtype))


@by_dtype
def test_sums_do_not_depend_on_the_order_of_threads(program, dtype):
    x, grad_y = make_x(dtype, 0.3, 2, "ceil", 100_000, 1, finite=True), make_grad(dtype, 100_000, 2)
    cases = []
    for ste, alpha_grad, shape in (
        ("clipped_relu", "exact", None),
        ("relu", "three_valued", None),
        ("log_tailed_relu", "chain", None),
        ("clipped_relu", "exact", (100, 10, 100)),
        ("clipped_relu", "three_valued", (5000, 20, 1)),
    ):
        alpha = alpha_tensor([0.3] * (shape[1] if shape else 1), dtype)
        for seed in range(3):
            cases.append(backward_case(x, grad_y, alpha, 2, ste, "ceil", alpha_grad, shape=shape, seed=seed))
    sums = [result["grad_alpha"] for result in cuda_host.run(program, cases)]
    for first in range(0, len(sums), 3):
        assert same(sums[first], sums[first + 1]) and same(sums[first], sums[first + 2])


def test_sanitizers_find_nothing(tmp_path):
    flags = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
    cuda_host.configure(ROOT, tmp_path, flags)
    program = cuda_host.build(tmp_path)
    for dtype in DTYPES:
        cases = [*forward_cases(dtype, (33, 4097), (3,)), *dequantize_cases(dtype, (0, 33, 4097))]
        cases += backward_from_slopes_cases(dtype, (33, 4097), (1, 3, 8))
        cases += backward_cases(dtype, (33, 4097), (1, 2, 3, 5), ROUNDINGS[:1])
        if dtype in (torch.float32, torch.bfloat16):  # the others differ in how they are read and rounded
            # With channels, of each kind of call and of each layout one, by the fewest channels: many take long.
            channels = sorted(channel_cases(dtype), key=lambda case: -case.channels)
            cases += {
                (c.op, c.inner == 1, c.rounding, c.mask, c.ste, c.alpha_grad, *c.inputs, *c.outputs): c
                for c in channels
            }.values()
            cases += {(c.op, c.channels, c.inner): c for c in channels}.values()
        check(program, cases)
