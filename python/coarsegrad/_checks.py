"""Checks of arguments. Each raises a TypeError or ValueError that says what was got and what was wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._text import one_of
from ._types import DTYPES, MOST_WEIGHTS, WEIGHT_BITS, packed_bytes, wide_dtype


def check_bits(bits: int) -> None:
    if type(bits) is not int:
        raise TypeError(f"bits must be an int in 1..8, got {bits!r}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be an int in 1..8, got {bits}")


def check_option(argument: str, got: str, known: Sequence[str]) -> None:
    if got not in known:
        raise ValueError(one_of(argument, got, known))


def check_number(argument: str, got: float) -> None:
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        raise TypeError(f"{argument} must be a float or a Tensor, got {got!r}")
    if not 0 < got < math.inf:
        raise ValueError(f"{argument} must be finite and > 0, got {got}")


def check_alpha_scale(alpha_scale: float | str) -> None:
    if alpha_scale == "lsq":
        return
    if isinstance(alpha_scale, bool) or not isinstance(alpha_scale, (int, float)):
        raise TypeError(f"alpha_scale must be a number or 'lsq', got {alpha_scale!r}")
    if not -math.inf < alpha_scale < math.inf:
        raise ValueError(f"alpha_scale must be finite, or 'lsq', got {alpha_scale}")


def check_channel_dim(channel_dim: int, dim: int, argument: str = "x") -> int:
    """channel_dim counted from the front, for an x of `dim` dimensions."""
    if type(channel_dim) is not int:
        raise TypeError(f"channel_dim must be an int or None, got {channel_dim!r}")
    if not -dim <= channel_dim < dim:
        raise ValueError(f"channel_dim must be a dimension of {argument}, which has {dim}, got {channel_dim}")
    return channel_dim % dim


def check_alpha(
    alpha: Tensor | float, channel_dim: int | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, int | None]:
    """(alpha as a tensor, channel_dim counted from the front) for x of this shape. A tensor's values are not read."""
    size = 1
    if channel_dim is not None:
        channel_dim = check_channel_dim(channel_dim, len(shape))
        size = shape[channel_dim]
    if not isinstance(alpha, Tensor):
        check_number("alpha", alpha)
        return torch.full((size,), alpha, dtype=wide_dtype(dtype), device=device), channel_dim
    if alpha.dim() != 1 or alpha.size(0) != size:
        because = "without channel_dim" if channel_dim is None else "the size of x along channel_dim"
        raise ValueError(f"alpha must have shape [{size}] ({because}), got {list(alpha.shape)}")
    if not alpha.is_floating_point():
        raise TypeError(f"alpha must be of a floating dtype, got {alpha.dtype}")
    if alpha.device != device:
        raise ValueError(f"alpha must be on the device of x, {device}, got {alpha.device}")
    return alpha, channel_dim


