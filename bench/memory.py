"""`python -m bench.memory`: the bytes that networks save for backward, their peak memory, and the time of a step."""

from __future__ import annotations

import argparse
import os
import statistics
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import coarsegrad as cg
from coarsegrad._text import format_table

from .networks import GPU_NETWORKS, NETWORKS, Run, gradients, missing_peers, set_up
from .sweep import add_device, find_device, network_options
from .timing import BenchError, CpuTimer, GpuTimer, Times, facts, in_new_process, interleaved, quantiles, write_csv

RESULTS = Path(__file__).parent / "results" / "memory.csv"

_DESCRIPTION = """
Measures training steps of networks with nn.ReLU, with nn.ReLU in checkpointed
networks, with relu and torch.fake_quantize, with the 2-bit activations of brevitas
and torchao if installed, and with QReLU (2 bits, relu), its outputs saved as they
are and as packed codes; some of them compiled as well. The T5 has dropout, which
QReLU applies itself. smollm2 is a Llama of the shape of SmolLM2-135M on 2,048
tokens (needs transformers): as it is, checkpointed, and with signed staircases in
its blocks, of inputs, gates, norms, and (8 bits) q, k and v, in groups of 64; with
4 bits the inputs are rotated. On a GPU with Liger's kernels too, if installed.
"""
_EPILOG = """
saved: bytes that autograd saves in the forward, counted by
coarsegrad.saved_memory. peak: the rise of a new process's resident memory during
a step, with the gradients of the weights already allocated; malloc returns large
blocks at once there, otherwise fragmentation would be measured. time: the median
over rounds in which all take turns in one process, and the median ratio to the
first variant, without staircases, round by round. Before anything is timed, the
gradients of every packed variant and the same without packing are compared, bit
for bit; if one differs, nothing is reported.

--device cuda measures larger networks. There the peak is the rise of memory
allocated by torch, in one process, and the time is by CUDA events, with all
launches queued.
"""


def _step(forward: Run, x: Tensor) -> None:
    forward(x).float().square().mean().backward()


