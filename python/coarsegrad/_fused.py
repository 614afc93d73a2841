"""A qrelu and the next Linear or Conv2d as one op, which saves y as codes, also under torch.compile."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _ops
from ._autograd import Settings, backward_from_saved, needs_grad, refuse_forward_mode
from ._torch_internals import below_autograd, in_functorch_kernel, suggest_memory_format
from ._types import BUILT_IN, MaskKind
from .ste import codes_give


def _layer(y: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, conv: tuple) -> Tensor:
    """The Conv2d with stride, padding, dilation and groups `conv`; the Linear if there are none."""
    y = y if y.dtype == dtype else y.to(dtype)  # an op must not return its input, as `to` would
    return F.conv2d(y, weight, bias, *conv) if conv else F.linear(y, weight, bias)


def _rebuilt(grad_out, codes, alpha, bits, shape, dtype, channel_dim, memory_format) -> Tensor:
    """y in the layer's compute dtype. Without codes, when y is not read, an uninitialised tensor of its shape."""
    if codes is None:
        return torch.empty(shape, dtype=grad_out.dtype, device=grad_out.device, memory_format=memory_format)
    y = _ops.ops.dequantize.default(codes, alpha, bits, shape, dtype, channel_dim, memory_format)
    return y.to(grad_out.dtype)


def _rows(t: Tensor) -> Tensor:
    """t as a matrix: reshape(-1, ...) that also works without elements."""
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


def _linear_backward(grad_out, weight, codes, alpha, bits, shape, dtype, channel_dim, memory_format, output_mask):
    rows = _rows(grad_out)
    grad_y, grad_weight, grad_bias = (grad_out.new_empty(0) for _ in range(3))
    if output_mask[0]:
        grad_y = (rows @ weight).view(shape)
    if output_mask[1]:
        y = _rebuilt(grad_out, codes, alpha, bits, shape, dtype, channel_dim, memory_format)
        grad_weight = rows.t() @ _rows(y)
    if output_mask[2]:
        grad_bias = rows.sum(0)
    return grad_y, grad_weight, grad_bias


def _conv2d_backward(
    grad_out, weight, codes, alpha, bits, shape, dtype, channel_dim, memory_format, output_mask, *conv
):
    y = _rebuilt(grad_out, codes, alpha, bits, shape, dtype, channel_dim, memory_format)
    stride, padding, dilation, groups = conv
    grads = torch.ops.aten.convolution_backward.default(
        grad_out, y, weight, [weight.size(0)], stride, padding, dilation, False, [0, 0], groups, output_mask
    )
    return tuple(grad if wanted else grad_out.new_empty(0) for grad, wanted in zip(grads, output_mask))


def _fake_linear_backward(grad_out, weight, codes, alpha, bits, shape, dtype, channel_dim, memory_format, output_mask):
    sizes = (shape, weight.shape, weight.shape[:1])
    return tuple(grad_out.new_empty(size if wanted else (0,)) for size, wanted in zip(sizes, output_mask))


_ops._library.impl("linear_backward_from_codes", _linear_backward, "CompositeExplicitAutograd")
_ops._fake("linear_backward_from_codes")(_fake_linear_backward)
_ops._library.impl("conv2d_backward_from_codes", _conv2d_backward, "CompositeExplicitAutograd")
# The backend chooses the layouts of a convolution's gradients: ask torch's own fake.
_ops._fake("conv2d_backward_from_codes")(
    lambda grad_out, weight, codes, *rest: _conv2d_backward(grad_out, weight, None, *rest)
)


class _QReLULayer(torch.autograd.Function):
    """layer(qrelu(x)). needs: whether weight and bias require grad. dtype: the layer's compute dtype. conv: as in
    `_layer`."""

    @staticmethod
    def forward(ctx, x, alpha, weight, bias, settings, needs, dtype, conv):
        kind, need_codes, need_x = settings.saved()
        # If the codes are saved anyway, for the weight's gradient, they may replace the mask.
        ctx.reads_codes = needs[0] and not settings.need_grad_alpha and codes_give(kind, settings.rounding)
        if ctx.reads_codes:
            kind = MaskKind.nothing.value
        ctx.uses_codes = need_codes or ctx.reads_codes  # in qrelu's own backward
        saves_codes = need_codes or needs[0]
        bits, channel_dim = settings.bits, settings.channel_dim
        y, mask, codes = _ops.ops.qrelu_forward.default(
            x, alpha, bits, settings.rounding, kind, saves_codes, channel_dim
        )
        ctx.memory_format, ctx.dtype = suggest_memory_format(x), x.dtype
        ctx.output = (bits, x.shape, x.dtype, channel_dim, ctx.memory_format)
        ctx.settings, ctx.needs, ctx.conv = settings, needs, conv
        ctx.save_for_backward(
            alpha,
            weight,
            x if need_x else None,
            mask if kind != MaskKind.nothing else None,
            codes if saves_codes else None,
        )
        return _layer(y, weight, bias, dtype, conv)

    @staticmethod
    def backward(ctx, grad_out):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "qrelu_linear and qrelu_conv2d have no second derivative; use qrelu and the layer one after the other"
            )
        alpha, weight, x, mask, codes = ctx.saved_tensors
        settings = ctx.settings
        need_y = settings.need_grad_x or settings.need_grad_alpha
        need_weight, need_bias = ctx.needs
        op = _ops.ops.conv2d_backward_from_codes if ctx.conv else _ops.ops.linear_backward_from_codes
        grad_y, grad_weight, grad_bias = op.default(
            grad_out, weight, codes if need_weight else None, alpha, *ctx.output, [need_y, need_weight, need_bias],
            *ctx.conv,
        )  # fmt: skip
        grad_x = grad_alpha = None
        if need_y:
            alpha, codes = alpha if x is not None else None, codes if ctx.uses_codes else None
            grad_x, grad_alpha = backward_from_saved(
                grad_y.to(ctx.dtype), alpha, x, mask, codes,
                settings.reading_codes() if ctx.reads_codes else settings, ctx.memory_format,
            )  # fmt: skip
        return (
            grad_x if settings.need_grad_x else None,
            grad_alpha if settings.need_grad_alpha else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            *(None,) * 4,
        )


