"""`python -m coarsegrad synthetic`: coarse gradient descent on classes that lie in linearly independent subspaces.

    o_i = <v_i, sigma(W x)>,   loss = max(0, 1 - (o_y - max_{i != y} o_i))

W is trained by the coarse gradient of the mean loss. V is fixed: each neuron has weight 1 for one class and 0 for the
others. Source: Long, Yin, Xin 2021, arXiv 2011.11256.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..functional import qrelu
from ..ste import stes
from .arguments import ending, positive
from .files import ExperimentError, replacing
from .measure import environment
from .synthetic_summary import summary

_DESCRIPTION = """
Trains the two-layer network of the coarse-gradient paper (arXiv 2011.11256) on
synthetic data, once for each STE, number of bits, number of hidden neurons, angle
between the classes' subspaces, and seed. Reports how many runs reach a loss of
exactly zero with all samples classified correctly, and after how many iterations.
"""
_EPILOG = """
The numbers of neurons are tried at the first angle, and the angles at the first
number of neurons. OUT/runs.csv has a row for each run, OUT/results.json all settings
and loss curves; the figures are OUT/neurons.png, angles.png and loss.png. Running
the same command again continues where it was stopped.

--data half restricts each class to the part of its subspace where the first
coordinate is at least 0.28 of the norm. On data that is symmetric about the origin
1 bit cannot succeed: a neuron fires on exactly one of x and -x, so both cannot be
classified correctly. On half of the data it can.
"""


_STES = (
    "identity", "relu", "clipped_relu", "log_tailed_relu", "reverse_exponential", "reverse_exponential_step",
)  # fmt: skip


@dataclass(frozen=True)
class Data:
    """`classes` subspaces of `dim` dimensions each; all principal angles between any two are `angle` degrees."""

    classes: int = 2
    dim: int = 2
    samples: int = 50  # per class
    angle: float = 90.0
    half: bool = False
    norms: tuple[float, float] = (0.5, 1.0)


def subspaces(classes: int, dim: int, angle: float) -> Tensor:
    """Orthonormal bases, [classes, dim, classes * dim]: unit vectors of R^classes at `angle` to each other, times each
    unit vector of R^dim. Linearly independent for 0 < angle <= 90."""
    cosine = math.cos(math.radians(angle))
    gram = torch.full((classes, classes), cosine, dtype=torch.float64).fill_diagonal_(1.0)
    vectors = torch.linalg.cholesky(gram)
    return torch.einsum("ia,jb->ijab", vectors, torch.eye(dim, dtype=torch.float64)).flatten(2)


def sample(data: Data, seed: int) -> tuple[Tensor, Tensor]:
    """(x [classes * samples, classes * dim], y): uniform directions within each subspace, and uniform norms."""
    generator = torch.Generator().manual_seed(seed)
    shape = (data.classes, data.samples, data.dim)
    direction = torch.randn(shape, generator=generator, dtype=torch.float64)
    direction /= direction.norm(dim=-1, keepdim=True)
    if data.half:
        direction[..., 0] = direction[..., 0].abs() + 0.3
        direction /= direction.norm(dim=-1, keepdim=True)
    low, high = data.norms
    norm = low + (high - low) * torch.rand(*shape[:2], 1, generator=generator, dtype=torch.float64)
    x = torch.einsum("isj,ijd->isd", direction * norm, subspaces(data.classes, data.dim, data.angle))
    return x.flatten(0, 1).float(), torch.arange(data.classes).repeat_interleave(data.samples)


def outputs(x: Tensor, weight: Tensor, classes: int, alpha: float, bits: int, ste: str) -> Tensor:
    """o, [..., samples, classes]: the sums over each class's neurons; neuron j belongs to class j % classes."""
    hidden = weight.size(-2)
    v = torch.nn.functional.one_hot(torch.arange(hidden) % classes, classes).to(x.dtype)
    return qrelu(x @ weight.mT, alpha, bits, ste=ste) @ v


