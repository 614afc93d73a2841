"""What counted instructions say of measured times: the least that arithmetic takes, next to what memory takes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .kernels import COPIES
from .pages import markdown
from .promises import PROMISES, Promise, Results

# Of a core like Zen 3's: what it sustains in code of vectors, and the clock that it reaches.
PER_CYCLE, GHZ = 4, 3.5
# Elements of the times that counts are compared with: past the caches, and long after the cost of a call.
SIZE = 2**24
# The row of the copy among the counts; that of x among the times.
COPY = "copy"
# What layers on codes read; an element of theirs is a product of a code and a weight.
LAYER_DTYPE = "uint8"
PRODUCTS = 1000  # that the counts of layers are shown of

_Rows = Iterable[Mapping[str, str]]


def least_seconds(instructions: float, per_cycle: float = PER_CYCLE, ghz: float = GHZ) -> float:
    """The time in which a core executes so many."""
    return instructions / per_cycle / ghz / 1e9


def rows_in(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _one(rows: _Rows, **case: object) -> Mapping[str, str] | None:
    return next((row for row in rows if all(row[key] == str(value) for key, value in case.items())), None)


def _isa_of(row: Mapping[str, str]) -> dict[str, str]:
    """What a row was measured with: of "native (avx2)" on x86_64."""
    machine = "aarch64" if "aarch64" in row["system"] else "x86_64"
    return {"machine": machine, "instruction_set": row["backend"].removeprefix("native (").removesuffix(")")}


def instructions_of(counts: _Rows, measured: Mapping[str, str], kernel: str) -> float | None:
    """Per element, with the dtype and the instruction set of what was measured."""
    row = _one(counts, kernel=kernel, dtype=measured["dtype"], **_isa_of(measured))
    return float(row["instructions_per_element"]) if row else None


@dataclass(frozen=True)
class Times:
    """Seconds per element: of a kernel, and of a copy of as many bytes."""

    measured: float
    copy: float


def times_of(
    times: _Rows, machine: str, instruction_set: str, dtype: str, kernel: str, size: int = SIZE
) -> Times | None:
    """What was measured with an instruction set."""
    name = list(COPIES)[0] if kernel == COPY else kernel
    row = _one(times, dtype=dtype, size=size, kernel=name)
    if not row or _isa_of(row) != {"machine": machine, "instruction_set": instruction_set}:
        return None
    seconds = float(row["seconds_median"]) / size
    return Times(seconds, seconds / float(row["time_over_copy"]))


# The share of a time that is explained by a bound, and how many times both bounds leave a time unexplained.
EXPLAINS, _UNEXPLAINED = 0.8, 2


@dataclass(frozen=True)
class Bound:
    """Of one element: instructions; in seconds what they take at least, a copy of as many bytes, and the work."""

    instructions: float
    copy: float
    measured: float

    @property
    def arithmetic(self) -> float:
        return least_seconds(self.instructions)

    def limit(self) -> str:
        if self.measured > _UNEXPLAINED * (self.arithmetic + self.copy):
            return "neither"
        if self.copy >= EXPLAINS * self.measured:
            return "memory"
        return "arithmetic" if self.arithmetic > self.copy else "both"


def bound_of(promise: Promise, results: Results) -> Bound | None:
    """None if what it needs was not measured or not counted."""
    work = promise.work
    measured = work.row(results) if work else None
    if not measured:
        return None
    times = [times_of(results["kernels"], **_isa_of(measured), dtype=work.dtype, kernel=kernel, size=work.size)
             for kernel in work.kernels]  # fmt: skip
    counts = [instructions_of(results["instructions"], measured, kernel) for kernel in work.kernels]
    if None in times or None in counts:
        return None
    return Bound(sum(counts), sum(time.copy for time in times), float(measured["seconds_median"]) / work.size)


# ----------------------------------------------------------------------------------------- the tables


def _ns(seconds: float) -> str:
    return f"{1e9 * seconds:.3f}"


def count_table(counts: list[dict[str, str]]) -> str:
    """A line for each kernel, a column for each machine, instruction set and dtype; without layers on codes."""
    return _count_table(counts, lambda row: row["kernel"] and not _of_layer(row), ("dtype",), 1, "kernel")


def layer_table(counts: list[dict[str, str]]) -> str:
    """The same of layers on codes, for PRODUCTS products; empty if none was counted."""
    return _count_table(counts, _of_layer, (), PRODUCTS, "layer") if any(map(_of_layer, counts)) else ""


def _of_layer(row: Mapping[str, str]) -> bool:
    return row["dtype"] == LAYER_DTYPE


def _count_table(
    counts: _Rows, shown: Callable[[Mapping[str, str]], object], facts: tuple[str, ...], elements: int, head: str
) -> str:
    cells = {
        (row["machine"], row["instruction_set"], *(row[fact] for fact in facts), row["kernel"]):
        f"{elements * float(row['instructions_per_element']):.{0 if elements > 1 else 2}f}"
        for row in counts
        if shown(row)
    }  # fmt: skip
    columns, kernels = dict.fromkeys(key[:-1] for key in cells), dict.fromkeys(key[-1] for key in cells)
    lines = ((kernel, *(cells.get((*column, kernel), "") for column in columns)) for kernel in kernels)
    return markdown((head, *map(" ".join, columns)), lines)


def not_counted(counts: list[dict[str, str]]) -> str:
    sets: dict[tuple[str, str], list[str]] = {}
    for row in counts:
        if row["not_counted"]:
            sets.setdefault((row["machine"], row["not_counted"]), []).append(row["instruction_set"])
    named = [f"{machine} {', '.join(isas)} ({reason})" for (machine, reason), isas in sets.items()]
    return f"Not counted: {'; '.join(named)}.\n" if named else ""


def counted_by(counts: list[dict[str, str]]) -> str:
    """What counted, and of which source."""
    counted = [row for row in counts if row["kernel"]]
    tools = dict.fromkeys(f"{row['compiler']}, {row['counter']}" for row in counted)
    sources = dict.fromkeys(f"{row['git'][:10]}, {row['date'][:10]}" for row in counted)
    return f"{'; '.join(tools)}; coarsegrad at {' and '.join(sources)}.\n"


_HEADER = ("instructions", "at least, ns", "copy, ns", "measured, ns", "limit")


def _cells(bound: Bound) -> tuple[str, ...]:
    return (
        f"{bound.instructions:.2f}", _ns(bound.arithmetic), _ns(bound.copy), _ns(bound.measured), bound.limit()
    )  # fmt: skip


def kernel_table(results: Results) -> str:
    """Every kernel that was both measured, at SIZE, and counted."""
    lines = []
    for row in results["kernels"]:
        count = None if row["kernel"] in COPIES else instructions_of(results["instructions"], row, row["kernel"])
        if row["size"] == str(SIZE) and count is not None:
            time = times_of(results["kernels"], **_isa_of(row), dtype=row["dtype"], kernel=row["kernel"])
            lines.append((row["kernel"], row["dtype"], *_cells(Bound(count, time.copy, time.measured))))
    return markdown(("kernel", "dtype", *_HEADER), lines) if lines else ""


def promise_table(results: Results, promises: Iterable[Promise] = PROMISES) -> str:
    """Of those missed, with the time that is promised."""
    lines = []
    for promise in promises:
        if promise.work and promise.verdict(results).startswith("missed"):
            bound = bound_of(promise, results)
            promised = _ns(bound.measured / promise.time(results) * promise.most) if bound else ""
            lines.append((promise.claim, *(_cells(bound) if bound else [""] * len(_HEADER)), promised))
    return markdown(("", *_HEADER, "promised, ns"), lines) if lines else ""
