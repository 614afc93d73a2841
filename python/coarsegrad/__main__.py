"""`python -m coarsegrad`: information about this machine, and the experiments."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from . import __version__
from .backends import info

# name -> (module with add_arguments(parser) and main(args), help). A module is only imported if its command is given:
# `info` needs nothing but torch.
_EXPERIMENTS = {
    "mnist": ("coarsegrad.experiments.mnist", "train LeNet-5 on MNIST, in float and then with low-bit activations"),
    "mnist-table": ("coarsegrad.experiments.mnist_table", "LeNet-5 on MNIST with every STE, run by run"),
    "cifar-table": (
        "coarsegrad.experiments.cifar_table",
        "VGG-11 and ResNet-20 on CIFAR-10, from your copy of the data",
    ),
    "synthetic": ("coarsegrad.experiments.synthetic", "coarse gradient descent on subspace data, with every STE"),
    "finetune": ("coarsegrad.experiments.finetune", "fine-tune a language model in float and with low-bit activations"),
    "rounding": (
        "coarsegrad.experiments.rounding",
        "what each rounding costs trained networks, before and after tuning",
    ),
    "export": ("coarsegrad.experiments.export", "write a network that torch.export saved as an ONNX file"),
    "results": ("coarsegrad.experiments.results", "regenerate the tables of docs/experiments.md from result files"),
    "memory": ("coarsegrad.experiments.memory", "what a network saves for backward, with nn.ReLU and packed QReLU"),
}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m coarsegrad",
        description="Low-bit activations for torch: information about this machine, and the experiments.",
        epilog="`python -m coarsegrad COMMAND --help` describes a command.",
    )
    parser.add_argument("--version", action="version", version=f"coarsegrad {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    about = "versions, the native library, threads, and the backend of each device"
    command = commands.add_parser("info", help=about, description=f"Prints {about}.")
    command.set_defaults(main=lambda args: print(info()))
    for name, (module_name, about) in _EXPERIMENTS.items():
        command = commands.add_parser(name, help=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in argv[:1]:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    args = parser.parse_args(argv)
    try:
        args.main(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as head, has seen enough. At exit Python writes what is left once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
