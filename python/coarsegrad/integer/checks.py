"""The checks of the integer ops' arguments: shapes and dtypes, never values. Each returns the shape of the output."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_bits
from .._types import WEIGHT_BITS
from .weights import row_bytes


def check_weight_bits(weight_bits: int) -> None:
    if type(weight_bits) is not int or weight_bits not in WEIGHT_BITS:
        raise ValueError(f"weight_bits must be one of {', '.join(map(str, WEIGHT_BITS))}, got {weight_bits!r}")


def check_codes(codes: Tensor) -> None:
    _check_tensor("codes", codes, torch.uint8)


def check_linear(
    codes: Tensor,
    weight: Tensor,
    bits: int,
    weight_bits: int,
    scale: Tensor,
    offset: Tensor,
    thresholds: Tensor | None = None,
    levels: int | None = None,
) -> list[int]:
    """levels: None for the ops with a float output."""
    if codes.dim() < 1:
        raise ValueError("codes must have at least one dimension, got none")
    _check_layer(codes, codes.size(-1), weight, bits, weight_bits, scale, offset, thresholds, levels)
    return [*codes.shape[:-1], weight.size(0)]


def check_conv2d(
    codes: Tensor,
    weight: Tensor,
    bits: int,
    weight_bits: int,
    scale: Tensor,
    offset: Tensor,
    window: tuple[list[int], list[int], list[int], list[int], int],
    thresholds: Tensor | None = None,
    levels: int | None = None,
) -> list[int]:
    """window: kernel_size, stride, padding, dilation, groups."""
    if codes.dim() != 4:
        raise ValueError(f"codes must be [N, C, H, W], got shape {list(codes.shape)}")
    kernel_size, stride, padding, dilation, groups = window
    for name, pair, least in zip(("kernel_size", "stride", "padding", "dilation"), window, (1, 1, 0, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} must be two ints >= {least}, got {list(pair)}")
    if groups < 1 or codes.size(1) % groups or weight.size(0) % groups:
        raise ValueError(
            f"groups must divide the channels of codes, {codes.size(1)}, and of weight, {weight.size(0)}, got {groups}"
        )
    count = codes.size(1) // groups * math.prod(kernel_size)
    _check_layer(codes, count, weight, bits, weight_bits, scale, offset, thresholds, levels)
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(codes.shape[2:], kernel_size, stride, padding, dilation)
    ]
    if min(size) < 1:
        raise ValueError(f"kernel_size must be at most the padded input, got {kernel_size} for {list(codes.shape)}")
    return [codes.size(0), weight.size(0), *size]


def _check_layer(
    codes: Tensor,
    count: int,
    weight: Tensor,
    bits: int,
    weight_bits: int,
    scale: Tensor,
    offset: Tensor,
    thresholds: Tensor | None,
    levels: int | None,
) -> None:
    check_bits(bits)
    check_weight_bits(weight_bits)
    check_codes(codes)
    _check_tensor("weight", weight, torch.uint8)
    size = row_bytes(count, weight_bits)
    if weight.dim() != 2 or weight.size(1) != size:
        raise ValueError(
            f"weight must have shape [C, {size}] for {count} weights of {weight_bits} bits, got {list(weight.shape)}"
        )
    channels = weight.size(0)
    for name, tensor in (("scale", scale), ("offset", offset)):
        _check_tensor(name, tensor, torch.float32, [channels])
    if levels is None:
        return
    if not 1 <= levels <= 255:
        raise ValueError(f"levels must be in 1..255, got {levels}")
    if thresholds is not None:
        _check_tensor("thresholds", thresholds, torch.int32, [channels, levels])


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: list[int] | None = None) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if shape is not None and list(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")
