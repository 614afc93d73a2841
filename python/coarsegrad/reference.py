"""The whole op family in plain torch, straight from the definition: an oracle, and what runs where nothing faster does.

    levels      L[k] = round_to_dtype(k * alpha), k = 0..q, q = 2**bits - 1
    thresholds  ceil: T[k] = L[k-1];  nearest: T[k] = (L[k-1] + L[k]) / 2;  hwgq: nearest, but T[1] = 0
    code        c = #{k in 1..q : x > T[k]} = torch.bucketize(x, T[1:]);  output y = L[c], NaN for NaN

Functions have the signatures of the ops of the same name (_ops.py). Products, thresholds, quotients and sums are
float32, or float64 where x is float64. The checks of arguments are here too; the public functions share them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._torch_internals import suggest_memory_format
from .ste import ROUNDINGS, get_ste, kept, one_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Bits that one packed code takes: a power of two, so that no code straddles two bytes.
CODE_WIDTH = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
MASK_WIDTH = {"nothing": 0, "positive": 1, "inside": 1, "state": 2}

# The rows of a sum are added in this many stripes, then the stripes: a fixed order, whatever the number of threads.
_STRIPES = 256


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that x of `dtype` is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def levels(alpha: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """L[c, k] = round_to_dtype(k * alpha[c]) in the wide dtype, shape [C, q + 1]."""
    wide = wide_dtype(dtype)
    k = torch.arange(2**bits, dtype=wide, device=alpha.device)
    return (k * alpha.to(wide)[:, None]).to(dtype).to(wide)


def thresholds(alpha: Tensor, bits: int, dtype: torch.dtype, rounding: str) -> Tensor:
    """T[c, k - 1], k = 1..q, in the wide dtype, shape [C, q]."""
    level = levels(alpha, bits, dtype)
    if rounding == "ceil":
        return level[:, :-1].contiguous()
    middle = (level[:, :-1] + level[:, 1:]) / 2
    if rounding == "hwgq":
        middle[:, 0] = 0
    return middle


def pack(values: Tensor, width: int) -> Tensor:
    """1-d uint8 values below 2**width, packed: element i in byte i*width // 8 at shift (i*width) % 8."""
    if width == 0 or values.numel() == 0:
        return values.new_empty(0)
    per_byte = 8 // width
    values = torch.nn.functional.pad(values, (0, -values.numel() % per_byte)).view(-1, per_byte)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=values.device)
    return (values << shifts).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` values of what `pack` made, 1-d uint8."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & (2**width - 1)).reshape(-1)[:count]


_CHANNELS_LAST = {torch.channels_last: (0, 2, 3, 1), torch.channels_last_3d: (0, 2, 3, 4, 1)}
_CHANNELS_FIRST = {torch.channels_last: (0, 3, 1, 2), torch.channels_last_3d: (0, 4, 1, 2, 3)}


def _to_memory_order(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The elements of t, 1-d, in the order in which a dense tensor of that format lays them out."""
    order = _CHANNELS_LAST.get(memory_format)
    return (t if order is None else t.permute(order)).reshape(-1)


def _from_memory_order(flat: Tensor, shape, memory_format: torch.memory_format) -> Tensor:
    """The inverse of `_to_memory_order`."""
    order = _CHANNELS_LAST.get(memory_format)
    if order is None:
        return flat.view(shape)
    return flat.view([shape[i] for i in order]).permute(_CHANNELS_FIRST[memory_format])


def check_bits(bits: int) -> None:
    if type(bits) is not int:
        raise TypeError(f"bits must be an int in 1..8, got {bits!r}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be an int in 1..8, got {bits}")


def check_word(argument: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ValueError(one_of(argument, got, known))


def check_number(argument: str, got: float) -> None:
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        raise TypeError(f"{argument} must be a float or a Tensor, got {got!r}")
    if not 0 < got < math.inf:
        raise ValueError(f"{argument} must be finite and > 0, got {got}")


def check_alpha(
    alpha: Tensor | float, channel_dim: int | None, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, int | None]:
    """(alpha as a tensor, channel_dim counted from the front) for x of that shape; of a tensor all but the values."""
    size = 1
    if channel_dim is not None:
        if type(channel_dim) is not int:
            raise TypeError(f"channel_dim must be an int or None, got {channel_dim!r}")
        dim = len(shape)
        if not -dim <= channel_dim < dim:
            raise ValueError(f"channel_dim must be a dimension of x, which has {dim}, got {channel_dim}")
        channel_dim = channel_dim % dim
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


def check_arguments(
    x: Tensor, alpha: Tensor | float, bits: int, rounding: str, channel_dim: int | None
) -> tuple[Tensor, int | None]:
    """All that a forward can check without reading alpha's values; returns what `check_alpha` does."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be of a dtype in {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if x.layout is not torch.strided or x.is_nested:
        got = "a nested one" if x.is_nested else f"one of layout {x.layout}"
        raise TypeError(f"x must be a dense Tensor, got {got}")
    check_bits(bits)
    check_word("rounding", rounding, ROUNDINGS)
    return check_alpha(alpha, channel_dim, x.shape, x.dtype, x.device)


def check_slopes(slopes: Tensor, grad_y: Tensor, bits: int) -> None:
    check_bits(bits)
    wide = wide_dtype(grad_y.dtype)
    if slopes.dtype != wide or slopes.shape != (2**bits,) or slopes.device != grad_y.device:
        raise ValueError(
            f"slopes must be {wide} of shape [{2**bits}] on {grad_y.device}, got {slopes.dtype} of shape"
            f" {list(slopes.shape)} on {slopes.device}"
        )


def checked_values(alpha: Tensor, wide: torch.dtype) -> Tensor:
    """alpha in the wide dtype. A bad value is an error where reading it costs no device sync, else it becomes NaN."""
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


def lsq_scale(x: Tensor, bits: int) -> float:
    """1 / sqrt(n q), n the elements of x per sample."""
    n = x.numel() // max(x.size(0), 1) if x.dim() > 0 else 1
    return 1 / torch.sym_sqrt(max(n, 1) * (2**bits - 1))


def number_of_scale(alpha_scale: float, x: Tensor, bits: int) -> float:
    """alpha_scale as a number. Compiled code hands over infinity for "lsq", as it does not know n."""
    return lsq_scale(x, bits) if math.isinf(alpha_scale) else alpha_scale


def _per_element(values: Tensor, x: Tensor, channel_dim: int | None) -> Tensor:
    """values of shape [1] or [C] in a shape that broadcasts against x."""
    if channel_dim is None:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    return values.reshape(shape)


def _rows(t: Tensor, channels: int, channel_dim: int | None) -> Tensor:
    """t as [C, n / C]: one row for each alpha."""
    if channel_dim is not None:
        t = t.movedim(channel_dim, 0)
    return t.reshape(channels, t.numel() // max(channels, 1))


def _codes(x: Tensor, alpha: Tensor, bits: int, rounding: str, channel_dim: int | None) -> Tensor:
    """The code of every element, int64 of x's shape."""
    edges = thresholds(alpha, bits, x.dtype, rounding)
    x = x.to(edges.dtype)
    if channel_dim is None:
        return torch.bucketize(x.contiguous(), edges[0])
    rows = _rows(x, alpha.numel(), channel_dim).contiguous()
    return torch.searchsorted(edges, rows).reshape(x.movedim(channel_dim, 0).shape).movedim(0, channel_dim)


def _from_codes(codes: Tensor, alpha: Tensor, dtype: torch.dtype, channel_dim: int | None) -> Tensor:
    """L[c] in dtype: the same product, rounded once, that made the levels."""
    return (codes.to(alpha.dtype) * _per_element(alpha, codes, channel_dim)).to(dtype)


def _state(x: Tensor, alpha: Tensor, bits: int, channel_dim: int | None) -> Tensor:
    """0 for x <= 0, 1 for 0 < x <= L[q] and for NaN, 2 for x > L[q]; uint8 of x's shape."""
    top = _per_element(levels(alpha, bits, x.dtype)[:, -1], x, channel_dim)
    return (~(x <= 0)).to(torch.uint8) + (x.to(top.dtype) > top)


_BIT_OF_STATE = {"positive": lambda state: state != 0, "inside": lambda state: state == 1}


def _forward(
    x: Tensor, alpha: Tensor, bits: int, rounding: str, mask: str, codes: bool, channel_dim: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in no particular layout, packed mask, packed codes), both packed in the order of x's memory format."""
    check_arguments(x, alpha, bits, rounding, channel_dim)
    memory_format = suggest_memory_format(x)
    alpha = checked_values(alpha, wide_dtype(x.dtype))
    code = _codes(x, alpha, bits, rounding, channel_dim)
    y = torch.where(x.isnan(), x, _from_codes(code, alpha, x.dtype, channel_dim))
    kept_mask, kept_codes = (torch.empty(0, dtype=torch.uint8, device=x.device) for _ in range(2))
    if mask != "nothing":
        state = _state(x, alpha, bits, channel_dim)
        bit = state if mask == "state" else _BIT_OF_STATE[mask](state).to(torch.uint8)
        kept_mask = pack(_to_memory_order(bit, memory_format), MASK_WIDTH[mask])
    if codes:
        flat = _to_memory_order(code.to(torch.uint8), memory_format)
        kept_codes = pack(flat, CODE_WIDTH[bits])
    return y, kept_mask, kept_codes


def qrelu_forward(
    x: Tensor, alpha: Tensor, bits: int, rounding: str, mask: str, codes: bool, channel_dim: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mask, codes): the staircase of x, and the bits and codes asked for, packed in y's memory order."""
    y, kept_mask, kept_codes = _forward(x, alpha, bits, rounding, mask, codes, channel_dim)
    out = torch.empty_like(x, memory_format=suggest_memory_format(x))
    return out.copy_(y), kept_mask, kept_codes


def qrelu_forward_(
    x: Tensor, alpha: Tensor, bits: int, rounding: str, mask: str, codes: bool, channel_dim: int | None
) -> tuple[Tensor, Tensor]:
    """(mask, codes) of `qrelu_forward`; x becomes y."""
    y, kept_mask, kept_codes = _forward(x, alpha, bits, rounding, mask, codes, channel_dim)
    x.copy_(y)
    return kept_mask, kept_codes


def qrelu_codes(x: Tensor, alpha: Tensor, bits: int, rounding: str, channel_dim: int | None) -> Tensor:
    """The packed codes of x, in the order of x's memory format."""
    check_arguments(x, alpha, bits, rounding, channel_dim)
    alpha = checked_values(alpha, wide_dtype(x.dtype))
    code = _codes(x, alpha, bits, rounding, channel_dim).to(torch.uint8)
    return pack(_to_memory_order(code, suggest_memory_format(x)), CODE_WIDTH[bits])


def dequantize(
    codes: Tensor,
    alpha: Tensor,
    bits: int,
    shape: list[int],
    dtype: torch.dtype,
    channel_dim: int | None,
    memory_format: torch.memory_format,
) -> Tensor:
    """L[c] of the packed codes c, which lie in the order of memory_format."""
    alpha = checked_values(alpha, wide_dtype(dtype))
    out = torch.empty(shape, dtype=dtype, device=codes.device, memory_format=memory_format)
    code = _from_memory_order(unpack(codes, CODE_WIDTH[bits], out.numel()), out.shape, memory_format)
    return out.copy_(_from_codes(code, alpha, dtype, channel_dim))


def times_slopes(grad_y: Tensor, codes: Tensor, slopes: Tensor, bits: int) -> Tensor:
    """grad_y * slopes[c] of the packed codes c, a select where the slope is 0. grad_y is dense in y's memory format;
    slopes: [2**bits], wide."""
    check_slopes(slopes, grad_y, bits)
    memory_format = suggest_memory_format(grad_y)
    flat = unpack(codes, CODE_WIDTH[bits], grad_y.numel())
    slope = slopes[_from_memory_order(flat, grad_y.shape, memory_format).long()]
    grad_x = torch.empty_like(grad_y, memory_format=memory_format)
    return grad_x.copy_(torch.where(slope == 0, 0.0, grad_y.to(slope.dtype) * slope))


def _sum_rows(rows: Tensor) -> Tensor:
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
    ste: str,
    rounding: str,
    alpha_grad: str,
    alpha_scale: float,
    channel_dim: int | None,
    need_grad_x: bool,
    need_grad_alpha: bool,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_alpha) from what `kept` says was kept; [0] for the one not needed. Every masked value is a select.

    grad_y is dense in y's memory format, which may be given. alpha is given where x is. grad_alpha is wide.
    """
    row, q = get_ste(ste), 2**bits - 1
    mask_kind = kept(ste, rounding, alpha_grad if need_grad_alpha else None, need_grad_x)[0]
    dy = grad_y.to(wide_dtype(grad_y.dtype))
    memory_format = memory_format or suggest_memory_format(grad_y)

    def unpacked(packed: Tensor, width: int) -> Tensor:
        return _from_memory_order(unpack(packed, width, grad_y.numel()), grad_y.shape, memory_format)

    state = bit = code = u = None
    if x is not None:
        step = alpha.detach().to(dy.dtype)
        state = _state(x, step, bits, channel_dim)
        code = _codes(x, step, bits, rounding, channel_dim)
        u = x.to(dy.dtype) / _per_element(step, x, channel_dim)
        # x > 0 stays u > 0 where the quotient underflows.
        u = torch.where(x > 0, u.clamp_min(torch.finfo(u.dtype).tiny), u)
    if codes is not None:
        code = unpacked(codes, CODE_WIDTH[bits])
        bit = code != 0
    if mask_kind == "state":
        state = unpacked(mask, MASK_WIDTH["state"])
    elif mask_kind != "nothing":
        bit = unpacked(mask, MASK_WIDTH[mask_kind]) != 0
    if state is not None and row.needs in _BIT_OF_STATE:
        bit = _BIT_OF_STATE[row.needs](state)

    def slope() -> Tensor:
        """g'(u), and 1 for NaN."""
        if row.needs == "x":
            return torch.where(u.isnan(), 1.0, row.gprime(u, q))
        if row.needs == "codes":
            return row.gprime(code.to(dy.dtype), q)
        if row.needs == "nothing":
            return row.gprime(torch.full_like(dy, 0.5), q)
        # g' is constant where the bit is the same, so that any u with that bit will do.
        return row.gprime(torch.where(bit, 0.5, -0.5).to(dy.dtype), q)

    grad_x, grad_alpha = grad_y.new_empty(0), dy.new_empty(0)
    if need_grad_x:
        g = slope()
        dx = torch.where(g == 0, 0.0, torch.where(g == 1, dy, dy * g))
        grad_x = torch.empty_like(grad_y).copy_(dx)
    if need_grad_alpha:
        if alpha_grad == "exact":
            factor = code.to(dy.dtype)
        elif alpha_grad == "chain":
            g = slope()
            factor = code - torch.where(g == 0, 0.0, u * g)
        else:
            inside = 2.0 ** (bits - 1) if alpha_grad == "three_valued" else 0.0
            factor = torch.where(state == 0, 0.0, torch.where(state == 2, float(q), inside)).to(dy.dtype)
        terms = torch.where(factor == 0, 0.0, dy * factor)
        channels = 1 if channel_dim is None else grad_y.size(channel_dim)
        grad_alpha = number_of_scale(alpha_scale, grad_y, bits) * _sum_rows(_rows(terms, channels, channel_dim))
    return grad_x, grad_alpha
