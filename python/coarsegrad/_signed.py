"""The derivatives of qsigned and hadamard.

With a fixed or dynamic alpha the gradient is a select: by the saved bits L[-p] <= x <= L[p], or of everything. With a
dynamic alpha nothing is outside.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._autograd import needs_grad, refuse_forward_mode
from ._checks import check_option
from ._ops import _library, ops
from ._torch_internals import (
    apply_in_kernel,
    below_autograd,
    below_autograd_with_derivatives,
    in_functorch_kernel,
    suggest_memory_format,
)
from ._types import SIGNED_ALPHA_GRADS, SIGNED_STES, AlphaGrad, Rounding, Ste
from .reference import signed_scale


class SignedSettings(NamedTuple):
    """What a call of qsigned computes and which gradients it needs: the last arguments of `qsigned_backward`."""

    bits: int
    clipped: bool
    alpha_grad: int
    alpha_scale: float
    channel_dim: int | None
    need_grad_x: bool
    need_grad_alpha: bool

    @classmethod
    def of(
        cls, x: Tensor, alpha: Tensor | None, bits: int, ste: str, alpha_grad: str, alpha_scale: float, channel_dim
    ) -> SignedSettings:
        """From the arguments of the op."""
        check_option("ste", ste, SIGNED_STES)
        check_option("alpha_grad", alpha_grad, SIGNED_ALPHA_GRADS)
        clipped = ste == "clipped" and alpha is not None
        return cls(bits, clipped, AlphaGrad[alpha_grad].value, alpha_scale, channel_dim, *needs_grad(x, alpha))

    @property
    def saves_x(self) -> bool:
        return self.need_grad_alpha and self.alpha_grad == AlphaGrad.chain

    @property
    def saves_codes(self) -> bool:
        return self.need_grad_alpha and not self.saves_x

    @property
    def saves_mask(self) -> bool:
        return self.clipped and self.need_grad_x and not self.saves_x


def qsigned_with_derivative(
    x, alpha, bits, group, ste, alpha_grad, alpha_scale, channel_dim, forward=ops.qsigned_forward.default
):
    """The Autograd kernel of qsigned. forward: the op that computes what is saved."""
    settings = SignedSettings.of(x, alpha, bits, ste, alpha_grad, alpha_scale, channel_dim)
    refuse_forward_mode(x, alpha, op="qsigned")
    options = (bits, group, ste, alpha_grad, alpha_scale, channel_dim)
    if settings.need_grad_x or settings.need_grad_alpha:
        return apply_in_kernel(_QSigned, x, alpha, group, settings, options, forward)
    if in_functorch_kernel():
        return below_autograd_with_derivatives(ops.qsigned.default, x, alpha, *options)
    with below_autograd():
        return _without_grad(x, alpha, *options)


def _without_grad(x, alpha, bits, group, ste, alpha_grad, alpha_scale, channel_dim):
    check_option("ste", ste, SIGNED_STES)
    check_option("alpha_grad", alpha_grad, SIGNED_ALPHA_GRADS)
    return ops.qsigned_forward.default(x, alpha, bits, group, False, False, channel_dim)[0]


class _QSigned(torch.autograd.Function):
    """options: the arguments of the op from which `settings` was made."""

    @staticmethod
    def forward(ctx, x, alpha, group, settings, options, forward):
        y, _, mask, codes = forward(
            x, alpha, settings.bits, group, settings.saves_mask, settings.saves_codes, settings.channel_dim
        )
        if in_functorch_kernel():  # outer transforms need a y with a derivative
            y = below_autograd_with_derivatives(ops.qsigned.default, x, alpha, *options)
        save_for_backward(ctx, settings, x, alpha, mask, codes)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return *backward_from_saved(ctx, grad_y), *(None,) * 4


def save_for_backward(ctx, settings: SignedSettings, x, alpha, mask, codes) -> None:
    """Have the node of a qsigned save what its gradients need."""
    # Without a mask dy passes as it is, in any layout.
    ctx.settings, ctx.memory_format = settings, suggest_memory_format(x)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        alpha if settings.saves_x else None,
        x if settings.saves_x else None,
        mask if settings.saves_mask else None,
        codes if settings.saves_codes else None,
    )


def backward_from_saved(ctx, grad_y: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(grad_x, grad_alpha) of a node that `save_for_backward` prepared."""
    alpha, x, mask, codes = ctx.saved_tensors
    settings = ctx.settings
    if grad_y is None:
        return None, None
    if not settings.need_grad_alpha:
        return (_select(grad_y.contiguous(memory_format=ctx.memory_format), mask) if settings.clipped else grad_y), None
    dense = grad_y.contiguous(memory_format=ctx.memory_format)
    grad_x, grad_alpha = ops.qsigned_backward.default(dense, alpha, x, mask, codes, *settings)
    return grad_x if settings.need_grad_x else None, grad_alpha


