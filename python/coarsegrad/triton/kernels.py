"""The kernels: each op on blocks of elements in memory order. An unused pointer is None and costs nothing.

Suffix _ptr: a tensor. Capitals: compile-time constants. Packed bytes are read and written whole, each by one program: a
block has a multiple of 8 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .staircase import code_of, divide, narrow, near_of, state_of, widen

# ------------------------------------------------------------------------------------------ memory


@triton.jit
def load(ptr, start, count, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """BLOCK numbers from `start` on, widened; 0 from `count` on, if TAIL."""
    at = start + tl.arange(0, BLOCK)
    if TAIL:
        return widen(tl.load(ptr + at, mask=at < count, other=0))
    else:
        return widen(tl.load(ptr + at))


@triton.jit
def store(ptr, values, start, count, TAIL: tl.constexpr):
    at = start + tl.arange(0, values.shape[0])
    if TAIL:
        tl.store(ptr + at, narrow(values, ptr.dtype.element_ty), mask=at < count)
    else:
        tl.store(ptr + at, narrow(values, ptr.dtype.element_ty))


@triton.jit
def _unpacked(packed, WIDTH: tl.constexpr):
    """Unpacks bytes to values of WIDTH bits, int32, along the last dimension."""
    packed = packed.to(tl.int32)
    PER_BYTE: tl.constexpr = 8 // WIDTH
    if PER_BYTE == 1:
        return packed
    else:
        shifts = tl.arange(0, PER_BYTE) * WIDTH
        if len(packed.shape) == 1:
            values = (packed[:, None] >> shifts[None, :]) & (2**WIDTH - 1)
            return tl.reshape(values, [packed.shape[0] * PER_BYTE])
        else:
            values = (packed[:, :, None] >> shifts[None, None, :]) & (2**WIDTH - 1)
            return tl.reshape(values, [packed.shape[0], packed.shape[1] * PER_BYTE])


@triton.jit
def load_packed(ptr, start, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """BLOCK packed values of WIDTH bits from `start` on, int32."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    at = start // PER_BYTE + tl.arange(0, BLOCK // PER_BYTE)
    if TAIL:
        return _unpacked(tl.load(ptr + at, mask=at * PER_BYTE < count, other=0), WIDTH)
    else:
        return _unpacked(tl.load(ptr + at), WIDTH)


