"""The Triton kernels of the scale of quantized weights against the reference; see triton_interpreted.py."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
from oracle_weights import extreme_rows
from triton_interpreted import numbers_of_all_magnitudes, ordinary, same

from coarsegrad import reference
from coarsegrad._types import DTYPES, WEIGHT_BITS
from coarsegrad.triton import weight_kernels, weights

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"


@pytest.fixture
def large_tiles(monkeypatch):
    """All scales at once, which the interpreter does in less time."""
    monkeypatch.setattr(weights, "_TRIED", 128)
    monkeypatch.setattr(weights, "_TILE", 2048)


def assert_scale(weight, bits, channel_dim=0):
    got = weights.weight_scale(weight, bits, channel_dim)
    assert same(got, reference.weight_scale(weight, bits, channel_dim)), (weight.shape, weight.dtype, bits)
    return got


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_magnitudes(large_tiles, dtype, bits):
    scale = assert_scale(extreme_rows(dtype), bits)
    assert scale[7] == 0 and scale.isnan().tolist() == [False] * 12 + [True] * 3
    assert assert_scale(extreme_rows(dtype), bits, None).isnan()


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_every_tile_and_part(bits, monkeypatch):
    """As they are, for a row of several tiles; and of several parts."""
    assert_scale(ordinary(1, 700), bits)
    monkeypatch.setattr(weights, "_PART", 128)
    monkeypatch.setattr(weights, "_TRIED", 32)
    for length in (127, 128, 129, 1000):
        assert_scale(ordinary(2, length, dtype=torch.bfloat16), bits)
    assert_scale(ordinary(40, 20), bits, None)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_layouts(large_tiles, bits):
    x = ordinary(4, 3, 2, 5)
    views = (x, x.contiguous(memory_format=torch.channels_last), x.transpose(0, 1), x[::2], x[..., 1:], x.flip(0).mT,
             x[:, :1].expand(4, 3, 2, 5))  # fmt: skip
    for view, channel_dim in itertools.product(views, (0, -3, None)):
        assert_scale(view, bits, channel_dim)
    assert_scale(ordinary(1)[0], bits, None)
    for shape, channel_dim in (((0,), 0), ((3, 0), 0), ((0, 3), 0), ((3, 0), 1), ((0, 3), None), ((1,), 0)):
        assert_scale(torch.ones(shape), bits, channel_dim)


@pytest.mark.parametrize("part", (2**14, 64))
def test_two_bits_of_many_consistent_sets(part, monkeypatch):
    """All numbers of the largest magnitudes are some; far ones; one magnitude; and few, with ties."""
    monkeypatch.setattr(weights, "_PART", part)
    monkeypatch.setattr(weights, "_SORTED", 5 * 400)
    flat = torch.arange(1, 401).double().rsqrt()
    rows = [flat, flat * torch.linspace(1, 1.001, 400), flat.flip(0) * torch.linspace(1, 1.1, 400), flat.sign()]
    far = ordinary(4, 400, dtype=torch.float64)
    far[:, 0] *= 10.0 ** torch.arange(1, 5)
    few = torch.randint(-3, 4, (4, 400), generator=torch.Generator().manual_seed(0)) * 0.375
    assert_scale(torch.cat([torch.stack(rows), far, few]).float(), 2)


@pytest.mark.parametrize("part, tile", ((2**14, 16), (2**14, 8), (8, 8)))
def test_two_bits_of_equals_the_fewest(part, tile, monkeypatch):
    """The largest alone explains as much as all nine: in a tile, in two of them, and in two parts."""
    monkeypatch.setattr(weights, "_PART", part)
    monkeypatch.setattr(weights, "_SORTED_TILE", tile)
    weight = torch.tensor([[1.0] * 4 + [4.0] + [1.0] * 4])
    assert assert_scale(weight, 2) == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes(dtype):
    """Of numbers of all sizes beside a largest one of all sizes: floor(|w| * 2**(31 - e)) by exact arithmetic."""
    if dtype.itemsize == 2:
        w = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        w = numbers_of_all_magnitudes(2**12, 0).to(dtype).abs()
        words = torch.randint(2**63 - 1, (2**12,), generator=torch.Generator().manual_seed(1))
        w = w if dtype == torch.float32 else torch.cat([w, words.view(dtype)])
    w = w[w.isfinite()].sort().values
    for at in torch.linspace(1, len(w) - 1, 40).long().tolist():
        row, exponent = w[: at + 1], torch.frexp(w[at].double()).exponent.item()
        bits = row[-1].double() if dtype == torch.float64 else row[-1].float()
        largest = bits.view(torch.int64 if dtype == torch.float64 else torch.int32)[None]
        m = torch.empty(1, at + 1, dtype=torch.int32)
        weight_kernels.magnitudes_kernel[(1, 1)](row, largest, m, at + 1, PART=2**15, BLOCK=2**15)
        power = 31 - exponent
        want = (row.double() * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)).floor().int()
        assert torch.equal(m[0], want) and m[0, -1] >= 2**30


def test_two_runs_give_the_same_bits():
    weight = ordinary(2, 300)
    for bits in WEIGHT_BITS:
        assert torch.equal(*(weights.weight_scale(weight, bits, 0) for _ in range(2)))
