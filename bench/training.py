"""`python -m bench.training`: the time of whole training steps, and the activation's share of it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import coarsegrad as cg
from coarsegrad._text import format_table

from .memory import NETWORKS, network_options
from .sweep import DTYPES
from .timing import BenchError, CpuTimer, Times, facts, in_new_process, interleaved, quantiles, write_csv

RESULTS = Path(__file__).parent / "results" / "training.csv"

_DESCRIPTION = """
Times training steps (forward, backward, SGD) of an MLP, LeNet-5, and OPT- and
T5-like transformers: with nn.ReLU, with QReLU (2 bits, clipped_relu), with QReLU
whose outputs are saved as packed codes, and without activations.
"""
_EPILOG = """
A time is the median over rounds in which all take turns in one process, with the
20% and 80% quantiles. "share" is the activation's part of a step: the median of
1 - (step without activations) / (this step), round by round; with packed outputs
it includes rebuilding them. Before anything is timed, the gradients of QReLU are
compared with those of the reference backend, bit for bit; if one differs, nothing
is reported.
"""


def _qrelu() -> nn.Module:
    return cg.QReLU(2)


# name -> (the activation, whether outputs are packed)
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "none": (nn.Identity, False),
    "relu": (nn.ReLU, False),
    "qrelu": (_qrelu, False),
    "qrelu, packed": (_qrelu, True),
}


def _set_up(network: str, activation: str, dtype: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, packed = ACTIVATIONS[activation]
    plan = NETWORKS[network]
    x = plan.input()
    model = plan.build(make, 0.0).to(DTYPES[dtype])
    if packed:
        cg.pack_activations_(model)
    return model, x.to(DTYPES[dtype]) if x.is_floating_point() else x


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).float().square().mean().backward()
    optimizer.step()


def _gradients(network: str, activation: str, dtype: str) -> list[Tensor]:
    model, x = _set_up(network, activation, dtype)
    model(x).float().square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _measure(network: str, dtype: str, threads: int, rounds: int) -> dict[str, Times]:
    torch.set_num_threads(threads)
    with cg.use_backend("reference"):
        wanted = _gradients(network, "qrelu", dtype)
    for activation in ("qrelu", "qrelu, packed"):
        if not all(map(torch.equal, _gradients(network, activation, dtype), wanted)):
            raise BenchError(f"a gradient of {network} in {dtype} with {activation} differs from the reference's")
    jobs = {}
    for activation in ACTIVATIONS:
        model, x = _set_up(network, activation, dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        jobs[activation] = lambda model=model, optimizer=optimizer, x=x: _step(model, optimizer, x)
    return interleaved(jobs, CpuTimer(), rounds, lambda: None)


def _rows(network: str, dtype: str, times: dict[str, Times]) -> list[dict[str, object]]:
    rows = []
    for activation, own in times.items():
        low, median, high = quantiles(own.seconds)
        over_relu = quantiles([1 / speed for speed in own.speeds_over(times["relu"])])[1]
        share = quantiles([1 - without / mine for without, mine in zip(times["none"].seconds, own.seconds)])[1]
        rows.append({
            "network": network, "dtype": dtype, "activation": activation, "seconds_median": f"{median:.6g}",
            "seconds_q20": f"{low:.6g}", "seconds_q80": f"{high:.6g}", "time_over_relu_median": f"{over_relu:.4g}",
            "share_of_activation_median": f"{share:.4f}", "rounds": len(own.seconds),
        })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    network_options(parser, list(NETWORKS), "float32", 15)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="CSV", help=f"the results (default {os.path.relpath(RESULTS)})"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)  # as in the processes that measure
    here = facts(torch.device("cpu"), "keep")
    rows = []
    try:
        for network in args.networks or NETWORKS:
            for dtype in args.dtypes:
                times = in_new_process("keep", _measure, network, dtype, args.threads, args.rounds)
                found = _rows(network, dtype, times)
                rows += found
                print(f"\n{network}, {dtype}, {args.threads} threads\n")
                table = [
                    (
                        row["activation"],
                        f"{float(row['seconds_median']) * 1e3:.2f}",
                        f"{float(row['time_over_relu_median']):.3f}",
                        f"{float(row['share_of_activation_median']):.1%}",
                    )
                    for row in found
                ]
                print(format_table(("activation", "step, ms", "over relu", "share"), table), flush=True)
    except BenchError as error:
        raise SystemExit(f"bench.training: {error}") from error
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written.")
        raise SystemExit(130) from None
    write_csv(({**row, **here} for row in rows), args.out)
    print(f"\nWritten: {args.out}. `python -m bench.report` draws it.")


if __name__ == "__main__":
    main()
