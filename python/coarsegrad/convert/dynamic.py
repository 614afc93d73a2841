"""The part of `quantize_` that goes by what runs: relus that the methods' source does not show, and an alpha for each
run where one call runs several times in a forward."""

from __future__ import annotations

import ast
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import CodeType

import torch
from torch import Tensor, nn

from .._torch_internals import tree_leaves
from ..nn import QReLU
from .frames import Step, locate, steps_from
from .recording import Execution, Products, Recorder, is_product
from .report import Replaced
from .rewriting import function_at, original
from .running import float_activation, moved_to, run, undisturbed
from .source import AT, HANDED_ON, Edit, Source, Span, name_of
from .surgery import Place, Surgery, free_name, joined

_ROUNDS = 8  # each gets on by one call further out, or by one form of it
_MACHINERY = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)
_SCORES = "of products of activations, as scores are: what is chosen by them may change"


class _CannotEdit(Exception):
    """Why a call cannot be made one of a QReLU."""


@dataclass(frozen=True)
class _Run:
    """A QReLU that ran: by which calls, innermost first; behind which module with parameters of its own; whether on a
    product of activations."""

    layer: QReLU
    steps: list[Step]
    behind: nn.Module | None
    product: bool


class Conversion:
    """Runs the model on example inputs, before anything is changed and after each change."""

    def __init__(self, surgery: Surgery, inputs: object) -> None:
        self._surgery, self._model, self.report = surgery, surgery.model, surgery.report
        self._inputs = moved_to(self._model, inputs)
        self._sites: dict[tuple[nn.Module, str, Span], str] = {}
        self._edited: set[tuple[nn.Module, str, Span]] = set()  # in this round
        self._tried: set[QReLU] = set()
        self._seen: set[str] = set()  # the methods through which relus were called
        self._why: dict[tuple, str] = {}
        self._modes = (False, True)
        self._before = {False: self._outputs(False)}
        try:
            self._before[True] = self._outputs(True)
        except Exception as error:  # as a BatchNorm of one example
            self._modes = (False,)
            self.report.not_run = f"Not run in training mode, where it fails: {type(error).__name__}: {error}"

    def run(self) -> None:
        for _ in range(_ROUNDS):
            self._edited.clear()
            if not any([self._convert(execution) for execution in self._relus()]):
                break
        for _ in range(_ROUNDS):
            if not self._split():
                break
        self._check()

    # ------------------------------------------------------------------------------------------ running

    @contextmanager
    def _watched(self, watch: Callable[[QReLU, Tensor], None] = lambda layer, x: None) -> Iterator[None]:
        """QReLUs compute the float activation, and call `watch`."""
        layers = [module for module in self._model.modules() if isinstance(module, QReLU)]

        def as_float(layer: QReLU) -> Callable[[Tensor], Tensor]:
            def forward(x: Tensor) -> Tensor:
                watch(layer, x)
                return float_activation(layer, x)

            return forward

        for layer in layers:
            layer.forward = as_float(layer)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _outputs(self, training: bool) -> list[Tensor] | None:
        """The tensors that the model returns; None where two runs differ."""
        found = []
        for _ in range(2):
            with undisturbed(self._model, training), self._watched():
                found.append([t for t in tree_leaves(run(self._model, self._inputs)) if isinstance(t, Tensor)])
        return found[0] if _alike(*found) else None

    def _relus(self) -> list[Execution]:
        found = []
        for training in self._modes:
            with undisturbed(self._model, training), self._watched(), Recorder(self._model) as recorder:
                with torch.enable_grad():  # tells what depends on weights
                    run(self._model, self._inputs)
            found += recorder.executions
        return found

    def _runs(self, training: bool) -> list[_Run]:
        found: list[_Run] = []
        last: list[nn.Module | None] = [None]

        def note(module: nn.Module, *_: object) -> None:
            if module._parameters and not isinstance(module, QReLU):
                last[0] = module

        def watch(layer: QReLU, x: Tensor) -> None:
            found.append(_Run(layer, steps_from(sys._getframe(2)), last[0], is_product(x)))

        with undisturbed(self._model, training), self._watched(watch), Products(), ExitStack() as stack:
            for module in self._model.modules():
                stack.callback(module.register_forward_hook(note).remove)
            run(self._model, self._inputs)
        return found

    # ------------------------------------------------------------------------------- relus that still run

    def _convert(self, execution: Execution) -> bool:
        """Makes the relu a QReLU; whether anything was changed. If not, `_why` says why."""
        names = {module: name for name, module in self._model.named_modules()}
        steps, why = execution.steps, "no call of it is in a method of the model"
        functions = {(locate(steps, i) or ("", 0))[0].rpartition(":")[2].rpartition(".")[2] for i in range(len(steps))}
        self._seen |= {joined(names[s.module], function) for s in steps if s.module in names for function in functions}
        for i, step in enumerate(steps):
            if _is_machinery(step, names):
                continue
            try:
                return self._convert_at(execution, i, names)
            except _CannotEdit as error:
                why = str(error)
            if step.module is not None:  # further out it would be the whole module's call
                break
        self._why[_place_of(steps, names)] = why
        return False

    def _convert_at(self, execution: Execution, i: int, names: dict[nn.Module, str]) -> bool:
        owner, calls = _way(execution.steps, i, names)
        where, span, _ = calls[0]
        plan = original(type(owner))[1]
        hands = {Edit(outer, at, hands_on=inner) for (inner, *_), (outer, at, _) in zip(calls, calls[1:])}
        attribute = self._sites.get((owner, where, span))
        if attribute is None:
            return self._new_site(execution, i, owner, calls, hands, names)
        if hands - plan:
            if why := self._surgery.edit(owner, frozenset(hands)):
                raise _CannotEdit(why)
            self._edited.add((owner, where, span))
            return True
        if (owner, where, span) in self._edited:
            return False
        raise _CannotEdit("a QReLU is called there, and a relu runs all the same")

    def _new_site(
        self,
        execution: Execution,
        i: int,
        owner: nn.Module,
        calls: list[tuple[str, Span, Source]],
        hands: set[Edit],
        names: dict[nn.Module, str],
    ) -> bool:
        """A QReLU for a call of a relu, by the first form that leaves the float model what it is."""
        where, span, source = calls[0]
        attribute = free_name(owner, "qrelu", [])
        if not self._surgery.wanted(owner, joined(names[owner], attribute)):
            raise _CannotEdit("filter_fn leaves it")
        relu, why = execution.relu, "its arguments cannot be told"
        line = execution.steps[i].position[0]
        for edit, certain in self._forms(execution, i, calls[0], attribute):
            state, count = self._surgery.state(), len(self._relus())
            why = self._surgery.edit(owner, frozenset({replace(edit, keyed=bool(hands)), *hands}))
            if not why:
                was = f"{relu.name} (in {where}, line {line})"
                place = Place(attribute, was, relu.inplace, source.is_squared(span), relu.limit)
                self._surgery.install(names[owner], owner, place)
                why = "" if certain else self._why_other(count, edit.asks)
            if not why:
                for call in ((owner, where, span), (owner, where, edit.span)):
                    self._sites[call] = attribute
                    self._edited.add(call)
                return True
            self._surgery.roll_back(state)
        raise _CannotEdit(why)

    def _forms(
        self, execution: Execution, i: int, call: tuple[str, Span, Source], attribute: str
    ) -> Iterator[tuple[Edit, bool]]:
        """The edits that may make a QReLU of what is called there, and whether they certainly do no harm."""
        where, span, source = call
        node = source.node_at(span)
        if isinstance(node, ast.Call):
            direct = all(step.torch and step.module is None for step in execution.steps[:i])
            argument = execution.relu.argument if direct else 0 if node.args else _first_word(node)
            if source.argument(node, argument) is not None:
                known = source.call(node)
                certain = direct and known is not None and known[0] in self._surgery.functions
                if not certain and argument == 0 and len(node.args) == 1 and not node.keywords:
                    yield Edit(where, span, attribute, argument=0, asks=True), False
                yield Edit(where, span, attribute, argument=argument), certain
        for reference in source.references(span, self._surgery.functions):
            yield Edit(where, reference, attribute), False

    def _why_other(self, count: int, asks: bool) -> str:
        """Why an edit is not right: as many relus as before still run, or the float model computes something else."""
        try:
            if len(self._relus()) >= count:
                return "a relu runs there all the same"
            for training in self._modes:
                before = self._before[training]
                if before is None and not asks:
                    return "whether it is a relu alone cannot be told, as two runs of the model differ"
                if before is not None and not _alike(before, self._outputs(training) or []):
                    return "what is called there is not a relu alone"
        except Exception as error:
            return f"with a QReLU there the model fails: {type(error).__name__}: {error}"
        return ""

    # --------------------------------------------------------------------------- QReLUs that run several times

    def _split(self) -> bool:
        """An alpha for each run of one QReLU, if there is one to be split: for each way to it, and in a loop for each
        module that it runs behind, but not for each turn of a loop over time."""
        for layer, runs in self._several().items():
            self._tried.add(layer)
            state = self._surgery.state()
            try:
                if self._give_each_its_own(layer, self._key(layer, runs)):
                    return True
            except _CannotEdit:
                pass
            self._surgery.roll_back(state)
        return False

    def _several(self) -> dict[QReLU, list[_Run]]:
        """The QReLUs that run several times in a forward, and were not tried yet."""
        found: dict[QReLU, list[_Run]] = {}
        for training in self._modes:
            of_each: dict[QReLU, list[_Run]] = {}
            for one in self._runs(training):
                of_each.setdefault(one.layer, []).append(one)
            for layer, runs in of_each.items():
                if len(runs) > 1 and layer not in self._tried:
                    found.setdefault(layer, []).extend(runs)
        return found

    def _key(self, layer: QReLU, runs: list[_Run]) -> list[tuple[nn.Module, str, Edit]]:
        """Has the calls of the layer choose by a key; (owner, attribute, edit) of each."""
        names = {module: name for name, module in self._model.named_modules()}
        parents = [(m, a) for m in names for a, child in m._modules.items() if child is layer]
        if len(parents) != 1:
            raise _CannotEdit("it is in several places")
        [(owner, attribute)] = parents
        plan = {(edit.where, edit.span): edit for edit in original(type(owner))[1]}
        sites: dict[tuple[str, Span], Edit] = {}
        hands: set[Edit] = set()
        for one in runs:
            i = next(i for i, step in enumerate(one.steps) if not _is_machinery(step, names))
            by, calls = _way(one.steps, i, names, whole=True)
            where, span, source = calls[0]
            node = source.node_at(span)
            edit = plan.get((where, span))
            if edit is None and (call := source.call(node)) and call[1] == attribute:
                edit = Edit(where, span, attribute)
            if by is not owner or edit is None or edit.site != attribute or edit.keys:
                raise _CannotEdit("it is not called by its name, or was split before")
            sites[where, span] = replace(edit, keyed=True)
            hands |= {Edit(outer, at, hands_on=inner) for (inner, *_), (outer, at, _) in zip(calls, calls[1:])}
        if why := self._surgery.edit(owner, frozenset({*sites.values(), *hands})):
            raise _CannotEdit(why)
        return [(owner, attribute, edit) for edit in sites.values()]

    def _give_each_its_own(self, layer: QReLU, sites: list[tuple[nn.Module, str, Edit]]) -> bool:
        names = {module: name for name, module in self._model.named_modules()}
        owner, attribute, _ = sites[0]
        edits = {(edit.where, edit.span): edit for *_, edit in sites}
        behind: dict[tuple[str, Span, tuple], nn.Module | None] = {}
        for training in self._modes:
            for one in self._runs(training):
                if one.layer is layer:
                    i = next(i for i, step in enumerate(one.steps) if not _is_machinery(step, names))
                    where, span, source = _way(one.steps, i, names)[1][0]
                    variables = one.steps[i].key
                    key = (*variables.get(AT, ()), *(variables[turn] for turn in source.turns(span)))
                    behind.setdefault((where, span, key), one.behind)
        ways = {call: (call[:2], _without_turns(call[2]), module) for call, module in behind.items()}
        order = list(dict.fromkeys(ways.values()))
        if len(order) < 2:
            return False
        attributes = [attribute]
        for _ in order[1:]:
            attributes.append(free_name(owner, attribute, attributes))
        chosen: dict[tuple[str, Span], list[tuple[tuple, str]]] = {}
        for (where, span, key), way in ways.items():
            chosen.setdefault((where, span), []).append((key, attributes[order.index(way)]))
        keyed = {replace(edits[site], keys=tuple(keys)) for site, keys in chosen.items()}
        if why := self._surgery.edit(owner, frozenset(keyed)):
            raise _CannotEdit(why)
        entry = next((r for r in self.report.replaced if r.name == joined(names[owner], attribute)), None)
        for other in attributes[1:]:
            self._surgery.put(owner, other, copy.deepcopy(layer))
            if entry is not None:
                place = self.report.replaced.index(entry) + attributes.index(other)
                made = Replaced(joined(names[owner], other), entry.was, entry.note)
                self.report.replaced.insert(place, made)
        return True

    # ------------------------------------------------------------------------------------------ at the end

    def _check(self) -> None:
        """Counts the runs, names what is left, and holds the model, with float activations, to what it was."""
        self.report.executed = True
        names = {module: name for name, module in self._model.named_modules()}
        scores: set[str] = set()
        counts = {name: 0 for module, name in names.items() if isinstance(module, QReLU)}
        for training in self._modes:
            runs = self._runs(training)
            now = [names[one.layer] for one in runs]
            counts = {name: max(count, now.count(name)) for name, count in counts.items()}
            scores |= {names[one.layer] for one in runs if one.product}
        for entry in self.report.replaced:
            entry.runs = counts.get(entry.name)
            if entry.name in scores:
                entry.note = "; ".join(filter(None, [entry.note, _SCORES]))
        self.report.skipped[:] = [
            s for s in self.report.skipped if s.what != "method" or s.name not in self._seen and HANDED_ON not in s.why
        ]
        for execution in self._relus():
            place = _place_of(execution.steps, names)
            owner, function, line = place
            if not {owner, joined(owner, function)} & {s.name for s in self.report.skipped}:
                why = self._why.get(place, "no call of it was found")
                self._surgery.skip(joined(owner, function), f"{execution.relu.name} (line {line})", why)
        for training in self._modes:
            folded = any(isinstance(m, QReLU) and m.dropout for m in self._model.modules())
            before = self._before[training]
            if before is not None and not (training and folded):
                after = self._outputs(training)
                if after is not None and not _alike(before, after):
                    mode = "training" if training else "evaluation"
                    raise RuntimeError(
                        f"with float activations in place of the QReLUs the model computes something else than before,"
                        f" in {mode} mode; it was put back. Leave out by filter_fn what is not an activation of:\n"
                        f"{self.report}"
                    )


