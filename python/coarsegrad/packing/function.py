"""qrelu as an autograd.Function whose output carries a record."""

from __future__ import annotations

import weakref

import torch

from .. import _autograd, _ops, reference
from .._torch_internals import suggest_memory_format
from ..ste import kept
from .records import OutputRecord
from .saved import Decoder, SavedTensor, SharedMask

SAVE_AS = "_coarsegrad_save_as"  # attribute of a tensor: what the hooks save in its place


class PackedQReLU(torch.autograd.Function):
    """config: bits, ste, rounding, alpha_grad, alpha_scale, channel_dim."""

    @staticmethod
    def forward(ctx, x, alpha, outer_hooks, inplace, config):
        bits, ste, rounding, alpha_grad, _, channel_dim = config
        need_grad_x, need_grad_alpha = ctx.needs_input_grad[:2]
        kind, keep_codes, keep_x = kept(ste, rounding, alpha_grad if need_grad_alpha else None, need_grad_x)
        ctx.memory_format = memory_format = suggest_memory_format(x)
        arguments = (x, alpha, bits, rounding, kind, True, channel_dim)
        if inplace:
            y, (mask, codes) = x, _ops.ops.qrelu_forward_.default(*arguments)
            ctx.mark_dirty(x)
        else:
            y, mask, codes = _ops.ops.qrelu_forward.default(*arguments)
        shared_mask = None
        if kind != "nothing":
            shared_mask = SharedMask(SavedTensor(mask.detach(), outer_hooks))  # detached: without SAVE_AS
            setattr(mask, SAVE_AS, shared_mask)
        if y.is_contiguous(memory_format=memory_format):
            # Under ceil and hwgq T[1] = 0, so that x > 0 is c > 0.
            codes_suffice = kind == "positive" and rounding != "nearest"
            alpha_now = alpha.detach().clone()  # an optimizer may change it before the backward
            decoder = Decoder(y, bits, channel_dim, memory_format)
            record = OutputRecord(y, codes.detach(), alpha_now, shared_mask if codes_suffice else None, decoder)
            record.attach_to(y)
        ctx.config = (*config, need_grad_x, need_grad_alpha)
        ctx.mask = shared_mask and weakref.ref(shared_mask)  # autograd holds it, and frees it after the backward
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            alpha if keep_x else None,
            x if keep_x else None,
            mask if shared_mask else None,
            codes if keep_codes else None,
        )
        return y

    @staticmethod
    def backward(ctx, grad_y):
        shared_mask = ctx.mask and ctx.mask()
        alpha, x, mask, codes = ctx.saved_tensors
        if grad_y is None:
            return (None,) * 5
        config = ctx.config
        if shared_mask is not None and shared_mask.is_codes:
            if torch.is_grad_enabled() and grad_y.requires_grad:  # the op's second derivative needs a mask
                mask = reference.unpack(mask, reference.CODE_WIDTH[config[0]], grad_y.numel()).ne(0)
                mask = reference.pack(mask.to(torch.uint8), 1)
            else:
                mask, codes, config = None, mask, _autograd.by_codes(config)
        grad_x, grad_alpha = _autograd.backward_from_kept(grad_y, alpha, x, mask, codes, config, ctx.memory_format)
        return grad_x, grad_alpha if ctx.config[-1] else None, None, None, None
