"""The kernel of a norm and the signed staircase after it. Conventions are those of kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import load_rows, store_rows
from .signed_kernels import alpha_bits, butterfly, magnitude_bits, quantize_rows
from .staircase import narrow, widen


@triton.jit
def _mean(terms, length, FOLDS: tl.constexpr):
    """The sum over each row of a tile of 2**FOLDS columns over the length, [rows, 1]. The upper half of the columns is
    added to the lower one until one is left."""
    v = terms
    for _ in tl.static_range(FOLDS):
        low, high = tl.split(tl.permute(tl.reshape(v, [v.shape[0], 2, v.shape[1] // 2]), [0, 2, 1]))
        v = low + high
    count = tl.full(v.shape, length, v.dtype)
    if v.dtype == tl.float64:
        return v / count
    else:
        return tl.div_rn(v, count)


@triton.jit
def _inverse(v):
    """1 / sqrt(v), each rounded once."""
    if v.dtype == tl.float64:
        return 1.0 / tl.sqrt(v)
    else:
        return tl.div_rn(tl.full(v.shape, 1.0, tl.float32), tl.sqrt_rn(v))


@triton.jit
def _centre(x_ptr, mean, first, inside, start, length, CENTRED: tl.constexpr, COLUMNS: tl.constexpr):
    """x less the mean in columns [start, start + COLUMNS), and 0 past the end of the row."""
    x = load_rows(x_ptr, first + start, inside, length - start, COLUMNS)
    if CENTRED:
        x = tl.where((start + tl.arange(0, COLUMNS) < length)[None, :], x - mean, 0.0)
    return x


@triton.jit
def _finished(
    centre, inverse, weight_ptr, bias_ptr, out_ptr, first, inside, start, length,
    SHIFTED: tl.constexpr, TWICE: tl.constexpr, STAGES: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The norm's output, stored unless out_ptr is None; rotated if there are stages; widened."""
    column = start + tl.arange(0, centre.shape[1])
    n = centre * inverse
    if TWICE:
        n = widen(narrow(n, DTYPE))
    if weight_ptr is not None:
        weight = widen(tl.load(weight_ptr + column, mask=column < length, other=0)).to(n.dtype)
        if SHIFTED:
            weight = weight + 1.0
        n = n * weight[None, :]
    if bias_ptr is not None:
        n = n + widen(tl.load(bias_ptr + column, mask=column < length, other=0)).to(n.dtype)[None, :]
    n = narrow(n, DTYPE)
    if out_ptr is not None:
        store_rows(out_ptr, widen(n), first + start, inside, length - start)
    v = widen(n)
    if STAGES > 0:
        flat = tl.reshape(v, [v.shape[0] * v.shape[1]])
        for stage in tl.static_range(STAGES):
            flat = butterfly(flat, 2**stage)
        v = widen(narrow(tl.reshape(flat, [v.shape[0], v.shape[1]]) * SCALE, DTYPE))
    return v


