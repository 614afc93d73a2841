"""Subclasses in which calls of activations have become calls of submodules.

The original class does not change. `rewritten` makes a subclass of the same name with some methods recompiled, and an
instance gets it as its class. Control flow, torch.compile, checkpointing and pickling work as with any other class.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any, TypeVar

from torch import nn

from .editing import Edit, Editor, keyed_name
from .source import CALL_PATH, Call, Source, Span

Plan = frozenset[Edit]
_F = TypeVar("_F", bound=Callable)


def _cached(function: _F) -> _F:
    """functools.cache for type checkers, which lose the signature in it."""
    return functools.cache(function)  # type: ignore[return-value]


@dataclass(frozen=True)
class MethodCalls:
    """The calls in a class's methods that can be rewritten, and (method, reason) of those that cannot.

    mentions: `name` of every self.name in the methods, once per occurrence.
    """

    calls: tuple[Call, ...]
    unsupported: tuple[tuple[str, str], ...]
    mentions: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    """A function that can be recompiled. wrapped: with its wrappers; function: without.

    method: whether its first parameter is the module. cls: the name of the class whose body defines it.
    """

    where: str
    wrapped: Callable
    function: FunctionType
    method: bool
    cls: str

    def source(self) -> Source:
        return Source(self.where, self.function, method=self.method)

    def wrappers(self) -> set[CodeType]:
        """The code of the wrappers."""
        found, function = set(), self.wrapped
        while (inner := getattr(function, "__wrapped__", None)) is not None:
            if (code := getattr(function, "__code__", None)) is not None:
                found.add(code)
            function = inner
        return found


def _is_torch_class(base: type) -> bool:
    return base is nn.Module or base.__module__.startswith("torch.nn.modules.")


@_cached
def find_calls(cls: type[nn.Module], functions: frozenset[Callable]) -> MethodCalls:
    """The calls of `functions`, and of submodules with one argument, in the methods of cls and of its bases."""
    calls: list[Call] = []
    unsupported: list[tuple[str, str]] = []
    mentions: list[str] = []
    defined: dict[str, type] = {}
    for base in cls.__mro__:
        if _is_torch_class(base):
            break
        for name, value in vars(base).items():
            kind, function = _function_of(value)
            if function is None or (name.startswith("__") and name.endswith("__")):
                continue
            overriding = defined.setdefault(name, base)
            try:
                source = Source(name, function, functions)
            except (OSError, TypeError, SyntaxError):
                if overriding is base and name == "forward":
                    unsupported.append((name, "its source cannot be read"))
                continue
            mentions += source.mentions
            called = any(call.function for call in source.calls)
            if overriding is not base:
                if called and _calls_super(overriding, name):
                    unsupported.append((name, f"that of {base.__name__} is called through super()"))
            elif why := kind or source.why_not or _why_not_rewrappable(function):
                if called:
                    unsupported.append((name, why))
            else:
                calls += source.calls
                unsupported += [(name, why) for why in source.unsupported]
    return MethodCalls(tuple(calls), tuple(unsupported), tuple(mentions))


@_cached
def activation_of(cls: type[nn.Module], functions: frozenset[Callable]) -> str | None:
    """Either "ReLU" or "ReLU squared", if the source of the class's forward computes that."""
    function = inspect.getattr_static(cls, "forward", None)
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__") or _is_torch_class(cls):
        return None
    try:
        return Source("forward", function, functions).activation()
    except (OSError, TypeError, SyntaxError):
        return None


@_cached
def rewritten(cls: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """A subclass of cls, with the same name, with the edits of `plan` in its methods.

    Raises whatever prevents a function from being recompiled or the class from being made.
    """
    by_function: dict[str, dict[Span, Edit]] = {}
    for edit in plan:
        by_function.setdefault(edit.where, {})[edit.span] = edit
    keyed_callees = {edit.keyed_callee for edit in plan}
    namespace: dict[str, object] = {}
    for where, edits in by_function.items():
        found = function_at(cls, where)
        if ":" not in where:
            namespace[where] = _compile(found, edits, keyed=False)
        if where in keyed_callees:
            namespace[keyed_name(where)] = _compile(found, edits, keyed=True)

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple:
        reduced: Any = cls.__reduce_ex__(self, max(protocol, 2))
        return _new, (cls, plan), *reduced[2:]

    def __setstate__(self: nn.Module, state: dict) -> None:
        cls.__setstate__(self, state)
        for name in self._modules.keys() & vars(self).keys():  # torch's own sets a function if one is missing
            del self.__dict__[name]

    namespace |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    namespace |= {"__reduce_ex__": __reduce_ex__, "__setstate__": __setstate__, "_rewritten_from": (cls, plan)}
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, (cls,), namespace)


def original(cls: type[nn.Module]) -> tuple[type[nn.Module], Plan]:
    """(the class given to `rewritten`, the plan); for any other class, the class itself and an empty plan."""
    return vars(cls).get("_rewritten_from", (cls, frozenset()))


def _new(cls: type[nn.Module], plan: Plan) -> nn.Module:
    made = rewritten(cls, plan)
    return made.__new__(made)


