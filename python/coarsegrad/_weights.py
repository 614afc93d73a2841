"""The kernels of the weight quantizer, made of `weight_scale` and the signed staircase, and its derivative: the
identity, for which nothing is saved."""

from __future__ import annotations

import torch
from torch import Tensor

from ._autograd import needs_grad, refuse_forward_mode
from ._checks import check_channel_dim, check_weight
from ._ops import _library, ops
from ._torch_internals import (
    apply_in_kernel,
    below_autograd,
    below_autograd_with_derivatives,
    in_functorch_kernel,
    suggest_memory_format,
)
from ._types import CODE_WIDTH, top_level
from .reference import from_memory_order, per_element, unpack


def _weight_codes(weight: Tensor, bits: int, channel_dim: int | None) -> tuple[Tensor, Tensor]:
    channel_dim = check_weight(weight, bits, channel_dim)
    scale = ops.weight_scale.default(weight, bits, channel_dim)
    memory_format = suggest_memory_format(weight)
    codes = torch.empty_like(weight, dtype=torch.int8, memory_format=memory_format)
    if bits == 1:
        return codes.fill_(1).masked_fill_(weight < 0, -1), scale
    packed = _staircase(weight, scale, bits, channel_dim, codes=True)[3]
    found = from_memory_order(unpack(packed, CODE_WIDTH[bits], weight.numel()), weight.shape, memory_format)
    codes.copy_(found.to(torch.int8) - top_level(bits))
    return codes.masked_fill_(per_element(scale.isnan(), weight, channel_dim), 0), scale


def _qweight(weight: Tensor, bits: int, channel_dim: int | None) -> Tensor:
    channel_dim = check_weight(weight, bits, channel_dim)
    scale = ops.weight_scale.default(weight, bits, channel_dim)
    if bits == 1:
        of_each = per_element(scale, weight, channel_dim).to(weight.dtype)
        out = torch.empty_like(weight, memory_format=suggest_memory_format(weight))
        return torch.where(weight < 0, -of_each, of_each, out=out)
    y = _staircase(weight, scale, bits, channel_dim, codes=False)[0]
    bad = scale.isnan()
    if bad.device.type == "cpu" and not bad.any():
        return y
    return y.masked_fill_(per_element(bad, weight, channel_dim), torch.nan)


def _staircase(weight: Tensor, scale: Tensor, bits: int, channel_dim: int | None, codes: bool) -> tuple[Tensor, ...]:
    """That of alpha = scale. A scale of 0 or NaN is 1: the former's weights are so small that their codes are 0."""
    alpha = torch.where(scale > 0, scale, 1.0).reshape(-1)
    return ops.qsigned_forward.default(weight, alpha, bits, None, False, codes, channel_dim)


def _qweight_below(weight, bits, channel_dim):
    if in_functorch_kernel():
        return below_autograd_with_derivatives(ops.qweight.default, weight, bits, channel_dim)
    with below_autograd():
        return ops.qweight.default(weight, bits, channel_dim)


def _qweight_autograd(weight, bits, channel_dim):
    refuse_forward_mode(weight, op="qweight")
    if any(needs_grad(weight)):
        return apply_in_kernel(_StraightThrough, weight, bits, channel_dim)
    return _qweight_below(weight, bits, channel_dim)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bits, channel_dim):
        return _qweight_below(weight, bits, channel_dim)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y, None, None


_library.impl("qweight", _qweight, "CompositeExplicitAutograd")
_library.impl("qweight", _qweight_autograd, "Autograd")
_library.impl("weight_codes", _weight_codes, "CompositeExplicitAutograd")
_library.impl("weight_codes", torch.library.fallthrough_kernel, "Autograd")


# ------------------------------------------------------------------------------------------------ vmap


def _vmap(op):
    """Channels of a sample are channels of one tensor."""

    def call(info, in_dims, weight, bits, channel_dim):
        weight = weight.movedim(in_dims[0], 0)
        if channel_dim is None:
            outs = op(weight, bits, 0)
            return outs, 0 if isinstance(outs, Tensor) else (0, 0)
        channel_dim = check_channel_dim(channel_dim, weight.dim() - 1, "weight")
        by_channel = weight.movedim(channel_dim + 1, 1)
        outs = op(by_channel.flatten(0, 1), bits, 0)

        def of_samples(out: Tensor) -> Tensor:
            out = out.unflatten(0, by_channel.shape[:2])
            return out.movedim(1, channel_dim + 1) if out.dim() == weight.dim() else out

        if isinstance(outs, Tensor):
            return of_samples(outs), 0
        return tuple(map(of_samples, outs)), (0, 0)

    return call


for _name in ("weight_scale", "weight_codes", "qweight"):
    torch.library.register_vmap(f"coarsegrad::{_name}", _vmap(getattr(ops, _name).default), lib=_library)
