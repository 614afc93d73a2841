"""What tensors carry in a forward: that they are codes already, and their staircased form, for the next reader.

These are attributes of the tensor objects, so that they go where the tensor goes and are freed with it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch_internals import Hooks, saved_tensor_hooks

_CODES = "_coarsegrad_codes"
_SHARED = "_coarsegrad_shared"


class _Forwards(threading.local):
    """The forwards that run in this thread, innermost last: for each, the tensors that got attributes in it."""

    def __init__(self) -> None:
        self.running: list[list[tuple[weakref.ref[Tensor], str]]] = []


_forwards = _Forwards()


def open_forward(module: nn.Module, args: tuple) -> None:
    """A forward pre-hook of the model."""
    if not torch.compiler.is_compiling():
        _forwards.running.append([])


def close_forward(module: nn.Module, args: tuple, output: object) -> None:
    """A forward hook of the model: leave nothing on tensors that outlive the forward, such as a batch or an output."""
    if not torch.compiler.is_compiling() and _forwards.running:
        for tagged, name in _forwards.running.pop():
            if (x := tagged()) is not None:
                vars(x).pop(name, None)


def _version(x: Tensor) -> int:
    """A tensor written to since is another. Compiled code cannot ask."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def attach(x: Tensor, name: str, value: object) -> None:
    """Set an attribute of x, until x is written to or the forward ends."""
    setattr(x, name, (value, _version(x)))
    if not torch.compiler.is_compiling() and _forwards.running:
        _forwards.running[-1].append((weakref.ref(x), name))


def attached(x: Tensor, name: str) -> Any:
    """What was attached; None if there is nothing."""
    value, version = getattr(x, name, (None, 0))
    return value if version == _version(x) else None


def mark_codes(y: Tensor) -> Tensor:
    """Let the layers that read y, whose values are levels, have no staircase of their own."""
    attach(y, _CODES, True)
    return y


def is_codes(x: Tensor) -> bool:
    return attached(x, _CODES) is not None


class _Shared(NamedTuple):
    """A staircased form of x. hooks: the saved-tensor hooks under which it was made, as a checkpoint that runs again
    must make it again."""

    y: Tensor
    hooks: Hooks | None
    with_grad: bool


def shared(x: Tensor, key: object, make: Callable[[], Tensor]) -> Tensor:
    """The staircased form of x that an earlier reader made with the same settings, or a new one.

    Compiled code always makes a new one: compilers merge equal calls, and know what was written to between them.
    """
    if torch.compiler.is_compiling():
        return make()
    now = (saved_tensor_hooks(), torch.is_grad_enabled())
    forms: dict[object, _Shared] | None = attached(x, _SHARED)
    found = None if forms is None else forms.get(key)
    if found is not None and found[1:] == now:
        return found.y
    y = make()
    if _forwards.running or not x.is_leaf:  # a leaf, such as a batch, would keep it
        if forms is None:
            attach(x, _SHARED, forms := {})
        forms[key] = _Shared(y, *now)
    return y
