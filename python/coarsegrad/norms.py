"""A norm and the signed staircase after it, with the norm's gradient taken from few saved bits.

    n = (x - m) * r                 m: the mean of a row, 0 for RMSNorm;  r: 1 / sqrt(mean((x - m)**2) + eps)
    y = Q(n * weight + bias)

    dn = dy * weight
    dx = r * (dn - mean(dn) - n * mean(dn * n))                    without mean(dn) for RMSNorm
    dweight = sum(dy * n),  dbias = sum(dy)

"exact" saves x and computes n from it. "coarse" takes n at the output, n = (y - bias) / weight, so that y's codes and
one number per row are all that is saved: a coarse gradient in the sense of arXiv 1903.05662, as the derivative of Q is
replaced by 1, and the Jacobian of the norm evaluated at the rounded n.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from . import _ops
from ._checks import check_option, check_x
from ._types import wide_dtype
from .packing import packs_graph, record_codes
from .signed import QSigned

_hadamard = _ops.ops.hadamard.default  # below the checks, which torch.compile refuses in a backward

NormKind: TypeAlias = Literal["rms", "layer"]
NormGradient: TypeAlias = Literal["exact", "coarse"]


def norm_staircase(
    x: Tensor,
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    kind: NormKind,
    gradient: NormGradient,
    staircase: QSigned,
) -> Tensor:
    """The staircase of a norm's output, with the derivative of both.

    x: the norm's input, [..., n]; the norm is over the last dimension.
    output: the norm's output for x, as its module computed it.
    weight, bias: what the module multiplies by and adds, [n], or None.
    eps: as in the module.
    kind: "rms" (nn.RMSNorm) or "layer" (nn.LayerNorm).
    gradient: "exact": that of the norm. "coarse": the norm's Jacobian at the output of the staircase.
    staircase: a `QSigned` with a dynamic alpha.

    Returns staircase(output).

    Saved for backward: "exact": x and two numbers per row (one for RMSNorm). "coarse": the codes of the result, 16 /
    group bits per element, and a number per row. Inside `packed_activations` the layers that read the result share its
    codes.

    Raises TypeError or ValueError with the argument's name, what was got and what was wanted.
    """
    check_x(x)
    check_x(output, "output")
    check_option("kind", kind, get_args(NormKind))
    check_option("gradient", gradient, get_args(NormGradient))
    if not isinstance(staircase, QSigned) or staircase.alpha is not None:
        raise ValueError(f"staircase must be a QSigned with a dynamic alpha, got {staircase!r}")
    if x.shape != output.shape:
        raise ValueError(f"output must have x's shape, {list(x.shape)}, got {list(output.shape)}")
    function = _Exact if gradient == "exact" else _Coarse
    y, codes, alpha = function.apply(x, output.detach(), weight, bias, eps, kind == "layer", staircase)
    record_codes(y, codes, alpha, staircase.bits, staircase.group or x.size(-1))
    return y


def _moments(x: Tensor, eps: float, centred: bool) -> tuple[Tensor | None, Tensor]:
    """(the mean, None unless centred; 1 / the deviation) of each row, wide, [..., 1]."""
    wide = x.to(wide_dtype(x.dtype))
    if not centred:
        return None, torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    return mean, torch.rsqrt(variance + eps)


def _gradients(grad_y: Tensor, n: Tensor, inverse: Tensor, weight: Tensor | None, centred: bool, needs) -> tuple:
    """(dx, dweight, dbias) from dy, n and 1 / the deviation, all wide. needs: of x, weight and bias."""
    need_x, need_weight, need_bias = needs
    rows = tuple(range(grad_y.dim() - 1))
    grad_x = grad_weight = grad_bias = None
    if need_x:
        grad_n = grad_y if weight is None else grad_y * weight.to(grad_y.dtype)
        inner = grad_n - n * (grad_n * n).mean(-1, keepdim=True)
        grad_x = inverse * (inner - grad_n.mean(-1, keepdim=True) if centred else inner)
    if need_weight:
        grad_weight = (grad_y * n).sum(rows)
    if need_bias:
        grad_bias = grad_y.sum(rows)
    return grad_x, grad_weight, grad_bias


class _Norm(torch.autograd.Function):
    """n is what the subclasses find it by; the rest is the same."""

    @staticmethod
    def _forward(ctx, x, output, weight, bias, centred, staircase):
        """(y, its codes, its alphas)"""
        ctx.centred, ctx.dtype, ctx.bias_dtype = centred, x.dtype, None if bias is None else bias.dtype
        ctx.rotation, ctx.settings = staircase.rotation, (staircase.bits, staircase.group or x.size(-1))
        if staircase.rotation is not None:
            output = _hadamard(output, staircase.rotation)
        packs = torch.compiler.is_compiling() and packs_graph()
        forward = _ops.ops.qsigned_forward_packed if packs else _ops.ops.qsigned_forward
        y, alpha, _, codes = forward.default(output, None, *ctx.settings, False, True, None)
        ctx.mark_non_differentiable(codes, alpha)
        return y, codes, alpha

    @staticmethod
    def _backward(ctx, grad_y, n, inverse, weight):
        if ctx.rotation is not None:
            grad_y = _hadamard(grad_y, ctx.rotation)
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
        grad_x, grad_weight, grad_bias = _gradients(grad_y.to(n.dtype), n, inverse, weight, ctx.centred, needs)
        return (
            None if grad_x is None else grad_x.to(ctx.dtype),
            None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(ctx.bias_dtype),
            None,
            None,
            None,
        )


class _Exact(_Norm):
    @staticmethod
    def forward(ctx, x, output, weight, bias, eps, centred, staircase):
        y, codes, alpha = _Norm._forward(ctx, x, output, weight, bias, centred, staircase)
        ctx.save_for_backward(x, *_moments(x, eps, centred), weight)
        return y, codes, alpha

    @staticmethod
    def backward(ctx, grad_y, *_):
        x, mean, inverse, weight = ctx.saved_tensors
        wide = x.to(inverse.dtype)
        n = (wide if mean is None else wide - mean) * inverse
        return _Norm._backward(ctx, grad_y, n, inverse, weight)


class _Coarse(_Norm):
    @staticmethod
    def forward(ctx, x, output, weight, bias, eps, centred, staircase):
        y, codes, alpha = _Norm._forward(ctx, x, output, weight, bias, centred, staircase)
        ctx.shape = y.shape
        ctx.save_for_backward(codes, alpha, _moments(x, eps, centred)[1], weight, bias)
        return y, codes, alpha

    @staticmethod
    def backward(ctx, grad_y, *_):
        codes, alpha, inverse, weight, bias = ctx.saved_tensors
        output = (*ctx.settings, ctx.shape, ctx.dtype, None, torch.contiguous_format)
        n = _ops.ops.qsigned_dequantize.default(codes, alpha, *output).to(inverse.dtype)
        if ctx.rotation is not None:
            n = _hadamard(n, ctx.rotation)
        if bias is not None:
            n = n - bias.to(n.dtype)
        if weight is not None:  # a channel of weight 0 does not reach y
            wide = weight.to(n.dtype)
            n = torch.where(wide == 0, 0.0, n / wide)
        return _Norm._backward(ctx, grad_y, n, inverse, weight)
