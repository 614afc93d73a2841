"""Replaces the activations that the source of a model's methods shows by QReLUs."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .._torch_internals import has_hooks
from ..nn import QReLU
from .editing import Edit
from .relus import RELUS
from .report import QuantizeReport, Replaced, Skipped
from .rewriting import activation_of, find_calls, original, rewritten
from .source import Call


@dataclass(frozen=True)
class Place:
    """Where a QReLU goes, and its properties. limit: upper bound of the float activation. dropout: the name of the
    nn.Dropout that it absorbs."""

    attribute: str
    was: str
    inplace: bool = False
    squared: bool = False
    limit: float = math.inf
    dropout: str | None = None


@dataclass(frozen=True)
class _Activation:
    """What a module computes: min(relu(x), limit), or its square."""

    limit: float = math.inf
    squared: bool = False


class Surgery:
    """One run of `quantize_`; `report` says what it did."""

    def __init__(
        self,
        model: nn.Module,
        bits: int,
        replace: tuple[type[nn.Module], ...],
        wanted: Callable[[nn.Module, str], bool],
        fold_dropout: bool,
        settings: dict[str, Any],
    ) -> None:
        self.model, self._bits, self._replace, self.wanted, self._settings = model, bits, replace, wanted, settings
        self._fold_dropout = fold_dropout
        self.functions = frozenset(
            function
            for kind in replace
            for function in (getattr(F, kind.__name__.lower(), None), *(RELUS if kind is nn.ReLU else ()))
            if function is not None
        )
        self._children_replaced: dict[nn.Module, list[tuple[nn.Module, nn.Module]]] = {}  # old -> [(owner, new)]
        self.report = QuantizeReport()

    def run(self) -> None:
        modules = list(self.model.named_modules())
        if any(isinstance(self.model, kind) for kind in (*self._replace, QReLU)):
            raise TypeError(f"model must contain activations, not be one, got {type(self.model).__name__}")
        self.report.already = [name for name, module in modules if isinstance(module, QReLU)]
        leaves = set()  # modules that compute an activation: replaced as a whole, methods unchanged
        for name, owner in modules:
            if owner in leaves or isinstance(owner, QReLU) or self._activation(owner):
                continue
            if isinstance(owner, torch.jit.ScriptModule):
                self.skip(name, owner, "scripted code cannot be rewritten")
                continue
            if getattr(owner, "nonlinearity", None) == "relu" and isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
                self.skip(name, owner, "its relu is inside a torch kernel")
            calls = self._calls(name, owner)
            for attribute, child in list(owner._modules.items()):
                if child is not None and (what := self._activation(child)):
                    leaves.add(child)
                    self._replace_child(name, owner, attribute, child, what, calls)
            for attribute, value in list(vars(owner).items()):
                if callable(value) and getattr(value, "__hash__", None) and value in self.functions:
                    self._replace_function(name, owner, attribute, value)
            if isinstance(owner, torch.fx.GraphModule):
                self._replace_nodes(name, owner)
            else:
                self._replace_calls(name, owner, [call for call in calls if call.function])
        self.finish()

    def finish(self) -> None:
        """What is to be done after all QReLUs are in place."""
        self._update_references()
        self._disable_fused_kernels()

    def skip(self, name: str, what: object, why: str) -> None:
        kind = type(what).__name__ if isinstance(what, nn.Module) else str(what)
        self.report.skipped.append(Skipped(name or "(model)", kind, why))

    def _calls(self, name: str, owner: nn.Module) -> list[Call]:
        """The calls in the owner's methods that have not been rewritten yet."""
        if isinstance(owner, torch.fx.GraphModule):
            return []
        cls, plan = original(type(owner))
        found = find_calls(cls, self.functions)
        patched = {name for name in vars(owner) if callable(getattr(cls, name, None))}
        for method, why in found.unsupported:
            self.skip(dotted(name, method), "method", why)
        done = {(edit.where, edit.span) for edit in plan}
        calls = [call for call in found.calls if (call.method, call.span) not in done]
        for method in dict.fromkeys(call.method for call in calls if call.function and call.method in patched):
            self.skip(dotted(name, method), "method", f"{method} was replaced on this instance; convert before that")
        return [call for call in calls if call.method not in patched]

    def _activation(self, module: nn.Module) -> _Activation | None:
        """What a module computes, if it is to be replaced; by its class or by the source of its forward."""
        if isinstance(module, QReLU) or isinstance(module, torch.jit.ScriptModule):
            return None
        for kind in self._replace:
            if isinstance(module, kind) and type(module).forward is kind.forward:
                return _Activation(6.0 if kind is nn.ReLU6 else math.inf)
        if nn.ReLU not in self._replace:
            return None
        match module:
            case nn.ReLU6():
                return None
            case nn.Hardtanh(min_val=0, max_val=limit) if type(module).forward is nn.Hardtanh.forward:
                return _Activation(float(limit)) if limit > 0 else None
            case nn.Threshold(threshold=0, value=0) if type(module).forward is nn.Threshold.forward:
                return _Activation()
            case nn.LeakyReLU(negative_slope=0) if type(module).forward is nn.LeakyReLU.forward:
                return _Activation()
        parts = [*module.children(), *module.parameters(), *module.buffers()]
        if parts or "forward" in vars(module):
            return None
        what = activation_of(original(type(module))[0], self.functions & frozenset(RELUS))
        return _Activation(squared=what == "ReLU squared") if what else None

    def _replace_child(
        self, name: str, owner: nn.Module, attribute: str, child: nn.Module, what: _Activation, calls: list[Call]
    ) -> None:
        full = dotted(name, attribute)
        if has_hooks(child):
            self.skip(full, child, "it has hooks, which would be lost")
            return
        if "forward" in vars(child):
            self.skip(full, child, "its forward was replaced on this instance; convert before that")
            return
        if not self.wanted(child, full):
            return
        was, inplace = type(child).__name__, getattr(child, "inplace", False) is True
        sites = [call for call in calls if call.attribute == attribute]
        note = ""
        if len(sites) > 1 or any(call.squared for call in sites):
            places: list[Place] = []
            for call in sites:
                site = free_name(owner, attribute, [place.attribute for place in places]) if places else attribute
                where = f"{was} (self.{attribute} in {call.method}, line {call.line})"
                dropout = self._dropout_after(owner, attribute, call)
                places.append(Place(site, where, inplace, what.squared or call.squared, what.limit, dropout))
            note = self._rewrite(name, owner, list(zip(sites, places)))
            if not note:
                self._children_replaced.setdefault(child, []).append((owner, getattr(owner, attribute)))
                return
            note = f"one alpha for all calls: {note}"
        dropout = self._dropout_after(owner, attribute)
        self.install(name, owner, Place(attribute, was, inplace, what.squared, what.limit, dropout), note)
        self._children_replaced.setdefault(child, []).append((owner, getattr(owner, attribute)))

    def _replace_function(self, name: str, owner: nn.Module, attribute: str, function: Callable) -> None:
        if not self.wanted(owner, dotted(name, attribute)):
            return
        if type(owner).__setstate__ is not nn.Module.__setstate__:  # it may set a function again, in a copy
            if why := self.edit(owner, frozenset()):
                self.skip(dotted(name, attribute), f"the function {function.__name__}", why)
                return
        del owner.__dict__[attribute]
        self.report._undo_steps.append(lambda: owner.__dict__.__setitem__(attribute, function))
        was, dropout = f"the function {function.__name__}", self._dropout_after(owner, attribute)
        self.install(name, owner, Place(attribute, was, limit=limit_of(function), dropout=dropout))

    def _replace_calls(self, name: str, owner: nn.Module, calls: list[Call]) -> None:
        places: list[tuple[Call, Place]] = []
        for call in calls:
            site = free_name(owner, "qrelu", [place.attribute for _, place in places])
            if call.function and self.wanted(owner, dotted(name, site)):
                was = f"{call.function.__name__} (in {call.method}, line {call.line})"
                inplace = call.inplace if isinstance(call.inplace, bool) else bool(getattr(owner, call.inplace, False))
                dropout = self._dropout_after(owner, None, call)
                places.append((call, Place(site, was, inplace, call.squared, limit_of(call.function), dropout)))
        if places and (why := self._rewrite(name, owner, places)):
            for call, place in places:
                self.skip(dotted(name, call.method), place.was, why)

    def _replace_nodes(self, name: str, owner: torch.fx.GraphModule) -> None:
        """Replace calls in a traced graph."""
        before, graph = owner.graph, copy.deepcopy(owner.graph)
        places: list[Place] = []
        for node in graph.nodes:
            function: Any = getattr(torch.Tensor, node.target, None) if node.op == "call_method" else node.target
            if node.op not in ("call_function", "call_method") or function not in self.functions:
                continue
            site = free_name(owner, "qrelu", [place.attribute for place in places])
            if not self.wanted(owner, dotted(name, site)):
                continue
            inplace = function.__name__.endswith("_") or node.kwargs.get("inplace") is True
            was = f"{function.__name__} ({node.name} in the graph)"
            places.append(Place(site, was, inplace, limit=limit_of(function)))
            node.op, node.target = "call_module", site
            node.args, node.kwargs = (node.args or (node.kwargs["input"],))[:1], {}
        if places:
            for place in places:
                self.install(name, owner, place)
            owner.graph = graph
            self.report._undo_steps.append(lambda: setattr(owner, "graph", before))

    def _rewrite(self, name: str, owner: nn.Module, places: list[tuple[Call, Place]]) -> str:
        """Turn the calls into calls of QReLUs. If that is impossible, change nothing and return the reason."""
        why = self.edit(owner, frozenset(Edit(call.method, call.span, place.attribute) for call, place in places))
        for _, place in [] if why else places:
            self.install(name, owner, place)
        return why

    def edit(self, owner: nn.Module, edits: frozenset[Edit]) -> str:
        """Apply edits to the owner's methods, superseding those of the same calls. If impossible, return the reason."""
        cls, plan = original(type(owner))
        calls = {(edit.where, edit.span) for edit in edits}
        plan = edits | {edit for edit in plan if (edit.where, edit.span) not in calls}
        try:
            made = rewritten(cls, plan)
            before = self.report._classes.get(owner, (None, type(owner)))[1]
            owner.__class__ = made
        except Exception as error:  # from a decorator, a metaclass or __init_subclass__
            return f"its class cannot be rebuilt: {error}"
        self.report._classes[owner] = made, before
        return ""

    def _dropout_after(self, owner: nn.Module, attribute: str | None, site: Call | None = None) -> str | None:
        """The name of the nn.Dropout to fold, if any: one that gets the activation's output and nothing else, and is
        the only use of that output. site: the call of the activation; None means the only call of owner.attribute."""
        if not self._fold_dropout:
            return None
        if type(owner).forward is nn.Sequential.forward:
            after = dict(itertools.pairwise(owner._modules)).get(attribute or "")
        else:
            found = find_calls(original(type(owner))[0], self.functions)
            uses = [call for call in found.calls if call.attribute == attribute]
            if attribute is not None and found.mentions.count(attribute) != len(uses):
                return None
            sites = [(call.method, call.span) for call in ([site] if site else uses)]
            after = next((call.attribute for call in found.calls if sites == [(call.method, call.input_call)]), None)
            if found.mentions.count(after) != 1:
                return None
        dropout = owner._modules.get(after or "")
        return after if type(dropout) is nn.Dropout and not has_hooks(dropout) else None

    def install(self, name: str, owner: nn.Module, place: Place, note: str = "") -> QReLU:
        """Create the QReLU of a place and insert it."""
        settings = dict(self._settings)
        if place.limit < math.inf and settings.get("alpha") is None:
            settings["alpha"] = place.limit / (2**self._bits - 1)
        inplace, notes = place.inplace, [note] if note else []
        if inplace:
            try:
                QReLU(self._bits, **settings, inplace=True)
            except ValueError as error:
                inplace = False
                notes.append(f"no longer in place: {error}")
        folded = owner._modules.get(place.dropout or "")
        if isinstance(folded, nn.Dropout):
            try:
                QReLU(self._bits, **settings, dropout=folded.p)
                if place.inplace:  # a QReLU with dropout is never in place in training
                    raise ValueError("the activation is in place, and its input may be read later")
            except ValueError as error:
                folded = None
                notes.append(f"{place.dropout} is not folded: {error}")
            else:
                settings["dropout"] = folded.p
                notes.append(f"with {place.dropout}, p={folded.p:g}")
        made = QReLU(self._bits, **settings, inplace=inplace, squared=place.squared)
        made.limit = place.limit
        tensors = (*owner.parameters(), *owner.buffers(), *self.model.parameters(), *self.model.buffers())
        made.to(tensors[0].device if tensors else "cpu").train(owner.training)
        self.put(owner, place.attribute, made)
        if place.dropout and folded is not None:
            self.put(owner, place.dropout, nn.Identity())
        notes += ["squared"] if place.squared else []
        notes += [f"top level {place.limit:g}"] if place.limit < math.inf else []
        self.report.replaced.append(Replaced(dotted(name, place.attribute), place.was, "; ".join(notes)))
        return made

    def snapshot(self) -> tuple:
        """The state for `restore`."""
        report = self.report
        return len(report._undo_steps), list(report.replaced), list(report.skipped), dict(report._classes)

    def restore(self, state: tuple) -> None:
        steps, self.report.replaced[:], self.report.skipped[:], classes = state
        for module, (_, before) in self.report._classes.items():
            module.__class__ = classes[module][0] if module in classes else before
        self.report._classes = classes
        while len(self.report._undo_steps) > steps:
            self.report._undo_steps.pop()()

    def put(self, owner: nn.Module, attribute: str, module: nn.Module) -> None:
        old = owner._modules.get(attribute)

        def undo() -> None:
            if old is None:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, old.train(owner.training))

        setattr(owner, attribute, module)
        self.report._undo_steps.append(undo)

    def put_again(self, owner: nn.Module, attribute: str, module: nn.Module) -> None:
        """Put a module where it was in another copy of the model, in the place of a module, of a function, or new."""
        old = owner._modules.get(attribute)
        if old is None and callable(vars(owner).get(attribute)):
            del owner.__dict__[attribute]
        self.put(owner, attribute, module)
        if old is not None:
            self._children_replaced.setdefault(old, []).append((owner, module))

    def _update_references(self) -> None:
        """Update lists, dicts, bound methods and the like, in attributes of modules, that hold a replaced module."""
        if not self._children_replaced:
            return
        for owner in list(self.model.modules()):

            def new(module: Any, owner: nn.Module = owner) -> Any:
                candidates = self._children_replaced.get(module, []) if isinstance(module, nn.Module) else []
                own = [made for other, made in candidates if other is owner]
                return (own or [made for _, made in candidates] or [module])[0]

            for attribute, value in list(vars(owner).items()):
                if attribute.startswith("_") and attribute in vars(nn.Module()):
                    continue
                updated = _updated(value, new)
                if updated is not value:
                    owner.__dict__[attribute] = updated
                    self.report._undo_steps.append(functools.partial(owner.__dict__.update, {attribute: value}))

    def _disable_fused_kernels(self) -> None:
        """Make torch's transformer layers call their modules instead of fused kernels with a relu inside."""
        layers = [m for m in self.model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
        for layer in layers:
            if isinstance(layer.activation, QReLU) and getattr(layer, "activation_relu_or_gelu", None):
                self._set(layer, "activation_relu_or_gelu", 0)
        for encoder in (m for m in self.model.modules() if isinstance(m, nn.TransformerEncoder)):
            quantized = any(isinstance(getattr(layer, "activation", None), QReLU) for layer in encoder.layers)
            if quantized and getattr(encoder, "use_nested_tensor", False):
                self._set(encoder, "use_nested_tensor", False)

    def _set(self, owner: nn.Module, attribute: str, value: object) -> None:
        before = getattr(owner, attribute)
        setattr(owner, attribute, value)
        self.report._undo_steps.append(lambda: setattr(owner, attribute, before))


def _updated(value: Any, new: Callable[[Any], Any], depth: int = 4) -> Any:
    """value with `new` applied to the modules in it; value itself if nothing changes."""
    if depth == 0:
        return value
    if isinstance(value, nn.Module):
        return new(value)
    if isinstance(value, functools.partial):
        parts = [_updated(part, new, depth - 1) for part in (value.func, value.args, value.keywords)]
        same = parts[0] is value.func and parts[1] is value.args and parts[2] is value.keywords
        return value if same else functools.partial(parts[0], *parts[1], **parts[2])
    if isinstance(value, MethodType):
        made = new(value.__self__)
        if made is value.__self__ or value.__name__ == "forward":
            return value if made is value.__self__ else made
        return getattr(made, value.__name__)
    if type(value) in (list, tuple):
        items = [_updated(item, new, depth - 1) for item in value]
        return value if all(map(lambda a, b: a is b, items, value)) else type(value)(items)
    if type(value) is dict:
        made = {name: _updated(item, new, depth - 1) for name, item in value.items()}
        return value if all(made[name] is item for name, item in value.items()) else made
    return value


def limit_of(function: Callable) -> float:
    return 6.0 if function is F.relu6 else math.inf


def dotted(*names: str) -> str:
    return ".".join(name for name in names if name)


def free_name(owner: nn.Module, stem: str, taken: list[str]) -> str:
    """The first of stem, stem_1, stem_2, ... that is not taken and not an attribute of the owner."""
    names = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(1)))
    return next(name for name in names if not hasattr(owner, name) and name not in taken)
