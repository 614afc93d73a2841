"""`calibrate`: alphas from data. It looks at forwards from outside, in evaluation mode and without gradients."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from tqdm import tqdm

from .nn import QReLU, half_gaussian_alpha
from .reference import check_word
from .ste import format_table

METHODS = ("mse", "percentile", "half_gaussian")

# The histogram: bins by the leading bits of a float32, so that it needs no range and counts merge exactly. 64 bins for
# each power of two are 1.1 to 1.6% wide; what is outside of the range is counted in its first or last bin.
_MANTISSA = 6
_LOWEST, _HIGHEST = -40, 24  # powers of two
_BINS = (_HIGHEST - _LOWEST) << _MANTISSA
_SHIFT = 23 - _MANTISSA
_FIRST = (_LOWEST + 127) << _MANTISSA

_SATURATED = 0.5  # share of the positive inputs above the top level that is worth a warning


@dataclass(frozen=True)
class CalibratedLayer:
    """What `calibrate` found for one QReLU.

    alpha: the new one, of each channel. before: the old one. snr: power of the float activation's output over that of
    the error, in decibels. zero: share of the inputs that give 0. saturated: share of the positive inputs above the top
    level. reached: whether any batch came there; where none did, or no input was positive, alpha is the old one.
    """

    name: str
    alpha: Tensor
    before: Tensor
    snr: float
    zero: float
    saturated: float
    reached: bool


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` found, layer by layer. Prints as a table.

    remaining: the lines, as file:line, in which a relu was called that is not a QReLU.
    """

    layers: tuple[CalibratedLayer, ...]
    remaining: tuple[str, ...]

    def __str__(self) -> str:
        rows = [
            (s.name, _span(s.before), _span(s.alpha), f"{s.snr:.1f}", f"{s.zero:.1%}", f"{s.saturated:.1%}")
            if s.reached
            else (s.name, _span(s.before), _span(s.alpha), "not reached", "", "")
            for s in self.layers
        ]
        header = ("QReLU", "alpha before", "alpha", "snr, dB", "zero", "saturated")
        lines = [format_table(header, rows), "zero: of all inputs; saturated: of the positive ones"]
        if self.remaining:
            lines.append(f"a relu that is no QReLU is called at {', '.join(self.remaining)}")
        return "\n".join(lines)

    __repr__ = __str__


def _span(alpha: Tensor) -> str:
    low, high = alpha.min().item(), alpha.max().item()
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def calibrate(
    model: nn.Module,
    batches: Iterable[object],
    method: str = "mse",
    *,
    percentile: float = 99.9,
    channel_dim: int | None = None,
    forward: Callable[[nn.Module, object], object] | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """Sets the alpha of every `QReLU` in `model` from data, in one pass.

    While it runs, the QReLUs compute the float activation that they stand for (relu(x), its square, at most their
    `limit`), so that all layers see what they would see in the float model, and count their positive inputs in a
    histogram of fixed memory (32 KiB for each alpha). The model is in evaluation mode and without gradients meanwhile;
    no state is kept, and none moves in a training forward. The same data give the same alphas, in any order. Where
    torch.distributed is initialised, every process must call it, each with its own batches: the counts are added, and
    all get the same alphas.

    model: it has `QReLU`s, and is not yet compiled or sharded.
    batches: what the model takes: a tensor, a tuple or list of arguments, or a mapping of keywords; tensors are moved
        to the model's device.
    method: "mse": the alpha of least sum of (relu(x) - Q(x))**2; "percentile": the top level L[q] is that percentile
        of the positive inputs; "half_gaussian": the best alpha for a Gaussian with the second moment of the positive
        inputs (Yin et al. 2019, arXiv 1903.05662).
    percentile: above 0, at most 100; 50 or more is what makes sense.
    channel_dim: gives every layer an alpha for each index along that dimension of its input. None: as the layers are.
    forward: forward(model, batch) runs the model, where batches are something else, as pairs of input and label.
    progress: a bar on standard error, where that is a terminal.

    A learned alpha stays the same Parameter, for optimizers that hold it, also where its shape changes. Warns, by name,
    of layers that no batch reached, whose inputs are never positive (these keep their alpha), or of which more than
    half of the positive inputs are above the top level; and of lines where another relu is called.

    Returns a `CalibrationReport`. Raises TypeError or ValueError, with all alphas as they were, if model has no QReLU,
    if batches is empty, for a wrong argument, and, with the layer's name, where an input is not finite.
    """
    layers = layers_of(model)
    check_word("method", method, METHODS)
    if isinstance(percentile, bool) or not isinstance(percentile, (int, float)) or not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, got {percentile!r}")
    if channel_dim is not None and type(channel_dim) is not int:
        raise TypeError(f"channel_dim must be an int or None, got {channel_dim!r}")
    counted = {name: _Counted(name, layer, channel_dim) for name, layer in layers.items()}
    relus = _OtherRelus()
    with watched(model, {layers[name]: count for name, count in counted.items()}), relus:
        run_batches(model, batches, forward, progress, "calibrate")
    for name, rows in zip(counted, _agreed([count.rows for count in counted.values()])):
        counted[name].add_up(rows)
    done = tuple(_calibrated(name, counted[name], method, percentile) for name in layers)
    with torch.no_grad():
        for layer, result in zip(layers.values(), done):
            if layer.alpha.shape == result.alpha.shape:
                layer.alpha.copy_(result.alpha)
            else:
                layer.alpha.data = result.alpha.to(layer.alpha)
            if channel_dim is not None and result.reached:
                layer.channel_dim = channel_dim
    report = CalibrationReport(done, tuple(sorted(relus.places)))
    _warn_of(report)
    return report


def _warn_of(report: CalibrationReport) -> None:
    layers = report.layers
    for what, names in (
        ("no batch reached", [s.name for s in layers if not s.reached]),
        ("never a positive input in", [s.name for s in layers if s.reached and s.zero == 1]),
        (f"more than {_SATURATED:.0%} of the positive inputs are above the top level in",
         [s.name for s in layers if s.reached and s.zero < 1 and s.saturated > _SATURATED]),
        ("a relu that is no QReLU is called at", report.remaining),
    ):  # fmt: skip
        if names:
            warnings.warn(f"calibrate: {what} {', '.join(names)}", stacklevel=3)


def layers_of(model: nn.Module) -> dict[str, QReLU]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = {name or "(model)": module for name, module in model.named_modules() if isinstance(module, QReLU)}
    if not layers:
        raise ValueError("model has no QReLU; quantize_ puts them in")
    return layers


def run_batches(model: nn.Module, batches: Iterable, forward: Callable | None, progress: bool, title: str) -> None:
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    count = 0
    for batch in tqdm(batches, desc=title, unit="batch", leave=False, disable=None if progress else True):
        batch = tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, batch)
        if forward is not None:
            forward(model, batch)
        elif isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, (tuple, list)):
            model(*batch)
        else:
            model(batch)
        count += 1
    if not count:
        raise ValueError("batches is empty")


