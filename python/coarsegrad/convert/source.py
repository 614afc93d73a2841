"""The source of one function: its calls of activations and of submodules, and the same with other calls in it."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import re
import textwrap
from collections import ChainMap
from collections.abc import Callable, Container
from dataclasses import dataclass
from types import FunctionType, ModuleType

import torch

from .relus import instead

# Where a call stands in its function's own source: first line and column, last line and column, without the
# indentation of the def.
Span = tuple[int, int, int, int]

HANDED_ON = "is handed on, not called"
AT = "_at"  # the variable of a keyed function that says by which calls it was reached


@dataclass(frozen=True)
class Call:
    """A call in a method, of a function or of a submodule `self.attribute`.

    inplace: whether it writes over its argument, or the attribute of self that says so.
    squared: what is meant is the square of its result.
    line: in the file.
    given: the call whose result it is called with, where nothing else comes to see that.
    """

    method: str
    span: Span
    function: Callable | None
    attribute: str | None
    inplace: bool | str
    squared: bool
    line: int
    given: Span | None


@dataclass(frozen=True)
class Edit:
    """What becomes of the call at `span` of the function `where`, or of a function's name there that is handed on.

    where: a method of the class, or "module:name" of any other function.
    site: the submodule that is called instead, with the call's tensor alone; "" where `hands_on`.
    argument: which argument that is, where the source does not tell: its position, its keyword, or "." for what the
        method called is of.
    asks: the submodule is called only where what would be called is an activation: the source does not tell.
    keys: (key, submodule) where it depends on the calls and on the turns of loops by which the call is reached.
    keyed: whether it does; it may before `keys` are known.
    hands_on: the function that is called, as `where`; its keyed form, which is a method, is called instead.
    """

    where: str
    span: Span
    site: str = ""
    argument: int | str | None = None
    asks: bool = False
    keys: tuple[tuple[tuple, str], ...] = ()
    keyed: bool = False
    hands_on: str = ""


def span_of(node: ast.AST) -> Span:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


class AnyFunction:
    def __contains__(self, function: object) -> bool:
        return function is not None


class Source:
    """The source of one function, with its wrappers off: its calls of some functions and of submodules.

    method: whether its first parameter is a module. Raises OSError, TypeError or SyntaxError where it cannot be read.
    """

    def __init__(
        self, name: str, function: FunctionType, functions: Container[Callable] = AnyFunction(), method: bool = True
    ) -> None:
        self._name, self._functions = name, functions
        self.function = inspect.unwrap(function)
        text = inspect.getsource(self.function)
        self.indent = len(text) - len(text.lstrip(" \t"))
        self.tree = ast.parse(textwrap.dedent(text))
        self.definition = self.tree.body[0]
        if not isinstance(self.definition, ast.FunctionDef):
            raise TypeError(f"{name} is not written as a def")
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
        self._given = _given(self._nodes)
        self.calls: list[Call] = []
        self.others: list[str] = []
        self._visit(self.definition, squared=False)

    @property
    def why_not(self) -> str | None:
        """Why the method cannot be compiled by itself."""
        if sum(isinstance(node, ast.arg) and node.arg == self.self_name for node in self._nodes) != 1:
            return "has no self of its own"
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
                span = span_of(node)
                given = span_of(argument) if isinstance(argument, ast.Call) else self._given.get(span)
                line = self.line_of(node)
                self.calls.append(Call(self._name, span, function, attribute, inplace, squared, line, given))
            else:
                self.others.append(f"{ast.unparse(node)}: its arguments cannot be told")
        elif isinstance(node, (ast.Name, ast.Attribute)) and self._resolve(node) in self._functions:
            self.others.append(f"{ast.unparse(node)} {HANDED_ON}")
        for child in ast.iter_child_nodes(node):
            if call and child is node.func:  # of x.relu() the x, of others nothing
                child = call[2] if isinstance(child, ast.Attribute) and child.value is call[2] else None
            if child is not None:
                self._visit(child, squared=False)

    def line_of(self, node: ast.AST) -> int:
        """In the file."""
        return self.first_line + node.lineno - 1

    def span_in_file(self, position: tuple[int, int, int, int]) -> Span:
        """The span of a position in the file, given as (line, column, last line, last column)."""
        line, column, last_line, last_column = position
        return (
            line - self.first_line + 1,
            column - self.indent,
            last_line - self.first_line + 1,
            (last_column - self.indent),
        )

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

    def call(self, node: ast.AST) -> tuple[Callable | None, str | None, ast.AST | None, bool | str] | None:
        """(function, attribute, argument, in place) of a call of interest; argument None where it cannot be told."""
        if not isinstance(node, ast.Call):
            return None
        target, words = node.func, {word.arg: word.value for word in node.keywords}
        if (function := self._resolve(target)) in self._functions:
            argument = node.args[0] if node.args else words.get("input")
            inplace = self._flag(words.get("inplace", node.args[1] if len(node.args) > 1 else ast.Constant(False)))
            if inplace is None or None in words or isinstance(argument, ast.Starred):
                return function, None, None, False
            return function, None, argument, inplace or function.__name__.endswith("_")
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

    def _flag(self, node: ast.AST) -> bool | str | None:
        """A constant, the attribute of self that it is, or None."""
        if isinstance(node, ast.Constant):
            return node.value is True
        return node.attr if isinstance(node, ast.Attribute) and self._is_self(node.value) else None

    def _square_of(self, node: ast.AST) -> ast.AST | None:
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

    def node_at(self, span: Span) -> ast.AST | None:
        """The call or name there."""
        kinds = (ast.Call, ast.Name, ast.Attribute)
        return next((n for n in self._nodes if isinstance(n, kinds) and span_of(n) == span), None)

    def references(self, span: Span, functions: Container[Callable] = (), name: str | None = None) -> list[Span]:
        """Where functions, or one of that name, are handed on and not called: in the call at `span`, or anywhere if
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
        return self._square_of(self._parents[node]) is node

    def calls_self(self, node: ast.Call, name: str) -> bool:
        """Whether the call is of self.name, or of super().name."""
        if not isinstance(node.func, ast.Attribute) or node.func.attr != name:
            return False
        of = node.func.value
        return self._is_self(of) or (
            isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "super" and not of.args
        )

    def turns(self, span: Span) -> list[str]:
        """The variables that count the turns of the loops around the call, outermost first."""
        return [_turn_of(loop) for loop in self._loops(self.node_at(span))]

    def argument(self, node: ast.Call, which: int | str | None) -> ast.AST | None:
        """The expression of the tensor that an activation is called with; `which` as in an Edit."""
        if which == ".":
            if isinstance(node.func, ast.Attribute) and self._look_up(node.func.value) is None:
                return node.func.value
            which = 0  # as in torch.Tensor.relu(x)
        if which is None:
            call = self.call(node)
            return call and call[2]
        if isinstance(which, int):
            starred = any(isinstance(argument, ast.Starred) for argument in node.args[: which + 1])
            only = which == 0 and len(node.args) == 1
            return node.args[which] if which < len(node.args) and (only or not starred) else None
        return next((word.value for word in node.keywords if word.arg == which), None)

    def edited(self, edits: dict[Span, Edit], owner: str, keyed: bool) -> dict[str, object]:
        """Puts the edits into the tree, which is then of no other use. Returns what the names that it now has mean.

        owner: the name for the module whose submodules are called. keyed: whether AT is a parameter.
        """
        if missing := [span for span in edits if self.node_at(span) is None]:
            where = f"{self._name} of {self.function.__module__}"
            raise ValueError(f"{where} has no call at {missing}: its source has changed")
        with_keys = {span: self.turns(span) for span, edit in edits.items() if edit.keyed or edit.hands_on}
        loops = dict.fromkeys(loop for span in with_keys for loop in self._loops(self.node_at(span)))
        names: dict[str, object] = {}

        def key(span: Span, *first: ast.AST) -> ast.AST:
            turns = ast.Tuple([*first, *(ast.Name(turn, ast.Load()) for turn in with_keys[span])], ast.Load())
            return ast.BinOp(ast.Name(AT, ast.Load()), ast.Add(), turns)

        def activation(edit: Edit, node: ast.Call | ast.Name | ast.Attribute) -> ast.AST:
            site: ast.AST = ast.Attribute(ast.Name(owner, ast.Load()), edit.site, ast.Load())
            if edit.keyed:
                sites = f"_sites_{len(names)}"
                names[sites] = dict(edit.keys)
                get = ast.Attribute(ast.Name(sites, ast.Load()), "get", ast.Load())
                which = ast.Call(get, [key(edit.span), ast.Constant(edit.site)], [])
                site = _call("getattr", ast.Name(owner, ast.Load()), which)
            if not isinstance(node, ast.Call):
                return site
            if edit.asks:
                site = _call("instead", site, visit(node.func))
            return ast.Call(site, [visit(self.argument(node, edit.argument))], [])

        def handed_on(edit: Edit, node: ast.Call | ast.Name | ast.Attribute) -> ast.AST:
            target = ast.Attribute(ast.Name(owner, ast.Load()), keyed_name(edit.hands_on), ast.Load())
            by = key(edit.span, ast.Constant(f"{edit.span[0]}:{edit.span[1]}"))
            if not isinstance(node, ast.Call):
                return _call("partial", target, by)
            return ast.Call(target, [by, *map(visit, node.args)], [visit(word) for word in node.keywords])

        def visit(node: ast.AST) -> ast.AST:
            base = self._square_of(node)
            for inner in (base, node):
                edit = edits.get(span_of(inner)) if isinstance(inner, (ast.Call, ast.Name, ast.Attribute)) else None
                if edit is not None and (inner is node or edit.site):
                    made = activation(edit, inner) if edit.site else handed_on(edit, inner)
                    return ast.copy_location(made, inner)
            for name, value in ast.iter_fields(node):
                if isinstance(value, ast.AST):
                    setattr(node, name, visit(value))
                elif isinstance(value, list):
                    value[:] = [visit(item) if isinstance(item, ast.AST) else item for item in value]
            return node

        visit(self.definition)
        for loop in loops:
            loop.iter = ast.copy_location(_call("enumerate", loop.iter), loop.iter)
            loop.target = ast.copy_location(
                ast.Tuple([ast.Name(_turn_of(loop), ast.Store()), loop.target], ast.Store()), loop.target
            )
        if with_keys and not keyed:
            self.definition.body.insert(0, ast.Assign([ast.Name(AT, ast.Store())], ast.Tuple([], ast.Load())))
        names |= {"_instead": instead, "_getattr": getattr, "_enumerate": enumerate, "_partial": functools.partial}
        return names

    def _loops(self, node: ast.AST) -> list[ast.For | ast.comprehension]:
        """The for loops and comprehensions that the node is in the body of, outermost first."""
        found: list[ast.For | ast.comprehension] = []
        while (parent := self._parents.get(node)) is not None:
            if isinstance(parent, ast.For) and node in parent.body:
                found.append(parent)
            elif isinstance(parent, _COMPREHENSIONS):
                generators = parent.generators
                before = generators.index(node) if node in generators else len(generators)
                found += [g for g in reversed(generators[:before]) if not g.is_async]
            node = parent
        return found[::-1]

    def what_of_its_argument(self) -> str | None:
        """Either "ReLU" or "ReLU squared" if the function computes that of its one argument besides self in every mode
        of the module: a chain of assignments and a return."""
        arguments = self.definition.args
        if len(arguments.args) != 2 or arguments.vararg or arguments.kwonlyargs or arguments.posonlyargs:
            return None
        known: dict[str, str | None] = {arguments.args[1].arg: ""}

        def what(node: ast.AST) -> str | None:
            if isinstance(node, ast.Name):
                return known.get(node.id)
            base = self._square_of(node)
            if base is None and isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                base = node.left if ast.dump(node.left) == ast.dump(node.right) else None
            if base is not None:
                return "ReLU squared" if what(base) == "ReLU" else None
            call = self.call(node)
            return "ReLU" if call and call[0] and call[2] is not None and what(call[2]) in ("", "ReLU") else None

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


def keyed_name(where: str) -> str:
    """The name of the keyed form of a function."""
    return "_keyed_" + re.sub(r"\W", "_", where)


_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)
_SQUARES = {"square": torch.square, "square_": torch.square_, "pow": torch.pow, "pow_": torch.pow}


def _turn_of(loop: ast.For | ast.comprehension) -> str:
    return f"_turn_{loop.target.lineno}_{loop.target.col_offset}"


def _call(name: str, *arguments: ast.AST) -> ast.Call:
    return ast.Call(ast.Name(f"_{name}", ast.Load()), list(arguments), [])


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
