"""The kernels: every op on blocks of elements in memory order. What a launch does not want is None, and costs nothing.

Suffixes: _ptr is a tensor; capitals are known as a kernel is compiled. Packed bytes are read and written whole, each by
one program: a block has a multiple of 8 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .staircase import code_of, divide, narrow, state_of, widen

# ------------------------------------------------------------------------------------------ memory


@triton.jit
def _load(ptr, start, count, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """BLOCK numbers from `start` on, widened; 0 from `count` on, where TAIL says that this can be."""
    at = start + tl.arange(0, BLOCK)
    if TAIL:
        return widen(tl.load(ptr + at, mask=at < count, other=0))
    else:
        return widen(tl.load(ptr + at))


@triton.jit
def _store(ptr, values, start, count, TAIL: tl.constexpr):
    at = start + tl.arange(0, values.shape[0])
    if TAIL:
        tl.store(ptr + at, narrow(values, ptr.dtype.element_ty), mask=at < count)
    else:
        tl.store(ptr + at, narrow(values, ptr.dtype.element_ty))


@triton.jit
def _load_packed(ptr, start, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """BLOCK packed values of WIDTH bits from `start` on, int32."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    at = start // PER_BYTE + tl.arange(0, BLOCK // PER_BYTE)
    if TAIL:
        packed = tl.load(ptr + at, mask=at * PER_BYTE < count, other=0).to(tl.int32)
    else:
        packed = tl.load(ptr + at).to(tl.int32)
    if PER_BYTE == 1:
        return packed
    else:
        shifts = tl.arange(0, PER_BYTE) * WIDTH
        return tl.reshape((packed[:, None] >> shifts[None, :]) & (2**WIDTH - 1), [BLOCK])