@contextmanager
def watched(model: nn.Module, watchers: dict[QReLU, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """In the block, `watchers` compute in place of the layers; evaluation mode, without gradients."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    for layer, watcher in watchers.items():
        layer.forward = watcher
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in watchers:
            del layer.forward
        for module, mode in training.items():
            module.training = mode


class _OtherRelus(TorchFunctionMode):
    """Notes where a relu is called in the block, as file:line outside of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("relu", "relu_", "relu6", "relu6_"):
            frame = sys._getframe(1)
            while frame.f_back and frame.f_code.co_filename.startswith(_TORCH):
                frame = frame.f_back
            self.places.add(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return function(*args, **(kwargs or {}))


_TORCH = os.path.dirname(torch.__file__)


def _float_activation(layer: QReLU, x: Tensor) -> Tensor:
    """What the layer stands for; not by relu, which is watched."""
    y = x.clamp_(0, layer.limit) if layer.inplace else x.clamp(0, layer.limit)
    return y.square() if layer.squared else y


class _Counted:
    """A histogram of the positive inputs of one layer: int64 [rows, _BINS], a row for each alpha that is wanted."""

    def __init__(self, name: str, layer: QReLU, channel_dim: int | None) -> None:
        self.layer, self._name = layer, name
        self._channel_dim = layer.channel_dim if channel_dim is None else channel_dim
        self.counts: Tensor | None = None
        self.elements = torch.zeros(1, dtype=torch.int64)

    @property
    def rows(self) -> int:
        return 0 if self.counts is None else self.counts.size(0)

    def __call__(self, x: Tensor) -> Tensor:
        if not x.isfinite().all():
            raise ValueError(f"the input of {self._name} is not finite")
        dim = self._channel_dim
        if dim is not None and not -x.dim() <= dim < x.dim():
            raise ValueError(f"channel_dim is {dim}, but the input of {self._name} has shape {list(x.shape)}")
        rows = x.reshape(1, -1) if dim is None else x.movedim(dim, 0).flatten(1)
        rows = rows.float().clamp(max=self.layer.limit)
        bins = ((rows.view(torch.int32) >> _SHIFT) - _FIRST).clamp_(0, _BINS - 1).long()
        bins += torch.arange(rows.size(0), device=x.device)[:, None] * _BINS
        counts = bins[rows > 0].bincount(minlength=rows.size(0) * _BINS).view(-1, _BINS)
        if self.counts is None:
            self.counts = counts
        elif self.counts.size(0) != counts.size(0):
            wanted = self.counts.size(0)
            raise ValueError(f"{self._name} had inputs of {wanted} channels before, now of {counts.size(0)}")
        else:
            self.counts += counts
        self.elements += x.numel()
        return _float_activation(self.layer, x)

    def add_up(self, rows: int) -> None:
        """The sum over all processes; rows: what those have that were reached."""
        if not _distributed() or not rows:
            return
        if self.counts is None:
            self.counts = torch.zeros(rows, _BINS, dtype=torch.int64, device=self.layer.alpha.device)
        self.elements = self.elements.to(self.counts.device)
        for t in (self.counts, self.elements):
            torch.distributed.all_reduce(t)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _agreed(rows: list[int]) -> list[int]:
    """The rows of every layer in the processes that reached it."""
    if not _distributed():
        return rows
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, rows)
    return [max(of_layer) for of_layer in zip(*everyone)]


class _Errors:
    """Squared errors of a layer's staircase on a histogram, for any alpha; within a bin the inputs count as uniform."""

    def __init__(self, layer: QReLU) -> None:
        self._q = q = 2**layer.bits - 1
        self._power = 2 if layer.squared else 1
        index = torch.arange(_BINS + 1, dtype=torch.float64)
        self.edges = torch.exp2(_LOWEST + index // 2**_MANTISSA) * (1 + index % 2**_MANTISSA / 2**_MANTISSA)
        self.thresholds = torch.arange(1, q + 1, dtype=torch.float64) - (1.0 if layer.rounding == "ceil" else 0.5)
        if layer.rounding == "hwgq":
            self.thresholds[0] = 0

    def above(self, counts: Tensor, bounds: Tensor, power: int = 0) -> Tensor:
        """The sum of x**power over the inputs above each bound (any shape). counts: float64 [_BINS]."""
        low, high = self.edges[:-1], self.edges[1:]
        integral = self.edges ** (power + 1) / (power + 1)
        density = counts / (high - low)
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), (density * integral.diff()).cumsum(0)])
        bounds = bounds.clamp(self.edges[0], self.edges[-1])
        bins = (torch.searchsorted(self.edges, bounds, right=True) - 1).clamp(max=_BINS - 1)
        part = density[bins] * (bounds ** (power + 1) / (power + 1) - integral[bins])
        return sums[-1] - sums[bins] - part

    def __call__(self, counts: Tensor, alphas: Tensor) -> Tensor:
        """The sum of (target - Q)**2 for each alpha [A], where the target is x, or its square, of a positive x."""
        edges = alphas[:, None] * self.thresholds
        every = torch.zeros_like(alphas)[:, None]
        none = torch.full_like(every, math.inf)
        steps = torch.cat([every, edges, none], 1)  # code k is between steps k and k + 1
        mass, first, second = (-self.above(counts, steps, n * self._power).diff(dim=1) for n in range(3))
        levels = (alphas[:, None] * torch.arange(self._q + 1)) ** self._power
        return (second - 2 * levels * first + levels**2 * mass).sum(1)

    def best(self, counts: Tensor) -> float:
        """The alpha of least error: on a grid of eighths of an octave, then on one 16 times as fine."""
        alpha, step = self.edges[counts.nonzero()[-1] + 1].item() / self._q, 2.0 ** (1 / 8)
        for exponents in (torch.arange(-96, 9), torch.arange(-16, 17)):
            alphas = alpha * step ** exponents.double()
            alpha = alphas[self(counts, alphas).argmin()].item()
            step **= 1 / 16
        return alpha


