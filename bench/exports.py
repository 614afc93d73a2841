"""`python -m bench.exports`: LeNet-5 on MNIST out of torch: accuracy, size and time of its ONNX files."""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import coarsegrad as cg
from coarsegrad.__main__ import main as run_command
from coarsegrad._text import format_table
from coarsegrad.experiments.data import Split, load_mnist
from coarsegrad.experiments.models import lenet5, quantized

from .engines import PACKAGES, instruction_sets, onnxruntime_session, openvino_request, versions
from .pages import DOCS, fill, markdown
from .sweep import timed
from .timing import BenchError, CpuTimer, Row, at_least, facts, interleaved, write_csv

RESULTS = Path(__file__).parent / "results" / "exports.csv"
PAGE = DOCS / "onnx.md"
BITS = (4, 2)
_BATCH, _EVALUATION_BATCH, _CODES_OF = 64, 1000, 2000

_DESCRIPTION = """
Trains LeNet-5 on MNIST with `python -m coarsegrad mnist`, an epoch in float and
one with QReLUs of 4 and of 2 bits, converts it to integers with 8-bit weights,
and exports that in the form "qdq", and the network with nn.ReLU in floats.
Compares the predictions of onnxruntime and OpenVINO on all test images with
those of torch, and the codes that each integer layer writes; and times a forward
of 64 images on one thread, all taking turns. Writes the table of docs/onnx.md,
unless --out names other results than the project's.

A second call finds the trained networks in --runs. Needs onnx, onnxscript,
onnxruntime and openvino.
"""


@dataclass(frozen=True)
class Engine:
    """label: in the table. run: of images. file: what it reads, None for torch."""

    label: str
    run: Callable[[Tensor], Tensor]
    file: Path | None
    integer: bool


def _onnxruntime(path: Path) -> Callable[[Tensor], list[Tensor]]:
    session = onnxruntime_session(str(path), 1)
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]


def _openvino(path: Path) -> Callable[[Tensor], list[Tensor]]:
    request = openvino_request(str(path), 1)
    return lambda x: [torch.from_numpy(y) for y in request.infer({0: x.numpy()}, share_inputs=True).values()]


_RUNTIMES = {"onnxruntime": _onnxruntime, "OpenVINO": _openvino}


# -------------------------------------------------------------------------------------- the networks


def _trained(runs: Path, bits: int) -> tuple[nn.Module, nn.Module]:
    """(the network with nn.ReLU, the one with QReLUs), in evaluation mode."""
    options = ["--float-epochs", "1", "--epochs", "1", "--threads", "1", "--out", str(runs)]
    files = runs / "float.pt", runs / f"{bits}bit-clipped_relu-nearest" / "checkpoint.pt"
    if not all(file.exists() for file in files):  # with one epoch they are complete if they are there
        run_command(["mnist", "--bits", str(bits), *options])
    relu = lenet5(nn.ReLU)
    model = quantized(relu, bits, rounding="nearest")
    for network, file in zip((relu, model), files):
        network.load_state_dict(torch.load(file, weights_only=True)["model"])
    return relu.eval(), model.eval()


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
def _measure(bits: int, networks: tuple[nn.Module, nn.Module], test: Split, args: argparse.Namespace) -> list[Row]:
    relu, model = networks
    images = test.x[:_BATCH].clone()
    converted = cg.convert(model, (images,))
    folder = args.runs / f"onnx-{bits}bit"
    folder.mkdir(exist_ok=True)
    files = {False: folder / "float.onnx", True: folder / "integer.onnx"}
    cg.export_onnx(relu, (images,), files[False])
    cg.export_onnx(converted, (images,), files[True])
    engines = [Engine("torch", relu, None, False), Engine("coarsegrad", converted, None, True)]
    for label, load in _RUNTIMES.items():
        for integer, file in files.items():
            engines.append(Engine(label, lambda x, run=load(file): run(x)[0], file, integer))
    rows = []
    predicted = {engine: _predictions(engine.run, test.x) for engine in engines}
    timer = CpuTimer(time.process_time)
    jobs = {engine: (lambda run=engine.run: run(images)) for engine in engines}
    times = interleaved(jobs, timer, args.rounds, lambda: None) if args.times else {}
    here = facts(torch.device("cpu"), "keep") | {"instruction_sets": instruction_sets(), "versions": versions()}
    for engine in engines:
        own = predicted[engine]
        moved = ""
        if engine.integer and engine.file:
            moved = f"{_moved_codes(converted, test.x[:_CODES_OF], folder, engine.label):.3g}"
        rows.append({
            "bits": bits, "engine": engine.label, "integer": int(engine.integer),
            "file_bytes": os.path.getsize(engine.file) if engine.file else "",
            "test_accuracy": f"{(own == test.y).double().mean().item():.6g}",
            "images": len(own), "differing": int((own != predicted[engines[engine.integer]]).sum()),
            "codes_moved": moved,
            **(timed(times[engine]) if args.times else {}), **here,
        })  # fmt: skip
    return rows


def _predictions(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([run(part).argmax(1) for part in images.split(_EVALUATION_BATCH)])


# -------------------------------------------------------------------------------------------- the table


def table(rows: list[dict[str, str]]) -> str:
    """The rows of the CSV file as Markdown, and what they depend on."""
    seconds = "seconds_median" in rows[0]
    header = ["activations", "engine", "file", "test accuracy", "other predictions", "other codes"]
    header += [f"{_BATCH} images"] if seconds else []
    lines = []
    for row in rows:
        kind = f"{row['bits']} bits" if row["integer"] == "1" else "nn.ReLU"
        size = f"{int(row['file_bytes']) / 1024:,.0f} KiB" if row["file_bytes"] else ""
        moved = f"{float(row['codes_moved']):.4%}" if row["codes_moved"] else ""
        cells = [kind, row["engine"], size, f"{float(row['test_accuracy']):.2%}", row["differing"], moved]
        cells += [f"{float(row['seconds_median']) * 1e3:.2f} ms"] if seconds else []
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
    rows = [row for bits in BITS for row in _measure(bits, _trained(args.runs, bits), test, args)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(rows, args.out)
    shown = ("bits", "engine", "integer", "file_bytes", "test_accuracy", "differing", "codes_moved", "seconds_median")
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