def function_at(cls: type[nn.Module], where: str) -> Function:
    """The function that an Edit's `where` names, for instances of cls. Raises an exception if it no longer exists."""
    if ":" not in where:
        found = inspect.getattr_static(cls, where)
        base = next(base for base in cls.__mro__ if where in vars(base))
        return Function(where, found, inspect.unwrap(found), True, base.__name__)
    module, _, path = where.partition(":")
    *classes, name = path.split(".")
    owner: object = importlib.import_module(module)
    for part in classes:
        owner = getattr(owner, part)
    found = inspect.getattr_static(owner, name)
    static = isinstance(found, staticmethod)
    found = found.__func__ if static else found
    method = isinstance(owner, type) and issubclass(cls, owner) and not static
    return Function(where, found, inspect.unwrap(found), method, classes[-1] if classes else "")


_origins: dict[CodeType, str] = {}


def origin(code: CodeType) -> str | None:
    """The function, as an Edit names it, that `rewritten` recompiled to this code."""
    return _origins.get(code)


def _function_of(value: Any) -> tuple[str, Any]:
    """(why it is not a plain method, or ""; the function in it, with its wrappers)."""
    if isinstance(value, (staticmethod, classmethod)):
        kind, value = f"is a {type(value).__name__}", value.__func__
    elif isinstance(value, property):
        kind, value = "is a property", value.fget
    else:
        kind = ""
    inner = value.__wrapped__ if hasattr(value, "__wrapped__") else value
    return kind, value if isinstance(inner, FunctionType) else None


def _calls_super(cls: type, name: str) -> bool:
    try:
        return f"super().{name}(" in inspect.getsource(cls)
    except (OSError, TypeError):
        return False


# ------------------------------------------------------------------------------------------ wrappers


def _why_not_rewrappable(function: Callable) -> str | None:
    try:
        _rewrap(function, inspect.unwrap(function))
    except TypeError as error:
        return str(error)
    return None


def _rewrap(function: Callable, inner: FunctionType) -> Callable:
    """The wrappers of `function` around another innermost function: copies with the same code, in which the cell that
    holds the wrapped function is replaced. The decorators are not called again."""
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        return inner
    cells = getattr(function, "__closure__", None) or ()
    holds = [_contents(cell) is wrapped for cell in cells]
    if not isinstance(function, FunctionType) or not any(holds):
        raise TypeError(f"it is wrapped by {getattr(function, '__qualname__', function)!s}, which cannot be rebuilt")
    new_wrapped = _rewrap(wrapped, inner)
    closure = tuple(CellType(new_wrapped) if held else cell for cell, held in zip(cells, holds))
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__dict__.update(function.__dict__, __wrapped__=new_wrapped)
    for name in ("__kwdefaults__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(made, name, getattr(function, name))
    return made


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None


# ----------------------------------------------------------------------------------------- compiling


class _MangleNames(ast.NodeTransformer):
    """Mangles private names, as in a class body."""

    def __init__(self, cls: str) -> None:
        self._prefix = f"_{cls.lstrip('_')}"

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field in ("id", "attr", "arg", "name"):
            name = getattr(node, field, None)
            if isinstance(name, str) and name.startswith("__") and not name.endswith("__"):
                setattr(node, field, self._prefix + name)
        return super().generic_visit(node)


def _compile(found: Function, edits: dict[Span, Edit], keyed: bool) -> Callable:
    """The function with the edits, in its wrappers. Lines and columns remain those of its file. keyed: whether it takes
    CALL_PATH as the argument after the module."""
    source, inner = found.source(), found.function
    owner = source.self_name if found.method and source.self_name else "_module"
    editor = Editor(source, edits, owner)
    editor.apply(keyed)
    names, definition = editor.names, source.definition
    if found.cls:
        definition = _MangleNames(found.cls).visit(definition)
    _drop_evaluated_parts(definition)
    if keyed:
        new = [CALL_PATH] if found.method else [owner, CALL_PATH]
        positional = definition.args.posonlyargs or definition.args.args
        positional[found.method : found.method] = map(ast.arg, new)
    # Nested in a function, so that its free variables, such as __class__ of super(), stay free variables.
    parameters = [ast.arg(name) for name in {**dict.fromkeys(inner.__code__.co_freevars), **names}]
    body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]
    arguments = ast.arguments([], parameters, None, [], [], None, [])
    outer = ast.FunctionDef("make", arguments, body, [], None, type_params=[])  # type: ignore[call-arg] # from 3.12
    tree = ast.fix_missing_locations(ast.Module([outer], []))
    ast.increment_lineno(tree, source.first_line - 1)
    node: Any
    for node in ast.walk(tree):
        if hasattr(node, "col_offset"):
            node.col_offset += source.indent
            node.end_col_offset += source.indent
    flags = inner.__code__.co_flags & __future__.annotations.compiler_flag
    namespace: dict[str, Callable] = {}
    exec(compile(tree, inner.__code__.co_filename, "exec", flags, dont_inherit=True), inner.__globals__, namespace)
    code = namespace["make"](*parameters).__code__
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or ()))  # the same cells, for nonlocal
    closure = tuple(cells.get(name) or CellType(names[name]) for name in code.co_freevars)
    made = FunctionType(code, inner.__globals__, inner.__name__, inner.__defaults__, closure)
    made.__dict__.update(inner.__dict__)
    for name in ("__kwdefaults__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(made, name, copy.copy(getattr(inner, name)))
    _origins[code] = found.where
    return _rewrap(found.wrapped, made)


def _drop_evaluated_parts(definition: ast.FunctionDef) -> None:
    """Remove decorators, defaults and annotations, whose values the new function takes from the old one."""
    arguments = definition.args
    definition.decorator_list, definition.returns = [], None
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
