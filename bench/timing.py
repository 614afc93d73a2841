"""Timing for the benchmarks: clocks, interleaved rounds, new processes, and the facts that a time depends on."""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import os
import platform
import random
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch

from coarsegrad.experiments.files import replacing
from coarsegrad.experiments.measure import environment

T = TypeVar("T")
Row = dict[str, object]


class BenchError(Exception):
    """The reason that no report is written."""


# ----------------------------------------------------------------------------------------- timing

# The length of a sample of a short job on a CPU. On a GPU a sample has a fixed number of calls, and 6 million clocks
# (about 3 ms) to queue them.
_SAMPLE_SECONDS = 2e-3
_GPU_CALLS = 5
_GPU_WAITS = 6_000_000


class CpuTimer:
    """Times calls by the wall clock, or for one thread by CPU time, which other programs disturb less.

    one_thread: the clock for one thread; time.process_time counts what a job does in threads of its own as well.
    """

    def __init__(self, one_thread: Callable[[], float] = time.thread_time) -> None:
        self._clock = one_thread if torch.get_num_threads() == 1 else time.perf_counter

    def calls(self, job: Callable[[], object]) -> int:
        """The calls of a sample: enough to be far above the clock's resolution."""
        shortest = min(self.sample(job, 1)[0] for _ in range(3))
        return max(1, round(_SAMPLE_SECONDS / shortest))

    def sample(self, job: Callable[[], object], calls: int) -> tuple[float, float]:
        """(seconds, page faults) of one call, the mean of `calls` calls."""
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = self._clock()
        for _ in range(calls):
            job()
        seconds = self._clock() - start
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        return seconds / calls, faults / calls


class GpuTimer:
    """Times calls on a GPU by CUDA events.

    The GPU waits until all calls of a sample are queued, so launch overhead is not timed unless a call synchronises.
    cold: a sample has several calls, and a buffer larger than the L2 is written before each; otherwise it has one call,
    such as a whole training step.
    """

    def __init__(self, device: torch.device, cold: bool = True) -> None:
        self._calls = _GPU_CALLS if cold else 1
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * l2, 2**28) if cold else 0, dtype=torch.int8, device=device)

    def calls(self, job: Callable[[], object]) -> int:
        """The calls of a sample, after a warm-up."""
        self.sample(job, 3)
        return self._calls

    def sample(self, job: Callable[[], object], calls: int) -> tuple[float, float]:
        """(seconds, 0 page faults) of one call, the mean of `calls` calls."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda._sleep(_GPU_WAITS)
        for start, end in events:
            self._flush.zero_()
            start.record()
            job()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3 / calls, 0.0


Timer = CpuTimer | GpuTimer


@dataclass
class Times:
    """Seconds and page faults of one call, round by round; each is the mean of `calls` calls."""

    calls: int
    seconds: list[float] = field(default_factory=list)
    page_faults: list[float] = field(default_factory=list)

    def speeds_over(self, other: Times) -> list[float]:
        """The speed relative to the other, round by round."""
        return [theirs / ours for ours, theirs in zip(self.seconds, other.seconds)]


# Rounds that are not measured, in which the allocator reaches its steady state.
_WARM_UP_ROUNDS = 2


def interleaved(
    jobs: dict[str, Callable[[], object]], timer: Timer, rounds: int, after_round: Callable[[], object]
) -> dict[str, Times]:
    """The times of jobs that take turns, in a new order each round, so that a slow moment affects all alike."""
    times = {}
    for name, job in jobs.items():
        times[name] = Times(calls=timer.calls(job))
    order, shuffle = list(jobs), random.Random(0).shuffle
    for number in range(_WARM_UP_ROUNDS + rounds):
        shuffle(order)
        for name in order:
            seconds, page_faults = timer.sample(jobs[name], times[name].calls)
            if number >= _WARM_UP_ROUNDS:
                times[name].seconds.append(seconds)
                times[name].page_faults.append(page_faults)
        if number >= _WARM_UP_ROUNDS:
            after_round()
    return times


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """(20%, median, 80%)."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


# --------------------------------------------------------------------------- processes and allocators

ALLOCATORS = ("keep", "default")

# Larger than any tensor of a benchmark, and within an int for older versions of glibc.
_KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**31 - 1), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
# Blocks of this size or more have their own pages, which return to the system when freed.
_RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_MALLOC = {"keep": _KEEP, "default": {}, "return": _RETURN}


def in_new_process(allocator: str, function: Callable[..., T], *arguments: object) -> T:
    """function(*arguments) in a new process, since malloc reads its settings only when a process starts.

    allocator: "keep": glibc's malloc keeps freed memory; "return": it returns large blocks at once; "default": the
        environment is unchanged.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_and_send, args=(sender, function, arguments), daemon=True)
    before = dict(os.environ)
    os.environ.update(_MALLOC[allocator])
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    sender.close()  # so that the end of the process ends the wait
    try:
        result, error = receiver.recv()
    except EOFError:
        raise BenchError("the measuring process was killed; out of memory?") from None
    process.join()
    if error:
        raise error
    return result


def _run_and_send(sender: Connection, function: Callable[..., object], arguments: tuple) -> None:
    """Sends (the result, None) or (None, the BenchError raised). Exits when the parent does."""
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    try:
        sender.send((function(*arguments), None))
    except BenchError as error:
        sender.send((None, error))
    except KeyboardInterrupt:
        pass  # the parent is interrupted as well


def _caches() -> str:
    """The first core's caches, such as "L1d 32K, L2 1024K, L3 32768K"; empty if the system does not list them."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return ", ".join(found)


# Those of /proc/cpuinfo that decide which kernels run.
_SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def instruction_sets() -> str:
    """Those of the CPU that matter here, empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return " ".join(name for name in _SETS if name in flags)


def facts(device: torch.device, allocator: str) -> dict[str, object]:
    """What the times of this process depend on besides the jobs, under the CSV files' column names.

    "allocator" is "keep", "default", or the name of a preloaded malloc; on a GPU, torch's own.
    """
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    if device.type != "cpu":
        gpu = torch.cuda.get_device_properties(device)
        return {
            "date": date,
            **environment(device),
            "caches": f"L2 {gpu.L2_cache_size // 1024}K, flushed before each call",
            "allocator": "torch",
            "malloc": torch.cuda.get_allocator_backend(),
            "clock": "CUDA events",
        }
    from coarsegrad._host import preloaded_malloc  # here, as a package that is measured against this one may be older

    other = preloaded_malloc()
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    return {
        "date": date,
        **environment(device),
        "caches": _caches(),
        "allocator": other or allocator,
        "malloc": other or " ".join([*platform.libc_ver(), *settings]).strip() or "the system's",
        "clock": "thread CPU time" if torch.get_num_threads() == 1 else "wall",
    }


# ------------------------------------------------------------------------------- options and files


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of an option for an integer with a lower bound."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return parse


def write_csv(rows: Iterable[dict[str, object]], path: Path) -> None:
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.getvalue().encode())
