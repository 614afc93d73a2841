"""`python -m bench.kernels`: the time of each kernel relative to copying as many bytes."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import coarsegrad as cg
from coarsegrad import _ops
from coarsegrad._types import AlphaGrad, MaskKind, Rounding, Ste

from . import against
from .sweep import (
    DTYPES,
    Case,
    Part,
    Sweep,
    checked_options,
    copying,
    default_sizes,
    size_label,
    size_options,
    timed,
)
from .timing import BenchError, Row, Times, quantiles

RESULTS = Path(__file__).parent / "results" / "kernels.csv"

_DESCRIPTION = """
Times the kernels behind QReLU: forward with a mask at 1 to 8 bits, backward from
the mask, from x and from codes, the gradient of a learned step, codes to levels,
the signed staircase with a dynamic alpha per group of 128, and an RMSNorm of rows
of 1024 with that staircase, as one op and as torch's norm and a staircase; each is
compared with a copy.
"""
_EPILOG = """
Default sizes: 2^16 (in cache), 2^22, 2^24 and 2^26 elements, on a GPU 2^27 for
the last; with --quick 2^16 and 2^22.

Before a size is timed, the results of each kernel are compared with the
reference: outputs, masks, codes and masked gradients bit for bit, a gradient with
an exponential or a division within some ulps, the gradient of a step within 1e-5
of the sum of its terms' magnitudes. If one is wrong, no times are reported. All
kernels take turns in one process, in a new order each round. A time is the median
over the rounds, with the 20% and 80% quantiles.

"of copy" is the kernel's time divided by the time in which a copy moves as many
bytes, reading and writing each element once: the ratio of medians, with quantiles
round by round. The copy is of the tensor that the kernel reads (of both in turn,
if it reads x and dy) into a new one, like a kernel's output: placement in memory
changes either time by a fifth. It has the loads, stores (non-temporal from 8 MiB
on) and threads of the kernels and no arithmetic; on a GPU, and without the native
library, it is Tensor.copy_.

