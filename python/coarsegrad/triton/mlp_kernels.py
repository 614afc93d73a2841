"""Matrix products with the staircase at the end of one and codes at the start of the next: y and its gradient before
the gate are in registers alone.

    linear_to_codes                 codes = staircase(h), h = round(x @ weight.T + bias)
    linear_from_codes               out = y @ weight.T + bias
    linear_from_codes_grad_input    dh = gate ? round(dout @ weight) * dy/dL[codes] : 0
    linear_from_codes_grad_weight   dweight = dout.T @ y

y is L[codes], its square, or the product with that of other codes, which have an alpha of their own.

A program computes a tile of ROWS x COLUMNS, STEP of the inner dimension at a time, with sums in float32. Matrices are
contiguous, codes and masks packed as by the other kernels; a row of hidden features begins with a byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import _checked, _unpacked
from .staircase import _IN_THE_INTERPRETER, code_of, narrow, near_of, state_of, widen


@triton.jit
def tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(rows, columns, first column) of a program's tile. Consecutive programs go down GROUP tiles before they go to the
    right, so that what they read stays in the L2 cache."""
    down, right = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    program, group = tl.program_id(0), GROUP * right
    first = program // group * GROUP
    size = tl.minimum(down - first, GROUP)
    top, left = (first + program % group % size) * ROWS, program % group // size * COLUMNS
    return top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS), left


@triton.jit
def matrix(ptr, i, j, height, width):
    """ptr[i, j] of a [height, width] matrix, 0 outside of it. For tl.dot: the interpreter's arithmetic in bfloat16 is
    wrong, and that of its products in float32 is what a GPU's is."""
    inside = (i < height)[:, None] & (j < width)[None, :]
    v = tl.load(ptr + i.to(tl.int64)[:, None] * width + j[None, :], mask=inside, other=0)
    return widen(v) if _IN_THE_INTERPRETER else v


@triton.jit
def store_matrix(ptr, values, i, j, height, width):
    """The inverse, rounded to ptr's dtype."""
    inside = (i < height)[:, None] & (j < width)[None, :]
    at = i.to(tl.int64)[:, None] * width + j[None, :]
    tl.store(ptr + at, narrow(values, ptr.dtype.element_ty), mask=inside)


@triton.jit
def product(a_ptr, b_ptr, m, n, height, inner, width, STEP: tl.constexpr, TURNED: tl.constexpr):
    """[m, n] of a @ b, or of a @ b.T if TURNED, in float32. a: [height, inner]."""
    acc = tl.zeros([m.shape[0], n.shape[0]], dtype=tl.float32)
    for first in range(0, inner, STEP):
        k = first + tl.arange(0, STEP)
        a = matrix(a_ptr, m, k, height, inner)
        if TURNED:
            acc = tl.dot(a, tl.trans(matrix(b_ptr, n, k, width, inner)), acc)
        else:
            acc = tl.dot(a, matrix(b_ptr, k, n, inner, width), acc)
    return acc


@triton.jit
def bias_of(ptr, n, width):
    return widen(tl.load(ptr + n, mask=n < width, other=0))[None, :]


