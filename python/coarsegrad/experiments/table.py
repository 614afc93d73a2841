"""A table of runs: one network, trained in float and from there with many kinds of low-bit activations, run by run.

What a finished run leaves is one file, OUT/SCHEDULE/RUN/results.json, which is all that tables and figures are made
of. Checkpoints, and the float networks that the runs start from, are only needed to train.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import hashlib
import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..nn import QReLU
from ..stats import stats
from .arguments import ending, positive, usable_device
from .data import Split
from .files import ExperimentError, replacing
from .measure import environment
from .models import quantized
from .training import Diverged, fit

_FEATURES_SHOWN = 500

_EPILOG = """
The runs are trained those of the most worth first, one after the other or --jobs
at once, which changes no number on a CPU. A run that is finished is
OUT/SCHEDULE/RUN/results.json and is not trained again, whatever machine it comes
from. The same command again goes on where it was stopped: in an unfinished run
after the last finished epoch, from its checkpoint.pt. The float network of each
seed is OUT/float-.../checkpoint.pt; where that is not there it is trained anew, to
the same weights on the same kind of machine with the same torch and number of
threads; a run's results say which weights it started from. That a run diverges is
a result. At the end, or with --report at any time: a table, and
OUT/runs.csv, OUT/accuracy-SCHEDULE.png and OUT/features-SCHEDULE.png.
"""

Network = Callable[[Callable[[], nn.Module]], nn.Module]


@dataclass(frozen=True)
class Schedule:
    """How the runs of one kind are trained, and the float networks before them; see `training.fit`."""

    epochs: int
    lr_drops: tuple[int, ...]
    float_epochs: int
    float_lr_drops: tuple[int, ...]
    lr: float = 0.1
    batch_size: int = 64


@dataclass(frozen=True)
class Run:
    """One training with low-bit activations, from the float network of the same seed; see `models.quantized`.

    ste may be "A_then_B": A until the rate's first drop, B from there.
    """

    schedule: str
    bits: int
    ste: str
    learn_alpha: str | None = None
    per_channel: bool = False
    seed: int = 0
    range_bits: int | None = None

    @property
    def name(self) -> str:
        return f"{self.schedule}/{self.bits}bit-{self.variant}-seed{self.seed}"

    @property
    def variant(self) -> str:
        alpha = f"-{self.learn_alpha}_alpha" if self.learn_alpha else ""
        of_range = f"-range_of_{self.range_bits}bit" if self.range_bits else ""
        return self.ste + alpha + ("-per_channel" if self.per_channel else "") + of_range


@dataclass(frozen=True)
class Table:
    """What a command of this kind trains. `load(folder)` gives the training set, the test set and their sha256;
    `published` is the accuracy in % by (bits, ste) that the runs of the schedule "full" are held against."""

    title: str
    network: Network
    load: Callable[[Path | None], tuple[Split, Split, str]]
    schedules: dict[str, Schedule]
    runs: tuple[Run, ...]  # in the order in which they are trained
    published: dict[tuple[int, str], float]
    augment: Callable[[Tensor], Tensor] = lambda x: x


def float_folder(schedule: Schedule, seed: int) -> str:
    """Where the float network is kept that the runs of a schedule start from; schedules may share it."""
    return f"float-{schedule.float_epochs}epochs-seed{seed}"


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Adds the options that all tables have to `parser`."""
    parser.epilog = _EPILOG
    add = parser.add_argument
    add(
        "--runs",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="only the runs whose name, SCHEDULE/RUN, has one of these patterns, as 'full/2bit-*' (default all)",
    )
    add("--list", action="store_true", help="print the names of the runs, and which are finished; train nothing")
    add("--report", action="store_true", help="make table and figures of the finished runs; train nothing")
    add("--device", default="cpu", help="as torch names it: cpu, cuda, cuda:1 (default cpu)")
    add("--threads", type=positive(int), metavar="N", help="threads on a CPU (default: torch's choice)")
    add(
        "--jobs",
        type=positive(int),
        default=1,
        metavar="N",
        help="runs that are trained at once, each in a thread (default 1)",
    )
    add("--out", type=Path, default=Path(out), metavar="FOLDER", help=f"results and checkpoints (default {out})")


