"""A sweep over inputs, which bench.kernels, bench.threads, bench.peers and bench.layers run, and the copy that all but
the last compare with."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from coarsegrad import _ops

from .timing import (
    ALLOCATORS,
    BenchError,
    CpuTimer,
    GpuTimer,
    Row,
    Timer,
    Times,
    at_least,
    facts,
    in_new_process,
    interleaved,
    quantiles,
    write_csv,
)

# ---------------------------------------------------------------------------------- the copy as a yardstick


def copying(to: Tensor, source: Tensor) -> Callable[[], object]:
    """A job that copies source into to, both contiguous.

    On a CPU it is the native library's own copy: the loads, stores (non-temporal from 8 MiB on) and threads of its
    kernels without arithmetic, so that a kernel's time relative to it is the cost of the arithmetic. memcpy is no
    yardstick: it can be three times slower. On other devices, and without the native library, it is `Tensor.copy_`.
    """
    if source.device.type == "cpu" and _ops.native is not None:
        return lambda: _ops.native.copy(to, source)
    return lambda: to.copy_(source)


# --------------------------------------------------------------------------------------------- the sweep

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Part:
    """What one process measures. allocator: one of ALLOCATORS; inputs: (dtype, size) of each, or (layer, batch); names:
    the jobs that take turns."""

    device: str
    allocator: str
    inputs: tuple[tuple[str, int], ...]
    names: tuple[str, ...]
    rounds: int
    threads: int


@dataclass(frozen=True)
class Case:
    """Checked jobs that take turns, with or without gradients. name: distinguishes cases of one input."""

    name: str
    jobs: dict[str, Callable[[], object]]
    grad: bool = False


def timer_of(device: torch.device) -> Timer:
    return CpuTimer() if device.type == "cpu" else GpuTimer(device)


@dataclass(frozen=True)
class Sweep:
    """A benchmark over inputs, each a dtype and a size or the like.

    cases(part, dtype, size) yields each Case lazily. rows(dtype, size, case's name, times) -> the rows of the CSV, to
    which the facts that they depend on are added. header and line(row): what is printed. columns: what an input and a
    job are called. few: a size with which every job runs.
    """

    cases: Callable[[Part, str, int], Iterator[Case]]
    rows: Callable[[str, int, str, dict[str, Times]], list[Row]]
    header: str
    line: Callable[[Row], str]
    timer: Callable[[torch.device], Timer] = timer_of
    columns: tuple[str, str, str] = ("dtype", "size", "kernel")
    few: int = 2**14

    def measure(self, part: Part) -> list[Row]:
        """Measures all of `part` in this process and prints each case as it completes."""
        sys.stdout.reconfigure(line_buffering=True)  # also when piped
        torch.set_num_threads(part.threads)
        device = torch.device(part.device)
        here = facts(device, part.allocator)
        print(*(f"{name.ljust(10)}  {value}" for name, value in here.items()), "", self.header, sep="\n")
        timer = self.timer(device)
        found: list[Row] = []
        with tqdm(total=len(part.inputs), disable=None, leave=False, unit="input") as progress:
            for dtype, size in part.inputs:
                progress.set_description(f"{dtype} {size_label(size)}")
                for case in self.cases(part, dtype, size):
                    with torch.set_grad_enabled(case.grad):
                        times = interleaved(case.jobs, timer, part.rounds, progress.refresh)
                    rows = self.rows(dtype, size, case.name, times)
                    for line in (*map(self.line, rows), ""):
                        progress.write(line)
                    found += [{**row, **here} for row in rows]
                progress.update()
        return found


def size_label(size: int) -> str:
    """2^22 for 4194304, 4 for 4."""
    return f"2^{size.bit_length() - 1}" if size > 1024 and size.bit_count() == 1 else str(size)


def timed(times: Times) -> Row:
    """The columns common to all tables of times."""
    low, median, high = quantiles(times.seconds)
    return {
        "seconds_median": f"{median:.6g}",
        "seconds_q20": f"{low:.6g}",
        "seconds_q80": f"{high:.6g}",
        "page_faults": f"{statistics.median(times.page_faults):.6g}",
        "rounds": len(times.seconds),
        "calls_per_round": times.calls,
    }


class Measures(Protocol):
    """A Sweep, or what is measured as one."""

    def measure(self, part: Part) -> list[Row]: ...


_THEN = "`python -m bench.report` draws it and writes docs/benchmarks.md from all results."


def run_parts(program: str, sweep: Measures, parts: Iterable[Part], out: Path | None, then: str = _THEN) -> list[Row]:
    """The rows of all parts, each measured in a new process; written to `out`, if that is given, after each part.

    then: what is said of the file.
    """
    rows: list[Row] = []
    try:
        for part in parts:
            rows += in_new_process(part.allocator, sweep.measure, part)
            if out:
                write_csv(rows, out)
    except (BenchError, OSError) as error:
        raise SystemExit(f"{program}: {error}") from error
    except KeyboardInterrupt:
        print("\nInterrupted.", f"{out} has the parts that finished." if rows and out else "Nothing was written.")
        raise SystemExit(130) from None
    if out:
        print(f"Written: {out}.", then)
    return rows


def size_options(parser: argparse.ArgumentParser, results: Path, names: Iterable[str], *measures: str) -> None:
    """The options of a Sweep; `results` is the default output, see `of_gpu`."""
    add = parser.add_argument
    add_device(parser, results)
    common_options(parser, names, *measures)
    add("--quick", action="store_true", help="fewer sizes and rounds")
    input_options(parser)
    add("--rounds", type=at_least(5), metavar="N", help="measured rounds, at least 5 (default 31; with --quick 11)")
    add(
        "--allocator",
        choices=ALLOCATORS,
        default="keep",
        help="whether malloc keeps freed memory, or runs as the environment says (default keep)",
    )


def input_options(parser: argparse.ArgumentParser) -> None:
    """The options for the tensors that are measured."""
    add = parser.add_argument
    add("--sizes", nargs="+", type=_elements, metavar="N", help="numbers of elements, such as 65536 or 2^16")
    add(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
        metavar="DTYPE",
        help=f"{' and/or '.join(DTYPES)} (default: both)",
    )


def common_options(
    parser: argparse.ArgumentParser, names: Iterable[str], *measures: str, least_threads: int = 1
) -> None:
    """The options for what is measured, and on how many threads."""
    names = list(names)
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"some of {', '.join(names)}; always with {', '.join(measures)} to compare with (default: all)",
    )
    clock = "timed by its CPU time; several by the wall clock" if least_threads == 1 else "by the wall clock"
    add(
        "--threads",
        type=at_least(least_threads),
        default=least_threads,
        metavar="N",
        help=f"threads (default {least_threads}, {clock})",
    )


def add_out(parser: argparse.ArgumentParser, results: Path) -> None:
    """The option for the output of what runs on a CPU; see `results_file`."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="CSV",
        help=f"the results (default {os.path.relpath(results)}; none for a part of the measurements)",
    )


