"""The Python frames through which a call was reached, and the functions whose source they are."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType

import torch
from torch import nn

from .rewriting import origin, original
from .running import run
from .source import AT

TORCH = os.path.dirname(torch.__file__) + os.sep
_CAN_LOCATE = sys.version_info >= (3, 11)  # before it a frame knows its line, not its call


@dataclass(frozen=True)
class Step:
    """A frame on the way to a call.

    position: where in the file it is: line, column, last line, last column; columns None where that is not known.
    module: its first argument, where that is a module. torch: whether its code is torch's.
    key: its variables by which the sites of a keyed function are chosen.
    """

    code: CodeType
    position: tuple[int, int | None, int, int | None]
    module: nn.Module | None
    torch: bool
    scope: dict[str, object] = field(repr=False)
    key: dict[str, object]


def steps_from(frame: FrameType | None) -> list[Step]:
    """The frames from the innermost outwards, up to that of `run`."""
    found = []
    while frame is not None and frame.f_code is not run.__code__:
        code, first = frame.f_code, None
        variables = frame.f_locals if code.co_flags & inspect.CO_OPTIMIZED else {}
        if code.co_argcount:
            first = variables.get(code.co_varnames[0])
        key = {name: value for name, value in variables.items() if name == AT or name.startswith("_turn_")}
        inside = code.co_filename.startswith(TORCH)
        module = first if isinstance(first, nn.Module) else None
        found.append(Step(code, _position(frame), module, inside, frame.f_globals, key))
        frame = frame.f_back
    return found


@functools.lru_cache(maxsize=4096)
def _positions(code: CodeType) -> list[tuple[int, int, int, int]]:
    return [(line, column, last, last_column) for line, last, column, last_column in code.co_positions()]


def _position(frame: FrameType) -> tuple[int, int | None, int, int | None]:
    if _CAN_LOCATE:
        return _positions(frame.f_code)[frame.f_lasti // 2]
    return frame.f_lineno, None, frame.f_lineno, None


def locate(steps: list[Step], i: int) -> tuple[str, int] | None:
    """(the function of step i as an Edit names it, the step that is called as that function: i itself, or further out
    where step i is a lambda or a function within that one)."""
    step = steps[i]
    if (where := origin(step.code)) is not None:
        return where, i
    if step.module is not None:
        cls = original(type(step.module))[0]
        for base in cls.__mro__:
            for name, value in vars(base).items():
                if _code_of(value) is step.code:
                    is_own = inspect.getattr_static(cls, name) is value
                    return (name if is_own else f"{base.__module__}:{base.__qualname__}.{name}"), i
    where = _global_function(step.code, step.scope)
    if where is not None:
        return where, i
    for j in range(i + 1, len(steps)):
        if _is_within(step.code, steps[j].code):
            return locate(steps, j)
    return None


def _code_of(value: object) -> CodeType | None:
    value = getattr(value, "__func__", value)
    if not callable(value) or not hasattr(value, "__dict__"):
        return None
    try:
        value = inspect.unwrap(value)
    except ValueError:
        return None
    return value.__code__ if isinstance(value, FunctionType) else None


def _global_function(code: CodeType, scope: dict[str, object]) -> str | None:
    """The name of the function of that code, "module:name"."""
    module = scope.get("__name__")
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
