"""The kernels of the weight quantizer, made of `weight_scale` and the signed staircase, and its derivative: the
identity, for which nothing is saved, or a select by |w| <= limit, for which w and the limits are."""

from __future__ import annotations

import torch
from torch import Tensor

from ._autograd import needs_grad, refuse_forward_mode
from ._checks import check_channel_dim, check_option, check_weight
from ._ops import _library, ops
from ._torch_internals import (
    apply_in_kernel,
    below_autograd,
    below_autograd_with_derivatives,
    in_functorch_kernel,
    suggest_memory_format,
)
from ._types import CODE_WIDTH, WEIGHT_STES, top_level
from .reference import from_memory_order, per_element, unpack


def _weight_codes(weight: Tensor, bits: int, channel_dim: int | None) -> tuple[Tensor, Tensor]:
    channel_dim = check_weight(weight, bits, channel_dim)
    scale = ops.weight_scale.default(weight, bits, channel_dim)
    memory_format = suggest_memory_format(weight)
    codes = torch.empty_like(weight, dtype=torch.int8, memory_format=memory_format)
    if bits == 1:
        return codes.copy_(weight < 0).mul_(-2).add_(1), scale
    packed = _staircase(weight, scale, bits, channel_dim, codes=True)[3]
    found = from_memory_order(unpack(packed, CODE_WIDTH[bits], weight.numel()), weight.shape, memory_format)
    codes.copy_(found.to(torch.int8) - top_level(bits))
    return codes.masked_fill_(per_element(scale.isnan(), weight, channel_dim), 0), scale


def _qweight(weight: Tensor, bits: int, channel_dim: int | None, ste: str = "identity") -> Tensor:
    return _with_scale(weight, bits, channel_dim, ste)[0]


def _qweight_forward(weight: Tensor, bits: int, channel_dim: int | None, ste: str) -> tuple[Tensor, Tensor]:
    y, scale = _with_scale(weight, bits, channel_dim, ste)
    return y, _limit(scale, weight.dtype, bits, ste)


def _with_scale(weight: Tensor, bits: int, channel_dim: int | None, ste: str) -> tuple[Tensor, Tensor]:
    check_option("ste", ste, WEIGHT_STES)
    channel_dim = check_weight(weight, bits, channel_dim)
    scale = ops.weight_scale.default(weight, bits, channel_dim)
    return _quantized(weight, scale, bits, channel_dim), scale


def _limit(scale: Tensor, dtype: torch.dtype, bits: int, ste: str) -> Tensor:
    """The largest magnitude with a gradient: the top level, for trust and half a step. Infinity for a scale of 0."""
    top = scale if bits == 1 else scale * top_level(bits)
    half = scale if bits == 1 else scale / 2
    limit = top.to(dtype).to(scale.dtype) + (half if ste == "trust" else 0)
    return torch.where(scale == 0, torch.inf, limit)


def _quantized(weight: Tensor, scale: Tensor, bits: int, channel_dim: int | None) -> Tensor:
    if bits == 1:
        of_each = per_element(scale, weight, channel_dim).to(weight.dtype)
        out = torch.empty_like(weight, memory_format=suggest_memory_format(weight))
        # On a CPU torch.where branches at each element, and signs of weights cannot be predicted. -0 + 0 is 0.
        return torch.copysign(of_each, torch.add(weight, 0, out=out), out=out)
    y = _staircase(weight, scale, bits, channel_dim, codes=False)[0]
    bad = scale.isnan()
    if bad.device.type == "cpu" and not bad.any():
        return y
    return y.masked_fill_(per_element(bad, weight, channel_dim), torch.nan)


def _staircase(weight: Tensor, scale: Tensor, bits: int, channel_dim: int | None, codes: bool) -> tuple[Tensor, ...]:
    """That of alpha = scale. A scale of 0 or NaN is 1: the former's weights are so small that their codes are 0."""
    alpha = torch.where(scale > 0, scale, 1.0).reshape(-1)
    return ops.qsigned_forward.default(weight, alpha, bits, None, False, codes, channel_dim)


def _qweight_below(*arguments):
    if in_functorch_kernel():
        return below_autograd_with_derivatives(ops.qweight.default, *arguments)
    with below_autograd():
        return ops.qweight.default(*arguments)


def _qweight_autograd(weight, bits, channel_dim, ste="identity"):
    refuse_forward_mode(weight, op="qweight")
    if any(needs_grad(weight)):
        function = _StraightThrough if ste == "identity" else _Select
        return apply_in_kernel(function, weight, bits, channel_dim, ste)
    return _qweight_below(weight, bits, channel_dim, ste)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        return _qweight_below(*arguments)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y, None, None, None


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bits, channel_dim, ste):
        y, limit = ops.qweight_forward.default(weight, bits, channel_dim, ste)
        if in_functorch_kernel():  # outer transforms need a y with a derivative
            y = below_autograd_with_derivatives(ops.qweight.default, weight, bits, channel_dim, ste)
        ctx.channel_dim = channel_dim
        ctx.save_for_backward(weight, limit)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        weight, limit = (t.detach() for t in ctx.saved_tensors)
        outside = weight.abs().to(limit.dtype) > per_element(limit, weight, ctx.channel_dim)  # false for NaN
        inside = outside.logical_not_().to(grad_y.dtype)
        # torch.where(inside > 0.5, grad_y, 0), but vectorized on a CPU.
        return torch.ops.aten.threshold_backward(grad_y, inside, 0.5), None, None, None


_library.impl("qweight", _qweight, "CompositeExplicitAutograd")
_library.impl("qweight", _qweight_autograd, "Autograd")
_library.impl("qweight_forward", _qweight_forward, "CompositeExplicitAutograd")
_library.impl("qweight_forward", torch.library.fallthrough_kernel, "Autograd")
_library.impl("weight_codes", _weight_codes, "CompositeExplicitAutograd")
_library.impl("weight_codes", torch.library.fallthrough_kernel, "Autograd")


# ------------------------------------------------------------------------------------------------ vmap


def _vmap(op):
    """Channels of a sample are channels of one tensor."""

    def call(info, in_dims, weight, bits, channel_dim, *ste):
        weight = weight.movedim(in_dims[0], 0)
        if channel_dim is None:
            outs = op(weight, bits, 0, *ste)
            return outs, 0 if isinstance(outs, Tensor) else (0, 0)
        channel_dim = check_channel_dim(channel_dim, weight.dim() - 1, "weight")
        by_channel = weight.movedim(channel_dim + 1, 1)
        outs = op(by_channel.flatten(0, 1), bits, 0, *ste)

        def of_samples(out: Tensor) -> Tensor:
            out = out.unflatten(0, by_channel.shape[:2])
            return out.movedim(1, channel_dim + 1) if out.dim() == weight.dim() else out

        if isinstance(outs, Tensor):
            return of_samples(outs), 0
        return tuple(map(of_samples, outs)), (0, 0)

    return call


for _name in ("weight_scale", "weight_codes", "qweight", "qweight_forward"):
    torch.library.register_vmap(f"coarsegrad::{_name}", _vmap(getattr(ops, _name).default), lib=_library)
