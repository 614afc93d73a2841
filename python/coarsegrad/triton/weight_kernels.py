"""The kernels of the scale of quantized weights (docs/spec.md, section 7). Conventions are those of kernels.py.

Programs have a row and a part of it each. What they add up are integers, so that atomic sums do not depend on order.
Magnitudes are made of bits by shifts alone: no instruction takes a subnormal for 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .signed_kernels import magnitude_bits
from .staircase import pow2, widen

# ---------------------------------------------------------------------------------------- magnitudes


@triton.jit
def _load_bits(weight_ptr, row, start, length, BLOCK: tl.constexpr):
    """The bits of |w| from `start` on in a row; 0 from its end on."""
    at = start + tl.arange(0, BLOCK)
    return magnitude_bits(widen(tl.load(weight_ptr + row * length + at, mask=at < length, other=0)))


@triton.jit
def _parts(bits):
    """(exponent, mantissa): |w| is mantissa * 2**(exponent - 150), or - 1075 in float64."""
    DIGITS: tl.constexpr = 52 if bits.dtype == tl.int64 else 23
    exponent = tl.maximum(bits >> DIGITS, 1)
    return exponent, bits - ((exponent - 1) << DIGITS)


@triton.jit
def _bit_length(mantissa):
    """Of an integer that its float holds; 1 for 0."""
    mantissa = tl.maximum(mantissa, 1)
    if mantissa.dtype == tl.int64:
        return (mantissa.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022
    else:
        return (mantissa.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126


@triton.jit
def _magnitudes(bits, largest):
    """m = floor(|w| * 2**(31 - e)), int32, with the exponent e of the largest of a row; of bits."""
    exponent, mantissa = _parts(bits)
    top_exponent, top_mantissa = _parts(largest)
    down = top_exponent - exponent
    if bits.dtype == tl.int64:
        up = 53 - _bit_length(top_mantissa)
        return ((mantissa << up) >> (22 + tl.minimum(down, 41))).to(tl.int32)
    else:
        up = 31 - _bit_length(top_mantissa)
        return (mantissa << up) >> tl.minimum(down, 31)


@triton.jit
def largest_kernel(weight_ptr, largest_ptr, length, PART: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of the largest |w| of each row, from 0 up."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART
    largest = _load_bits(weight_ptr, row, first, length, BLOCK)
    for start in range(first + BLOCK, tl.minimum(first + PART, length), BLOCK):
        largest = tl.maximum(largest, _load_bits(weight_ptr, row, start, length, BLOCK))
    tl.atomic_max(largest_ptr + row, tl.max(largest), sem="relaxed")


@triton.jit
def magnitudes_kernel(weight_ptr, largest_ptr, m_ptr, length, PART: tl.constexpr, BLOCK: tl.constexpr):
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART
    largest = tl.load(largest_ptr + row)
    for start in range(first, tl.minimum(first + PART, length), BLOCK):
        at = start + tl.arange(0, BLOCK)
        m = _magnitudes(_load_bits(weight_ptr, row, start, length, BLOCK), largest)
        tl.store(m_ptr + row * length + at, m, mask=at < length)


# -------------------------------------------------------------------------------------- best of some


@triton.jit
def _explained(product, square):
    """What codes take off the squared error of 0."""
    return product.to(tl.float64) * product.to(tl.float64) / tl.maximum(square, 1).to(tl.float64)


@triton.jit
def _best(product_ptr, square_ptr, first, count, COUNT: tl.constexpr):
    """Which of `count` pairs of sums from `first` on explains the most; of equals the first. COUNT: a power of two."""
    i = tl.arange(0, COUNT)
    product = tl.load(product_ptr + first + i, mask=i < count, other=0)
    square = tl.load(square_ptr + first + i, mask=i < count, other=0)
    explained = tl.where(i < count, _explained(product, square), -1.0)
    return tl.min(tl.where(explained == tl.max(explained), i, COUNT))


# ----------------------------------------------------------------------------------- four, eight bits


@triton.jit
def _inverse(divisor, largest, BITS: tl.constexpr):
    """What a short magnitude is multiplied by for its code, with the scale of this divisor."""
    UP: tl.constexpr = 38 if BITS == 4 else 36
    return ((divisor.to(tl.int64) << UP) // tl.maximum(_magnitudes(largest, largest), 1)).to(tl.int32)


@triton.jit
def _search_codes(short, inverse, BITS: tl.constexpr):
    """All is int32: short < 2**15, inverse < 2**16 - 2**10."""
    SHIFT: tl.constexpr = 24 if BITS == 4 else 20
    return tl.minimum((short * inverse + 2 ** (SHIFT - 1)) >> SHIFT, 2 ** (BITS - 1) - 1)


@triton.jit
def search_kernel(
    weight_ptr, largest_ptr, divisors_ptr, product_ptr, square_ptr, length, count,
    BITS: tl.constexpr, TRIED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds <h, k> and <k, k> of TRIED of the `count` scales of each row to zeros [rows, count]. At most 512 tiles: so
    many products of 15 and 7 bits fit into 32."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART
    i = tl.program_id(2) * TRIED + tl.arange(0, TRIED)
    largest = tl.load(largest_ptr + row)
    inverse = _inverse(tl.load(divisors_ptr + i, mask=i < count, other=0), largest, BITS)
    product = tl.zeros([TRIED, BLOCK], tl.int32)
    square = tl.zeros([TRIED, BLOCK], tl.int32)
    for start in range(first, tl.minimum(first + PART, length), BLOCK):
        short = _magnitudes(_load_bits(weight_ptr, row, start, length, BLOCK), largest) >> 16
        k = _search_codes(short[None, :], inverse[:, None], BITS)
        product += short[None, :] * k
        square += k * k
    at = row * count + i
    tl.atomic_add(product_ptr + at, tl.sum(product.to(tl.int64), 1), mask=i < count, sem="relaxed")
    tl.atomic_add(square_ptr + at, tl.sum(square.to(tl.int64), 1), mask=i < count, sem="relaxed")


@triton.jit
def sums_kernel(
    weight_ptr, largest_ptr, divisors_ptr, tried_product_ptr, tried_square_ptr, product_ptr, square_ptr, length, count,
    BITS: tl.constexpr, COUNT: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds P and N of each row to zeros: sum(m) and its length for one bit; <m, k> and <k, k> with the best of `count`
    scales, whose sums were tried, for more. COUNT: a power of two from `count` on."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART
    end = tl.minimum(first + PART, length)
    largest = tl.load(largest_ptr + row)
    product = tl.zeros([BLOCK], tl.int64)
    if BITS == 1:
        for start in range(first, end, BLOCK):
            product += _magnitudes(_load_bits(weight_ptr, row, start, length, BLOCK), largest)
        squares = (end - first).to(tl.int64)
    else:
        best = _best(tried_product_ptr, tried_square_ptr, row * count, count, COUNT)
        inverse = _inverse(tl.load(divisors_ptr + best), largest, BITS)
        square = tl.zeros([BLOCK], tl.int32)
        for start in range(first, end, BLOCK):
            m = _magnitudes(_load_bits(weight_ptr, row, start, length, BLOCK), largest)
            k = _search_codes(m >> 16, inverse, BITS)
            product += m.to(tl.int64) * k
            square += k * k
        squares = tl.sum(square.to(tl.int64))
    tl.atomic_add(product_ptr + row, tl.sum(product), sem="relaxed")
    tl.atomic_add(square_ptr + row, squares, sem="relaxed")


# ------------------------------------------------------------------------------------------- two bits


@triton.jit
def ternary_kernel(
    m_ptr, total_ptr, product_ptr, square_ptr, length, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best (sum, count) of each part of a row, [rows, parts]: of the largest magnitudes those that are quantized to
    sum / count; (0, 0) if none are. m: in descending order; total: its sums."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART
    best = tl.full([BLOCK], -1, tl.float64)
    product = tl.zeros([BLOCK], tl.int64)
    square = tl.zeros([BLOCK], tl.int64)
    for start in range(first, tl.minimum(first + PART, length), BLOCK):
        at = start + tl.arange(0, BLOCK)
        m = tl.load(m_ptr + row * length + at, mask=at < length, other=0)
        following = tl.load(m_ptr + row * length + at + 1, mask=at + 1 < length, other=0)
        total = tl.load(total_ptr + row * length + at, mask=at < length, other=0)
        count = (at + 1).to(tl.int64)
        consistent = (2 * count * m >= total) & (2 * count * following < total)
        explained = tl.where(consistent, _explained(total, count), -1.0)
        better = explained > best
        best = tl.where(better, explained, best)
        product, square = tl.where(better, total, product), tl.where(better, count, square)
    least = tl.min(tl.where(best == tl.max(best), square, length))
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(product_ptr + at, tl.sum(tl.where(square == least, product, 0)))
    tl.store(square_ptr + at, least)


# ---------------------------------------------------------------------------------------------- scale


@triton.jit
def scale_kernel(largest_ptr, product_ptr, square_ptr, scale_ptr, count, COUNT: tl.constexpr):
    """P / N * 2**(e - 31) of each row, with the best of `count` pairs."""
    row = tl.program_id(0).to(tl.int64)
    at = row * count + _best(product_ptr, square_ptr, row * count, count, COUNT)
    quotient = tl.load(product_ptr + at).to(tl.float64) / tl.maximum(tl.load(square_ptr + at), 1).to(tl.float64)
    largest = tl.load(largest_ptr + row)
    exponent, mantissa = _parts(largest)
    LEAST: tl.constexpr = -1075 if largest.dtype == tl.int64 else -150
    INFINITE: tl.constexpr = 0x7FF0000000000000 if largest.dtype == tl.int64 else 0x7F800000
    exponent += _bit_length(mantissa) + (LEAST - 31)
    # Two factors, as 2**exponent may be out of range.
    half = exponent >> 1
    scale = quotient * pow2(half.to(tl.float64)) * pow2((exponent - half).to(tl.float64))
    scale = tl.where(largest < INFINITE, scale, float("nan"))
    tl.store(scale_ptr + row, scale.to(scale_ptr.dtype.element_ty))