def main(table: Table, command: str, args: argparse.Namespace) -> None:
    """Runs the command; ends it with a message and status 1 for what the user can mend, 130 after Ctrl-C."""
    with ending(command, f"Finished epochs are kept in {args.out}"):
        _run(table, args)


def _run(table: Table, args: argparse.Namespace) -> None:
    from . import table_figures  # slow to import: not for --help; and if it is missing, say so first
    from .table_summary import summary

    runs = [run for run in table.runs if any(fnmatch.fnmatchcase(run.name, pattern) for pattern in args.runs)]
    if not runs:
        raise ExperimentError(f"--runs {' '.join(args.runs)} fits no run; --list prints their names")
    if args.list:
        done = {run for run, _ in finished(table, args.out)}
        print("\n".join(f"{run.name}{'  finished' if run in done else ''}" for run in runs))
        return
    if not args.report:
        device = usable_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        train, test, sha256 = table.load(args.data)
        session = _Session(table, args.out, train.to(device), test.to(device), sha256, device, environment(device))
        session.train_all([run for run in runs if _read(table, run, args.out, sha256) is None], args.jobs)
    results = finished(table, args.out)
    if not results:
        raise ExperimentError(f"no run is finished in {args.out}")
    _write_csv(results, args.out / "runs.csv")
    print(f"\n{table.title}")
    for schedule in table.schedules:
        print("\n", *summary(table, schedule, results), sep="")
    print("", args.out / "runs.csv", *table_figures.draw(table, results, args.out), sep="\n")


# ------------------------------------------------------------------------------------------ training


def _config(table: Table, run: Run) -> dict:
    """All that decides the numbers of a run, but for its data and the machine."""
    schedule = asdict(table.schedules[run.schedule])
    config = {"phase": "quantized", **schedule, **asdict(run), "rounding": "ceil"}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


@dataclass(frozen=True)
class _Session:
    """What the runs that one call of the command trains have in common."""

    table: Table
    out: Path
    train_set: Split
    test_set: Split
    sha256: str
    device: torch.device
    environment: dict
    stopped: threading.Event = field(default_factory=threading.Event)

    def train_all(self, runs: list[Run], jobs: int) -> None:
        """Trains `runs`, `jobs` at once; Ctrl-C stops all at their next batch."""
        if jobs == 1:
            for run in runs:
                print(f"\n{run.name}", flush=True)
                self.train(run)
            return
        starts = {float_folder(self.table.schedules[run.schedule], run.seed): run for run in runs}
        for run in starts.values():  # which no two may train
            self._float_network(run)
        with ThreadPoolExecutor(jobs) as pool:
            training = [pool.submit(self.train, run, f"{run.name}  ") for run in runs]
            try:
                for future in as_completed(training):
                    future.result()
            except BaseException:
                self.stopped.set()
                pool.shutdown(cancel_futures=True)
                raise

    def train(self, run: Run, name: str = "") -> None:
        """Trains `run`, and writes its results; that it diverges is a result. `name` begins each line printed."""
        float_model, start = self._float_network(run)
        ste, _, later = run.ste.partition("_then_")
        model = quantized(float_model, run.bits, ste, "ceil", run.learn_alpha, run.per_channel, run.range_bits)
        config = _config(self.table, run) | {"data": self.sha256}
        folder = self.out / run.name

        def before_epoch(epoch: int) -> None:
            if later and epoch >= self.table.schedules[run.schedule].lr_drops[0]:
                for module in model.modules():
                    if isinstance(module, QReLU):
                        module.ste = later

        try:
            history, diverged = self._fit(model, config, folder, name, before_epoch), False
        except Diverged as error:
            print(error)
            history, diverged = error.history, True
        report = {
            "config": config, "environment": self.environment, "start": start, "diverged": diverged,
            "alpha": {name: _spread(m.alpha) for name, m in model.named_modules() if isinstance(m, QReLU)},
            "shares": None if diverged else _shares(model, self.test_set),
            "features": None if diverged or run.seed else project(model, self.test_set), "history": history,
        }  # fmt: skip
        _write(report, folder / "results.json")

    def _float_network(self, run: Run) -> tuple[nn.Module, dict]:
        """The trained network that `run` starts from, and what the results of `run` keep of it."""
        schedule = self.table.schedules[run.schedule]
        config = {
            "phase": "float", "epochs": schedule.float_epochs, "lr": schedule.lr,
            "lr_drops": list(schedule.float_lr_drops), "batch_size": schedule.batch_size, "seed": run.seed,
            "data": self.sha256,
        }  # fmt: skip
        folder = self.out / float_folder(schedule, run.seed)
        torch.manual_seed(run.seed)
        # On a CPU the convolutions are faster in this order: LeNet-5's step takes about four fifths of the time.
        model = self.table.network(nn.ReLU).to(self.device, memory_format=torch.channels_last)
        history = self._fit(model, config, folder)
        start = {"weights": _digest(model), "test_accuracy": history[-1]["test_accuracy"]}
        if not (folder / "results.json").exists():
            report = {
                "config": config, "environment": self.environment, "weights": start["weights"],
                "features": project(model, self.test_set), "history": history,
            }  # fmt: skip
            _write(report, folder / "results.json")
        return model, start

    def _fit(self, model: nn.Module, config: dict, folder: Path, *rest: object) -> list[dict]:
        folder.mkdir(parents=True, exist_ok=True)
        return fit(model, self.train_set, self.test_set, config, folder / "checkpoint.pt", self._augment, *rest)

    def _augment(self, x: Tensor) -> Tensor:
        if self.stopped.is_set():
            raise KeyboardInterrupt
        return self.table.augment(x)


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _spread(alpha: Tensor) -> dict[str, float]:
    return {"min": alpha.min().item(), "mean": alpha.mean().item(), "max": alpha.max().item()}


