"""The derivative of qrelu in Python: for custom STEs, and for all STEs without the native library.

An op carries its derivative in its Autograd kernel, because torch.export keeps ops but no autograd.Function.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from ._ops import KERNELS, _library, _qrelu_without_grad, _qrelu_without_grad_, native, ops
from ._torch_internals import (
    OpOverload,
    apply_in_kernel,
    below_autograd,
    below_autograd_with_derivatives,
    has_tangent,
    in_functorch_kernel,
    redispatch_below_views,
    suggest_memory_format,
)
from ._types import BUILT_IN, AlphaGrad, MaskKind, Rounding, Ste, parse, wide_dtype
from .ste import Saved, check_inplace, saved, ste_of


def needs_grad(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which of the tensors need a gradient."""
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)


def refuse_forward_mode(*tensors: Tensor | None, op: str = "qrelu") -> None:
    if any(t is not None and has_tangent(t) for t in tensors):
        raise NotImplementedError(f"{op} has no forward-mode derivative (jvp); use reverse mode (backward)")


# Cached, as enums are slow to look up beside a kernel on a small tensor.
_saved = functools.cache(saved)


@functools.cache
def _numbers(ste: str, rounding: str | int, alpha_grad: str | int) -> tuple[int | str, int, int]:
    """The options as `Settings` has them."""
    return (
        Ste[ste].value if ste in BUILT_IN else ste,
        parse("rounding", rounding, Rounding).value,
        parse("alpha_grad", alpha_grad, AlphaGrad).value,
    )


class Settings(NamedTuple):
    """What a call of qrelu computes and which gradients it needs: the last arguments of `qrelu_backward`.

    ste: the number of a built-in STE, the name of a custom one.
    """

    bits: int
    ste: int | str
    rounding: int
    alpha_grad: int
    alpha_scale: float
    channel_dim: int | None
    need_grad_x: bool
    need_grad_alpha: bool

    @classmethod
    def of(
        cls, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim, need_grad_x=False, need_grad_alpha=False
    ) -> Settings:
        """From the arguments of an op, with options by name or number."""
        numbers = _numbers(ste_of(ste).name, rounding, alpha_grad)
        return cls(bits, *numbers, alpha_scale, channel_dim, need_grad_x, need_grad_alpha)

    def saved(self) -> Saved:
        return _saved(ste_of(self.ste).needs, self.rounding, self.alpha_grad, self.need_grad_x, self.need_grad_alpha)

    def reading_codes(self) -> Settings:
        """Settings under which the backward reads the gate from the codes: "exact". Its grad_alpha is unused."""
        return self._replace(
            alpha_grad=AlphaGrad.exact.value, alpha_scale=1.0, channel_dim=None, need_grad_x=True, need_grad_alpha=True
        )

    @property
    def backward_op(self) -> OpOverload:
        return ops.qrelu_backward.default if isinstance(self.ste, int) else ops.qrelu_backward_custom.default


def qrelu_with_derivative(x, alpha, *options, forward=ops.qrelu_forward.default):
    """The Autograd kernel of qrelu. forward: the op that computes what is saved."""
    settings = Settings.of(*options, *needs_grad(x, alpha))
    refuse_forward_mode(x, alpha)
    if settings.need_grad_x or settings.need_grad_alpha:
        return apply_in_kernel(_QReLU, x, alpha, settings, options, forward)
    if in_functorch_kernel():
        return below_autograd_with_derivatives(ops.qrelu_custom.default, x, alpha, *options)
    return _qrelu_without_grad(x, alpha, *options)


def qrelu_with_derivative_(x, alpha, bits, ste, rounding, alpha_grad, *rest, forward=ops.qrelu_forward.default):
    """The Autograd kernel of qrelu_. With a derivative torch's copy_ writes: it knows what must not be written to."""
    need_grad_x, need_grad_alpha = needs_grad(x, alpha)
    options = (bits, ste, rounding, alpha_grad, *rest)
    if need_grad_x or need_grad_alpha:
        check_inplace(ste, rounding, alpha_grad, need_grad_x, need_grad_alpha)
    elif not in_functorch_kernel():
        refuse_forward_mode(x, alpha)
        return _qrelu_without_grad_(x, alpha, *options)
    return x.copy_(qrelu_with_derivative(x, alpha, *options, forward=forward))


class _QReLU(torch.autograd.Function):
    """options: the arguments of the op from which `settings` was parsed."""

    @staticmethod
    def forward(ctx, x, alpha, settings, options, forward):
        kind, need_codes, need_x = settings.saved()
        y, mask, codes = forward(x, alpha, settings.bits, settings.rounding, kind, need_codes, settings.channel_dim)
        if in_functorch_kernel():  # outer transforms need a y with a derivative
            y = below_autograd_with_derivatives(ops.qrelu_custom.default, x, alpha, *options)
        ctx.settings, ctx.memory_format = settings, suggest_memory_format(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            alpha if need_x else None,
            x if need_x else None,
            mask if kind != MaskKind.nothing else None,
            codes if need_codes else None,
        )
        return y

    @staticmethod
    def backward(ctx, grad_y):
        if grad_y is None:
            return (None,) * 5
        return *backward_from_saved(grad_y, *ctx.saved_tensors, ctx.settings, ctx.memory_format), *(None,) * 3


