"""A Linear with ReLU squared at its end, and the derivative of both, by Triton's matrix products: a peer for bench.mlp.

The products are those of coarsegrad.triton, so that what differs is what is kept."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from coarsegrad.triton.mlp import tuned
from coarsegrad.triton.mlp_kernels import _matrix, _tile
from coarsegrad.triton.qrelu import OPTIONS, on_device
from coarsegrad.triton.staircase import narrow, widen


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, z_ptr, rows, inputs, hidden, bucket,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = relu(x @ weight.T + bias), z = y * y."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    top, left = _tile(rows, hidden, ROWS, COLUMNS, GROUP)
    m, n = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, inputs, STEP):
        k = first + tl.arange(0, STEP)
        a, b = _matrix(x_ptr, m, k, rows, inputs), _matrix(weight_ptr, n, k, hidden, inputs)
        acc = tl.dot(a, tl.trans(b), acc)
    acc += widen(tl.load(bias_ptr + n, mask=n < hidden, other=0))[None, :]
    y = widen(narrow(tl.where(acc > 0, acc, 0.0), DTYPE))
    at, inside = m.to(tl.int64)[:, None] * hidden + n[None, :], (m < rows)[:, None] & (n < hidden)[None, :]
    tl.store(y_ptr + at, narrow(y, DTYPE), mask=inside)
    tl.store(z_ptr + at, narrow(y * y, DTYPE), mask=inside)


@triton.jit
def _backward_kernel(
    grad_out_ptr, weight_ptr, y_ptr, grad_h_ptr, rows, outputs, hidden, bucket,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """grad_h = 2 * y * (grad_out @ weight)."""
    DTYPE: tl.constexpr = grad_h_ptr.dtype.element_ty
    top, left = _tile(rows, hidden, ROWS, COLUMNS, GROUP)
    m, n = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, outputs, STEP):
        k = first + tl.arange(0, STEP)
        a, b = _matrix(grad_out_ptr, m, k, rows, outputs), _matrix(weight_ptr, k, n, outputs, hidden)
        acc = tl.dot(a, b, acc)
    acc = 2 * widen(_matrix(y_ptr, m, n, rows, hidden)) * acc
    at, inside = m.to(tl.int64)[:, None] * hidden + n[None, :], (m < rows)[:, None] & (n < hidden)[None, :]
    tl.store(grad_h_ptr + at, narrow(acc, DTYPE), mask=inside)


_forward, _backward = tuned(_forward_kernel, "inputs", "hidden"), tuned(_backward_kernel, "outputs", "hidden")


def _launch(kernel, tensors: tuple[Tensor, ...], rows: int, inner: int, hidden: int) -> None:
    def grid(tile: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(hidden, tile["COLUMNS"]),)

    with on_device(tensors[0]):
        kernel[grid](*tensors, rows, inner, hidden, triton.next_power_of_2(rows),
                     enable_fp_fusion=OPTIONS["enable_fp_fusion"])  # fmt: skip


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(relu(h), its square), h = x @ weight.T + bias."""
    y, z = (x.new_empty(x.size(0), weight.size(0)) for _ in range(2))
    _launch(_forward, (x.contiguous(), weight.contiguous(), bias, y, z), x.size(0), x.size(1), weight.size(0))
    return y, z


def backward(grad_out: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """The gradient of h, from y = relu(h) and the Linear after the square."""
    grad_h = y.new_empty(y.shape)
    tensors = (grad_out.contiguous(), weight.contiguous(), y, grad_h)
    _launch(_backward, tensors, y.size(0), grad_out.size(1), y.size(1))
    return grad_h
