"""Edits of a function's source: calls of activations become calls of submodules."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from typing import Any

from .relus import qrelu_if_relu
from .source import CALL_PATH, Source, Span, counter_of, span_of


@dataclass(frozen=True)
class Edit:
    """A replacement for the call at `span` of the function `where`, or for a function's name that is passed on there.

    where: a method of the class, or "module:name" of any other function.
    site: the submodule to call instead, with the call's tensor only; "" with `keyed_callee`.
    argument: where the call passes that tensor, if the source does not show it: a position, a keyword, or "." if a
        method of the tensor is called.
    if_relu: call the submodule only if the callee is a relu at run time, because the source does not show it.
    keys: (key, submodule), if the submodule depends on the calls and loop iterations by which the call is reached.
    keyed: whether it does; can be True before `keys` are known.
    keyed_callee: the function called, named as `where`; call its keyed form, which is a method, instead.
    """

    where: str
    span: Span
    site: str = ""
    argument: int | str | None = None
    if_relu: bool = False
    keys: tuple[tuple[tuple, str], ...] = ()
    keyed: bool = False
    keyed_callee: str = ""


def keyed_name(where: str) -> str:
    """The name of a function's keyed form: a method that takes CALL_PATH, by which it chooses its submodules."""
    return "_keyed_" + re.sub(r"\W", "_", where)


class Editor:
    """Applies edits to the tree of a source, which serves no other purpose afterwards.

    owner: the variable that holds the module whose submodules are called.
    names: the values of the new names in the tree.
    """

    def __init__(self, source: Source, edits: dict[Span, Edit], owner: str) -> None:
        if missing := [span for span in edits if source.node_at(span) is None]:
            where = f"{source.name} of {source.function.__module__}"
            raise ValueError(f"{where} has no call at {missing}: its source has changed")
        self._source, self._edits, self._owner = source, edits, owner
        keyed = [span for span, edit in edits.items() if edit.keyed or edit.keyed_callee]
        self._counters = {span: source.counters(span) for span in keyed}
        self.names: dict[str, object] = {"_qrelu_if_relu": qrelu_if_relu, "_getattr": getattr}
        self.names |= {"_enumerate": enumerate, "_partial": functools.partial}

    def apply(self, keyed: bool) -> None:
        """Edit the tree. keyed: whether CALL_PATH is a parameter of the function."""
        definition = self._source.definition
        loops = dict.fromkeys(
            loop for span in self._counters for loop in self._source.loops(self._source.node_at(span))
        )
        self._visit(definition)
        for loop in loops:
            counter = ast.Name(counter_of(loop), ast.Store())
            loop.iter = ast.copy_location(_call("enumerate", loop.iter), loop.iter)
            loop.target = ast.copy_location(ast.Tuple([counter, loop.target], ast.Store()), loop.target)
        if self._counters and not keyed:
            definition.body.insert(0, ast.Assign([ast.Name(CALL_PATH, ast.Store())], ast.Tuple([], ast.Load())))

    def _visit(self, node: Any) -> Any:
        base = self._source.square_of(node)
        for inner in (base, node):
            if not isinstance(inner, (ast.Call, ast.Name, ast.Attribute)):
                continue
            edit = self._edits.get(span_of(inner))
            if edit is not None and (inner is node or edit.site):
                made = self._activation(edit, inner) if edit.site else self._keyed_call(edit, inner)
                return ast.copy_location(made, inner)
        for name, value in ast.iter_fields(node):
            if isinstance(value, ast.AST):
                setattr(node, name, self._visit(value))
            elif isinstance(value, list):
                value[:] = [self._visit(item) if isinstance(item, ast.AST) else item for item in value]
        return node

    def _activation(self, edit: Edit, node: ast.expr) -> ast.expr:
        """A call of the submodule, or the submodule in place of a function's name."""
        site = self._chosen_site(edit) if edit.keyed else self._attribute(edit.site)
        if not isinstance(node, ast.Call):
            return site
        if edit.if_relu:
            site = _call("qrelu_if_relu", site, self._visit(node.func))
        return ast.Call(site, [self._visit(self._source.argument(node, edit.argument))], [])

    def _chosen_site(self, edit: Edit) -> ast.expr:
        """The submodule for the key; that of edit.site if there is none."""
        sites = f"_sites_{len(self.names)}"
        self.names[sites] = dict(edit.keys)
        get = ast.Attribute(ast.Name(sites, ast.Load()), "get", ast.Load())
        which = ast.Call(get, [self._key(edit.span), ast.Constant(edit.site)], [])
        return _call("getattr", ast.Name(self._owner, ast.Load()), which)

    def _keyed_call(self, edit: Edit, node: ast.expr) -> ast.expr:
        """A call of the keyed form of a function, or that form in place of the function's name."""
        target = self._attribute(keyed_name(edit.keyed_callee))
        path = self._key(edit.span, ast.Constant(f"{edit.span[0]}:{edit.span[1]}"))
        if not isinstance(node, ast.Call):
            return _call("partial", target, path)
        return ast.Call(target, [path, *map(self._visit, node.args)], [self._visit(word) for word in node.keywords])

    def _key(self, span: Span, *first: ast.expr) -> ast.expr:
        counters = (ast.Name(counter, ast.Load()) for counter in self._counters[span])
        return ast.BinOp(ast.Name(CALL_PATH, ast.Load()), ast.Add(), ast.Tuple([*first, *counters], ast.Load()))

    def _attribute(self, name: str) -> ast.expr:
        return ast.Attribute(ast.Name(self._owner, ast.Load()), name, ast.Load())


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(f"_{name}", ast.Load()), list(arguments), [])