def _is_machinery(step: Step, names: dict[nn.Module, str]) -> bool:
    """Whether a frame is torch's own, or of a module that is not the model's, as an activation made on the spot."""
    if step.code in _MACHINERY:
        return True
    return step.module not in names if step.module is not None else step.torch


def _way(
    steps: list[Step], i: int, names: dict[nn.Module, str], whole: bool = False
) -> tuple[nn.Module, list[tuple[str, Span, Source]]]:
    """The call in step i, and the calls by which its function was reached, up to one in a method of a module: that
    module, and (function, span, source) of each; the span is a function's name where that is handed on. whole: up to
    the module's own call, as far as they can be told."""
    owner: nn.Module | None = None
    calls: list[tuple[str, Span, Source]] = []
    wrappers: set[CodeType] = set()  # of the function that was called last
    while i < len(steps) and steps[i].code not in _MACHINERY:
        step = steps[i]
        if step.code in wrappers or step.torch and step.module is None:  # torch's own, which was handed the function
            i += 1
            continue
        try:
            where, i, call, wrappers = _call_in(steps, i, owner, calls)
        except _CannotEdit:
            if owner is None:
                raise
            break
        module = steps[i].module
        if owner is not None and module is not None and module is not owner:
            break
        calls.append(call)
        if module is not None and module in names and ":" not in where:
            owner = module
            if not whole:
                break
        i += 1
    if owner is None:
        raise _CannotEdit("it is called outside of the methods of the model's modules")
    return owner, calls


