"""`python -m bench.training`: the time of whole training steps and of inference, eager and compiled."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import torch._inductor.config
from torch import Tensor, nn
from tqdm import tqdm

import coarsegrad as cg
from coarsegrad._text import format_table
from coarsegrad.experiments.models import resnet18, resnet20

from .networks import RELU_NETWORKS, ReluNetwork, Run, compiled, gradients
from .sweep import DTYPES, network_options, results_file
from .timing import BenchError, CpuTimer, Times, facts, in_new_process, interleaved, quantiles, write_csv

RESULTS = Path(__file__).parent / "results" / "training.csv"

_DESCRIPTION = """
Times training steps (forward, backward, SGD) and the forward in inference of an
MLP, LeNet-5, OPT- and T5-like transformers, ResNet-20 and ResNet-18 (networks of
convolutions in channels_last): with nn.ReLU,
with QReLU (2 bits, clipped_relu), with QReLU whose outputs are saved as packed
codes, and without activations; each in eager mode and compiled by torch.compile.
"""
_EPILOG = """
A time is the median over rounds in which all take turns in one process, with the
20% and 80% quantiles. "over relu" is the median ratio to nn.ReLU in the same mode.
"share" is the activation's part of the time: the median of 1 - (time without
activations) / (this time), round by round; with packed outputs it includes
rebuilding them. Before anything is timed, the gradients of QReLU are compared, bit
for bit: in eager mode with those of the reference backend, compiled with packed
outputs with those without. If one differs, nothing is reported. "compile" is the
time of the first compiled step with empty caches, measured once.
"""

NETWORKS = RELU_NETWORKS | {
    "resnet": ReluNetwork(lambda activation, _: resnet20(activation), lambda: torch.randn(64, 3, 32, 32)),
    "resnet18": ReluNetwork(lambda activation, _: resnet18(activation), lambda: torch.randn(4, 3, 224, 224)),
}


def _qrelu() -> nn.Module:
    return cg.QReLU(2)


# name -> (the activation, whether outputs are packed)
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "none": (nn.Identity, False),
    "relu": (nn.ReLU, False),
    "qrelu": (_qrelu, False),
    "qrelu, packed": (_qrelu, True),
}
MODES = ("eager", "compiled")


def _set_up(network: str, activation: str, dtype: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, packed = ACTIVATIONS[activation]
    plan = NETWORKS[network]
    x = plan.input()
    model = plan.make(make, 0.0).to(DTYPES[dtype])
    if x.dim() == 4:  # in which convolutions are faster, so that Inductor brings all into it in any case
        model, x = (each.to(memory_format=torch.channels_last) for each in (model, x))
    if packed:
        cg.pack_activations_(model)
    return model, x.to(DTYPES[dtype]) if x.is_floating_point() else x


def _run(model: nn.Module, mode: str) -> Run:
    return model if mode == "eager" else compiled(model)


def _step(run: Run, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    run(x).float().square().mean().backward()
    optimizer.step()


@torch.no_grad()
def _infer(run: Run, x: Tensor) -> Tensor:
    return run(x)


def _compare(network: str, dtype: str, activation: str, got: list[Tensor], wanted: list[Tensor], of: str) -> None:
    if len(got) != len(wanted) or not all(map(torch.equal, got, wanted)):
        raise BenchError(f"a gradient of {network} in {dtype} with {activation} differs from {of}")


def _measure(
    network: str, dtype: str, threads: int, rounds: int
) -> tuple[dict[tuple[str, str, str], Times], dict[str, float]]:
    """The times of each (pass, mode, activation), and the seconds of each activation's first compiled step."""
    torch.set_num_threads(threads)
    torch._inductor.config.force_disable_caches = True
    with cg.use_backend("reference"):
        model, x = _set_up(network, "qrelu", dtype)
        wanted = {"eager": gradients(model, model, x)}
    jobs, first_step = {}, {}
    cases = list(product(MODES, ACTIVATIONS))
    for mode, activation in tqdm(cases, desc=f"{network}, {dtype}: set up", leave=False):
        model, x = _set_up(network, activation, dtype)
        run = _run(model, mode)
        start = time.perf_counter()
        got = gradients(model, run, x)
        if mode == "compiled":
            first_step[activation] = time.perf_counter() - start
        if "qrelu" in activation:
            of = "the reference's" if mode == "eager" else "that without packing, compiled"
            _compare(network, dtype, f"{activation}, {mode},", got, wanted.setdefault(mode, got), of)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        jobs["step", mode, activation] = lambda run=run, optimizer=optimizer, x=x: _step(run, optimizer, x)
        if activation != "qrelu, packed":  # which saves nothing in inference
            model, x = _set_up(network, activation, dtype)
            jobs["inference", mode, activation] = lambda run=_run(model.eval(), mode), x=x: _infer(run, x)
    return interleaved(jobs, CpuTimer(), rounds, lambda: None), first_step


def _rows(
    network: str, dtype: str, times: dict[tuple[str, str, str], Times], first_step: dict[str, float]
) -> list[dict[str, object]]:
    rows = []
    for (what, mode, activation), own in times.items():
        low, median, high = quantiles(own.seconds)
        relu, none = times[what, mode, "relu"], times[what, mode, "none"]
        over_relu = quantiles([1 / speed for speed in own.speeds_over(relu)])[1]
        share = quantiles([1 - without / mine for without, mine in zip(none.seconds, own.seconds)])[1]
        rows.append({
            "network": network, "dtype": dtype, "pass": what, "mode": mode, "activation": activation,
            "seconds_median": f"{median:.6g}", "seconds_q20": f"{low:.6g}", "seconds_q80": f"{high:.6g}",
            "time_over_relu_median": f"{over_relu:.4g}", "share_of_activation_median": f"{share:.4f}",
            "rounds": len(own.seconds),
            "seconds_to_compile": f"{first_step[activation]:.4g}" if (what, mode) == ("step", "compiled") else "",
        })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    network_options(parser, list(NETWORKS), "float32", 15)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="CSV",
        help=f"the results (default {os.path.relpath(RESULTS)}; none for a part of the measurements)",
    )
    args = parser.parse_args(argv)
    args.out = results_file(parser, args, RESULTS)
    torch.set_num_threads(args.threads)  # as in the processes that measure
    here = facts(torch.device("cpu"), "keep")
    rows = []
    try:
        for network in args.networks or NETWORKS:
            for dtype in args.dtypes:
                found = _rows(
                    network, dtype, *in_new_process("keep", _measure, network, dtype, args.threads, args.rounds)
                )
                rows += found
                print(f"\n{network}, {dtype}, {args.threads} threads\n")
                table = [
                    (
                        row["pass"],
                        row["mode"],
                        row["activation"],
                        f"{float(row['seconds_median']) * 1e3:.2f}",
                        f"{float(row['time_over_relu_median']):.3f}",
                        f"{float(row['share_of_activation_median']):.1%}",
                        row["seconds_to_compile"],
                    )
                    for row in found
                ]
                print(
                    format_table(("pass", "mode", "activation", "ms", "over relu", "share", "compile, s"), table),
                    flush=True,
                )
    except BenchError as error:
        raise SystemExit(f"bench.training: {error}") from error
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written.")
        raise SystemExit(130) from None
    if args.out:
        write_csv(({**row, **here} for row in rows), args.out)
        print(f"\nWritten: {args.out}. `python -m bench.report` draws it.")


if __name__ == "__main__":
    main()
