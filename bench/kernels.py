"""`python -m bench.kernels`: the time of QReLU beside nn.ReLU and the same staircase in plain torch."""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import coarsegrad as cg
from coarsegrad.testing import hard_inputs

from .harness import (
    ALLOCATORS,
    BenchError,
    CpuTimer,
    GpuTimer,
    Times,
    at_least,
    facts,
    in_graph,
    in_new_process,
    interleaved,
    quantiles,
    write_csv,
)

RESULTS = Path(__file__).parent / "results" / "kernels.csv"
GPU_RESULTS = RESULTS.with_name("kernels-cuda.csv")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = ("forward", "forward+backward")

_DESCRIPTION = """
Times QReLU (2 bits, clipped_relu, ceil, fixed alpha), out of place and in
place, beside nn.ReLU and beside the same staircase as an eager
torch.autograd.Function and in its fastest torch.compile form.
"""
_EPILOG = """
Without --quick and --sizes: 4, 2^16, 2^22 and 2^24 elements, and at 2^26 what
writing in place is worth where every fresh output costs page faults
(QReLU and nn.ReLU with the allocator as it is).

Before a size is timed, outputs and gradients are compared with the reference,
bit for bit; if one differs there is no report. All implementations take turns
in one process, in a new order each round. A time is the median over the rounds,
with the 20% and 80% quantiles; a speed is the median of nn.ReLU's time over this
one's, round by round. GB/s counts what any implementation has to move: x and y,
dy and dx, and one bit an element written and read for the backward.

--allocator keep has glibc's malloc keep what is freed (MALLOC_MMAP_THRESHOLD_
and MALLOC_TRIM_THRESHOLD_ set in a new process). With the default it gives large
blocks back to the system, and each fresh output pays for its pages again: the
last column counts them. A preloaded tcmalloc or jemalloc is recognised.

--device cuda times by CUDA events, each call with a flushed L2, and jobs of up to
2^20 elements as a CUDA graph, so that launches are not what is measured. A copy of
the same tensors takes its turns too, and the last column is its time over each
one's: the share of the measured copy bandwidth.
"""

# ------------------------------------------------------------------------------ the implementations

# With alpha a power of two, x / alpha and x * (1 / alpha) are exact, so that the forms in plain torch, which
# do not compare x with the levels, give the same bits. QReLU's kernel takes the same way for any alpha.
BITS, ALPHA = 2, 0.5
_TOP_CODE = 2**BITS - 1
_TOP = _TOP_CODE * ALPHA

Activation = Callable[[Tensor], Tensor]


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return ALPHA * torch.clamp(torch.ceil(x / ALPHA), 0, _TOP_CODE)

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        return torch.where((x > 0) & (x <= _TOP), grad_y, 0)


def _compiled() -> Activation:
    """The fastest form in torch.compile: the two passes compiled apart.

    Each is then one vectorised loop, and x is kept. Compiled as one function, be it with _Eager or with the
    idiom `c + (staircase(x) - c).detach()`, c the clipped x, the partitioner keeps the gate as a bool tensor:
    smaller than x, but its loops come out many times slower. torch.utils.checkpoint inside the function
    prevents that, but is slower on small tensors and no faster on large ones. Static shapes and a constant
    alpha favour this form too.
    """

    def compiled(function: Callable) -> Callable:
        return torch.compile(function, fullgraph=True, dynamic=False)

    staircase = compiled(lambda x: torch.clamp(torch.ceil(x * (1 / ALPHA)), 0, _TOP_CODE) * ALPHA)
    gate = compiled(lambda x, grad_y: torch.where((x > 0) & (x <= _TOP), grad_y, 0))

    class Compiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return staircase(x)

        @staticmethod
        def backward(ctx, grad_y):
            return gate(*ctx.saved_tensors, grad_y)

    return lambda x: Compiled.apply(x) if torch.is_grad_enabled() else staircase(x)


