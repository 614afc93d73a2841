"""The CUDA kernels of a norm and its staircase against the reference, run on the CPU."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import cuda_host
import pytest
import torch
from cuda_host import DTYPES, Case
from host_cases import same
from host_cases_signed import make_group
from norm_rows import make_special
from test_cuda_host import by_dtype
from torch import Tensor

from coarsegrad import reference
from coarsegrad._types import wide_dtype

pytestmark = [
    pytest.mark.costly,
    pytest.mark.skipif(cuda_host.why_not() is not None, reason=str(cuda_host.why_not())),
]

# (rows, length, group, rotation). In one kernel: rows of a chunk, of a warp's lanes and fewer, of two and of four
# warps, and longer ones; with a staircase by group and by row, in some dtypes with a rotation within a chunk, within a
# warp and of the row. By several: lengths that are no chunks, other groups, and longer rotations. And none at all.
CASES = (
    *((17, 8, None, 4), (40, 64, 32, 64), (3, 96, None, 32), (9, 256, 64, 128), (3, 384, 16, 8), (5, 512, None, None)),
    *((3, 576, 64, 64), (2, 1024, 128, 128), (3, 1024, None, 256), (2, 2048, 32, None), (2, 4096, 128, 64)),
    *((3, 5000, None, 8), (1, 7, None, None), (5, 1, 1, 1), (33, 31, None, None), (2, 1023, None, None)),
    *((3, 1025, 5, None), (3, 36, 12, 4), (2, 1100, 50, 4), (2, 2048, 1024, 2048), (0, 8, 4, None), (3, 0, None, None)),
)  # fmt: skip


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return cuda_host.build_once(tmp_path_factory.mktemp("cuda_host_norm"), "cuda_host_norm", "-O1")


class Arguments(NamedTuple):
    """Of the op, for rows [R, n]. Without bits: a norm alone."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool
    shifted: bool
    rounds_twice: bool
    bits: int | None
    group: int | None
    rotation: int | None
    output: bool
    codes: bool

    def case(self, **settings) -> Case:
        x, bits = self.x, self.bits
        made = reference.norm_qsigned(*self)
        wanted = (self.output, bits, bits and self.codes, bits, self.centred, True)
        names = ("out", "y", "codes", "group_alphas", "mean", "inverse")
        expected = {name: t.reshape(-1) for name, t, there in zip(names, made, wanted) if there}
        inputs = {name: t for name, t in (("weight", self.weight), ("bias", self.bias)) if t is not None}
        wide = any(parameter.dtype != x.dtype for parameter in inputs.values())
        inputs = {name: t.to(wide_dtype(x.dtype) if wide else x.dtype) for name, t in inputs.items()}
        flags = {"shifted": self.shifted, "rounds_twice": self.rounds_twice, "wide_parameters": wide}
        return Case(
            "norm", x.dtype, bits or 0, x.numel(), {"x": x.reshape(-1)} | inputs, expected, channels=len(x),
            inner=x.size(1), group=(self.group or max(x.size(1), 1)) if bits else 0, rotation=self.rotation or 0,
            flags=tuple(name for name, on in flags.items() if on), scale=self.eps, expected=expected, **settings,
        )  # fmt: skip


def random(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ordinary(dtype, shapes=CASES):
    """Every shape as RMSNorm and as LayerNorm; the other choices go round. The squares of some rows are so far apart
    that sums of bfloat16 are rounded too, and show their order."""
    for n, ((rows, length, group, rotation), centred) in enumerate(itertools.product(shapes, (False, True))):
        x = random(rows, length, dtype=torch.float64, seed=n) ** (1, 1, 5)[n % 3]
        x = (x * 10.0 ** (n % 2) + n % 2).to(dtype)
        weight = random(length, dtype=(dtype, torch.float32)[n // 2 % 2], seed=90) if n % 5 else None
        bias = random(length, dtype=dtype, seed=91) if n % 7 > 2 else None
        norm = Arguments(x, weight, bias, 1e-5, centred, n % 3 == 1, n % 5 > 2, None, None, None, True, False)
        choices = {"bits": (4, 8, 2, 3, 5)[n % 5], "output": n % 4 < 2, "codes": n % 3 > 0}
        yield norm._replace(group=group, rotation=rotation, **choices)
        if n % 4 == 3:
            yield norm


def special(dtype):
    """Rows of zeros, of NaN and infinities, of huge and tiny numbers."""
    x = random(13, 64, dtype=dtype)
    make_special(x)
    x[10] = 0
    x[10, 3] = 1
    x[11] = x[11] * 1e-4 + 100
    x[12] = -3
    weight = random(64, dtype=dtype, seed=1)
    weight[::5] = -0.0
    settings = itertools.product((1e-6, 0.0), (False, True), ((4, 16), (8, None), (3, 8)))
    for n, (eps, centred, (bits, group)) in enumerate(settings):
        staircase = (bits, group, None, True, True)
        yield Arguments(x, weight, None, eps, centred, False, n % 3 == 2, *staircase)
        # With outputs that overflow, and with alphas that are not regular.
        scale = (torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal)[n % 2]
        yield Arguments(x, weight * scale, weight, eps, centred, False, False, *staircase)


def on_thresholds(dtype):
    """Of +-1, which a norm without eps leaves as they are, with hard numbers for weights: on and beside thresholds."""
    for n, (bits, group) in enumerate(itertools.product(range(2, 9), (32, None))):
        weight = torch.cat([make_group(dtype, bits, 32, n + i) for i in range(4)])
        x = random(4, 128, dtype=dtype, seed=n).sign()
        yield Arguments(x, weight, None, 0.0, False, False, n % 2 > 0, bits, group, None, True, True)


def cases_of(made):
    """Some of them not aligned."""
    return [arguments.case(offset=n % 11 // 10, seed=n) for n, arguments in enumerate(made)]


def wrong_outputs(case, result):
    return [name for name, got in result.items() if not same(got, case.expected[name])]


def check(program, cases):
    for case, result in zip(cases, cuda_host.run(program, cases), strict=True):
        described = case.dtype, case.bits, case.channels, case.inner, case.group, case.rotation, case.flags, case.offset
        assert not (wrong := wrong_outputs(case, result)), (wrong, described)


@by_dtype
@pytest.mark.parametrize("make", (ordinary, special, on_thresholds))
def test_against_the_reference(program, dtype, make):
    check(program, cases_of(make(dtype)))


def test_sanitizers_find_nothing(tmp_path):
    program = cuda_host.build_once(tmp_path, "cuda_host_norm", cuda_host.SANITIZED)
    for dtype in DTYPES:
        check(program, cases_of([*list(ordinary(dtype))[::3], *list(special(dtype))[::6]]))
