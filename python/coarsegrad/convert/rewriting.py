"""Classes with calls of activations made calls of submodules.

A class is not changed. `rewritten` makes a subclass of the same name, with some methods compiled anew; an instance is
given it as its class. Control flow, torch.compile, checkpointing and pickling then work as with any other class.
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

from torch import nn

from .source import AT, Call, Edit, Source, Span, keyed_name

Plan = frozenset[Edit]


@dataclass(frozen=True)
class Found:
    """What a class's methods do with activations: calls that can be rewritten, and (method, why not) of the others.

    mentions: `name` of every self.name in the methods, as often as it is there.
    """

    calls: tuple[Call, ...]
    others: tuple[tuple[str, str], ...]
    mentions: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    """A function that can be compiled anew. wrapped: as it is found; function: without its wrappers.

    method: whether its first parameter is the module. cls: the name of the class it is written in.
    """

    where: str
    wrapped: Callable
    function: FunctionType
    method: bool
    cls: str

    def source(self) -> Source:
        return Source(self.where, self.function, method=self.method)

    def wrappers(self) -> set[CodeType]:
        """The code of what is around the function."""
        found, function = set(), self.wrapped
        while (below := getattr(function, "__wrapped__", None)) is not None:
            found.add(getattr(function, "__code__", None))
            function = below
        return found - {None}


def _is_torchs(base: type) -> bool:
    return base is nn.Module or base.__module__.startswith("torch.nn.modules.")


@functools.cache
def find_calls(cls: type[nn.Module], functions: frozenset[Callable]) -> Found:
    """The calls of `functions`, and of submodules with one argument, in the methods of cls and of its bases."""
    calls: list[Call] = []
    others: list[tuple[str, str]] = []
    mentions: list[str] = []
    defined: dict[str, type] = {}
    for base in cls.__mro__:
        if _is_torchs(base):
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
                    others.append((name, "its source cannot be read"))
                continue
            mentions += source.mentions
            called = any(call.function for call in source.calls)
            if overriding is not base:
                if called and _calls_super(overriding, name):
                    others.append((name, f"that of {base.__name__} is called through super()"))
            elif why := kind or source.why_not or _why_not_rewrapped(function):
                if called:
                    others.append((name, why))
            else:
                calls += source.calls
                others += [(name, why) for why in source.others]
    return Found(tuple(calls), tuple(others), tuple(mentions))


@functools.cache
def activation_of(cls: type[nn.Module], functions: frozenset[Callable]) -> str | None:
    """Either "ReLU" or "ReLU squared", if that is what the source of the class's forward says it is."""
    function = inspect.getattr_static(cls, "forward", None)
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__") or _is_torchs(cls):
        return None
    try:
        return Source("forward", function, functions).what_of_its_argument()
    except (OSError, TypeError, SyntaxError):
        return None


