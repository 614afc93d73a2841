"""How Inductor compiles a qrelu of which nothing is saved: as pointwise code that it fuses with what stands around it.

    y = L[0];  for k in 1..q: y = L[k] if x > T[k] else y;  y = x if x is NaN

L and T are buffers of q + 1 and q numbers per alpha, made by one small kernel. So y is always a number that was stored
in x's dtype: neither a compiler that keeps intermediate results in float32 nor one that contracts a product and a sum
can change a bit. More levels, and a qrelu of which bits are saved, stay calls of the op.

An alpha that is not finite and > 0 gives NaN, as on a GPU.

Imported by the op's fake kernel once Inductor has been imported.
"""

from __future__ import annotations

import math

import torch
from torch._inductor import lowering
from torch._inductor.ir import Pointwise, TensorBox
from torch._inductor.virtualized import V, ops

from ._types import INDUCTOR_BITS, MaskKind, Rounding, wide_dtype

_FORWARD = torch.ops.coarsegrad.qrelu_forward.default
_CODES = torch.ops.coarsegrad.qrelu_codes.default


def _levels(alpha: TensorBox, bits: int, dtype: torch.dtype) -> TensorBox:
    """[C, q + 1], rounded to dtype."""
    wide, load = wide_dtype(dtype), alpha.make_loader()

    def level(index):
        channel, k = index
        value = ops.to_dtype(load([channel]), wide)
        legal = ops.and_(ops.gt(value, ops.constant(0.0, wide)), ops.lt(value, ops.constant(math.inf, wide)))
        return ops.where(legal, ops.mul(ops.index_expr(k, wide), value), ops.constant(math.nan, wide))

    return _stored(alpha, dtype, level, 2**bits)


def _middles(levels: TensorBox, dtype: torch.dtype) -> TensorBox:
    """[C, q]: (L[k - 1] + L[k]) / 2 in the wide dtype."""
    wide, load = wide_dtype(dtype), levels.make_loader()

    def middle(index):
        channel, k = index
        low, high = (ops.to_dtype(load([channel, i]), wide) for i in (k, k + 1))
        return ops.mul(ops.add(low, high), ops.constant(0.5, wide))

    return _stored(levels, wide, middle, levels.get_size()[1] - 1)


def _stored(rows: TensorBox, dtype: torch.dtype, inner, columns: int) -> TensorBox:
    """A buffer with as many rows as the given one."""
    ranges = [rows.get_size()[0], columns]
    table = Pointwise.create(device=rows.get_device(), dtype=dtype, inner_fn=inner, ranges=ranges)
    table.realize()
    return table


def _staircase(x: TensorBox, alpha: TensorBox, bits: int, rounding: int, channel_dim: int | None) -> TensorBox:
    dtype, wide, q = x.get_dtype(), wide_dtype(x.get_dtype()), 2**bits - 1
    levels = _levels(alpha, bits, dtype)
    thresholds = levels if rounding == Rounding.ceil else _middles(levels, dtype)
    load, load_level, load_threshold = x.make_loader(), levels.make_loader(), thresholds.make_loader()

    def output(index):
        number = ops.to_dtype(load(index), wide)
        channel = 0 if channel_dim is None else index[channel_dim]
        y = ops.to_dtype(load_level([channel, 0]), wide)
        for k in range(q):
            zero = rounding == Rounding.hwgq and k == 0
            threshold = ops.constant(0.0, wide) if zero else ops.to_dtype(load_threshold([channel, k]), wide)
            y = ops.where(ops.gt(number, threshold), ops.to_dtype(load_level([channel, k + 1]), wide), y)
        return ops.to_dtype(ops.where(ops.ne(number, number), number, y), dtype)

    return Pointwise.create(device=x.get_device(), dtype=dtype, inner_fn=output, ranges=x.get_size())


def where_beside_alpha(closed: torch.Tensor, value: float, other: torch.Tensor) -> torch.Tensor:
    """torch.where, for a `closed` that alpha is among what it is made of."""
    return torch.where(closed, value, other)


class _BesideAlpha(Pointwise):
    """Inductor stores a result of which there are several readers if it is made of more than a few tensors, small ones
    not excepted. Without alpha they are those of the derivative of nn.ReLU, and so is the choice."""

    def num_reads(self) -> int:
        return super().num_reads() - 1


@lowering.register_lowering(where_beside_alpha, type_promotion_kind=None)
def _where_beside_alpha(closed, value, other):
    dtype, load_closed, load = other.get_dtype(), closed.make_loader(), other.make_loader()

    def output(index):
        return ops.where(load_closed(index), ops.constant(value, dtype), load(index))

    return _BesideAlpha.create(device=other.get_device(), dtype=dtype, inner_fn=output, ranges=other.get_size())


@lowering.register_lowering(_FORWARD, type_promotion_kind=None)
def _forward(x, alpha, bits, rounding, mask, codes, channel_dim):
    if mask != MaskKind.nothing or codes or bits > INDUCTOR_BITS:
        return _call(_FORWARD, x, alpha, bits, rounding, mask, codes, channel_dim)
    nothing = (lowering.full([0], 0, dtype=torch.uint8, device=x.get_device()) for _ in range(2))
    return _staircase(x, alpha, bits, rounding, channel_dim), *nothing


@lowering.register_lowering(_CODES, type_promotion_kind=None)
def _codes(*args):
    return _call(_CODES, *args)


def _call(op, *args):
    """A call of the op, with the strides that it was traced with: what is saved lies in their order."""
    seen = V.graph.current_node.meta.get("eager_input_vals")
    if seen is not None:
        args, _ = lowering.constrain_to_fake_tensors(args, {}, seen[0], {})
    return lowering.fallback_handler(op)(*args)
