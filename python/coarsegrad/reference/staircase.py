"""The staircase ReLU.

levels      L[k] = round_to_dtype(k * alpha), k = 0..q, q = 2**bits - 1
thresholds  ceil: T[k] = L[k-1];  nearest: T[k] = (L[k-1] + L[k]) / 2;  hwgq: nearest, but T[1] = 0
code        c = #{k in 1..q : x > T[k]} = torch.bucketize(x, T[1:]);  output y = L[c], NaN for NaN
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import check_arguments, check_slopes, checked_values
from .._torch_internals import suggest_memory_format
from .._types import CODE_WIDTH, MASK_WIDTH, AlphaGrad, MaskKind, Rounding, parse, wide_dtype
from ..ste import saved, ste_of
from .bits import from_memory_order, pack, to_memory_order, unpack

# Each row is summed in this many stripes, then the stripes: a fixed order, whatever the number of threads.
_STRIPES = 256


def levels(alpha: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """L[c, k] = round_to_dtype(k * alpha[c]) in the wide dtype, shape [C, q + 1]."""
    wide = wide_dtype(dtype)
    k = torch.arange(2**bits, dtype=wide, device=alpha.device)
    return (k * alpha.to(wide)[:, None]).to(dtype).to(wide)


def thresholds(alpha: Tensor, bits: int, dtype: torch.dtype, rounding: str | int) -> Tensor:
    """T[c, k - 1], k = 1..q, in the wide dtype, shape [C, q]."""
    rounding = parse("rounding", rounding, Rounding)
    level = levels(alpha, bits, dtype)
    if rounding == Rounding.ceil:
        return level[:, :-1].contiguous()
    middle = (level[:, :-1] + level[:, 1:]) / 2
    if rounding == Rounding.hwgq:
        middle[:, 0] = 0
    return middle


def lsq_scale(x: Tensor, bits: int) -> float:
    """1 / sqrt(n q) for n elements of x per sample."""
    n = x.numel() // max(x.size(0), 1) if x.dim() > 0 else 1
    return 1 / torch.sym_sqrt(max(n, 1) * (2**bits - 1))


def number_of_scale(alpha_scale: float, x: Tensor, bits: int) -> float:
    """alpha_scale as a number. Compiled code passes infinity for "lsq", as it does not know n."""
    return lsq_scale(x, bits) if math.isinf(alpha_scale) else alpha_scale


def per_element(values: Tensor, x: Tensor, channel_dim: int | None) -> Tensor:
    """values, of shape [1] or [C], reshaped to broadcast against x."""
    if channel_dim is None:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    return values.reshape(shape)


def rows_of(t: Tensor, channels: int, channel_dim: int | None) -> Tensor:
    """t as [C, n / C]: one row per alpha."""
    if channel_dim is not None:
        t = t.movedim(channel_dim, 0)
    return t.reshape(channels, t.numel() // max(channels, 1))


def _codes(x: Tensor, alpha: Tensor, bits: int, rounding: str | int, channel_dim: int | None) -> Tensor:
    """The code of every element, int64 of x's shape."""
    edges = thresholds(alpha, bits, x.dtype, rounding)
    x = x.to(edges.dtype)
    if channel_dim is None:
        return torch.bucketize(x.contiguous(), edges[0])
    rows = rows_of(x, alpha.numel(), channel_dim).contiguous()
    return torch.searchsorted(edges, rows).reshape(x.movedim(channel_dim, 0).shape).movedim(0, channel_dim)


def _from_codes(codes: Tensor, alpha: Tensor, dtype: torch.dtype, channel_dim: int | None) -> Tensor:
    """L[c] in dtype: the same product as in `levels`, rounded once."""
    return (codes.to(alpha.dtype) * per_element(alpha, codes, channel_dim)).to(dtype)


def _state(x: Tensor, alpha: Tensor, bits: int, channel_dim: int | None) -> Tensor:
    """0 for x <= 0, 1 for 0 < x <= L[q] and for NaN, 2 for x > L[q]; uint8 of x's shape."""
    top = per_element(levels(alpha, bits, x.dtype)[:, -1], x, channel_dim)
    return (~(x <= 0)).to(torch.uint8) + (x.to(top.dtype) > top)