@dataclass(frozen=True)
class Implementation:
    """make(): a new activation; None for a mere copy. staircase: whether it computes QReLU's function."""

    label: str
    make: Callable[[], Activation] | None
    staircase: bool = True
    inplace: bool = False


IMPLEMENTATIONS = {
    "relu": Implementation("nn.ReLU", nn.ReLU, staircase=False),
    "relu_inplace": Implementation(
        "nn.ReLU in place", lambda: nn.ReLU(inplace=True), staircase=False, inplace=True
    ),
    "qrelu": Implementation("QReLU", lambda: cg.QReLU(BITS, alpha=ALPHA)),
    "qrelu_inplace": Implementation(
        "QReLU in place", lambda: cg.QReLU(BITS, alpha=ALPHA, inplace=True), inplace=True
    ),
    "eager": Implementation("eager", lambda: _Eager.apply),
    "compile": Implementation("torch.compile", _compiled),
    "copy": Implementation("copy", None, staircase=False),
}
_IN_PLACE_STUDY = ("relu", "relu_inplace", "qrelu", "qrelu_inplace")

# ------------------------------------------------------------------------------------- the promises


@dataclass(frozen=True)
class Floor:
    """A promise on forward+backward: `against` takes at least `speed` times the time of `implementation`.

    In medians; on an allocator that keeps its memory, or on the default one.
    """

    dtype: str
    size: int
    implementation: str
    against: str
    speed: float
    default_allocator: bool = False


FLOORS = [
    *(
        Floor(dtype, size, "qrelu", against, speed)
        for size in (2**22, 2**24)
        for dtype, over_relu in (("float32", 1.4), ("bfloat16", 1.15))
        for against, speed in (("relu", over_relu), ("compile", 1.4), ("eager", 5.0))
    ),
    *(Floor(dtype, 2**26, "qrelu_inplace", "relu", 1.5, default_allocator=True) for dtype in DTYPES),
    *(Floor(dtype, 4, "qrelu", "relu", 1 / 1.5) for dtype in DTYPES),  # at most 1.5 times its time
]

# -------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Part:
    """What one process measures; allocator is one of ALLOCATORS."""

    device: str
    allocator: str
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    implementations: tuple[str, ...]
    rounds: int
    threads: int | None
    cpu_time: bool


@dataclass(frozen=True)
class Result:
    """The times of each implementation on one input, and what they depend on besides."""

    dtype: str
    size: int
    passes: str
    times: dict[str, Times]
    facts: dict[str, object]


