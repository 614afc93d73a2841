"""`python -m bench.memory`: the bytes that networks save for backward, their peak memory, and the time of a step."""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import coarsegrad as cg
from coarsegrad._text import format_table
from coarsegrad.experiments.models import lenet5
from coarsegrad.experiments.transformers import OPT_1_3B, OPT_125M, T5_SMALL, Opt, T5Encoder

from .sweep import DTYPES, add_device, find_device
from .timing import (
    BenchError,
    CpuTimer,
    GpuTimer,
    at_least,
    facts,
    in_new_process,
    interleaved,
    quantiles,
    write_csv,
)

RESULTS = Path(__file__).parent / "results" / "memory.csv"

_DESCRIPTION = """
Measures training steps of some networks with nn.ReLU, with nn.ReLU in
checkpointed networks, with relu and torch.fake_quantize, with the 2-bit
activations of brevitas and torchao if installed, and with QReLU (2 bits, relu),
its outputs saved as they are and as packed codes. The T5 has dropout, which QReLU
applies itself.
"""
_EPILOG = """
saved: bytes that autograd saves in the forward, counted by
coarsegrad.saved_memory. peak: the rise of a new process's resident memory during
a step, with the gradients of the weights already allocated; malloc returns large
blocks at once there, otherwise fragmentation would be measured. time: the median
over rounds in which all take turns in one process, and the median ratio to QReLU
with unpacked outputs, round by round. Before anything is timed, the gradients of
QReLU with and without packing are compared, bit for bit; if one differs, nothing
is reported.

--device cuda measures larger networks. There the peak is the rise of memory
allocated by torch, in one process, and the time is by CUDA events, with all
launches queued.
"""


class _FakeQuantizedReLU(nn.Module):
    """The staircase of the same levels from torch's parts: relu, then fake_quantize (which rounds to nearest)."""

    def forward(self, x: Tensor) -> Tensor:
        alpha = cg.nn.half_gaussian_alpha(2)
        y = torch.fake_quantize_per_tensor_affine(torch.relu(x).float(), alpha, 0, 0, 3)
        return y.to(x.dtype)


def _brevitas() -> nn.Module:
    from brevitas.nn import QuantReLU

    return QuantReLU(bit_width=2)


def _torchao() -> nn.Module:
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    config = IntxFakeQuantizeConfig(torch.uint2, "per_token", is_symmetric=False)
    return nn.Sequential(nn.ReLU(), IntxFakeQuantizer(config))


@dataclass(frozen=True)
class Network:
    """build(activation, dropout after it) -> the network; input() -> its input; dropout: its probability."""

    build: Callable[[Callable[[], nn.Module], float], nn.Module]
    input: Callable[[], Tensor]
    dropout: float = 0.0


def _mlp(activation: Callable[[], nn.Module], dropout: float) -> nn.Module:
    hidden = [part for _ in range(4) for part in (nn.Linear(512, 512), activation())]
    return nn.Sequential(*hidden, nn.Linear(512, 10))


def _tokens() -> Tensor:
    return torch.randint(1024, (4, 256))


def _opt(activation: Callable[[], nn.Module], dropout: float) -> nn.Module:
    return Opt(OPT_125M.resized(layers=2, vocabulary=1024), activation)


def _t5(activation: Callable[[], nn.Module], dropout: float) -> nn.Module:
    return T5Encoder(T5_SMALL.resized(layers=2, vocabulary=1024, dropout=dropout), activation)


NETWORKS = {
    "mlp": Network(_mlp, lambda: torch.randn(16384, 512)),
    "lenet": Network(lambda activation, _: lenet5(activation), lambda: torch.randn(256, 1, 28, 28)),
    "opt": Network(_opt, _tokens),
    "t5": Network(_t5, _tokens, T5_SMALL.dropout),
}


def _wide_mlp(activation: Callable[[], nn.Module], dropout: float) -> nn.Module:
    hidden = [part for _ in range(4) for part in (nn.Linear(4096, 4096), activation())]
    return nn.Sequential(*hidden, nn.Linear(4096, 10))


