"""`calibrate`: alphas from data."""

from __future__ import annotations

import gc
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._checks import check_option
from .._text import format_table
from ..nn import QReLU, half_gaussian_alpha
from . import figures
from .counting import ForwardCounter, InputCounter, all_reduce
from .histogram import StaircaseErrors
from .inputs import InputHistogram, of_distributions, range_of
from .recording import ReluLocations
from .watching import qrelus_of, run_batches, warn_about_unreached, watched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("mse", "percentile", "half_gaussian")

_SATURATED = 0.5  # fraction of the positive inputs above the top level from which to warn
_SPREAD = 2.0  # factor between the ranges that share an alpha from which to warn


@dataclass(frozen=True)
class CalibratedLayer:
    """What `calibrate` found for one QReLU.

    alpha: the new alpha, per channel. before: the old one. snr: signal-to-noise ratio of the float activation's output
    and its quantization error, in dB. zero: fraction of the inputs that give 0. saturated: fraction of the positive
    inputs above the top level. reached: whether any batch reached the layer. If none did, or no input was positive,
    alpha is unchanged. calls: the largest number of its runs in a forward of the model. spread: ratio of the largest to
    the smallest range of its calls, with the range of the first, second, ... call of the forwards as the root mean
    square of its positive inputs. inputs: the positive inputs against the new levels; None if no batch reached it.
    """

    name: str
    alpha: Tensor
    before: Tensor
    snr: float
    zero: float
    saturated: float
    reached: bool
    calls: int
    spread: float
    inputs: InputHistogram | None = field(default=None, repr=False)


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` found, layer by layer. Prints as a table.

    remaining: the lines, as file:line, that call a relu other than a QReLU.
    """

    layers: tuple[CalibratedLayer, ...]
    remaining: tuple[str, ...]

    def __str__(self) -> str:
        header: tuple[str, ...] = ("QReLU", "alpha before", "alpha", "SNR (dB)", "zero", "saturated")
        rows: list[tuple[str, ...]] = [
            (s.name, range_of(s.before), range_of(s.alpha), f"{s.snr:.1f}", f"{s.zero:.1%}", f"{s.saturated:.1%}")
            if s.reached
            else (s.name, range_of(s.before), range_of(s.alpha), "not reached", "", "")
            for s in self.layers
        ]
        notes = "zero: fraction of all inputs; saturated: fraction of the positive inputs"
        if any(s.calls > 1 for s in self.layers):
            header += ("calls", "spread")
            rows = [(*row, f"{s.calls}", f"{s.spread:.3g}") for row, s in zip(rows, self.layers)]
            notes += "; calls: per forward; spread: ratio of the largest to the smallest range of the calls"
        lines = [format_table(header, rows), notes]
        if self.remaining:
            lines.append(f"relus other than QReLUs are called at {', '.join(self.remaining)}")
        return "\n".join(lines)

    __repr__ = __str__

    def plot(self, path: str | os.PathLike[str] | None = None, *, layers: Iterable[str] | None = None) -> Figure:
        """Draw for each layer its positive inputs against the new levels (dots) and thresholds (lines), with what is
        above the top level in orange, its fractions of zeros and of saturated positive inputs, and its SNR.

        path: where to write the image, in the format of its suffix; None: nowhere. layers: the names of those to draw,
        in that order; all by default.

        Returns a matplotlib Figure, which notebooks show. Raises ImportError without matplotlib, and TypeError or
        ValueError for unknown layers.
        """
        places = figures.chosen([s.name for s in self.layers], layers)
        found = [self.layers[i] for i in places]
        columns = [
            figures.Column.zero("zero", [s.zero for s in found]),
            figures.Column.saturated("saturated,\nof the positive", [s.saturated for s in found]),
            figures.Column("SNR (dB)", [s.snr for s in found], "0.7", ".1f", 10.0),
        ]
        names, alphas = [s.name for s in found], [range_of(s.alpha) for s in found]
        title, inputs = "calibrate: positive inputs by layer, and the new levels", [s.inputs for s in found]
        return figures.draw(title, names, alphas, inputs, columns, path)


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

    Meanwhile the QReLUs compute the float activation that they replace (relu(x) or its square, at most their `limit`),
    so that every layer sees the inputs it has in the float model. Each counts its positive inputs in a histogram of
    fixed size (96 KiB per alpha), in which frequent values, such as limits and levels, are exact. The model is in
    evaluation mode and without gradients. The alphas do not depend on the order of the data. If torch.distributed is
    initialized, every process must call this with its own batches: the counts are summed, and all processes set the
    same alphas.

    model: has `QReLU`s, and is not yet compiled or sharded.
    batches: what the model takes: a tensor, a tuple or list of arguments, or a mapping of keywords, such as a
        tokenizer's output. Tensors are moved to the model's device.
    method: "mse" minimizes the sum of (relu(x) - Q(x))**2; "percentile" sets the top level L[q] to that percentile of
        the positive inputs; "half_gaussian" takes the best alpha for a Gaussian with the second moment of the positive
        inputs (Yin et al. 2019, arXiv 1903.05662). The layer's `limit` is an upper bound of the top level.
    percentile: in (0, 100]; useful from about 50.
    channel_dim: if given, every layer gets an alpha for each index along this dimension of its input.
    forward: forward(model, batch) runs the model on batches of another form, such as pairs of input and label.
    progress: show a progress bar on standard error if that is a terminal.

    A learned alpha remains the same Parameter, so that an optimizer still refers to it, even if its shape changes. An
    alpha whose shape changes must not have optimizer state yet. A parametrized alpha is set through its
    parametrization. Warns with the names of layers that no batch reached, that never have a positive input (their alpha
    does not change), that saturate more than half of their positive inputs, or that run several times in a forward
    with ranges more than a factor of 2 apart; and with the lines that call other relus.

    Returns a `CalibrationReport`. Raises TypeError or ValueError, without changing any alpha, if model has no QReLU, if
    batches is empty, for a wrong argument, and, with the layer's name, if an input is NaN or +inf (+inf is allowed if
    there is a limit, and -inf gives 0), or if it or an alpha has no values (meta device, FakeTensorMode).
    """
    layers = qrelus_of(model)
    check_option("method", method, METHODS)
    if isinstance(percentile, bool) or not isinstance(percentile, (int, float)) or not 0 < percentile <= 100:
        raise ValueError(f"percentile must be in (0, 100], got {percentile!r}")
    if channel_dim is not None and type(channel_dim) is not int:
        raise TypeError(f"channel_dim must be an int or None, got {channel_dim!r}")
    forwards = ForwardCounter()
    counted = {name: InputCounter(name, layer, channel_dim, forwards) for name, layer in layers.items()}
    relus = ReluLocations()
    with watched(model, layers, counted), forwards.watching(model), relus:
        run_batches(model, batches, forwards.counting(forward), progress, "calibrate")
    all_reduce(list(counted.values()))
    with torch.device("cpu"):
        found = {name: _calibrated(name, count, method, percentile) for name, count in counted.items()}
    for name, layer in layers.items():
        if found[name].reached and found[name].alpha.shape != layer.alpha.shape:
            _check_no_optimizer(name, layer, len(found[name].alpha))
    report = CalibrationReport(
        tuple(_apply(layers[name], result, channel_dim) for name, result in found.items()),
        tuple(sorted(relus.places)),
    )
    _warn_about(report)
    return report


def _apply(layer: QReLU, found: CalibratedLayer, channel_dim: int | None) -> CalibratedLayer:
    """Set the alpha. A parametrized alpha may then differ from it in the last bits."""
    if not found.reached:
        return found
    layer._set_alpha(found.alpha, layer.channel_dim if channel_dim is None else channel_dim)
    return replace(found, alpha=layer.alpha.detach().clone())


def _check_no_optimizer(name: str, layer: QReLU, size: int) -> None:
    """Refuse optimizer state of the old shape, which would fail in a later step."""
    for parameter in layer.parameters():
        for holder in gc.get_referrers(parameter):
            if isinstance(holder, defaultdict) and holder.get(parameter):  # Optimizer.state
                raise ValueError(
                    f"channel_dim would give {name} {size} alphas instead of {layer.alpha.numel()}, but an optimizer"
                    " has state of the old shape: calibrate before the first step"
                )


def _warn_about(report: CalibrationReport) -> None:
    layers = report.layers
    warn_about_unreached("calibrate", [s.name for s in layers if not s.reached], stacklevel=3)
    for what, names in (
        ("no positive input in", [s.name for s in layers if s.reached and s.zero == 1]),
        (f"more than {_SATURATED:.0%} of the positive inputs saturate in",
         [s.name for s in layers if s.reached and s.zero < 1 and s.saturated > _SATURATED]),
        ("calls with different ranges share an alpha:",
         [f"{s.name} runs {s.calls} times in a forward, with ranges that differ by a factor of {s.spread:.1f}"
          for s in layers if s.spread > _SPREAD]),
        ("relus other than QReLUs are called at", report.remaining),
    ):  # fmt: skip
        if names:
            warnings.warn(f"calibrate: {what} {', '.join(names)}", stacklevel=3)


def _calibrated(name: str, counted: InputCounter, method: str, percentile: float) -> CalibratedLayer:
    layer, before = counted.layer, counted.layer.alpha.detach().clone()
    if not counted.rows or counted.histogram is None or counted.dtype is None:
        return CalibratedLayer(name, before, before, math.nan, math.nan, math.nan, False, 0, math.nan)
    if len(before) not in (1, counted.rows):
        raise ValueError(f"the input of {name} has {counted.rows} channels, its alpha {len(before)}")
    top, power, error, positive, above, saturated = 2**layer.bits - 1, 0.0, 0.0, 0.0, 0.0, 0.0
    alphas = before.cpu().expand(counted.rows).clone()
    distributions = counted.histogram.rows(2 if layer.squared else 1, counted.dtype)
    for i, inputs in enumerate(distributions):
        if not inputs.count:
            continue
        errors = StaircaseErrors(inputs, layer.bits, layer.rounding, layer.limit, alphas.dtype)
        if method == "mse":
            best = errors.best()
        elif method == "percentile":
            best = inputs.percentile(percentile) / top
        else:
            deviation = math.sqrt(inputs.totals[2 // inputs.power] / inputs.count)
            best = deviation * half_gaussian_alpha(layer.bits, layer.rounding)
        alphas[i : i + 1] = alpha = errors.rounded(torch.tensor([best], dtype=torch.float64))
        power += inputs.totals[2]
        error += errors(alpha).item()
        positive += inputs.count
        zero, full = errors.counts_at_ends(alpha)
        above += inputs.count - zero
        saturated += inputs.count - full
    return CalibratedLayer(
        name=name,
        alpha=alphas.to(before.device),
        before=before,
        snr=_decibels(power, error),
        zero=1 - above / max(counted.elements, 1),
        saturated=max(saturated, 0) / max(positive, 1),  # a difference of sums of shares
        reached=True,
        calls=len(counted.calls),
        spread=counted.spread,
        inputs=of_distributions(distributions, alphas, layer.bits, layer.rounding),
    )


def _decibels(power: float, error: float) -> float:
    if not power or not error:
        return math.inf if power else math.nan
    ratio = power / error
    return 10 * math.log10(ratio) if ratio else -math.inf
