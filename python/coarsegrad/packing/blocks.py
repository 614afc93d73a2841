"""What users open: `packed_activations` around a forward, `pack_activations_` for every forward of a model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from .._torch_internals import functorch_active, saved_tensor_hooks
from .graphs import open_blocks
from .hooks import Packing, packing_of


@contextlib.contextmanager
def packed_activations() -> Iterator[None]:
    """`with packed_activations():` around a forward saves the outputs of `qrelu` and `qsigned` in it as packed codes.

    A later layer (Linear, Conv, matmul, pooling, attention) that saves such an output y, or a view of it, saves y's
    codes instead, at 1, 2, 4 or 8 bits per element, and its backward rebuilds y bit for bit: every gradient is the same
    as without. If the codes also determine the coarse gradient (`relu` under "ceil" and "hwgq"), they replace its mask.
    If nobody saves y, because the next layer is frozen, its codes are freed with it.

    Bits per element for y and its coarse gradient together, with b the width of a packed code: relu b (b + 1 under
    "nearest"), clipped_relu and trust b + 1, identity b; an STE that needs x still saves x, plus b bits. A learned
    alpha adds nothing under "exact", and replaces the mask by a 2-bit state (of trust by x) under "two_valued" and
    "three_valued". A copy of alpha
    is saved as well, because its value may change before the backward. For an output of `qsigned` it is b, or b + 1 for
    "clipped" with a given alpha, and 16 / group with a dynamic one; a `gated_product` of two outputs is saved as their
    codes.

    The block applies to the thread that opened it. A function compiled by torch.compile is packed if the block is
    inside it or around its call, which compiles it again; its graph saves no copy of alpha. A graph that is compiled
    without AOTAutograd (backend="eager") is not packed, and warns. The block does nothing in a function transformed by
    torch.func; around a `torch.func.grad` torch refuses it, as it does all saved-tensor hooks. The square of y
    (`y * y`, `y ** 2`) is saved as the same codes, and so is a copy in another dtype, such as autocast makes of a
    float32 y, if y is still alive when the copy is saved. Saved unpacked: y outside the block, y if it was written to
    in place before being saved, and everything inside a checkpointed function, which saves nothing anyway. Around
    checkpointed functions, and inside other saved-tensor hooks (`torch.autograd.graph.save_on_cpu`), it works: those
    hooks get the codes.

    Changing a saved tensor in place is an error in the backward, as usual, unless it is saved as codes: these keep the
    old value, and the gradient is right. Like torch, the block cannot see a write through `.data`. If x is NaN, so
    that y is NaN, the rebuilt value is L[q]; of `qsigned` it is 0 with a given alpha, and NaN with a dynamic one.

    Source of the levels and the coarse gradients: see `qrelu`.
    """
    open_blocks.here.count += 1
    try:
        with contextlib.nullcontext() if torch.compiler.is_compiling() else _hooks():
            yield
    finally:
        open_blocks.here.count -= 1


def _hooks() -> contextlib.AbstractContextManager:
    """The saved-tensor hooks of a block; nothing if a block around it has them."""
    if functorch_active() or packing_of(hooks := saved_tensor_hooks()) is not None:
        return contextlib.nullcontext()
    packing = Packing(hooks)
    return saved_tensors_hooks(packing.save, packing.load)


_opened = threading.local()  # .stack: (module, its open block), innermost last


def _open(module: nn.Module, args: tuple) -> None:
    if torch.compiler.is_compiling():
        open_blocks.here.count += 1
        return
    block = packed_activations()
    block.__enter__()
    _opened.__dict__.setdefault("stack", []).append((module, block))


def _close(module: nn.Module, args: tuple, output: object) -> None:
    if torch.compiler.is_compiling():
        open_blocks.here.count -= 1
        return
    stack = _opened.__dict__.get("stack")
    if stack and stack[-1][0] is module:  # not if a hook before `_open` failed
        stack.pop()[1].__exit__(None, None, None)


class PackedModel:
    """The handle from `pack_activations_`. `remove()`, or leaving a `with` block around it, undoes the packing."""

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


def is_packed(model: nn.Module) -> bool:
    """Whether `pack_activations_` was given this module, and not undone."""
    return any(hook is _open for hook in model._forward_pre_hooks.values())


def pack_activations_(model: nn.Module) -> PackedModel:
    """Run every forward of `model` inside `packed_activations`, until the handle's `remove()`.

    model: any module; its parameters, state_dict and outputs do not change. A copy of it is packed as well. To be
        compiled it must be packed first: torch.compile ignores the hooks that a compiled module is given later.

    Returns a handle, which is also a context manager. Raises TypeError if model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    return PackedModel(model)
