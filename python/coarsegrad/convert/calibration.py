"""`calibrate`: alphas from data. It looks at forwards from outside, in evaluation mode and without gradients."""

from __future__ import annotations

import gc
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..nn import QReLU, half_gaussian_alpha
from ..reference import check_word
from ..ste import format_table
from .counting import CountedInputs, Forwards, add_up
from .histogram import StaircaseErrors
from .recording import RelusCalled
from .watching import layers_of, run_batches, warn_of_unreached, watched

METHODS = ("mse", "percentile", "half_gaussian")

_SATURATED = 0.5  # share of the positive inputs above the top level that is worth a warning
_SPREAD = 2.0  # factor between the ranges that one alpha serves that is worth a warning


@dataclass(frozen=True)
class CalibratedLayer:
    """What `calibrate` found for one QReLU.

    alpha: the new one, of each channel. before: the old one. snr: power of the float activation's output over that of
    the error, in decibels. zero: share of the inputs that give 0. saturated: share of the positive inputs above the top
    level. reached: whether any batch came there; where none did, or no input was positive, alpha is the old one. calls:
    how often it ran in a forward of the model, at most. spread: the factor between the largest and the least of its
    calls' ranges, as the root mean square of the positive inputs of the first, second, ... call of each forward.
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


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` found, layer by layer. Prints as a table.

    remaining: the lines, as file:line, in which a relu was called that is not a QReLU.
    """

    layers: tuple[CalibratedLayer, ...]
    remaining: tuple[str, ...]

    def __str__(self) -> str:
        header = ("QReLU", "alpha before", "alpha", "snr, dB", "zero", "saturated")
        rows = [
            (s.name, _span(s.before), _span(s.alpha), f"{s.snr:.1f}", f"{s.zero:.1%}", f"{s.saturated:.1%}")
            if s.reached
            else (s.name, _span(s.before), _span(s.alpha), "not reached", "", "")
            for s in self.layers
        ]
        notes = "zero: of all inputs; saturated: of the positive ones"
        if any(s.calls > 1 for s in self.layers):
            header += ("calls", "spread")
            rows = [(*row, f"{s.calls}", f"{s.spread:.3g}") for row, s in zip(rows, self.layers)]
            notes += "; calls: in a forward; spread: factor between their ranges"
        lines = [format_table(header, rows), notes]
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
    histogram of fixed memory (96 KiB for each alpha), in which a value that comes often, as limits and levels do, is a
    point. The model is in evaluation mode and without gradients meanwhile; no state is kept, and none moves in a
    training forward. The same data give the same alphas, in any order. Where torch.distributed is initialised, every
    process must call it, each with its own batches: the counts are added, and all get the same alphas.

    model: it has `QReLU`s, and is not yet compiled or sharded.
    batches: what the model takes: a tensor, a tuple or list of arguments, or a mapping of keywords, as a tokenizer's;
        tensors in them are moved to the model's device.
    method: "mse": the alpha of least sum of (relu(x) - Q(x))**2; "percentile": the top level L[q] is that percentile
        of the positive inputs; "half_gaussian": the best alpha for a Gaussian with the second moment of the positive
        inputs (Yin et al. 2019, arXiv 1903.05662). By none is the top level above the layer's `limit`.
    percentile: above 0, at most 100; 50 or more is what makes sense.
    channel_dim: gives every layer an alpha for each index along that dimension of its input. None: as the layers are.
    forward: forward(model, batch) runs the model, where batches are something else, as pairs of input and label.
    progress: a bar on standard error, where that is a terminal.

    A learned alpha stays the same Parameter, for optimizers that hold it, also where its shape changes; one of another
    shape must not have an optimizer's state yet. A parametrized one is set through its parametrization. Warns, by name,
    of layers that no batch reached, whose inputs are never positive (these keep their alpha), of which more than half
    of the positive inputs are above the top level, or that run several times in a forward, with ranges more than a
    factor of 2 apart; and of lines where another relu is called.

    Returns a `CalibrationReport`. Raises TypeError or ValueError, with all alphas as they were, if model has no QReLU,
    if batches is empty, for a wrong argument, and, with the layer's name, where an input is NaN or +inf (-inf gives 0,
    and +inf the limit where there is one), or it or an alpha has no values (meta device, FakeTensorMode).
    """
    layers = layers_of(model)
    check_word("method", method, METHODS)
    if isinstance(percentile, bool) or not isinstance(percentile, (int, float)) or not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, got {percentile!r}")
    if channel_dim is not None and type(channel_dim) is not int:
        raise TypeError(f"channel_dim must be an int or None, got {channel_dim!r}")
    forwards = Forwards()
    counted = {name: CountedInputs(name, layer, channel_dim, forwards) for name, layer in layers.items()}
    relus = RelusCalled()
    with watched(model, layers, counted), forwards.of(model), relus:
        run_batches(model, batches, forwards.counting(forward), progress, "calibrate")
    add_up(list(counted.values()))
    with torch.device("cpu"):
        found = {name: _found(name, count, method, percentile) for name, count in counted.items()}
    for name, layer in layers.items():
        if found[name].reached and found[name].alpha.shape != layer.alpha.shape:
            _check_no_optimizer(name, layer, len(found[name].alpha))
    report = CalibrationReport(
        tuple(_applied(layers[name], result, channel_dim) for name, result in found.items()),
        tuple(sorted(relus.places)),
    )
    _warn_of(report)
    return report


def _applied(layer: QReLU, found: CalibratedLayer, channel_dim: int | None) -> CalibratedLayer:
    """Sets the alpha; what the layer then has may differ in the last bits, where it is parametrized."""
    if not found.reached:
        return found
    layer._set_alpha(found.alpha, layer.channel_dim if channel_dim is None else channel_dim)
    return replace(found, alpha=layer.alpha.detach().clone())


def _check_no_optimizer(name: str, layer: QReLU, size: int) -> None:
    """An optimizer's state of the old shape would fail in a step, far from here."""
    for parameter in layer.parameters():
        for holder in gc.get_referrers(parameter):
            if isinstance(holder, defaultdict) and holder.get(parameter):  # Optimizer.state
                raise ValueError(
                    f"channel_dim would give {name} {size} alphas in place of {layer.alpha.numel()}, but an optimizer"
                    " has state of the old shape for it: calibrate before the first step"
                )


