"""The integer ops in plain torch. Sums of products of integers are exact in float64.

    acc[n] = sum_k codes[k] * w[n, k]                                  an integer, |acc| < 2**31
    v[n]   = float32(float32(acc) * scale[n]) + offset[n]              each step rounded to float32
    code   = clamp(ceil(v), 0, levels), or #{k : acc >= thresholds[n, k]}

Functions have the signatures of the ops of the same name (ops.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._checks import check_arguments, checked_values
from .._torch_internals import suggest_memory_format
from .._types import wide_dtype
from .checks import check_conv2d, check_linear
from .weights import unpack_weights


def integer_quantize(x: Tensor, alpha: Tensor, bits: int, rounding: int, channel_dim: int | None) -> Tensor:
    """The codes of qrelu(x), one per byte, in x's shape and memory format; 2**bits - 1 for NaN."""
    check_arguments(x, alpha, bits, channel_dim)
    alpha = checked_values(alpha, wide_dtype(x.dtype))
    out = torch.empty_like(x, dtype=torch.uint8, memory_format=suggest_memory_format(x))
    return out.copy_(reference._codes(x, alpha, bits, rounding, channel_dim))


def integer_linear(
    codes: Tensor,
    weight: Tensor,
    bits: int,
    weight_bits: int,
    scale: Tensor,
    offset: Tensor,
    thresholds: Tensor | None,
    levels: int,
) -> Tensor:
    """The output codes of a Linear, uint8 [..., C]."""
    check_linear(codes, weight, bits, weight_bits, scale, offset, thresholds, levels)
    return _output_codes(_linear(codes, weight, weight_bits), scale, offset, thresholds, levels)


def integer_linear_float(
    codes: Tensor, weight: Tensor, bits: int, weight_bits: int, scale: Tensor, offset: Tensor
) -> Tensor:
    """The output of a Linear, float32 [..., C]."""
    check_linear(codes, weight, bits, weight_bits, scale, offset)
    return affine(_linear(codes, weight, weight_bits), scale, offset)


def integer_conv2d(
    codes: Tensor,
    weight: Tensor,
    bits: int,
    weight_bits: int,
    scale: Tensor,
    offset: Tensor,
    thresholds: Tensor | None,
    levels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The output codes of a Conv2d, uint8 [N, C, H, W] in channels_last."""
    window = kernel_size, stride, padding, dilation, groups
    check_conv2d(codes, weight, bits, weight_bits, scale, offset, window, thresholds, levels)
    acc = _conv2d(codes, weight, weight_bits, *window)
    return _images(_output_codes(acc, scale, offset, thresholds, levels))


def integer_conv2d_float(
    codes: Tensor,
    weight: Tensor,
    bits: int,
    weight_bits: int,
    scale: Tensor,
    offset: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The output of a Conv2d, float32 [N, C, H, W] in channels_last."""
    window = kernel_size, stride, padding, dilation, groups
    check_conv2d(codes, weight, bits, weight_bits, scale, offset, window)
    return _images(affine(_conv2d(codes, weight, weight_bits, *window), scale, offset))


def affine(acc: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """v of accumulators [..., C]. It is monotonic in acc, as each step of it is: with scale >= 0 it never decreases."""
    return acc.float() * scale + offset


def affine_codes(acc: Tensor, scale: Tensor, offset: Tensor, levels: int) -> Tensor:
    """clamp(ceil(v), 0, levels) of accumulators [..., C], uint8."""
    return affine(acc, scale, offset).ceil().clamp(0, levels).to(torch.uint8)


def _output_codes(acc: Tensor, scale: Tensor, offset: Tensor, thresholds: Tensor | None, levels: int) -> Tensor:
    if thresholds is None:
        return affine_codes(acc, scale, offset, levels)
    rows = acc.reshape(-1, acc.size(-1)).t().contiguous()
    counts = torch.searchsorted(thresholds.double(), rows, right=True)
    return counts.to(torch.uint8).t().contiguous().view(acc.shape)


def _linear(codes: Tensor, weight: Tensor, weight_bits: int) -> Tensor:
    """acc, float64 [..., C]."""
    return codes.double() @ unpack_weights(weight, weight_bits, codes.size(-1)).double().t()


def _conv2d(codes, weight, weight_bits, kernel_size, stride, padding, dilation, groups) -> Tensor:
    """acc, float64 [N, H, W, C]. A row of weight is a channel's [kh, kw, C_in / groups]."""
    inputs = codes.size(1) // groups
    rows = unpack_weights(weight, weight_bits, inputs * kernel_size[0] * kernel_size[1]).double()
    filters = rows.view(-1, *kernel_size, inputs).permute(0, 3, 1, 2)
    return F.conv2d(codes.double(), filters, None, stride, padding, dilation, groups).permute(0, 2, 3, 1)


def _images(output: Tensor) -> Tensor:
    """output [N, H, W, C] as [N, C, H, W] in channels_last."""
    images = output.permute(0, 3, 1, 2)
    return torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
