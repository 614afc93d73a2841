"""The signed staircase and the Hadamard rotation.

    levels      L[k] = round_to_dtype(k * alpha), k = -p..p, p = 2**(bits - 1) - 1
    thresholds  T[k] = (L[k-1] + L[k]) / 2, k = -p+1..p
    code        c = #{k : x > T[k]}, 0..2p; output y = L[c - p]. NaN has code p and output NaN.

alpha is given, or dynamic: one per group of the last dimension, max|x| / p rounded up to bfloat16. A group of zeros has
alpha 0, code p and output 0; one with an alpha that is not finite has alpha NaN, code p and output NaN.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from .._checks import check_hadamard, check_signed, checked_values
from .._torch_internals import suggest_memory_format
from .._types import CODE_WIDTH, AlphaGrad, parse, top_level, wide_dtype
from .bits import from_memory_order, pack, to_memory_order, unpack
from .staircase import per_element, rows_of, sum_rows


def signed_levels(alpha: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """L[c, k + p] = round_to_dtype(k * alpha[c]) in the wide dtype, shape [C, 2 p + 1]."""
    p, wide = top_level(bits), wide_dtype(dtype)
    k = torch.arange(-p, p + 1, dtype=wide, device=alpha.device)
    return (k * alpha.to(wide)[:, None]).to(dtype).to(wide)


def group_alphas(x: Tensor, bits: int, group: int) -> Tensor:
    """The dynamic alphas, bfloat16 of shape [..., n / group]: max|x| / p, rounded up; NaN if that is not finite."""
    wide = x.to(wide_dtype(x.dtype))
    groups = wide.unflatten(-1, (wide.size(-1) // group, group)) if wide.size(-1) else wide[..., None]
    largest = groups.abs().amax(-1) if groups.numel() else groups.new_zeros(groups.shape[:-1])
    alpha = largest / top_level(bits)
    single = alpha.float()
    single = torch.where(single < alpha, torch.nextafter(single, torch.full_like(single, math.inf)), single)
    # The low half of a float32's bits is what bfloat16 lacks. A carry goes on into the exponent, and up to infinity.
    up = ((single.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return torch.where(up.isfinite() & alpha.isfinite(), up, torch.nan).to(torch.bfloat16)


def _rows(x: Tensor, alpha: Tensor, group: int | None, channel_dim: int | None) -> Tensor:
    """x as [C, n / C]: one row per alpha."""
    if group is not None:
        return x.reshape(alpha.numel(), group if x.numel() else 0)
    return rows_of(x, alpha.numel(), channel_dim)


def _of_each(alpha: Tensor, x: Tensor, group: int | None, channel_dim: int | None) -> Tensor:
    """alpha, to broadcast against x."""
    if group is None:
        return per_element(alpha, x, channel_dim)
    return alpha.repeat_interleave(group, -1) if x.numel() else alpha.new_empty(x.shape)


def _codes(x: Tensor, alpha: Tensor, bits: int, group: int | None, channel_dim: int | None) -> Tensor:
    """The code of every element, int64 of x's shape. alpha is wide."""
    edges = signed_levels(alpha.flatten(), bits, x.dtype)
    edges = (edges[:, :-1] + edges[:, 1:]) / 2
    rows = _rows(x, alpha, group, channel_dim).to(edges.dtype)
    if rows.numel() == 0:
        return torch.zeros_like(x, dtype=torch.int64)
    found = torch.searchsorted(edges.contiguous(), rows.contiguous())
    # searchsorted orders no NaN, of x or of alpha; nor are there stairs if alpha is 0.
    found = torch.where(rows.isnan() | ~(alpha.reshape(-1, 1) > 0), top_level(bits), found)
    if group is not None or channel_dim is None:
        return found.reshape(x.shape)
    return found.reshape(x.movedim(channel_dim, 0).shape).movedim(0, channel_dim)


def qsigned_forward(
    x: Tensor, alpha: Tensor | None, bits: int, group: int | None, mask: bool, codes: bool, channel_dim: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, dynamic alphas, mask, packed codes). alpha: None if it is dynamic; its values are then returned. mask: the
    bit L[-p] <= x <= L[p], 1 for NaN and wherever alpha is dynamic. Both are packed in y's memory order."""
    alpha, group, channel_dim = check_signed(x, alpha, bits, group, channel_dim)
    memory_format = torch.contiguous_format if alpha is None else suggest_memory_format(x)
    if alpha is None:
        found = group_alphas(x, bits, cast(int, group))
        wide = found.to(wide_dtype(x.dtype))
    else:
        found = torch.empty(0, dtype=torch.bfloat16, device=x.device)
        wide = checked_values(alpha, wide_dtype(x.dtype))
    code = _codes(x, wide, bits, group, channel_dim)
    of_each = _of_each(wide, x, group, channel_dim)
    y = torch.where(x.isnan(), x, _from_codes(code, of_each, bits, x.dtype))
    packed_mask, packed_codes = (torch.empty(0, dtype=torch.uint8, device=x.device) for _ in range(2))
    if mask:
        top = (top_level(bits) * of_each).to(x.dtype)
        outside = (x.abs() > top) if alpha is not None else torch.zeros_like(x, dtype=torch.bool)
        packed_mask = pack(to_memory_order((~outside).to(torch.uint8), memory_format), 1)
    if codes:
        packed_codes = pack(to_memory_order(code.to(torch.uint8), memory_format), CODE_WIDTH[bits])
    return torch.empty_like(x, memory_format=memory_format).copy_(y), found, packed_mask, packed_codes


