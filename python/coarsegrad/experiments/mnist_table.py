"""`python -m coarsegrad mnist-table`: LeNet-5 on MNIST with every STE at 2, 4 and 1 bits, with learned alpha, and with
weights of few bits."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from .._types import RoundingName
from ..ste import ALPHA_GRADS
from . import table
from .data import load_mnist
from .models import lenet5
from .table_runs import Run, Schedule, Table

_OWN = ("log_tailed_relu", "reverse_exponential")  # Long, Yin, Xin 2021, arXiv 2011.11256
_STES = ("clipped_relu", "relu", "identity", *_OWN, "reverse_exponential_step")
_RELU_IN_ONE_LAYER = (
    "relu+clipped_relu+clipped_relu", "clipped_relu+relu+clipped_relu", "clipped_relu+clipped_relu+relu",
)  # fmt: skip
_RELU_IN_ONE_PART = ("relu_then_clipped_relu", "clipped_relu_then_relu")
_SEEDS = (0, 1, 2)
_GRID_BITS = (1, 2, 3, 4, 6, 8)
_ROUNDINGS: tuple[RoundingName, ...] = ("ceil", "nearest", "hwgq")


def _full(bits: int, *stes: str, seed: int = 0) -> list[Run]:
    return [Run("full", bits, ste, seed=seed) for ste in stes]


def _short(bits: int, *stes: str, **alpha: Any) -> list[Run]:
    return [Run("short", bits, ste, seed=seed, **alpha) for ste, seed in product(stes, _SEEDS)]


def _weights(schedule: str, seed: int) -> list[Run]:
    """Weights of few bits with activations of few bits, by the plain and by the blended step."""
    return [
        Run(schedule, bits, "clipped_relu", seed=seed, weight_bits=weight_bits, rho=rho)
        for bits, weight_bits, rho in product((4, 2, 1), (1, 2, 4), (None, 1e-5))
    ]


TABLE = Table(
    title="LeNet-5 on MNIST",
    network=lenet5,
    load=load_mnist,
    schedules={
        # The schedule of Yin et al., ICLR 2019, arXiv 1903.05662.
        "full": Schedule(epochs=50, lr_drops=(20, 40), float_epochs=20, float_lr_drops=(8, 16)),
        # The same, for runs that show where `relu` is worse than `clipped_relu`: in which layer, through range or bits,
        # before or after the first drop of the rate.
        "saturation": Schedule(epochs=50, lr_drops=(20, 40), float_epochs=20, float_lr_drops=(8, 16)),
        "short": Schedule(epochs=5, lr_drops=(2, 4), float_epochs=5, float_lr_drops=(2, 4)),
    },
    runs=(
        *_full(2, "clipped_relu", "relu"),
        *_short(2, *_STES[:3]),
        *_full(4, "relu", "clipped_relu"),
        *_short(2, *_STES[3:]),
        *_short(4, *_STES),
        *(
            run
            for per_channel, rule in product((False, True), ALPHA_GRADS)
            for run in _short(2, "clipped_relu", learn_alpha=rule, per_channel=per_channel)
        ),
        # A second seed, to see whether the two differ by more than chance.
        *_full(2, "clipped_relu", "relu", seed=1),
        *_full(2, "identity", *_OWN, "reverse_exponential_step"),
        *_full(4, "identity", *_OWN, "reverse_exponential_step"),
        *(Run("saturation", 4, ste, range_bits=2) for ste in ("relu", "clipped_relu")),
        *(Run("saturation", 2, ste) for ste in (*_RELU_IN_ONE_LAYER, *_RELU_IN_ONE_PART)),
        *_full(1, *_STES),
        *_short(1, *_STES),
        *(run for seed in _SEEDS for run in _weights("short", seed)),
        *_weights("full", 0),
    ),
    # Table 1 of Yin et al.
    published={
        (2, "identity"): 98.49,
        (2, "relu"): 99.24,
        (2, "clipped_relu"): 99.23,
        (4, "identity"): 98.98,
        (4, "relu"): 99.32,
        (4, "clipped_relu"): 99.24,
    },  # fmt: skip
    grid=tuple(
        Run("short", bits, ste, rounding=rounding) for rounding, ste, bits in product(_ROUNDINGS, _STES, _GRID_BITS)
    ),
)


_DESCRIPTION = """
Trains LeNet-5 on MNIST in float, and from there with low-bit activations, once for
each STE, at 2, 4 and 1 bits: with one or two seeds on the schedule "full" (50
epochs), and with three seeds, also with learned alphas, on the schedule "short" (5
epochs). "saturation" is "full" with relu in only one layer or one part of the
training, and with 4 bits on the range of 2 bits. With clipped_relu also with
weights of 4, 2 and 1 bits, trained by the plain and by the blended step (Yin et
al. 2018, arXiv 1808.05240); these networks are converted to integers at the end.
The grid is one seed of "short" at 1, 2, 3, 4, 6 and 8 bits with each rounding and
STE. In total some 4,000 epochs: a day on one core.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m coarsegrad mnist-table` to `parser`."""
    parser.description = _DESCRIPTION
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the four IDX files of MNIST, gzipped or not")
    table.add_arguments(parser, "runs/mnist-table")


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    table.main(TABLE, "mnist-table", args)