@functools.cache
def rewritten(cls: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """A subclass of cls, named as it is, with the edits of `plan` in its methods.

    Raises whatever keeps a function from being compiled anew, or the class from being made.
    """
    by_function: dict[str, dict[Span, Edit]] = {}
    for edit in plan:
        by_function.setdefault(edit.where, {})[edit.span] = edit
    handed = {edit.hands_on for edit in plan}
    namespace: dict[str, object] = {}
    for where, edits in by_function.items():
        found = function_at(cls, where)
        if ":" not in where:
            namespace[where] = _compiled(found, edits, keyed=False)
        if where in handed:
            namespace[keyed_name(where)] = _compiled(found, edits, keyed=True)

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple:
        _, _, *state = cls.__reduce_ex__(self, max(protocol, 2))
        return _new, (cls, plan), *state

    def __setstate__(self: nn.Module, state: dict) -> None:
        cls.__setstate__(self, state)
        for name in self._modules.keys() & vars(self).keys():  # where torch's own puts a function for a missing one
            del self.__dict__[name]

    namespace |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    namespace |= {"__reduce_ex__": __reduce_ex__, "__setstate__": __setstate__, "_rewritten_from": (cls, plan)}
    return type(cls)(cls.__name__, (cls,), namespace)


def original(cls: type[nn.Module]) -> tuple[type[nn.Module], Plan]:
    """(the class that `rewritten` was given, the plan); of any other class itself and nothing."""
    return vars(cls).get("_rewritten_from", (cls, frozenset()))


def _new(cls: type[nn.Module], plan: Plan) -> nn.Module:
    made = rewritten(cls, plan)
    return made.__new__(made)


def function_at(cls: type[nn.Module], where: str) -> Function:
    """The function that an Edit's `where` names, for instances of cls. Raises where it is not there any more."""
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
    """Of which function compiled code of `rewritten` is."""
    return _origins.get(code)


def _function_of(value: object) -> tuple[str, Callable | None]:
    """(why it is no plain method, or ""; the function in it, in its wrappers)."""
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


def _why_not_rewrapped(function: Callable) -> str | None:
    try:
        _rewrapped(function, inspect.unwrap(function))
    except TypeError as error:
        return str(error)
    return None


def _rewrapped(function: Callable, inner: FunctionType) -> Callable:
    """The wrappers of `function` around another innermost function: their code as it is, with the cell that holds the
    function below exchanged. What made them is not called again."""
    below = getattr(function, "__wrapped__", None)
    if below is None:
        return inner
    cells = getattr(function, "__closure__", None) or ()
    holds = [_contents(cell) is below for cell in cells]
    if not isinstance(function, FunctionType) or not any(holds):
        raise TypeError(f"it is wrapped by {getattr(function, '__qualname__', function)!s}, which cannot be made anew")
    new_below = _rewrapped(below, inner)
    closure = tuple(CellType(new_below) if held else cell for cell, held in zip(cells, holds))
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__dict__.update(function.__dict__, __wrapped__=new_below)
    for name in ("__kwdefaults__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(made, name, getattr(function, name))
    return made


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None


# ----------------------------------------------------------------------------------------- compiling


class _Mangled(ast.NodeTransformer):
    """Private names, as a class's body has them."""

    def __init__(self, cls: str) -> None:
        self._prefix = f"_{cls.lstrip('_')}"

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field in ("id", "attr", "arg", "name"):
            name = getattr(node, field, None)
            if isinstance(name, str) and name.startswith("__") and not name.endswith("__"):
                setattr(node, field, self._prefix + name)
        return super().generic_visit(node)


def _compiled(found: Function, edits: dict[Span, Edit], keyed: bool) -> Callable:
    """The function with edits in it, in its wrappers; its lines and columns are those of its file. keyed: what comes
    after the module as an argument is by which calls it is reached."""
    source, inner = found.source(), found.function
    owner = source.self_name if found.method else "_module"
    names = source.edited(edits, owner, keyed)
    definition = source.definition
    if found.cls:
        definition = _Mangled(found.cls).visit(definition)
    _without_what_is_evaluated(definition)
    if keyed:
        arguments = definition.args.posonlyargs or definition.args.args
        arguments[found.method : found.method] = [ast.arg(name) for name in ([] if found.method else [owner]) + [AT]]
    # Within another function, so that its free variables (__class__ of super() among them) are free there too.
    parameters = [ast.arg(name) for name in {**dict.fromkeys(inner.__code__.co_freevars), **names}]
    body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]
    arguments = ast.arguments([], parameters, None, [], [], None, [])
    outer = ast.FunctionDef("make", arguments, body, [], None, type_params=[])
    tree = ast.fix_missing_locations(ast.Module([outer], []))
    ast.increment_lineno(tree, source.first_line - 1)
    for node in ast.walk(tree):
        if hasattr(node, "col_offset"):
            node.col_offset += source.indent
            node.end_col_offset += source.indent
    flags = inner.__code__.co_flags & __future__.annotations.compiler_flag
    namespace: dict[str, Callable] = {}
    exec(compile(tree, inner.__code__.co_filename, "exec", flags, dont_inherit=True), inner.__globals__, namespace)
    code = namespace["make"](*parameters).__code__
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or ()))  # the very same, for nonlocal
    closure = tuple(cells.get(name) or CellType(names[name]) for name in code.co_freevars)
    made = FunctionType(code, inner.__globals__, inner.__name__, inner.__defaults__, closure)
    made.__dict__.update(inner.__dict__)
    for name in ("__kwdefaults__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(made, name, copy.copy(getattr(inner, name)))
    _origins[code] = found.where
    return _rewrapped(found.wrapped, made)


def _without_what_is_evaluated(definition: ast.FunctionDef) -> None:
    """Decorators, defaults and annotations are taken over as the values that they have."""
    arguments = definition.args
    definition.decorator_list, definition.returns = [], None
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
