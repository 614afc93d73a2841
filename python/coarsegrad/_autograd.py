"""The derivative of qrelu in Python: that of every STE where the native library is absent, and of the user's own.

An op carries its derivative itself, in its Autograd kernel: torch.export keeps ops, and no autograd.Function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._ops import KERNELS, _library, _qrelu_without_grad, _qrelu_without_grad_, native, ops
from ._torch_internals import (
    apply_in_kernel,
    below_autograd,
    below_autograd_with_derivatives,
    has_tangent,
    in_functorch_kernel,
    redispatch_below_views,
    suggest_memory_format,
)
from .ste import ALPHA_GRADS, BUILT_IN, check_inplace, get_ste, kept


def wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_forward_mode(*tensors: Tensor) -> None:
    if any(map(has_tangent, tensors)):
        raise NotImplementedError("qrelu has no forward-mode derivative (jvp); use reverse mode (backward)")


def _qrelu_autograd(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    get_ste(ste)
    reference.check_word("alpha_grad", alpha_grad, ALPHA_GRADS)
    refuse_forward_mode(x, alpha)
    config = (bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)
    if wants_grad(x, alpha):
        return apply_in_kernel(_QReLU, x, alpha, (*config, x.requires_grad, alpha.requires_grad))
    if in_functorch_kernel():
        return below_autograd_with_derivatives(ops.qrelu_own.default, x, alpha, *config)
    return _qrelu_without_grad(x, alpha, *config)


def _qrelu_autograd_(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    """Where there is a derivative, torch's copy_ writes: it knows what must not be written to."""
    config = (bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)
    if wants_grad(x, alpha):
        check_inplace(ste, rounding, alpha_grad if alpha.requires_grad else None, x.requires_grad)
    elif not in_functorch_kernel():
        refuse_forward_mode(x, alpha)
        return _qrelu_without_grad_(x, alpha, *config)
    return x.copy_(_qrelu_autograd(x, alpha, *config))


class _QReLU(torch.autograd.Function):
    """config: bits, ste, rounding, alpha_grad, alpha_scale, channel_dim, and whether x and alpha required grad."""

    @staticmethod
    def forward(ctx, x, alpha, config):
        bits, ste, rounding, alpha_grad, _, channel_dim, need_grad_x, need_grad_alpha = config
        mask, codes, keep_x = kept(ste, rounding, alpha_grad if need_grad_alpha else None, need_grad_x)
        y, kept_mask, kept_codes = ops.qrelu_forward.default(x, alpha, bits, rounding, mask, codes, channel_dim)
        if in_functorch_kernel():  # a y that has a derivative for the transforms around this one
            y = below_autograd_with_derivatives(ops.qrelu_own.default, x, alpha, *config[:-2])
        ctx.config, ctx.memory_format = config, suggest_memory_format(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            alpha if keep_x else None,
            x if keep_x else None,
            kept_mask if mask != "nothing" else None,
            kept_codes if codes else None,
        )
        return y

    @staticmethod
    def backward(ctx, grad_y):
        if grad_y is None:
            return None, None, None
        return *backward_from_kept(grad_y, *ctx.saved_tensors, ctx.config, ctx.memory_format), None


def by_codes(config: tuple) -> tuple:
    """The config with which qrelu_backward reads the gate from the codes alone: that of "exact". The sum for alpha that
    comes with it is of no use."""
    return (*config[:3], "exact", 1.0, None, True, True)


def backward_from_kept(
    grad_y: Tensor,
    alpha: Tensor | None,
    x: Tensor | None,
    mask: Tensor | None,
    codes: Tensor | None,
    config: tuple,
    memory_format: torch.memory_format,
) -> tuple[Tensor | None, Tensor | None]:
    """(grad_x, grad_alpha), None for the one not needed, by the op, with its own derivative; config is _QReLU's."""
    ste, need_grad_x, need_grad_alpha = config[1], *config[-2:]
    if ste == "identity" and not need_grad_alpha:
        return grad_y, None
    op = ops.qrelu_backward.default if ste in BUILT_IN else ops.qrelu_backward_own.default
    grad_y = grad_y.contiguous(memory_format=memory_format)
    grad_x, grad_alpha = op(grad_y, alpha, x, mask, codes, *config)
    return grad_x if need_grad_x else None, grad_alpha if need_grad_alpha else None


def _backward_autograd(*args):
    """qrelu_backward, of whatever STE, with its own derivative."""
    if wants_grad(*args[:5]):
        return apply_in_kernel(_QReLUBackward, *args[:5], args[5:])
    return _backward_below(*args)


