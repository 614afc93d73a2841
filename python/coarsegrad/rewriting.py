"""Calls of activations inside of a module's methods: found in their source, and made calls of submodules.

A class is not changed. `rewritten` makes a subclass of the same name, with those methods compiled anew; an instance is
given it as its class. Control flow, torch.compile, checkpointing and pickling then work as with any other class.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import functools
import inspect
import textwrap
from collections import ChainMap
from collections.abc import Callable, Container
from dataclasses import dataclass
from types import FunctionType, ModuleType

import torch
from torch import nn

# Where a call stands in its method's own source: first line and column, last line and column.
Span = tuple[int, int, int, int]


@dataclass(frozen=True)
class Call:
    """A call in a method, of a function or of a submodule `self.attribute`.

    squared: what is meant is the square of its result.
    line: in the file.
    given: the call whose result it is called with, where nothing else comes to see that.
    """

    method: str
    span: Span
    function: Callable | None
    attribute: str | None
    inplace: bool
    squared: bool
    line: int
    given: Span | None


@dataclass(frozen=True)
class Found:
    """What a class's methods do with activations: calls that can be rewritten, and (method, why not) of the others.

    mentions: `name` of every self.name in the methods, as often as it is there.
    """

    calls: tuple[Call, ...]
    others: tuple[tuple[str, str], ...]
    mentions: tuple[str, ...]


Plan = frozenset[tuple[str, Span, str]]  # (method, span, name of the submodule to call)


@functools.cache
def find_calls(cls: type[nn.Module], functions: frozenset[Callable]) -> Found:
    """The calls of `functions`, and of submodules with one argument, in the methods of cls and of its bases."""
    calls: list[Call] = []
    others: list[tuple[str, str]] = []
    mentions: list[str] = []
    defined: dict[str, type] = {}
    for base in cls.__mro__:
        if base is nn.Module or base.__module__.startswith("torch.nn.modules."):
            break
        for name, value in vars(base).items():
            kind, function = _function_of(value)
            if function is None or (name.startswith("__") and name.endswith("__")):
                continue
            overriding = defined.setdefault(name, base)
            try:
                source = _Source(name, function, functions)
            except (OSError, TypeError, SyntaxError):
                if overriding is base and name == "forward":
                    others.append((name, "its source cannot be read"))
                continue
            mentions += source.mentions
            called = any(call.function for call in source.calls)
            if overriding is not base:
                if called and _calls_super(overriding, name):
                    others.append((name, f"that of {base.__name__} is called through super()"))
            elif why := kind or source.why_not:
                if called:
                    others.append((name, why))
            else:
                calls += source.calls
                others += [(name, why) for why in source.others]
    return Found(tuple(calls), tuple(others), tuple(mentions))


@functools.cache
def rewritten(cls: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """A subclass of cls, named as it is, in which each call of `plan` calls the submodule given for it."""
    methods: dict[str, dict[Span, str]] = {}
    for method, span, site in plan:
        methods.setdefault(method, {})[span] = site
    namespace = {name: _compiled(name, inspect.getattr_static(cls, name), sites) for name, sites in methods.items()}

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple:
        _, _, *state = cls.__reduce_ex__(self, max(protocol, 2))
        return _new, (cls, plan), *state

    namespace |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    namespace |= {"__reduce_ex__": __reduce_ex__, "_rewritten_from": (cls, plan)}
    return type(cls)(cls.__name__, (cls,), namespace)


def original(cls: type[nn.Module]) -> tuple[type[nn.Module], Plan]:
    """(the class that `rewritten` was given, the plan); of any other class itself and nothing."""
    return vars(cls).get("_rewritten_from", (cls, frozenset()))


def _new(cls: type[nn.Module], plan: Plan) -> nn.Module:
    made = rewritten(cls, plan)
    return made.__new__(made)


def _function_of(value: object) -> tuple[str, FunctionType | None]:
    """(why it is no plain method, or ""; the function in it)."""
    if isinstance(value, (staticmethod, classmethod)):
        kind, value = f"is a {type(value).__name__}", value.__func__
    elif isinstance(value, property):
        kind, value = "is a property", value.fget
    else:
        kind = ""
    return kind, value if isinstance(value, FunctionType) else None


def _calls_super(cls: type, name: str) -> bool:
    try:
        return f"super().{name}(" in inspect.getsource(cls)
    except (OSError, TypeError):
        return False


class _Any:
    def __contains__(self, function: object) -> bool:
        return function is not None


class _Source:
    """The source of one method: its calls of some functions and of submodules.

    Raises OSError, TypeError or SyntaxError where it cannot be read.
    """

    def __init__(self, name: str, function: FunctionType, functions: Container[Callable]) -> None:
        self._name, self._functions = name, functions
        self.function = inspect.unwrap(function)
        self.tree = ast.parse(textwrap.dedent(inspect.getsource(self.function)))
        definition = self.tree.body[0]
        if not isinstance(definition, ast.FunctionDef):
            raise TypeError(f"{name} is not written as a def")
        closure = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or ()))
        self._closure = {variable: cell.cell_contents for variable, cell in closure.items() if _is_filled(cell)}
        self._known = ChainMap(self._closure, self.function.__globals__, vars(builtins))
        nodes = list(ast.walk(self.tree))
        self._local = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        self._local |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        self._local |= set(self.function.__code__.co_varnames)
        arguments = (*definition.args.posonlyargs, *definition.args.args)
        self.self_name = arguments[0].arg if arguments else None
        self.mentions = [node.attr for node in nodes if isinstance(node, ast.Attribute) and self._is_self(node.value)]
        self._given = _given(nodes)
        self.calls: list[Call] = []
        self.others: list[str] = []
        self._visit(definition, squared=False)
        self.why_not = self._why_not(nodes)

    def _why_not(self, nodes: list[ast.AST]) -> str | None:
        """Why the method cannot be compiled by itself."""
        if sum(isinstance(node, ast.arg) and node.arg == self.self_name for node in nodes) != 1:
            return "has no self of its own"
        if any(isinstance(node, ast.Nonlocal) and set(node.names) & self._closure.keys() for node in nodes):
            return "writes to variables of an outer function"
        if len(self._closure) != len(self.function.__code__.co_freevars):
            return "uses variables that have no value"
        names = [getattr(node, "attr", getattr(node, "id", "")) for node in nodes]
        if any(name.startswith("__") and not name.endswith("__") for name in names):
            return "uses private names (__x)"
        return None

    def _is_self(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.self_name

    def _visit(self, node: ast.AST, squared: bool) -> None:
        base = self._square_of(node)
        if base is not None and self.call(base):
            self._visit(base, squared=True)
            return
        call = self.call(node)
        if call:
            function, attribute, argument, inplace = call
            if argument is not None:
                line = self.function.__code__.co_firstlineno + node.lineno - 1
                span = span_of(node)
                given = span_of(argument) if isinstance(argument, ast.Call) else self._given.get(span)
                self.calls.append(Call(self._name, span, function, attribute, inplace, squared, line, given))
            else:
                self.others.append(f"{ast.unparse(node)}: its arguments cannot be told")
        elif isinstance(node, (ast.Name, ast.Attribute)) and self._resolve(node) in self._functions:
            self.others.append(f"{ast.unparse(node)} is handed on, not called")
        for child in ast.iter_child_nodes(node):
            if call and child is node.func:  # of x.relu() the x, of others nothing
                child = call[2] if isinstance(child, ast.Attribute) and child.value is call[2] else None
            if child is not None:
                self._visit(child, squared=False)

    def _resolve(self, node: ast.AST) -> Callable | None:
        """The function that a dotted name stands for, of those that the method does not assign to itself."""
        value = self._look_up(node)
        return value if callable(value) and not isinstance(value, type) and value.__hash__ is not None else None

    def _look_up(self, node: ast.AST) -> object:
        if isinstance(node, ast.Name):
            return None if node.id in self._local else self._known.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._look_up(node.value)
            if isinstance(owner, (ModuleType, type)):
                return getattr(owner, node.attr, None)
        return None

    def call(self, node: ast.AST) -> tuple[Callable | None, str | None, ast.AST | None, bool] | None:
        """(function, attribute, argument, in place) of a call of interest; argument None where it cannot be told."""
        if not isinstance(node, ast.Call):
            return None
        target, words = node.func, {word.arg: word.value for word in node.keywords}
        if (function := self._resolve(target)) in self._functions:
            argument = node.args[0] if node.args else words.get("input")
            inplace = words.get("inplace", node.args[1] if len(node.args) > 1 else ast.Constant(False))
            told = isinstance(inplace, ast.Constant) and None not in words and not isinstance(argument, ast.Starred)
            if not told:
                return function, None, None, False
            return function, None, argument, inplace.value is True or function.__name__.endswith("_")
        if not isinstance(target, ast.Attribute):
            return None
        if self._is_self(target.value):
            if len(node.args) == 1 and not words and not isinstance(node.args[0], ast.Starred):
                return None, target.attr, node.args[0], False
        elif not node.args and not words and self._look_up(target.value) is None:  # of a value, as x.relu()
            method = getattr(torch.Tensor, target.attr, None)
            if method in self._functions:
                return method, None, target.value, target.attr.endswith("_")
        return None

    def _square_of(self, node: ast.AST) -> ast.AST | None:
        """b of b ** 2, torch.square(b), b.square(), b.pow(2) and torch.pow(b, 2)."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            return node.left if _is_two(node.right) else None
        if not isinstance(node, ast.Call) or node.keywords:
            return None
        function, arguments = self._resolve(node.func), node.args
        if function is None and isinstance(node.func, ast.Attribute):
            arguments = [node.func.value, *arguments]
            function = {"square": torch.square, "pow": torch.pow}.get(node.func.attr)
        if function is torch.square and len(arguments) == 1:
            return arguments[0]
        if function is torch.pow and len(arguments) == 2 and _is_two(arguments[1]):
            return arguments[0]
        return None

    def replacing(self, sites: dict[Span, str]) -> ast.Module:
        """The tree, with self.site(argument) in place of the calls, or of their squares, at the spans of `sites`."""
        wanted = {call.span: call.squared for call in self.calls if call.span in sites}
        if missing := sites.keys() - wanted.keys():
            where = f"{self._name} of {self.function.__module__}"
            raise ValueError(f"{where} has no call at {missing}: its source has changed")

        def visit(node: ast.AST) -> ast.AST:
            base = self._square_of(node)
            for inner, squared in ((base, True), (node, False)):
                if isinstance(inner, ast.Call) and wanted.get(span_of(inner)) is squared:
                    site = ast.Attribute(ast.Name(self.self_name, ast.Load()), sites[span_of(inner)], ast.Load())
                    return ast.copy_location(ast.Call(site, [visit(self.call(inner)[2])], []), node)
            for field, value in ast.iter_fields(node):
                if isinstance(value, ast.AST):
                    setattr(node, field, visit(value))
                elif isinstance(value, list):
                    value[:] = [visit(item) if isinstance(item, ast.AST) else item for item in value]
            return node

        return visit(self.tree)


