"""`python -m bench.threads`: how many times as fast each kernel is on several threads as on one."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import kernels
from .kernels import COPIES, KERNELS
from .sweep import (
    Case,
    Part,
    Sweep,
    add_out,
    common_options,
    input_options,
    results_file,
    run_parts,
    size_label,
    timed,
)
from .timing import CpuTimer, Row, Times, at_least, quantiles

RESULTS = Path(__file__).parent / "results" / "threads.csv"

_DESCRIPTION = """
Times the kernels of bench.kernels on one thread and on several.
"""
_EPILOG = """
Default sizes: 2^20 (in cache) and 2^24 elements. All kernels, on one thread and on
several, take turns in one process, in a new order each round. A time is the median
over the rounds, by the wall clock; a speed is the time on one thread divided by
that on several: the ratio of medians, with the 20% and 80% quantiles round by
round. The copy, which has the loads, stores and threads of the kernels and no
arithmetic, says what memory allows.

Before a size is timed, the results of each kernel on several threads are compared
with the reference, as bench.kernels does.
"""


class _Timer(CpuTimer):
    """Times jobs that are given as (threads, job), after a call of each that wakes the threads."""

    def sample(self, job: tuple[int, Callable[[], object]], calls: int) -> tuple[float, float]:
        threads, call = job
        torch.set_num_threads(threads)
        call()
        return super().sample(call, calls)


def _timer(_: torch.device) -> _Timer:
    return _Timer()


def _cases(part: Part, dtype: str, size: int) -> Iterator[Case]:
    torch.set_num_threads(part.threads)
    (case,) = kernels.SWEEP.cases(part, dtype, size)
    yield Case(
        "", {f"{name} on {threads}": (threads, job) for name, job in case.jobs.items() for threads in (1, part.threads)}
    )


def _rows(dtype: str, size: int, _: str, times: dict[str, Times]) -> list[Row]:
    """The CSV: a row for each kernel."""
    rows: list[Row] = []
    found = list(times.items())
    for (name, one), (_, several) in zip(found[::2], found[1::2]):
        slow, _, fast = quantiles(several.speeds_over(one))
        alone = quantiles(one.seconds)[1]
        rows.append({
            "dtype": dtype, "size": size, "kernel": name.rpartition(" on ")[0],
            **timed(several), "one_thread_seconds_median": f"{alone:.6g}",
            "speed_over_one_thread": f"{alone / quantiles(several.seconds)[1]:.4g}",
            "speed_over_one_thread_q20": f"{slow:.4g}", "speed_over_one_thread_q80": f"{fast:.4g}",
        })  # fmt: skip
    return rows


_COLUMNS = "{:<9}{:>5}  {:<36}{:>10}{:>15}{:>7}  {}"
_HEADER = _COLUMNS.format("dtype", "size", "kernel", "us", "one thread, us", "speed", "(20% to 80%)")


def _line(row: Row) -> str:
    several, one = (1e6 * float(row[name]) for name in ("seconds_median", "one_thread_seconds_median"))
    slow, speed, fast = (float(row[f"speed_over_one_thread{q}"]) for q in ("_q20", "", "_q80"))
    return _COLUMNS.format(
        row["dtype"], size_label(row["size"]), row["kernel"], f"{several:.1f}", f"{one:.1f}",
        f"{speed:.2f}", f"({slow:.2f} to {fast:.2f})",
    )  # fmt: skip


def available_cores() -> int:
    """That this process may run on, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


SWEEP = Sweep(_cases, _rows, _HEADER, _line, timer=_timer)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.threads",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_options(parser, KERNELS, *COPIES, least_threads=2)
    input_options(parser)
    parser.add_argument(
        "--rounds", type=at_least(5), default=31, metavar="N", help="measured rounds, at least 5 (default 31)"
    )
    add_out(parser, RESULTS)
    args = parser.parse_args(argv)
    args.out = results_file(parser, args, RESULTS)
    if args.threads > (cores := available_cores()):
        print(f"--threads {args.threads}: this process has {cores} core{'s' * (cores > 1)}, which the threads share\n")
    names = tuple(name for name in KERNELS if name in args.only)
    inputs = tuple(itertools.product(args.dtypes, args.sizes or [2**20, 2**24]))
    run_parts("bench.threads", SWEEP, [Part("cpu", "keep", inputs, names, args.rounds, args.threads)], args.out)


if __name__ == "__main__":
    main()
