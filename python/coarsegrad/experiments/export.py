"""`python -m coarsegrad export`: a program of torch.export as an ONNX file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .._torch_internals import OpOverload, tree_leaves
from ..export import FORMS, OPSETS, export_onnx
from ..integer import WEIGHT_BITS, arguments, convert
from .files import ExperimentError

_DESCRIPTION = """
Writes a network as an ONNX file. PROGRAM is what torch.export.save made of the
trained network, in evaluation mode, with inputs of two examples or more:

    batch = {0: torch.export.Dim.AUTO}
    program = torch.export.export(model.eval(), inputs, dynamic_shapes=(batch,))
    torch.export.save(program, "model.pt2")

With --convert the layers that read codes become integer ones first, as
coarsegrad.convert makes them; a program of a converted network has them already.
"""
_EPILOG = """
qdq     QuantizeLinear and its kin, which onnxruntime and OpenVINO run as integers
qonnx   MultiThreshold and Quant of the package qonnx, for FINN and hls4ml; exact
levels  comparisons in floats, for any runtime; exact
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m coarsegrad export` to `parser`."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add("program", type=Path, metavar="PROGRAM", help="a file of torch.export.save, with its example inputs")
    add("out", type=Path, metavar="OUT", help="the ONNX file to write")
    add("--form", choices=FORMS, default="qdq", help="the nodes of a staircase, see below (default qdq)")
    add("--opset", type=int, default=18, help=f"of ONNX, {OPSETS[0]} to {OPSETS[-1]} (default 18)")
    add(
        "--convert",
        type=int,
        choices=WEIGHT_BITS,
        metavar="BITS",
        help="convert to integers first, with weights of 8, 4, 2 or 1 bits",
    )


def main(args: argparse.Namespace) -> None:
    """Run the command. Exits with a message and status 1 for an error of the user."""
    try:
        _run(args)
    except (ExperimentError, OSError, ValueError, ImportError) as error:
        sys.exit(f"export: {error}")


def _run(args: argparse.Namespace) -> None:
    try:
        program = torch.export.load(args.program)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ExperimentError(f"{args.program} is no program that torch.export.save wrote: {error}") from error
    if program.example_inputs is None or program.example_inputs[1]:
        raise ExperimentError(f"{args.program} must have example inputs, all of them positional")
    inputs = program.example_inputs[0]
    if all(t.size(0) == 1 for t in tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.dim()):
        raise ExperimentError(f"{args.program} must have inputs of two examples or more, got one, to which it is fixed")
    model = _evaluating(program.module(), args.program)
    if args.convert:
        model = convert(model, inputs, weight_bits=args.convert)
        print(f"{model.report}\n")
    export_onnx(model, inputs, args.out, form=args.form, opset=args.opset)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, form {args.form}, opset {args.opset}")


def _evaluating(model: torch.fx.GraphModule, path: Path) -> torch.fx.GraphModule:
    """The module of a program, which is marked as in training mode, and refuses eval(), whatever the program does."""
    for node in model.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            given = arguments(node)
            if given.get("training") is True or given.get("train") is True:
                raise ExperimentError(f"{path} must be of a network in evaluation mode: model.eval() before the export")
    for module in model.modules():
        module.training = False
    return model
