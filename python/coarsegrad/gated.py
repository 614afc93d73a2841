"""The gated product of a transformer's MLP, act(gate) * up, saving gate and up alone.

One op, and opaque to compilers: what its backward computes again has the bits of the forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _ops
from ._autograd import needs_grad
from ._checks import check_option, check_x
from ._torch_internals import below_autograd, in_functorch_kernel
from .functional import overridable
from .packing import record_product

_aten = torch.ops.aten
_op = _ops.ops.gated_product.default

ActivationName: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu", "identity"]
ACTIVATIONS = get_args(ActivationName)


class _Activation(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # of (dy, x)


_TABLE: dict[str, _Activation] = {
    "silu": _Activation(F.silu, _aten.silu_backward),
    "gelu": _Activation(F.gelu, _aten.gelu_backward),
    "gelu_tanh": _Activation(
        functools.partial(F.gelu, approximate="tanh"), functools.partial(_aten.gelu_backward, approximate="tanh")
    ),
    "relu": _Activation(F.relu, lambda dy, x: _aten.threshold_backward(dy, x, 0)),
    "identity": _Activation(lambda x: x, lambda dy, x: dy),
}


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    check_option("activation", activation, ACTIVATIONS)
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"up must have gate's shape, dtype and device, {list(gate.shape)} {gate.dtype} on {gate.device}, got"
            f" {list(up.shape)} {up.dtype} on {up.device}"
        )


def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    _check(gate, up, activation)
    return _TABLE[activation].forward(gate) * up


def _backward(grad_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    act = _TABLE[activation]
    grad_gate = act.backward(grad_out * up, gate)
    return grad_gate, grad_out * act.forward(gate)


_ops._library.impl("gated_product", _forward, "CompositeExplicitAutograd")
_ops._library.impl("gated_product_backward", _backward, "CompositeExplicitAutograd")
_ops._fake("gated_product")(_forward)
_ops._fake("gated_product_backward")(_backward)


def _autograd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if in_functorch_kernel():  # which promises nothing about saved tensors
        return _forward(gate, up, activation)
    if any(needs_grad(gate, up)):
        return _GatedProduct.apply(gate, up, activation)
    with below_autograd():
        return _op(gate, up, activation)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return _op(gate, up, activation)

    @staticmethod
    def backward(ctx, grad_out):
        return *_ops.ops.gated_product_backward.default(grad_out, *ctx.saved_tensors, ctx.activation), None


def _backward_autograd(grad_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, ...]:
    if any(needs_grad(grad_out, gate, up)):  # by torch's own derivatives
        gate, up = (t if t.requires_grad else t.detach().requires_grad_() for t in (gate, up))
        product = _forward(gate, up, activation)
        return torch.autograd.grad(product, (gate, up), grad_out, create_graph=True, materialize_grads=True)
    with below_autograd():
        return _ops.ops.gated_product_backward.default(grad_out, gate, up, activation)


_ops._library.impl("gated_product", _autograd, "Autograd")
_ops._library.impl("gated_product_backward", _backward_autograd, "Autograd")


def _vmap(info, in_dims, *arguments):
    *tensors, activation = arguments
    tensors = [
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, in_dims)
    ]
    return tensors, activation


@functools.partial(torch.library.register_vmap, "coarsegrad::gated_product", lib=_ops._library)
def _(info, in_dims, *arguments):
    tensors, activation = _vmap(info, in_dims, *arguments)
    return _op(*tensors, activation), 0


@functools.partial(torch.library.register_vmap, "coarsegrad::gated_product_backward", lib=_ops._library)
def _(info, in_dims, *arguments):
    tensors, activation = _vmap(info, in_dims, *arguments)
    return _ops.ops.gated_product_backward.default(*tensors, activation), (0, 0)


@overridable
def gated_product(gate: Tensor, up: Tensor, activation: ActivationName = "silu") -> Tensor:
    """The product of a gated MLP: y = act(gate) * up.

    activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), "relu" (ReGLU), or "identity", for factors that are
        activations already (dReLU: the product of two outputs of `qrelu`).
    gate, up: of one shape, floating dtype and device. act(gate) is rounded to that dtype before the product, as in the
        models of transformers.

    Output and gradients are bit for bit those of `act(gate) * up`.

    Saved for backward: gate and up; act(gate) is computed again. Inside `packed_activations`, if both are outputs of
    `qsigned` or `qrelu`, their codes alone, and a later layer saves the product as these same codes.

    Raises TypeError or ValueError with the argument's name, what was got and what was wanted.

    Sources: Shazeer 2020, arXiv 2002.05202 (gated units); Song et al. 2024, arXiv 2406.05955 (dReLU).
    """
    check_x(gate, "gate")
    check_x(up, "up")
    _check(gate, up, activation)
    product = _op(gate, up, activation)
    if not torch.compiler.is_compiling():
        record_product(functools.partial(_op, activation=activation), gate, up, product)
    return product