@triton.jit
def _store_packed(ptr, values, start, count, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """Packs int32 values below 2**WIDTH; the last byte is padded with zeros."""
    BLOCK: tl.constexpr = values.shape[0]
    PER_BYTE: tl.constexpr = 8 // WIDTH
    if TAIL:
        values = tl.where(start + tl.arange(0, BLOCK) < count, values, 0)
    if PER_BYTE > 1:
        shifts = tl.arange(0, PER_BYTE) * WIDTH
        values = tl.sum(tl.reshape(values, [BLOCK // PER_BYTE, PER_BYTE]) << shifts[None, :], 1)
    at = start // PER_BYTE + tl.arange(0, BLOCK // PER_BYTE)
    if TAIL:
        tl.store(ptr + at, values.to(tl.uint8), mask=at * PER_BYTE < count)
    else:
        tl.store(ptr + at, values.to(tl.uint8))


@triton.jit
def _checked(alpha):
    """NaN where it is no legal alpha, so that every level is NaN."""
    return tl.where((alpha > 0) & (alpha < float("inf")), alpha, float("nan"))


@triton.jit
def _load_alpha(ptr, start, channels, inner, PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr):
    """alpha of BLOCK elements from `start` on: one, or one for each. `inner`: elements of a channel in a row."""
    if PER_CHANNEL:
        # The only 64-bit quotients are of the block; passed: how many channels further an element is.
        segment = start // inner
        first = (segment % channels).to(tl.int32)
        left = tl.minimum(inner - (start - segment * inner), BLOCK).to(tl.int32)
        step = tl.minimum(inner, BLOCK).to(tl.int32)
        i = tl.arange(0, BLOCK)
        passed = tl.where(i < left, 0, 1 + (i - left) // step)
        return _checked(tl.load(ptr + (first + passed) % channels))
    else:
        return _checked(tl.load(ptr))


# ----------------------------------------------------------------------------------------- forward


@triton.jit
def _forward_block(
    x_ptr, alpha_ptr, y_ptr, mask_ptr, codes_ptr, start, count, channels, inner,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, ROUNDING: tl.constexpr, MASK: tl.constexpr,
    PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    x = _load(x_ptr, start, count, BLOCK, TAIL)
    alpha = _load_alpha(alpha_ptr, start, channels, inner, PER_CHANNEL, BLOCK)
    code = code_of(x, alpha, DTYPE, BITS, ROUNDING)
    if y_ptr is not None:
        _store(y_ptr, code * alpha, start, count, TAIL)
    if mask_ptr is not None:
        state = state_of(x, alpha, DTYPE, BITS)
        if MASK == "state":
            _store_packed(mask_ptr, state, start, count, 2, TAIL)
        elif MASK == "inside":
            _store_packed(mask_ptr, (state == 1).to(tl.int32), start, count, 1, TAIL)
        else:
            _store_packed(mask_ptr, (state != 0).to(tl.int32), start, count, 1, TAIL)
    if codes_ptr is not None:
        _store_packed(codes_ptr, tl.minimum(code, 2.0**BITS - 1).to(tl.int32), start, count, CODE_WIDTH, TAIL)


@triton.jit
def qrelu_forward_kernel(
    x_ptr, alpha_ptr, y_ptr, mask_ptr, codes_ptr, count, channels, inner,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, ROUNDING: tl.constexpr, MASK: tl.constexpr,
    PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x to y, which may be x, to mask bits of the kind MASK and to codes, as far as they are wanted."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= count:
        _forward_block(x_ptr, alpha_ptr, y_ptr, mask_ptr, codes_ptr, start, count, channels, inner,
                       BITS, CODE_WIDTH, ROUNDING, MASK, PER_CHANNEL, BLOCK, TAIL=False)  # fmt: skip
    else:
        _forward_block(x_ptr, alpha_ptr, y_ptr, mask_ptr, codes_ptr, start, count, channels, inner,
                       BITS, CODE_WIDTH, ROUNDING, MASK, PER_CHANNEL, BLOCK, TAIL=True)  # fmt: skip


@triton.jit
def _dequantize_block(
    codes_ptr, alpha_ptr, y_ptr, start, count, channels, inner,
    CODE_WIDTH: tl.constexpr, PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    code = _load_packed(codes_ptr, start, count, CODE_WIDTH, BLOCK, TAIL)
    alpha = _load_alpha(alpha_ptr, start, channels, inner, PER_CHANNEL, BLOCK)
    _store(y_ptr, code.to(alpha.dtype) * alpha, start, count, TAIL)


@triton.jit
def dequantize_kernel(
    codes_ptr, alpha_ptr, y_ptr, count, channels, inner,
    CODE_WIDTH: tl.constexpr, PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes to y = L[c]."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= count:
        _dequantize_block(codes_ptr, alpha_ptr, y_ptr, start, count, channels, inner,
                          CODE_WIDTH, PER_CHANNEL, BLOCK, TAIL=False)  # fmt: skip
    else:
        _dequantize_block(codes_ptr, alpha_ptr, y_ptr, start, count, channels, inner,
                          CODE_WIDTH, PER_CHANNEL, BLOCK, TAIL=True)  # fmt: skip


# ---------------------------------------------------------------------------------------- backward


@triton.jit
def _times(dy, factor):
    """dy * factor. Where that is 0 it is a select, never a product: inf * 0 must not arise."""
    return tl.where(factor == 0, 0.0, dy * factor)


@triton.jit
def _slope_and_factor(
    dy, x, alpha, kept, code,
    DTYPE: tl.constexpr, BITS: tl.constexpr, GPRIME: tl.constexpr, NEEDS: tl.constexpr, ROUNDING: tl.constexpr,
    MASK: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """g'(u), 1 for NaN, and A, unless RULE is None. kept: mask bits of the kind MASK."""
    q: tl.constexpr = 2**BITS - 1
    half = tl.full(dy.shape, 0.5, dy.dtype)
    state, u = kept, half
    if x is not None:
        state = state_of(x, alpha, DTYPE, BITS)
        code = code_of(x, alpha, DTYPE, BITS, ROUNDING)
        code = tl.where(x == x, code, q)
        u = divide(x, alpha)
        # x > 0 stays u > 0 where the quotient underflows.
        tiny: tl.constexpr = 2.2250738585072014e-308 if dy.dtype == tl.float64 else 1.1754943508222875e-38
        u = tl.where((x > 0) & (u < tiny), tiny, u)
    if NEEDS == "x":
        g = tl.where(u == u, GPRIME(u, q), 1.0)
    elif NEEDS == "codes":
        g = GPRIME(code.to(dy.dtype), q)
    elif NEEDS == "nothing":
        g = GPRIME(half, q)
    else:
        # g' is constant where the bit is the same, so that any u with that bit will do.
        if MASK == "positive" or MASK == "inside":
            bit = kept != 0
        elif MASK == "nothing" and x is None:
            bit = code != 0
        elif NEEDS == "inside":
            bit = state == 1
        else:
            bit = state != 0
        g = GPRIME(tl.where(bit, half, -half), q)
    if RULE is None:
        return g, g
    else:
        return g, RULE(state, code, u, g, q).to(dy.dtype)


@triton.jit
def _backward_block(
    dy_ptr, x_ptr, alpha_ptr, mask_ptr, codes_ptr, dx_ptr, start, count, channels, inner,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, GPRIME: tl.constexpr, NEEDS: tl.constexpr, ROUNDING: tl.constexpr,
    MASK: tl.constexpr, RULE: tl.constexpr, PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Writes dx, if it is wanted; returns the terms of dalpha."""
    dy = _load(dy_ptr, start, count, BLOCK, TAIL)
    x, alpha, kept, code = None, None, None, None
    if x_ptr is not None:
        x = _load(x_ptr, start, count, BLOCK, TAIL)
        alpha = _load_alpha(alpha_ptr, start, channels, inner, PER_CHANNEL, BLOCK)
    if mask_ptr is not None:
        kept = _load_packed(mask_ptr, start, count, 2 if MASK == "state" else 1, BLOCK, TAIL)
    if codes_ptr is not None:
        code = _load_packed(codes_ptr, start, count, CODE_WIDTH, BLOCK, TAIL)
    g, factor = _slope_and_factor(dy, x, alpha, kept, code,
                                  dy_ptr.dtype.element_ty, BITS, GPRIME, NEEDS, ROUNDING, MASK, RULE)  # fmt: skip
    if dx_ptr is not None:
        _store(dx_ptr, _times(dy, g), start, count, TAIL)
    return _times(dy, factor)


@triton.jit
def qrelu_backward_kernel(
    dy_ptr, x_ptr, alpha_ptr, mask_ptr, codes_ptr, dx_ptr, partial_ptr, count, channels, inner,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, GPRIME: tl.constexpr, NEEDS: tl.constexpr, ROUNDING: tl.constexpr,
    MASK: tl.constexpr, RULE: tl.constexpr, PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dy to dx, and to one partial sum of dalpha a program, as far as they are wanted."""
    total = tl.zeros([BLOCK], dtype=tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, count, tl.num_programs(0).to(tl.int64) * BLOCK):
        if start + BLOCK <= count:
            terms = _backward_block(dy_ptr, x_ptr, alpha_ptr, mask_ptr, codes_ptr, dx_ptr, start, count, channels,
                                    inner, BITS, CODE_WIDTH, GPRIME, NEEDS, ROUNDING, MASK, RULE, PER_CHANNEL, BLOCK,
                                    TAIL=False)  # fmt: skip
        else:
            terms = _backward_block(dy_ptr, x_ptr, alpha_ptr, mask_ptr, codes_ptr, dx_ptr, start, count, channels,
                                    inner, BITS, CODE_WIDTH, GPRIME, NEEDS, ROUNDING, MASK, RULE, PER_CHANNEL, BLOCK,
                                    TAIL=True)  # fmt: skip
        if partial_ptr is not None:
            total += terms
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _load_one_by_one(ptr, at, inside, WIDTH: tl.constexpr):
    """The packed values at these places, int32."""
    byte = tl.load(ptr + at * WIDTH // 8, mask=inside, other=0).to(tl.int32)
    return (byte >> (at * WIDTH % 8).to(tl.int32)) & (2**WIDTH - 1)


@triton.jit
def grad_alpha_channels_kernel(
    dy_ptr, x_ptr, alpha_ptr, mask_ptr, codes_ptr, partial_ptr, outer, channels, inner,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, GPRIME: tl.constexpr, NEEDS: tl.constexpr, ROUNDING: tl.constexpr,
    MASK: tl.constexpr, RULE: tl.constexpr, INNERMOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial[slice, channel]: sums of the terms of dalpha, the tensor seen as [outer, channels, inner].

    A program has one channel, and tiles of ROWS outer by COLUMNS inner indices; or, where the channel is the innermost
    dimension, COLUMNS channels. Its slice is every so manyth tile.
    """
    column = tl.arange(0, COLUMNS)
    if INNERMOST:
        channel = tl.program_id(0) * COLUMNS + column
        across = 1
    else:
        channel = tl.program_id(0) + column * 0
        across = tl.cdiv(inner, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32)
    tiles = tl.cdiv(outer, ROWS) * across
    for tile in range(tl.program_id(1).to(tl.int64), tiles, tl.num_programs(1)):
        row = tile // across * ROWS + tl.arange(0, ROWS)
        if INNERMOST:
            within = (row < outer)[:, None] & (channel < channels)[None, :]
            at = row[:, None] * channels + channel[None, :]
        else:
            i = tile % across * COLUMNS + column
            within = (row < outer)[:, None] & (i < inner)[None, :]
            at = (row[:, None] * channels + tl.program_id(0)) * inner + i[None, :]
        dy = widen(tl.load(dy_ptr + at, mask=within, other=0))
        x, alpha, kept, code = None, None, None, None
        if x_ptr is not None:
            x = widen(tl.load(x_ptr + at, mask=within, other=0))
            alpha = _checked(tl.load(alpha_ptr + channel, mask=channel < channels, other=1))[None, :]
        if mask_ptr is not None:
            kept = _load_one_by_one(mask_ptr, at, within, 2 if MASK == "state" else 1)
        if codes_ptr is not None:
            code = _load_one_by_one(codes_ptr, at, within, CODE_WIDTH)
        _, factor = _slope_and_factor(dy, x, alpha, kept, code,
                                      dy_ptr.dtype.element_ty, BITS, GPRIME, NEEDS, ROUNDING, MASK, RULE)  # fmt: skip
        total += _times(dy, factor)
    to = partial_ptr + tl.program_id(1).to(tl.int64) * channels
    if INNERMOST:
        tl.store(to + channel, tl.sum(total, 0), mask=channel < channels)
    else:
        tl.store(to + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def sum_slices_kernel(partial_ptr, sums_ptr, slices, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums[channel] = the sum over slices of partial[slice, channel], in a fixed order."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=sums_ptr.dtype.element_ty)
    for first in range(0, slices, ROWS):
        row = first + tl.arange(0, ROWS)
        within = (row < slices)[:, None] & (channel < channels)[None, :]
        total += tl.load(partial_ptr + row[:, None].to(tl.int64) * channels + channel[None, :], mask=within, other=0)
    tl.store(sums_ptr + channel, tl.sum(total, 0), mask=channel < channels)
