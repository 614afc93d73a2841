"""Two builds of the package, measured in turns: `--against CHECKOUT` of bench.kernels and bench.layers.

Only one build can be loaded in a process, as both register the same operators. So each has a process of its own, which
runs a job only while the measuring process, which has nothing else to do, waits for its answer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import coarsegrad
from coarsegrad import _ops
from coarsegrad.experiments.measure import environment

from .sweep import Case, Part, Sweep, run_parts, size_label, timed
from .timing import BenchError, CpuTimer, Row, Times, quantiles

ROOT = Path(__file__).parent.parent
# A job is slower if its time is more than this many times the other's.
SLOWER = 1.02


def is_checkout(folder: Path) -> bool:
    return (folder / "python" / "coarsegrad" / "__init__.py").is_file()


def package_folder() -> Path:
    """Where `import coarsegrad` found it; the package's own files may be links."""
    return Path(coarsegrad.__file__).parent.parent.resolve()


# ------------------------------------------------------------------------------- a process for a build


class Build:
    """A package in a process of its own. folder: where `import coarsegrad` finds it; benchmark: the module whose
    SWEEP is measured."""

    def __init__(self, folder: Path, benchmark: str, part: Part) -> None:
        self.folder, self._errors = folder, tempfile.TemporaryFile("w+")
        path = os.pathsep.join(filter(None, [str(folder.resolve()), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.against", benchmark], cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        try:
            self.facts = self.ask("begin", dataclasses.asdict(part))
            if self.facts["package"] != str(folder.resolve()):
                raise BenchError(f"for {folder}, Python imported coarsegrad from {self.facts['package']}")
            if why := self.facts["why_not_native"]:
                raise BenchError(f"{folder} has no native library that runs: {why}")
        except BenchError:
            self.__exit__()
            raise

    def __enter__(self) -> Build:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()  # closes its input, at which it ends
        self._errors.close()

    def ask(self, *request: object) -> object:
        """The answer to a request, which is the name of a method of `_Turns` and its arguments."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip() or "it was killed; out of memory?"
            raise BenchError(f"the package in {self.folder} does not run this benchmark: {said.splitlines()[-1]}")
        result, error = json.loads(answer)
        if error:
            raise BenchError(f"with the package in {self.folder}, {error}")
        return result


class _TurnTimer(CpuTimer):
    """Times jobs that are given as (build, name)."""

    def sample(self, job: tuple[Build, str], calls: int) -> tuple[float, float]:
        build, name = job
        return tuple(build.ask("sample", name, calls))


class _Turns:
    """What the process of a build answers."""

    def __init__(self, benchmark: str) -> None:
        self._sweep: Sweep = importlib.import_module(benchmark).SWEEP
        self._jobs: dict[str, Callable[[], object]] = {}

    def begin(self, part: dict[str, object]) -> dict[str, object]:
        self._part = Part(**part)
        torch.set_num_threads(self._part.threads)
        self._timer = CpuTimer()
        found = environment(torch.device("cpu"))
        return {
            "package": str(package_folder()),
            "why_not_native": None if _ops.native is not None else str(_ops.native_why_not),
            **{key: found[key] for key in ("git", "torch", "backend")},
        }

    def lacking(self) -> dict[str, str]:
        """Name -> why it does not run; a warning is that of a kernel that the library does not have."""
        found = {}
        for name in self._part.names:
            part = dataclasses.replace(self._part, names=(name,))
            getattr(_ops, "_warned_devices", set()).clear()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", UserWarning)
                    list(self._sweep.cases(part, part.inputs[0][0], self._sweep.few))
            except BenchError:
                raise
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return found

    def prepare(self, names: list[str], dtype: str, size: int) -> list[str]:
        self._jobs = {}  # before there are others
        (case,) = self._sweep.cases(dataclasses.replace(self._part, names=tuple(names)), dtype, size)
        self._jobs = case.jobs
        return list(case.jobs)

    def sample(self, name: str, calls: int) -> tuple[float, float]:
        job = self._jobs[name]
        job()  # the core and its caches were another's
        return self._timer.sample(job, calls)


def main(benchmark: str) -> None:
    # Whatever else is printed goes to the standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    turns = _Turns(benchmark)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = getattr(turns, name)(*arguments), None
        except BenchError as error:
            answer = None, str(error)
        print(json.dumps(answer), file=answers)


# ---------------------------------------------------------------------------------- the comparison

_BUILDS = ("this", "other", "again")
_COLUMNS = "{:>5}  {:<36}{:>10}{:>10}{:>8}  {:<16}{:>8}  {}"
_TIMES = ("us", "other, us", "ratio", "(20% to 80%)", "itself", "(20% to 80%)")


@dataclass(frozen=True)
class Comparison:
    """Measured as a Sweep: this build, the one in a checkout, and this one again, in turns."""

    benchmark: str
    checkout: Path
    columns: tuple[str, str, str]

    def measure(self, part: Part) -> list[Row]:
        folders = dict.fromkeys(_BUILDS, package_folder()) | {"other": self.checkout / "python"}
        with contextlib.ExitStack() as stack:
            builds = {}
            for name, folder in folders.items():
                builds[name] = stack.enter_context(Build(folder, self.benchmark, part))
            names = self._in_common(builds["other"], part.names)

            def cases(part: Part, dtype: str, size: int) -> Iterator[Case]:
                for build in builds.values():
                    jobs = build.ask("prepare", names, dtype, size)
                for job in jobs:
                    yield Case(job, {name: (build, job) for name, build in builds.items()})

            facts = builds["other"].facts
            print(f"against     {self.checkout}, {facts['git'] or 'no commit'}, {facts['backend']}")
            line = f"{{:<{max(len(name) for name, _ in part.inputs) + 1}}}{_COLUMNS}"
            turns = Sweep(
                cases, functools.partial(_rows, self.columns), line.format(*self.columns, *_TIMES),
                functools.partial(_line, line), timer=lambda _: _TurnTimer(),
            )  # fmt: skip
            rows = turns.measure(part)
        return [{**row, "other_git": facts["git"], "other_backend": facts["backend"]} for row in rows]

    def _in_common(self, other: Build, names: tuple[str, ...]) -> list[str]:
        lacking = other.ask("lacking")
        for name, why in lacking.items():
            print(f"Skipped, not in {self.checkout}: {name} ({why})")
        if lacking.keys() >= set(names):
            raise BenchError(f"{self.checkout} has none of these")
        return [name for name in names if name not in lacking]


def _rows(columns: tuple[str, str, str], dtype: str, size: int, job: str, times: dict[str, Times]) -> list[Row]:
    this, other, again = (times[build] for build in _BUILDS)
    row: Row = {**dict(zip(columns, (dtype, size, job))), **timed(this)}
    row["other_seconds_median"] = f"{quantiles(other.seconds)[1]:.6g}"
    for name, against in (("other", other), ("itself", again)):
        low, median, high = quantiles(against.speeds_over(this))
        row[f"time_over_{name}"] = f"{median:.4g}"
        row |= {f"time_over_{name}_q20": f"{low:.4g}", f"time_over_{name}_q80": f"{high:.4g}"}
    return [row]


def _case(row: Row) -> tuple[str, str, str]:
    """What a row is of: its first three columns."""
    dtype, size, job, *_ = row.values()
    return dtype, size_label(size), job


def _line(line: str, row: Row) -> str:
    us, other_us = (1e6 * float(row[name]) for name in ("seconds_median", "other_seconds_median"))
    ratios = []
    for name in ("other", "itself"):
        low, high = (float(row[f"time_over_{name}_{q}"]) for q in ("q20", "q80"))
        ratios += [f"{float(row[f'time_over_{name}']):.3f}", f"({low:.3f} to {high:.3f})"]
    return line.format(*_case(row), f"{us:.1f}", f"{other_us:.1f}", *ratios)


def verdict(rows: list[Row], checkout: Path) -> str:
    """What is slower than in a checkout, and how far a build is from itself."""
    percent = f"{SLOWER - 1:.0%}"
    slower = [
        f"  {', '.join(_case(row))}: {row['time_over_other']} (itself {row['time_over_itself']})"
        for row in rows
        if float(row["time_over_other"]) > SLOWER
    ]
    chance = max(abs(float(row["time_over_itself"]) - 1) for row in rows)
    return "\n".join([
        f"Slower than in {checkout} by more than {percent}:" if slower else
        f"Nothing is slower than in {checkout} by more than {percent}.", *slower,
        f"The same build in two processes differs by up to {chance:.1%}.",
    ])  # fmt: skip


# ------------------------------------------------------------------------------------ of a benchmark's command


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against",
        type=Path,
        metavar="CHECKOUT",
        help="compare with another build: a checkout of this project in which `make build` has run",
    )


def check_option(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.against:
        return
    if not is_checkout(args.against):
        parser.error(f"--against: {args.against} is no checkout, it has no python/coarsegrad")
    if getattr(args, "device", "cpu") != "cpu" or args.threads != 1:
        parser.error("--against compares one thread of a CPU: others would still spin while it is another's turn")


def run(benchmark: str, sweep: Sweep, part: Part, args: argparse.Namespace) -> None:
    """Measures a part, or compares it with another build's."""
    if not args.against:
        run_parts(benchmark, sweep, [part], args.out)
        return
    comparison = Comparison(benchmark, args.against, sweep.columns)
    print(verdict(run_parts(benchmark, comparison, [part], args.out, then=""), args.against))


if __name__ == "__main__":
    main(*sys.argv[1:])
