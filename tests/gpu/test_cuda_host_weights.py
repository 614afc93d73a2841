"""The CUDA kernels of the scale of quantized weights against the reference, run on the CPU."""

from __future__ import annotations

import itertools

import cuda_host
import pytest
import torch
from cuda_host import DTYPES, Case
from host_cases import same
from oracle_weights import extreme_rows
from test_cuda_host import by_dtype

from coarsegrad import reference
from coarsegrad._types import WEIGHT_BITS

pytestmark = [
    pytest.mark.costly,
    pytest.mark.skipif(cuda_host.why_not() is not None, reason=str(cuda_host.why_not())),
]

# (rows, length): around the weights of a block of threads, and of several parts; more rows than a block has threads.
SHAPES = ((0, 5), (3, 0), (1, 1), (7, 9), (130, 3), (3, 127), (2, 129), (2, 2049), (3, 8193), (1, 40_000))


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return cuda_host.build_once(tmp_path_factory.mktemp("cuda_host_weights"), "cuda_host_weights", "-O1")


def scale_case(rows, bits, seed=0):
    """Of rows [R, n]."""
    scale = reference.weight_scale(rows, bits, 0)
    inputs, expected = {"x": rows.flatten()}, {"alpha": scale}
    return Case("weight_scale", rows.dtype, bits, rows.numel(), inputs, expected, channels=len(rows), seed=seed,
                expected=expected)  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ordinary_cases(dtype, shapes=SHAPES):
    for n, (shape, bits) in enumerate(itertools.product(shapes, WEIGHT_BITS)):
        yield scale_case((normal(*shape, seed=n) * 10.0 ** (n % 7 - 3)).to(dtype), bits, n)


def extreme_cases(dtype):
    weight = extreme_rows(dtype)
    for bits in WEIGHT_BITS:
        yield scale_case(weight, bits, bits)
        yield scale_case(weight[:12].reshape(1, -1), bits, bits)


def special_cases(dtype):
    """Of which any number has those from half its mean on; far ones; few values; and, of sets that explain as much, the
    smallest: in a warp, in two parts, and with the others in between."""
    flat = torch.arange(1, 4001).double().rsqrt()
    far, few = normal(3, 4000), torch.randint(-3, 4, (3, 4000), generator=torch.Generator().manual_seed(0)) * 0.375
    far[:, 0] *= 10.0 ** torch.arange(1, 4)
    rows = [flat, flat * torch.linspace(1, 1.001, 4000), flat.flip(0) * torch.linspace(1, 1.1, 4000), flat.sign()]
    for bits in WEIGHT_BITS:
        yield scale_case(torch.cat([torch.stack(rows), far, few]).to(dtype), bits)
    # (root + 1)**2 is root**2 * (root + 1)**2 / count.
    for root in (3, 33, 65):
        count = root**2
        ties = torch.full((1, count), 1 / 16, dtype=torch.float64)
        ties[0, count // 2] = (root + 1) / 16
        yield scale_case(ties.to(dtype), 2)


def every_case(dtype):
    return [*ordinary_cases(dtype), *extreme_cases(dtype), *special_cases(dtype)]


def wrong_outputs(case, result):
    return [name for name, got in result.items() if not same(got, case.expected[name])]


def check(program, cases):
    for case, result in zip(cases, cuda_host.run(program, cases), strict=True):
        described = case.dtype, case.bits, case.channels, case.count
        assert not wrong_outputs(case, result), (described, result["alpha"], case.expected["alpha"])


@by_dtype
@pytest.mark.parametrize("make_cases", (ordinary_cases, extreme_cases, special_cases))
def test_against_the_reference(program, dtype, make_cases):
    check(program, list(make_cases(dtype)))


def test_equals_are_some(program):
    """The sets of the last cases explain the same, and the smallest is the one."""
    for case in list(special_cases(torch.float64))[-3:]:
        m = case.inputs["x"].sort(descending=True).values
        explained = m.cumsum(0) ** 2 / torch.arange(1, len(m) + 1)
        assert explained[0] == explained[-1] == explained.max() and case.expected["alpha"] == m[0]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_every_number_of_16_bits(program, dtype):
    w = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    w = w[w.isfinite()]
    tops = torch.linspace(1, len(w) - 1, 12).long().tolist()
    rows = torch.stack([torch.where(w <= w[top], w, w[top // 2]) for top in tops])
    check(program, [scale_case(rows, bits) for bits in WEIGHT_BITS])


def test_sanitizers_find_nothing(tmp_path):
    program = cuda_host.build_once(tmp_path, "cuda_host_weights", cuda_host.SANITIZED)
    for dtype in DTYPES:
        # Of 8 bits one row: they search as 4 do, and with many rows for long.
        extreme = [case for case in extreme_cases(dtype) if case.bits < 8 or case.channels == 1]
        check(program, [*ordinary_cases(dtype, ((3, 0), (1, 1), (2, 129), (1, 2049))), *extreme])