def _select(grad_y: Tensor, mask: Tensor) -> Tensor:
    """dy where the mask is 1. What a clipped ReLU does with its mask, second derivative included."""
    rest = (Rounding.nearest.value, AlphaGrad.exact.value, 1.0, None, True, False)
    return ops.qrelu_backward.default(grad_y, None, None, mask, None, 1, Ste.clipped_relu.value, *rest)[0]


def _backward_autograd(*arguments):
    if any(needs_grad(*arguments[:3])):
        return apply_in_kernel(_QSignedBackward, *arguments)
    return _backward_below(*arguments)


def _backward_below(*arguments):
    if in_functorch_kernel():
        return below_autograd_with_derivatives(ops.qsigned_backward.default, *arguments)
    with below_autograd():
        return ops.qsigned_backward.default(*arguments)


class _QSignedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        return _backward_below(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("qsigned has a second derivative only if alpha is not learned")


_library.impl("qsigned", qsigned_with_derivative, "Autograd")
_library.impl("qsigned", _without_grad, "CompositeExplicitAutograd")
_library.impl("qsigned_packed", _without_grad, "CompositeExplicitAutograd")
_library.impl("qsigned_backward", _backward_autograd, "Autograd")


def _hadamard_autograd(x, size):
    if any(needs_grad(x)):
        return apply_in_kernel(_Hadamard, x, size)
    return _hadamard_below(x, size)


def _hadamard_below(x, size):
    if in_functorch_kernel():
        return below_autograd_with_derivatives(ops.hadamard.default, x, size)
    with below_autograd():
        return ops.hadamard.default(x, size)


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size):
        ctx.size = size
        return _hadamard_below(x, size)

    @staticmethod
    def backward(ctx, grad_out):
        return ops.hadamard.default(grad_out, ctx.size), None


_library.impl("hadamard", _hadamard_autograd, "Autograd")


# ------------------------------------------------------------------------------------------------ vmap


def _vmap(op):
    def call(info, in_dims, x, alpha, bits, group, ste, alpha_grad, alpha_scale, channel_dim):
        x_dim, alpha_dim = in_dims[:2]
        if alpha_dim is not None:
            raise NotImplementedError(
                "vmap over alpha is not supported by qsigned; use one alpha per channel (channel_dim)"
            )
        x = x.movedim(x_dim, 0)
        if alpha is None and x.dim() == 1:
            raise ValueError("x must have at least one dimension for a dynamic alpha, got a 0-d tensor")
        if x.size(0):  # the samples are those of one mapped x
            alpha_scale = signed_scale(alpha_scale, x[0], bits)
        if channel_dim is not None and channel_dim >= 0:
            channel_dim += 1
        return op(x, alpha, bits, group, ste, alpha_grad, alpha_scale, channel_dim), 0

    return call


for _name in ("qsigned", "qsigned_packed"):
    torch.library.register_vmap(f"coarsegrad::{_name}", _vmap(getattr(ops, _name).default), lib=_library)


def _vmap_hadamard(info, in_dims, x, size):
    return ops.hadamard.default(x.movedim(in_dims[0], 0), size), 0


torch.library.register_vmap("coarsegrad::hadamard", _vmap_hadamard, lib=_library)