def add_device(parser: argparse.ArgumentParser, results: Path) -> None:
    """The options for the device and the output; see `find_device`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device (default cpu)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="CSV",
        help=f"the results (default {os.path.relpath(results)}; for a GPU, {os.path.relpath(of_gpu(results))};"
        " none for a part of the measurements)",
    )


def of_gpu(results: Path) -> Path:
    """The file for results of a GPU, next to those of a CPU."""
    return results.with_name(f"{results.stem}-cuda.csv")


def results_file(parser: argparse.ArgumentParser, args: argparse.Namespace, results: Path) -> Path | None:
    """--out, or else the published results. These are of one run with the settings by default: with others nothing is
    written, None, and it says so."""
    if args.out is not None:
        return args.out
    free = ("out", "device")
    changed = [name for name, value in vars(args).items() if name not in free and value != parser.get_default(name)]
    if not changed:
        return results
    options = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
    print(
        f"Only printed: {options} would replace {os.path.relpath(results)} by a part of it. --out CSV writes a file.\n"
    )
    return None


def find_device(parser: argparse.ArgumentParser, args: argparse.Namespace, results: Path | None) -> None:
    """Fills in `out`, which stays None without `results`; an error if the device is missing."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: torch sees no CUDA device here; `python -m tools.sass` checks the kernels without one"
        )
    if results is not None:
        args.out = results_file(parser, args, results if args.device == "cpu" else of_gpu(results))


def checked_options(parser: argparse.ArgumentParser, argv: list[str] | None, results: Path) -> argparse.Namespace:
    """The parsed options, with `out` and `rounds` filled in; an error if the device is missing. A comparison
    (`against`) is only written where that is asked for."""
    args = parser.parse_args(argv)
    find_device(parser, args, None if getattr(args, "against", None) else results)
    args.rounds = args.rounds or (11 if args.quick else 31)
    if args.device == "cuda":
        args.allocator = "default"
    elif args.allocator == "keep" and platform.libc_ver()[0] != "glibc":
        print("--allocator keep requires glibc; measuring with the allocator as it is")
        args.allocator = "default"
    return args


def default_sizes(args: argparse.Namespace) -> list[int]:
    """The numbers of elements without --sizes."""
    return [2**16, 2**22] + ([] if args.quick else [2**24] if args.device == "cpu" else [2**24, 2**27])


def _elements(text: str) -> int:
    base, power, exponent = text.replace("**", "^").partition("^")
    try:
        size = int(base) ** int(exponent) if power else int(base)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of elements, such as 65536 or 2^16") from None
    if not 1 <= size <= 2**28:
        raise argparse.ArgumentTypeError(f"a size must be 1 to 2^28 elements, got {text}")
    return size


def network_options(
    parser: argparse.ArgumentParser, names: list[str], dtype: str | None, rounds: int, about_dtypes: str = ""
) -> None:
    """The options of a benchmark of networks, with its own defaults."""
    add = parser.add_argument
    add("--networks", nargs="+", choices=names, help="default: all")
    default = [dtype] if dtype else None
    add("--dtypes", nargs="+", choices=list(DTYPES), default=default, help=about_dtypes or f"default: {dtype}")
    add("--rounds", type=at_least(2), default=rounds, help=f"measured rounds (default {rounds})")
    add("--threads", type=at_least(1), default=2, help="threads (default 2)")
