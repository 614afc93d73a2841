"""The staircase in Triton: x -> code -> level, for any alpha, by comparisons with the thresholds.

    levels      L[k] = round_to_dtype(k * alpha), k = 0..q, q = 2**bits - 1
    thresholds  ceil: T[k] = L[k-1];  nearest: T[k] = (L[k-1] + L[k]) / 2;  hwgq: nearest, but T[1] = 0
    code        c = #{k in 1..q : x > T[k]}, output y = L[c]

Numbers are computed in float32, or float64 where they are. bfloat16 is handled as integers: Triton's interpreter rounds
it wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """a / b rounded once, for a tensor a; of float32, Triton's own quotient is an approximation."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _bfloat16_bits(v):
    """The nearest bfloat16 of a float32 that is no NaN, ties to even, in the high half of a word."""
    word = v.to(tl.uint32, bitcast=True)
    return word + 0x7FFF + ((word >> 16) & 1)


@triton.jit
def widen(v):
    """A number as it was loaded, in the dtype that it is computed in."""
    if v.dtype == tl.bfloat16:
        return (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif v.dtype == tl.float16:
        return v.to(tl.float32)
    else:
        return v


@triton.jit
def narrow(v, DTYPE: tl.constexpr):
    """v rounded to DTYPE, to be stored."""
    if DTYPE == tl.bfloat16:
        word = tl.where(v == v, _bfloat16_bits(v), 0x7FC00000)
        return (word >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(DTYPE)


@triton.jit
def level(k, alpha, DTYPE: tl.constexpr):
    """L[k], in the dtype that it is computed in."""
    v = k * alpha
    if DTYPE == tl.bfloat16:
        return (_bfloat16_bits(v) >> 16 << 16).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        return v.to(tl.float16).to(tl.float32)
    else:
        return v


@triton.jit
def threshold(k, alpha, DTYPE: tl.constexpr, ROUNDING: tl.constexpr):
    """T[k], k >= 1."""
    below = level(k - 1, alpha, DTYPE)
    if ROUNDING == "ceil":
        return below
    else:
        middle = (below + level(k, alpha, DTYPE)) * 0.5
        if ROUNDING == "hwgq":
            return tl.where(k == 1, 0.0, middle)
        else:
            return middle


@triton.jit
def code_of(x, alpha, DTYPE: tl.constexpr, BITS: tl.constexpr, ROUNDING: tl.constexpr):
    """c, as a number of x's dtype; q for NaN. It is found bit by bit, from the highest one down.

    No reciprocal, hence no alpha that needs a way of its own: this holds where levels collapse or overflow too.
    """
    code = tl.zeros_like(x)
    for i in tl.static_range(BITS):
        higher = code + 2 ** (BITS - 1 - i)
        code = tl.where(x <= threshold(higher, alpha, DTYPE, ROUNDING), code, higher)
    return code


@triton.jit
def state_of(x, alpha, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """0 for x <= 0, 1 for 0 < x <= L[q] and for NaN, 2 for x > L[q]."""
    above = x > level(2.0**BITS - 1, alpha, DTYPE)
    return tl.where(x <= 0, 0, tl.where(above, 2, 1))
