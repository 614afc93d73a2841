"""Section 7 of the specification in plain Python, a number at a time, and the least errors that any scale allows."""

from __future__ import annotations

import math
from fractions import Fraction

import oracle
import torch

DIVISORS = {4: [1, 2, *(i / 4 for i in range(12, 57))], 8: [float(i) for i in range(96, 153)]}
for _bits, _unit in ((4, 4), (8, 1)):
    _i = int(DIVISORS[_bits][-1] * _unit)
    while (_i := _i + _i // 12) < {4: 256, 8: 1024}[_bits]:
        DIVISORS[_bits].append(_i / _unit)
_SHIFT = {4: 24, 8: 20}


def _nearest_grid_codes(m: list[int], bits: int) -> list[int]:
    p, t = 2 ** (bits - 1) - 1, _SHIFT[bits]
    best, found = -1.0, []
    for d in DIVISORS[bits]:
        inverse = int(d * 2 ** (t + 16)) // max(m)
        k = [min(p, ((x >> 16) * inverse + 2 ** (t - 1)) >> t) for x in m]
        product = float(sum((x >> 16) * i for x, i in zip(m, k)))
        explained = product * product / sum(i * i for i in k)
        if explained > best:
            best, found = explained, k
    return found


def _best_count(m: list[int]) -> int:
    ordered = sorted(m, reverse=True)
    best, found = -1.0, 0
    for j in range(1, len(m) + 1):
        total, following = sum(ordered[:j]), [*ordered, 0][j]
        if 2 * j * ordered[j - 1] >= total > 2 * j * following and float(total) * float(total) / j > best:
            best, found = float(total) * float(total) / j, j
    return found


def scale_of_row(row: list[float], bits: int) -> float:
    """The scale, before it is rounded to the wide dtype."""
    if not all(map(math.isfinite, row)):
        return math.nan
    largest = max(map(abs, row), default=0.0)
    if largest == 0:
        return 0.0
    e = math.frexp(largest)[1]
    m = [int(math.ldexp(abs(w), 31 - e)) for w in row]
    if bits == 1:
        product, square = sum(m), len(m)
    elif bits == 2:
        square = _best_count(m)
        product = sum(sorted(m, reverse=True)[:square])
    else:
        k = _nearest_grid_codes(m, bits)
        product, square = sum(x * i for x, i in zip(m, k)), sum(i * i for i in k)
    return math.ldexp(float(product) / square, e - 31)


def scale(weight: torch.Tensor, bits: int, channel_dim: int | None) -> torch.Tensor:
    rows = oracle.to_rows(weight, channel_dim).double()
    found = torch.tensor([scale_of_row(row.tolist(), bits) for row in rows], dtype=torch.float64)
    return found.to(oracle.wide(weight.dtype)).reshape([-1] if channel_dim is not None else [])


def least_error(row: list[float], bits: int) -> tuple[Fraction, Fraction, Fraction]:
    """(the least squared error of all scales and codes, the square of that Q(w), its scale), exactly.

    As s falls a magnitude passes from a code to the next one: best codes are those between two such moments.
    """
    w, p = [Fraction(abs(x)) for x in row], 2 ** (bits - 1) - 1
    k = [1 if bits == 1 else 0] * len(w)
    product, square = (sum(w), len(w)) if bits == 1 else (Fraction(0), 0)
    best, scale = (product**2 / square, product / square) if bits == 1 else (Fraction(0), Fraction(0))
    for _, i in sorted(((2 * x / (2 * j - 1), i) for i, x in enumerate(w) for j in range(1, p + 1)), reverse=True):
        product, square, k[i] = product + w[i], square + 2 * k[i] + 1, k[i] + 1
        if product**2 / square > best:
            best, scale = product**2 / square, product / square
    return sum(x * x for x in w) - best, best, scale


def error(row: list[float], scale: float, bits: int) -> Fraction:
    """That of the nearest codes."""
    s, p = Fraction(scale), 2 ** (bits - 1) - 1
    w = [Fraction(abs(x)) for x in row]
    return sum((x - s * (1 if bits == 1 else min(p, round(x / s)) if s else 0)) ** 2 for x in w)


def extreme_rows(dtype: torch.dtype) -> torch.Tensor:
    """[15, 9]: rows of the largest numbers, of subnormal ones, of both, of zeros (the eighth), of what is rounded off;
    and three with what is no number."""
    finite = torch.finfo(dtype)
    least = finite.smallest_normal * finite.eps
    weight = torch.randn(15, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight /= weight.abs().amax(1, keepdim=True)
    factors = (finite.max, finite.max / 3, 1.0, finite.smallest_normal, 20 * least, 3 * least, least)
    weight[:7] *= torch.tensor(factors, dtype=torch.float64)[:, None]
    weight[7] = 0
    weight[8] = torch.tensor([-0.0, 0.0, least] * 3, dtype=torch.float64)
    weight[9] = finite.max
    weight[10] = torch.tensor([finite.max, *[least] * 8], dtype=torch.float64)
    weight[11] = torch.tensor([1.0, *[finite.eps / 4] * 8], dtype=torch.float64)
    weight[12, 3], weight[13, 0], weight[14, 8] = torch.inf, -torch.inf, torch.nan
    return weight.to(dtype)
