"""A qrelu and the Linear or Conv2d after it as one function, which keeps y as codes under torch.compile too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import _ops
from .ste import kept

_ops_of_backward = {False: "linear_backward_from_codes", True: "conv2d_backward_from_codes"}


def _rebuilt(grad_out, codes, alpha, bits, shape, dtype, channel_dim, memory_format) -> Tensor:
    """y in the dtype that the layer computed in; without codes, when it is not read, memory of its shape."""
    if codes is None:
        return torch.empty(shape, dtype=grad_out.dtype, device=grad_out.device, memory_format=memory_format)
    y = _ops.ops.dequantize.default(codes, alpha, bits, shape, dtype, channel_dim, memory_format)
    return y.to(grad_out.dtype)


def _linear_backward(grad_out, weight, codes, alpha, bits, shape, dtype, channel_dim, memory_format, output_mask):
    rows = grad_out.reshape(-1, weight.size(0))
    grad_y = grad_weight = grad_bias = grad_out.new_empty(0)
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
    return tuple(grad_out.new_empty(0) if grad is None else grad for grad in grads)


def _fake_backward(grad_out, weight, codes, alpha, bits, shape, dtype, channel_dim, memory_format, output_mask, *_):
    def empty(wanted, size, **layout):
        return grad_out.new_empty(0) if not wanted else torch.empty(
            size, dtype=grad_out.dtype, device=grad_out.device, **layout
        )

    return (
        empty(output_mask[0], shape),
        empty(output_mask[1], weight.shape),
        empty(output_mask[2], weight.shape[:1]),
    )


for _name, _kernel in zip(_ops_of_backward.values(), (_linear_backward, _conv2d_backward)):
    _ops._library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _ops._fake(_name)(_fake_backward)


class _QReLUAndLayer(torch.autograd.Function):
    """layer(qrelu(x)). config: that of _ops._QReLU. dtype: what the layer computes in. settings: () of a Linear;
    stride, padding, dilation and groups of a Conv2d."""

    @staticmethod
    def forward(ctx, x, alpha, weight, bias, config, dtype, settings):
        bits, ste, rounding, alpha_grad, _, channel_dim, need_grad_x, need_grad_alpha = config
        mask, codes, keep_x = kept(ste, rounding, alpha_grad if need_grad_alpha else None, need_grad_x)
        need_codes = codes or weight.requires_grad
        # Under ceil and hwgq T[1] = 0, so that x > 0 is c > 0.
        ctx.by_codes = need_codes and mask == "positive" and rounding != "nearest"
        if ctx.by_codes:
            mask = "nothing"
        y, kept_mask, kept_codes = _ops.ops.qrelu_forward.default(x, alpha, bits, rounding, mask, need_codes, channel_dim)
        out = F.conv2d(y.to(dtype), weight, bias, *settings) if settings else F.linear(y.to(dtype), weight, bias)
        ctx.config, ctx.settings = config, settings
        ctx.y = (bits, x.shape, x.dtype, channel_dim, suggest_memory_format(x))
        ctx.save_for_backward(
            alpha,
            weight,
            x if keep_x else None,
            kept_mask if mask != "nothing" else None,
            kept_codes if need_codes else None,
        )
        return out
