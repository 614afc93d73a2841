"""What `quantize_` did, and how to undo it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from .._text import format_table
from ..blocks import Staircase
from ..parametrization import parametrized_since

_NOT_RUN = (
    "Only the source of the modules' methods was searched, not the functions that they call; pass example_inputs to"
    " find all relus."
)


@dataclass
class Replaced:
    """A new QReLU. name: in the model. was: what it replaced. note: differences from what it replaced.

    runs: the number of its runs in one forward on the example inputs, in evaluation or training mode, whichever is
        larger; None without example inputs.
    """

    name: str
    was: str
    note: str
    runs: int | None = None

    def _remark(self) -> str:
        runs = {None: "", 0: "not reached", 1: ""}.get(self.runs, f"one alpha for {self.runs} runs in a forward")
        return "; ".join(filter(None, [self.note, runs]))


@dataclass(frozen=True)
class Skipped:
    """An activation that was not replaced. name: its own or its method's; what: what it is; why: the reason."""

    name: str
    what: str
    why: str


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that got a `QWeight`. name: its layer. what: the layer's class. shape: the weight's.

    bits: of the weight. scales: how many it has.
    """

    name: str
    what: str
    shape: tuple[int, ...]
    bits: int
    scales: int

    def _row(self) -> tuple[str, ...]:
        return self.name, self.what, str(list(self.shape)), str(self.bits), str(self.scales)


@dataclass
class QuantizeReport:
    """What `quantize_` did. Prints as tables.

    replaced: in the order of the modules. staircases: the signed ones, inserted by `inputs`, `gates`, `attention` and
    `norms`. weights: those quantized by `weight_bits`. skipped: what looks like an activation and was not replaced, and
    what got no signed staircase or kept its float weight.
    already: names of the QReLUs that the model had before. executed: whether the model was run on example inputs; if
    so, `skipped` has every relu that still runs, otherwise only those that the source of the methods shows.
    not_run: the mode in which the model could not be run, and why.
    """

    replaced: list[Replaced] = field(default_factory=list)
    staircases: list[Staircase] = field(default_factory=list)
    weights: list[QuantizedWeight] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    executed: bool = False
    not_run: str = ""
    _undo_steps: list[Callable[[], object]] = field(default_factory=list)
    _classes: dict[nn.Module, tuple[type, type]] = field(default_factory=dict)  # module -> (new class, old class)
    _searched: bool = True  # for activations
    _undone: bool = False

    def undo(self) -> None:
        """Restore the original modules and classes. Learned alphas are lost with their QReLUs. Quantized weights become
        the float parameters that were trained. Rotated weights are rotated back, which gives them again up to rounding;
        all else is exact.

        Raises RuntimeError if called twice, or, before it changes anything, if something else (fully_shard, a
        parametrization) has changed the class of a module whose methods were rewritten, or of a layer whose weight was
        quantized, or has parametrized that layer further: undo that first.
        """
        if self._undone:
            raise RuntimeError("undo() was called before")
        for module, (now, _) in self._classes.items():
            if type(module) is not now:
                raise RuntimeError(
                    f"a rewritten {now.__name__} now has another class, {type(module).__name__}: undo what changed its"
                    " class first"
                )
            if parametrized_since(module):
                raise RuntimeError(f"a {now.__name__} has more parametrizations than its QWeight: remove them first")
        for module, (_, before) in self._classes.items():
            module.__class__ = before
        for step in reversed(self._undo_steps):
            step()
        self._undone = True

    def __str__(self) -> str:
        parts = []
        if self.replaced:
            parts.append(format_table(("QReLU", "replaces", ""), [(r.name, r.was, r._remark()) for r in self.replaced]))
        if self.staircases:
            header = ("staircase in", "of", "bits", "group", "rotation", "")
            parts.append(format_table(header, [staircase.row() for staircase in self.staircases]))
        if self.weights:
            of_weights = ("weight of", "", "shape", "bits", "scales")
            parts.append(format_table(of_weights, [weight._row() for weight in self.weights]))
        if self.skipped:
            parts.append(format_table(("not replaced", "what", "why"), [(s.name, s.what, s.why) for s in self.skipped]))
        count = f"{len(self.replaced)} replaced, {len(self.skipped)} not replaced"
        if self.staircases:
            count += f", {len(self.staircases)} signed staircases inserted"
        if self.weights:
            count += f", {len(self.weights)} weights quantized"
        if self.already:
            count += f"; {len(self.already)} QReLUs already present"
        count += "; undone" if self._undone else ""
        remark = self.not_run if self.executed or not self._searched else _NOT_RUN
        return "\n\n".join([*parts, "\n".join(filter(None, [count, remark]))])

    __repr__ = __str__
