"""The kernels of the signed staircase and of the Hadamard rotation. Conventions are those of kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import load, load_alpha, load_rows, store, store_packed, store_rows
from .staircase import level, narrow, signed_code_of, widen

# ------------------------------------------------------------------------------------- given alpha


@triton.jit
def _forward_block(
    x_ptr, alpha_ptr, y_ptr, mask_ptr, codes_ptr, start, count, channels, inner,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, ALPHAS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = 2 ** (BITS - 1) - 1
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    x = load(x_ptr, start, count, BLOCK, TAIL)
    alpha = load_alpha(alpha_ptr, start, channels, inner, ALPHAS, BLOCK)
    k = signed_code_of(x, alpha, DTYPE, BITS)
    store(y_ptr, tl.where(x == x, k * alpha, x), start, count, TAIL)
    if mask_ptr is not None:
        outside = tl.abs(x) > level(1.0 * P, alpha, DTYPE)
        store_packed(mask_ptr, tl.where(outside, 0, 1), start, count, 1, TAIL)
    if codes_ptr is not None:
        store_packed(codes_ptr, k.to(tl.int32) + P, start, count, CODE_WIDTH, TAIL)


@triton.jit
def qsigned_forward_kernel(
    x_ptr, alpha_ptr, y_ptr, mask_ptr, codes_ptr, count, channels, inner,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, ALPHAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes y, the bits of |x| <= L[p], and codes, unless None."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= count:
        _forward_block(x_ptr, alpha_ptr, y_ptr, mask_ptr, codes_ptr, start, count, channels, inner,
                       BITS, CODE_WIDTH, ALPHAS, BLOCK, TAIL=False)  # fmt: skip
    else:
        _forward_block(x_ptr, alpha_ptr, y_ptr, mask_ptr, codes_ptr, start, count, channels, inner,
                       BITS, CODE_WIDTH, ALPHAS, BLOCK, TAIL=True)  # fmt: skip


# ----------------------------------------------------------------------------------- dynamic alphas


@triton.jit
def magnitude_bits(x):
    """The bits of |x|, integers in the order of the numbers; above all of these are infinity's and NaN's."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _quotient_bits(largest, BITS: tl.constexpr):
    """largest / p rounded once, and from float64 up to float32; bits of a finite largest to bits."""
    P: tl.constexpr = 2 ** (BITS - 1) - 1
    if largest.dtype == tl.int64:
        quotient = largest.to(tl.float64, bitcast=True) / P
        single = quotient.to(tl.float32)
        return single.to(tl.int32, bitcast=True) + (single.to(tl.float64) < quotient).to(tl.int32)
    else:
        # In integers, as subnormal numbers have to count: mantissa * 2**up / p has 24 bits, or is subnormal.
        exponent = tl.maximum(largest >> 23, 1)
        mantissa = largest - ((exponent - 1) << 23)
        up = tl.where((mantissa << (BITS - 1)) < (P << 24), BITS - 1, BITS - 2)
        up = tl.minimum(up, exponent - 1)
        # p is odd: no quotient lies half-way between two integers. A carry, and the leading bit, go into the exponent.
        return ((exponent - up - 1) << 23) + ((mantissa << up) + P // 2) // P


@triton.jit
def alpha_bits(largest, BITS: tl.constexpr):
    """largest / p rounded up to bfloat16, or NaN; bits to bits, int32."""
    infinite: tl.constexpr = 0x7FF0000000000000 if largest.dtype == tl.int64 else 0x7F800000
    finite = largest < infinite
    up = (_quotient_bits(tl.where(finite, largest, 0), BITS) + 0xFFFF) >> 16
    return tl.where(finite & (up < 0x7F80), up, 0x7FC0)


@triton.jit
def _store_rows_packed(ptr, values, first, inside, columns, WIDTH: tl.constexpr):
    """Packs int32 values below 2**WIDTH. `first` and `columns` are multiples of the values in a byte."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    BYTES: tl.constexpr = values.shape[1] // PER_BYTE
    if PER_BYTE > 1:
        shifts = tl.arange(0, PER_BYTE) * WIDTH
        values = tl.sum(tl.reshape(values, [values.shape[0], BYTES, PER_BYTE]) << shifts[None, None, :], 2)
    byte = tl.arange(0, BYTES)
    mask = inside[:, None] & (byte < columns // PER_BYTE)[None, :]
    tl.store(ptr + (first // PER_BYTE)[:, None] + byte[None, :], values.to(tl.uint8), mask=mask)


@triton.jit
def quantize_rows(x, alpha, y_ptr, codes_ptr, first, inside, columns, BITS: tl.constexpr, CODE_WIDTH: tl.constexpr):
    k = signed_code_of(x, alpha, y_ptr.dtype.element_ty, BITS)
    store_rows(y_ptr, k * alpha, first, inside, columns)
    if codes_ptr is not None:
        _store_rows_packed(codes_ptr, k.to(tl.int32) + (2 ** (BITS - 1) - 1), first, inside, columns, CODE_WIDTH)


@triton.jit
def qsigned_groups_kernel(
    x_ptr, y_ptr, alpha_ptr, codes_ptr, groups, group,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Writes alphas, y, and codes unless None, for ROWS groups of `group` consecutive elements, a multiple of the codes
    in a byte.

    A group is read once, and stays in registers. LONG: it may have more than COLUMNS elements, which are read again.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first, inside = row * group, row < groups
    x = load_rows(x_ptr, first, inside, group, COLUMNS)
    largest = magnitude_bits(x)
    if LONG:
        for start in range(COLUMNS, group, COLUMNS):
            more = load_rows(x_ptr, first + start, inside, group - start, COLUMNS)
            largest = tl.maximum(largest, magnitude_bits(more))
    bits = alpha_bits(tl.max(largest, 1), BITS)
    tl.store(alpha_ptr + row, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    alpha = (bits << 16).to(tl.float32, bitcast=True).to(x.dtype)[:, None]
    quantize_rows(x, alpha, y_ptr, codes_ptr, first, inside, group, BITS, CODE_WIDTH)
    if LONG:
        for start in range(COLUMNS, group, COLUMNS):
            more = load_rows(x_ptr, first + start, inside, group - start, COLUMNS)
            quantize_rows(more, alpha, y_ptr, codes_ptr, first + start, inside, group - start, BITS, CODE_WIDTH)


@triton.jit
def pack_kernel(bytes_ptr, packed_ptr, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Packs values of WIDTH bits, one per byte."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    store_packed(packed_ptr, load(bytes_ptr, start, count, BLOCK, True).to(tl.int32), start, count, WIDTH, True)


# ---------------------------------------------------------------------------------------- rotation


@triton.jit
def butterfly(v, DISTANCE: tl.constexpr):
    """(a + b, a - b) for (a, b) at this distance."""
    pairs = tl.reshape(v, [v.shape[0] // (2 * DISTANCE), 2, DISTANCE])
    a, b = tl.split(tl.permute(pairs, [0, 2, 1]))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [v.shape[0]])


@triton.jit
def hadamard_kernel(
    x_ptr, y_ptr, count, inner,
    STAGES: tl.constexpr, SCALE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Butterflies at distances inner, 2 * inner, ... of a tensor [rows, inner], then a product with SCALE unless None.

    A program has BLOCK / COLUMNS rows, and COLUMNS, which divides inner.
    """
    block, across = tl.program_id(0).to(tl.int64), inner // COLUMNS
    i = tl.arange(0, BLOCK)
    row = block // across * (BLOCK // COLUMNS) + i // COLUMNS
    at = row * inner + block % across * COLUMNS + i % COLUMNS
    v = widen(tl.load(x_ptr + at, mask=at < count, other=0))
    for stage in tl.static_range(STAGES):
        v = butterfly(v, COLUMNS * 2**stage)
    if SCALE is not None:
        v = v * SCALE
    tl.store(y_ptr + at, narrow(v, y_ptr.dtype.element_ty), mask=at < count)
