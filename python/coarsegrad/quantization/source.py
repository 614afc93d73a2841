"""The source of one function: its calls of activations and of submodules."""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections import ChainMap
from collections.abc import Callable, Container
from dataclasses import dataclass
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch

# Where a call is in the source of its function, without the indentation of the def: line, column, last line and column.
Span = tuple[int, int, int, int]

PASSED_ON = "is passed on, not called"
CALL_PATH = "_call_path"  # the variable of a keyed function that holds the calls by which it was reached
COUNTER = "_iteration_"  # prefix of the variables that count the iterations of loops


@dataclass(frozen=True)
class Call:
    """A call in a method, of a function or of a submodule `self.attribute`.

    inplace: whether it overwrites its argument, or the attribute of self that says so.
    squared: whether its result is squared at once.
    line: in the file.
    input_call: the call that computes its argument, if nothing else uses that result.
    """

    method: str
    span: Span
    function: Callable | None
    attribute: str | None
    inplace: bool | str
    squared: bool
    line: int
    input_call: Span | None


def span_of(node: Any) -> Span:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


@dataclass(frozen=True)
class _Parsed:
    """A call of a function, or of the submodule self.attribute. argument: its tensor; None if unknown."""

    func: ast.expr
    function: Callable | None
    attribute: str | None
    argument: ast.expr | None
    inplace: bool | str


class _AnyFunction:
    def __contains__(self, function: object) -> bool:
        return function is not None


