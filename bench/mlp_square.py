"""A Linear with ReLU squared at its end, and the derivative of both, by Triton's matrix products: a peer for bench.mlp.

The products are those of coarsegrad.triton, so that what differs is what is kept."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from coarsegrad.triton.mlp import tuned
from coarsegrad.triton.mlp_kernels import bias_of, matrix, product, store_matrix, tile
from coarsegrad.triton.qrelu import OPTIONS, on_device
from coarsegrad.triton.staircase import narrow, widen


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, z_ptr, rows, inputs, hidden, bucket,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = relu(x @ weight.T + bias), z = y * y."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    m, n, _ = tile(rows, hidden, ROWS, COLUMNS, GROUP)
    acc = product(x_ptr, weight_ptr, m, n, rows, inputs, hidden, STEP, TURNED=True) + bias_of(bias_ptr, n, hidden)
    y = widen(narrow(tl.where(acc > 0, acc, 0.0), DTYPE))
    store_matrix(y_ptr, y, m, n, rows, hidden)
    store_matrix(z_ptr, y * y, m, n, rows, hidden)


@triton.jit
def _backward_kernel(
    grad_out_ptr, weight_ptr, y_ptr, grad_h_ptr, rows, outputs, hidden, bucket,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """grad_h = 2 * y * (grad_out @ weight)."""
    m, n, _ = tile(rows, hidden, ROWS, COLUMNS, GROUP)
    acc = product(grad_out_ptr, weight_ptr, m, n, rows, outputs, hidden, STEP, TURNED=False)
    store_matrix(grad_h_ptr, 2 * widen(matrix(y_ptr, m, n, rows, hidden)) * acc, m, n, rows, hidden)


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
