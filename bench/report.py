"""`python -m bench.report`: the figures of the benchmarks, and their pages in docs, from the CSV files alone."""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from coarsegrad.experiments.files import replacing
from coarsegrad.ste import format_table

from . import figures
from .activations import IMPLEMENTATIONS
from .kernels import COPIES
from .peers import PASSES
from .promises import PROMISES, Results
from .sweep import DTYPES, of_gpu, size_label

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
TABLES = ("kernels", "peers", "training", "memory")

_INTRODUCTION = """\
# Benchmarks

Made by `python -m bench.report` from [bench/results](../bench/results); the results by `make bench-full`. `make bench`
takes a few minutes and tells about your machine.

All implementations take turns in one process, in a new order each round, after their results were compared with the
reference; a time is the median over the rounds. One thread is timed by its CPU time. The allocator keeps its memory,
unless a line says otherwise: with glibc's default each fresh output of 32 MiB and more pays for its pages again.
"""
_PROMISES = """\
## What is promised

A time over another, of the medians, and what it is at most to be. Without a pass it is forward and backward.
"""
_KERNELS = """\
## The kernels

The time of each kernel over the time in which a copy of what it reads, into a new tensor, moves as many bytes: with the
loads, stores (past the caches from 8 MiB on) and threads of the kernels and nothing between. At 2^16 elements all is in
cache, and so is the copy.

![Time of each kernel and of other libraries against the bytes moved](../bench/results/roofline.png)
"""
_PEERS = """\
## QReLU beside others

How many times as fast as `nn.ReLU`, forward and backward, 2 bits. "torch.compile" is the staircase in its fastest form
there, "compiled idiom" what people write, "eager" an `autograd.Function`; `fake_quantize`, brevitas and torchao are
each in their fastest fair setting (bench/activations.py says which), and round to the nearest level.

![Speed over nn.ReLU of each implementation, by dtype and size](../bench/results/peers.png)
"""
_TRAINING = """\
## Whole training steps

"share" is how much of a step is the activation's: 1 - (the same network without any) / (this one), the median over the
rounds.

![Time of a training step with each activation](../bench/results/training.png)
"""
_SLOW = """\
## Where your machine will be slow, and what to do

- **Fresh outputs of 32 MiB and more under glibc's malloc**: every one is given back to the system and its pages cost
  more than the kernel (2^26 elements above). `inplace=True` avoids them; a preloaded tcmalloc or jemalloc, or
  `MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592` in the environment, mends it for all of torch.
- **No AVX-512**: the AVX2 kernels are slower where arithmetic and not memory is the limit: in gradients with an
  exponential or a division, and in staircases of 3 bits and more, most of all of 16-bit numbers from 5 bits on. Without
  AVX2 the plain C++ loops serve.
- **One thread**: torch takes as many as there are cores (`torch.set_num_threads`, `OMP_NUM_THREADS`). On busy cores
  more threads are slower, as they spin while they wait: `OMP_WAIT_POLICY=PASSIVE`.
- **Small tensors**: an op and its derivative cost microseconds whatever the size, a few more than `nn.ReLU`'s.
- **No native library**: plain torch serves, many times slower.

`python -m coarsegrad info` says which of these hold on a machine.
"""
_GPU_INTRODUCTION = """\
# Benchmarks on a GPU

Made by `python -m bench.report` from [bench/results](../bench/results); the results by `make bench-gpu`. On a CPU:
[benchmarks.md](benchmarks.md).

All implementations take turns in one process, in a new order each round, after their results were compared with the
reference. A time is the GPU's, by its events, the median over the rounds; each call finds a cold L2, and is queued
before the first begins, so that launches are not what is measured. (In a network of small tensors they are: capture its
step in a CUDA graph.)
"""
_GPU_KERNELS = """\
## The kernels

The time of each kernel over the time in which `Tensor.copy_` moves as many bytes.

![Time of each kernel and of other libraries against the bytes moved](../bench/results/roofline-cuda.png)
"""
_GPU_PEERS = """\
## QReLU beside others

How many times as fast as `nn.ReLU`, forward and backward, 2 bits; the implementations are those of
[benchmarks.md](benchmarks.md). One far below the others has its CPU wait for the GPU.

![Speed over nn.ReLU of each implementation, by dtype and size](../bench/results/peers-cuda.png)
"""
_GPU_MEMORY = """\
## Memory and whole steps

Forward and backward of networks with 2-bit activations (`relu`): what autograd keeps after the forward, how far the
allocated memory rises in a step, and its time. "packed" is `pack_activations_`; a checkpointed network hides what it
keeps.

![Memory and time of a step with each activation](../bench/results/memory-cuda.png)
"""


