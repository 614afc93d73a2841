"""The saved-tensor hooks of a `packed_activations` block, and how the functions called in it find them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _ops
from .._autograd import Settings, refuse_forward_mode
from .._signed import SignedSettings
from .._torch_internals import Hooks, functorch_active, saved_tensor_hooks, view_root
from ..ste import check_inplace
from .function import SAVE_AS, PackedQReLU, PackedQSigned
from .records import OutputRecord, SavedView, attached_record, record_of
from .saved import Decoder, SavedTensor, SharedMask

Saved = SavedTensor | SharedMask | SavedView


class Packing:
    """The hooks of one block, `save` and `load`. outer_hooks: those around the block, which get all that it saves."""

    def __init__(self, outer_hooks: Hooks | None) -> None:
        self.outer_hooks = outer_hooks
        self._last: OutputRecord | None = None  # an output may be freed before its square is saved

    def save(self, t: Tensor) -> Saved:
        instead = getattr(t, SAVE_AS, None)
        if instead is None and t.layout is torch.strided and not t.is_nested:
            record = record_of(t)
            instead = record and record.replacement_for(t, self.outer_hooks)
            self._last = record if instead else self._last
        return instead or SavedTensor(t, self.outer_hooks)

    @staticmethod
    def load(saved: Saved) -> Tensor:
        return saved.load()

    def qrelu(self, x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim, inplace) -> Tensor:
        """qrelu, or qrelu_, with an output that can be saved as codes."""
        refuse_forward_mode(x, alpha)
        needs = x.requires_grad, alpha.requires_grad
        if inplace:
            check_inplace(ste, rounding, alpha_grad, *needs)
            root = view_root(x)
            if root.is_leaf and root.requires_grad:
                raise RuntimeError("inplace=True would write to a leaf that requires grad; use inplace=False")
        settings = Settings.of(bits, ste, rounding, alpha_grad, alpha_scale, channel_dim, *needs)
        return _published(PackedQReLU.apply(x, alpha, self.outer_hooks, inplace, settings))

    @staticmethod
    def qsigned(x, alpha, bits, group, ste, alpha_grad, alpha_scale, channel_dim) -> Tensor:
        """qsigned with an output that can be saved as codes. group: a number if alpha is None, else None."""
        refuse_forward_mode(x, alpha, op="qsigned")
        settings = SignedSettings.of(x, alpha, bits, ste, alpha_grad, alpha_scale, channel_dim)
        return _published(PackedQSigned.apply(x, alpha, group, settings))


def record_codes(y: Tensor, codes: Tensor, alpha: Tensor, bits: int, group: int) -> None:
    """Let y, a staircase with dynamic alphas, be saved as its codes. Compiled graphs find them by themselves."""
    if active_packing() is None:
        return
    output = (bits, group, y.shape, y.dtype, None, torch.contiguous_format)
    decoder = Decoder(y, _ops.ops.qsigned_dequantize.default, *output)
    record = OutputRecord(y, (codes.detach(), alpha.detach()), None, decoder)
    record.attach_to(y)
    record.publish(y)


def record_source(op: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """Let y = op(x) be saved as x, from which op then makes it again. Of tensors x that live anyway."""
    if active_packing() is None:
        return
    record = OutputRecord(y, (x.detach(),), None, Decoder(y, op))
    record.attach_to(y)
    record.publish(y)


def record_product(op: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, product: Tensor) -> None:
    """Let product = op(a, b), elementwise, be saved as the codes of a and b, if both are outputs."""
    if active_packing() is None:
        return
    records = attached_record(a), attached_record(b)
    if records[0] is None or records[1] is None or not records[0].is_of(a) or not records[1].is_of(b):
        return
    if product.stride() == a.stride() == b.stride():
        record = records[0].combined(records[1], op, product)
        record.attach_to(product)
        record.publish(product)


def _published(y: Tensor) -> Tensor:
    if (record := attached_record(y)) is not None:
        record.publish(y)
    return y


def packing_of(hooks: Hooks | None) -> Packing | None:
    """The packing that these hooks belong to, if any."""
    packing = getattr(hooks[0], "__self__", None) if hooks else None
    return packing if isinstance(packing, Packing) else None


def active_packing() -> Packing | None:
    """The packing whose hooks are the innermost ones. Other hooks inside of it, such as a checkpoint's, see what is
    saved without packing."""
    if torch.compiler.is_compiling():
        return None
    hooks = saved_tensor_hooks()  # first, as mostly there are none
    if hooks is None or functorch_active() or not torch.is_grad_enabled():
        return None
    return packing_of(hooks)


def square(y: Tensor) -> Tensor:
    """y * y for the output y of a qrelu. Inside `packed_activations` its square is saved as y's codes, and so is its
    copy in another dtype."""
    z = y.square()
    if active_packing() is not None and isinstance(z, Tensor) and z.requires_grad:
        if (record := record_of(z)) is not None:
            record.publish(z)
    return z