def _one_after_the_other(
    x, alpha, weight, bias, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim, dtype, *conv
):
    op = _ops.ops.qrelu.default if ste in BUILT_IN else _ops.ops.qrelu_custom.default
    y = op(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)
    return _layer(y, weight, bias, dtype, conv)


def _autograd_kernel(x, alpha, weight, bias, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim, dtype, *conv):
    options = (bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)
    if in_functorch_kernel():  # which promises nothing about saved tensors
        return _one_after_the_other(x, alpha, weight, bias, *options, dtype, *conv)
    refuse_forward_mode(x, alpha, weight)
    need_x, need_alpha, *needs = needs_grad(x, alpha, weight, bias)
    if not any((need_x, need_alpha, *needs)):
        with below_autograd():
            return _one_after_the_other(x, alpha, weight, bias, *options, dtype, *conv)
    return _QReLULayer.apply(x, alpha, weight, bias, Settings.of(*options, need_x, need_alpha), needs, dtype, conv)


for _name in ("qrelu_linear", "qrelu_conv2d"):
    _ops._library.impl(_name, _one_after_the_other, "CompositeExplicitAutograd")
    _ops._library.impl(_name, _autograd_kernel, "Autograd")
    _ops._fake(_name)(_one_after_the_other)
    _ops._library.impl(_name, _one_after_the_other, "FuncTorchBatched")


def qrelu_and_layer(
    x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None, options: tuple, conv: tuple = ()
) -> Tensor:
    """F.linear(qrelu(x), weight, bias), or F.conv2d with `conv`. options: qrelu's arguments after alpha."""
    device, dtype = x.device.type, x.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    op = _ops.ops.qrelu_conv2d if conv else _ops.ops.qrelu_linear
    return op.default(x, alpha, weight, bias, *options, dtype, *conv)


@functools.cache
def register_flop_formulas() -> None:
    """Have torch.utils.flop_counter count these ops, and those of `_mlp.py`, like the layer alone. Called when a fused
    module is created, as the import is slow: it imports Triton."""
    from torch.utils.flop_counter import conv_backward_flop, conv_flop_count, register_flop_formula

    @register_flop_formula(_ops.ops.qrelu_linear)
    def _(x, alpha, weight, *_, **__):
        return 2 * math.prod(x) * weight[0]

    @register_flop_formula(_ops.ops.qrelu_conv2d)
    def _(x, alpha, weight, *_, out_shape, **__):
        return conv_flop_count(x, weight, out_shape)

    @register_flop_formula(_ops.ops.linear_backward_from_codes)
    def _(grad_out, weight, codes, alpha, bits, shape, dtype, channel_dim, memory_format, mask, **_):
        return 2 * math.prod(grad_out) * weight[1] * (mask[0] + mask[1])

    @register_flop_formula(_ops.ops.conv2d_backward_from_codes, get_raw=True)
    def _(grad_out, weight, codes, alpha, bits, shape, dtype, channel_dim, memory_format, mask, *conv, out_val, **_):
        stride, padding, dilation, groups = conv
        rest = (None, stride, padding, dilation, False, [0, 0], groups, mask)
        return conv_backward_flop(grad_out, torch.empty(shape, device="meta"), weight, *rest, out_val=out_val)

    @register_flop_formula(_ops.ops.linear_to_codes)
    def _(x, weight, *_, **__):
        return 2 * x[0] * weight[0] * weight[1]

    @register_flop_formula(_ops.ops.linear_from_codes)
    def _(codes, nan_rows, alphas, bits, squared, weight, *_, **__):
        return 2 * nan_rows[0] * weight[0] * weight[1]

    @register_flop_formula(_ops.ops.linear_from_codes_grad_input)
    def _(grad_out, weight, *_, **__):
        return 2 * grad_out[0] * weight[0] * weight[1]

    @register_flop_formula(_ops.ops.linear_from_codes_grad_weight)
    def _(grad_out, codes, alphas, bits, squared, hidden, **__):
        return 2 * grad_out[0] * grad_out[1] * hidden