def _shares(model: nn.Module, split: Split) -> dict[str, dict[str, float]]:
    """Of the inputs of each QReLU, how many gave code 0, and how many were above the top level."""
    layers = stats(model, split.x.split(1000), progress=False)
    return {layer.name: {"zero": layer.zero, "saturated": layer.saturated} for layer in layers}


@torch.no_grad()
def project(model: nn.Module, split: Split) -> dict:
    """The inputs of the last Linear on their first two principal components: the share of the variance that these have,
    and x, y and class of the first samples."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    features: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].double().cpu()))
    model.eval()
    try:
        for x in split.x.split(1000):
            model(x)
    finally:
        hook.remove()
    centred = torch.cat(features)
    centred -= centred.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    vectors = vectors[:, [-1, -2]]
    vectors *= vectors.sum(0).sign()  # an eigenvector's sign is arbitrary
    points = (centred @ vectors)[:_FEATURES_SHOWN].float()
    return {
        "variance": (values[-2:].sum() / values.sum()).item(),
        "points": [[float(f"{value:.3g}") for value in point] for point in points.tolist()],
        "classes": split.y[:_FEATURES_SHOWN].tolist(),
    }


# ------------------------------------------------------------------------------------------ results


def finished(table: Table, out: Path) -> list[tuple[Run, dict]]:
    """The runs of the table that are finished in `out`, in the table's order."""
    results = [(run, _read(table, run, out)) for run in table.runs]
    return [(run, result) for run, result in results if result is not None]


def _read(table: Table, run: Run, out: Path, sha256: str | None = None) -> dict | None:
    """The results of `run`, or None; an ExperimentError if they are of another configuration, or of other data."""
    path = out / run.name / "results.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        there = result["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"{path} is no results file of this command ({error!r})") from error
    wanted = _config(table, run) | ({} if sha256 is None else {"data": sha256})
    for name, value in wanted.items():
        if there.get(name) != value:
            raise ExperimentError(f"{path} has {name} {there.get(name)!r}, wanted {value!r}; choose another --out")
    return result


def _write(report: dict, path: Path) -> None:
    with replacing(path) as file:
        file.write(json.dumps(report).encode() + b"\n")


def _write_csv(results: list[tuple[Run, dict]], path: Path) -> None:
    rows = []
    for run, result in results:
        history = result["history"]
        best = max(history, key=lambda row: row["test_accuracy"], default={})
        rows.append(asdict(run) | {
            "epochs": len(history), "diverged": result["diverged"],
            "float_test_accuracy": result["start"]["test_accuracy"],
            "test_accuracy": history[-1]["test_accuracy"] if history else None,
            "best_test_accuracy": best.get("test_accuracy"), "best_epoch": best.get("epoch"),
            "seconds": round(sum(row["seconds"] for row in history), 1),
        })  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())
