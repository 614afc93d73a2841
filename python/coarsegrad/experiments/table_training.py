"""Training the runs of a table."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import QReLU
from ..quantization import stats
from .data import Split
from .integers import measure_integers
from .models import quantized
from .table_runs import Run, Table, config_of, float_folder, write_results
from .training import Diverged, fit

_FEATURES_SHOWN = 500


@dataclass(frozen=True)
class Session:
    """What the runs trained by one command share."""

    table: Table
    out: Path
    train_set: Split
    test_set: Split
    sha256: str
    device: torch.device
    environment: dict
    stopped: threading.Event = field(default_factory=threading.Event)

    def train_all(self, runs: list[Run], jobs: int) -> None:
        """Train `runs`, `jobs` at a time; Ctrl-C stops all at their next batch."""
        if jobs == 1:
            for run in runs:
                print(f"\n{run.name}", flush=True)
                self.train(run)()
            return
        starts = {float_folder(self.table.schedules[run.schedule], run.seed): run for run in runs}
        for run in starts.values():  # no two threads may train the same one
            self._float_network(run)
        with ThreadPoolExecutor(jobs) as pool:
            training = {pool.submit(self.train, run, f"{run.name}  "): run for run in runs}
            at_the_end = []
            try:
                for future in as_completed(training):
                    write = future.result()
                    if training[future].weight_bits is None:
                        write()
                    else:
                        at_the_end.append(write)
            except BaseException:
                self.stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        for write in at_the_end:
            write()

    def train(self, run: Run, name: str = "") -> Callable[[], None]:
        """Train `run`; divergence is a result. `name` is a prefix of each line printed.

        Returns what writes the results. With weights of few bits it must wait until no thread trains: it converts the
        network by torch.export, which patches modules of all threads. The checkpoint has the training until then.
        """
        float_model, start = self._float_network(run)
        ste, _, later = run.ste.partition("_then_")
        weight_bits: Any = run.weight_bits
        alphas = run.learn_alpha, run.per_channel, run.range_bits
        model = quantized(float_model, run.bits, ste, run.rounding, *alphas, weight_bits)
        config = config_of(self.table, run) | {"data": self.sha256}
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

        def write() -> None:
            integers, shown = None, run in self.table.runs
            if weight_bits and not diverged:
                batch = self.test_set.first(self.table.schedules[run.schedule].batch_size)
                integers = measure_integers(float_model, model, self.test_set, batch, weight_bits)
            report = {
                "config": config, "environment": self.environment, "start": start, "diverged": diverged,
                "alpha": {name: _spread(m.alpha) for name, m in model.named_modules() if isinstance(m, QReLU)},
                "shares": None if diverged else _shares(model, self.test_set),
                "features": None if diverged or run.seed or not shown else project(model, self.test_set),
                "integers": integers, "history": history,
            }  # fmt: skip
            write_results(report, folder / "results.json")

        return write

    def _float_network(self, run: Run) -> tuple[nn.Module, dict]:
        """The trained network that `run` starts from, and what the results of `run` record about it."""
        schedule = self.table.schedules[run.schedule]
        config = {
            "phase": "float", "epochs": schedule.float_epochs, "lr": schedule.lr,
            "lr_drops": list(schedule.float_lr_drops), "batch_size": schedule.batch_size, "seed": run.seed,
            "data": self.sha256,
        }  # fmt: skip
        folder = self.out / float_folder(schedule, run.seed)
        torch.manual_seed(run.seed)
        # Convolutions are faster on a CPU in this memory format: LeNet-5's step takes about 80% of the time.
        network = self.table.network(nn.ReLU)
        model = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        history = self._fit(model, config, folder)
        start = {"weights": _digest(model), "test_accuracy": history[-1]["test_accuracy"]}
        if not (folder / "results.json").exists():
            report = {
                "config": config, "environment": self.environment, "weights": start["weights"],
                "features": project(model, self.test_set), "history": history,
            }  # fmt: skip
            write_results(report, folder / "results.json")
        return model, start

    def _fit(self, model: nn.Module, config: dict, folder: Path, *rest: Any) -> list[dict]:
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
    """The fractions of the inputs of each QReLU with code 0 and above the top level."""
    layers = stats(model, split.x.split(1000), progress=False)
    return {layer.name: {"zero": layer.zero, "saturated": layer.saturated} for layer in layers}


@torch.no_grad()
def project(model: nn.Module, split: Split) -> dict:
    """The inputs of the last Linear projected on their first two principal components: the fraction of the variance
    that these explain, and x, y and class of the first samples."""
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