def _warn_of(report: CalibrationReport) -> None:
    layers = report.layers
    warn_of_unreached("calibrate", [s.name for s in layers if not s.reached], stacklevel=3)
    for what, names in (
        ("never a positive input in", [s.name for s in layers if s.reached and s.zero == 1]),
        (f"more than {_SATURATED:.0%} of the positive inputs are above the top level in",
         [s.name for s in layers if s.reached and s.zero < 1 and s.saturated > _SATURATED]),
        ("one alpha for calls with different ranges:",
         [f"{s.name} runs {s.calls} times in a forward, ranges differ by a factor of {s.spread:.1f}"
          for s in layers if s.spread > _SPREAD]),
        ("a relu that is no QReLU is called at", report.remaining),
    ):  # fmt: skip
        if names:
            warnings.warn(f"calibrate: {what} {', '.join(names)}", stacklevel=3)


def _found(name: str, counted: CountedInputs, method: str, percentile: float) -> CalibratedLayer:
    layer, before = counted.layer, counted.layer.alpha.detach().clone()
    if not counted.rows:
        return CalibratedLayer(name, before, before, math.nan, math.nan, math.nan, False, 0, math.nan)
    if len(before) not in (1, counted.rows):
        raise ValueError(f"the input of {name} has {counted.rows} channels, its alpha {len(before)}")
    top, power, error, positive, above, saturated = 2**layer.bits - 1, 0.0, 0.0, 0.0, 0.0, 0.0
    alphas = before.cpu().expand(counted.rows).clone()
    for i, inputs in enumerate(counted.histogram.rows(2 if layer.squared else 1, counted.dtype)):
        if not inputs.count:
            continue
        errors = StaircaseErrors(inputs, layer.bits, layer.rounding, layer.limit, alphas.dtype)
        if method == "mse":
            alpha = errors.best()
        elif method == "percentile":
            alpha = inputs.percentile(percentile) / top
        else:
            deviation = math.sqrt(inputs.totals[2 // inputs.power] / inputs.count)
            alpha = deviation * half_gaussian_alpha(layer.bits, layer.rounding)
        alphas[i : i + 1] = alpha = errors.rounded(torch.tensor([alpha], dtype=torch.float64))
        power += inputs.totals[2]
        error += errors(alpha).item()
        positive += inputs.count
        zero, full = errors.ends(alpha)
        above += inputs.count - zero
        saturated += inputs.count - full
    return CalibratedLayer(
        name=name,
        alpha=alphas.to(before.device),
        before=before,
        snr=_decibels(power, error),
        zero=1 - above / max(counted.elements, 1),
        saturated=saturated / max(positive, 1),
        reached=True,
        calls=len(counted.calls),
        spread=counted.spread,
    )


def _decibels(power: float, error: float) -> float:
    if not power or not error:
        return math.inf if power else math.nan
    ratio = power / error
    return 10 * math.log10(ratio) if ratio else -math.inf
