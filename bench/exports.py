"""`python -m bench.exports`: LeNet-5 on MNIST out of torch: accuracy, size and time of its ONNX files."""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import coarsegrad as cg
from coarsegrad.__main__ import main as run_command
from coarsegrad._text import format_table
from coarsegrad.experiments.data import PIXEL_MEAN, PIXEL_STD, Split, load_mnist
from coarsegrad.experiments.models import lenet5, quantized

from .engines import PACKAGES, onnxruntime_session, openvino_request, versions
from .pages import DOCS, fill, markdown
from .sweep import timed
from .timing import BenchError, CpuTimer, Row, at_least, facts, instruction_sets, interleaved, write_csv

RESULTS = Path(__file__).parent / "results" / "exports.csv"
PAGE = DOCS / "onnx.md"
BITS = (4, 2)
_BATCH, _EVALUATION_BATCH, _CODES_OF = 64, 1000, 2000

_DESCRIPTION = """
Trains LeNet-5 on MNIST with `python -m coarsegrad mnist`, an epoch in float and
one with QReLUs of 4 and of 2 bits, by the rounding nearest and by ceil. Converts
these to integers with 8-bit weights and exports them in the form "qdq", with
nearest also as networks of pixels, which are codes of 8 bits, so that the first
layer, too, computes with integers; and the network with nn.ReLU in floats.
Compares the predictions of onnxruntime and OpenVINO on all test images with
those of torch, and the codes that each integer layer writes; and times a forward
of 64 images on one thread, all taking turns. Writes the table of docs/onnx.md,
unless --out names other results than the project's.

A second call finds the trained networks in --runs. Needs onnx, onnxscript,
onnxruntime and openvino.
"""


@dataclass(frozen=True)
class Network:
    """label: in the table. module: as it runs in torch. images: all that it is tested with."""

    label: str
    module: nn.Module
    images: Tensor
    integer: bool


@dataclass(frozen=True)
class Job:
    """A network in an engine. file: what the engine reads, None for torch."""

    network: Network
    engine: str
    run: Callable[[Tensor], Tensor]
    file: Path | None


def _onnxruntime(path: Path) -> Callable[[Tensor], list[Tensor]]:
    session = onnxruntime_session(str(path), 1)
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]


def _openvino(path: Path) -> Callable[[Tensor], list[Tensor]]:
    request = openvino_request(str(path), 1)
    return lambda x: [torch.from_numpy(y) for y in request.infer({0: x.numpy()}, share_inputs=True).values()]


_RUNTIMES = {"onnxruntime": _onnxruntime, "OpenVINO": _openvino}


# -------------------------------------------------------------------------------------- the networks


def _trained(runs: Path, bits: int, rounding: str) -> tuple[nn.Module, nn.Module]:
    """(the network with nn.ReLU, the one with QReLUs), in evaluation mode."""
    options = ["--float-epochs", "1", "--epochs", "1", "--threads", "1", "--out", str(runs)]
    files = runs / "float.pt", runs / f"{bits}bit-clipped_relu-{rounding}" / "checkpoint.pt"
    if not all(file.exists() for file in files):  # with one epoch they are complete if they are there
        run_command(["mnist", "--bits", str(bits), "--rounding", rounding, *options])
    relu = lenet5(nn.ReLU)
    model = quantized(relu, bits, rounding=rounding)
    for network, file in zip((relu, model), files):
        network.load_state_dict(torch.load(file, weights_only=True)["model"])
    return relu.eval(), model.eval()


def _of_pixels(model: nn.Module) -> nn.Module:
    """The same network of images from 0 to 1, whose pixels are the levels of a staircase of 8 bits. Their mean and
    deviation are in its first convolution."""
    network = copy.deepcopy(model)
    conv = network.conv1
    with torch.no_grad():
        conv.weight /= PIXEL_STD
        conv.bias -= PIXEL_MEAN * conv.weight.sum((1, 2, 3))
    return nn.Sequential(cg.QReLU(8, alpha=1 / 255, rounding="nearest"), network).eval()


