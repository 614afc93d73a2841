"""The part of `quantize_` that runs the model: it replaces the relus that the source of the methods does not show, and
gives a QReLU that runs several times in a forward an alpha for each run."""

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

from .._torch_internals import MODULE_CALL_CODES, tree_leaves
from ..nn import QReLU
from .editing import Edit
from .frames import Frame, locate, stack_from
from .recording import Execution, ProductMarker, ReluRecorder, is_product
from .report import Replaced
from .rewriting import function_at, original
from .running import float_activation, on_device_of, run, without_side_effects
from .source import CALL_PATH, PASSED_ON, Source, Span, name_of
from .surgery import Place, Surgery, dotted, free_name

_ROUNDS = 8  # each round gets one call further out, or tries one more form of the edit
_SCORES = "its input is a product of activations, like attention scores: what they select may change"


class _CannotEdit(Exception):
    """Why a call cannot become the call of a QReLU."""


@dataclass(frozen=True)
class _LayerRun:
    """A QReLU that ran. stack: innermost frame first. preceding: the last module with parameters that ran before it.
    product: whether its input is a product of activations."""

    layer: QReLU
    stack: list[Frame]
    preceding: nn.Module | None
    product: bool


@dataclass(frozen=True)
class _CallSite:
    """A call in the function `where`, or a function's name that is passed on there."""

    where: str
    span: Span
    source: Source


