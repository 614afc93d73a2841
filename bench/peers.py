"""`python -m bench.peers`: the time of QReLU, nn.ReLU, plain torch, and other libraries' fake quantizers."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import coarsegrad as cg
from coarsegrad.testing import hard_inputs

from .activations import ALPHA, BITS, IMPLEMENTATIONS, TOP, Implementation
from .sweep import (
    DTYPES,
    Case,
    Part,
    Sweep,
    checked_options,
    copying,
    default_sizes,
    run_parts,
    size_label,
    size_options,
    timed,
)
from .timing import BenchError, Row, Times, quantiles

RESULTS = Path(__file__).parent / "results" / "peers.csv"
PASSES = ("forward", "forward+backward")

_DESCRIPTION = """
Times QReLU (2 bits, clipped_relu, ceil), out of place, in place and with a
learned step, and nn.ReLU; the same staircase as an eager
torch.autograd.Function and in torch.compile, in its fastest form and in the
usual idiom; and torch's fake_quantize, with a fixed and a learned step, brevitas'
QuantReLU and torchao's fake quantizer, each in its fastest comparable setting.
`pip install -e .[peers]` installs the last two; what is not installed is skipped
with a note.
"""
_EPILOG = """
Default sizes: 4, 2^16, 2^22 and 2^24 elements, and 2^26 for the gain of writing in
place when every new output incurs page faults (QReLU and nn.ReLU with the
allocator as it is); on a GPU 2^16 to 2^27.

Before a size is timed, outputs and gradients are compared with the reference, bit
for bit (fake quantizers are checked to round to the nearest level). If one
differs, no times are reported. All implementations take turns in one process, in
a new order each round. A time is the median over the rounds, with the 20% and 80%
quantiles; a speed is nn.ReLU's time divided by this one's: the ratio of medians,
with quantiles round by round. GB/s counts what every implementation must move: x
and y, dy and dx, and one bit per element written and read for the backward; "of
copy" is its share of the bandwidth of a copy of x (and dy).

--allocator keep makes glibc's malloc keep freed memory (MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ set in a new process). By default it returns large blocks to
the system, and every new output incurs page faults again: the last column counts
them. A preloaded tcmalloc or jemalloc is recognised.

--device cuda times by CUDA events. Each call finds a flushed L2, and all calls of a
sample are queued before the first begins, so launch overhead is excluded.
"""
_COPY = "copy"
_IN_PLACE_STUDY = ("relu", "relu_inplace", "qrelu", "qrelu_inplace")

# -------------------------------------------------------------------------------------- measuring


def _inputs(dtype: torch.dtype, size: int) -> tuple[Tensor, Tensor]:
    """(x, dy) on the CPU: Gaussian, with every level and its two neighbours in up to half of x.

    Without NaN, whose gradient passes in QReLU only, and without subnormals, which can be slower.
    """
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    hard = hard_inputs(ALPHA, BITS, "ceil", dtype)
    hard = hard[(hard == 0) | (hard.isfinite() & (hard.abs() >= torch.finfo(dtype).smallest_normal))]
    hard = hard[: size // 2]
    x[: hard.numel()] = hard
    return x, dy


def _expected(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(y, dx) of the reference, piece by piece because it takes many times the memory."""
    ys, dxs = [], []
    with cg.use_backend("reference"), torch.enable_grad():
        for x_piece, dy_piece in zip(x.split(2**20), dy.split(2**20)):
            x_piece = x_piece.detach().requires_grad_()
            y = cg.qrelu(x_piece, ALPHA, BITS)
            ys.append(y.detach())
            dxs += torch.autograd.grad(y, x_piece, dy_piece)
    return torch.cat(ys), torch.cat(dxs)


# A leaf must not be written to. This makes x the output of another op without a copy. Its cost, a few calls at any
# size, is included in the in-place rows.
_fresh = torch.ops.aten._unsafe_view.default

Job = Callable[[], tuple[Tensor, ...]]


def _set_up(implementation: Implementation, x: Tensor, dy: Tensor, passes: str) -> Job:
    """A job that returns (y,) or (y, dx, the gradient of a learned step).

    In place it works on a copy of x, which is y from the second call on.
    """
    activation = implementation.activation(x)
    x = (x.clone() if implementation.inplace else x.detach()).requires_grad_()
    if passes == "forward":
        return lambda: (activation(x),)
    learned = list(activation.parameters()) if isinstance(activation, nn.Module) else []

    def job() -> tuple[Tensor, ...]:
        y = activation(_fresh(x, x.shape) if implementation.inplace else x)
        return y, *torch.autograd.grad(y, [x, *learned], dy)

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


def _check_nearest(label: str, y: Tensor, x: Tensor) -> None:
    """Every output is a level, and none is closer to x; ties may go either way."""
    codes = y.float() / ALPHA
    wrong = (codes != codes.round()) | (codes < 0) | (y > TOP)
    wrong |= (y.float() - x.float().clamp(0, TOP)).abs() > ALPHA / 2
    if wrong.any():
        i = int(wrong.nonzero()[0, 0])
        raise BenchError(
            f"the output of {label} is not the nearest level in {int(wrong.sum())} of {x.numel()} elements"
            f" ({x.dtype}), first at x[{i}] = {x[i].item()!r}: got {y[i].item()!r}; no times are reported"
        )


