"""`quantize_`: QReLU in place of the ReLUs of a model that somebody else wrote, with a report and a way back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nn import QReLU
from .rewriting import Call, find_calls, original, rewritten
from .ste import format_table

# What stands for nn.ReLU beside the function of its name in torch.nn.functional.
_RELUS = (torch.relu, torch.relu_, F.relu_, torch.Tensor.relu, torch.Tensor.relu_)
_WHY_OWN = {
    "inplace": "a QReLU is in place where what it replaces was",
    "squared": "a QReLU squares where what it replaces did",
    "dropout": "places differ; fold_dropout=True takes over the dropouts that the model has",
    "num_channels": "channels differ from place to place; `calibrate` with channel_dim finds an alpha for each",
}


@dataclass(frozen=True)
class Replaced:
    """name: that of the QReLU in the model. was: what it stands in for. note: what is not as it was."""

    name: str
    was: str
    note: str


@dataclass(frozen=True)
class Skipped:
    """An activation that stayed: its name, or its method's; what it is; why."""

    name: str
    what: str
    why: str


@dataclass
class QuantizeReport:
    """What `quantize_` did. Prints as two tables.

    replaced: in the order of the modules. skipped: what looks like an activation and stayed.
    already: names of the QReLUs that were there before.
    """

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    _steps_back: list[Callable[[], object]] = field(default_factory=list)
    _classes: dict[nn.Module, tuple[type, type]] = field(default_factory=dict)  # module -> its class now, and before
    _undone: bool = False

    def undo(self) -> None:
        """Puts back what was there, the very same modules and classes; learned alphas are lost with their QReLUs.

        Raises RuntimeError if it was done before, and, before anything is changed, if something else (fully_shard, a
        parametrization) has changed the class of a module whose methods were rewritten: that has to be undone first.
        """
        if self._undone:
            raise RuntimeError("undo() was called before")
        for module, (now, _) in self._classes.items():
            if type(module) is not now:
                raise RuntimeError(
                    f"a {now.__name__} was rewritten and has another class by now, {type(module).__name__}:"
                    " undo what gave it that class first"
                )
        for module, (_, before) in self._classes.items():
            module.__class__ = before
        for step in reversed(self._steps_back):
            step()
        self._undone = True

    def __str__(self) -> str:
        parts = []
        if self.replaced:
            parts.append(format_table(("QReLU", "in place of", ""), [(r.name, r.was, r.note) for r in self.replaced]))
        if self.skipped:
            parts.append(format_table(("not replaced", "what", "why"), [(s.name, s.what, s.why) for s in self.skipped]))
        count = f"{len(self.replaced)} replaced, {len(self.skipped)} not"
        if self.already:
            count += f"; QReLUs that were there before: {len(self.already)}"
        return "\n\n".join([*parts, count + ("; undone" if self._undone else "")])

    __repr__ = __str__