def _near(x: Tensor, alpha: Tensor, bits: int, channel_dim: int | None) -> Tensor:
    """Whether -alpha/2 <= x <= L[q] + alpha/2; true for NaN."""
    half = alpha / 2
    low, high = (per_element(end, x, channel_dim) for end in (-half, levels(alpha, bits, x.dtype)[:, -1] + half))
    return ~((x.to(half.dtype) < low) | (x.to(half.dtype) > high))


_BIT_OF_STATE = {MaskKind.positive: lambda state: state != 0, MaskKind.inside: lambda state: state == 1}


def _forward(
    x: Tensor, alpha: Tensor, bits: int, rounding: int, mask: int, codes: bool, channel_dim: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in no particular layout, packed mask, packed codes), both packed in the order of x's memory format."""
    check_arguments(x, alpha, bits, channel_dim)
    kind = parse("mask", mask, MaskKind)
    memory_format = suggest_memory_format(x)
    alpha = checked_values(alpha, wide_dtype(x.dtype))
    code = _codes(x, alpha, bits, rounding, channel_dim)
    y = torch.where(x.isnan(), x, _from_codes(code, alpha, x.dtype, channel_dim))
    packed_mask, packed_codes = (torch.empty(0, dtype=torch.uint8, device=x.device) for _ in range(2))
    if kind == MaskKind.near:
        packed_mask = pack(to_memory_order(_near(x, alpha, bits, channel_dim).to(torch.uint8), memory_format), 1)
    elif kind != MaskKind.nothing:
        state = _state(x, alpha, bits, channel_dim)
        bit = state if kind == MaskKind.state else _BIT_OF_STATE[kind](state).to(torch.uint8)
        packed_mask = pack(to_memory_order(bit, memory_format), MASK_WIDTH[kind])
    if codes:
        flat = to_memory_order(code.to(torch.uint8), memory_format)
        packed_codes = pack(flat, CODE_WIDTH[bits])
    return y, packed_mask, packed_codes


def qrelu_forward(
    x: Tensor, alpha: Tensor, bits: int, rounding: int, mask: int, codes: bool, channel_dim: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mask, codes): the staircase of x, and the requested mask bits and codes, packed in y's memory order."""
    y, packed_mask, packed_codes = _forward(x, alpha, bits, rounding, mask, codes, channel_dim)
    out = torch.empty_like(x, memory_format=suggest_memory_format(x))
    return out.copy_(y), packed_mask, packed_codes


def qrelu_forward_(
    x: Tensor, alpha: Tensor, bits: int, rounding: int, mask: int, codes: bool, channel_dim: int | None
) -> tuple[Tensor, Tensor]:
    """(mask, codes) of `qrelu_forward`; x becomes y."""
    y, packed_mask, packed_codes = _forward(x, alpha, bits, rounding, mask, codes, channel_dim)
    x.copy_(y)
    return packed_mask, packed_codes


def qrelu_codes(x: Tensor, alpha: Tensor, bits: int, rounding: int, channel_dim: int | None) -> Tensor:
    """The packed codes of x, in the order of x's memory format."""
    check_arguments(x, alpha, bits, channel_dim)
    alpha = checked_values(alpha, wide_dtype(x.dtype))
    code = _codes(x, alpha, bits, rounding, channel_dim).to(torch.uint8)
    return pack(to_memory_order(code, suggest_memory_format(x)), CODE_WIDTH[bits])


def dequantize(
    codes: Tensor,
    alpha: Tensor,
    bits: int,
    shape: list[int],
    dtype: torch.dtype,
    channel_dim: int | None,
    memory_format: torch.memory_format,
) -> Tensor:
    """L[c] of the packed codes c, which are in the order of memory_format."""
    alpha = checked_values(alpha, wide_dtype(dtype))
    out = torch.empty(shape, dtype=dtype, device=codes.device, memory_format=memory_format)
    code = from_memory_order(unpack(codes, CODE_WIDTH[bits], out.numel()), out.shape, memory_format)
    return out.copy_(_from_codes(code, alpha, dtype, channel_dim))


def backward_from_slopes(grad_y: Tensor, codes: Tensor, slopes: Tensor, bits: int) -> Tensor:
    """grad_y * slopes[c] for the packed codes c, a select where the slope is 0. grad_y is dense in y's memory format;
    slopes: [2**bits], wide."""
    check_slopes(slopes, grad_y, bits)
    memory_format = suggest_memory_format(grad_y)
    flat = unpack(codes, CODE_WIDTH[bits], grad_y.numel())
    slope = slopes[from_memory_order(flat, grad_y.shape, memory_format).long()]
    grad_x = torch.empty_like(grad_y, memory_format=memory_format)
    return grad_x.copy_(torch.where(slope == 0, 0.0, grad_y.to(slope.dtype) * slope))