def span_of(node: ast.AST) -> Span:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def _given(nodes: list[ast.AST]) -> dict[Span, Span]:
    """From the span of a call g to that of the call f whose result it is given by way of a variable that nobody else
    reads: `h = f(x)`, and in the next statement `h = g(h)` or `return g(h)`."""
    found = {}
    for body in (getattr(node, field, None) for node in nodes for field in ("body", "orelse", "finalbody")):
        for pair in zip(body, body[1:]) if isinstance(body, list) else ():
            match pair:
                case (
                    ast.Assign([ast.Name(h)], ast.Call() as f),
                    ast.Assign([ast.Name(after)], ast.Call(_, [ast.Name(of)]) as g),
                ) if h == of == after:
                    found[span_of(g)] = span_of(f)
                case (
                    ast.Assign([ast.Name(h)], ast.Call() as f),
                    ast.Return(ast.Call(_, [ast.Name(of)]) as g),
                ) if h == of:
                    found[span_of(g)] = span_of(f)
    return found


def _is_two(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value == 2


def _is_filled(cell: object) -> bool:
    try:
        cell.cell_contents
    except ValueError:
        return False
    return True


def _compiled(name: str, method: FunctionType, sites: dict[Span, str]) -> FunctionType:
    """The method with the calls at `sites` made calls of submodules; its lines are those of its file."""
    source = _Source(name, method, _Any())
    tree, inner = source.replacing(sites), source.function
    # Within another function, so that its free variables (__class__ of super() among them) are there.
    variables = [ast.arg(variable) for variable in inner.__code__.co_freevars]
    body = [*tree.body, ast.Return(ast.Name(tree.body[0].name, ast.Load()))]
    parameters = ast.arguments([], variables, None, [], [], None, [])
    tree.body = [ast.FunctionDef("make", parameters, body, [], None, type_params=[])]
    ast.fix_missing_locations(tree)
    ast.increment_lineno(tree, inner.__code__.co_firstlineno - 1)
    flags = inner.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(tree, inner.__code__.co_filename, "exec", flags, dont_inherit=True)
    namespace: dict[str, Callable] = {}
    exec(code, inner.__globals__, namespace)
    made = namespace["make"](*(cell.cell_contents for cell in inner.__closure__ or ()))
    made.__qualname__ = method.__qualname__
    return made