class DynamicConversion:
    """Runs the model on example inputs, before anything is changed and after each change."""

    def __init__(self, surgery: Surgery, inputs: object) -> None:
        self._surgery, self._model, self.report = surgery, surgery.model, surgery.report
        self._inputs = on_device_of(self._model, inputs)
        self._sites: dict[tuple[nn.Module, str, Span], str] = {}
        self._edited: set[tuple[nn.Module, str, Span]] = set()  # in this round
        self._tried: set[QReLU] = set()
        self._seen: set[str] = set()  # methods through which relus were called
        self._reasons: dict[tuple, str] = {}
        self._modes: tuple[bool, ...] = (False, True)
        self._before = {False: self._outputs(False)}
        try:
            self._before[True] = self._outputs(True)
        except Exception as error:  # such as a BatchNorm of one example
            self._modes = (False,)
            self.report.not_run = f"Not run in training mode, which fails: {type(error).__name__}: {error}"

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
        """In the block, QReLUs compute the float activation and call `watch`."""
        layers = [module for module in self._model.modules() if isinstance(module, QReLU)]

        def as_float(layer: QReLU) -> Callable[[Tensor], Tensor]:
            def forward(x: Tensor) -> Tensor:
                watch(layer, x)
                return float_activation(layer, x)

            return forward

        for layer in layers:
            vars(layer)["forward"] = as_float(layer)
        try:
            yield
        finally:
            for layer in layers:
                del vars(layer)["forward"]

    def _outputs(self, training: bool) -> list[Tensor] | None:
        """The tensors that the model returns; None if two runs differ."""
        found = []
        for _ in range(2):
            with without_side_effects(self._model, training), self._watched():
                found.append([t for t in tree_leaves(run(self._model, self._inputs)) if isinstance(t, Tensor)])
        return found[0] if _all_close(*found) else None

    def _relus(self) -> list[Execution]:
        found = []
        for training in self._modes:
            with without_side_effects(self._model, training), self._watched(), ReluRecorder(self._model) as recorder:
                with torch.enable_grad():  # shows what depends on weights
                    run(self._model, self._inputs)
            found += recorder.executions
        return found

    def _runs(self, training: bool) -> list[_LayerRun]:
        found: list[_LayerRun] = []
        last: list[nn.Module | None] = [None]

        def record(module: nn.Module, *_: object) -> None:
            if module._parameters and not isinstance(module, QReLU):
                last[0] = module

        def watch(layer: QReLU, x: Tensor) -> None:
            found.append(_LayerRun(layer, stack_from(sys._getframe(2)), last[0], is_product(x)))

        with without_side_effects(self._model, training), self._watched(watch), ProductMarker(), ExitStack() as stack:
            for module in self._model.modules():
                stack.callback(module.register_forward_hook(record).remove)
            run(self._model, self._inputs)
        return found

    # ------------------------------------------------------------------------------- relus that still run

    def _convert(self, execution: Execution) -> bool:
        """Replace a relu. Returns whether anything changed; if not, `_reasons` says why."""
        names = {module: name for name, module in self._model.named_modules()}
        stack, why = execution.stack, "no method of the model calls it"
        functions = {(locate(stack, i) or ("", 0))[0].rpartition(":")[2].rpartition(".")[2] for i in range(len(stack))}
        self._seen |= {dotted(names[f.module], function) for f in stack if f.module in names for function in functions}
        for i, frame in enumerate(stack):
            if _is_foreign(frame, names):
                continue
            try:
                return self._convert_at(execution, i, names)
            except _CannotEdit as error:
                why = str(error)
            if frame.module is not None:  # further out is the call of the whole module
                break
        self._reasons[_place_of(stack, names)] = why
        return False

    def _convert_at(self, execution: Execution, i: int, names: dict[nn.Module, str]) -> bool:
        owner, calls = _call_path(execution.stack, i, names)
        site = (owner, calls[0].where, calls[0].span)
        outer_edits = _keyed_calls(calls)
        if site not in self._sites:
            return self._new_site(execution, i, owner, calls, outer_edits, names)
        if outer_edits - original(type(owner))[1]:
            if why := self._surgery.edit(owner, frozenset(outer_edits)):
                raise _CannotEdit(why)
            self._edited.add(site)
            return True
        if site in self._edited:
            return False
        raise _CannotEdit("a QReLU is called there, but a relu still runs")

    def _new_site(
        self,
        execution: Execution,
        i: int,
        owner: nn.Module,
        calls: list[_CallSite],
        outer_edits: set[Edit],
        names: dict[nn.Module, str],
    ) -> bool:
        """Insert a QReLU for a call of a relu, by the first edit that leaves the float model unchanged."""
        call = calls[0]
        attribute = free_name(owner, "qrelu", [])
        if not self._surgery.wanted(owner, dotted(names[owner], attribute)):
            raise _CannotEdit("filter_fn excludes it")
        relu, why = execution.relu, "its arguments are unknown"
        line = execution.stack[i].position[0]
        for edit, certain in self._possible_edits(execution, i, call, attribute):
            state, count = self._surgery.snapshot(), len(self._relus())
            why = self._surgery.edit(owner, frozenset({replace(edit, keyed=bool(outer_edits)), *outer_edits}))
            if not why:
                was = f"{relu.name} (in {call.where}, line {line})"
                place = Place(attribute, was, relu.inplace, call.source.is_squared(call.span), relu.limit)
                self._surgery.install(names[owner], owner, place)
                why = "" if certain else self._why_wrong(count, edit.if_relu)
            if not why:
                for site in ((owner, call.where, call.span), (owner, call.where, edit.span)):
                    self._sites[site] = attribute
                    self._edited.add(site)
                return True
            self._surgery.restore(state)
        raise _CannotEdit(why)

    def _possible_edits(
        self, execution: Execution, i: int, call: _CallSite, attribute: str
    ) -> Iterator[tuple[Edit, bool]]:
        """The edits that may turn what is called there into a QReLU, and whether they are known to be right."""
        where, span, source = call.where, call.span, call.source
        node = source.node_at(span)
        if isinstance(node, ast.Call):
            direct = all(frame.in_torch and frame.module is None for frame in execution.stack[:i])
            argument = execution.relu.argument if direct else 0 if node.args else _first_word(node)
            if source.argument(node, argument) is not None:
                known = source.call(node)
                certain = direct and known is not None and known.function in self._surgery.functions
                if not certain and argument == 0 and len(node.args) == 1 and not node.keywords:
                    yield Edit(where, span, attribute, argument=0, if_relu=True), False
                yield Edit(where, span, attribute, argument=argument), certain
        for reference in source.references(span, self._surgery.functions):
            yield Edit(where, reference, attribute), False

    def _why_wrong(self, count: int, if_relu: bool) -> str:
        """Why an edit is wrong: as many relus as before still run, or the float model computes something else."""
        try:
            if len(self._relus()) >= count:
                return "a relu still runs there"
            for training in self._modes:
                before = self._before[training]
                if before is None and not if_relu:
                    return "two runs of the model differ, so it is unknown whether what is called is just a relu"
                if before is not None and not _all_close(before, self._outputs(training) or []):
                    return "what is called there is not just a relu"
        except Exception as error:
            return f"with a QReLU there the model fails: {type(error).__name__}: {error}"
        return ""

    # --------------------------------------------------------------------------- QReLUs that run several times

    def _split(self) -> bool:
        """Split one QReLU that runs several times in a forward: one for each path of calls to it and, in a loop, for
        each preceding module, but not for each step of a loop over time. Returns whether there was one to split."""
        for layer, runs in self._run_repeatedly().items():
            self._tried.add(layer)
            state = self._surgery.snapshot()
            try:
                if self._split_layer(layer, self._make_keyed(layer, runs)):
                    return True
            except _CannotEdit:
                pass
            self._surgery.restore(state)
        return False

    def _run_repeatedly(self) -> dict[QReLU, list[_LayerRun]]:
        """The QReLUs that run several times in a forward and have not been tried yet."""
        found: dict[QReLU, list[_LayerRun]] = {}
        for training in self._modes:
            by_layer: dict[QReLU, list[_LayerRun]] = {}
            for one in self._runs(training):
                by_layer.setdefault(one.layer, []).append(one)
            for layer, runs in by_layer.items():
                if len(runs) > 1 and layer not in self._tried:
                    found.setdefault(layer, []).extend(runs)
        return found

    def _make_keyed(self, layer: QReLU, runs: list[_LayerRun]) -> tuple[nn.Module, str, dict[tuple[str, Span], Edit]]:
        """Make the calls of the layer choose it by a key. Returns its owner, its name there, and the edits."""
        names = {module: name for name, module in self._model.named_modules()}
        parents = [(m, a) for m in names for a, child in m._modules.items() if child is layer]
        if len(parents) != 1:
            raise _CannotEdit("several modules own it")
        [(owner, attribute)] = parents
        plan = {(edit.where, edit.span): edit for edit in original(type(owner))[1]}
        edits: dict[tuple[str, Span], Edit] = {}
        outer_edits: set[Edit] = set()
        for one in runs:
            caller, calls = _call_path(one.stack, _first_own(one.stack, names), names, whole=True)
            site, source = (calls[0].where, calls[0].span), calls[0].source
            edit = plan.get(site)
            if edit is None and (call := source.call(source.node_at(site[1]))) and call.attribute == attribute:
                edit = Edit(*site, attribute)
            if caller is not owner or edit is None or edit.site != attribute or edit.keys:
                raise _CannotEdit("it is not called by its name, or was split before")
            edits[site] = replace(edit, keyed=True)
            outer_edits |= _keyed_calls(calls)
        if why := self._surgery.edit(owner, frozenset({*edits.values(), *outer_edits})):
            raise _CannotEdit(why)
        return owner, attribute, edits

    def _split_layer(self, layer: QReLU, keyed: tuple[nn.Module, str, dict[tuple[str, Span], Edit]]) -> bool:
        """Give each path to the layer a QReLU of its own. Returns whether there are several paths."""
        names = {module: name for name, module in self._model.named_modules()}
        owner, attribute, edits = keyed
        paths: dict[tuple[str, Span, tuple], tuple] = {}  # a call with its key -> what gets a QReLU of its own
        for training in self._modes:
            for one in self._runs(training):
                if one.layer is layer:
                    i = _first_own(one.stack, names)
                    call, variables = _call_path(one.stack, i, names)[1][0], one.stack[i].key_variables
                    counters = (variables[counter] for counter in call.source.counters(call.span))
                    key = (*variables.get(CALL_PATH, ()), *counters)
                    path = (call.where, call.span, _without_counters(key), one.preceding)
                    paths.setdefault((call.where, call.span, key), path)
        order = list(dict.fromkeys(paths.values()))
        if len(order) < 2:
            return False
        attributes = [attribute]
        for _ in order[1:]:
            attributes.append(free_name(owner, attribute, attributes))
        chosen: dict[tuple[str, Span], list[tuple[tuple, str]]] = {}
        for (where, span, key), path in paths.items():
            chosen.setdefault((where, span), []).append((key, attributes[order.index(path)]))
        with_keys = {replace(edits[site], keys=tuple(keys)) for site, keys in chosen.items()}
        if why := self._surgery.edit(owner, frozenset(with_keys)):
            raise _CannotEdit(why)
        entry = next((r for r in self.report.replaced if r.name == dotted(names[owner], attribute)), None)
        for other in attributes[1:]:
            self._surgery.put(owner, other, copy.deepcopy(layer))
            if entry is not None:
                place = self.report.replaced.index(entry) + attributes.index(other)
                made = Replaced(dotted(names[owner], other), entry.was, entry.note)
                self.report.replaced.insert(place, made)
        return True

    # ------------------------------------------------------------------------------------------ at the end

    def _check(self) -> None:
        """Count runs, list the relus that remain, and check that the model with float activations is unchanged."""
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
            s for s in self.report.skipped if s.what != "method" or s.name not in self._seen and PASSED_ON not in s.why
        ]
        for execution in self._relus():
            place = _place_of(execution.stack, names)
            owner, function, line = place
            if not {owner, dotted(owner, function)} & {s.name for s in self.report.skipped}:
                why = self._reasons.get(place, "its call was not found")
                self._surgery.skip(dotted(owner, function), f"{execution.relu.name} (line {line})", why)
        for training in self._modes:
            folded = any(isinstance(m, QReLU) and m.dropout for m in self._model.modules())
            before = self._before[training]
            if before is not None and not (training and folded):
                after = self._outputs(training)
                if after is not None and not _all_close(before, after):
                    mode = "training" if training else "evaluation"
                    raise RuntimeError(
                        f"with float activations in place of the QReLUs the model computes something else than before,"
                        f" in {mode} mode; it was restored. Exclude by filter_fn what is not an activation:\n"
                        f"{self.report}"
                    )


