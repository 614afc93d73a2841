"""Saved activations as packed codes: whoever keeps the output of a qrelu for its backward keeps the output's codes.

Inside of `packed_activations` a pair of saved-tensor hooks sees each tensor that autograd is about to keep. Those that
it knows carry a note, which says what to keep instead: for an output y its codes, from which y is rebuilt bit for bit.
y's note is an attribute of its storage: every view of y has it, and it is gone when the storage is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.autograd.graph import Node, saved_tensors_hooks

from . import _autograd, _ops, reference
from .ste import check_inplace, kept

Hooks = tuple[Callable[[Tensor], object], Callable[[object], Tensor]]

_NOTE = "_coarsegrad_note"


class _Kept:
    """A tensor that is kept as it is: by the hooks around the packing where there are any, which may put it elsewhere;
    else here, with its version, as torch checks no versions where there are hooks."""

    def __init__(self, t: Tensor, below: Hooks | None) -> None:
        self._unpack = None
        if below is None:
            # Detached: t may be an output of the node that keeps it, and would keep that node alive in turn.
            self._packed, self._version = t.detach(), t._version
        else:
            pack, self._unpack = below
            self._packed = pack(t)

    def unpack(self) -> Tensor:
        if self._unpack is not None:
            return self._unpack(self._packed)
        t = self._packed
        if t._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a"
                f" {t.dtype} tensor of shape {list(t.shape)} is at version {t._version}, expected {self._version}"
            )
        return t


class _Gate:
    """The mask that a coarse gradient needs, until the codes, which say as much, are kept anyway.

    by_codes: whether it has come to that; `unpack` then gives the codes.
    """

    def __init__(self, mask: _Kept) -> None:
        self.by_codes = False
        self._kept = mask

    def switch_to(self, codes: _Kept) -> None:
        self.by_codes, self._kept = True, codes

    def unpack(self) -> Tensor:
        return self._kept.unpack()


class _Rebuilding:
    """How y, or what steps make of it, is made from its codes. Views asked for while another is in use share one
    storage."""

    def __init__(self, y: Tensor, bits: int, channel_dim: int | None, memory_format: torch.memory_format) -> None:
        self.dtype, self._device = y.dtype, y.device
        self._arguments = (bits, y.shape, y.dtype, channel_dim, memory_format)
        self._steps: tuple[Callable[[Tensor], Tensor], ...] = ()
        self._storage: weakref.ref[torch.UntypedStorage] | None = None

    def then(self, step: Callable[[Tensor], Tensor], dtype: torch.dtype) -> _Rebuilding:
        """The same of what a step, elementwise, makes of it."""
        other = copy.copy(self)
        other.dtype, other._steps, other._storage = dtype, (*self._steps, step), None
        return other

    def view(self, codes: _Kept, alpha: _Kept, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        storage = self._storage and self._storage()
        if storage is None:
            y = _ops.ops.dequantize.default(codes.unpack(), alpha.unpack(), *self._arguments)
            for step in self._steps:
                y = step(y)
            storage = y.untyped_storage()
            self._storage = weakref.ref(storage)
        return torch.empty(0, dtype=self.dtype, device=self._device).set_(storage, offset, size, stride)


class _View:
    """A view of an output, kept as the output's codes. note: what is known of that output, while it is known."""

    def __init__(
        self,
        note: Callable[[], _Output | None],
        rebuilding: _Rebuilding,
        codes: _Kept,
        alpha: _Kept,
        size: torch.Size,
        stride: tuple[int, ...],
        offset: int,
    ) -> None:
        self.note, self.size, self.stride, self.offset = note, size, stride, offset
        self._rebuilding, self._codes, self._alpha = rebuilding, codes, alpha

    def same_as(self, other: object) -> bool:
        place = (self.size, self.stride, self.offset)
        return (
            isinstance(other, _View)
            and self._rebuilding is other._rebuilding
            and place == (other.size, other.stride, other.offset)
        )

    def unpack(self) -> Tensor:
        return self._rebuilding.view(self._codes, self._alpha, self.size, self.stride, self.offset)


