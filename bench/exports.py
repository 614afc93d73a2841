"""`python -m bench.exports`: LeNet-5 on MNIST out of torch: accuracy, size and time of its ONNX files."""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import os
import re
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
from coarsegrad.experiments.files import replacing
from coarsegrad.experiments.models import lenet5, quantized

from .engines import PACKAGES, instruction_sets, versions
from .sweep import timed
from .timing import BenchError, CpuTimer, Row, at_least, facts, interleaved, write_csv

RESULTS = Path(__file__).parent / "results" / "exports.csv"
PAGE = Path(__file__).parent.parent / "docs" / "onnx.md"
BITS = (4, 2)
_BATCH, _EVALUATION_BATCH, _CODES_OF = 64, 1000, 2000
_BLOCK = re.compile(r"(<!-- bench.exports -->\n).*?(<!-- end of bench.exports -->)", re.DOTALL)

_DESCRIPTION = """
Trains LeNet-5 on MNIST with `python -m coarsegrad mnist`, an epoch in float and
one with QReLUs of 4 and of 2 bits, converts it to integers with 8-bit weights,
and exports that in the form "qdq", and the network with nn.ReLU in floats.
Compares the predictions of onnxruntime and OpenVINO on all test images with
those of torch, and the codes that each integer layer writes; and times a forward
of 64 images on one thread, all taking turns.

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


def _onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(path: Path) -> Callable[[Tensor], Tensor]:
    import openvino

    # Without the last, float layers are computed in bfloat16 where the CPU has it.
    settings = {
        "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda x: torch.from_numpy(request.infer({0: x.numpy()}, share_inputs=True)[0])


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
    import onnxruntime
    import openvino

    wanted = network(images)
    if runtime == "onnxruntime":
        session = onnxruntime.InferenceSession(str(folder / "codes.onnx"), providers=["CPUExecutionProvider"])
        got = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    else:
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(folder / "codes.onnx"), "CPU", settings)
        found = compiled(images.numpy())
        got = [found[n] for n in range(len(wanted))]
    differ = sum(int((w != torch.from_numpy(g)).sum()) for w, g in zip(wanted, got))
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
        engines += [Engine(label, load(file), file, integer) for integer, file in files.items()]
    rows = []
    predicted = {engine: _predictions(engine.run, test.x) for engine in engines}
    timer = CpuTimer(time.process_time)
    jobs = {engine: (lambda run=engine.run: run(images)) for engine in engines}
    times = interleaved(jobs, timer, args.rounds, lambda: None) if args.times else {}
    here = facts(torch.device("cpu"), "keep") | {"instruction_sets": instruction_sets(), "versions": versions()}
    for engine in engines:
        own = predicted[engine]
        moved = engine.integer and engine.file and _moved_codes(converted, test.x[:_CODES_OF], folder, engine.label)
        rows.append({
            "bits": bits, "engine": engine.label, "integer": int(engine.integer),
            "file_bytes": os.path.getsize(engine.file) if engine.file else "",
            "test_accuracy": f"{(own == test.y).double().mean().item():.6g}",
            "images": len(own), "differing": int((own != predicted[engines[engine.integer]]).sum()),
            "codes_moved": f"{moved:.3g}" if moved is not None and moved is not False else "",
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
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        kind = f"{row['bits']} bits" if row["integer"] == "1" else "nn.ReLU"
        size = f"{int(row['file_bytes']) / 1024:,.0f} KiB" if row["file_bytes"] else ""
        moved = f"{float(row['codes_moved']):.4%}" if row["codes_moved"] else ""
        cells = [kind, row["engine"], size, f"{float(row['test_accuracy']):.2%}", row["differing"], moved]
        cells += [f"{float(row['seconds_median']) * 1e3:.2f} ms"] if seconds else []
        lines.append("| " + " | ".join(cells) + " |")
    here = rows[0]
    lines += ["", f"On {here['cpu']} ({here['instruction_sets']}), {here['versions']}, torch {here['torch']}."]
    return "\n".join(lines) + "\n"


def write_page(page: Path, results: Path) -> None:
    with open(results, newline="") as file:
        found = table(list(csv.DictReader(file)))
    text = page.read_text()
    if not _BLOCK.search(text):
        raise BenchError(f"{page} has no line <!-- bench.exports -->")
    with replacing(page) as out:
        out.write(_BLOCK.sub(lambda match: f"{match[1]}\n{found}\n{match[2]}", text).encode())


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
    add("--page", type=Path, nargs="?", const=PAGE, metavar="FILE", help="write the table into this page too")
    args = parser.parse_args(argv)
    if missing := [name for name in (*PACKAGES, "onnxscript") if importlib.util.find_spec(name) is None]:
        sys.exit(f"bench.exports: not installed: {', '.join(missing)} (pip install {' '.join(missing)})")
    torch.set_num_threads(1)
    args.runs.mkdir(parents=True, exist_ok=True)
    _, test, _ = load_mnist(None)
    try:
        rows = [row for bits in BITS for row in _measure(bits, _trained(args.runs, bits), test, args)]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_csv(rows, args.out)
        if args.page:
            write_page(args.page, args.out)
    except BenchError as error:
        sys.exit(f"bench.exports: {error}")
    shown = ("bits", "engine", "integer", "file_bytes", "test_accuracy", "differing", "codes_moved", "seconds_median")
    print(format_table(shown, [tuple(str(row.get(name, "")) for name in shown) for row in rows]))
    print(f"\nWritten: {args.out}")


if __name__ == "__main__":
    main()
