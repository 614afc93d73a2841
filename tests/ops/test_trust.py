"""`trust`: its gate, to the bit, on every backend, and QuEST's rule, from which it comes."""

from __future__ import annotations

import math

import oracle
import pytest
import torch

import coarsegrad as cg
from coarsegrad._types import MaskKind, Rounding
from coarsegrad.nn import half_gaussian_alpha
from coarsegrad.testing import hard_inputs

# float32 rounds the sum of the last and its half; the levels of others overflow or collapse in the half dtypes.
ALPHAS = (0.3, 1.0, 1.01171875, 7e-8, 2e4, 0.1)


def gate(x, alpha, bits):
    """-alpha/2 <= x <= L[q] + alpha/2 in the wide dtype, and NaN; alpha is a number."""
    wide = oracle.wide(x.dtype)
    step = torch.tensor(alpha, dtype=wide)
    top = (step * (2**bits - 1)).to(x.dtype).to(wide)
    return ((x.to(wide) >= -step / 2) & (x.to(wide) <= top + step / 2)) | x.isnan()


def grad_x(x, alpha, bits, dy, **options):
    leaf = x.clone().requires_grad_()
    hidden = leaf * 1 if options.get("inplace") else leaf
    cg.qrelu(hidden, alpha, bits, ste="trust", **options).backward(dy)
    return leaf.grad


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_the_gate_to_the_bit(backend, dtype, bits):
    """One ulp within and outside of both ends, special values, in whole blocks and a rest, in place and not."""
    for alpha in ALPHAS:
        step = torch.tensor([alpha], dtype=oracle.wide(dtype))
        for rounding in oracle.ROUNDINGS:
            x = hard_inputs(alpha, bits, rounding, dtype)
            x = torch.cat([x, x.flip(0), x[::3]])
            want = gate(x, alpha, bits)
            dy = torch.where(want, 3.0, math.inf).to(dtype)
            for inplace in (False, True):
                dx = grad_x(x, step, bits, dy, rounding=rounding, inplace=inplace)
                assert torch.equal(dx, torch.where(want, dy, 0))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("channels, last", [(3, True), (64, True), (64, False), (128, True)])
def test_an_alpha_for_each_channel(backend, dtype, rounding, channels, last):
    """Of the layouts in which kernels read alphas, at widths at which they quantize by comparison and by arithmetic."""
    generator = torch.Generator().manual_seed(channels)
    alpha = oracle.log_uniform(channels, 0.1, 1, seed=channels)
    for bits in (1, 2, 4, 8):
        x = torch.randn(2, channels, 5, 29, generator=generator) * alpha[:, None, None] * 2**bits
        x[:, :, 0, 0], x[:, :, 1, 0], x[:, :, 2, 0] = math.nan, -alpha / 2, alpha * (2**bits - 0.5)
        x = x.to(dtype)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        want = oracle.Staircase64(x, alpha, bits, rounding, 1)
        near = want.slope("trust") == 1
        assert near.any() and not near.all()
        dx = grad_x(x, alpha, bits, torch.ones_like(x), rounding=rounding, channel_dim=1)
        assert torch.equal(dx != 0, near)
        saved = grad_x(x, alpha, bits, torch.ones_like(x), rounding=rounding, channel_dim=1, inplace=True)
        assert torch.equal(saved, dx)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_the_last_byte_is_padded_with_zeros(backend, dtype):
    """0 is near, and what stands behind x is not."""
    for count in (1, 7, 63, 65, 130):
        x, alpha = torch.zeros(count, dtype=dtype), torch.tensor([0.3])
        mask = torch.ops.coarsegrad.qrelu_forward(x, alpha, 2, Rounding.ceil, MaskKind.near, False, None)[1]
        assert bytes(mask.tolist()) == oracle.pack([1] * count, 1)


@pytest.mark.parametrize("bits", (1, 2, 4, 8))
def test_it_is_quests_rule(reference_or_native, bits):
    """Under "nearest" the gate is |x - Q(x)| <= alpha / 2: float64 has 29 bits more than the alpha that it is given."""
    alpha = float(torch.tensor(half_gaussian_alpha(bits, "nearest")))
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(bits)).double()
    y = cg.qrelu(x, alpha, bits, rounding="nearest")
    dx = grad_x(x, torch.tensor([alpha], dtype=torch.float64), bits, torch.ones_like(x), rounding="nearest")
    assert torch.equal(dx == 1, (x - y).abs() <= alpha / 2)
