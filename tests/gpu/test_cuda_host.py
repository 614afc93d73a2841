"""The CUDA kernels against the reference, run on the CPU (tests/cpp/cuda_host.h): every kernel, dtype and rule."""

from __future__ import annotations

import itertools
import math

import cuda_host
import pytest
import torch
from cuda_host import ALPHA_GRADS, DTYPES, MASKS, ROUNDINGS, STES, Case
from host_cases import (
    IRREGULAR,
    SIZES,
    X_STES,
    alpha_tensor,
    backward_case,
    backward_cases,
    backward_from_slopes_cases,
    channel_cases,
    dequantize_cases,
    forward_case,
    forward_cases,
    make_grad,
    make_x,
    same,
    wrong_outputs,
)

from coarsegrad import reference

pytestmark = pytest.mark.skipif(cuda_host.why_not() is not None, reason=str(cuda_host.why_not()))

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return cuda_host.build_once(tmp_path_factory.mktemp("cuda_host"), "cuda_host", "-Og")


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


@pytest.mark.costly
def test_sanitizers_find_nothing(tmp_path):
    program = cuda_host.build_once(tmp_path, "cuda_host", cuda_host.SANITIZED)
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