class _Output:
    """What is known of an output y. It lives with y's storage, so that the codes of a y that nobody keeps go with it.

    gate: that of the node which made y, where the codes can stand in for its mask.
    version: y's own; a y written to since is another tensor. None: y is not handed out yet.
    y: a weak reference to y, from then on.
    """

    def __init__(self, y: Tensor, codes: Tensor, alpha: Tensor, gate: _Gate | None, rebuilding: _Rebuilding) -> None:
        self.version: int | None = None
        self.y: weakref.ref[Tensor] = lambda: None
        self._codes, self._alpha, self._gate, self._rebuilding = codes, alpha, gate, rebuilding
        self._dtype, self._offset, self._count = y.dtype, y.storage_offset(), y.numel()

    def square(self, of: _View, z: Tensor) -> _Output | None:
        """The same of z, the square of a view of this output; None where that is not the whole of it, or z's elements
        lie in another order."""
        whole = of.offset == 0 and of.size.numel() == self._count
        same_order = all(stride == its for size, stride, its in zip(of.size, of.stride, z.stride()) if size > 1)
        if not whole or not same_order or z.dtype != self._dtype:
            return None
        return self._made_into(z, torch.square)

    def hand_out(self, y: Tensor) -> None:
        self.version, self.y = y._version, weakref.ref(y)
        if y.grad_fn is not None:
            y.grad_fn.metadata[_NOTE] = weakref.ref(self)

    def converted(self, copy_of_y: Tensor) -> _Output | None:
        """The same of a copy of y, or of a view of y, in another dtype; None where y is gone or was written to, or the
        elements lie in another order."""
        y = self.y()
        if y is None or y._version != self.version or y.device != copy_of_y.device:
            return None
        same_strides = (y.shape, y.stride()) == (copy_of_y.shape, copy_of_y.stride())
        if not same_strides and not (y.is_contiguous() and copy_of_y.is_contiguous()):
            return None
        return self._made_into(copy_of_y, functools.partial(Tensor.to, dtype=copy_of_y.dtype))

    def _made_into(self, t: Tensor, step: Callable[[Tensor], Tensor]) -> _Output:
        output = _Output(t, self._codes, self._alpha, self._gate, self._rebuilding.then(step, t.dtype))
        output.version = 0  # as t was made
        return output

    def keep_instead_of(self, t: Tensor, below: Hooks | None) -> _View | None:
        """What to keep in place of t, which shares y's storage; None where t itself must be kept."""
        if t._version != self.version:  # for good: let go of the codes
            delattr(t.untyped_storage(), _NOTE)
            return None
        first = t.storage_offset() - self._offset
        last = first + sum((size - 1) * stride for size, stride in zip(t.size(), t.stride()))
        if first < 0 or last >= self._count or t.dtype != self._dtype or t.is_neg() or t.numel() == 0:
            return None
        # Handed down anew each time: hooks may give back what they took just once, as a checkpoint's do.
        if self._gate is not None and not self._gate.by_codes:
            self._gate.switch_to(_Kept(self._codes, below))
        kept_codes, kept_alpha = _Kept(self._codes, below), _Kept(self._alpha, below)
        # Where hooks make something else of the codes, a strong reference would keep these too.
        note = weakref.ref(self) if below else lambda: self
        return _View(note, self._rebuilding, kept_codes, kept_alpha, t.size(), t.stride(), first)


def _kept_as(saved: object) -> object:
    """What hooks made of a tensor that a node keeps; None where it is let go, or torch does not say."""
    try:
        return getattr(saved, "data", None)
    except RuntimeError:
        return None


def _converted(node: Node, made: Tensor) -> _Output | None:
    """What is known of a copy in another dtype, as autocast makes of a float32 output, or of a view of one."""
    node = node.next_functions[0][0]
    while node is not None and node.name() in ("ViewBackward0", "UnsafeViewBackward0"):
        node = node.next_functions[0][0]
    note = node and node.metadata.get(_NOTE, lambda: None)()
    return note and note.converted(made)


def _squared(factors: list[object], made: Tensor) -> _Output | None:
    """What is known of a product whose node keeps these factors: the square of an output, where they are the same."""
    first = factors[0]
    if not isinstance(first, _View) or not all(map(first.same_as, factors)):
        return None
    note = first.note()
    return note and note.square(first, made)