# On a GPU: transformers at full size, on 16,384 and 4,096 tokens.
GPU_NETWORKS = {
    "wide mlp": Network(_wide_mlp, lambda: torch.randn(32768, 4096)),
    "OPT-125M": Network(
        lambda activation, _: Opt(OPT_125M, activation), lambda: torch.randint(OPT_125M.vocabulary, (16, 1024))
    ),
    "OPT-1.3B": Network(
        lambda activation, _: Opt(OPT_1_3B, activation), lambda: torch.randint(OPT_1_3B.vocabulary, (4, 1024))
    ),
    "T5-small": Network(
        lambda activation, dropout: T5Encoder(T5_SMALL.resized(dropout=dropout), activation),
        lambda: torch.randint(T5_SMALL.vocabulary, (32, 512)), T5_SMALL.dropout,
    ),
}  # fmt: skip
_PEERS = {"brevitas": _brevitas, "relu, torchao": _torchao}


def _activations() -> dict[str, Callable[[], nn.Module]]:
    """All of them by name; a peer that is not installed is left out."""
    peers = {name: make for name, make in _PEERS.items() if importlib.util.find_spec(name.split(", ")[-1])}
    return {
        "relu": nn.ReLU,
        "relu, checkpoint": nn.ReLU,
        "relu, fake_quantize": _FakeQuantizedReLU,
        **peers,
        "qrelu": cg.QReLU,
        "qrelu, packed": cg.QReLU,
    }


def _set_up(
    network: str, activation: str, dtype: str, device: str = "cpu"
) -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    """(the network, its forward for this activation, the input)."""
    torch.manual_seed(0)
    plan = (NETWORKS | GPU_NETWORKS)[network]
    make, dropout = _activations()[activation], plan.dropout
    if make is cg.QReLU:
        make, dropout = (lambda: cg.QReLU(2, ste="relu", dropout=plan.dropout)), 0.0
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")  # deprecations within the peers
        x = plan.input()
        model = plan.build(make, dropout).to(device, DTYPES[dtype])
    if activation == "qrelu, packed":
        cg.pack_activations_(model)
    checkpointed = activation == "relu, checkpoint"
    forward = (lambda x: checkpoint(model, x, use_reentrant=False)) if checkpointed else model
    return model, forward, x.to(DTYPES[dtype]) if x.is_floating_point() else x


