"""`calibrate`: alphas from data. It looks at forwards from outside, in evaluation mode and without gradients."""

from __future__ import annotations

import functools
import gc
import math
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
import torch.distributed
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from .executions import float_activation, moved_to, run
from .histogram import Histogram, StaircaseErrors
from .nn import QReLU, half_gaussian_alpha
from .reference import check_word
from .ste import format_table

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
    forwards = _Forwards()
    counted = {name: _Counted(name, layer, channel_dim, forwards) for name, layer in layers.items()}
    relus = _OtherRelus()
    with watched(model, layers, counted), forwards.of(model), relus:
        run_batches(model, batches, forwards.counting(forward), progress, "calibrate")
    _add_up(list(counted.values()))
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


def warn_of_unreached(function: str, names: list[str], stacklevel: int) -> None:
    if names:
        warnings.warn(f"{function}: no batch reached {', '.join(names)}", stacklevel=stacklevel + 1)


def layers_of(model: nn.Module) -> dict[str, QReLU]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = {name or "(model)": module for name, module in model.named_modules() if isinstance(module, QReLU)}
    if not layers:
        raise ValueError("model has no QReLU; quantize_ puts them in")
    for name, layer in layers.items():
        _check_values("alpha", name, layer.alpha)
    return layers


def _check_values(what: str, name: str, t: Tensor) -> None:
    if t.is_meta or isinstance(t, FakeTensor):
        where = "made in FakeTensorMode" if isinstance(t, FakeTensor) else "on the meta device (or offloaded)"
        raise ValueError(f"{what} of {name} has no values: it is {where}")


def run_batches(model: nn.Module, batches: Iterable, forward: Callable | None, progress: bool, title: str) -> None:
    count = 0
    for batch in tqdm(batches, desc=title, unit="batch", leave=False, disable=None if progress else True):
        (forward or run)(model, moved_to(model, batch))
        count += 1
    if not count:
        raise ValueError("batches is empty")


@contextmanager
def watched(model: nn.Module, layers: dict[str, QReLU], watchers: dict[str, Callable[[Tensor], Tensor]]) -> Iterator:
    """In the block, the `watchers` of the names compute in place of the layers; evaluation mode, no gradients."""
    training = {module: module.training for module in model.modules()}
    before = {layer: vars(layer).get("forward") for layer in layers.values()}
    model.eval()
    for name, layer in layers.items():
        layer.forward = functools.partial(_watch, name, watchers[name])
    try:
        with torch.no_grad():
            yield
    finally:
        for layer, forward in before.items():
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
        for module, mode in training.items():
            module.training = mode


def _watch(name: str, watcher: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    _check_values("the input", name, x)
    if x.is_nested:
        raise ValueError(f"the input of {name} is a nested tensor; give padded batches")
    return watcher(x)


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


class _Forwards:
    """Counts forwards of a model, so that a layer can tell its first call in one from its second."""

    def __init__(self) -> None:
        self.number = 0
        self._depth = 0

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        hooks = ExitStack()
        hooks.callback(model.register_forward_pre_hook(self._enter).remove)
        hooks.callback(model.register_forward_hook(self._leave, always_call=True).remove)
        with hooks:
            yield

    def _enter(self, *_) -> None:
        self.number += self._depth == 0  # a model may call itself
        self._depth += 1

    def _leave(self, *_) -> None:
        self._depth -= 1

    def counting(self, forward: Callable | None) -> Callable | None:
        """`forward`, which need not call the model itself, but a method."""
        if forward is None:
            return None

        def counted(model: nn.Module, batch: object) -> object:
            self.number += 1
            return forward(model, batch)

        return counted


class _Counted:
    """The inputs of one layer: a histogram of a row for each alpha that is wanted, and the power of each call."""

    def __init__(self, name: str, layer: QReLU, channel_dim: int | None, forwards: _Forwards) -> None:
        self.layer, self._name = layer, name
        self._channel_dim = layer.channel_dim if channel_dim is None else channel_dim
        self._forwards, self._forward, self._call = forwards, 0, 0
        self.histogram: Histogram | None = None
        self.rows = self.elements = 0
        self.dtype: torch.dtype | None = None
        self.calls: list[Tensor] = []  # of the first, second, ... in a forward: [sum of squares, count] of x > 0

    def __call__(self, x: Tensor) -> Tensor:
        limited = x.clamp(max=self.layer.limit)
        if not (limited < math.inf).all():
            raise ValueError(f"the input of {self._name} is NaN or +inf")
        dim = self._channel_dim
        if dim is not None and not -x.dim() <= dim < x.dim():
            raise ValueError(f"channel_dim is {dim}, but the input of {self._name} has shape {list(x.shape)}")
        rows = limited.reshape(1, -1) if dim is None else limited.movedim(dim, 0).flatten(1)
        if self.histogram is None:
            self.rows, self.dtype = rows.size(0), x.dtype
            self.histogram = Histogram(self.rows, x.device)
        elif self.rows != rows.size(0):
            raise ValueError(f"{self._name} had inputs of {self.rows} channels before, now of {rows.size(0)}")
        self.histogram.add(rows)
        self.dtype = torch.promote_types(self.dtype, x.dtype)
        self.elements += x.numel()
        self._count_call(limited.clamp_(min=0))
        return float_activation(self.layer, x)

    def _count_call(self, positive: Tensor) -> None:
        if self._forward != self._forwards.number:
            self._forward, self._call = self._forwards.number, 0
        power = torch.linalg.vector_norm(positive, dtype=torch.float64).square()
        found = torch.stack([power, positive.count_nonzero().double()])
        if self._call == len(self.calls):
            self.calls.append(found)
        else:
            self.calls[self._call] += found
        self._call += 1

    @property
    def spread(self) -> float:
        ranges = [math.sqrt(power / count) for power, count in (call.tolist() for call in self.calls) if count]
        return max(ranges) / min(ranges) if ranges else math.nan


def _add_up(counted: list[_Counted]) -> None:
    """Makes every layer's counts those of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    mine = [(count.rows, count.dtype, count.elements, [call.cpu() for call in count.calls]) for count in counted]
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    for count, found in zip(counted, zip(*everyone)):
        found = [of_process for of_process in found if of_process[0]]
        if not found:
            continue
        rows, dtypes, elements, calls = zip(*found)
        count.rows, count.elements = max(rows), sum(elements)
        count.dtype = functools.reduce(torch.promote_types, dtypes)
        count.calls = [sum(call for call in same if call is not None) for same in zip_longest(*calls)]
        count.histogram = count.histogram or Histogram(count.rows, count.layer.alpha.device)
        count.histogram.merge(_all_reduce)


def _all_reduce(t: Tensor, how: str) -> None:
    torch.distributed.all_reduce(t, getattr(torch.distributed.ReduceOp, how.upper()))


def _found(name: str, counted: _Counted, method: str, percentile: float) -> CalibratedLayer:
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