@triton.jit
def store_packed(ptr, values, start, count, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """Packs int32 values below 2**WIDTH. The last byte is zero-padded."""
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
    """NaN for an illegal alpha, so that every level is NaN."""
    return tl.where((alpha > 0) & (alpha < float("inf")), alpha, float("nan"))


@triton.jit
def load_alpha(ptr, start, channels, inner, ALPHAS: tl.constexpr, BLOCK: tl.constexpr, DYNAMIC: tl.constexpr = False):
    """alpha of BLOCK elements from `start` on: a single one, or one per element, shared by 8 in a row if "by octet".
    `inner`: consecutive elements of a channel. DYNAMIC: any value is legal.
    """
    if ALPHAS == "one":
        alpha = widen(tl.load(ptr))
        return alpha if DYNAMIC else _checked(alpha)
    else:
        UNIT: tl.constexpr = 8 if ALPHAS == "by octet" else 1
        # 64-bit division only per block. passed: channels between the block's first element and this one.
        segment = start // inner
        first = (segment % channels).to(tl.int32)
        left = tl.minimum(inner - (start - segment * inner), BLOCK).to(tl.int32)
        step = tl.minimum(inner, BLOCK).to(tl.int32)
        i = tl.arange(0, BLOCK // UNIT) * UNIT
        passed = tl.where(i < left, 0, 1 + (i - left) // step)
        alpha = widen(tl.load(ptr + (first + passed) % channels))
        alpha = alpha if DYNAMIC else _checked(alpha)
        return alpha if UNIT == 1 else tl.reshape(tl.broadcast_to(alpha[:, None], [BLOCK // UNIT, UNIT]), [BLOCK])


# ----------------------------------------------------------------------------------------- forward


@triton.jit
def _forward_block(
    x_ptr, alpha_ptr, y_ptr, mask_ptr, codes_ptr, start, count, channels, inner,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, ROUNDING: tl.constexpr, MASK: tl.constexpr,
    ALPHAS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    x = load(x_ptr, start, count, BLOCK, TAIL)
    alpha = load_alpha(alpha_ptr, start, channels, inner, ALPHAS, BLOCK)
    code = code_of(x, alpha, DTYPE, BITS, ROUNDING)
    if y_ptr is not None:
        store(y_ptr, code * alpha, start, count, TAIL)
    if mask_ptr is not None:
        state = state_of(x, alpha, DTYPE, BITS)
        if MASK == "state":
            store_packed(mask_ptr, state, start, count, 2, TAIL)
        elif MASK == "near":
            store_packed(mask_ptr, near_of(x, alpha, DTYPE, BITS).to(tl.int32), start, count, 1, TAIL)
        elif MASK == "inside":
            store_packed(mask_ptr, (state == 1).to(tl.int32), start, count, 1, TAIL)
        else:
            store_packed(mask_ptr, (state != 0).to(tl.int32), start, count, 1, TAIL)
    if codes_ptr is not None:
        store_packed(codes_ptr, tl.minimum(code, 2.0**BITS - 1).to(tl.int32), start, count, CODE_WIDTH, TAIL)


@triton.jit
def qrelu_forward_kernel(
    x_ptr, alpha_ptr, y_ptr, mask_ptr, codes_ptr, count, channels, inner,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, ROUNDING: tl.constexpr, MASK: tl.constexpr,
    ALPHAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes y, which may be x, mask bits of kind MASK, and codes, unless None."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= count:
        _forward_block(x_ptr, alpha_ptr, y_ptr, mask_ptr, codes_ptr, start, count, channels, inner,
                       BITS, CODE_WIDTH, ROUNDING, MASK, ALPHAS, BLOCK, TAIL=False)  # fmt: skip
    else:
        _forward_block(x_ptr, alpha_ptr, y_ptr, mask_ptr, codes_ptr, start, count, channels, inner,
                       BITS, CODE_WIDTH, ROUNDING, MASK, ALPHAS, BLOCK, TAIL=True)  # fmt: skip


@triton.jit
def _dequantize_block(
    codes_ptr, alpha_ptr, y_ptr, start, count, channels, inner,
    ZERO: tl.constexpr, CODE_WIDTH: tl.constexpr, ALPHAS: tl.constexpr, DYNAMIC: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    k = load_packed(codes_ptr, start, count, CODE_WIDTH, BLOCK, TAIL) - ZERO
    alpha = load_alpha(alpha_ptr, start, channels, inner, ALPHAS, BLOCK, DYNAMIC)
    WIDE: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    store(y_ptr, k.to(WIDE) * alpha.to(WIDE), start, count, TAIL)


@triton.jit
def dequantize_kernel(
    codes_ptr, alpha_ptr, y_ptr, count, channels, inner,
    ZERO: tl.constexpr, CODE_WIDTH: tl.constexpr, ALPHAS: tl.constexpr, DYNAMIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes to y = L[c - ZERO]. DYNAMIC: each `inner` elements have an alpha, and any value of it is legal."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= count:
        _dequantize_block(codes_ptr, alpha_ptr, y_ptr, start, count, channels, inner,
                          ZERO, CODE_WIDTH, ALPHAS, DYNAMIC, BLOCK, TAIL=False)  # fmt: skip
    else:
        _dequantize_block(codes_ptr, alpha_ptr, y_ptr, start, count, channels, inner,
                          ZERO, CODE_WIDTH, ALPHAS, DYNAMIC, BLOCK, TAIL=True)  # fmt: skip


# ---------------------------------------------------------------------------------------- backward


@triton.jit
def _times(dy, factor):
    """dy * factor, a select where factor is 0: inf * 0 must not occur."""
    return tl.where(factor == 0, 0.0, dy * factor)


@triton.jit
def _slope_and_factor(
    dy, x, alpha, saved, code,
    DTYPE: tl.constexpr, BITS: tl.constexpr, GPRIME: tl.constexpr, NEEDS: tl.constexpr, ROUNDING: tl.constexpr,
    MASK: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """g'(u), 1 for NaN, and A, unless RULE is None. saved: mask bits of kind MASK."""
    q: tl.constexpr = 2**BITS - 1
    half = tl.full(dy.shape, 0.5, dy.dtype)
    state, u = saved, half
    if x is not None:
        state = state_of(x, alpha, DTYPE, BITS)
        code = code_of(x, alpha, DTYPE, BITS, ROUNDING)
        code = tl.where(x == x, code, q)
        u = divide(x, alpha)
        # x > 0 stays u > 0 if the quotient underflows.
        tiny: tl.constexpr = 2.2250738585072014e-308 if dy.dtype == tl.float64 else 1.1754943508222875e-38
        u = tl.where((x > 0) & (u < tiny), tiny, u)
    if NEEDS == "x":
        g = tl.where(u == u, GPRIME(u, q), 1.0)
    elif NEEDS == "x and rounding":
        g = tl.where(u == u, GPRIME(u, q, ROUNDING), 1.0)
    elif NEEDS == "codes":
        g = GPRIME(code.to(dy.dtype), q)
    elif NEEDS == "nothing":
        g = GPRIME(half, q)
    else:
        # g' depends on the bit alone: any u with that bit will do.
        if MASK == "positive" or MASK == "inside" or MASK == "near":
            bit = saved != 0
        elif MASK == "nothing" and x is None:
            bit = code != 0
        elif NEEDS == "inside":
            bit = state == 1
        elif NEEDS == "near":
            bit = near_of(x, alpha, DTYPE, BITS)
        else:
            bit = state != 0
        g = GPRIME(tl.where(bit, half, -1.0), q)
    if RULE is None:
        return g, g
    else:
        return g, RULE(state, code, u, g, q).to(dy.dtype)


@triton.jit
def _backward_block(
    dy_ptr, x_ptr, alpha_ptr, mask_ptr, codes_ptr, dx_ptr, start, count, channels, inner,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, GPRIME: tl.constexpr, NEEDS: tl.constexpr, ROUNDING: tl.constexpr,
    MASK: tl.constexpr, RULE: tl.constexpr, ALPHAS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Writes dx unless None; returns the terms of dalpha."""
    dy = load(dy_ptr, start, count, BLOCK, TAIL)
    x, alpha, saved, code = None, None, None, None
    if x_ptr is not None:
        x = load(x_ptr, start, count, BLOCK, TAIL)
        alpha = load_alpha(alpha_ptr, start, channels, inner, ALPHAS, BLOCK)
    if mask_ptr is not None:
        saved = load_packed(mask_ptr, start, count, 2 if MASK == "state" else 1, BLOCK, TAIL)
    if codes_ptr is not None:
        code = load_packed(codes_ptr, start, count, CODE_WIDTH, BLOCK, TAIL)
    g, factor = _slope_and_factor(dy, x, alpha, saved, code,
                                  dy_ptr.dtype.element_ty, BITS, GPRIME, NEEDS, ROUNDING, MASK, RULE)  # fmt: skip
    if dx_ptr is not None:
        store(dx_ptr, _times(dy, g), start, count, TAIL)
    return _times(dy, factor)


@triton.jit
def qrelu_backward_kernel(
    dy_ptr, x_ptr, alpha_ptr, mask_ptr, codes_ptr, dx_ptr, partial_ptr, count, channels, inner,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, GPRIME: tl.constexpr, NEEDS: tl.constexpr, ROUNDING: tl.constexpr,
    MASK: tl.constexpr, RULE: tl.constexpr, ALPHAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes dx, and one partial sum of dalpha per program, unless None."""
    total = tl.zeros([BLOCK], dtype=tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, count, tl.num_programs(0).to(tl.int64) * BLOCK):
        if start + BLOCK <= count:
            terms = _backward_block(dy_ptr, x_ptr, alpha_ptr, mask_ptr, codes_ptr, dx_ptr, start, count, channels,
                                    inner, BITS, CODE_WIDTH, GPRIME, NEEDS, ROUNDING, MASK, RULE, ALPHAS, BLOCK,
                                    TAIL=False)  # fmt: skip
        else:
            terms = _backward_block(dy_ptr, x_ptr, alpha_ptr, mask_ptr, codes_ptr, dx_ptr, start, count, channels,
                                    inner, BITS, CODE_WIDTH, GPRIME, NEEDS, ROUNDING, MASK, RULE, ALPHAS, BLOCK,
                                    TAIL=True)  # fmt: skip
        if partial_ptr is not None:
            total += terms
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _backward_from_slopes_block(
    dy_ptr, codes_ptr, slopes, dx_ptr, start, count, CODE_WIDTH: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr
):
    dy = load(dy_ptr, start, count, BLOCK, TAIL)
    code = load_packed(codes_ptr, start, count, CODE_WIDTH, BLOCK, TAIL)
    store(dx_ptr, _times(dy, tl.gather(slopes, code, 0)), start, count, TAIL)


@triton.jit
def backward_from_slopes_kernel(
    dy_ptr, codes_ptr, slopes_ptr, dx_ptr, count, BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """dy to dx = dy * slopes[code]."""
    slopes = tl.load(slopes_ptr + tl.arange(0, 2**BITS))
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= count:
        _backward_from_slopes_block(dy_ptr, codes_ptr, slopes, dx_ptr, start, count, CODE_WIDTH, BLOCK, TAIL=False)
    else:
        _backward_from_slopes_block(dy_ptr, codes_ptr, slopes, dx_ptr, start, count, CODE_WIDTH, BLOCK, TAIL=True)


@triton.jit
def load_rows(ptr, first, inside, columns, COLUMNS: tl.constexpr):
    """A tile of numbers, widened: row r has `columns` numbers from first[r] on if inside[r]; the rest is 0."""
    column = tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < columns)[None, :]
    return widen(tl.load(ptr + first[:, None] + column[None, :], mask=mask, other=0))


@triton.jit
def store_rows(ptr, values, first, inside, columns):
    """The same way back."""
    column = tl.arange(0, values.shape[1])
    mask = inside[:, None] & (column < columns)[None, :]
    tl.store(ptr + first[:, None] + column[None, :], narrow(values, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_rows_packed(ptr, first, inside, columns, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, OCTETS: tl.constexpr):
    """The same for packed values, int32. OCTETS: `first` and `columns` are multiples of 8; each byte is read once."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    if OCTETS:
        byte = tl.arange(0, COLUMNS // PER_BYTE)
        mask = inside[:, None] & (byte * PER_BYTE < columns)[None, :]
        packed = tl.load(ptr + (first // PER_BYTE)[:, None] + byte[None, :], mask=mask, other=0)
        return _unpacked(packed, WIDTH)
    else:
        column = tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < columns)[None, :]
        at = first[:, None] + column[None, :]
        packed = tl.load(ptr + at // PER_BYTE, mask=mask, other=0).to(tl.int32)
        return (packed >> (at % PER_BYTE * WIDTH).to(tl.int32)) & (2**WIDTH - 1)


@triton.jit
def grad_alpha_channels_kernel(
    dy_ptr, x_ptr, alpha_ptr, mask_ptr, codes_ptr, partial_ptr, outer, channels, inner,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, GPRIME: tl.constexpr, NEEDS: tl.constexpr, ROUNDING: tl.constexpr,
    MASK: tl.constexpr, RULE: tl.constexpr, INNERMOST: tl.constexpr, OCTETS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial[slice, channel]: sums of the terms of dalpha, with the tensor viewed as [outer, channels, inner].

    A program has one channel and tiles of ROWS outer by COLUMNS inner indices, or COLUMNS channels if channels are the
    innermost dimension. A slice is every n-th tile, for n slices. OCTETS: consecutive elements of a channel, or rows of
    channels, are multiples of 8.
    """
    if OCTETS and INNERMOST:
        channels = channels // 8 * 8  # a hint for the compiler
    elif OCTETS:
        inner = inner // 8 * 8
    block, slice = tl.program_id(0), tl.program_id(1)
    alpha = None
    if INNERMOST:
        width = channels
        start = block.to(tl.int64) * COLUMNS
        across = 1
        if x_ptr is not None:
            channel = block * COLUMNS + tl.arange(0, COLUMNS)
            alpha = _checked(tl.load(alpha_ptr + channel, mask=channel < channels, other=1))[None, :]
    else:
        width = inner
        start = block.to(tl.int64) * inner
        across = tl.cdiv(inner, COLUMNS)
        if x_ptr is not None:
            alpha = _checked(tl.load(alpha_ptr + block))
    stride = channels.to(tl.int64) * inner
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32)
    # Tiles are counted across first. With fewer than 2**31 slices no division is of 64 bits.
    some = tl.minimum(across, 2**30).to(tl.int32)
    down, right = tl.num_programs(1) // some, tl.num_programs(1) % some
    tile, column = (slice // some).to(tl.int64), (slice % some).to(tl.int64) * COLUMNS
    while tile * ROWS < outer:
        row = tile * ROWS + tl.arange(0, ROWS)
        first, inside = row * stride + (start + column), row < outer
        columns = width - column - (start if INNERMOST else 0)
        dy = load_rows(dy_ptr, first, inside, columns, COLUMNS)
        x, saved, code = None, None, None
        if x_ptr is not None:
            x = load_rows(x_ptr, first, inside, columns, COLUMNS)
        if mask_ptr is not None:
            saved = _load_rows_packed(mask_ptr, first, inside, columns, 2 if MASK == "state" else 1, COLUMNS, OCTETS)
        if codes_ptr is not None:
            code = _load_rows_packed(codes_ptr, first, inside, columns, CODE_WIDTH, COLUMNS, OCTETS)
        _, factor = _slope_and_factor(dy, x, alpha, saved, code,
                                      dy_ptr.dtype.element_ty, BITS, GPRIME, NEEDS, ROUNDING, MASK, RULE)  # fmt: skip
        total += _times(dy, factor)
        tile += down
        column += right * COLUMNS
        if column >= width:
            column -= across * COLUMNS
            tile += 1
    to = partial_ptr + slice.to(tl.int64) * channels
    if INNERMOST:
        channel = block * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(to + channel, tl.sum(total, 0), mask=channel < channels)
    else:
        tl.store(to + block, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def sum_slices_kernel(partial_ptr, sums_ptr, scale, slices, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums[channel] = scale * the sum over slices of partial[slice, channel], in a fixed order."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=sums_ptr.dtype.element_ty)
    for first in range(0, slices, ROWS):
        row = first + tl.arange(0, ROWS)
        within = (row < slices)[:, None] & (channel < channels)[None, :]
        total += tl.load(partial_ptr + row[:, None].to(tl.int64) * channels + channel[None, :], mask=within, other=0)
    tl.store(sums_ptr + channel, (tl.sum(total, 0) * scale).to(total.dtype), mask=channel < channels)