def load(folder: Path, on_gpu: bool = False) -> Results:
    """The rows of every table; none where a CSV is missing."""
    found = {}
    for table in TABLES:
        path = folder / f"{table}.csv"
        if on_gpu:
            path = of_gpu(path)
        found[table] = []
        if path.exists():
            with open(path, newline="") as file:
                found[table] = list(csv.DictReader(file))
    return found


def _markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [header, ["---"] * len(list(header)), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def _number(text: str) -> str:
    """Three figures; empty where it was not measured."""
    return "" if text == "nan" else f"{float(text):.3g}"


def _setting(rows: list[dict[str, str]]) -> str:
    row = rows[0]
    threads = "one thread" if row["threads"] == "1" else f"{row['threads']} threads"
    machine = f"{row['cpu']}, {row['backend']}, caches {row['caches']}, {threads}, {row['malloc']}"
    if row["device"] != "cpu":
        machine = f"{row['device']}, {row['backend']}"
    return f"{machine}, torch {row['torch']}, coarsegrad at {row['git'][:10]}, {row['date'][:10]}.\n"


def _promise_rows(results: Results) -> list[tuple[str, ...]]:
    rows = []
    for promise in PROMISES:
        time, verdict = promise.time(results), promise.verdict(results)
        rows.append((promise.claim, f"{promise.most:.2f}", "" if time is None else f"{time:.2f}", verdict))
    return rows


def _tried(results: Results) -> str:
    missed = [promise for promise in PROMISES if promise.verdict(results).startswith("missed")]
    texts = dict.fromkeys(promise.tried for promise in missed if promise.tried)
    return "What was tried where one is missed:\n\n" + "".join(f"- {text}\n" for text in texts) if texts else ""


def _kernel_table(rows: list[dict[str, str]]) -> str:
    cases = list(dict.fromkeys((row["dtype"], row["size"]) for row in rows))
    times = {(row["kernel"], row["dtype"], row["size"]): row["time_over_copy"] for row in rows}
    kernels = [kernel for kernel in dict.fromkeys(row["kernel"] for row in rows) if kernel not in COPIES]
    header = ["kernel", *(f"{dtype} {size_label(int(size))}" for dtype, size in cases)]
    cells = ((kernel, *(_number(times.get((kernel, *case), "nan")) for case in cases)) for kernel in kernels)
    return _markdown(header, cells)


def _peer_table(rows: list[dict[str, str]]) -> str:
    rows = [row for row in rows if row["pass"] == PASSES[1]]
    cases = list(dict.fromkeys((row["dtype"], row["size"], row["allocator"]) for row in rows))
    cases.sort(key=lambda case: list(DTYPES).index(case[0]))
    speeds = {(row["implementation"], row["dtype"], row["size"], row["allocator"]): row for row in rows}
    header = ["", *(
        f"{dtype} {size_label(int(size))}" + (", default malloc" if allocator == "default" else "")
        for dtype, size, allocator in cases
    )]  # fmt: skip
    cells = []
    for name in (name for name in IMPLEMENTATIONS if any(row["implementation"] == name for row in rows)):
        found = (speeds.get((name, *case), {"speed_over_relu": "nan"}) for case in cases)
        cells.append([IMPLEMENTATIONS[name].label, *(_number(row["speed_over_relu"]) for row in found)])
    return _markdown(header, cells)


def _training_table(rows: list[dict[str, str]]) -> str:
    return _markdown(
        ("network", "dtype", "activation", "ms a step", "over nn.ReLU", "share"),
        (
            (
                row["network"], row["dtype"], row["activation"], f"{1e3 * float(row['seconds_median']):.1f}",
                f"{float(row['time_over_relu_median']):.3f}", f"{float(row['share_of_activation_median']):.1%}",
            )
            for row in rows
        ),
    )  # fmt: skip


def _memory_table(rows: list[dict[str, str]]) -> str:
    relu = {(row["network"], row["dtype"]): float(row["seconds_median"]) for row in rows if row["activation"] == "relu"}
    return _markdown(
        ("network", "dtype", "activation", "kept, MiB", "peak, MiB", "ms a step", "over nn.ReLU"),
        (
            (
                row["network"], row["dtype"], row["activation"],
                f"{int(row['kept_bytes']) / 2**20:,.0f}" if row["kept_bytes"] else "hidden",
                f"{int(row['peak_bytes']) / 2**20:,.0f}", f"{1e3 * float(row['seconds_median']):.1f}",
                f"{float(row['seconds_median']) / relu[row['network'], row['dtype']]:.3f}",
            )
            for row in rows
        ),
    )  # fmt: skip


def gpu_page(results: Results) -> str:
    """docs/benchmarks-cuda.md; a table without results is left out."""
    parts = [_GPU_INTRODUCTION]
    for table, text, make in (
        ("kernels", _GPU_KERNELS, _kernel_table), ("peers", _GPU_PEERS, _peer_table),
        ("memory", _GPU_MEMORY, _memory_table),
    ):  # fmt: skip
        if results[table]:
            parts += [text, make(results[table]), _setting(results[table])]
    return "\n".join(parts)


def page(results: Results) -> str:
    """docs/benchmarks.md; a table without results is left out."""
    parts = [_INTRODUCTION]
    if results["kernels"] or results["peers"]:
        parts += [_PROMISES, _markdown(("", "at most", "is", ""), _promise_rows(results)), _tried(results)]
    for table, text, make in (
        ("kernels", _KERNELS, _kernel_table), ("peers", _PEERS, _peer_table), ("training", _TRAINING, _training_table),
    ):  # fmt: skip
        if results[table]:
            parts += [text, make(results[table]), _setting(results[table])]
    parts.append("Bytes, peaks and times of networks whose activations are packed: [memory.md](memory.md).\n")
    parts.append(_SLOW)
    return "\n".join(part for part in parts if part)


def all_figures(results: Results) -> dict[str, Figure]:
    """name -> figure, of the tables that there are."""
    made = {}
    if results["kernels"]:
        made["roofline"] = figures.roofline_figure(results["kernels"], results["peers"])
    for table in ("peers", "training", "memory"):
        if results[table]:
            made[table] = getattr(figures, f"{table}_figure")(results[table])
    return made


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)
    print(f"Written: {path}")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())
    print(f"Written: {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description="Draws what the benchmarks measured, writes docs/benchmarks.md, and says which promises are kept.",
    )
    add = parser.add_argument
    add(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help=f"where the CSV files are, and the figures go (default {os.path.relpath(RESULTS)})",
    )
    add(
        "--page",
        type=Path,
        default=DOCS / "benchmarks.md",
        metavar="FILE",
        help=f"the page (default {os.path.relpath(DOCS / 'benchmarks.md')}); of a GPU, FILE-cuda.md beside it",
    )
    add(
        "--staircase",
        action="store_true",
        help=f"only draw {os.path.relpath(DOCS / 'staircase.png')}: the staircase and its coarse gradients",
    )
    args = parser.parse_args(argv)
    if args.staircase:
        return _save(figures.staircase_figure(), DOCS / "staircase.png")
    results, of_a_gpu = load(args.results), load(args.results, on_gpu=True)
    if not any((*results.values(), *of_a_gpu.values())):
        names = ", ".join(f"{table}.csv" for table in TABLES)
        raise SystemExit(f"bench.report: {args.results} has none of {names}; `make bench-full` writes them")
    if any(of_a_gpu.values()):
        for name, figure in all_figures(of_a_gpu).items():
            _save(figure, args.results / f"{name}-cuda.png")
        _write(args.page.with_stem(f"{args.page.stem}-cuda"), gpu_page(of_a_gpu))
    if any(results.values()):
        for name, figure in all_figures(results).items():
            _save(figure, args.results / f"{name}.png")
        _write(args.page, page(results))
        print()
        print(format_table(("time over another", "at most", "is", ""), _promise_rows(results)))


if __name__ == "__main__":
    main()