def _with_codes(converted: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A network that returns the codes that each of its integer layers writes, in floats."""
    network = copy.deepcopy(converted)
    graph = network.graph
    layers = [
        node for node in graph.nodes if str(node.target).startswith("coarsegrad.integer_") and "levels" in _names(node)
    ]
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        read = [graph.call_function(torch.ops.coarsegrad.integer_dequantize.default, (n, 1.0, True)) for n in layers]
    output.args = (tuple(read),)
    graph._codegen = torch.fx.graph.CodeGen()
    network.recompile()
    return network


def _names(node: torch.fx.Node) -> list[str]:
    return [argument.name for argument in node.target._schema.arguments]


@torch.no_grad()
def _moved_codes(converted: torch.fx.GraphModule, images: Tensor, folder: Path, runtime: str) -> float:
    """The share of codes that a runtime has otherwise than torch, of all integer layers."""
    network = _with_codes(converted)
    cg.export_onnx(network, (images[:2],), folder / "codes.onnx")
    wanted, got = network(images), _RUNTIMES[runtime](folder / "codes.onnx")(images)
    differ = sum(int((w != g).sum()) for w, g in zip(wanted, got, strict=True))
    return differ / sum(w.numel() for w in wanted)


# ------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def _measure(
    bits: int, relu: nn.Module, models: Sequence[nn.Module], test: Split, args: argparse.Namespace
) -> list[Row]:
    """models: by nearest and by ceil."""
    model, rounds_up = models
    pixels = test.x * PIXEL_STD + PIXEL_MEAN
    networks = [Network("nn.ReLU", relu, test.x, False)]
    for label, trained, images in (
        (f"{bits} bits", model, test.x),
        (f"{bits} bits, ceil", rounds_up, test.x),
        (f"{bits} bits, of pixels", _of_pixels(model), pixels),
    ):
        networks.append(Network(label, cg.convert(trained, (images[:_BATCH],)), images, True))
    folder = args.runs / f"onnx-{bits}bit"
    folder.mkdir(exist_ok=True)
    jobs = {}
    for number, network in enumerate(networks):
        file = folder / f"{number}.onnx"
        cg.export_onnx(network.module, (network.images[:_BATCH],), file)
        own = "coarsegrad" if network.integer else "torch"
        jobs[network.label, own] = Job(network, own, network.module, None)
        for engine, load in _RUNTIMES.items():
            run = load(file)
            jobs[network.label, engine] = Job(network, engine, lambda x, run=run: run(x)[0], file)
    predicted = {key: _predictions(job.run, job.network.images) for key, job in jobs.items()}
    calls = {key: (lambda run=job.run, x=job.network.images[:_BATCH]: run(x)) for key, job in jobs.items()}
    times = interleaved(calls, CpuTimer(time.process_time), args.rounds, lambda: None) if args.times else {}
    here = facts(torch.device("cpu"), "keep") | {"instruction_sets": instruction_sets(), "versions": versions()}
    rows = []
    for (label, engine), job in jobs.items():
        network, own = job.network, predicted[label, engine]
        in_torch = predicted[label, "coarsegrad" if network.integer else "torch"]
        moved, timing = "", {}
        if network.integer and job.file:
            moved = f"{_moved_codes(network.module, network.images[:_CODES_OF], folder, engine):.3g}"
        if args.times:
            relu_there = times["nn.ReLU", "torch" if engine == "coarsegrad" else engine]
            speed = statistics.median(times[label, engine].speeds_over(relu_there))
            timing = {"speed_over_relu_median": f"{speed:.4g}", **timed(times[label, engine])}
        rows.append({
            "bits": bits, "network": label, "engine": engine,
            "file_bytes": os.path.getsize(job.file) if job.file else "",
            "test_accuracy": f"{(own == test.y).double().mean().item():.6g}",
            "images": len(own), "differing": int((own != in_torch).sum()), "codes_moved": moved, **timing, **here,
        })  # fmt: skip
    return rows


def _predictions(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([run(part).argmax(1) for part in images.split(_EVALUATION_BATCH)])


# -------------------------------------------------------------------------------------------- the table


def table(rows: list[dict[str, str]]) -> str:
    """The rows of the CSV file as Markdown, and what they depend on."""
    seconds = "seconds_median" in rows[0]
    header = ["activations", "engine", "file", "test accuracy", "other predictions", "other codes"]
    header += [f"{_BATCH} images", "speed over nn.ReLU"] if seconds else []
    lines = []
    for row in rows:
        size = f"{int(row['file_bytes']) / 1024:,.0f} KiB" if row["file_bytes"] else ""
        moved = f"{float(row['codes_moved']):.4%}" if row["codes_moved"] else ""
        cells = [row["network"], row["engine"], size, f"{float(row['test_accuracy']):.2%}", row["differing"], moved]
        if seconds:
            cells += [f"{float(row['seconds_median']) * 1e3:.2f} ms", f"{float(row['speed_over_relu_median']):.2f}"]
        lines.append(cells)
    here = rows[0]
    machine = f"On {here['cpu']} ({here['instruction_sets']}), {here['versions']}, torch {here['torch']}.\n"
    return f"{markdown(header, lines)}\n{machine}"


def tables(results: Path) -> dict[str, str]:
    """The table of docs/onnx.md by its name."""
    with open(results, newline="") as file:
        return {"exports": table(list(csv.DictReader(file)))}


def _measure_all(args: argparse.Namespace) -> None:
    if missing := [name for name in (*PACKAGES, "onnxscript") if importlib.util.find_spec(name) is None]:
        raise BenchError(f"not installed: {', '.join(missing)} (pip install {' '.join(missing)})")
    torch.set_num_threads(1)
    args.runs.mkdir(parents=True, exist_ok=True)
    _, test, _ = load_mnist(None)
    rows = []
    for bits in BITS:
        (relu, *_), models = zip(*(_trained(args.runs, bits, rounding) for rounding in ("nearest", "ceil")))
        rows += _measure(bits, relu, models, test, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(rows, args.out)
    shown = ("bits", "network", "engine", "file_bytes", "test_accuracy", "differing", "codes_moved", "seconds_median")
    print(format_table(shown, [tuple(str(row.get(name, "")) for name in shown) for row in rows]))
    print(f"\nWritten: {args.out}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.exports", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs/exports"), metavar="FOLDER", help="trained networks and ONNX files")
    add("--rounds", type=at_least(5), default=15, help="of timing (default 15)")
    add("--no-times", dest="times", action="store_false", help="accuracy and sizes alone, for a busy machine")
    add(
        "--out", type=Path, default=RESULTS, metavar="FILE", help=f"the results (default {RESULTS.name} of the project)"
    )
    add("--page", action="store_true", help="only write the table of docs/onnx.md, from the results that are there")
    args = parser.parse_args(argv)
    try:
        if not args.page:
            _measure_all(args)
        if args.page or args.out == RESULTS:
            fill(PAGE, tables(args.out))
    except (BenchError, OSError) as error:
        sys.exit(f"bench.exports: {error}")


if __name__ == "__main__":
    main()
