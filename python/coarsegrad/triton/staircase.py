"""The staircase in Triton: x -> code -> level, for any alpha, by comparisons with the thresholds.

    levels      L[k] = round_to_dtype(k * alpha), k = 0..q, q = 2**bits - 1
    thresholds  ceil: T[k] = L[k-1];  nearest: T[k] = (L[k-1] + L[k]) / 2;  hwgq: nearest, but T[1] = 0
    code        c = #{k in 1..q : x > T[k]}, output y = L[c]

Of the signed staircase k = -p..p, p = 2**(bits - 1) - 1, and thresholds are "nearest".

Computed in float32, or in float64 for float64 x.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rounding to bfloat16 is an instruction on a GPU, and wrong in Triton's interpreter.
_IN_THE_INTERPRETER = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def round_to_integer(v):
    """The integer nearest to v, |v| < 2**22 (2**51 in float64). Cheaper than a floor."""
    magic: tl.constexpr = 6755399441055744.0 if v.dtype == tl.float64 else 12582912.0
    return (v + magic) - magic


@triton.jit
def pow2(n):
    """2**n for an integer n in the exponent range."""
    if n.dtype == tl.float64:
        return ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def refined_quotient(a, b, inverse):
    """a / b rounded once, from 1 / b with an error of a few ulps, for 1 <= b < 2 and |a| >= 2**-100 or a = 0.

    A correctly rounded inverse and a quotient within an ulp yield the rounded quotient (Markstein 1990). For b just
    below 2 Newton's step can miss that inverse by an ulp; its neighbour then has the smaller residual.
    """
    inverse = tl.fma(tl.fma(-b, inverse, 1.0), inverse, inverse)
    left = tl.fma(-b, inverse, 1.0)
    neighbour = (inverse.to(tl.int32, bitcast=True) + tl.where(left > 0, 1, -1)).to(tl.float32, bitcast=True)
    inverse = tl.where(tl.abs(tl.fma(-b, neighbour, 1.0)) < tl.abs(left), neighbour, inverse)
    quotient = a * inverse
    quotient = tl.fma(tl.fma(-b, quotient, a), inverse, quotient)
    return tl.fma(tl.fma(-b, quotient, a), inverse, quotient)


@triton.jit
def divide(a, b):
    """a / b rounded once, for tensors, b > 0. A subnormal quotient is rounded twice.

    Triton's float32 division is approximate, and asked here for inverses of numbers in [1, 2) alone. Its rounded one
    calls a function in rare cases, which spills registers.
    """
    if a.dtype == tl.float64:
        return a / b
    else:
        # b = mantissa * 2**exponent. Work on b alone is done once if b is a single number.
        subnormal = b < 1.1754943508222875e-38
        word = tl.where(subnormal, b * 16777216.0, b).to(tl.int32, bitcast=True)
        exponent = (word >> 23) - tl.where(subnormal, 151, 127)
        mantissa = ((word & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        # Two factors, as 2**-exponent can be out of range. The second underflows only if the result does.
        one = -(exponent >> 1)
        other = pow2(-exponent - one)
        small = tl.abs(a) < 7.888609052210118e-31  # 2**-100
        quotient = refined_quotient(tl.where(small, a * 18446744073709551616.0, a), mantissa, 1.0 / mantissa)
        quotient = quotient * other * tl.where(small, pow2(one - 64), pow2(one))
        regular_below = tl.where(b < float("inf"), float("inf"), 0.0)
        # Where a or b is infinite or NaN, it matters only which of these b is. Its inverse might be subnormal.
        like_inverse = tl.where(b < float("inf"), 1.0, tl.where(b == float("inf"), 0.0, b))
        return tl.where(tl.abs(a) < regular_below, quotient, a * like_inverse)


@triton.jit
def _to_bfloat16(v):
    """The nearest bfloat16, ties to even."""
    if _IN_THE_INTERPRETER:
        word = v.to(tl.uint32, bitcast=True)
        word = tl.where(v == v, word + 0x7FFF + ((word >> 16) & 1), 0x7FC00000)
        return (word >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(tl.bfloat16)


@triton.jit
def widen(v):
    """A loaded number in its compute dtype."""
    if v.dtype == tl.bfloat16:
        return (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif v.dtype == tl.float16:
        return v.to(tl.float32)
    else:
        return v


@triton.jit
def narrow(v, DTYPE: tl.constexpr):
    """v rounded to DTYPE."""
    if DTYPE == tl.bfloat16:
        return _to_bfloat16(v)
    else:
        return v.to(DTYPE)


@triton.jit
def level(k, alpha, DTYPE: tl.constexpr):
    """L[k] in the compute dtype."""
    return widen(narrow(k * alpha, DTYPE))


@triton.jit
def threshold_above(k, alpha, DTYPE: tl.constexpr, ROUNDING: tl.constexpr):
    """T[k + 1]: x > T[k + 1] has a code above k."""
    lower = level(k, alpha, DTYPE)
    if ROUNDING == "ceil":
        return lower
    else:
        middle = (lower + level(k + 1, alpha, DTYPE)) * 0.5
        if ROUNDING == "hwgq":
            return tl.where(k == 0, 0.0, middle)
        else:
            return middle


@triton.jit
def _regular(alpha, DTYPE: tl.constexpr, TOP: tl.constexpr):
    """Whether levels neither collapse nor overflow, sums of two do not overflow, and the reciprocal is normal. TOP: the
    largest k, as a float.
    """
    top = level(TOP, alpha, DTYPE)
    if DTYPE == tl.float64:
        return (alpha >= 2.2250738585072014e-308) & (top <= 4.49423283715579e307)
    elif DTYPE == tl.float16:
        return (alpha >= 5.960464477539063e-08) & (top <= 65504.0)
    else:
        return (alpha >= 1.1754943508222875e-38) & (top <= 8.507059173023462e37)


@triton.jit
def _clamp(v, low, high):
    """NaN for NaN."""
    v = tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _least(v):
    """The minimum of a block, or the number itself. NaN only if all are NaN."""
    if len(v.shape) == 0:
        return v
    else:
        return tl.min(v)


@triton.jit
def code_by_guess(x, alpha, inverse, DTYPE: tl.constexpr, BITS: tl.constexpr, ROUNDING: tl.constexpr):
    """c for a regular alpha, from 1 / alpha with an error of a few ulps.

    Rounding moves a level, and so a threshold, by less than 255/256 of a stair (bfloat16, 8 bits). Hence a guess is at
    most one stair off, whatever its last bits.
    """
    if ROUNDING == "ceil":
        # A number of DTYPE above L[k] is not below k * alpha, so that the ceiling of a slightly too high quotient is c
        # or c + 1.
        inverse *= 1 + 2.0**-20
        below = round_to_integer(_clamp(x * inverse - 0.5, 0.0, 2.0**BITS - 2))
        return tl.where(x <= threshold_above(below, alpha, DTYPE, ROUNDING), below, below + 1)
    else:
        middle = round_to_integer(_clamp(x * inverse, 1.0, 2.0**BITS - 2))
        code = tl.where(x <= threshold_above(middle - 1, alpha, DTYPE, ROUNDING), middle - 1, middle)
        return tl.where(x > threshold_above(middle, alpha, DTYPE, ROUNDING), middle + 1, code)


@triton.jit
def code_by_search(x, alpha, LOWEST: tl.constexpr, DTYPE: tl.constexpr, BITS: tl.constexpr, ROUNDING: tl.constexpr):
    """The code for any alpha, of 2**BITS from LOWEST up: binary search from the highest bit down.

    A loop of unknown length, so that it is not unrolled: this rare case must stay small.
    """
    code = tl.where(x == x, LOWEST, x)
    step = 2.0 ** (BITS - 1) + _least(alpha) * 0
    while step >= 1:
        code = tl.where(x <= threshold_above(code + (step - 1), alpha, DTYPE, ROUNDING), code, code + step)
        step *= 0.5
    return code


@triton.jit
def code_of(x, alpha, DTYPE: tl.constexpr, BITS: tl.constexpr, ROUNDING: tl.constexpr):
    """c, as a number of x's dtype; NaN for NaN."""
    if BITS <= 2:
        code = tl.where(x == x, 2.0**BITS - 1, x)
        for i in tl.static_range(2**BITS - 1):
            lower = 2.0**BITS - 2 - i
            code = tl.where(x <= threshold_above(lower, alpha, DTYPE, ROUNDING), lower, code)
    elif _least(_regular(alpha, DTYPE, 2.0**BITS - 1).to(tl.int32)) != 0:
        code = code_by_guess(x, alpha, 1.0 / alpha, DTYPE, BITS, ROUNDING)
    else:
        code = code_by_search(x, alpha, 0.0, DTYPE, BITS, ROUNDING)
    return code