def _inputs(dtype: torch.dtype, size: int) -> tuple[Tensor, Tensor]:
    """(x, dy): Gaussian, and in up to half of x every level with its two neighbours.

    No NaN, whose gradient passes in QReLU alone, and no subnormal, which can be slower than other numbers.
    """
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    hard = hard_inputs(ALPHA, BITS, "ceil", dtype)
    hard = hard[(hard == 0) | (hard.isfinite() & (hard.abs() >= torch.finfo(dtype).smallest_normal))]
    hard = hard[: size // 2]
    x[: hard.numel()] = hard
    return x, dy


def _expected(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(y, dx) of the reference, a piece at a time as it takes many times the memory."""
    ys, dxs = [], []
    with cg.use_backend("reference"):
        for x_piece, dy_piece in zip(x.split(2**20), dy.split(2**20)):
            x_piece = x_piece.detach().requires_grad_()
            y = cg.qrelu(x_piece, ALPHA, BITS)
            ys.append(y.detach())
            dxs += torch.autograd.grad(y, x_piece, dy_piece)
    return torch.cat(ys), torch.cat(dxs)


# A leaf must not be written to. This is x as the fresh output of another op, without a copy. Its cost, some
# calls whatever the size, counts in the in-place rows.
_fresh = torch.ops.aten._unsafe_view.default

Job = Callable[[], tuple[Tensor, ...]]

# On a GPU jobs of at most as many elements are timed as a graph.
_GRAPH_SIZE = 2**20


def _set_up(implementation: Implementation, x: Tensor, dy: Tensor, passes: str) -> Job:
    """A job that returns (y,) or (y, dx). In place it has a copy of x, which is y from the second call on."""
    if implementation.make is None:
        copies = [(torch.empty_like(t), t) for t in ((x,) if passes == "forward" else (x, dy))]
        return lambda: tuple(to.copy_(t) for to, t in copies)
    activation = implementation.make()
    if isinstance(activation, nn.Module):
        activation.to(x.device)
    x = (x.clone() if implementation.inplace else x.detach()).requires_grad_()
    if passes == "forward":
        return lambda: (activation(x),)

    def job() -> tuple[Tensor, ...]:
        y = activation(_fresh(x, x.shape) if implementation.inplace else x)
        return y, *torch.autograd.grad(y, x, dy)

    return job


def _check(label: str, got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], x: Tensor) -> None:
    for what, mine, right in zip(("output", "gradient"), got, wanted):
        if not torch.equal(mine, right):
            wrong = (mine != right).nonzero()[:, 0]
            i = int(wrong[0])
            raise BenchError(
                f"the {what} of {label} differs from the reference in {wrong.numel()} of {x.numel()} elements"
                f" ({x.dtype}), first at x[{i}] = {x[i].item()!r}: got {mine[i].item()!r},"
                f" wanted {right[i].item()!r}; no times are reported"
            )


def _checked_jobs(
    names: Iterable[str], x: Tensor, dy: Tensor, passes: str, expected: tuple[Tensor, Tensor]
) -> dict[str, Job]:
    """The jobs by name, each called once and its results compared with the reference's."""
    jobs = {}
    for name in names:
        implementation = IMPLEMENTATIONS[name]
        jobs[name] = _set_up(implementation, x, dy, passes)
        try:
            got = jobs[name]()
        except Exception as error:
            raise BenchError(f"{implementation.label} failed (--only leaves it out): {error}") from error
        if implementation.staircase:
            _check(implementation.label, got, expected, x)
    return jobs


def _measure(part: Part) -> list[Result]:
    """Everything in `part`, in this process; prints each result as it comes."""
    sys.stdout.reconfigure(line_buffering=True)  # each result at once, into a pipe as well
    if part.threads:
        torch.set_num_threads(part.threads)
    device = torch.device(part.device)
    here = facts(device, part.allocator, part.cpu_time)
    print(*(f"{name.ljust(10)}  {value}" for name, value in here.items()), "", _HEADER, sep="\n")
    timer = CpuTimer(part.cpu_time) if part.device == "cpu" else GpuTimer(device)
    results = []
    inputs = list(itertools.product(part.dtypes, part.sizes))
    total = len(inputs) * len(PASSES) * part.rounds
    with tqdm(total=total, disable=None, leave=False, unit="round") as progress:
        for dtype, size in inputs:
            case = f"{dtype} {size_label(size)}"
            progress.set_description(f"{case}: reference")
            torch._dynamo.reset()  # else a new size or dtype is a recompilation, and after some all is eager
            x, dy = _inputs(DTYPES[dtype], size)
            expected = tuple(t.to(device) for t in _expected(x, dy))
            x, dy = x.to(device), dy.to(device)
            for passes in PASSES:
                with torch.set_grad_enabled(passes != "forward"):
                    progress.set_description(f"{case} {passes}: set up and check")
                    jobs = _checked_jobs(part.implementations, x, dy, passes, expected)
                    if part.device != "cpu" and size <= _GRAPH_SIZE:
                        jobs = {name: in_graph(job) for name, job in jobs.items()}
                    progress.set_description(f"{case} {passes}: time")
                    times = interleaved(jobs, timer, part.rounds, progress.update)
                results.append(Result(dtype, size, passes, times, here))
                for line in _lines(results[-1]):
                    progress.write(line)
    return results


# -------------------------------------------------------------------------------------- the report


def size_label(size: int) -> str:
    """2^22 for 4194304, but 4 for 4."""
    return f"2^{size.bit_length() - 1}" if size > 1024 and size.bit_count() == 1 else str(size)


def _minimal_bytes(result: Result) -> float:
    """x and y; dy and dx, and one bit an element written and read."""
    itemsize = DTYPES[result.dtype].itemsize
    return result.size * (2 * itemsize if result.passes == "forward" else 4 * itemsize + 2 / 8)


def _rows(results: Iterable[Result]) -> Iterator[dict[str, object]]:
    """The CSV, a row for each implementation and case."""
    for result in results:
        for name, times in result.times.items():
            low, median, high = quantiles(times.seconds)
            slow, speed, fast = quantiles(times.speeds_over(result.times["relu"]))
            copy = result.times.get("copy")
            yield {
                "dtype": result.dtype,
                "size": result.size,
                "pass": result.passes,
                "implementation": name,
                "seconds_median": f"{median:.6g}",
                "seconds_q20": f"{low:.6g}",
                "seconds_q80": f"{high:.6g}",
                "speed_over_relu_median": f"{speed:.4g}",
                "speed_over_relu_q20": f"{slow:.4g}",
                "speed_over_relu_q80": f"{fast:.4g}",
                "gb_per_second": f"{_minimal_bytes(result) / median / 1e9:.4g}",
                "share_of_copy": f"{quantiles(times.speeds_over(copy))[1]:.3f}" if copy else "",
                "page_faults": f"{statistics.median(times.page_faults):.6g}",
                "rounds": len(times.seconds),
                "calls_per_round": times.calls,
                **result.facts,
            }


_COLUMNS = "{:<9}{:>5}  {:<17}{:<17}{:>10}  {:<22}{:>5}  {:<15}{:>6}{:>8}{:>9}"
_HEADER = _COLUMNS.format(
    *("dtype", "size", "pass", "implementation", "us", "(20% to 80%)"),
    *("speed", "(over nn.ReLU)", "GB/s", "faults", "of copy"),
)


def _lines(result: Result) -> Iterator[str]:
    """The rows of one case, as they are printed."""
    for row in _rows([result]):
        low, median, high = (1e6 * float(row[f"seconds_{q}"]) for q in ("q20", "median", "q80"))
        slow, speed, fast = (float(row[f"speed_over_relu_{q}"]) for q in ("q20", "median", "q80"))
        yield _COLUMNS.format(
            row["dtype"], size_label(row["size"]), row["pass"], IMPLEMENTATIONS[row["implementation"]].label,
            f"{median:.1f}", f"({low:.1f} to {high:.1f})", f"{speed:.2f}", f"({slow:.2f} to {fast:.2f})",
            f"{float(row['gb_per_second']):.1f}", f"{float(row['page_faults']):.0f}",
            row["share_of_copy"],
        ).rstrip()
    yield ""


def _verdicts(results: list[Result]) -> Iterator[str]:
    """Met or not, for each promise that these results can tell."""
    told = 0
    for floor in FLOORS:
        case = (floor.dtype, floor.size, "forward+backward", floor.default_allocator)
        for result in results:
            default_allocator = result.facts["allocator"] == "default"
            if (result.dtype, result.size, result.passes, default_allocator) != case:
                continue
            if not {floor.implementation, floor.against} <= result.times.keys():
                continue
            ours, theirs = result.times[floor.implementation], result.times[floor.against]
            speed = statistics.median(theirs.seconds) / statistics.median(ours.seconds)
            slow, _, fast = quantiles(ours.speeds_over(theirs))
            label, against = (IMPLEMENTATIONS[name].label for name in (floor.implementation, floor.against))
            verdict = "met" if speed >= floor.speed else "NOT MET"
            yield (
                f"{verdict:<9}{floor.dtype:<9}{size_label(floor.size):>5}"
                f"  {label + ' over ' + against:<28}{speed:>6.2f}x, promised {floor.speed:.2f}x"
                f"  (20% to 80% of the rounds: {slow:.2f} to {fast:.2f})"
            )
            told += 1
    if told < len(FLOORS):
        yield f"{len(FLOORS) - told} of {len(FLOORS)} promises are about cases that were not measured."


# ------------------------------------------------------------------------------------ the command


def _elements(text: str) -> int:
    base, power, exponent = text.replace("**", "^").partition("^")
    try:
        size = int(base) ** int(exponent) if power else int(base)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of elements, as 65536 or 2^16") from None
    if not 1 <= size <= 2**28:
        raise argparse.ArgumentTypeError(f"a size must be 1 to 2^28 elements, got {text}")
    return size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (default cpu)")
    add("--quick", action="store_true", help="4, 2^16 and 2^22 elements and fewer rounds: under two minutes")
    add("--sizes", nargs="+", type=_elements, metavar="N",
        help="these numbers of elements alone, as 65536 or 2^16")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE",
        help=f"{' and/or '.join(DTYPES)} (default: both)")
    names = [name for name in IMPLEMENTATIONS if name != "copy"]
    add("--only", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"some of {', '.join(names)}; relu is always there, as the measure (default: all)")
    add("--rounds", type=at_least(5), metavar="N",
        help="rounds that count, at least 5 (default 31; with --quick 11)")
    add("--threads", type=at_least(1), metavar="N", help="threads (default: torch's choice)")
    add("--allocator", choices=ALLOCATORS, default="keep",
        help="whether freed memory is kept, or the environment stays as it is (default keep)")
    add("--cpu-time", action="store_true", help="CPU time, for a busy machine; only with --threads 1")
    add("--out", type=Path, metavar="CSV",
        help=f"the results (default {os.path.relpath(RESULTS)}; of a GPU, {os.path.relpath(GPU_RESULTS)})")
    return parser


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time needs --threads 1: the clock is that of one thread")
    on_cpu = args.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; `python -m bench.sass` tells what a model says")
    args.out = args.out or (RESULTS if on_cpu else GPU_RESULTS)
    if on_cpu and args.allocator == "keep" and platform.libc_ver()[0] != "glibc":
        print("--allocator keep knows how to ask glibc alone; measuring with the allocator as it is")
        args.allocator = "default"

    def part(allocator: str, sizes: Iterable[int], names: Iterable[str]) -> Part:
        always = ("relu",) if on_cpu else ("relu", "copy")
        chosen = tuple(name for name in names if name in always or name in args.only)
        rounds = args.rounds or (11 if args.quick else 31)
        settings = (tuple(sizes), tuple(args.dtypes), chosen, rounds, args.threads, args.cpu_time)
        return Part(args.device, allocator, *settings)

    sizes = args.sizes or [4, 2**16, 2**22] + ([] if args.quick else [2**24] if on_cpu else [2**24, 2**27])
    parts = [part(args.allocator if on_cpu else "default", sizes, IMPLEMENTATIONS)]
    if on_cpu and not args.quick and not args.sizes:
        parts.append(part("default", [2**26], _IN_PLACE_STUDY))
    results = []
    try:
        for each in parts:
            results += in_new_process(each.allocator, _measure, each)
            write_csv(_rows(results), args.out)
    except (BenchError, OSError) as error:
        raise SystemExit(f"bench.kernels: {error}") from error
    except KeyboardInterrupt:
        print("\nStopped.", f"{args.out} has what was finished." if results else "Nothing was written.")
        raise SystemExit(130) from None
    if not on_cpu:
        print(f"\nWritten: {args.out}. No promise is made for GPUs yet; the last column is what to look at.")
        return
    print("Floors: forward+backward, how many times as fast by the medians (0.67x is 1.5 times the time)")
    print("\n".join(_verdicts(results)))
    print(f"\nWritten: {args.out}. `python -m bench.plot` draws it.")


if __name__ == "__main__":
    main()