def _from_codes(code: Tensor, alpha: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """L[c - p] in dtype: the same product as in `signed_levels`, rounded once."""
    return ((code - top_level(bits)).to(alpha.dtype) * alpha).to(dtype)


def qsigned_dequantize(
    codes: Tensor,
    alpha: Tensor,
    bits: int,
    group: int | None,
    shape: list[int],
    dtype: torch.dtype,
    channel_dim: int | None,
    memory_format: torch.memory_format,
) -> Tensor:
    """L[c - p] of the packed codes c, which are in the order of memory_format. group: None if alpha was given."""
    wide = wide_dtype(dtype)
    alpha = checked_values(alpha, wide) if group is None else alpha.to(wide)
    out = torch.empty(shape, dtype=dtype, device=codes.device, memory_format=memory_format)
    code = from_memory_order(unpack(codes, CODE_WIDTH[bits], out.numel()), out.shape, memory_format).long()
    return out.copy_(_from_codes(code, _of_each(alpha, out, group, channel_dim), bits, dtype))


def qsigned_backward(
    grad_y: Tensor,
    alpha: Tensor | None,
    x: Tensor | None,
    mask: Tensor | None,
    codes: Tensor | None,
    bits: int,
    clipped: bool,
    alpha_grad: int,
    alpha_scale: float,
    channel_dim: int | None,
    need_grad_x: bool,
    need_grad_alpha: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_alpha) for a given alpha, of shape [0] if not needed. grad_y is dense in y's memory format."""
    rule, p = parse("alpha_grad", alpha_grad, AlphaGrad), top_level(bits)
    dy = grad_y.to(wide_dtype(grad_y.dtype))
    memory_format = suggest_memory_format(grad_y)
    k: Any
    u: Any
    inside: Any
    k = u = inside = None
    if x is not None and alpha is not None:
        step = alpha.detach().to(dy.dtype)
        of_each = per_element(step, x, channel_dim)
        k = (_codes(x, step, bits, None, channel_dim) - p).to(dy.dtype)
        u = x.to(dy.dtype) / of_each
        inside = ~(x.abs() > (p * of_each).to(x.dtype))
    if codes is not None:
        k = from_memory_order(unpack(codes, CODE_WIDTH[bits], grad_y.numel()), grad_y.shape, memory_format)
        k = k.to(dy.dtype) - p
    if mask is not None:
        inside = from_memory_order(unpack(mask, 1, grad_y.numel()), grad_y.shape, memory_format) != 0
    grad_x, grad_alpha = grad_y.new_empty(0), dy.new_empty(0)
    if need_grad_x:
        grad_x = torch.empty_like(grad_y).copy_(torch.where(inside, grad_y, 0.0) if clipped else grad_y)
    if need_grad_alpha:
        factor = k
        if rule == AlphaGrad.chain:
            factor = k - (torch.where(inside, u, 0.0) if clipped else u)
        terms = torch.where(factor == 0, 0.0, dy * factor)
        channels = 1 if channel_dim is None else grad_y.size(channel_dim)
        grad_alpha = signed_scale(alpha_scale, grad_y, bits) * sum_rows(rows_of(terms, channels, channel_dim))
    return grad_x, grad_alpha


def signed_scale(alpha_scale: float, x: Tensor, bits: int) -> float:
    """alpha_scale as a number; infinity is "lsq", 1 / sqrt(n p) for n elements of x per sample."""
    if not math.isinf(alpha_scale):
        return alpha_scale
    n = x.numel() // max(x.size(0), 1) if x.dim() > 0 else 1
    return 1 / torch.sym_sqrt(max(n, 1) * top_level(bits))


def hadamard(x: Tensor, size: int) -> Tensor:
    """H x / sqrt(size) for each block of `size` elements of the last dimension, H in Sylvester order."""
    check_hadamard(x, size)
    v = x.to(wide_dtype(x.dtype)).reshape(-1, size)
    half = 1
    while half < size:  # the butterfly fixes the order of the sums
        low, high = v.view(-1, size // (2 * half), 2, half).unbind(2)
        v = torch.stack((low + high, low - high), 2).view(-1, size)
        half *= 2
    return (v * math.sqrt(1 / size)).to(x.dtype).view(x.shape)