def margins(o: Tensor, y: Tensor) -> Tensor:
    """o_y - max_{i != y} o_i, [..., samples]; the first of equal maxima gets the gradient."""
    own = torch.nn.functional.one_hot(y, o.size(-1)).bool()
    best = o.masked_fill(own, -math.inf).argmax(-1, keepdim=True)
    return (o * own).sum(-1) - o.gather(-1, best).squeeze(-1)


@dataclass(frozen=True)
class Setting:
    """One network and STE; alpha is top / (2**bits - 1)."""

    ste: str
    bits: int
    hidden: int
    angle: float


@dataclass(frozen=True)
class Run:
    """One seed of a setting. iterations: until the loss is zero with all samples correct; None if never."""

    seed: int
    iterations: int | None
    loss: float
    accuracy: float
    norm_mean: float  # of the neurons' weights at the end
    norm_max: float


def train(
    setting: Setting, data: Data, seeds: int, iterations: int, lr: float, top: float
) -> tuple[list[Run], list[float]]:
    """Train all seeds at once, until all are done. Returns the runs and the mean loss over the seeds by iteration."""
    x, y = (torch.stack(parts) for parts in zip(*(sample(data, seed) for seed in range(seeds))))
    y, alpha = y[0], top / (2**setting.bits - 1)
    weight = torch.stack([
        torch.randn(setting.hidden, x.size(-1), generator=torch.Generator().manual_seed(10**6 + seed))
        for seed in range(seeds)
    ]).requires_grad_()  # fmt: skip
    reached: list[int | None] = [None] * seeds
    curve = []
    for iteration in range(iterations + 1):
        margin = margins(outputs(x, weight, data.classes, alpha, setting.bits, setting.ste), y)
        # relu's gradient at 0 is 0: a sample without loss has no gradient.
        losses = torch.relu(1 - margin).mean(-1)
        curve.append(losses.mean().item())
        for seed in (losses == 0).nonzero()[:, 0].tolist():
            if reached[seed] is None:
                reached[seed] = iteration
        if None not in reached or iteration == iterations:
            break
        (gradient,) = torch.autograd.grad(losses.sum(), weight)
        with torch.no_grad():
            weight -= lr * gradient
    norms, right = weight.detach().norm(dim=-1), (margin > 0).double().mean(-1)
    numbers = (losses.tolist(), right.tolist(), norms.mean(-1).tolist(), norms.amax(-1).tolist())
    runs = [Run(seed, *own) for seed, own in enumerate(zip(reached, *numbers))]
    return runs, curve


# ------------------------------------------------------------------------------------------ the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m coarsegrad synthetic` to `parser`."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    known = ", ".join(_STES)
    add("--stes", nargs="+", choices=list(stes()), default=list(_STES), metavar="STE", help=f"STEs (default {known})")
    add(
        "--bits",
        nargs="+",
        type=int,
        choices=range(1, 9),
        default=[1, 2, 3, 4, 8],
        help="bits of an activation (default 1 2 3 4 8)",
    )
    add(
        "--hidden",
        nargs="+",
        type=positive(int),
        default=[32, 8, 16, 64],
        metavar="K",
        help="hidden neurons (default 32 8 16 64)",
    )
    add(
        "--angles",
        nargs="+",
        type=_angle,
        default=[90.0, 75.0, 60.0, 45.0, 30.0],
        metavar="DEGREES",
        help="between the subspaces, in (0, 90] (default 90 75 60 45 30)",
    )
    add("--seeds", type=positive(int), default=20, help="runs per setting (default 20)")
    add("--classes", type=positive(int), default=2, help="number of classes (default 2)")
    add("--dim", type=positive(int), default=2, help="dimensions of each subspace (default 2)")
    add("--samples", type=positive(int), default=50, help="samples per class (default 50)")
    add("--data", choices=("symmetric", "half"), default="symmetric", help="see below (default symmetric)")
    add("--iterations", type=positive(int), default=5000, help="upper bound of the iterations (default 5000)")
    add("--lr", type=positive(float), default=0.1, help="learning rate (default 0.1)")
    add("--top", type=positive(float), default=1.5, help="the top level; alpha is TOP / (2**bits - 1) (default 1.5)")
    add(
        "--out",
        type=Path,
        default=Path("runs/synthetic"),
        metavar="FOLDER",
        help="results and figures (default runs/synthetic)",
    )


