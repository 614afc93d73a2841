"""What `quantize_` did, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from ..ste import format_table

_NOT_RUN = (
    "Not looked at: functions outside of methods, and whatever else the source of the methods does not show;"
    " example_inputs finds it."
)


@dataclass
class Replaced:
    """name: that of the QReLU in the model. was: what it stands in for. note: what is not as it was.

    runs: how often it ran in a forward on the example inputs, the more of evaluation and training; None without them.
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
    """An activation that stayed: its name, or its method's; what it is; why."""

    name: str
    what: str
    why: str


@dataclass
class QuantizeReport:
    """What `quantize_` did. Prints as two tables.

    replaced: in the order of the modules. skipped: what looks like an activation and stayed.
    already: names of the QReLUs that were there before. executed: whether the model was run, on example inputs;
    `skipped` has then every relu that still runs, and without it only what the source of the methods shows. not_run:
    the mode in which the model could not be run, and why.
    """

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    executed: bool = False
    not_run: str = ""
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
            parts.append(
                format_table(("QReLU", "in place of", ""), [(r.name, r.was, r._remark()) for r in self.replaced])
            )
        if self.skipped:
            parts.append(format_table(("not replaced", "what", "why"), [(s.name, s.what, s.why) for s in self.skipped]))
        count = f"{len(self.replaced)} replaced, {len(self.skipped)} not"
        if self.already:
            count += f"; QReLUs that were there before: {len(self.already)}"
        count += "; undone" if self._undone else ""
        remark = self.not_run if self.executed else _NOT_RUN
        return "\n\n".join([*parts, "\n".join(filter(None, [count, remark]))])

    __repr__ = __str__
