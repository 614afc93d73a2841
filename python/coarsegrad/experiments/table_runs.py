"""The runs of a table, and their results on disk.

A finished run is one file, OUT/SCHEDULE/RUN/results.json; tables and figures need nothing else. Checkpoints, and the
float networks that the runs start from, are only needed for training.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from .._types import RoundingName
from .data import Split
from .files import ExperimentError, replacing

Network = Callable[[Callable[[], nn.Module]], nn.Module]


@dataclass(frozen=True)
class Schedule:
    """How a kind of runs is trained, and the float networks that they start from; see `training.fit`."""

    epochs: int
    lr_drops: tuple[int, ...]
    float_epochs: int
    float_lr_drops: tuple[int, ...]
    lr: float = 0.1
    batch_size: int = 64


@dataclass(frozen=True)
class Run:
    """One training with low-bit activations, from the float network of the same seed; see `models.quantized`.

    ste may be "A_then_B": A until the first drop of the learning rate, then B. rho: of the blended step that trains
    quantized weights; None for the plain one.
    """

    schedule: str
    bits: int
    ste: str
    learn_alpha: str | None = None
    per_channel: bool = False
    seed: int = 0
    range_bits: int | None = None
    weight_bits: int | None = None
    rho: float | None = None
    rounding: RoundingName = "ceil"

    @property
    def name(self) -> str:
        return f"{self.schedule}/{self.bits}bit-{self.variant}-seed{self.seed}"

    @property
    def variant(self) -> str:
        rounding = f"-{self.rounding}" if self.rounding != "ceil" else ""
        alpha = f"-{self.learn_alpha}_alpha" if self.learn_alpha else ""
        of_range = f"-range_of_{self.range_bits}bit" if self.range_bits else ""
        weights = f"-{self.weight_bits}bit_weights" if self.weight_bits else ""
        blended = f"-rho{self.rho:g}" if self.rho else ""
        per_channel = "-per_channel" if self.per_channel else ""
        return self.ste + rounding + alpha + per_channel + of_range + weights + blended


@dataclass(frozen=True)
class Table:
    """What a table command trains. `load(folder)` returns the training set, the test set and their sha256; `published`
    is the accuracy in % by (bits, ste) with which the runs of the schedule "full" are compared.

    `grid` is runs of one schedule and seed that are compared by bits, rounding and STE; some may be among `runs`."""

    title: str
    network: Network
    load: Callable[[Path | None], tuple[Split, Split, str]]
    schedules: dict[str, Schedule]
    runs: tuple[Run, ...]  # in the order in which they are trained
    published: dict[tuple[int, str], float]
    augment: Callable[[Tensor], Tensor] = lambda x: x
    grid: tuple[Run, ...] = ()

    @property
    def all_runs(self) -> tuple[Run, ...]:
        return tuple(dict.fromkeys((*self.runs, *self.grid)))


def float_folder(schedule: Schedule, seed: int) -> str:
    """The folder of the float network that the runs of a schedule start from; schedules may share it."""
    return f"float-{schedule.float_epochs}epochs-seed{seed}"


def config_of(table: Table, run: Run) -> dict:
    """Everything that the results of a run depend on, except its data and the machine."""
    schedule = asdict(table.schedules[run.schedule])
    config = {"phase": "quantized", **schedule, **asdict(run)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def finished(table: Table, out: Path) -> list[tuple[Run, dict]]:
    """The runs of the table that are finished in `out`, in the table's order."""
    results = [(run, read_results(table, run, out)) for run in table.all_runs]
    return [(run, result) for run, result in results if result is not None]


def read_results(table: Table, run: Run, out: Path, sha256: str | None = None) -> dict | None:
    """The results of `run`, or None. Raises ExperimentError if they have another configuration or other data."""
    path = out / run.name / "results.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        there = result["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"{path} is not a results file of this command ({error!r})") from error
    wanted = config_of(table, run) | ({} if sha256 is None else {"data": sha256})
    for name, value in wanted.items():
        if there.get(name) != value:
            raise ExperimentError(f"{path} has {name} {there.get(name)!r}, wanted {value!r}; choose another --out")
    return result


def integers_of(result: dict) -> dict:
    """What `measure_integers` found of the network that a run ended with; empty for one with float weights."""
    return result.get("integers") or {}


def write_results(report: dict, path: Path) -> None:
    with replacing(path) as file:
        file.write(json.dumps(report).encode() + b"\n")


def write_csv(results: list[tuple[Run, dict]], path: Path) -> None:
    rows = []
    for run, result in results:
        history = result["history"]
        best: dict = max(history, key=lambda row: row["test_accuracy"], default={})
        rows.append(asdict(run) | {
            "epochs": len(history), "diverged": result["diverged"],
            "float_test_accuracy": result["start"]["test_accuracy"],
            "test_accuracy": history[-1]["test_accuracy"] if history else None,
            "best_test_accuracy": best.get("test_accuracy"), "best_epoch": best.get("epoch"),
            "integer_test_accuracy": integers_of(result).get("integer", {}).get("test_accuracy"),
            "seconds": round(sum(row["seconds"] for row in history), 1),
        })  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())
