"""The scale of quantized weights as Triton kernels: checks, allocation, launches."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from .._checks import check_weight
from .._torch_internals import suggest_memory_format
from .._types import wide_dtype
from ..reference import WEIGHT_GRIDS
from . import weight_kernels
from .qrelu import BLOCK, OPTIONS, on_device

# The weights of a row that a program has, the scales that it tries at once, and the weights of a tile in the kernels
# that need more registers: to try that many scales, and to find the best of two bits.
_PART, _TRIED, _TILE, _SORTED_TILE = 2**14, 8, 256, 512
# The weights that are sorted at once, with 16 bytes for each, but for a longer row.
_SORTED = 2**24


def weight_scale(weight: Tensor, bits: int, channel_dim: int | None) -> Tensor:
    channel_dim = check_weight(weight, bits, channel_dim)
    by_row = weight.detach() if channel_dim is None else weight.detach().movedim(channel_dim, 0)
    # Rows of any order: that of memory, where it has rows.
    dense = by_row.contiguous(memory_format=suggest_memory_format(by_row))
    rows = 1 if channel_dim is None else by_row.size(0)
    scale = weight.new_zeros(rows, dtype=wide_dtype(weight.dtype))
    if dense.numel():
        length = dense.numel() // rows
        step = max(1, _SORTED // length) if bits == 2 else rows
        with on_device(dense):
            for some, out in zip(dense.as_strided((rows, length), (length, 1)).split(step), scale.split(step)):
                _fill(out, some, bits)
    return scale if channel_dim is not None else scale[0]


def _fill(scale: Tensor, dense: Tensor, bits: int) -> None:
    """Of rows [rows, length]."""
    rows, length = dense.shape
    parts = triton.cdiv(length, _PART)
    grid = rows, parts
    block = min(BLOCK[dense.element_size()], triton.next_power_of_2(length), _PART)
    cut = {"PART": _PART, "BLOCK": block}
    largest = scale.new_zeros(rows, dtype=torch.int64 if dense.dtype == torch.float64 else torch.int32)
    weight_kernels.largest_kernel[grid](dense, largest, length, **cut, **OPTIONS)
    if bits == 2:
        products, squares = _ternary(dense, largest, grid, length, cut)
    else:
        divisors, tried, count = None, (None, None), 1
        if bits > 1:
            divisors = _divisors(bits, scale.device)
            count = len(divisors)
            tried = _zeros(scale, count)
            weight_kernels.search_kernel[(*grid, triton.cdiv(count, _TRIED))](
                dense, largest, divisors, *tried, length, count,
                BITS=bits, TRIED=_TRIED, PART=_PART, BLOCK=min(_TILE, block), **OPTIONS,
            )  # fmt: skip
        products, squares = _zeros(scale, 1)
        weight_kernels.sums_kernel[grid](
            dense, largest, divisors, *tried, products, squares, length, count,
            BITS=bits, COUNT=triton.next_power_of_2(count), **cut, **OPTIONS,
        )  # fmt: skip
    count = products.size(1)
    weight_kernels.scale_kernel[(rows,)](
        largest, products, squares, scale, count, COUNT=triton.next_power_of_2(count), **OPTIONS
    )


@functools.cache
def _divisors(bits: int, device: torch.device) -> Tensor:
    return torch.tensor(WEIGHT_GRIDS[bits][0], dtype=torch.int32, device=device)


def _zeros(scale: Tensor, count: int) -> tuple[Tensor, Tensor]:
    products, squares = scale.new_zeros(2, scale.numel(), count, dtype=torch.int64)
    return products, squares


def _ternary(
    dense: Tensor, largest: Tensor, grid: tuple[int, int], length: int, cut: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """What is best may be any number of the largest magnitudes, so that all are sorted."""
    m = dense.new_empty(grid[0], length, dtype=torch.int32)
    weight_kernels.magnitudes_kernel[grid](dense, largest, m, length, **cut, **OPTIONS)
    m = m.sort(1, descending=True).values
    products, squares = m.new_empty(2, *grid, dtype=torch.int64)
    weight_kernels.ternary_kernel[grid](
        m, m.cumsum(1), products, squares, length, PART=_PART, BLOCK=min(_SORTED_TILE, cut["BLOCK"]), **OPTIONS
    )
    return products, squares