def _is_foreign(frame: Frame, names: dict[nn.Module, str]) -> bool:
    """Whether a frame is torch's, or belongs to a module outside the model, such as an activation made in a forward."""
    if frame.code in MODULE_CALL_CODES:
        return True
    return frame.module not in names if frame.module is not None else frame.in_torch


def _first_own(stack: list[Frame], names: dict[nn.Module, str]) -> int:
    return next(i for i, frame in enumerate(stack) if not _is_foreign(frame, names))


def _keyed_calls(calls: list[_CallSite]) -> set[Edit]:
    """The edits by which each call reaches the keyed form of the function that the call before it is in."""
    return {Edit(outer.where, outer.span, keyed_callee=inner.where) for inner, outer in zip(calls, calls[1:])}


def _call_path(
    stack: list[Frame], i: int, names: dict[nn.Module, str], whole: bool = False
) -> tuple[nn.Module, list[_CallSite]]:
    """The call in frame i and the calls by which its function was reached, innermost first, up to one in a method of a
    module of the model; and that module. whole: continue up to the call of that module, as far as possible."""
    owner: nn.Module | None = None
    calls: list[_CallSite] = []
    wrappers: set[CodeType] = set()  # of the function called last
    while i < len(stack) and stack[i].code not in MODULE_CALL_CODES:
        frame = stack[i]
        if frame.code in wrappers or frame.in_torch and frame.module is None:  # torch, which was passed the function
            i += 1
            continue
        try:
            i, call, wrappers = _call_in(stack, i, owner, calls)
        except _CannotEdit:
            if owner is None:
                raise
            break
        module = stack[i].module
        if owner is not None and module is not None and module is not owner:
            break
        calls.append(call)
        if module is not None and module in names and ":" not in call.where:
            owner = module
            if not whole:
                break
        i += 1
    if owner is None:
        raise _CannotEdit("no method of the model's modules calls it")
    return owner, calls


