"""The ops of integer layers in Triton: checks, allocation, launches. Signatures are those of the reference."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .._torch_internals import suggest_memory_format
from ..integer import KERNELS, check_conv2d, check_linear
from . import layer_kernels
from .qrelu import OPTIONS, byte_codes, on_device

# The largest tiles: rows, outputs, and weight bytes of a step. The addresses of a convolution's pixels and the sums of
# weights for 8-bit codes leave fewer registers. Smaller layers get smaller tiles, at least of 16, which is what a
# product on tensor cores needs.
_LARGE_TILE, _SMALL_TILE = (128, 64, 64), (64, 64, 32)


def integer_quantize(x: Tensor, alpha: Tensor, bits: int, rounding: int, channel_dim: int | None) -> Tensor:
    dense = x.contiguous(memory_format=suggest_memory_format(x))
    return byte_codes(dense, alpha, bits, rounding, channel_dim)


def integer_dequantize(codes: Tensor, step: float, contiguous: bool) -> Tensor:
    return KERNELS["integer_dequantize"](codes, step, contiguous)  # torch's own kernels are as fast


def integer_linear(
    codes: Tensor, weight: Tensor, bits: int, weight_bits: int, scale: Tensor, offset: Tensor,
    thresholds: Tensor | None, levels: int,
) -> Tensor:  # fmt: skip
    shape = check_linear(codes, weight, bits, weight_bits, scale, offset, thresholds, levels)
    return _linear(codes, shape, weight, bits, weight_bits, scale, offset, thresholds, levels)


def integer_linear_float(
    codes: Tensor, weight: Tensor, bits: int, weight_bits: int, scale: Tensor, offset: Tensor
) -> Tensor:
    shape = check_linear(codes, weight, bits, weight_bits, scale, offset)
    return _linear(codes, shape, weight, bits, weight_bits, scale, offset, None, None)


def integer_conv2d(
    codes: Tensor, weight: Tensor, bits: int, weight_bits: int, scale: Tensor, offset: Tensor,
    thresholds: Tensor | None, levels: int,
    kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    window = kernel_size, stride, padding, dilation, groups
    shape = check_conv2d(codes, weight, bits, weight_bits, scale, offset, window, thresholds, levels)
    return _conv2d(codes, shape, weight, bits, weight_bits, scale, offset, thresholds, levels, window)


def integer_conv2d_float(
    codes: Tensor, weight: Tensor, bits: int, weight_bits: int, scale: Tensor, offset: Tensor,
    kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    window = kernel_size, stride, padding, dilation, groups
    shape = check_conv2d(codes, weight, bits, weight_bits, scale, offset, window)
    return _conv2d(codes, shape, weight, bits, weight_bits, scale, offset, None, None, window)


def _linear(codes: Tensor, shape: list[int], weight: Tensor, bits: int, *layer) -> Tensor:
    out = codes.new_empty(shape, dtype=_dtype(layer[-1]))
    rows = out.numel() // max(1, weight.size(0))
    _launch(codes.contiguous(), weight, bits, *layer, out, rows, 1, codes.size(-1), None)
    return out


def _conv2d(codes: Tensor, shape: list[int], weight: Tensor, bits: int, *layer) -> Tensor:
    *layer, ((kernel_h, kernel_w), stride, padding, dilation, groups) = layer
    images = codes.permute(0, 2, 3, 1).contiguous()
    n, _, out_height, out_width = shape
    out = torch.empty(shape, dtype=_dtype(layer[-1]), device=codes.device, memory_format=torch.channels_last)
    inputs = codes.size(1) // groups
    window = (*images.shape[1:], inputs, out_height, out_width, kernel_w, *stride, *padding, *dilation)
    rows = n * out_height * out_width
    _launch(images, weight, bits, *layer, out, rows, groups, inputs * kernel_h * kernel_w, window)
    return out


def _dtype(levels: int | None) -> torch.dtype:
    return torch.float32 if levels is None else torch.uint8


def _launch(
    codes: Tensor, weight: Tensor, bits: int, weight_bits: int, scale: Tensor, offset: Tensor,
    thresholds: Tensor | None, levels: int | None, out: Tensor,
    rows: int, groups: int, count: int, window: tuple[int, ...] | None,
) -> None:  # fmt: skip
    """Fill out, [rows, channels] in memory. levels: None for a float output; window: that of a convolution."""
    outputs = weight.size(0) // groups
    if not out.numel():
        return
    most_rows, most_outputs, step = _LARGE_TILE if window is None and bits < 8 else _SMALL_TILE
    tile = _tile(rows, most_rows), _tile(outputs, most_outputs)
    grid = triton.cdiv(rows, tile[0]), triton.cdiv(outputs, tile[1]), groups
    with on_device(codes):
        layer_kernels.integer_layer_kernel[grid](
            codes, weight.contiguous(), scale.contiguous(), offset.contiguous(),
            None if thresholds is None else thresholds.contiguous(), out,
            rows, outputs, count, weight.size(1), levels or 0, *(window or (1,) * 13),
            WIDE_CODES=bits == 8, WEIGHT_BITS=weight_bits, WINDOW=window is not None,
            ROWS=tile[0], OUTPUTS=tile[1], BYTES=step, **OPTIONS,
        )  # fmt: skip


def _tile(size: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(size)))
