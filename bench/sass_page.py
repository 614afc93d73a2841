"""The page that `python -m bench.sass` writes: what is modelled and promised, and a table for each architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .sass_model import ALU_LANES, ARCHS, ISSUED, LATENCY, SLOW_LANES

if TYPE_CHECKING:
    from .sass import Report

_ABOUT = f"""\
Written by `python -m bench.sass --write docs/sass.md` from the machine code of {{compiler}}. No GPU was used:
**this is a model, and no timing.**

Promised, and asserted by `tests/test_sass.py`: no spills and no stack; all numbers in 128-bit accesses; for `forward, mask` and
`backward, mask` the whole bandwidth on sm_80 and sm_90 and 90% of it on sm_100.

A row is a kernel template, or a Triton kernel where it says so (2 bits where it does not say 8; not installed, it has no
rows). For those no share of the bandwidth is promised; the rest holds, and is tested, in settings in which every two
options meet: architectures, dtypes, bits, roundings, STEs, rules for alpha, masks. For AMD (gfx90a, gfx942, gfx1100) the
tests compile them to machine code without spills. For Intel the triton package has no compiler: nothing is known.

Its bulk path is the loop that moves the data in 128-bit accesses, with all that is in it: addresses and the branch back
too. Where a kernel has several such loops, as it decides at run time what it does, the row is the slowest one.

| column | meaning |
|---|---|
| regs, spills, stack, shared | registers and bytes of a thread; shared memory of a block, in bytes |
| loads, stores | on the bulk path: 128-bit ones / all; kept bits and parameters may be narrower |
| instr/elem | instructions an element on the bulk path |
| in flight | bytes that a thread has asked for and not used, or stored since it last waited; then those of all threads that a multiprocessor holds |
| occ. | occupancy: the share of the warps that a multiprocessor can hold, by registers, shared memory and block size |
| share | of the card's memory bandwidth: the least of 100% and the bounds below |
| bound | what sets the share |
| with ALU | the share if integer, logic, compare and select instructions had no more than {ALU_LANES} lanes a clock: stricter, and not promised |

The bounds of a multiprocessor:

- issue: {ISSUED} warp instructions a clock;
- slow units: {SLOW_LANES} lanes a clock for special functions, conversions, shuffles and counts of bits (to be safe, the packed
  conversion F2FP is counted among them);
- latency: the bytes in flight in {LATENCY} clocks.

Not modelled: caches, bank conflicts, instructions that wait for each other, launches, tails.
"""  # noqa: E501

_COLUMNS = (
    "kernel", "dtype", "regs", "spills", "stack", "shared", "loads", "stores", "instr/elem", "in flight", "occ.",
    "share", "bound", "with ALU",
)  # fmt: skip


def _cells(row: dict) -> tuple[str, ...]:
    return (
        row["kernel"],
        row["dtype"],
        str(row["registers"]),
        str(row["spill_bytes"]),
        str(row["stack_bytes"]),
        str(row["shared_bytes"]),
        f"{row['wide_loads']}/{row['loads']}",
        f"{row['wide_stores']}/{row['stores']}",
        f"{row['instructions_per_element']:.1f}",
        f"{row['thread_bytes_in_flight']}, {row['multiprocessor_bytes_in_flight'] / 1024:.0f} KiB",
        f"{row['occupancy']:.0%}",
        f"{row['share']:.0%}",
        row["bound"],
        f"{row['share_with_alu']:.0%}",
    )


def _table(rows: list[dict]) -> str:
    """In Markdown, aligned."""
    cells = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| "
        + " | ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i < 2 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def tables(reports: list[Report]) -> Iterator[str]:
    for arch in ARCHS.values():
        if rows := [report.row() for report in reports if report.model.arch == arch]:
            card = f"{arch.multiprocessors} multiprocessors, {arch.ghz:g} GHz, {arch.terabytes_per_second:g} TB/s"
            yield f"## {arch.name}, as on the {arch.card}\n"
            yield f"{card}: {arch.bytes_per_clock:.1f} bytes a clock for each multiprocessor.\n\n{_table(rows)}\n"


def document(reports: list[Report], compiler: str) -> str:
    """The page of the documentation; `compiler`: what made the machine code."""
    return "\n".join(["# The kernels' machine code\n", _ABOUT.format(compiler=compiler), *tables(reports)])