def _call_in(
    steps: list[Step], i: int, owner: nn.Module | None, calls: list[tuple[str, Span, Source]]
) -> tuple[str, int, tuple[str, Span, Source], set[CodeType]]:
    """(the function that step i is in, the step it is called in as that, the call of what was called last, what is
    wrapped around the function)."""
    step = steps[i]
    if step.position[1] is None:
        raise _CannotEdit("where it is called can be told from Python 3.11 on")
    located = locate(steps, i)
    if located is None:
        raise _CannotEdit(f"it is called by {step.code.co_name}, whose source cannot be changed")
    where, i = located
    holder = steps[i].module if steps[i].module is not None else owner
    try:
        function = function_at(nn.Module if holder is None else original(type(holder))[0], where)
        source, wrappers = function.source(), function.wrappers()
    except (OSError, TypeError, SyntaxError, AttributeError, ImportError) as error:
        raise _CannotEdit(f"the source of {where} cannot be read: {error}") from error
    span = source.span_in_file(step.position)
    if calls:
        name = calls[-1][0].rpartition(":")[2].rpartition(".")[2]
        node = source.node_at(span)
        if not isinstance(node, ast.Call) or name_of(node.func) != name:
            references = source.references(span, name=name)
            if not references:
                raise _CannotEdit(f"{name} is handed on: {step.scope.get('__name__')}, line {step.position[0]}")
            span = references[0]
    return where, i, (where, span, source), wrappers


def _without_turns(key: tuple) -> tuple:
    return tuple(part for part in key if isinstance(part, str))


def _first_word(node: ast.Call) -> str | None:
    return node.keywords[0].arg if node.keywords else None


def _place_of(steps: list[Step], names: dict[nn.Module, str]) -> tuple[str, str, int]:
    """(module, function, line) of the innermost frame that is not torch's."""
    i = next((i for i, step in enumerate(steps) if not _is_machinery(step, names)), len(steps) - 1)
    module = next((names[step.module] for step in steps[i:] if step.module in names and step.module is not None), "")
    return module, steps[i].code.co_name, steps[i].position[0]


def _alike(one: list[Tensor], other: list[Tensor]) -> bool:
    if [t.shape for t in one] != [t.shape for t in other]:
        return False
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().amax()) if a.numel() else 0, equal_nan=True)
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(one, other)
    )
