"""What `convert` did."""

from __future__ import annotations

from dataclasses import dataclass, field

from .._text import format_table
from .ops import integer_kernels


@dataclass(frozen=True)
class Converted:
    """A layer that computes with integers: its name, what it was, its output ("codes" or "float"), and how."""

    name: str
    what: str
    weight_bits: int
    output: str
    how: str


@dataclass(frozen=True)
class Stayed:
    """What computes with floats: its name, what it is, why."""

    name: str
    what: str
    why: str


@dataclass
class ConvertReport:
    """What `convert` did. Prints as two tables.

    converted: the integer layers. stayed: layers and activations that stay float, and what reads codes as floats.
    integer_bytes: of the packed weights, scales, offsets and thresholds of the integer layers; float_bytes: of the
    weights and biases that they replace. device: the type of the device that their weights are on.
    """

    converted: list[Converted] = field(default_factory=list)
    stayed: list[Stayed] = field(default_factory=list)
    integer_bytes: int = 0
    float_bytes: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [(c.name, c.what, f"{c.weight_bits}", c.output, c.how) for c in self.converted]
        parts = [format_table(("integer layer", "was", "weight bits", "output", ""), rows)] if rows else []
        if self.stayed:
            parts.append(format_table(("stays float", "what", "why"), [(s.name, s.what, s.why) for s in self.stayed]))
        count = f"{len(self.converted)} integer layers, {self.integer_bytes:,} bytes; {self.float_bytes:,} before"
        return "\n\n".join([*parts, f"{count}\n{self._speed()}" if rows else count])

    def _speed(self) -> str:
        kernels = integer_kernels(self.device)
        if kernels == "reference":
            return f"On {self.device} they run in plain torch: exact and small, but slower than floats."
        return f"On {self.device} they run on {kernels} kernels."

    __repr__ = __str__
