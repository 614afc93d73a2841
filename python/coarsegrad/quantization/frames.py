"""Stack frames, and the functions that they belong to."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn

from .rewriting import origin, original
from .running import run
from .source import CALL_PATH, COUNTER

TORCH = os.path.dirname(torch.__file__) + os.sep
_CAN_LOCATE = sys.version_info >= (3, 11)  # earlier, a frame knows its line but not its call

Position = tuple[int, int | None, int, int | None]


@dataclass(frozen=True)
class Frame:
    """A frame of the stack that led to a call.

    position: of the call in its file: line, column, last line, last column; columns are None if unknown.
    module: the first argument, if it is a module. in_torch: whether the code is torch's.
    key_variables: those by which a keyed function chooses its submodule.
    """

    code: CodeType
    position: Position
    module: nn.Module | None
    in_torch: bool
    globals: dict[str, Any] = field(repr=False)
    key_variables: dict[str, Any]


def stack_from(frame: FrameType | None) -> list[Frame]:
    """The stack from a frame outwards, up to `run`."""
    found = []
    while frame is not None and frame.f_code is not run.__code__:
        code, first = frame.f_code, None
        variables = frame.f_locals if code.co_flags & inspect.CO_OPTIMIZED else {}
        if code.co_argcount:
            first = variables.get(code.co_varnames[0])
        key = {name: value for name, value in variables.items() if name == CALL_PATH or name.startswith(COUNTER)}
        inside = code.co_filename.startswith(TORCH)
        module = first if isinstance(first, nn.Module) else None
        found.append(Frame(code, _position(frame), module, inside, frame.f_globals, key))
        frame = frame.f_back
    return found


@functools.lru_cache(maxsize=4096)
def _positions(code: CodeType) -> list[Any]:
    return [(line, column, last, last_column) for line, last, column, last_column in code.co_positions()]


def _position(frame: FrameType) -> Position:
    if _CAN_LOCATE:
        return _positions(frame.f_code)[frame.f_lasti // 2]
    return frame.f_lineno, None, frame.f_lineno, None


def locate(stack: list[Frame], i: int) -> tuple[str, int] | None:
    """(the function that frame i belongs to, as an Edit names it; the index of that function's frame: i, or further out
    if frame i is a lambda or a nested function)."""
    frame = stack[i]
    if (where := origin(frame.code)) is not None:
        return where, i
    if frame.module is not None:
        cls = original(type(frame.module))[0]
        for base in cls.__mro__:
            for name, value in vars(base).items():
                if _code_of(value) is frame.code:
                    is_own = inspect.getattr_static(cls, name) is value
                    return (name if is_own else f"{base.__module__}:{base.__qualname__}.{name}"), i
    where = _global_function(frame.code, frame.globals)
    if where is not None:
        return where, i
    for j in range(i + 1, len(stack)):
        if _is_within(frame.code, stack[j].code):
            return locate(stack, j)
    return None


def _code_of(value: Any) -> CodeType | None:
    value = getattr(value, "__func__", value)
    if not callable(value) or not hasattr(value, "__dict__"):
        return None
    try:
        value = inspect.unwrap(value)
    except ValueError:
        return None
    return value.__code__ if isinstance(value, FunctionType) else None


def _global_function(code: CodeType, variables: dict[str, Any]) -> str | None:
    """The global function with this code and these globals, as "module:name"."""
    module = variables.get("__name__")
    path = getattr(code, "co_qualname", code.co_name)
    if module in sys.modules and "<" not in path:
        value: object = sys.modules[module]
        for part in path.split("."):
            value = inspect.getattr_static(value, part, None)
        if _code_of(value) is code:
            return f"{module}:{path}"
    return None


def _is_within(code: CodeType, outer: CodeType) -> bool:
    return any(isinstance(c, CodeType) and (c is code or _is_within(code, c)) for c in outer.co_consts)