def _note_of(t: Tensor) -> _Output | None:
    """What is known of the output that t is a view of. The graph tells whether that is an output's copy in another
    dtype, or its square: it then gets the output's note, made its own."""
    storage = t.untyped_storage()
    note = getattr(storage, _NOTE, None)
    if note is not None:
        return note
    root = t._base if t._is_view() else t
    node = root.grad_fn
    name = node and node.name()
    if name == "ToCopyBackward0":
        note = _converted(node, root)
    elif name == "PowBackward0" and node._saved_exponent == 2:
        note = _squared([_kept_as(node._raw_saved_self)], root)
    elif name == "MulBackward0":
        note = _squared([_kept_as(node._raw_saved_self), _kept_as(node._raw_saved_other)], root)
    if note is not None:
        setattr(storage, _NOTE, note)
    return note


class Packing:
    """The hooks of one `packed_activations` block; `below`: those around it, through which all goes that it keeps."""

    def __init__(self, below: Hooks | None) -> None:
        self.below = below
        self._last: _Output | None = None  # what is known last: of an output that may be gone when its square is kept

    def pack(self, t: Tensor) -> _Kept | _Gate | _View:
        instead = getattr(t, _NOTE, None)
        if instead is None and t.layout is torch.strided and not t.is_nested:
            note = _note_of(t)
            instead = note and note.keep_instead_of(t, self.below)
            self._last = note if instead else self._last
        return instead or _Kept(t, self.below)

    @staticmethod
    def unpack(kept: _Kept | _Gate | _View) -> Tensor:
        return kept.unpack()

    def qrelu(self, x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim, inplace) -> Tensor:
        """qrelu, or qrelu_, with an output that can be kept as codes."""
        _autograd.refuse_forward_mode(x, alpha)
        if inplace:
            check_inplace(ste, rounding, alpha_grad if alpha.requires_grad else None, x.requires_grad)
            root = x._base if x._is_view() else x
            if root.is_leaf and root.requires_grad:
                raise RuntimeError("inplace=True would write to a leaf that requires grad; use inplace=False")
        y = _PackedQReLU.apply(
            x, alpha, self.below, inplace, (bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)
        )
        if (note := getattr(y.untyped_storage(), _NOTE, None)) is not None:
            note.hand_out(y)
        return y


def packing_of(hooks: Hooks | None) -> Packing | None:
    """The packing that these hooks are of, if they are of one."""
    packing = getattr(hooks[0], "__self__", None) if hooks else None
    return packing if isinstance(packing, Packing) else None


def active_packing() -> Packing | None:
    """The packing whose hooks are the innermost ones. Where others are, such as a checkpoint's, they see what is kept,
    and see it as it is without a packing."""
    if torch.compiler.is_compiling():
        return None
    # Mostly there are none: asked for first, as each question costs a call something.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None or torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled():
        return None
    return packing_of(hooks)


class _PackedQReLU(torch.autograd.Function):
    """qrelu whose y carries a note. config: bits, ste, rounding, alpha_grad, alpha_scale, channel_dim."""

    @staticmethod
    def forward(ctx, x, alpha, below, inplace, config):
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
        gate = None
        if kind != "nothing":
            gate = _Gate(_Kept(mask.detach(), below))  # detached: what the note keeps must not carry the note
            setattr(mask, _NOTE, gate)
        if y.is_contiguous(memory_format=memory_format):
            # Under ceil and hwgq T[1] = 0, so that x > 0 is c > 0.
            codes_suffice = kind == "positive" and rounding != "nearest"
            alpha_now = alpha.detach().clone()  # whatever an optimizer makes of it
            rebuilding = _Rebuilding(y, bits, channel_dim, memory_format)
            output = _Output(y, codes.detach(), alpha_now, gate if codes_suffice else None, rebuilding)
            setattr(y.untyped_storage(), _NOTE, output)
        ctx.config = (*config, need_grad_x, need_grad_alpha)
        ctx.gate = gate and weakref.ref(gate)  # what autograd keeps holds it, and lets it go after the backward
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            alpha if keep_x else None, x if keep_x else None, mask if gate else None, codes if keep_codes else None
        )
        return y

    @staticmethod
    def backward(ctx, grad_y):
        gate = ctx.gate and ctx.gate()
        alpha, x, mask, codes = ctx.saved_tensors
        if grad_y is None:
            return (None,) * 5
        config = ctx.config
        if gate is not None and gate.by_codes:
            if torch.is_grad_enabled() and grad_y.requires_grad:  # the op has a second derivative with a mask only
                mask = reference.unpack(mask, reference.CODE_WIDTH[config[0]], grad_y.numel()).ne(0)
                mask = reference.pack(mask.to(torch.uint8), 1)
            else:
                mask, codes, config = None, mask, _autograd.by_codes(config)
        grad_x, grad_alpha = _autograd.backward_from_kept(grad_y, alpha, x, mask, codes, config, ctx.memory_format)
        return grad_x, grad_alpha if ctx.config[-1] else None, None, None, None