def _step(forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
    forward(x).float().square().mean().backward()


def _resident(word: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, resident now, or VmHWM, the maximum so far."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(word))
    except (OSError, StopIteration):
        raise BenchError("peak memory is read from Linux's /proc/self/status, which is missing") from None
    return 1024 * int(line.split()[1])


def _peak(network: str, activation: str, dtype: str, threads: int) -> tuple[int, int | None]:
    """(bytes by which a step raises resident memory, bytes saved by its forward or None if hooks hide them)."""
    torch.set_num_threads(threads)
    model, forward, x = _set_up(network, activation, dtype)
    _step(forward, x[:2])  # one-time allocations: gradients of the weights, and the libraries' own
    Path("/proc/self/clear_refs").write_text("5")  # resets the maximum to what is resident now
    before = _resident("VmRSS")
    _step(forward, x)
    peak = _resident("VmHWM") - before
    kept = cg.saved_memory(forward, x)
    return peak, None if kept.unseen else kept.total


def _times(network: str, dtype: str, threads: int, rounds: int) -> dict[str, tuple[float, float]]:
    """activation -> (median seconds of a step, median of its time over that of "qrelu", round by round)."""
    torch.set_num_threads(threads)
    jobs, gradients, names = {}, {}, list(_activations())
    with tqdm(total=len(names) + rounds, desc=f"{network}, {dtype}: time", disable=None, leave=False) as progress:
        for activation in names:
            model, forward, x = _set_up(network, activation, dtype)
            torch.manual_seed(0)  # for dropout
            _step(forward, x)
            gradients[activation] = [p.grad.clone() for p in model.parameters()]
            jobs[activation] = lambda forward=forward, x=x: _step(forward, x)
            progress.update()
        if not all(map(torch.equal, gradients["qrelu"], gradients["qrelu, packed"])):
            raise BenchError(f"packing changes a gradient of {network} in {dtype}; nothing is reported")
        times = interleaved(jobs, CpuTimer(), rounds, progress.update)
    return {
        name: (quantiles(own.seconds)[1], statistics.median(times["qrelu"].speeds_over(own)))
        for name, own in times.items()
    }


def _on_gpu(network: str, dtype: str, rounds: int) -> dict[str, tuple[float, float, int, int | None]]:
    """activation -> (*results of _times, *results of _peak), on the GPU and in one process."""
    jobs, gradients, memory = {}, {}, {}
    for activation in _activations():
        model, forward, x = _set_up(network, activation, dtype, "cuda")
        if activation.startswith("qrelu"):
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.manual_seed(0)  # for dropout
            with sdpa_kernel(SDPBackend.MATH):
                _step(forward, x)
            gradients[activation] = [p.grad.clone() for p in model.parameters()]
            torch.use_deterministic_algorithms(False)
        _step(forward, x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(forward, x)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        kept = cg.saved_memory(forward, x)
        memory[activation] = peak, None if kept.unseen else kept.total
        jobs[activation] = lambda forward=forward, x=x: _step(forward, x)
    if not all(map(torch.equal, gradients["qrelu"], gradients["qrelu, packed"])):
        raise BenchError(f"packing changes a gradient of {network} in {dtype}; nothing is reported")
    times = interleaved(jobs, GpuTimer(torch.device("cuda"), cold=False), rounds, lambda: None)
    return {
        name: (quantiles(own.seconds)[1], statistics.median(times["qrelu"].speeds_over(own)), *memory[name])
        for name, own in times.items()
    }


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    network_options(
        parser, [*NETWORKS, *GPU_NETWORKS], None, 10, "default: bfloat16; float32 on a CPU without bfloat16 products"
    )
    add_device(parser, RESULTS)
    args = parser.parse_args(argv)
    find_device(parser, args, RESULTS)
    if args.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the gradients are compared bit for bit
    known = NETWORKS if args.device == "cpu" else GPU_NETWORKS
    args.networks = args.networks or list(known)
    if unknown := set(args.networks) - known.keys():
        parser.error(f"--networks {', '.join(sorted(unknown))}: on {args.device} there are {', '.join(known)}")
    if not args.dtypes:
        slow = args.device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        args.dtypes = ["float32" if slow else "bfloat16"]
        if slow:
            print("float32: torch's bfloat16 products are many times slower on this CPU; --dtypes bfloat16 overrides")
    torch.set_num_threads(args.threads)  # as in the processes that measure
    here = facts(torch.device(args.device), "default")
    rows: list[dict[str, object]] = []
    try:
        for network, dtype in product(args.networks, args.dtypes):
            rows += ({**row, **here} for row in _rows(network, dtype, args))
            write_csv(rows, args.out)
    except BenchError as error:
        raise SystemExit(f"bench.memory: {error}") from error
    for name in sorted(_PEERS.keys() - _activations().keys()):
        print(f"\nSkipped, not installed: {name.split(', ')[-1]}")
    print(f"\nWritten: {args.out}. `python -m bench.report` draws it.")


def _rows(network: str, dtype: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """One network in one dtype, measured and printed."""
    if args.device == "cuda":
        found = in_new_process("default", _on_gpu, network, dtype, args.rounds)
    else:
        times = in_new_process("default", _times, network, dtype, args.threads, args.rounds)
        found = {
            name: (*times[name], *in_new_process("return", _peak, network, name, dtype, args.threads))
            for name in tqdm(_activations(), f"{network}, {dtype}: peak", disable=None, leave=False)
        }
    rows = []
    for activation, (seconds, ratio, peak, kept) in found.items():
        rows.append({
            "network": network, "dtype": dtype, "activation": activation, "kept_bytes": "" if kept is None else kept,
            "peak_bytes": peak, "seconds_median": f"{seconds:.6g}", "time_over_qrelu_median": f"{ratio:.4g}",
        })  # fmt: skip
    table = [
        (
            row["activation"],
            f"{row['kept_bytes'] / 2**20:.2f}" if row["kept_bytes"] != "" else "hidden",
            f"{row['peak_bytes'] / 2**20:.1f}",
            f"{float(row['seconds_median']) * 1e3:.1f}",
            f"{float(row['time_over_qrelu_median']):.3f}",
        )
        for row in rows
    ]
    print(f"\n{network}, {dtype}, {args.device}, {args.threads} threads\n")
    print(format_table(("activation", "saved, MiB", "peak, MiB", "step, ms", "over qrelu"), table), flush=True)
    return rows


if __name__ == "__main__":
    main()