def _backward_below(*args):
    if in_functorch_kernel():
        return below_autograd_with_derivatives(ops.qrelu_backward_own.default, *args)
    with below_autograd():
        ste, x, codes = get_ste(args[6]), args[2], args[4]
        if ste.name in BUILT_IN:
            return ops.qrelu_backward.default(*args)
        if ste.needs == "codes" and x is None:
            return _backward_by_slopes(args[0], args[3], codes, *args[5:])
        if ste.triton is None:
            return reference.qrelu_backward(*args)
        return ops.qrelu_backward_own.default(*args)


def _backward_by_slopes(grad_y, mask, codes, bits, ste, *rest):
    """qrelu_backward of an STE that needs the codes: its slope of each, and alpha's sums, which no STE is part of."""
    *rule, need_grad_x, need_grad_alpha = rest
    grad_x, grad_alpha = grad_y.new_empty(0), grad_y.new_empty(0, dtype=reference.wide_dtype(grad_y.dtype))
    if need_grad_x:
        grad_x = ops.times_slopes_of.default(grad_y, codes, bits, ste)
    if need_grad_alpha:
        arguments = (grad_y, None, None, mask, codes, bits, "identity", *rule)
        grad_alpha = ops.qrelu_backward.default(*arguments, False, True)[1]
    return grad_x, grad_alpha


class _QReLUBackward(torch.autograd.Function):
    """qrelu_backward as a function of grad_y: linear, hence its own derivative, where alpha is fixed and x not kept."""

    @staticmethod
    def forward(ctx, grad_y, alpha, x, mask, codes, config):
        grad_x, grad_alpha = _backward_below(grad_y, alpha, x, mask, codes, *config)
        ctx.memory_format, ctx.config = suggest_memory_format(grad_y), config
        ctx.linear = x is None and not config[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask, codes)
        if ctx.linear:
            ctx.mark_non_differentiable(grad_alpha)
        return grad_x, grad_alpha

    @staticmethod
    def backward(ctx, grad_grad_x, grad_grad_alpha):
        if not ctx.linear:
            raise NotImplementedError(
                "qrelu has a second derivative only where alpha is fixed and the backward does not need x; here "
                f"ste={ctx.config[1]!r}, alpha_grad={ctx.config[3]!r}, alpha learned: {ctx.config[-1]}"
            )
        if grad_grad_x is None:
            return (None,) * 6
        mask, codes = ctx.saved_tensors
        grad_grad_y, _ = backward_from_kept(grad_grad_x, None, None, mask, codes, ctx.config, ctx.memory_format)
        return grad_grad_y, *(None,) * 5


_library.impl("qrelu_own", _qrelu_autograd, "Autograd")
_library.impl("qrelu_own_", _qrelu_autograd_, "Autograd")
_library.impl("qrelu_backward_own", _backward_autograd, "Autograd")
for _name in set(KERNELS) - {"qrelu_backward", "qrelu_backward_own"} | {"times_slopes_of"}:
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _bump_version(keyset, x, *args):
    """What torch does for an in-place op of its own: whoever kept x for a backward must notice the write."""
    kept_state = redispatch_below_views(ops.qrelu_forward_.default, keyset, x, *args)
    torch.autograd.graph.increment_version(x)
    return kept_state


_library.impl("qrelu_forward_", _bump_version, "ADInplaceOrView", with_keyset=True)

# ------------------------------------------------------------------------------------------------ vmap


def _vmap(op):
    def call(info, in_dims, x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
        x_dim, alpha_dim = in_dims[:2]
        if alpha_dim is not None:
            raise NotImplementedError(
                "vmap over alpha is not supported by qrelu; use one alpha per channel (channel_dim)"
            )
        x = x.movedim(x_dim, 0)
        if x.size(0):  # a sample is that of one of them
            alpha_scale = reference.number_of_scale(alpha_scale, x[0], bits)
        if channel_dim is not None and channel_dim >= 0:
            channel_dim += 1
        return op(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim), 0

    return call


for _name in ("qrelu", "qrelu_", "qrelu_own", "qrelu_own_"):
    torch.library.register_vmap(f"coarsegrad::{_name}", _vmap(getattr(ops, _name).default), lib=_library)


if native is None:
    _library.impl("qrelu", _qrelu_autograd, "Autograd")
    _library.impl("qrelu_", _qrelu_autograd_, "Autograd")
    _library.impl("qrelu_backward", _backward_autograd, "Autograd")