def _resident(word: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, resident now, or VmHWM, the maximum so far."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(word))
    except (OSError, StopIteration):
        raise BenchError("peak memory is read from Linux's /proc/self/status, which is missing") from None
    return 1024 * int(line.split()[1])


def _peak(network: str, variant: str, dtype: str, threads: int) -> tuple[int, int | None]:
    """(bytes by which a step raises resident memory, bytes saved by its forward or None if hooks hide them)."""
    torch.set_num_threads(threads)
    model, forward, x = set_up(network, variant, dtype)
    # One-time allocations: gradients of the weights, the libraries' own, and code, which is compiled for a shape.
    _step(forward, x if "compiled" in variant else x[:2])
    Path("/proc/self/clear_refs").write_text("5")  # resets the maximum to what is resident now
    before = _resident("VmRSS")
    _step(forward, x)
    peak = _resident("VmHWM") - before
    return peak, _saved(forward, x)


def _saved(forward: Run, x: Tensor) -> int | None:
    found = cg.saved_memory(forward, x)
    return None if found.unseen else found.total


class _Gradients:
    """Those of a network's variants that are packed or have a packed counterpart."""

    def __init__(self, network: str, dtype: str, variants: list[str]) -> None:
        self._network, self._dtype = network, dtype
        self._plain = {name: name.replace(", packed", "") for name in variants if ", packed" in name}
        self._plain = {name: plain for name, plain in self._plain.items() if plain in variants}
        self._found: dict[str, list[Tensor]] = {}

    def wants(self, variant: str) -> bool:
        return variant in self._plain or variant in self._plain.values()

    def add(self, variant: str, found: list[Tensor]) -> None:
        """Raises BenchError if the counterpart has others."""
        self._found[variant] = found
        if variant in self._plain and not all(map(torch.equal, found, self._found.pop(self._plain[variant]))):
            raise BenchError(
                f"packing changes a gradient of {self._network}, {variant}, in {self._dtype}; nothing is reported"
            )


Result = tuple[float, float]  # median seconds of a step, median of its time over that of the first variant


def _times(network: str, dtype: str, threads: int, rounds: int) -> dict[str, Result]:
    torch.set_num_threads(threads)
    names = _variants(network, "cpu")
    compared, jobs = _Gradients(network, dtype, names), {}
    with tqdm(total=len(names) + rounds, desc=f"{network}, {dtype}: time", disable=None, leave=False) as progress:
        for variant in names:
            model, forward, x = set_up(network, variant, dtype)
            torch.manual_seed(0)  # for dropout
            found = gradients(model, forward, x)
            if compared.wants(variant):
                compared.add(variant, found)
            jobs[variant] = lambda forward=forward, x=x: _step(forward, x)
            progress.update()
        return _results(interleaved(jobs, CpuTimer(), rounds, progress.update))


def _results(times: dict[str, Times]) -> dict[str, Result]:
    first = next(iter(times.values()))
    return {name: (quantiles(own.seconds)[1], statistics.median(first.speeds_over(own))) for name, own in times.items()}


def _on_gpu(network: str, dtype: str, rounds: int) -> dict[str, tuple[float, float, int, int | None]]:
    """variant -> (*results of _times, *results of _peak), on the GPU and in one process."""
    names = _variants(network, "cuda")
    compared, jobs, memory = _Gradients(network, dtype, names), {}, {}
    for variant in names:
        model, forward, x = set_up(network, variant, dtype, "cuda")
        if compared.wants(variant):
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.manual_seed(0)  # for dropout
            with sdpa_kernel(SDPBackend.MATH):
                compared.add(variant, gradients(model, forward, x))
            torch.use_deterministic_algorithms(False)
        _step(forward, x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(forward, x)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        memory[variant] = peak, _saved(forward, x)
        jobs[variant] = lambda forward=forward, x=x: _step(forward, x)
    results = _results(interleaved(jobs, GpuTimer(torch.device("cuda"), cold=False), rounds, lambda: None))
    return {name: (*results[name], *memory[name]) for name in names}


def _variants(network: str, device: str) -> list[str]:
    return (NETWORKS | GPU_NETWORKS)[network].variants(device)


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
    missing = [network for network in args.networks if not _variants(network, args.device)]
    try:
        for network, dtype in product(args.networks, args.dtypes):
            if network not in missing:
                rows += ({**row, **here} for row in _rows(network, dtype, args))
                if args.out:
                    write_csv(rows, args.out)
    except BenchError as error:
        raise SystemExit(f"bench.memory: {error}") from error
    for name in [*missing_peers(), *(f"transformers, for {network}" for network in missing)]:
        print(f"\nSkipped, not installed: {name}")
    if args.out:
        print(f"\nWritten: {args.out}. `python -m bench.report` draws it.")


def _rows(network: str, dtype: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """One network in one dtype, measured and printed."""
    if args.device == "cuda":
        found = in_new_process("default", _on_gpu, network, dtype, args.rounds)
    else:
        times = in_new_process("default", _times, network, dtype, args.threads, args.rounds)
        found = {
            name: (*times[name], *in_new_process("return", _peak, network, name, dtype, args.threads))
            for name in tqdm(times, f"{network}, {dtype}: peak", disable=None, leave=False)
        }
    rows = []
    for activation, (seconds, ratio, peak, kept) in found.items():
        rows.append({
            "network": network, "dtype": dtype, "activation": activation, "kept_bytes": "" if kept is None else kept,
            "peak_bytes": peak, "seconds_median": f"{seconds:.6g}", "time_over_first_median": f"{ratio:.4g}",
        })  # fmt: skip
    table = [
        (
            row["activation"],
            f"{row['kept_bytes'] / 2**20:.2f}" if row["kept_bytes"] != "" else "hidden",
            f"{row['peak_bytes'] / 2**20:.1f}",
            f"{float(row['seconds_median']) * 1e3:.1f}",
            f"{float(row['time_over_first_median']):.3f}",
        )
        for row in rows
    ]
    print(f"\n{network}, {dtype}, {args.device}, {args.threads} threads\n")
    print(
        format_table(("activation", "saved, MiB", "peak, MiB", "step, ms", f"over {next(iter(found))}"), table),
        flush=True,
    )
    return rows


if __name__ == "__main__":
    main()
