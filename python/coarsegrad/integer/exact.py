"""Where the output code of an integer layer changes: rational arithmetic, exact to the last accumulator.

Of the accumulator a, a layer computes the real number

    v(a) = (slope * a + shift) / sqrt(variance) + bias

with rational numbers: the float parameters of the modules, taken exactly. Its code is #{k : v(a) > T[k]}. v increases,
so for each k there is an integer t[k] with v(a) > T[k] just where a >= t[k].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import affine_codes

_FRACTION_BITS = 96
_ROOT_BITS = 200


class Channel(NamedTuple):
    """The coefficients of v(a), slope >= 0, and the accumulators that can occur, low..high."""

    slope: Fraction
    shift: Fraction
    variance: Fraction
    bias: Fraction
    low: int
    high: int

    def exceeds(self, acc: int, threshold: Fraction) -> bool:
        """v(acc) > threshold, without a root: both sides of left > right * sqrt(variance) are squared."""
        left, right = self.slope * acc + self.shift, threshold - self.bias
        if right < 0:
            return left >= 0 or left * left < right * right * self.variance
        return left > 0 and left * left > right * right * self.variance

    def root(self, bits: int = _ROOT_BITS) -> Fraction:
        """sqrt(variance) rounded down to a multiple of 2**-bits."""
        if self.variance == 1:
            return Fraction(1)
        return Fraction(math.isqrt(math.floor(self.variance * 4**bits)), 2**bits)

    def affine(self) -> tuple[float, float]:
        """(scale, offset) in float64 of v(a) = scale * a + offset."""
        root = self.root()
        return float(self.slope / root), float(self.shift / root + self.bias)


def edges(bits: int, rounding: str) -> list[int]:
    """The thresholds of the staircase in units of alpha / 2."""
    if rounding == "ceil":
        return list(range(0, 2 * (2**bits - 1), 2))
    middles = list(range(1, 2 * (2**bits - 1), 2))
    return [0, *middles[1:]] if rounding == "hwgq" else middles


def first_above(channel: Channel, alpha: Fraction, edges: list[int]) -> list[int]:
    """For each threshold edge * alpha / 2, the least accumulator in low..high with v above it; high + 1 for none."""
    if channel.slope == 0:
        return [channel.low if channel.exceeds(0, edge * alpha / 2) else channel.high + 1 for edge in edges]
    return [min(max(acc, channel.low), channel.high + 1) for acc in _crossings(channel, alpha / 2, edges)]


def _crossings(channel: Channel, half: Fraction, edges: list[int]) -> Iterator[int]:
    """The least integer a with v(a) > edge * half, from fixed-point numbers that enclose the real solution.

    v(a) > T where a > (T * root - bias * root - shift) / slope. In units of 2**-_FRACTION_BITS this is
    edge * step + start, each rounded down: too low by less than edge + 1, and by 1 for the root.
    """
    largest = (edges[-1] * half + abs(channel.bias)) / channel.slope
    root = channel.root(_ROOT_BITS + math.ceil(largest).bit_length())
    step = math.floor(half * root / channel.slope * 2**_FRACTION_BITS)
    start = math.floor((-channel.bias * root - channel.shift) / channel.slope * 2**_FRACTION_BITS)
    for edge in edges:
        position = edge * step + start
        below, above = (position - 1) >> _FRACTION_BITS, (position + edge + 2) >> _FRACTION_BITS
        yield above if below < above and channel.exceeds(above, edge * half) else above + 1


def exact_affine(scale: Tensor, offset: Tensor, thresholds: Tensor, low: Tensor, high: Tensor) -> Tensor | None:
    """scale and offset, float32 [2, C], moved by a few ulps so that `affine_codes` is the code by thresholds of every
    accumulator in low..high; None if that was not found for a channel.

    thresholds: int64 [C, levels], in low..high + 1. scale >= 0, so `affine_codes` never decreases, and it is enough to
    look on each threshold and one below.
    """
    found = torch.stack([scale, offset])
    left = torch.arange(scale.numel())
    for nudge in _NUDGES:
        tried_scale, tried_offset = _moved(scale[left], nudge[0]), _moved(offset[left], nudge[1])
        right = _agrees(tried_scale, tried_offset, thresholds[left], low[left], high[left])
        found[:, left[right]] = torch.stack([tried_scale, tried_offset])[:, right]
        left = left[~right]
        if left.numel() == 0:
            return found
    return None


_NUDGES = sorted(
    ((scale, offset) for scale in range(-4, 5) for offset in range(-16, 17)), key=lambda nudge: sum(map(abs, nudge))
)


def _moved(t: Tensor, ulps: int) -> Tensor:
    for _ in range(abs(ulps)):
        t = torch.nextafter(t, torch.full_like(t, math.copysign(math.inf, ulps)))
    return t


def first_sums(scale: Tensor, offset: Tensor, levels: int, low: Tensor, high: Tensor) -> Tensor:
    """For each code k in 1..levels, the least accumulator in low..high that `affine_codes` gives it; high + 1 for none.

    scale >= 0, float32 [C]; low, high: int64 [C]. Returns int64 [C, levels].
    """
    k = torch.arange(1, levels + 1)
    below, reached = (low - 1)[:, None].repeat(1, levels), (high + 1)[:, None].repeat(1, levels)
    while bool((reached - below > 1).any()):
        middle = torch.div(below + reached, 2, rounding_mode="floor")
        inside = affine_codes(middle.t(), scale, offset, levels).t() >= k
        open_ = reached - below > 1
        reached, below = torch.where(open_ & inside, middle, reached), torch.where(open_ & ~inside, middle, below)
    return reached


def _agrees(scale: Tensor, offset: Tensor, thresholds: Tensor, low: Tensor, high: Tensor) -> Tensor:
    levels = thresholds.size(1)
    k = torch.arange(1, levels + 1)[:, None]

    def codes(acc: Tensor) -> Tensor:
        return affine_codes(acc, scale, offset, levels).long()

    on = thresholds.t()
    reached = (codes(on) >= k) | (on > high)
    not_before = (codes(on - 1) < k) | (on - 1 < low)
    valid = scale.isfinite() & offset.isfinite() & (scale >= 0)
    return (reached & not_before).all(0) & valid