class Source:
    """The source of one function without its wrappers: its calls of given functions and of submodules.

    method: whether its first parameter is a module. Raises OSError, TypeError or SyntaxError if it cannot be read.
    """

    def __init__(
        self, name: str, function: FunctionType, functions: Container[Callable] = _AnyFunction(), method: bool = True
    ) -> None:
        self.name, self._functions = name, functions
        self.function = inspect.unwrap(function)
        text = inspect.getsource(self.function)
        self.indent = len(text) - len(text.lstrip(" \t"))
        self.tree = ast.parse(textwrap.dedent(text))
        definition = self.tree.body[0]
        if not isinstance(definition, ast.FunctionDef):
            raise TypeError(f"{name} is not written as a def")
        self.definition = definition
        code = self.function.__code__
        self.first_line = code.co_firstlineno
        closure = dict(zip(code.co_freevars, self.function.__closure__ or ()))
        filled = {variable: cell.cell_contents for variable, cell in closure.items() if _is_filled(cell)}
        self._known = ChainMap(filled, self.function.__globals__, vars(builtins))
        self._nodes = list(ast.walk(self.tree))
        self._parents = {child: node for node in self._nodes for child in ast.iter_child_nodes(node)}
        self._local = {n.id for n in self._nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self._local |= {node.arg for node in self._nodes if isinstance(node, ast.arg)}
        self._local |= set(code.co_varnames)
        arguments = (*self.definition.args.posonlyargs, *self.definition.args.args)
        self.self_name = arguments[0].arg if method and arguments else None
        self.mentions = [n.attr for n in self._nodes if isinstance(n, ast.Attribute) and self._is_self(n.value)]
        self._input_calls = _input_calls(self._nodes)
        self.calls: list[Call] = []
        self.unsupported: list[str] = []
        self._visit(self.definition, squared=False)

    @property
    def why_not(self) -> str | None:
        """Why the method cannot be recompiled."""
        if sum(isinstance(node, ast.arg) and node.arg == self.self_name for node in self._nodes) != 1:
            return "has no self of its own"
        return None

    def _is_self(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.self_name

    def _visit(self, node: ast.AST, squared: bool) -> None:
        base = self.square_of(node)
        if base is not None and self.call(base):
            self._visit(base, squared=True)
            return
        call = self.call(node)
        if call and isinstance(node, ast.Call):
            if call.argument is not None:
                span, argument = span_of(node), call.argument
                input_call = span_of(argument) if isinstance(argument, ast.Call) else self._input_calls.get(span)
                found = (call.function, call.attribute, call.inplace, squared, self.line_of(node), input_call)
                self.calls.append(Call(self.name, span, *found))
            else:
                self.unsupported.append(f"{ast.unparse(node)}: its arguments are unknown")
        elif isinstance(node, (ast.Name, ast.Attribute)) and self._resolve(node) in self._functions:
            self.unsupported.append(f"{ast.unparse(node)} {PASSED_ON}")
        for child in ast.iter_child_nodes(node):
            if not call or child is not call.func:
                self._visit(child, squared=False)
            elif isinstance(child, ast.Attribute) and child.value is call.argument:  # x of x.relu()
                self._visit(child.value, squared=False)

    def line_of(self, node: ast.expr) -> int:
        """The line in the file."""
        return self.first_line + node.lineno - 1

    def span_in_file(self, position: tuple[int, int | None, int, int | None]) -> Span | None:
        """The span of a position in the file, (line, column, last line, last column); None without columns."""
        line, column, last_line, last_column = position
        if column is None or last_column is None:
            return None
        before = self.first_line - 1
        return line - before, column - self.indent, last_line - before, last_column - self.indent

    def _resolve(self, node: ast.AST) -> Callable | None:
        """The function that a dotted name refers to, unless the name is local."""
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

    def call(self, node: ast.AST | None) -> _Parsed | None:
        """A call of interest, parsed."""
        if not isinstance(node, ast.Call):
            return None
        target, words = node.func, {word.arg: word.value for word in node.keywords}
        function = self._resolve(target)
        if function is not None and function in self._functions:
            argument = node.args[0] if node.args else words.get("input")
            inplace = self._flag(words.get("inplace", node.args[1] if len(node.args) > 1 else ast.Constant(False)))
            if inplace is None or None in words or isinstance(argument, ast.Starred):
                return _Parsed(target, function, None, None, False)
            return _Parsed(target, function, None, argument, inplace or function.__name__.endswith("_"))
        if not isinstance(target, ast.Attribute):
            return None
        if self._is_self(target.value):
            if len(node.args) == 1 and not words and not isinstance(node.args[0], ast.Starred):
                return _Parsed(target, None, target.attr, node.args[0], False)
        elif not node.args and not words and self._look_up(target.value) is None:  # of a value, as x.relu()
            method = getattr(torch.Tensor, target.attr, None)
            if method in self._functions:
                return _Parsed(target, method, None, target.value, target.attr.endswith("_"))
        return None

    def _flag(self, node: ast.AST) -> bool | str | None:
        """The value of a constant, the name of an attribute of self, or None."""
        if isinstance(node, ast.Constant):
            return node.value is True
        return node.attr if isinstance(node, ast.Attribute) and self._is_self(node.value) else None

    def square_of(self, node: ast.AST | None) -> ast.expr | None:
        """b of b ** 2, torch.square(b), b.square(), b.square_(), b.pow(2) and torch.pow(b, 2)."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            return node.left if _is_two(node.right) else None
        if not isinstance(node, ast.Call):
            return None
        function, arguments = self._resolve(node.func), [*node.args]
        if function is None and isinstance(node.func, ast.Attribute):
            arguments = [node.func.value, *arguments]
            function = _SQUARES.get(node.func.attr)
        arguments += [word.value for word in node.keywords if word.arg == "exponent"]
        if len(arguments) != len(node.args) + len(node.keywords) + (arguments[:1] != node.args[:1]):
            return None
        if function in (torch.square, torch.square_) and len(arguments) == 1:
            return arguments[0]
        if function is torch.pow and len(arguments) == 2 and _is_two(arguments[1]):
            return arguments[0]
        return None

    def node_at(self, span: Span) -> ast.Call | ast.Name | ast.Attribute | None:
        """The call or name at `span`."""
        nodes = (n for n in self._nodes if isinstance(n, (ast.Call, ast.Name, ast.Attribute)))
        return next((node for node in nodes if span_of(node) == span), None)

    def references(self, span: Span, functions: Container[Callable] = (), name: str | None = None) -> list[Span]:
        """Where functions, or one with this name, are passed on and not called: in the call at `span`, or anywhere if
        there is no call."""
        call = self.node_at(span)
        return [
            span_of(node)
            for node in (self._nodes if call is None else ast.walk(call))
            if isinstance(node, (ast.Name, ast.Attribute))
            and isinstance(node.ctx, ast.Load)
            and getattr(self._parents.get(node), "func", None) is not node
            and not isinstance(self._parents.get(node), ast.Attribute)
            and (self._resolve(node) in functions if name is None else name_of(node) == name)
        ]

    def is_squared(self, span: Span) -> bool:
        node = self.node_at(span)
        return node is not None and self.square_of(self._parents[node]) is node

    def calls_self(self, node: ast.Call, name: str) -> bool:
        """Whether the call is self.name(...) or super().name(...)."""
        if not isinstance(node.func, ast.Attribute) or node.func.attr != name:
            return False
        of = node.func.value
        return self._is_self(of) or (
            isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "super" and not of.args
        )

    def counters(self, span: Span) -> list[str]:
        """The variables that count the iterations of the loops around the call, outermost first."""
        return [counter_of(loop) for loop in self.loops(self.node_at(span))]

    def argument(self, node: ast.Call, which: int | str | None) -> ast.expr | None:
        """The expression that an activation gets as its tensor; `which` is an Edit's `argument`."""
        if which == ".":
            if isinstance(node.func, ast.Attribute) and self._look_up(node.func.value) is None:
                return node.func.value
            which = 0  # as in torch.Tensor.relu(x)
        if which is None:
            call = self.call(node)
            return call.argument if call else None
        if isinstance(which, int):
            starred = any(isinstance(argument, ast.Starred) for argument in node.args[: which + 1])
            only = which == 0 and len(node.args) == 1
            return node.args[which] if which < len(node.args) and (only or not starred) else None
        return next((word.value for word in node.keywords if word.arg == which), None)

    def loops(self, node: ast.AST | None) -> list[ast.For | ast.comprehension]:
        """The for loops and comprehensions whose body the node is in, outermost first."""
        found: list[ast.For | ast.comprehension] = []
        while node is not None and (parent := self._parents.get(node)) is not None:
            if isinstance(parent, ast.For) and node in parent.body:
                found.append(parent)
            elif isinstance(parent, _COMPREHENSIONS):
                generators = parent.generators
                before = generators.index(node) if node in generators else len(generators)
                found += [g for g in reversed(generators[:before]) if not g.is_async]
            node = parent
        return found[::-1]

    def activation(self) -> str | None:
        """Either "ReLU" or "ReLU squared" if the function, a chain of assignments and a return, computes that of its
        one argument besides self, in every mode of the module."""
        arguments = self.definition.args
        if len(arguments.args) != 2 or arguments.vararg or arguments.kwonlyargs or arguments.posonlyargs:
            return None
        known: dict[str, str | None] = {arguments.args[1].arg: ""}

        def what(node: ast.AST) -> str | None:
            if isinstance(node, ast.Name):
                return known.get(node.id)
            base = self.square_of(node)
            if base is None and isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                base = node.left if ast.dump(node.left) == ast.dump(node.right) else None
            if base is not None:
                return "ReLU squared" if what(base) == "ReLU" else None
            call = self.call(node)
            of_argument = what(call.argument) if call and call.function and call.argument is not None else None
            return "ReLU" if of_argument in ("", "ReLU") else None

        for statement in self.definition.body:
            match statement:
                case ast.Expr(ast.Constant()):
                    pass
                case ast.Assign([ast.Name(name)], value):
                    known[name] = what(value)
                case ast.Return(ast.AST() as value):
                    return what(value) or None
                case _:
                    return None
        return None


def name_of(node: ast.AST) -> str | None:
    """The last part of a dotted name."""
    return getattr(node, "attr", getattr(node, "id", None))


_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)
_SQUARES: dict[str, Callable] = {"square": torch.square, "square_": torch.square_, "pow": torch.pow, "pow_": torch.pow}


def counter_of(loop: ast.For | ast.comprehension) -> str:
    return f"{COUNTER}{loop.target.lineno}_{loop.target.col_offset}"


def _input_calls(nodes: list[ast.AST]) -> dict[Span, Span]:
    """Span of a call g -> span of the call f that computes g's argument by way of a variable that nothing else reads:
    `h = f(x)`, followed by `h = g(h)` or `return g(h)`."""
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


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents
    except ValueError:
        return False
    return True
