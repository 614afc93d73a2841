"""`python -m coarsegrad memory`: what a network saves for backward, with nn.ReLU and with packed QReLU."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from ..memory import MemoryComparison, saved_memory
from ..nn import QReLU
from ..packing import pack_activations_
from ..ste import ROUNDINGS, stes
from .arguments import positive
from .files import ExperimentError
from .models import lenet5
from .transformers import OPT_125M, T5_SMALL, Activation, Opt, T5Encoder, TransformerConfig

_CONFIGS = {"opt-125m-config": (Opt, OPT_125M), "t5-small-config": (T5Encoder, T5_SMALL)}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_DESCRIPTION = """
Builds a network twice from the same seed, with nn.ReLU and with QReLU whose
outputs are saved as packed codes, runs each forward once and prints what every
module saves for backward. Weights are random: the bytes do not depend on them.
By default the two transformers have the widths of their configurations but only
two layers, so that it takes seconds.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m coarsegrad memory` to `parser`."""
    parser.description = _DESCRIPTION
    add = parser.add_argument
    add(
        "--model",
        choices=[*_CONFIGS, "mlp", "lenet"],
        default="opt-125m-config",
        help="what to measure (default opt-125m-config)",
    )
    add("--bits", type=int, choices=range(1, 9), default=2, help="bits of an activation (default 2)")
    add("--ste", choices=list(stes()), default="clipped_relu", help="coarse gradient (default clipped_relu)")
    add("--rounding", choices=ROUNDINGS, default="ceil", help="thresholds of the staircase (default ceil)")
    add("--layers", type=positive(int), default=2, metavar="N", help="layers, except for lenet (default 2)")
    add("--batch", type=positive(int), default=2, metavar="N", help="sequences or images (default 2)")
    add("--seq", type=positive(int), default=128, metavar="N", help="tokens per sequence (default 128)")
    add(
        "--dtype", choices=list(_DTYPES), default="bfloat16", help="dtype of weights and activations (default bfloat16)"
    )
    add("--out", type=Path, metavar="FILE", help="draw a bar chart into this file (.png, .svg, .pdf)")


def main(args: argparse.Namespace) -> None:
    """Run the command. Exits with a message and status 1 for an error of the user."""
    try:
        comparison = measure(args)
        print(
            f"{args.model}: before, nn.ReLU; after, packed QReLU with {args.bits} bits ({args.ste}, {args.rounding})\n"
        )
        print(comparison)
        if args.out:
            comparison.plot(args.out)
            print(f"\n{args.out}")
    except (ExperimentError, OSError) as error:
        raise SystemExit(f"coarsegrad memory: {error}") from error


def measure(args: argparse.Namespace) -> MemoryComparison:
    """The two measurements selected by the options."""
    x = _input(args)
    # The activation performs the dropout after it, if it can, in place of the network's own.
    fused = args.model in _CONFIGS and args.ste != "identity"
    dropout = _CONFIGS[args.model][1].dropout if fused else 0.0
    low_bit = lambda: QReLU(args.bits, ste=args.ste, rounding=args.rounding, dropout=dropout)  # noqa: E731
    before = saved_memory(_build(args, nn.ReLU), x)
    model = _build(args, low_bit, dropout=0.0 if fused else None)
    with pack_activations_(model):
        return before.compare(saved_memory(model, x))


def _config(args: argparse.Namespace) -> TransformerConfig:
    config = _CONFIGS[args.model][1]
    if args.seq > config.positions:
        raise ExperimentError(f"--seq {args.seq} is more than the {config.positions} positions of {args.model}")
    return config.resized(layers=args.layers)


def _input(args: argparse.Namespace) -> torch.Tensor:
    torch.manual_seed(0)
    if args.model in _CONFIGS:
        return torch.randint(_config(args).vocabulary, (args.batch, args.seq))
    if args.model == "lenet" and args.batch < 2:
        raise ExperimentError("--batch must be at least 2 for lenet, because BatchNorm needs several images")
    shape = (args.batch, 1, 28, 28) if args.model == "lenet" else (args.batch, 784)
    return torch.randn(shape, dtype=_DTYPES[args.dtype])


def _build(args: argparse.Namespace, activation: Activation, dropout: float | None = None) -> nn.Module:
    torch.manual_seed(0)
    if args.model in _CONFIGS:
        model = _CONFIGS[args.model][0](_config(args).resized(dropout=dropout), activation)
    elif args.model == "lenet":
        model = lenet5(activation)
    else:
        hidden = [part for _ in range(args.layers) for part in (nn.Linear(784, 784), activation())]
        model = nn.Sequential(*hidden, nn.Linear(784, 10))
    return model.to(_DTYPES[args.dtype])
