"""The scale of quantized weights (docs/spec.md, section 7).

Sums are exact, of integers, so that their order does not matter; what follows is float64, element by element. With the
exponent e of the largest magnitude of a row, 2**(e-1) <= max|w| < 2**e, the magnitudes are

    m = floor(|w| * 2**(31 - e)), 0 <= m < 2**31
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_weight
from .._types import top_level, wide_dtype
from .staircase import rows_of

_CHUNK = 2**22  # weights at a time
_CODES = 2**20  # codes of them at a time

# The largest magnitude over the scales that are tried, in units of 2**-unit; magnitudes of 15 bits times 16 bits of
# 1 / scale are codes in units of 2**-shift.
_QUARTERS = [4, 8, *range(12, 57)]
_UNITS = [*range(96, 153)]


def _longer(divisors: list[int], below: int) -> tuple[int, ...]:
    """Each further one is a twelfth larger."""
    while (following := divisors[-1] + divisors[-1] // 12) < below:
        divisors = [*divisors, following]
    return tuple(divisors)


# bits: (divisors, unit, shift)
WEIGHT_GRIDS = {4: (_longer(_QUARTERS, 256), 2, 24), 8: (_longer(_UNITS, 1024), 0, 20)}


def weight_scale(weight: Tensor, bits: int, channel_dim: int | None) -> Tensor:
    """The scale of least squared error: of the mean magnitude for one bit, exact for two, the best of a grid for four
    and eight. 0 for a row of zeros or nothing, NaN for one with a weight that is not finite."""
    channel_dim = check_weight(weight, bits, channel_dim)
    rows = rows_of(weight.detach(), 1 if channel_dim is None else weight.size(channel_dim), channel_dim)
    scale = rows.new_zeros(rows.size(0), dtype=wide_dtype(weight.dtype))
    if rows.numel():
        step = max(1, _CHUNK // rows.size(1))
        for some, out in zip(rows.split(step), scale.split(step)):
            out.copy_(_scale_of_rows(some.double().abs(), bits))
    return scale if channel_dim is not None else scale[0]


def _scale_of_rows(magnitudes: Tensor, bits: int) -> Tensor:
    """float64 [R] of float64 [R, n]."""
    largest = magnitudes.amax(1)
    finite = largest.isfinite()
    up = 31 - torch.frexp(torch.where(finite, largest, 0.0)).exponent.long()
    m = _times_power(torch.where(finite[:, None], magnitudes, 0.0), up[:, None]).long()
    product, square = _mean(m) if bits == 1 else _ternary(m) if bits == 2 else _gridded(m, bits)
    return torch.where(finite, _times_power(product.double() / square.double(), -up), torch.nan)


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """x * 2**exponent, rounded once. By two factors, as one may be out of range."""
    half = exponent // 2
    first, second = (((e + 1023) << 52).view(torch.float64) for e in (half, exponent - half))
    return x * first * second


def _mean(m: Tensor) -> tuple[Tensor, Tensor]:
    return m.sum(1), m.new_full((m.size(0),), m.size(1))


def _ternary(m: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of the magnitudes that are quantized to the scale s = sum / count: those of at least s / 2."""
    m = m.sort(1, descending=True).values
    following = torch.nn.functional.pad(m[:, 1:], (0, 1))
    total, count = m.cumsum(1), torch.arange(1, m.size(1) + 1, device=m.device).expand_as(m)
    consistent = (2 * count * m >= total) & (2 * count * following < total)
    explained = torch.where(consistent, total.double().square() / count.double(), -1.0)
    first = torch.where(explained == explained.amax(1, keepdim=True), count, m.size(1)).amin(1, keepdim=True)
    return total.gather(1, first - 1)[:, 0], first[:, 0]


def _gridded(m: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(<m, k>, <k, k>) of the best codes k of a grid of scales."""
    divisors, unit, shift = WEIGHT_GRIDS[bits]
    largest, short = m.amax(1).clamp(min=1), (m >> 16).int()
    tried = torch.arange(len(divisors), device=m.device)[:, None]
    inverses = ((torch.tensor(divisors, device=m.device)[:, None] << (16 + shift - unit)) // largest).int()
    some = inverses.split(max(1, _CODES // m.numel()))
    explained = torch.cat([_explained(short, _search_codes(short, i, bits, shift)) for i in some])
    first = torch.where(explained == explained.amax(0), tried, len(divisors)).amin(0, keepdim=True)
    k = _search_codes(short, inverses.gather(0, first)[0], bits, shift)
    return (m * k).sum(1), k.square().sum(1).clamp(min=1)


def _search_codes(short: Tensor, inverse: Tensor, bits: int, shift: int) -> Tensor:
    """[..., R, n] of inverses [..., R]. All is int32: short < 2**15, inverse < 2**16 - 2**10."""
    return ((short * inverse[..., None] + (1 << (shift - 1))) >> shift).clamp(max=top_level(bits))


def _explained(short: Tensor, k: Tensor) -> Tensor:
    """What codes take off the squared error of 0, [..., R]."""
    return (short * k).sum(-1).double().square() / k.square().sum(-1).clamp(min=1).double()
