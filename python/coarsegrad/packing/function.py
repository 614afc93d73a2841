"""qrelu and qsigned as autograd.Functions whose outputs carry a record."""

from __future__ import annotations

import weakref

import torch

from .. import _ops, _signed, reference
from .._autograd import backward_from_saved
from .._torch_internals import suggest_memory_format
from .._types import CODE_WIDTH, MaskKind
from ..ste import codes_give
from .records import OutputRecord
from .saved import Decoder, SavedTensor, SharedMask

SAVE_AS = "_coarsegrad_save_as"  # attribute of a tensor: what the hooks save in its place


class PackedQReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, outer_hooks, inplace, settings):
        kind, need_codes, need_x = settings.saved()
        ctx.memory_format = memory_format = suggest_memory_format(x)
        bits, channel_dim = settings.bits, settings.channel_dim
        arguments = (x, alpha, bits, settings.rounding, kind, True, channel_dim)
        if inplace:
            y, (mask, codes) = x, _ops.ops.qrelu_forward_.default(*arguments)
            ctx.mark_dirty(x)
        else:
            y, mask, codes = _ops.ops.qrelu_forward.default(*arguments)
        shared_mask = None
        if kind != MaskKind.nothing:
            shared_mask = SharedMask(SavedTensor(mask.detach(), outer_hooks))  # detached: without SAVE_AS
            setattr(mask, SAVE_AS, shared_mask)
        if y.is_contiguous(memory_format=memory_format):
            alpha_now = alpha.detach().clone()  # an optimizer may change it before the backward
            replaced_mask = shared_mask if codes_give(kind, settings.rounding) else None
            output = (bits, y.shape, y.dtype, channel_dim, memory_format)
            decoder = Decoder(y, _ops.ops.dequantize.default, *output)
            record = OutputRecord(y, (codes.detach(), alpha_now), replaced_mask, decoder)
            record.attach_to(y)
        ctx.settings = settings
        ctx.mask = shared_mask and weakref.ref(shared_mask)  # autograd holds it, and frees it after the backward
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            alpha if need_x else None,
            x if need_x else None,
            mask if shared_mask else None,
            codes if need_codes else None,
        )
        return y

    @staticmethod
    def backward(ctx, grad_y):
        shared_mask = ctx.mask and ctx.mask()
        alpha, x, mask, codes = ctx.saved_tensors
        if grad_y is None:
            return (None,) * 5
        settings = ctx.settings
        if shared_mask is not None and shared_mask.is_codes:
            if torch.is_grad_enabled() and grad_y.requires_grad:  # the op's second derivative needs a mask
                mask = reference.unpack(mask, CODE_WIDTH[settings.bits], grad_y.numel()).ne(0)
                mask = reference.pack(mask.to(torch.uint8), 1)
            else:
                mask, codes, settings = None, mask, settings.reading_codes()
        grad_x, grad_alpha = backward_from_saved(grad_y, alpha, x, mask, codes, settings, ctx.memory_format)
        return grad_x, grad_alpha if ctx.settings.need_grad_alpha else None, None, None, None


class PackedQSigned(torch.autograd.Function):
    """group: that of a dynamic alpha, None if alpha is given."""

    @staticmethod
    def forward(ctx, x, alpha, group, settings):
        bits, channel_dim = settings.bits, settings.channel_dim
        y, dynamic, mask, codes = _ops.ops.qsigned_forward.default(
            x, alpha, bits, group, settings.saves_mask, True, channel_dim
        )
        memory_format = suggest_memory_format(y) if alpha is not None else torch.contiguous_format
        if y.is_contiguous(memory_format=memory_format):
            output = (bits, group, y.shape, y.dtype, channel_dim, memory_format)
            decoder = Decoder(y, _ops.ops.qsigned_dequantize.default, *output)
            # A given alpha may be changed before the backward.
            alpha_now = dynamic if alpha is None else alpha.detach().clone()
            OutputRecord(y, (codes.detach(), alpha_now), None, decoder).attach_to(y)
        _signed.save_for_backward(ctx, settings, x, alpha, mask, codes)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return *_signed.backward_from_saved(ctx, grad_y), None, None
