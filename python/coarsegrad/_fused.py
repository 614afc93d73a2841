"""A qrelu and the Linear or Conv2d after it as one op, which keeps y as codes under torch.compile too."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _autograd, _ops
from ._torch_internals import below_autograd, in_functorch_kernel, suggest_memory_format
from .ste import BUILT_IN, kept


def _layer(y: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, settings: tuple) -> Tensor:
    y = y if y.dtype == dtype else y.to(dtype)  # an op may not return its input, as `to` would
    return F.conv2d(y, weight, bias, *settings) if settings else F.linear(y, weight, bias)


def _rebuilt(grad_out, codes, alpha, bits, shape, dtype, channel_dim, memory_format) -> Tensor:
    """y in the dtype that the layer computed in; without codes, where it is not read, memory of its shape."""
    if codes is None:
        return torch.empty(shape, dtype=grad_out.dtype, device=grad_out.device, memory_format=memory_format)
    y = _ops.ops.dequantize.default(codes, alpha, bits, shape, dtype, channel_dim, memory_format)
    return y.to(grad_out.dtype)


def _rows(t: Tensor) -> Tensor:
    """t as a matrix; as reshape(-1, ...), which does not know how many rows without elements there are."""
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
    grad_out, weight, codes, alpha, bits, shape, dtype, channel_dim, memory_format, output_mask, *settings
):
    y = _rebuilt(grad_out, codes, alpha, bits, shape, dtype, channel_dim, memory_format)
    stride, padding, dilation, groups = settings
    grads = torch.ops.aten.convolution_backward.default(
        grad_out, y, weight, [weight.size(0)], stride, padding, dilation, False, [0, 0], groups, output_mask
    )
    return tuple(grad if wanted else grad_out.new_empty(0) for grad, wanted in zip(grads, output_mask))


def _fake_linear_backward(grad_out, weight, codes, alpha, bits, shape, *settings):
    sizes = (shape, weight.shape, weight.shape[:1])
    return tuple(grad_out.new_empty(size if wanted else (0,)) for size, wanted in zip(sizes, settings[3]))


_ops._library.impl("linear_backward_from_codes", _linear_backward, "CompositeExplicitAutograd")
_ops._fake("linear_backward_from_codes")(_fake_linear_backward)
_ops._library.impl("conv2d_backward_from_codes", _conv2d_backward, "CompositeExplicitAutograd")
# The layouts of a convolution's gradients are the backend's choice: ask torch's own fake of it.
_ops._fake("conv2d_backward_from_codes")(
    lambda grad_out, weight, codes, *rest: _conv2d_backward(grad_out, weight, None, *rest)
)


class _QReLUAndLayer(torch.autograd.Function):
    """layer(qrelu(x)). config: that of _autograd._QReLU. needs: whether weight and bias required grad. dtype: what the
    layer computes in. settings: () of a Linear; stride, padding, dilation and groups of a Conv2d."""

    @staticmethod
    def forward(ctx, x, alpha, weight, bias, config, needs, dtype, settings):
        bits, ste, rounding, alpha_grad, _, channel_dim, need_grad_x, need_grad_alpha = config
        mask, codes, keep_x = kept(ste, rounding, alpha_grad if need_grad_alpha else None, need_grad_x)
        need_codes = codes or needs[0]
        # Under ceil and hwgq T[1] = 0, so that x > 0 is c > 0.
        ctx.by_codes = needs[0] and not need_grad_alpha and mask == "positive" and rounding != "nearest"
        if ctx.by_codes:
            mask = "nothing"
        ctx.gives_codes = codes or ctx.by_codes  # to qrelu's own backward
        y, bits_kept, codes_kept = _ops.ops.qrelu_forward.default(
            x, alpha, bits, rounding, mask, need_codes, channel_dim
        )
        ctx.memory_format = suggest_memory_format(x)
        ctx.y = (bits, x.shape, x.dtype, channel_dim, ctx.memory_format)
        ctx.config, ctx.needs, ctx.settings = config, needs, settings
        ctx.save_for_backward(
            alpha,
            weight,
            x if keep_x else None,
            bits_kept if mask != "nothing" else None,
            codes_kept if need_codes else None,
        )
        return _layer(y, weight, bias, dtype, settings)

    @staticmethod
    def backward(ctx, grad_out):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "qrelu_linear and qrelu_conv2d have no second derivative; use qrelu and the layer one after the other"
            )
        alpha, weight, x, mask, codes = ctx.saved_tensors
        need_grad_x, need_grad_alpha = ctx.config[-2:]
        need_weight, need_bias = ctx.needs
        op = _ops.ops.conv2d_backward_from_codes if ctx.settings else _ops.ops.linear_backward_from_codes
        grad_y, grad_weight, grad_bias = op.default(
            grad_out, weight, codes if need_weight else None, alpha, *ctx.y,
            [need_grad_x or need_grad_alpha, need_weight, need_bias], *ctx.settings,
        )  # fmt: skip
        grad_x = grad_alpha = None
        if need_grad_x or need_grad_alpha:
            config = _autograd.by_codes(ctx.config) if ctx.by_codes else ctx.config
            alpha, codes = alpha if x is not None else None, codes if ctx.gives_codes else None
            grad_y = grad_y.to(ctx.y[2])
            grad_x, grad_alpha = _autograd.backward_from_kept(grad_y, alpha, x, mask, codes, config, ctx.memory_format)
        return (
            grad_x if need_grad_x else None,
            grad_alpha if need_grad_alpha else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            *(None,) * 4,
        )


def _one_after_the_other(x, alpha, weight, bias, bits, ste, *rest):
    *rule, dtype = rest[:5]
    op = _ops.ops.qrelu.default if ste in BUILT_IN else _ops.ops.qrelu_own.default
    return _layer(op(x, alpha, bits, ste, *rule), weight, bias, dtype, rest[5:])


def _autograd_kernel(x, alpha, weight, bias, *rest):
    if in_functorch_kernel():  # where nothing is said of what is kept
        return _one_after_the_other(x, alpha, weight, bias, *rest)
    _autograd.refuse_forward_mode(x, alpha, weight)
    if not _autograd.wants_grad(x, alpha, weight, bias):
        with below_autograd():
            return _one_after_the_other(x, alpha, weight, bias, *rest)
    config, dtype, settings = rest[:6], rest[6], rest[7:]
    config = (*config, x.requires_grad, alpha.requires_grad)
    needs = (weight.requires_grad, bias is not None and bias.requires_grad)
    return _QReLUAndLayer.apply(x, alpha, weight, bias, config, needs, dtype, settings)


for _name in ("qrelu_linear", "qrelu_conv2d"):
    _ops._library.impl(_name, _one_after_the_other, "CompositeExplicitAutograd")
    _ops._library.impl(_name, _autograd_kernel, "Autograd")
    _ops._fake(_name)(_one_after_the_other)
    _ops._library.impl(_name, _one_after_the_other, "FuncTorchBatched")


def qrelu_and_layer(
    x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None, config: tuple, settings: tuple = ()
) -> Tensor:
    """F.linear(qrelu(x), weight, bias), or conv2d where there are settings; config: qrelu's arguments after alpha."""
    device, dtype = x.device.type, x.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    op = _ops.ops.qrelu_conv2d if settings else _ops.ops.qrelu_linear
    return op.default(x, alpha, weight, bias, *config, dtype, *settings)


@functools.cache
def register_flop_formulas() -> None:
    """Has torch.utils.flop_counter count these ops as it counts the layer alone. Called as a fused module is made: the
    import takes a while, as it imports Triton."""
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
    def _(
        grad_out, weight, codes, alpha, bits, shape, dtype, channel_dim, memory_format, mask, *settings, out_val, **_
    ):
        stride, padding, dilation, groups = settings
        rest = (None, stride, padding, dilation, False, [0, 0], groups, mask)
        return conv_backward_flop(grad_out, torch.empty(shape, device="meta"), weight, *rest, out_val=out_val)
