"""The coarse gradients and the rules for alpha as Triton functions, mirroring ..ste and csrc/math.

g'(u, q) is elementwise, with u = x / alpha in float32 or float64 as described in `register_ste`. A rule is
A(state, code, u, g, q) with g = g'(u) and state 0, 1, 2 for x <= 0, inside, x > L[q]; unused arguments may be None.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .._estimators import DSQ_SLOPE, DSQ_STRETCH, STABLE_QAT
from .staircase import divide, pow2, round_to_integer

_INVERSE_FACTORIALS = tl.constexpr(tuple(1 / math.factorial(k) for k in range(24)))
_PI, _DSQ_SLOPE, _DSQ_STRETCH, _STABLE_QAT = map(tl.constexpr, (math.pi, DSQ_SLOPE, DSQ_STRETCH, STABLE_QAT))


@triton.jit
def exp_minus(t):
    """exp(-t) for t >= 0, within 3 ulps: t = n ln 2 + r, |r| <= ln(2)/2, Taylor in r. The same bits on every device."""
    if t.dtype == tl.float64:
        high: tl.constexpr = 0.6931471803691238  # n * high is exact
        low: tl.constexpr = 1.9082149292705877e-10
        order: tl.constexpr = 13
        underflow: tl.constexpr = 746.0  # exp(-t) is 0 from here on
    else:
        high: tl.constexpr = 0.693145751953125
        low: tl.constexpr = 1.4286068203094173e-06
        order: tl.constexpr = 7
        underflow: tl.constexpr = 104.0
    t = tl.where(t > 0, tl.where(t < underflow, t, underflow), 0.0)
    n = round_to_integer(t * 1.4426950408889634)
    r = n * low - (t - n * high)
    power = tl.full(t.shape, _INVERSE_FACTORIALS[order], t.dtype)
    for k in tl.static_range(order):
        power = power * r + _INVERSE_FACTORIALS[order - 1 - k]
    # In two factors, as 2**-n alone can be below the normal range.
    half = round_to_integer(n * 0.5)
    return power * pow2(-half) * pow2(half - n)


@triton.jit
def identity(u, q):
    return tl.full(u.shape, 1.0, u.dtype)


@triton.jit
def relu(u, q):
    return tl.where(u > 0, 1.0, 0.0).to(u.dtype)


@triton.jit
def clipped_relu(u, q):
    return tl.where((u > 0) & (u <= q), 1.0, 0.0).to(u.dtype)


@triton.jit
def log_tailed_relu(u, q):
    tail = divide(tl.full(u.shape, 1.0, u.dtype), (u - q) + 1)
    return tl.where(u > 0, tl.where(u > q, tail, 1.0), 0.0)


@triton.jit
def reverse_exponential(u, q):
    return tl.where(u > 0, exp_minus(divide(u, tl.full(u.shape, q, u.dtype))), 0.0)


@triton.jit
def trust(u, q):
    return tl.where((u >= -0.5) & (u <= q + 0.5), 1.0, 0.0).to(u.dtype)


@triton.jit
def _to_threshold(u, q, ROUNDING: tl.constexpr):
    """The distance from 0 < u <= q to the nearest threshold in units of alpha, at most 1/2. Any number for other u."""
    u = tl.where((u > 0) & (u <= q), u, 0.0)
    if ROUNDING == "ceil":
        threshold = tl.minimum(round_to_integer(u), q - 1.0)
    else:
        threshold = tl.floor(u) + 0.5
        if ROUNDING == "hwgq":
            threshold = tl.where(u < 1, 0.0, threshold)
    return tl.minimum(tl.abs(u - threshold), 0.5)


@triton.jit
def dsq(u, q, ROUNDING: tl.constexpr):
    tail = exp_minus(_to_threshold(u, q, ROUNDING) * (2 * _DSQ_SLOPE))
    slope = divide(tail * (2 * _DSQ_SLOPE * _DSQ_STRETCH), (1 + tail) * (1 + tail))
    return tl.where((u > 0) & (u <= q), slope, 0.0)


@triton.jit
def stable_qat(u, q, ROUNDING: tl.constexpr):
    # 1 - cos by Taylor's series, which loses nothing near a level.
    angle = (0.5 - _to_threshold(u, q, ROUNDING)) * _PI
    square = angle * angle
    terms: tl.constexpr = 11 if u.dtype == tl.float64 else 7
    series = tl.full(u.shape, _INVERSE_FACTORIALS[2 * terms], u.dtype)
    for k in tl.static_range(terms - 1):
        series = series * -square + _INVERSE_FACTORIALS[2 * (terms - 1 - k)]
    below_one = series * square * _STABLE_QAT
    slope = divide(below_one + (1 - _STABLE_QAT), -below_one + (1 + _STABLE_QAT))
    return tl.where((u > 0) & (u <= q), slope, 0.0)


@triton.jit
def exact(state, code, u, g, q):
    return code


@triton.jit
def three_valued(state, code, u, g, q):
    return tl.where(state == 2, 1.0 * q, tl.where(state == 1, (q + 1) * 0.5, 0.0))


@triton.jit
def two_valued(state, code, u, g, q):
    return tl.where(state == 2, 1.0 * q, 0.0)


@triton.jit
def chain(state, code, u, g, q):
    return code - tl.where(g == 0, 0.0, u * g)


STES = {f.__name__: f for f in (identity, relu, clipped_relu, log_tailed_relu, reverse_exponential, trust)}
ALPHA_GRADS = {f.__name__: f for f in (exact, three_valued, two_valued, chain)}