def quantize_(
    model: nn.Module,
    bits: int = 4,
    *,
    replace: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    fold_dropout: bool = False,
    **settings: object,
) -> QuantizeReport:
    """Puts a `QReLU` in the place of every ReLU of `model`, in place, and reports what was and what was not replaced.

    Each place where an activation is called gets a QReLU of its own, with its own alpha:

    - submodules: nn.ReLU (also a module that is shared, under each of its names; one with inplace=True stays in place
      where the STE allows it), nn.ReLU6 (its top level is 6), and modules of any class that compute relu(x) or its
      square (then `squared=True`);
    - `self.relu(x)` in several places of a module's methods: the first keeps the name, the others are `relu_1`, ...;
    - calls of torch.relu, F.relu, x.relu() and their in-place forms in the methods of a module, with or without a
      square around them: submodules `qrelu`, `qrelu_1`, ... of that module;
    - attributes that hold such a function, as nn.TransformerEncoderLayer has.

    Calls in methods are found in the source. An instance whose methods have some gets a subclass of its class, of the
    same name, with those methods compiled anew; the class itself and its other instances stay as they are. What cannot
    be found or changed so (functions outside of classes, scripted modules, modules with hooks, calls through super())
    is in `report.skipped` where it is seen; `calibrate` names the lines in which a relu is still called.

    model: any nn.Module, not yet compiled or wrapped (DDP, FSDP): do that to the result.
    bits: 1..8.
    replace: the classes to replace, and with them the functions of their names in lower case in torch.nn.functional:
        with nn.GELU or nn.SiLU the network computes something else afterwards, and must be trained.
    filter_fn: filter_fn(module, name) says whether to replace: of a submodule it and its name; of a call in a method
        the module that has the method, and the name that the new QReLU would have.
    fold_dropout: a QReLU takes over the nn.Dropout that alone gets its output (`self.dropout(self.act(x))`; `h =
        self.act(h)` and then `h = self.dropout(h)`, as in T5; neighbours in an nn.Sequential), and an nn.Identity stays
        in its place. What the next layer keeps are then codes (see QReLU's dropout). One after an activation that works
        in place stays. What looks for nn.Dropouts in the model, to change their p, finds none there any more.
    settings: keywords of `QReLU`, the same for all. alpha is a placeholder, the best for unit Gaussian inputs, until it
        is given, or found by `calibrate`.

    Once more on the same model it replaces what is left. Returns a `QuantizeReport`, whose `undo()` puts all back.

    Raises TypeError or ValueError for what QReLU refuses, for keywords that belong to each place (inplace, squared,
    dropout, num_channels), if `model` is itself an activation, and if nothing was replaced and no QReLU was there: the
    message says what was skipped. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(replace, (tuple, list)) or not all(
        isinstance(c, type) and issubclass(c, nn.Module) and c is not nn.Module for c in replace
    ):
        raise TypeError(f"replace must be a tuple of module classes, got {replace!r}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable, got {filter_fn!r}")
    for name in settings.keys() & _WHY_OWN:
        raise TypeError(f"{name} cannot be given for all: {_WHY_OWN[name]}")
    QReLU(bits, **settings)  # refuses what is wrong before anything is changed
    surgery = _Surgery(model, bits, tuple(replace), filter_fn or (lambda module, name: True), fold_dropout, settings)
    report = surgery.report
    try:
        surgery.run()
    except BaseException:
        report.undo()
        raise
    if not report.replaced and not report.already:
        skipped = "; ".join(f"{s.name} ({s.what}): {s.why}" for s in report.skipped)
        wanted = ", ".join(c.__name__ for c in replace)
        raise ValueError(f"model has no {wanted} and no call of one to replace. Skipped: {skipped or 'nothing'}")
    return report


class _Surgery:
    """One run of `quantize_`."""

    def __init__(
        self,
        model: nn.Module,
        bits: int,
        replace: tuple[type[nn.Module], ...],
        wanted: Callable[[nn.Module, str], bool],
        fold_dropout: bool,
        settings: dict[str, object],
    ) -> None:
        self._model, self._bits, self._replace, self._wanted, self._settings = model, bits, replace, wanted, settings
        self._fold_dropout = fold_dropout
        self._functions = frozenset(
            function
            for kind in replace
            for function in (getattr(F, kind.__name__.lower(), None), *(_RELUS if kind is nn.ReLU else ()))
            if function is not None
        )
        self.report = QuantizeReport()

    def run(self) -> None:
        modules = list(self._model.named_modules())
        if any(isinstance(self._model, kind) for kind in (*self._replace, QReLU)):
            raise TypeError(f"model must contain activations, not be one, got {type(self._model).__name__}")
        self.report.already = [name for name, module in modules if isinstance(module, QReLU)]
        leaves = set()  # activations by what they compute: replaced whole, their methods stay
        for name, owner in modules:
            if owner in leaves or isinstance(owner, (QReLU, *self._replace)):
                continue
            if isinstance(owner, torch.jit.ScriptModule):
                self._skip(name, owner, "scripted code cannot be changed")
                continue
            calls = self._calls(name, owner)
            for attribute, child in list(owner._modules.items()):
                if child is not None and (what := self._activation(child)):
                    leaves.add(child)
                    self._replace_child(name, owner, attribute, child, what, calls)
            for attribute, value in list(vars(owner).items()):
                if callable(value) and getattr(value, "__hash__", None) and value in self._functions:
                    self._replace_function(name, owner, attribute, value)
            self._replace_calls(name, owner, [call for call in calls if call.function])

    def _skip(self, name: str, what: object, why: str) -> None:
        what = type(what).__name__ if isinstance(what, nn.Module) else str(what)
        self.report.skipped.append(Skipped(name or "(model)", what, why))

    def _calls(self, name: str, owner: nn.Module) -> list[Call]:
        """The calls in the owner's methods that are not yet those of submodules."""
        cls, plan = original(type(owner))
        found = find_calls(cls, self._functions)
        done = {(method, span) for method, span, _ in plan}
        if not self._computes(owner):
            for method, why in found.others:
                self._skip(_joined(name, method), "method", why)
        return [call for call in found.calls if (call.method, call.span) not in done]

    def _activation(self, module: nn.Module) -> str | None:
        """What kind of activation a module is, if it is one."""
        for kind in self._replace:
            if isinstance(module, kind):
                return kind.__name__ if type(module).forward is kind.forward else None
        return self._computes(module)

    def _computes(self, module: nn.Module) -> str | None:
        """ReLU or ReLU squared, if that is what a module without parts and with a relu in it makes of numbers."""
        parts = [*module.children(), *module.parameters(), *module.buffers()]
        if nn.ReLU not in self._replace or isinstance(module, QReLU) or parts:
            return None
        if not any(call.function for call in find_calls(original(type(module))[0], self._functions).calls):
            return None
        x = torch.tensor([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0])
        try:
            with torch.no_grad():
                y = module(x.clone())
        except Exception:  # it wants something else than numbers
            return None
        for what, wanted in (("ReLU", x.clamp(min=0)), ("ReLU squared", x.clamp(min=0).square())):
            if isinstance(y, Tensor) and torch.equal(y, wanted):
                return what
        return None

    def _replace_child(
        self, name: str, owner: nn.Module, attribute: str, child: nn.Module, what: str, calls: list[Call]
    ) -> None:
        full = _joined(name, attribute)
        if _has_hooks(child):
            self._skip(full, child, "it has hooks, which would be lost")
            return
        if not self._wanted(child, full):
            return
        was, squared = type(child).__name__, what == "ReLU squared"
        inplace, limit = getattr(child, "inplace", False) is True, _LIMITS.get(what, math.inf)
        sites = [call for call in calls if call.attribute == attribute]
        note = ""
        if len(sites) > 1 or any(call.squared for call in sites):
            places = []
            for call in sites:
                site = _free_name(owner, attribute, [place.attribute for place in places]) if places else attribute
                where = f"{was} (self.{attribute} in {call.method}, line {call.line})"
                dropout = self._dropout_after(owner, attribute, call)
                places.append(_Place(site, where, inplace, squared or call.squared, limit, dropout))
            note = self._rewrite(name, owner, list(zip(sites, places)))
            if not note:
                return
            note = f"one alpha for all calls: {note}"
        dropout = self._dropout_after(owner, attribute)
        self._install(name, owner, _Place(attribute, was, inplace, squared, limit, dropout), note)

    def _replace_function(self, name: str, owner: nn.Module, attribute: str, function: Callable) -> None:
        if not self._wanted(owner, _joined(name, attribute)):
            return
        del owner.__dict__[attribute]
        self.report._steps_back.append(lambda: owner.__dict__.__setitem__(attribute, function))
        was, dropout = f"the function {function.__name__}", self._dropout_after(owner, attribute)
        self._install(name, owner, _Place(attribute, was, limit=_limit(function), dropout=dropout))
        if getattr(owner, "activation_relu_or_gelu", 0):  # nn.TransformerEncoderLayer's fused kernel has a relu inside
            before, owner.activation_relu_or_gelu = owner.activation_relu_or_gelu, 0
            self.report._steps_back.append(lambda: setattr(owner, "activation_relu_or_gelu", before))

    def _replace_calls(self, name: str, owner: nn.Module, calls: list[Call]) -> None:
        places = []
        for call in calls:
            site = _free_name(owner, "qrelu", [place.attribute for _, place in places])
            if self._wanted(owner, _joined(name, site)):
                was = f"{call.function.__name__} (in {call.method}, line {call.line})"
                dropout = self._dropout_after(owner, None, call)
                places.append((call, _Place(site, was, call.inplace, call.squared, _limit(call.function), dropout)))
        if places and (why := self._rewrite(name, owner, places)):
            for call, place in places:
                self._skip(_joined(name, call.method), place.was, why)

    def _rewrite(self, name: str, owner: nn.Module, places: list[tuple[Call, _Place]]) -> str:
        """Makes the calls calls of QReLUs; or says why that cannot be, and changes nothing."""
        cls, plan = original(type(owner))
        plan |= {(call.method, call.span, place.attribute) for call, place in places}
        try:
            made = rewritten(cls, plan)
            before = self.report._classes.get(owner, (None, type(owner)))[1]
            owner.__class__ = made
        except Exception as error:  # whatever a decorator, a metaclass or __init_subclass__ does with it
            return f"its class cannot be made anew: {error}"
        self.report._classes[owner] = made, before
        for _, place in places:
            self._install(name, owner, place)
        return ""

    def _dropout_after(self, owner: nn.Module, attribute: str | None, site: Call | None = None) -> str | None:
        """The name of the nn.Dropout to fold, if there is one: the activation's output goes there and nowhere else, and
        nothing else goes there. site: the call of the activation; None: the only one of owner.attribute."""
        if not self._fold_dropout:
            return None
        if type(owner).forward is nn.Sequential.forward:
            after = dict(itertools.pairwise(owner._modules)).get(attribute)
        else:
            found = find_calls(original(type(owner))[0], self._functions)
            uses = [call for call in found.calls if call.attribute == attribute]
            if attribute is not None and found.mentions.count(attribute) != len(uses):
                return None
            of = [(call.method, call.span) for call in ([site] if site else uses)]
            after = next((call.attribute for call in found.calls if of == [(call.method, call.given)]), None)
            if found.mentions.count(after) != 1:
                return None
        dropout = owner._modules.get(after)
        return after if type(dropout) is nn.Dropout and not _has_hooks(dropout) else None

    def _install(self, name: str, owner: nn.Module, place: _Place, note: str = "") -> None:
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
        folded = owner._modules.get(place.dropout)
        if folded is not None:
            try:
                QReLU(self._bits, **settings, dropout=folded.p)
                if place.inplace:  # a QReLU with dropout is not, in training
                    raise ValueError("the activation is in place, and its input may be read again")
            except ValueError as error:
                folded = None
                notes.append(f"{place.dropout} is not folded: {error}")
            else:
                settings["dropout"] = folded.p
                notes.append(f"with {place.dropout}, p={folded.p:g}")
        made = QReLU(self._bits, **settings, inplace=inplace, squared=place.squared)
        made.limit = place.limit
        tensors = (*owner.parameters(), *owner.buffers(), *self._model.parameters(), *self._model.buffers())
        made.to(tensors[0].device if tensors else "cpu").train(owner.training)
        there = owner._modules.get(place.attribute)
        setattr(owner, place.attribute, made)
        if folded is not None:
            setattr(owner, place.dropout, nn.Identity())

        def step_back() -> None:
            if folded is not None:
                setattr(owner, place.dropout, folded.train(owner.training))
            if there is None:
                delattr(owner, place.attribute)
            else:
                setattr(owner, place.attribute, there.train(owner.training))

        self.report._steps_back.append(step_back)
        notes += ["squared"] if place.squared else []
        notes += [f"top level {place.limit:g}"] if place.limit < math.inf else []
        self.report.replaced.append(Replaced(_joined(name, place.attribute), place.was, "; ".join(notes)))


@dataclass(frozen=True)
class _Place:
    """Where a QReLU goes, and what it must be like. limit: the float activation's highest value. dropout: the name of
    the nn.Dropout that it takes over."""

    attribute: str
    was: str
    inplace: bool = False
    squared: bool = False
    limit: float = math.inf
    dropout: str | None = None


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_LIMITS = {"ReLU6": 6.0}


def _limit(function: Callable) -> float:
    return 6.0 if function is F.relu6 else math.inf


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def _free_name(owner: nn.Module, stem: str, taken: list[str]) -> str:
    """stem, stem_1, stem_2, ...: the first that the owner has not, and that is not taken."""
    names = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(1)))
    return next(name for name in names if not hasattr(owner, name) and name not in taken)