def square(y: Tensor) -> Tensor:
    """y * y for the output y of a qrelu; inside of `packed_activations` it is kept as y's codes, as y is, and so is its
    copy in another dtype."""
    z = y.square()
    if active_packing() is not None and isinstance(z, Tensor) and z.requires_grad and (note := _note_of(z)) is not None:
        note.hand_out(z)
    return z


@contextlib.contextmanager
def packed_activations() -> Iterator[None]:
    """`with packed_activations():` around a forward: the outputs of `qrelu` in it are kept for the backward as codes.

    What a later layer keeps of such an output y (Linear, Conv, matmul, pooling, attention; y itself or a view of it)
    is kept as y's packed codes, of 1, 2, 4 or 8 bits an element, and rebuilt in that layer's backward, bit for bit:
    every gradient is the same as without. Where the codes also say what the coarse gradient needs (`relu` under "ceil"
    and "hwgq"), they replace its mask. If nobody keeps y, because the next layer is frozen, its codes go with it.

    Bits an element for y and its coarse gradient together, b the bits of a packed code: relu b (b + 1 under "nearest"),
    clipped_relu b + 1, identity b; an STE that needs x keeps x as before, and b. A learned alpha adds nothing under
    "exact"; its 2-bit state under "two_valued" and "three_valued" (instead of the mask). Beside that one copy of alpha:
    its value may change before the backward.

    It holds for the thread that opened it, and for eager code; in a function that torch.compile compiles it does
    nothing (`qrelu_linear` and `qrelu_conv2d` save there too). Opened in a function that torch.func transforms it does
    nothing either; around a `torch.func.grad` torch refuses it, as all saved-tensor hooks. The square of y (`y * y`,
    `y ** 2`) is kept as the same codes, and a copy in another dtype, as autocast makes of a float32 y, if y lives until
    then. Kept whole, as without it: y after a write in place before it is kept, and outside of the block; all inside of
    a checkpointed function, which keeps nothing anyway. Around checkpointed functions, and inside of other saved-tensor
    hooks (`torch.autograd.graph.save_on_cpu`), it works as it should: those get the codes.

    A tensor that is changed in place after it was kept is an error in the backward, as ever, unless it is kept as
    codes: those have the value of then, and the gradient is right. Like torch, it cannot see a write through `.data`.
    A NaN of x, which makes y NaN, comes back from its code as L[q].

    Source of the levels and the coarse gradients: see `qrelu`.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        yield
        return
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if packing_of(hooks) is not None:
        yield
        return
    packing = Packing(hooks)
    with saved_tensors_hooks(packing.pack, packing.unpack):
        yield


_opened = threading.local()  # .stack: (module, its open block), innermost last


def _open(module: nn.Module, args: tuple) -> None:
    if torch.compiler.is_compiling():
        return
    block = packed_activations()
    block.__enter__()
    _opened.__dict__.setdefault("stack", []).append((module, block))


def _close(module: nn.Module, args: tuple, output: object) -> None:
    if torch.compiler.is_compiling():
        return
    stack = _opened.__dict__.get("stack")
    if stack and stack[-1][0] is module:  # it is not where a hook before `_open` has failed
        stack.pop()[1].__exit__(None, None, None)


class PackedModel:
    """What `pack_activations_` returns: `remove()` undoes it, and so does the end of a `with` block around it."""

    def __init__(self, model: nn.Module) -> None:
        self._hooks = (
            model.register_forward_pre_hook(_open, prepend=True),
            model.register_forward_hook(_close, always_call=True),
        )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> PackedModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def pack_activations_(model: nn.Module) -> PackedModel:
    """Have every forward of `model` run inside of `packed_activations`, until the handle's `remove()`.

    model: any module; its parameters, state_dict and outputs stay as they are. A copy of it is packed as well.

    Returns a handle, which is also a context manager. Raises TypeError if model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    return PackedModel(model)
