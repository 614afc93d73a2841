"""`python -m bench.autograd`: the cost of a call with the derivative in C++, and what it would be in Python."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import coarsegrad as cg
from coarsegrad import _ops
from coarsegrad._text import format_table

from .activations import ALPHA, BITS
from .timing import BenchError, CpuTimer, Times, at_least, interleaved, quantiles

SIZE = 4

_DESCRIPTION = f"""
Times forward and backward of a 2-bit staircase of {SIZE} elements, where the cost
is the call. All forms run the same kernels and take turns in one process, on one
thread. A time is the median over the rounds, with the 20% and 80% quantiles; the
ratio is that of medians.
"""

_OPTIONS = (BITS, "clipped_relu", "ceil", "exact", 1.0, None)


def forms() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """y from x and alpha, by name; the first is what users call."""
    return {
        "cg.qrelu: the derivative in C++": lambda x, alpha: cg.qrelu(x, alpha, bits=BITS),
        "op: the derivative in C++": lambda x, alpha: _ops.ops.qrelu.default(x, alpha, *_OPTIONS),
        "op: the derivative in Python": lambda x, alpha: _ops.ops.qrelu_custom.default(x, alpha, *_OPTIONS),
        "torch.relu": lambda x, alpha: torch.relu(x),
    }


def measured(rounds: int) -> dict[str, Times]:
    """Times of each form, whose outputs and gradients are first compared."""
    if _ops.native is None:
        raise BenchError(f"there is nothing to compare without the native library: {_ops.native_why_not}")
    x, alpha = torch.linspace(-ALPHA, 4 * ALPHA, SIZE).requires_grad_(), torch.tensor([ALPHA])
    grad_y = torch.ones(SIZE)

    def job(form: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def forward_and_backward() -> tuple[Tensor, Tensor]:
            y = form(x, alpha)
            return y, torch.autograd.grad(y, x, grad_y)[0]

        return forward_and_backward

    jobs = {name: job(form) for name, form in forms().items()}
    first, *others = [torch.stack(jobs[name]()) for name in jobs if name != "torch.relu"]
    if not all(torch.equal(first, other) for other in others):
        raise BenchError("the forms differ in their results")
    return interleaved(jobs, CpuTimer(), rounds, lambda: None)


def table(times: dict[str, Times]) -> str:
    base = statistics.median(next(iter(times.values())).seconds)
    rows = []
    for name, found in times.items():
        low, median, high = (1e6 * value for value in quantiles(found.seconds))
        rows.append((name, f"{median:.1f}", f"{low:.1f} to {high:.1f}", f"{median / (1e6 * base):.2f}"))
    return format_table((f"{SIZE} elements", "us", "20% to 80%", "ratio"), rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.autograd", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=at_least(2), default=200, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        print(table(measured(arguments.rounds)))
    except BenchError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