--against CHECKOUT measures two builds instead: this one and that of another
checkout, its package and its native library, say of the commit before
(`git worktree add --detach CHECKOUT COMMIT`, then `make build` in it). Each has a
process of its own, and checks its results against its own reference; the processes
take turns in each round, never two at once. "ratio" is this build's time over the
other's, the median of the rounds with the 20% and 80% quantiles. "itself" is the
same ratio to this build in yet another process, which says how much is chance:
every process places its memory anew. Kernels that the other build lacks are named
and left out. Nothing is written without --out.
"""

# ------------------------------------------------------------------------------------- the kernels

ALPHA, BITS = 0.4866, 2
GROUP, ROW = 128, 1024
# What has its own alpha: (how many, contiguous elements of each).
LAYOUTS = {"channel": (64, 256), "feature": (256, 1), "group": (1, GROUP)}
_Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Kernel:
    """numbers, bits: what it moves per element: numbers of x's dtype and packed bits. copied: what to compare it with a
    copy of.

    rtol: the relative tolerance of its gradient, in units of the dtype's eps. sums: whether its second result is a sum
    over the tensor.
    """

    numbers: int
    bits: float
    copied: tuple[str, ...]
    call: Callable[[_Tensors], tuple[Tensor, ...]]
    rtol: float = 0.0
    sums: bool = False


def _shaped(tensor: Tensor, per: str | None) -> Tensor:
    return tensor.view(-1, *LAYOUTS[per]) if per else tensor


def _forward(
    bits: int, mask: str = "inside", codes: bool = False, per: str | None = None
) -> Callable[[_Tensors], tuple[Tensor, ...]]:
    count, channel_dim = (LAYOUTS[per][0], 1) if per else (1, None)
    return lambda t: _ops.ops.qrelu_forward(
        _shaped(t["x"], per), t["alpha"].expand(count), bits, Rounding.ceil, MaskKind[mask], codes, channel_dim
    )


def _backward(
    ste: str, *kept: str, rule: str = "three_valued", learned: bool = False, per: str | None = None
) -> Callable[[_Tensors], tuple[Tensor, ...]]:
    """From what is kept: "x" (and alpha), "mask" or "state", "codes"."""
    channel_dim = 1 if per else None
    settings = (BITS, Ste[ste], Rounding.ceil, AlphaGrad[rule], 1.0, channel_dim, True, learned)
    mask = "state" if "state" in kept else "mask"

    def call(t: _Tensors) -> tuple[Tensor, ...]:
        dy = _shaped(t["dy"], per)
        arguments = [t[name] if name in kept else None for name in ("x", mask, "codes")]
        return _ops.ops.qrelu_backward(dy, t["alpha"] if "x" in kept else None, *arguments, *settings)

    return call


def _signed(bits: int) -> Callable[[_Tensors], tuple[Tensor, ...]]:
    return lambda t: _ops.ops.qsigned_forward(t["x"], None, bits, GROUP, False, False, None)


def _norm(t: _Tensors, one_op: bool) -> tuple[Tensor, ...]:
    """RMSNorm of rows and its staircase of 4 bits; or the norm of torch, and then a staircase."""
    x = t["x"].view(-1, math.gcd(t["x"].numel(), ROW))
    if one_op:
        staircase = (4, GROUP, None)
        return _ops.ops.norm_qsigned(x, None, None, 1e-6, False, False, False, *staircase, False, False)
    return _ops.ops.qsigned_forward(F.rms_norm(x, x.shape[1:], None, 1e-6), None, 4, GROUP, False, False, None)


_X, _DY = ("x",), ("dy",)
KERNELS = {
    **{f"forward, {bits} bit{'s' * (bits > 1)}": Kernel(2, 1, _X, _forward(bits)) for bits in (1, 2, 3, 4, 6, 8)},
    "forward, 2 bits, per feature": Kernel(2, 1, _X, _forward(2, per="feature")),
    "forward to codes, 2 bits": Kernel(2, 2, _X, _forward(2, "nothing", codes=True)),
    "backward, clipped_relu": Kernel(2, 1, _DY, _backward("clipped_relu", "mask")),
    "backward, log_tailed_relu": Kernel(3, 0, _X + _DY, _backward("log_tailed_relu", "x"), rtol=16),
    "backward, reverse_exponential": Kernel(3, 0, _X + _DY, _backward("reverse_exponential", "x"), rtol=16),
    "backward, reverse_exponential_step": Kernel(
        2, 2, _DY, lambda t: (
            _ops.ops.qrelu_backward_from_codes(t["dy"], t["codes"], BITS, "reverse_exponential_step"),)
    ),
    "backward, learned step": Kernel(2, 2, _DY, _backward("clipped_relu", "state", learned=True), sums=True),
    **{
        f"backward, learned step, per {per}": Kernel(
            2, 2, _DY, _backward("clipped_relu", "state", learned=True, per=per), sums=True
        )
        for per in LAYOUTS
    },
    "backward, learned step, exact": Kernel(
        2, 3, _DY, _backward("clipped_relu", "mask", "codes", rule="exact", learned=True), sums=True
    ),
    "codes to levels, 2 bits": Kernel(
        1, 2, _X, lambda t: (_ops.ops.dequantize(
            t["codes"], t["alpha"], BITS, t["x"].shape, t["x"].dtype, None, torch.contiguous_format),)
    ),
    **{f"signed, {bits} bits, per group": Kernel(2, 16 / GROUP, _X, _signed(bits)) for bits in (4, 8)},
    **{
        f"norm, signed, {ops}, per group": Kernel(2, 16 / GROUP, _X, functools.partial(_norm, one_op=ops == "one op"))
        for ops in ("one op", "two ops")
    },
}  # fmt: skip
COPIES = {"copy of x": "x", "copy of dy": "dy"}


def _inputs(dtype: torch.dtype, size: int, device: str) -> _Tensors:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
    t = {"x": x, "dy": dy, "alpha": torch.tensor([ALPHA], device=device)}
    forward = _ops.ops.qrelu_forward
    _, t["mask"], t["codes"] = forward(x, t["alpha"], BITS, Rounding.ceil, MaskKind.inside, True, None)
    _, t["state"], _ = forward(x, t["alpha"], BITS, Rounding.ceil, MaskKind.state, False, None)
    return t


def _check(name: str, kernel: Kernel, got: tuple[Tensor, ...], t: _Tensors) -> None:
    """A piece of 2^20 elements at a time, as the reference takes many times the memory."""
    size, dtype = t["x"].numel(), t["x"].dtype
    pieces = -(-size // 2**20)
    totals = 0.0
    for piece in range(pieces):

        def of(a: Tensor) -> Tensor:
            a = a.flatten()
            return a[a.numel() * piece // pieces : a.numel() * (piece + 1) // pieces]

        with cg.use_backend("reference"):
            wanted = kernel.call({key: value if key == "alpha" else of(value) for key, value in t.items()})
        if kernel.sums:
            totals = totals + wanted[1].double()
            wanted = wanted[:1]
        for mine, right in zip(got, wanted):
            mine, right = of(mine), right.flatten()
            if kernel.rtol and mine.is_floating_point():
                # Where g' underflows the two may differ by a subnormal.
                allowed = kernel.rtol * torch.finfo(dtype).eps * right.double().abs() + torch.finfo(dtype).tiny
                good = bool(((mine.double() - right.double()).abs() <= allowed).all())
            else:
                good = torch.equal(mine, right)
            if not good:
                raise BenchError(
                    f"{name!r} differs from the reference in elements {size * piece // pieces} to"
                    f" {size * (piece + 1) // pieces} of {size} ({dtype}); no times are reported"
                )
    if kernel.sums:
        scale = 2**BITS * t["dy"].double().abs().sum()
        if ((got[1].double() - totals).abs() > 1e-5 * scale).any():
            raise BenchError(f"the step's gradient in {name!r} is not the reference's ({dtype}); no times are reported")


def _cases(part: Part, dtype: str, size: int) -> Iterator[Case]:
    t = _inputs(DTYPES[dtype], size, part.device)
    jobs = {name: lambda source=t[key]: copying(torch.empty_like(source), source)() for name, key in COPIES.items()}
    for name in part.names:
        kernel = KERNELS[name]
        if any(f"per {per}" in name and size % math.prod(shape) for per, shape in LAYOUTS.items()):
            continue
        _check(name, kernel, kernel.call(t), t)
        jobs[name] = lambda kernel=kernel: kernel.call(t)
    yield Case("", jobs)


# -------------------------------------------------------------------------------------- the report


def _rows(dtype: str, size: int, _: str, times: dict[str, Times]) -> list[Row]:
    """The CSV: a row for each kernel."""
    itemsize = DTYPES[dtype].itemsize
    copy_bytes, rows = 2 * itemsize, []
    for name, own in times.items():
        kernel = KERNELS.get(name)
        moved = kernel.numbers * itemsize + kernel.bits / 8 if kernel else copy_bytes
        copies = [copy for copy, key in COPIES.items() if key in kernel.copied] if kernel else [name]
        copy = Times(1, [statistics.mean(each) for each in zip(*(times[copy].seconds for copy in copies))])
        low, _, high = (share / (moved / copy_bytes) for share in quantiles(copy.speeds_over(own)))
        median = quantiles(own.seconds)[1]
        rows.append({
            "dtype": dtype, "size": size, "kernel": name, "bytes_per_element": f"{moved:g}", **timed(own),
            "gb_per_second": f"{size * moved / median / 1e9:.4g}",
            "time_over_copy": f"{median / quantiles(copy.seconds)[1] / (moved / copy_bytes):.4g}",
            "time_over_copy_q20": f"{low:.4g}", "time_over_copy_q80": f"{high:.4g}",
        })  # fmt: skip
    return rows


_COLUMNS = "{:<9}{:>5}  {:<36}{:>10}  {:<22}{:>6}{:>8}  {}"
_HEADER = _COLUMNS.format("dtype", "size", "kernel", "us", "(20% to 80%)", "GB/s", "of copy", "(20% to 80%)")


def _line(row: Row) -> str:
    low, median, high = (1e6 * float(row[f"seconds_{q}"]) for q in ("q20", "median", "q80"))
    return _COLUMNS.format(
        row["dtype"], size_label(row["size"]), row["kernel"], f"{median:.1f}", f"({low:.1f} to {high:.1f})",
        f"{float(row['gb_per_second']):.1f}", f"{float(row['time_over_copy']):.2f}",
        f"({float(row['time_over_copy_q20']):.2f} to {float(row['time_over_copy_q80']):.2f})",
    )  # fmt: skip


SWEEP = Sweep(_cases, _rows, _HEADER, _line)

# ------------------------------------------------------------------------------------ the command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size_options(parser, RESULTS, KERNELS, *COPIES)
    against.add_option(parser)
    args = checked_options(parser, argv, RESULTS)
    against.check_option(parser, args)
    beyond_caches = [2**26] if args.device == "cpu" and not args.quick else []
    sizes = args.sizes or default_sizes(args) + beyond_caches
    names = tuple(name for name in KERNELS if name in args.only)
    inputs = tuple(itertools.product(args.dtypes, sizes))
    part = Part(args.device, args.allocator, inputs, names, args.rounds, args.threads)
    against.run("bench.kernels", SWEEP, part, args)


if __name__ == "__main__":
    main()
