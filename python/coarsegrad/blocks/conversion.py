"""What a conversion of blocks is asked for, and what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..signed import QSigned


@dataclass(frozen=True)
class Staircase:
    """A signed staircase that was inserted. name: the module where it is. of: what it is applied to.

    bits, group, rotation: see `QSigned`. note: what differs from what was asked for, or is worth knowing.
    """

    name: str
    of: str
    bits: int
    group: int | None = None
    rotation: int | None = None
    note: str = ""

    def row(self) -> tuple[str, ...]:
        return self.name, self.of, str(self.bits), str(self.group or ""), str(self.rotation or ""), self.note


class CannotConvert(Exception):
    """Why a module gets no staircase."""


@dataclass
class Conversion:
    """The staircases inserted into a model, what was skipped as (name, what, why), and how to undo it.

    wanted: wanted(module, name) says whether to convert a module.
    reads_codes: the layers that need no staircase.
    """

    model: nn.Module
    wanted: Callable[[nn.Module, str], bool]
    staircases: list[Staircase] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    undo_steps: list[Callable[[], object]] = field(default_factory=list)
    reads_codes: set[nn.Module] = field(default_factory=set)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Those that may be converted."""
        for name, module in list(self.model.named_modules()):
            if self.wanted(module, name):
                yield name, module

    def add(self, name: str, of: str, staircase: QSigned, note: str = "") -> None:
        settings = (staircase.bits, staircase.group, staircase.rotation)
        self.staircases.append(Staircase(name or "(model)", of, *settings, note))

    def skip(self, name: str, module: nn.Module, why: object) -> None:
        self.skipped.append((name or "(model)", type(module).__name__, str(why)))

    def hook(self, handle: Any) -> None:
        """A hook was registered."""
        self.undo_steps.append(handle.remove)

    def set(self, module: nn.Module, attribute: str, value: object) -> None:
        """Set an attribute of an instance that is not a parameter, buffer or submodule."""
        had, before = attribute in vars(module), vars(module).get(attribute)

        def undo() -> None:
            if had:
                vars(module)[attribute] = before
            else:
                del vars(module)[attribute]

        vars(module)[attribute] = value
        self.undo_steps.append(undo)


def settings_of(argument: str, got: object, keys: tuple[str, ...]) -> dict[str, Any]:
    """A number of bits, or a mapping of arguments of `QSigned`, as such arguments."""
    if isinstance(got, Mapping):
        if "bits" not in got or set(got) - set(keys):
            raise ValueError(f"{argument} must have the key 'bits' and may have {keys[1:]}, got {dict(got)!r}")
        settings = dict(got)
    elif type(got) is int:
        settings = {"bits": got}
    else:
        raise TypeError(f"{argument} must be None, a number of bits, or a mapping of {keys}, got {got!r}")
    QSigned(**settings)  # raises for wrong values
    return settings