@triton.jit
def _alphas(bits, dtype: tl.constexpr):
    return (bits << 16).to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def _quantize_groups(
    v, y_ptr, alpha_ptr, codes_ptr, row, first, inside, start, length,
    BITS: tl.constexpr, GROUP: tl.constexpr, CODE_WIDTH: tl.constexpr,
):  # fmt: skip
    """The staircase of a tile of whole groups. What is past the end of a row is in groups of its own."""
    ROWS: tl.constexpr = v.shape[0]
    GROUPS: tl.constexpr = v.shape[1] // GROUP
    bits = alpha_bits(tl.max(tl.reshape(magnitude_bits(v), [ROWS, GROUPS, GROUP]), 2), BITS)
    at = start // GROUP + tl.arange(0, GROUPS)
    mask = inside[:, None] & (at < length // GROUP)[None, :]
    place = (row * (length // GROUP))[:, None] + at[None, :]
    tl.store(alpha_ptr + place, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    alpha = tl.broadcast_to(_alphas(bits, v.dtype)[:, :, None], [ROWS, GROUPS, GROUP])
    alpha = tl.reshape(alpha, [ROWS, GROUPS * GROUP])
    quantize_rows(v, alpha, y_ptr, codes_ptr, first + start, inside, length - start, BITS, CODE_WIDTH)


@triton.jit
def norm_qsigned_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, y_ptr, alpha_ptr, codes_ptr, mean_ptr, inverse_ptr, rows, length,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, TWICE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr, SCALE: tl.constexpr, CODE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLDS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Writes the norms of ROWS rows of `length` elements unless out_ptr is None; if BITS > 0 their staircases, with
    alphas, and codes unless None; means unless None, else it is an RMSNorm; and inverse deviations.

    COLUMNS is 2**FOLDS. GROUP: a power of two up to COLUMNS, or 0 for a row. STAGES: of a rotation of at most COLUMNS
    elements. LONG: a row may have more than COLUMNS elements, which are then the lanes of its sums; it is read again
    from a cache.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    CENTRED: tl.constexpr = mean_ptr is not None
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first, inside = row * length, row < rows

    x = load_rows(x_ptr, first, inside, length, COLUMNS)
    mean = tl.zeros([ROWS, 1], x.dtype)
    if CENTRED:
        sums = x + 0.0
        if LONG:
            for start in range(COLUMNS, length, COLUMNS):
                sums += load_rows(x_ptr, first + start, inside, length - start, COLUMNS)
        mean = _mean(sums, length, FOLDS)
        tl.store(mean_ptr + row[:, None], mean, mask=inside[:, None])
        x = tl.where((tl.arange(0, COLUMNS) < length)[None, :], x - mean, 0.0)
    squares = x * x
    if LONG:
        for start in range(COLUMNS, length, COLUMNS):
            more = _centre(x_ptr, mean, first, inside, start, length, CENTRED, COLUMNS)
            squares += more * more
    inverse = _inverse(_mean(squares, length, FOLDS) + EPS)
    tl.store(inverse_ptr + row[:, None], inverse, mask=inside[:, None])

    v = _finished(x, inverse, weight_ptr, bias_ptr, out_ptr, first, inside, 0, length,
                  SHIFTED, TWICE, STAGES, SCALE, DTYPE)  # fmt: skip
    largest = magnitude_bits(v)
    if BITS > 0 and GROUP > 0:
        _quantize_groups(v, y_ptr, alpha_ptr, codes_ptr, row, first, inside, 0, length, BITS, GROUP, CODE_WIDTH)
    if LONG:
        for start in range(COLUMNS, length, COLUMNS):
            more = _centre(x_ptr, mean, first, inside, start, length, CENTRED, COLUMNS)
            more = _finished(more, inverse, weight_ptr, bias_ptr, out_ptr, first, inside, start, length,
                             SHIFTED, TWICE, STAGES, SCALE, DTYPE)  # fmt: skip
            if BITS > 0 and GROUP > 0:
                _quantize_groups(more, y_ptr, alpha_ptr, codes_ptr, row, first, inside, start, length,
                                 BITS, GROUP, CODE_WIDTH)  # fmt: skip
            largest = tl.maximum(largest, magnitude_bits(more))
    if BITS > 0 and GROUP == 0:
        bits = alpha_bits(tl.max(largest, 1), BITS)
        tl.store(alpha_ptr + row, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
        alpha = _alphas(bits, v.dtype)[:, None]
        quantize_rows(v, alpha, y_ptr, codes_ptr, first, inside, length, BITS, CODE_WIDTH)
        if LONG:
            for start in range(COLUMNS, length, COLUMNS):
                more = _centre(x_ptr, mean, first, inside, start, length, CENTRED, COLUMNS)
                more = _finished(more, inverse, weight_ptr, bias_ptr, None, first, inside, start, length,
                                 SHIFTED, TWICE, STAGES, SCALE, DTYPE)  # fmt: skip
                quantize_rows(more, alpha, y_ptr, codes_ptr, first + start, inside, length - start, BITS, CODE_WIDTH)