def backward_from_saved(
    grad_y: Tensor,
    alpha: Tensor | None,
    x: Tensor | None,
    mask: Tensor | None,
    codes: Tensor | None,
    settings: Settings,
    memory_format: torch.memory_format,
) -> tuple[Tensor | None, Tensor | None]:
    """(grad_x, grad_alpha), None if not needed, by the op, which has a derivative of its own."""
    if settings.ste == Ste.identity and not settings.need_grad_alpha:
        return grad_y, None
    grad_y = grad_y.contiguous(memory_format=memory_format)
    grad_x, grad_alpha = settings.backward_op(grad_y, alpha, x, mask, codes, *settings)
    return grad_x if settings.need_grad_x else None, grad_alpha if settings.need_grad_alpha else None


def _backward_autograd(grad_y, alpha, x, mask, codes, *options):
    """qrelu_backward of any STE, with its own derivative."""
    tensors, settings = (grad_y, alpha, x, mask, codes), Settings.of(*options)
    if any(needs_grad(*tensors)):
        return apply_in_kernel(_QReLUBackward, *tensors, settings)
    return _backward_below(*tensors, settings)


def _backward_below(grad_y, alpha, x, mask, codes, settings):
    arguments = (grad_y, alpha, x, mask, codes, *settings)
    if in_functorch_kernel():
        return below_autograd_with_derivatives(settings.backward_op, *arguments)
    with below_autograd():
        ste = ste_of(settings.ste)
        if ste.name in BUILT_IN:
            return settings.backward_op(*arguments)
        if ste.needs == "codes" and x is None:
            return _backward_from_slopes(grad_y, mask, codes, settings)
        if ste.triton is None:
            return reference.qrelu_backward(*arguments)
        return settings.backward_op(*arguments)


def _backward_from_slopes(grad_y, mask, codes, settings):
    """qrelu_backward of an STE that needs the codes: its slope of each code, and alpha's sum, which no STE enters."""
    grad_x, grad_alpha = grad_y.new_empty(0), grad_y.new_empty(0, dtype=wide_dtype(grad_y.dtype))
    if settings.need_grad_x:
        grad_x = ops.qrelu_backward_from_codes.default(grad_y, codes, settings.bits, settings.ste)
    if settings.need_grad_alpha:
        of_alpha = settings._replace(ste=Ste.identity.value, need_grad_x=False)
        grad_alpha = of_alpha.backward_op(grad_y, None, None, mask, codes, *of_alpha)[1]
    return grad_x, grad_alpha


class _QReLUBackward(torch.autograd.Function):
    """qrelu_backward as a function of grad_y. If alpha is fixed and x not saved it is linear: its own derivative."""

    @staticmethod
    def forward(ctx, grad_y, alpha, x, mask, codes, settings):
        grad_x, grad_alpha = _backward_below(grad_y, alpha, x, mask, codes, settings)
        ctx.memory_format, ctx.settings = suggest_memory_format(grad_y), settings
        ctx.linear = x is None and not settings.need_grad_alpha
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask, codes)
        if ctx.linear:
            ctx.mark_non_differentiable(grad_alpha)
        return grad_x, grad_alpha

    @staticmethod
    def backward(ctx, grad_grad_x, grad_grad_alpha):
        settings = ctx.settings
        if not ctx.linear:
            raise NotImplementedError(
                "qrelu has a second derivative only if alpha is fixed and x is not saved for backward, got "
                f"ste={ste_of(settings.ste).name!r}, alpha_grad={AlphaGrad(settings.alpha_grad).name!r}, "
                f"alpha learned: {settings.need_grad_alpha}"
            )
        if grad_grad_x is None:
            return (None,) * 6
        mask, codes = ctx.saved_tensors
        grad_grad_y, _ = backward_from_saved(grad_grad_x, None, None, mask, codes, settings, ctx.memory_format)
        return grad_grad_y, *(None,) * 5


_library.impl("qrelu_custom", qrelu_with_derivative, "Autograd")
_library.impl("qrelu_custom_", qrelu_with_derivative_, "Autograd")
_library.impl("qrelu_backward_custom", _backward_autograd, "Autograd")
for _name in set(KERNELS) - {"qrelu_backward", "qrelu_backward_custom", "hadamard"} | {"qrelu_backward_from_codes"}:
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _bump_version(keyset, x, *args):
    """What torch does for its own in-place ops: a node that saved x for backward must notice the write."""
    result = redispatch_below_views(ops.qrelu_forward_.default, keyset, x, *args)
    torch.autograd.graph.increment_version(x)
    return result


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
        if x.size(0):  # the samples are those of one mapped x
            alpha_scale = reference.number_of_scale(alpha_scale, x[0], bits)
        if channel_dim is not None and channel_dim >= 0:
            channel_dim += 1
        return op(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim), 0

    return call


for _name in ("qrelu", "qrelu_", "qrelu_custom", "qrelu_custom_", "qrelu_packed", "qrelu_packed_"):
    torch.library.register_vmap(f"coarsegrad::{_name}", _vmap(getattr(ops, _name).default), lib=_library)


if native is None:
    _library.impl("qrelu", qrelu_with_derivative, "Autograd")
    _library.impl("qrelu_", qrelu_with_derivative_, "Autograd")
    _library.impl("qrelu_backward", _backward_autograd, "Autograd")
