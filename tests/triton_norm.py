"""The Triton kernel of norms and their staircases against the reference, bit for bit, in Triton's interpreter as in
triton_interpreted.py; test_triton.py runs this."""

from __future__ import annotations

import itertools

import pytest
import torch
from norm_rows import make_special
from triton_interpreted import ordinary, same

from coarsegrad import reference
from coarsegrad._types import DTYPES
from coarsegrad.triton import norm

# (shape, group, rotation): tiles of many rows and of one, whole bytes of codes and not; rows longer than the lanes; and
# groups and rotations that no tile holds.
CASES = (
    *(((5, 64), 32, None), ((3, 7), None, None), ((33, 16), 2, 16), ((2, 3, 768), None, 64), ((600, 8), 4, None)),
    *(((2, 1024), 1024, None), ((2, 1100), None, 4), ((3, 2048), 64, 128), ((2, 3001), None, None), ((5, 1), 1, 1)),
    *(((3, 36), 12, 4), ((2, 4096), 2048, None), ((2, 2048), 2048, 2048), ((2, 1100), 50, None)),
    *(((0, 8), 4, None), ((2, 0), None, None), ((4,), None, 4)),
)


def assert_same(*arguments):
    for got, want in zip(norm.norm_qsigned(*arguments), reference.norm_qsigned(*arguments), strict=True):
        assert same(got, want) if want.numel() else got.shape == want.shape


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype, centred):
    """The other choices go round."""
    for n, (shape, group, rotation) in enumerate(CASES):
        x = ordinary(*shape, dtype=dtype, seed=n) * 3 + n % 2
        weight = ordinary(shape[-1], dtype=(dtype, torch.float32)[n % 2], seed=50) if n % 3 else None
        bias = ordinary(shape[-1], dtype=dtype, seed=51) if n % 4 > 1 else None
        bits = (2, 4, 8, 3, 6, None)[n % 6]
        staircase = (None, None, None) if bits is None else (bits, group, rotation)
        assert_same(
            x, weight, bias, 1e-5, centred, n % 5 > 2, n % 2 == 0, *staircase, n % 3 == 0 or not bits, n % 7 > 1
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_rows(dtype):
    x = ordinary(12, 48, dtype=dtype)
    make_special(x)
    x[10, 1:] = 0
    for eps, centred, group in itertools.product((1e-6, 0.0), (False, True), (None, 16)):
        assert_same(x, ordinary(48, dtype=dtype), None, eps, centred, False, False, 4, group, None, True, True)


def test_views():
    whole = ordinary(4, 6, 5, 16)
    for x in (whole.transpose(0, 1), whole[..., ::2], whole.permute(0, 3, 1, 2)):
        assert_same(
            x, ordinary(32, seed=1)[: 2 * x.size(-1) : 2], None, 1e-5, True, True, False, 4, None, None, True, True
        )
