"""A qrelu and the Linear or Conv2d after it as one function, which keeps y as codes under torch.compile too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import _ops
from .ste import kept


def _rebuilt(grad_out, codes, alpha, bits, shape, dtype, channel_dim, memory_format) -> Tensor:
    """y in the dtype that the layer computed in; without codes, where it is not read, memory of its shape."""
    if codes is None:
        return torch.empty(shape, dtype=grad_out.dtype, device=grad_out.device, memory_format=memory_format)
    y = _ops.ops.dequantize.default(codes, alpha, bits, shape, dtype, channel_dim, memory_format)
    return y.to(grad_out.dtype)


def _linear_backward(grad_out, weight, codes, alpha, bits, shape, dtype, channel_dim, memory_format, output_mask):
    rows = grad_out.reshape(-1, weight.size(0))
    grad_y, grad_weight, grad_bias = (grad_out.new_empty(0) for _ in range(3))
    if output_mask[0]:
        grad_y = (rows @ weight).view(shape)
    if output_mask[1]:
        y = _rebuilt(grad_out, codes, alpha, bits, shape, dtype, channel_dim, memory_format)
        grad_weight = rows.t() @ y.reshape(-1, weight.size(1))
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
    """layer(qrelu(x)). config: that of _ops._QReLU. needs: whether weight and bias required grad. dtype: what the layer
    computes in. settings: () of a Linear; stride, padding, dilation and groups of a Conv2d."""

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
        y = y.to(dtype)
        return F.conv2d(y, weight, bias, *settings) if settings else F.linear(y, weight, bias)

    @staticmethod
    def backward(ctx, grad_out):
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise NotImplementedError(
                "qrelu_linear and qrelu_conv2d have no second derivative; use qrelu and the layer one after the other"
            )
        alpha, weight, x, mask, codes = ctx.saved_tensors
        bits, ste, rounding, *_, need_grad_x, need_grad_alpha = ctx.config
        need_weight, need_bias = ctx.needs
        op = _ops.ops.conv2d_backward_from_codes if ctx.settings else _ops.ops.linear_backward_from_codes
        grad_y, grad_weight, grad_bias = op.default(
            grad_out, weight, codes if need_weight else None, alpha, *ctx.y,
            [need_grad_x or need_grad_alpha, need_weight, need_bias], *ctx.settings,
        )  # fmt: skip
        grad_x = grad_alpha = None
        if need_grad_x or need_grad_alpha:
            config = _ops.by_codes(ctx.config) if ctx.by_codes else ctx.config
            alpha, codes = alpha if x is not None else None, codes if ctx.gives_codes else None
            grad_y = grad_y.to(ctx.y[2])
            grad_x, grad_alpha = _ops.backward_from_kept(grad_y, alpha, x, mask, codes, config, ctx.memory_format)
        return (
            grad_x if need_grad_x else None,
            grad_alpha if need_grad_alpha else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            *(None,) * 4,
        )


def qrelu_and_layer(
    x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None, config: tuple, settings: tuple = ()
) -> Tensor:
    """F.linear(qrelu(x), weight, bias), or conv2d where there are settings; config: qrelu's arguments after alpha."""
    _ops._refuse_forward_mode(x, alpha, weight)
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    grad = torch.is_grad_enabled()
    config = (*config, grad and x.requires_grad, grad and alpha.requires_grad)
    needs = (grad and weight.requires_grad, grad and bias is not None and bias.requires_grad)
    return _QReLUAndLayer.apply(x, alpha, weight, bias, config, needs, dtype, settings)