@triton.jit
def _levels(
    codes_ptr, alpha, i, first, height, width,
    WIDTH: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """L[c] of the codes [i, first : first + COUNT] of a [height, width] matrix of them, 0 outside of it."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    at = first // PER_BYTE + tl.arange(0, COUNT // PER_BYTE)
    inside = (i < height)[:, None] & (at < width // PER_BYTE)[None, :]
    packed = tl.load(codes_ptr + i.to(tl.int64)[:, None] * (width // PER_BYTE) + at[None, :], mask=inside, other=0)
    return narrow(_unpacked(packed, WIDTH).to(tl.float32) * alpha, DTYPE)


@triton.jit
def alpha_of(ptr):
    """Checked and wide; 1, which is not used, without a second staircase."""
    alpha = 1.0
    if ptr is not None:
        alpha = _checked(widen(tl.load(ptr)))
    return alpha


@triton.jit
def _read(
    codes_ptr, alpha, other_ptr, other_alpha, i, first, height, width,
    WIDTH: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """y, of codes as those of `_levels`."""
    y = _levels(codes_ptr, alpha, i, first, height, width, WIDTH, COUNT, DTYPE)
    if SQUARED:
        y = narrow(widen(y) * widen(y), DTYPE)
    if other_ptr is not None:
        other = _levels(other_ptr, other_alpha, i, first, height, width, WIDTH, COUNT, DTYPE)
        y = narrow(widen(y) * widen(other), DTYPE)
    return widen(y) if _IN_THE_INTERPRETER else y


@triton.jit
def _store_packed(ptr, values, i, first, height, width, WIDTH: tl.constexpr):
    """Packs a tile of int32 values below 2**WIDTH."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    COUNT: tl.constexpr = values.shape[1] // PER_BYTE
    if PER_BYTE > 1:
        shifts = tl.arange(0, PER_BYTE) * WIDTH
        values = tl.sum(tl.reshape(values, [values.shape[0], COUNT, PER_BYTE]) << shifts[None, None, :], 2)
    at = first // PER_BYTE + tl.arange(0, COUNT)
    inside = (i < height)[:, None] & (at < width // PER_BYTE)[None, :]
    tl.store(ptr + i.to(tl.int64)[:, None] * (width // PER_BYTE) + at[None, :], values.to(tl.uint8), mask=inside)


@triton.jit
def linear_to_codes_kernel(
    x_ptr, weight_ptr, bias_ptr, alpha_ptr, codes_ptr, mask_ptr, nan_rows_ptr, h_ptr,
    rows, inputs, hidden, bucket,
    BITS: tl.constexpr, CODE_WIDTH: tl.constexpr, ROUNDING: tl.constexpr, MASK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x: [rows, inputs], weight: [hidden, inputs]. nan_rows: NaN where a row of h has one; else it is left. h: None, or
    receives what the codes are of."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    m, n, left = tile(rows, hidden, ROWS, COLUMNS, GROUP)
    acc = product(x_ptr, weight_ptr, m, n, rows, inputs, hidden, STEP, TURNED=True)
    if bias_ptr is not None:
        acc += bias_of(bias_ptr, n, hidden)
    h = widen(narrow(acc, DTYPE))
    if h_ptr is not None:
        store_matrix(h_ptr, h, m, n, rows, hidden)
    inside = (m < rows)[:, None] & (n < hidden)[None, :]
    has_nan = tl.sum((inside & (h != h)).to(tl.int32), 1) > 0
    tl.store(nan_rows_ptr + m, tl.full([ROWS], float("nan"), tl.float32), mask=has_nan)
    alpha = _checked(widen(tl.load(alpha_ptr)))
    code = tl.minimum(code_of(h, alpha, DTYPE, BITS, ROUNDING), 2.0**BITS - 1)
    _store_packed(codes_ptr, code.to(tl.int32), m, left, rows, hidden, CODE_WIDTH)
    if mask_ptr is not None:
        if MASK == "near":
            keep = near_of(h, alpha, DTYPE, BITS).to(tl.int32)
        elif MASK == "inside":
            keep = (state_of(h, alpha, DTYPE, BITS) == 1).to(tl.int32)
        else:
            keep = (state_of(h, alpha, DTYPE, BITS) != 0).to(tl.int32)
        _store_packed(mask_ptr, keep, m, left, rows, hidden, 1)


@triton.jit
def linear_from_codes_kernel(
    codes_ptr, alpha_ptr, other_ptr, other_alpha_ptr, nan_rows_ptr, weight_ptr, bias_ptr, out_ptr,
    rows, hidden, outputs, bucket,
    CODE_WIDTH: tl.constexpr, SQUARED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """codes: [rows, hidden], weight: [outputs, hidden], out: [rows, outputs]. nan_rows is added to its rows."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    m, n, _ = tile(rows, outputs, ROWS, COLUMNS, GROUP)
    alpha, other_alpha = alpha_of(alpha_ptr), alpha_of(other_alpha_ptr)
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, hidden, STEP):
        a = _read(codes_ptr, alpha, other_ptr, other_alpha, m, first, rows, hidden, CODE_WIDTH, STEP, DTYPE, SQUARED)
        b = matrix(weight_ptr, n, first + tl.arange(0, STEP), outputs, hidden)
        acc = tl.dot(a, tl.trans(b), acc)
    acc += tl.load(nan_rows_ptr + m, mask=m < rows, other=0)[:, None]
    if bias_ptr is not None:
        acc += bias_of(bias_ptr, n, outputs)
    store_matrix(out_ptr, acc, m, n, rows, outputs)


@triton.jit
def _store_gated(ptr, gate_ptr, grad, i, first, height, width, GATE_WIDTH: tl.constexpr, COUNT: tl.constexpr):
    if gate_ptr is not None:
        gate = _levels(gate_ptr, 1.0, i, first, height, width, GATE_WIDTH, COUNT, tl.float32)
        grad = tl.where(gate > 0, grad, 0.0)
    store_matrix(ptr, grad, i, first + tl.arange(0, COUNT), height, width)


@triton.jit
def grad_input_kernel(
    grad_out_ptr, weight_ptr, gate_ptr, other_gate_ptr, codes_ptr, alpha_ptr, other_ptr, other_alpha_ptr,
    grad_ptr, other_grad_ptr, rows, outputs, hidden, bucket,
    GATE_WIDTH: tl.constexpr, CODE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """grad_out: [rows, outputs], weight: [outputs, hidden], grad: [rows, hidden]. gate: packed, a mask or codes of
    GATE_WIDTH bits, of which 0 closes; None: all are open. codes: None, or of what is squared before the product, or of
    the factors of a product, of which each has a gradient and a gate."""
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    m, n, left = tile(rows, hidden, ROWS, COLUMNS, GROUP)
    acc = widen(narrow(product(grad_out_ptr, weight_ptr, m, n, rows, outputs, hidden, STEP, TURNED=False), DTYPE))
    grad = acc
    if codes_ptr is not None:
        y = widen(_levels(codes_ptr, alpha_of(alpha_ptr), m, left, rows, hidden, CODE_WIDTH, COLUMNS, DTYPE))
        if other_ptr is None:
            grad = acc * (2 * y)
        else:
            _store_gated(other_grad_ptr, other_gate_ptr, acc * y, m, left, rows, hidden, GATE_WIDTH, COLUMNS)
            alpha = alpha_of(other_alpha_ptr)
            grad = acc * widen(_levels(other_ptr, alpha, m, left, rows, hidden, CODE_WIDTH, COLUMNS, DTYPE))
    _store_gated(grad_ptr, gate_ptr, grad, m, left, rows, hidden, GATE_WIDTH, COLUMNS)


@triton.jit
def grad_weight_kernel(
    grad_out_ptr, codes_ptr, alpha_ptr, other_ptr, other_alpha_ptr, grad_weight_ptr, rows, outputs, hidden, bucket,
    CODE_WIDTH: tl.constexpr, SQUARED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """grad_out: [rows, outputs], codes: [rows, hidden], grad_weight: [outputs, hidden]."""
    DTYPE: tl.constexpr = grad_weight_ptr.dtype.element_ty
    m, n, left = tile(outputs, hidden, ROWS, COLUMNS, GROUP)
    alpha, other_alpha = alpha_of(alpha_ptr), alpha_of(other_alpha_ptr)
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, rows, STEP):
        i = first + tl.arange(0, STEP)
        a = matrix(grad_out_ptr, i, m, rows, outputs)
        b = _read(codes_ptr, alpha, other_ptr, other_alpha, i, left, rows, hidden, CODE_WIDTH, COLUMNS, DTYPE, SQUARED)
        acc = tl.dot(tl.trans(a), b, acc)
    store_matrix(grad_weight_ptr, acc, m, n, outputs, hidden)