def _call_in(
    stack: list[Frame], i: int, owner: nn.Module | None, calls: list[_CallSite]
) -> tuple[int, _CallSite, set[CodeType]]:
    """(the frame of the function that frame i belongs to, the call in it, the code of that function's wrappers)."""
    frame = stack[i]
    located = locate(stack, i)
    if located is None:
        raise _CannotEdit(f"it is called by {frame.code.co_name}, whose source cannot be rewritten")
    where, i = located
    holder = stack[i].module if stack[i].module is not None else owner
    try:
        function = function_at(nn.Module if holder is None else original(type(holder))[0], where)
        source, wrappers = function.source(), function.wrappers()
    except (OSError, TypeError, SyntaxError, AttributeError, ImportError) as error:
        raise _CannotEdit(f"the source of {where} cannot be read: {error}") from error
    span = source.span_in_file(frame.position)
    if span is None:
        raise _CannotEdit("Python before 3.11 does not record where it is called")
    if calls:
        name = calls[-1].where.rpartition(":")[2].rpartition(".")[2]
        node = source.node_at(span)
        if not isinstance(node, ast.Call) or name_of(node.func) != name:
            references = source.references(span, name=name)
            if not references:
                raise _CannotEdit(f"{name} is passed on: {frame.globals.get('__name__')}, line {frame.position[0]}")
            span = references[0]
    return i, _CallSite(where, span, source), wrappers


def _without_counters(key: tuple) -> tuple:
    return tuple(part for part in key if isinstance(part, str))


def _first_word(node: ast.Call) -> str | None:
    return node.keywords[0].arg if node.keywords else None


def _place_of(stack: list[Frame], names: dict[nn.Module, str]) -> tuple[str, str, int]:
    """(module, function, line) of the innermost frame that is the model's."""
    i = next((i for i, frame in enumerate(stack) if not _is_foreign(frame, names)), len(stack) - 1)
    module = next((names[f.module] for f in stack[i:] if f.module is not None and f.module in names), "")
    return module, stack[i].code.co_name, stack[i].position[0]


def _all_close(one: list[Tensor], other: list[Tensor]) -> bool:
    if [t.shape for t in one] != [t.shape for t in other]:
        return False
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().amax()) if a.numel() else 0, equal_nan=True)
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(one, other)
    )
