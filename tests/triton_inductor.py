"""The code that Inductor makes for a GPU of a qrelu of which nothing is saved: the reference's bits, in Triton's
interpreter, test_triton.py runs this."""

from __future__ import annotations

import pytest
import torch
from inductor_without_gpu import interpreted
from triton_interpreted import ALPHAS, same

from coarsegrad import reference
from coarsegrad._types import DTYPES, ROUNDINGS, MaskKind, Rounding, wide_dtype
from coarsegrad.testing import hard_inputs

_FORWARD = torch.ops.coarsegrad.qrelu_forward.default


def every_number(alphas, bits, rounding, dtype):
    """[C, m]: all numbers of a 16-bit dtype, else every threshold and what is next to it."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).expand(len(alphas), -1).contiguous()
    return torch.stack([hard_inputs(alpha, bits, rounding, dtype) for alpha in alphas])


@pytest.mark.parametrize("bits", (1, 2, 4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_levels(dtype, bits, tmp_path):
    """Of each channel's alpha, of some of which levels collapse, are subnormal, or overflow. The output, and what a
    consumer in the same kernel gets."""
    alphas = ALPHAS if dtype.itemsize > 2 else ALPHAS[:4]
    alpha = torch.tensor(alphas, dtype=wide_dtype(dtype))
    xs = [every_number(alphas, bits, rounding, dtype) for rounding in ROUNDINGS]
    settings = [(bits, Rounding[rounding], MaskKind.nothing, False, 0) for rounding in ROUNDINGS]

    def function(alpha, *xs):
        ys = [_FORWARD(x, alpha, *setting)[0] for x, setting in zip(xs, settings, strict=True)]
        return *ys, *(y.to(torch.float64) * 3 for y in ys)

    wanted = [reference.qrelu_forward(x, alpha, *setting)[0] for x, setting in zip(xs, settings, strict=True)]
    wanted += [y.double() * 3 for y in wanted]
    for got, want in zip(interpreted(function, tmp_path, alpha, *xs), wanted, strict=True):
        assert same(got, want)