def check_x(x: Tensor, argument: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{argument} must be of a dtype in {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if x.layout is not torch.strided or x.is_nested:
        got = "a nested one" if x.is_nested else f"one of layout {x.layout}"
        raise TypeError(f"{argument} must be a dense Tensor, got {got}")


def check_arguments(x: Tensor, alpha: Tensor | float, bits: int, channel_dim: int | None) -> tuple[Tensor, int | None]:
    """Check all that a forward can without reading alpha's values; returns what `check_alpha` does."""
    check_x(x)
    check_bits(bits)
    return check_alpha(alpha, channel_dim, x.shape, x.dtype, x.device)


def check_group(argument: str, group: int, size: int) -> None:
    """group: consecutive elements of a last dimension of this size."""
    if not isinstance(group, (int, torch.SymInt)) or isinstance(group, bool):
        raise TypeError(f"{argument} must be an int, got {group!r}")
    if group < 1 or size % group:
        raise ValueError(f"{argument} must be >= 1 and divide x's last dimension, {size}, got {group}")


def check_hadamard(x: Tensor, size: int) -> None:
    check_x(x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a 0-d tensor")
    check_group("size", size, x.size(-1))
    if size & (size - 1):
        raise ValueError(f"size must be a power of two, got {size}")


def check_signed(
    x: Tensor, alpha: Tensor | float | None, bits: int, group: int | None, channel_dim: int | None
) -> tuple[Tensor | None, int | None, int | None]:
    """Check all that the signed staircase can without reading alpha's values. Returns (alpha as a tensor, group,
    channel_dim counted from the front). A group is given, as a number, if alpha is not."""
    check_x(x)
    check_bits(bits)
    if bits == 1:
        raise ValueError("bits must be an int in 2..8 for the signed staircase, got 1")
    if alpha is not None:
        if group is not None:
            raise ValueError(f"group must be None if alpha is given, got {group!r}")
        alpha, channel_dim = check_alpha(alpha, channel_dim, x.shape, x.dtype, x.device)
        return alpha, None, channel_dim
    if channel_dim is not None:
        raise ValueError(f"channel_dim must be None for a dynamic alpha, got {channel_dim!r}")
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension for a dynamic alpha, got a 0-d tensor")
    group = x.size(-1) if group is None else group
    if x.size(-1) == 0:
        return None, 1, None
    check_group("group", group, x.size(-1))
    return None, group, None


def check_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, bits: int | None, group: int | None, rotation: int | None,
    output: bool,
) -> int | None:  # fmt: skip
    """Check the arguments of a norm and its staircase, none if bits is None; returns the group as a number."""
    check_x(x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a 0-d tensor")
    for argument, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{argument} must be a Tensor or None, got {type(parameter).__name__}")
        if parameter.dim() != 1 or parameter.size(0) != x.size(-1):
            size = x.size(-1)
            raise ValueError(f"{argument} must have shape [{size}] (x's last dimension), got {list(parameter.shape)}")
        if parameter.device != x.device:
            raise ValueError(f"{argument} must be on the device of x, {x.device}, got {parameter.device}")
        if not parameter.is_floating_point():
            raise TypeError(f"{argument} must be of a floating dtype, got {parameter.dtype}")
    if bits is None:
        if not output:
            raise ValueError("output must be True if bits is None, got False")
        return None
    if rotation is not None:
        check_hadamard(x, rotation)
    return check_signed(x, None, bits, group, None)[1]


def check_signed_alpha(
    alpha: Tensor | float, channel_dim: int | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, int | None, int | None]:
    """(alpha as a tensor, group, channel_dim counted from the front) for the codes of an x of this shape. Alphas are
    dynamic if they are bfloat16 with as many dimensions as x."""
    given = not isinstance(alpha, Tensor) or alpha.dtype != torch.bfloat16 or alpha.dim() != len(shape)
    if given or channel_dim is not None or not isinstance(alpha, Tensor) or not shape:
        alpha, channel_dim = check_alpha(alpha, channel_dim, shape, dtype, device)
        return alpha, None, channel_dim
    groups, size = alpha.size(-1), shape[-1]
    fits = size == 0 if groups == 0 else size > 0 and size % groups == 0
    if alpha.shape[:-1] != torch.Size(shape[:-1]) or not fits:
        raise ValueError(
            f"alpha must have shape [{', '.join(map(str, [*shape[:-1], 'n / group']))}] with n = {size}, got"
            f" {list(alpha.shape)}"
        )
    if alpha.device != device:
        raise ValueError(f"alpha must be on the device of the codes, {device}, got {alpha.device}")
    return alpha, size // groups if groups else 1, None


def check_weight(weight: Tensor, bits: int, channel_dim: int | None) -> int | None:
    """Check the arguments of a quantized weight; returns channel_dim counted from the front."""
    check_x(weight, "weight")
    known = ", ".join(map(str, WEIGHT_BITS))
    if type(bits) is not int:
        raise TypeError(f"bits must be an int, one of {known}, got {bits!r}")
    if bits not in WEIGHT_BITS:
        raise ValueError(f"bits must be one of {known}, got {bits}")
    count = weight.numel()
    if channel_dim is not None:
        channel_dim = check_channel_dim(channel_dim, weight.dim(), "weight")
        count //= max(1, weight.size(channel_dim))
    if count > MOST_WEIGHTS:
        raise ValueError(f"weight must have at most 2**25 elements for each scale, got {count}")
    return channel_dim


def check_slopes(slopes: Tensor, grad_y: Tensor, bits: int) -> None:
    check_bits(bits)
    wide = wide_dtype(grad_y.dtype)
    if slopes.dtype != wide or slopes.shape != (2**bits,) or slopes.device != grad_y.device:
        raise ValueError(
            f"slopes must be {wide} of shape [{2**bits}] on {grad_y.device}, got {slopes.dtype} of shape"
            f" {list(slopes.shape)} on {slopes.device}"
        )


def check_packed(packed: Tensor | None, argument: str, count: int, width: int, device: torch.device) -> None:
    size = packed_bytes(count, width)
    if packed is None or packed.dtype != torch.uint8 or packed.device != device or packed.shape != (size,):
        got = "nothing" if packed is None else f"{packed.dtype} of shape {list(packed.shape)} on {packed.device}"
        raise ValueError(
            f"{argument} must be a uint8 tensor of {size} bytes on {device} for {count} elements of {width} bits,"
            f" got {got}"
        )


def checked_values(alpha: Tensor, wide: torch.dtype) -> Tensor:
    """alpha in the wide dtype. An illegal value is an error if reading it needs no device sync; else it becomes NaN."""
    converted = alpha.detach().to(wide)
    good = converted.isfinite() & (converted > 0)
    if alpha.device.type != "cpu":
        return torch.where(good, converted, torch.nan)
    if not bool(good.all()):
        channel = int((~good).nonzero()[0])
        where = f" at channel {channel}" if alpha.numel() > 1 else ""
        hint = "; coarsegrad.keep_positive has an optimizer keep learned alphas > 0" if alpha.requires_grad else ""
        raise ValueError(f"alpha must be finite and > 0 in {wide}, got {alpha[channel].item()}{where}{hint}")
    return converted
