"""The CUDA kernels of the signed staircase and of the Hadamard rotation against the reference, run on the CPU."""

from __future__ import annotations

import itertools
import math

import cuda_host
import pytest
import torch
from cuda_host import DTYPES, Case
from host_cases import IRREGULAR, alpha_tensor, same
from host_cases_signed import (
    BITS,
    channel_cases,
    forward_case,
    given_cases,
    group_cases,
    hadamard_case,
    hadamard_cases,
    make_x,
)
from test_cuda_host import by_dtype

from coarsegrad import reference
from coarsegrad._types import top_level

pytestmark = [
    pytest.mark.costly,
    pytest.mark.skipif(cuda_host.why_not() is not None, reason=str(cuda_host.why_not())),
]


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return cuda_host.build_once(tmp_path_factory.mktemp("cuda_host_signed"), "cuda_host_signed", "-O1")


def every_case(dtype):
    return [*given_cases(dtype), *channel_cases(dtype), *group_cases(dtype), *hadamard_cases(dtype)]


def wrong_outputs(case, result):
    return [name for name, got in result.items() if not same(got, case.expected[name])]


def check(program, cases):
    for case, result in zip(cases, cuda_host.run(program, cases), strict=True):
        wrong = wrong_outputs(case, result)
        described = (case.op, case.dtype, case.bits, case.count, case.channels, case.inner, case.group, case.offset)
        assert not wrong, (wrong, described, case.inputs.get("alpha"))


@by_dtype
@pytest.mark.parametrize("make_cases", (given_cases, channel_cases, group_cases, hadamard_cases))
def test_against_the_reference(program, dtype, make_cases):
    check(program, list(make_cases(dtype)))


@by_dtype
def test_many_blocks(program, dtype):
    cases = list(given_cases(dtype, (40_003,), (4,)))
    cases += group_cases(dtype, (4,), (((300, 128), 128), ((7, 5000), 5000), ((201, 99), 99)))
    cases += hadamard_cases(dtype, (128,))
    check(program, cases + [hadamard_case(torch.randn(40_000, dtype=torch.float64).to(dtype), 64)])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_every_number_of_16_bits(program, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    cases = []
    for bits in BITS:
        # The last two: where the distance of numbers is largest beside alpha; and in float16, alpha at its least.
        for value in (*torch.logspace(-6, 4, 3, base=math.e).tolist(), 256 / 129, 2.0**-24):
            cases.append(forward_case(x, alpha_tensor([value], dtype), bits, True, True))
    # And of those not above a largest one, in a group.
    for bits, largest in itertools.product(BITS, (0.7, 257.0)):
        group = torch.where(x.abs() <= largest, x, largest)
        cases.append(forward_case(group.view(1, -1), None, bits, False, True, group=x.numel()))
    check(program, cases)


@by_dtype
def test_irregular_alpha(program, dtype):
    cases = []
    for value, bits in itertools.product(IRREGULAR[dtype], (2, 4, 8)):
        x = make_x(dtype, value, bits, 999, bits)
        cases.append(forward_case(x, alpha_tensor([value], dtype), bits, True, True))
        pair = alpha_tensor([value, 0.5], dtype)
        x = make_x(dtype, value, bits, 2 * 2200, bits)
        cases.append(forward_case(x, pair, bits, True, True, shape=(1, 2, 2200)))
        cases.append(forward_case(x, pair, bits, True, False, shape=(2200, 2, 1)))
    check(program, cases)


@by_dtype
def test_illegal_alpha_makes_its_channel_nan(program, dtype):
    """With code p, and elsewhere what there is without an illegal alpha beside it."""
    cases, bits = [], 8
    x, good = make_x(dtype, 0.5, bits, 4 * 1030, 0), alpha_tensor([0.5], dtype)
    y, _, mask, codes = reference.qsigned_forward(x, good, bits, None, True, True, None)
    rebuilt = reference.qsigned_dequantize(codes, good, bits, None, list(x.shape), dtype, None, torch.contiguous_format)
    for value, (channels, inner) in itertools.product((0.0, -1.0, math.nan, math.inf), ((4, 1030), (4, 1), (1, 1))):
        alpha = alpha_tensor([value, 0.5, 0.5, 0.5][:channels], dtype)
        illegal = torch.arange(x.numel()) // inner % channels == 0
        expected = {"y": y.masked_fill(illegal, math.nan), "codes": codes.masked_fill(illegal, top_level(bits))}
        inputs, settings = {"alpha": alpha, "x": x}, {"channels": channels, "inner": inner}
        cases.append(Case("signed_forward", dtype, bits, x.numel(), inputs, expected, expected=expected, **settings))
        expected = {"y": rebuilt.masked_fill(illegal, math.nan)}
        inputs = {"alpha": alpha, "codes": codes}
        cases.append(Case("signed_dequantize", dtype, bits, x.numel(), inputs, expected, expected=expected, **settings))
    check(program, cases)


def test_sanitizers_find_nothing(tmp_path):
    program = cuda_host.build_once(tmp_path, "cuda_host_signed", cuda_host.SANITIZED)
    for dtype in DTYPES:
        cases = [*given_cases(dtype, (33, 4097), (2, 3, 8)), *list(channel_cases(dtype))[::3]]
        check(program, [*cases, *group_cases(dtype, (3,)), *list(hadamard_cases(dtype))[::2]])
