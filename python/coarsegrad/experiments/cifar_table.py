"""`python -m coarsegrad cifar-table`: VGG-11 and ResNet-20 on CIFAR-10 with every STE."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import table
from .cifar import crop_and_flip, load_cifar10
from .models import resnet20, vgg11
from .table_runs import Network, Run, Schedule, Table

_STES = ("clipped_relu", "relu", "identity", "log_tailed_relu", "reverse_exponential", "reverse_exponential_step")

# Table 1 of Yin et al., ICLR 2019, arXiv 1903.05662: by bits, identity, relu and clipped_relu.
_PUBLISHED = {
    "vgg11": {2: (86.58, 88.69, 90.92), 4: (90.19, 92.01, 92.08)},
    "resnet20": {2: (46.52, 48.05, 88.39), 4: (54.16, 86.59, 91.24)},
}


def _table(name: str, title: str, network: Network) -> Table:
    return Table(
        title=f"{title} on CIFAR-10",
        network=network,
        load=load_cifar10,
        schedules={
            "full": Schedule(
                epochs=200, lr_drops=(80, 140), float_epochs=200, float_lr_drops=(80, 140), lr=0.01, batch_size=128
            ),
        },
        runs=tuple(Run("full", bits, ste) for bits in (2, 4) for ste in _STES),
        published={
            (bits, ste): accuracy
            for bits, accuracies in _PUBLISHED[name].items()
            for ste, accuracy in zip(("identity", "relu", "clipped_relu"), accuracies)
        },
        augment=crop_and_flip,
    )


TABLES = {"vgg11": _table("vgg11", "VGG-11", vgg11), "resnet20": _table("resnet20", "ResNet-20", resnet20)}

_DESCRIPTION = """
Trains a network on CIFAR-10 in float, and from there with low-bit activations, once
for each STE at 2 and 4 bits. A run has 200 epochs: use a GPU.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m coarsegrad cifar-table` to `parser`."""
    parser.description = _DESCRIPTION
    parser.add_argument("network", choices=list(TABLES), help="the network to train")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="the files of CIFAR-10's binary version: data_batch_1.bin to _5.bin, test_batch.bin",
    )
    table.add_arguments(parser, "runs/cifar-table/NETWORK")


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    args.out = Path(str(args.out).replace("NETWORK", args.network))
    table.main(TABLES[args.network], "cifar-table", args)