def sum_rows(rows: Tensor) -> Tensor:
    """The sum of each row of [C, n], in a fixed two-stage order."""
    rows = torch.nn.functional.pad(rows, (0, -rows.size(1) % _STRIPES))
    return rows.view(rows.size(0), _STRIPES, rows.size(1) // _STRIPES).sum(2).sum(1)


def qrelu_backward(
    grad_y: Tensor,
    alpha: Tensor | None,
    x: Tensor | None,
    mask: Tensor | None,
    codes: Tensor | None,
    bits: int,
    ste: int | str,
    rounding: int,
    alpha_grad: int,
    alpha_scale: float,
    channel_dim: int | None,
    need_grad_x: bool,
    need_grad_alpha: bool,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_alpha) from what `saved` lists; of shape [0] if not needed. Every masked value is a select.

    grad_y is dense in y's memory format, which may be passed. alpha is given if x is. grad_alpha is wide.
    """
    row, q = ste_of(ste), 2**bits - 1
    rounding, rule = parse("rounding", rounding, Rounding), parse("alpha_grad", alpha_grad, AlphaGrad)
    mask_kind = saved(row.needs, rounding, rule, need_grad_x, need_grad_alpha).mask
    dy = grad_y.to(wide_dtype(grad_y.dtype))
    memory_format = memory_format or suggest_memory_format(grad_y)

    def unpacked(packed: Tensor, width: int) -> Tensor:
        return from_memory_order(unpack(packed, width, grad_y.numel()), grad_y.shape, memory_format)

    state: Any
    bit: Any
    code: Any
    u: Any
    state = bit = code = u = None
    if x is not None and alpha is not None:
        step = alpha.detach().to(dy.dtype)
        state = _state(x, step, bits, channel_dim)
        code = _codes(x, step, bits, rounding, channel_dim)
        u = x.to(dy.dtype) / per_element(step, x, channel_dim)
        # x > 0 stays u > 0 if the quotient underflows.
        u = torch.where(x > 0, u.clamp_min(torch.finfo(u.dtype).tiny), u)
    if codes is not None:
        code = unpacked(codes, CODE_WIDTH[bits])
        bit = code != 0
    if mask is not None and mask_kind == MaskKind.state:
        state = unpacked(mask, MASK_WIDTH[mask_kind])
    elif mask is not None and mask_kind != MaskKind.nothing:
        bit = unpacked(mask, MASK_WIDTH[mask_kind]) != 0
    if state is not None and row.needs in ("positive", "inside"):
        bit = _BIT_OF_STATE[MaskKind[row.needs]](state)
    if x is not None and row.needs == "near":
        bit = _near(x, step, bits, channel_dim)

    def slope() -> Tensor:
        """g'(u), and 1 for NaN."""
        if row.needs == "x":
            return torch.where(u.isnan(), 1.0, row.at(u, q, rounding.name))
        if row.needs == "codes":
            return row.gprime(code.to(dy.dtype), q)
        if row.needs == "nothing":
            return row.gprime(torch.full_like(dy, 0.5), q)
        # g' depends on the bit alone: any u with that bit will do.
        return row.gprime(torch.where(bit, 0.5, -1.0).to(dy.dtype), q)

    grad_x, grad_alpha = grad_y.new_empty(0), dy.new_empty(0)
    if need_grad_x:
        g = slope()
        dx = torch.where(g == 0, 0.0, torch.where(g == 1, dy, dy * g))
        grad_x = torch.empty_like(grad_y).copy_(dx)
    if need_grad_alpha:
        if rule == AlphaGrad.exact:
            factor = code.to(dy.dtype)
        elif rule == AlphaGrad.chain:
            g = slope()
            factor = code - torch.where(g == 0, 0.0, u * g)
        else:
            inside = 2.0 ** (bits - 1) if rule == AlphaGrad.three_valued else 0.0
            factor = torch.where(state == 0, 0.0, torch.where(state == 2, float(q), inside)).to(dy.dtype)
        terms = torch.where(factor == 0, 0.0, dy * factor)
        channels = 1 if channel_dim is None else grad_y.size(channel_dim)
        grad_alpha = number_of_scale(alpha_scale, grad_y, bits) * sum_rows(rows_of(terms, channels, channel_dim))
    return grad_x, grad_alpha
