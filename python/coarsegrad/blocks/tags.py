"""What tensors carry in a forward: that they are codes already, and their staircased form, for the next reader.

These are attributes of the tensor objects, so that they go where the tensor goes and are freed with it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_internals import saved_tensor_hooks

_CODES = "_coarsegrad_codes"
_SHARED = "_coarsegrad_shared"


class _Forwards(threading.local):
    """The forwards that run in this thread, innermost last: for each, the leaves that got attributes in it."""

    def __init__(self) -> None:
        self.running: list[list[tuple[weakref.ref[Tensor], str]]] = []


_forwards = _Forwards()


def open_forward(module: nn.Module, args: tuple) -> None:
    """A forward pre-hook of the model."""
    if not torch.compiler.is_compiling():
        _forwards.running.append([])


def close_forward(module: nn.Module, args: tuple, output: object) -> None:
    """A forward hook of the model."""
    if not torch.compiler.is_compiling() and _forwards.running:
        for tagged, name in _forwards.running.pop():
            if (x := tagged()) is not None:
                vars(x).pop(name, None)


def _state(x: Tensor) -> object:
    """What must be the same where an attribute of x is set and where it is read.

    A tensor written to since is another. Inside a checkpointed function, which runs again with other hooks, on inputs
    that may be other objects, nothing holds that was set outside. Compiled code has no such state to ask for.
    """
    if torch.compiler.is_compiling():
        return None
    return 0 if x.is_inference() else x._version, saved_tensor_hooks(), torch.is_grad_enabled()


def attach(x: Tensor, name: str, value: object) -> None:
    """Set an attribute of x. On a leaf, such as a batch or, without gradients, an output, it stays until the end of the
    forward of the model, and outside of that it is not set."""
    if not torch.compiler.is_compiling() and x.is_leaf:
        if not _forwards.running:
            return
        _forwards.running[-1].append((weakref.ref(x), name))
    setattr(x, name, (value, _state(x)))


def attached(x: Tensor, name: str) -> Any:
    """The attribute; None if there is none that holds."""
    found = getattr(x, name, None)
    return None if found is None or found[1] != _state(x) else found[0]


def mark_codes(y: Tensor) -> Tensor:
    """Let the layers that read y, whose values are levels, have no staircase of their own."""
    setattr(y, _CODES, (True, _state(y)))
    return y


def is_codes(x: Tensor) -> bool:
    return attached(x, _CODES) is not None


def shared(x: Tensor, key: object, make: Callable[[], Tensor]) -> Tensor:
    """The staircased form of x that an earlier reader made with the same settings, or a new one.

    Compiled code always makes a new one: compilers merge equal calls, and know what was written to between them.
    """
    if torch.compiler.is_compiling():
        return make()
    forms: dict[object, Tensor] | None = attached(x, _SHARED)
    if forms is None:
        attach(x, _SHARED, forms := {})
    if key not in forms:
        forms[key] = make()
    return forms[key]