def _checked_jobs(
    names: Iterable[str], x: Tensor, dy: Tensor, passes: str, expected: tuple[Tensor, Tensor]
) -> dict[str, Job]:
    """The jobs by name, each called once and checked."""
    jobs = {}
    for name in names:
        implementation = IMPLEMENTATIONS[name]
        try:
            jobs[name] = _set_up(implementation, x, dy, passes)
            got = jobs[name]()
        except Exception as error:
            raise BenchError(f"{implementation.label} failed (--only leaves it out): {error}") from error
        if implementation.output == "staircase":
            _check(implementation.label, got, expected, x)
        elif implementation.output == "nearest":
            _check_nearest(implementation.label, got[0].detach(), x)
    return jobs


def _cases(part: Part, dtype: str, size: int) -> Iterator[Case]:
    torch._dynamo.reset()  # a new size or dtype recompiles, and after some recompilations torch falls back to eager
    x, dy = (t.to(part.device) for t in _inputs(DTYPES[dtype], size))
    expected = _expected(x, dy)
    for passes in PASSES:
        grad = passes != "forward"
        with torch.set_grad_enabled(grad):
            jobs = _checked_jobs(part.names, x, dy, passes, expected)
        copies = [copying(torch.empty_like(t), t) for t in ((x, dy) if grad else (x,))]
        jobs[_COPY] = lambda copies=copies: [copy() for copy in copies]
        yield Case(passes, jobs, grad)


# -------------------------------------------------------------------------------------- the report


def _rows(dtype: str, size: int, passes: str, times: dict[str, Times]) -> list[Row]:
    """The CSV: a row for each implementation."""
    itemsize = DTYPES[dtype].itemsize
    copied = size * itemsize * (2 if passes == "forward" else 4)
    moved = copied + (0 if passes == "forward" else size * 2 / 8)
    medians = {name: quantiles(own.seconds)[1] for name, own in times.items()}
    rows = []
    for name, own in times.items():
        if name == _COPY:
            continue
        slow, _, fast = quantiles(own.speeds_over(times["relu"]))
        rows.append({
            "dtype": dtype, "size": size, "pass": passes, "implementation": name, **timed(own),
            "speed_over_relu": f"{medians['relu'] / medians[name]:.4g}",
            "speed_over_relu_q20": f"{slow:.4g}", "speed_over_relu_q80": f"{fast:.4g}",
            "gb_per_second": f"{moved / medians[name] / 1e9:.4g}",
            "share_of_copy": f"{medians[_COPY] * moved / copied / medians[name]:.3f}",
        })  # fmt: skip
    return rows


_COLUMNS = "{:<9}{:>5}  {:<17}{:<17}{:>10}  {:<22}{:>6}  {:<15}{:>6}{:>8}{:>8}"
_HEADER = _COLUMNS.format(
    *("dtype", "size", "pass", "implementation", "us", "(20% to 80%)"),
    *("speed", "(over nn.ReLU)", "GB/s", "of copy", "faults"),
)


def _line(row: Row) -> str:
    low, median, high = (1e6 * float(row[f"seconds_{q}"]) for q in ("q20", "median", "q80"))
    slow, fast = (float(row[f"speed_over_relu_{q}"]) for q in ("q20", "q80"))
    return _COLUMNS.format(
        row["dtype"], size_label(row["size"]), row["pass"], IMPLEMENTATIONS[row["implementation"]].label,
        f"{median:.1f}", f"({low:.1f} to {high:.1f})", f"{float(row['speed_over_relu']):.3g}",
        f"({slow:.3g} to {fast:.3g})", f"{float(row['gb_per_second']):.1f}", row["share_of_copy"],
        f"{float(row['page_faults']):.0f}",
    ).rstrip()  # fmt: skip


SWEEP = Sweep(_cases, _rows, _HEADER, _line)

# ------------------------------------------------------------------------------------ the command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size_options(parser, RESULTS, IMPLEMENTATIONS, "relu")
    args = checked_options(parser, argv, RESULTS)
    on_cpu = args.device == "cpu"

    def part(allocator: str, sizes: Iterable[int], names: Iterable[str]) -> Part:
        chosen = tuple(
            name for name in names if name == "relu" or (name in args.only and IMPLEMENTATIONS[name].installed)
        )
        inputs = tuple(itertools.product(args.dtypes, sizes))
        return Part(args.device, allocator, inputs, chosen, args.rounds, args.threads)

    sizes = args.sizes or ([4] if on_cpu else []) + default_sizes(args)
    parts = [part(args.allocator, sizes, IMPLEMENTATIONS)]
    if on_cpu and not args.quick and not args.sizes:
        parts.append(part("default", [2**26], _IN_PLACE_STUDY))
    for name in args.only:
        if not IMPLEMENTATIONS[name].installed:
            print(f"Skipped, not installed: {name}")
    run_parts("bench.peers", SWEEP, parts, args.out)


if __name__ == "__main__":
    main()
