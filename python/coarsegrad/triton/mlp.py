"""The ops of `coarsegrad.qrelu_mlp` in Triton: checks, allocation, launches. Signatures are those of `_mlp.py`, whose
kernels serve what these do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .. import _mlp
from .._checks import check_packed
from .._types import CODE_WIDTH, MASK_WIDTH, MaskKind, Rounding
from . import mlp_kernels
from .qrelu import OPTIONS, new_packed, on_device, prepared

# Tiles to choose from: rows, columns, step of the inner dimension, warps, stages of the pipeline. The fastest one is
# measured once for each shape, for rows up to the next power of two.
TILES = ((128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4))
# Consecutive programs share columns, for so many tiles of rows.
_GROUP = 8
_DTYPES = (torch.float16, torch.bfloat16)


def _config(rows: int, columns: int, step: int, warps: int, stages: int) -> triton.Config:
    sizes = {"ROWS": rows, "COLUMNS": columns, "STEP": step, "GROUP": _GROUP}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


def tuned(kernel, *sizes: str):
    """The kernel with the fastest of TILES; nothing is measured in the interpreter."""
    tiles = TILES[-1:] if triton.knobs.runtime.interpret else TILES
    return triton.autotune([_config(*tile) for tile in tiles], [*sizes, "bucket"], cache_results=True)(kernel)


_KERNELS = {
    "to_codes": tuned(mlp_kernels.linear_to_codes_kernel, "inputs", "hidden"),
    "from_codes": tuned(mlp_kernels.linear_from_codes_kernel, "hidden", "outputs"),
    "grad_input": tuned(mlp_kernels.grad_input_kernel, "outputs", "hidden"),
    "grad_weight": tuned(mlp_kernels.grad_weight_kernel, "outputs", "hidden"),
}


def _launch(kernel: str, tensors: tuple, out: tuple[int, int], rows: int, *sizes: int, **constants) -> None:
    """out: the shape that tiles cover."""
    with on_device(tensors[0]):
        _KERNELS[kernel][lambda tile: (triton.cdiv(out[0], tile["ROWS"]) * triton.cdiv(out[1], tile["COLUMNS"]),)](
            *tensors, rows, *sizes, triton.next_power_of_2(rows), **constants,
            enable_fp_fusion=OPTIONS["enable_fp_fusion"],
        )  # fmt: skip


def _serves(dtype: torch.dtype, hidden: int) -> bool:
    """Whole bytes of mask in a row, and a product in float32 of numbers that tensor cores take."""
    return dtype in _DTYPES and hidden % 8 == 0


def linear_to_codes(
    x: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor, bits: int, rounding: int, mask: int,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """h: receives what the codes are of, [rows, hidden]; for tests."""
    (rows, inputs), hidden = x.shape, weight.size(0)
    if not (_serves(x.dtype, hidden) and x.numel() and hidden) or mask == MaskKind.state:
        return _mlp.linear_to_codes(x, weight, bias, alpha, bits, rounding, mask)
    _mlp.check_linear(x, weight, bias)
    kind, width = MaskKind(mask), CODE_WIDTH[bits]
    codes, packed_mask = (new_packed(x, rows * hidden, w) for w in (width, MASK_WIDTH[kind]))
    nan_rows = x.new_zeros(rows, dtype=torch.float32)
    tensors = (
        x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), prepared(alpha, x.dtype),
        codes, packed_mask, nan_rows, h,
    )  # fmt: skip
    _launch("to_codes", tensors, (rows, hidden), rows, inputs, hidden,
            BITS=bits, CODE_WIDTH=width, ROUNDING=Rounding(rounding).name, MASK=kind.name)  # fmt: skip
    return codes, x.new_empty(0, dtype=torch.uint8) if packed_mask is None else packed_mask, nan_rows


def _padded(tensors: Sequence[Tensor], count: int = 2) -> list[Tensor | None]:
    """With None to as many as a kernel takes, for two staircases."""
    return [*tensors, *[None] * (count - len(tensors))]


def _factors(codes: Sequence[Tensor], alphas: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor | None]:
    return _padded([t for each, alpha in zip(codes, alphas) for t in (each, prepared(alpha, dtype))], 4)


def linear_from_codes(
    codes: Sequence[Tensor], nan_rows: Tensor, alphas: Sequence[Tensor], bits: int, squared: bool, weight: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    rows, (outputs, hidden) = nan_rows.numel(), weight.shape
    if not (_serves(weight.dtype, hidden) and weight.numel() and rows):
        return _mlp.linear_from_codes(codes, nan_rows, alphas, bits, squared, weight, bias)
    _mlp.check_codes(codes, bits, rows, hidden, weight.device)
    out = weight.new_empty(rows, outputs)
    bias = None if bias is None else bias.contiguous()
    tensors = (*_factors(codes, alphas, weight.dtype), nan_rows, weight.contiguous(), bias, out)
    _launch("from_codes", tensors, (rows, outputs), rows, hidden, outputs, CODE_WIDTH=CODE_WIDTH[bits], SQUARED=squared)
    return out


def linear_from_codes_grad_input(
    grad_out: Tensor, weight: Tensor, masks: Sequence[Tensor], codes: Sequence[Tensor], alphas: Sequence[Tensor],
    bits: int, squared: bool, ste: int, rounding: int,
) -> list[Tensor]:  # fmt: skip
    (rows, outputs), hidden = grad_out.shape, weight.size(1)
    if not (_serves(weight.dtype, hidden) and weight.numel() and rows):
        return _mlp.linear_from_codes_grad_input(grad_out, weight, masks, codes, alphas, bits, squared, ste, rounding)
    by_codes = _mlp.gates_are_in_codes(masks, ste)
    in_factors = squared or len(alphas) > 1
    if by_codes or in_factors:
        _mlp.check_codes(codes, bits, rows, hidden, grad_out.device)
    for mask in masks:
        check_packed(mask, "mask", rows * hidden, 1, grad_out.device)
    grads = [grad_out.new_empty(rows, hidden) for _ in alphas]
    gates, factors = codes if by_codes else masks, codes if in_factors else ()
    read = (*_padded(gates), *_factors(factors, alphas, weight.dtype))
    tensors = (grad_out.contiguous(), weight.contiguous(), *read, *_padded(grads))
    _launch("grad_input", tensors, (rows, hidden), rows, outputs, hidden,
            GATE_WIDTH=CODE_WIDTH[bits] if by_codes else 1, CODE_WIDTH=CODE_WIDTH[bits])  # fmt: skip
    return grads


def linear_from_codes_grad_weight(
    grad_out: Tensor, codes: Sequence[Tensor], alphas: Sequence[Tensor], bits: int, squared: bool, hidden: int
) -> Tensor:
    rows, outputs = grad_out.shape
    if not (_serves(grad_out.dtype, hidden) and rows and outputs):
        return _mlp.linear_from_codes_grad_weight(grad_out, codes, alphas, bits, squared, hidden)
    _mlp.check_codes(codes, bits, rows, hidden, grad_out.device)
    grad_weight = grad_out.new_empty(outputs, hidden)
    tensors = (grad_out.contiguous(), *_factors(codes, alphas, grad_out.dtype), grad_weight)
    _launch(
        "grad_weight", tensors, (outputs, hidden), rows, outputs, hidden, CODE_WIDTH=CODE_WIDTH[bits], SQUARED=squared
    )
    return grad_weight
