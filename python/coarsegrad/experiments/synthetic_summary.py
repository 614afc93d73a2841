"""The table of `python -m coarsegrad synthetic`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from .._text import format_table
from ..ste import get_ste


def reached(result: dict) -> list[int]:
    """The iterations of the runs of a setting that reached zero loss with all samples correct."""
    return sorted(run["iterations"] for run in result["runs"] if run["iterations"] is not None)


def summary(results: list[dict]) -> Iterator[str]:
    """A table of bits and STEs by numbers of neurons and angles: successful runs, and their median iterations."""
    places = list(dict.fromkeys((r["setting"]["hidden"], r["setting"]["angle"]) for r in results))
    cells = {tuple(result["setting"].values()): result for result in results}
    rows = []
    for ste, bits in dict.fromkeys((r["setting"]["ste"], r["setting"]["bits"]) for r in results):
        row = [str(bits), ste, "yes" if get_ste(ste).in_class else "no"]
        for hidden, angle in places:
            result = cells[ste, bits, hidden, angle]
            done = reached(result)
            median = f", {statistics.median(done):.0f}" if done else ""
            row.append(f"{len(done)}/{len(result['runs'])}{median}")
        rows.append(tuple(row))
    header = ("bits", "ste", "in class", *(f"k = {hidden}, {angle:g} deg" for hidden, angle in places))
    yield "Runs that reached exactly zero loss with every sample correct, and their median iterations:\n"
    yield format_table(header, rows)