def main(args: argparse.Namespace) -> None:
    """Run the command. Exits with a message and status 1 for an error of the user, with 130 after Ctrl-C."""
    with ending("synthetic", f"Finished settings are saved in {args.out}"):
        _run(args)


def _angle(text: str) -> float:
    angle = float(text)
    if not 0 < angle <= 90:
        raise argparse.ArgumentTypeError(f"an angle must be in (0, 90] degrees, got {text}")
    return angle


def _settings(args: argparse.Namespace) -> Iterator[Setting]:
    places = dict.fromkeys([(k, args.angles[0]) for k in args.hidden] + [(args.hidden[0], a) for a in args.angles])
    for bits, ste, (hidden, angle) in itertools.product(args.bits, args.stes, places):
        yield Setting(ste, bits, hidden, angle)


def _run(args: argparse.Namespace) -> None:
    from . import synthetic_figures  # slow to import: not for --help

    if args.classes < 2:
        raise ExperimentError(f"--classes must be at least 2, got {args.classes}")
    if too_few := [k for k in args.hidden if k < args.classes]:
        raise ExperimentError(f"--hidden must be at least the number of classes, {args.classes}, got {too_few[0]}")
    torch.set_num_threads(1)  # the tensors are small
    names = ("classes", "dim", "samples", "data", "seeds", "iterations", "lr", "top")
    config = {name: getattr(args, name) for name in names}
    args.out.mkdir(parents=True, exist_ok=True)
    results, environments = _finished(args.out / "results.json", config)
    for setting in tqdm(list(_settings(args)), unit="setting", disable=None):
        if any(result["setting"] == asdict(setting) for result in results):
            continue
        data = Data(args.classes, args.dim, args.samples, setting.angle, args.data == "half")
        if (here := environment(torch.device("cpu"))) not in environments:
            environments.append(here)
        runs, curve = train(setting, data, args.seeds, args.iterations, args.lr, args.top)
        # About 500 points of the curve are enough for the figure.
        stride = max(1, len(curve) // 500)
        results.append({
            "setting": asdict(setting), "runs": [asdict(run) for run in runs],
            "curve": {"stride": stride, "loss": [float(f"{loss:.4g}") for loss in curve[::stride]]},
        })  # fmt: skip
        _save(results, config, environments, args.out)
    by_setting = {tuple(result["setting"].values()): result for result in results}
    results = [by_setting[tuple(asdict(setting).values())] for setting in _settings(args)]
    _save(results, config, environments, args.out)
    print("\n".join(summary(results)))
    figures = synthetic_figures.draw(results, args.hidden[0], args.angles[0], args.out)
    print("", *figures, args.out / "runs.csv", args.out / "results.json", sep="\n")


def _finished(path: Path, config: dict) -> tuple[list[dict], list[dict]]:
    """(the existing results, the environments that they come from)."""
    if not path.exists():
        return [], []
    try:
        report = json.loads(path.read_text())
        results, other, environments = report["results"], report["config"], report["environments"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"{path} is not a results file of this command ({error}); choose another --out"
        ) from error
    for name, value in config.items():
        if other.get(name) != value:
            raise ExperimentError(f"{path} has {name} {other.get(name)!r}, wanted {value!r}; choose another --out")
    return results, environments


def _save(results: list[dict], config: dict, environments: list[dict], folder: Path) -> None:
    report = {"config": config, "environments": environments, "results": results}
    with replacing(folder / "results.json") as file:
        file.write(json.dumps(report).encode() + b"\n")
    text = io.StringIO()
    rows = [result["setting"] | run for result in results for run in result["runs"]]
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(folder / "runs.csv") as file:
        file.write(text.getvalue().encode())