def _calibrated(name: str, counted: _Counted, method: str, percentile: float) -> CalibratedLayer:
    layer, before = counted.layer, counted.layer.alpha.detach().clone()
    if not counted.rows:
        return CalibratedLayer(name, before, before, math.nan, math.nan, math.nan, reached=False)
    errors, q, rows = _Errors(layer), 2**layer.bits - 1, counted.counts.cpu().double()
    if len(before) not in (1, len(rows)):
        raise ValueError(f"the input of {name} has {len(rows)} channels, its alpha {len(before)}")
    alphas = []
    for counts, kept in zip(rows, before.cpu().double().expand(len(rows))):
        if not counts.any():
            alphas.append(kept.item())
        elif method == "mse":
            alphas.append(errors.best(counts))
        elif method == "percentile":
            last = torch.searchsorted(counts.cumsum(0), counts.sum() * percentile / 100).clamp(max=_BINS - 1)
            alphas.append(errors.edges[last + 1].item() / q)
        else:
            every = torch.zeros((), dtype=torch.float64)
            deviation = (errors.above(counts, every, 2) / counts.sum()).sqrt().item()
            alphas.append(deviation * half_gaussian_alpha(layer.bits, layer.rounding))
    found = torch.tensor(alphas, dtype=torch.float64)
    first, top = errors.thresholds[0] * found, q * found
    power = error = above = saturated = 0.0
    for i, counts in enumerate(rows):
        power += errors.above(counts, torch.zeros(()), 4 if layer.squared else 2).item()
        error += errors(counts, found[i : i + 1]).item()
        above += errors.above(counts, first[i]).item()
        saturated += errors.above(counts, top[i]).item()
    return CalibratedLayer(
        name=name,
        alpha=found.to(before),
        before=before,
        snr=10 * math.log10(power / error) if error > 0 else math.nan,
        zero=1 - above / max(counted.elements.item(), 1),
        saturated=saturated / max(rows.sum().item(), 1),
        reached=True,
    )