@triton.jit
def state_of(x, alpha, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """0 for x <= 0, 1 for 0 < x <= L[q] and for NaN, 2 for x > L[q]."""
    above = x > level(2.0**BITS - 1, alpha, DTYPE)
    return tl.where(x <= 0, 0, tl.where(above, 2, 1))


@triton.jit
def near_of(x, alpha, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """Whether -alpha/2 <= x <= L[q] + alpha/2; true for NaN."""
    half = alpha * 0.5
    outside = (x < -half) | (x > level(2.0**BITS - 1, alpha, DTYPE) + half)
    return tl.where(outside, 0, 1) != 0


@triton.jit
def signed_code_by_guess(x, alpha, inverse, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """k = c - p for a regular alpha, from 1 / alpha with an error of a few ulps.

    Rounding moves a level, and so a threshold, by at most 127/256 of a stair (bfloat16, 8 bits), so that T[k] is above
    k - 1 stairs and below k. Hence one threshold is left to decide, whatever the quotient's last bits.
    """
    P: tl.constexpr = 2.0 ** (BITS - 1) - 1
    below = round_to_integer(_clamp(x * inverse - 0.5, -P, P - 1))
    return tl.where(x <= threshold_above(below, alpha, DTYPE, "nearest"), below, below + 1)


@triton.jit
def signed_code_of(x, alpha, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """k = c - p, as a number of x's dtype; 0 for NaN, and where alpha is 0 or NaN."""
    P: tl.constexpr = 2.0 ** (BITS - 1) - 1
    stairs = alpha > 0
    alpha = tl.where(stairs, alpha, 1.0)
    if BITS == 2:
        k = tl.where(x > threshold_above(tl.zeros_like(x), alpha, DTYPE, "nearest"), 1.0, 0.0)
        k = tl.where(x <= threshold_above(tl.full(x.shape, -1, x.dtype), alpha, DTYPE, "nearest"), -1.0, k)
    elif _least(_regular(alpha, DTYPE, P).to(tl.int32)) != 0:
        k = signed_code_by_guess(x, alpha, 1.0 / alpha, DTYPE, BITS)
    else:
        # One level more makes 2**BITS of them; its code is then taken back.
        k = tl.maximum(code_by_search(x, alpha, -P - 1, DTYPE, BITS, "nearest"), -P)
    return tl.where(x == x, tl.where(stairs, k, 0.0), 0.0)
