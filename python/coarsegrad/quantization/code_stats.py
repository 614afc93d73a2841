"""`stats`: zeros, saturation and code counts of each layer, counted from the bits that the kernels return."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import _ops, reference
from .._text import format_table
from .._types import CODE_WIDTH, MaskKind, Rounding
from ..nn import QReLU
from . import figures
from .inputs import InputHistogram, InputTally, range_of
from .watching import qrelus_of, replaced, run_batches, warn_about_unreached, watched

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one QReLU.

    elements: the number of input elements. zero, saturated: the fractions with code 0 and above the top level L[q].
    codes: the number of elements with each code 0..q. alpha: per channel. inputs: the positive inputs.
    """

    name: str
    elements: int
    zero: float
    saturated: float
    codes: tuple[int, ...]
    alpha: Tensor
    inputs: InputHistogram = field(repr=False)


class StatsReport(tuple):
    """`LayerStats` of each layer. Prints as a table; the last column is a bar chart of the codes 1..q."""

    def scalars(self) -> dict[str, float]:
        """Flat numbers for TensorBoard and the like, of each layer that had inputs: zero/NAME, saturated/NAME and
        alpha/NAME, the mean over channels."""
        found: dict[str, float] = {}
        for s in self:
            if s.elements:
                found |= {f"zero/{s.name}": s.zero, f"saturated/{s.name}": s.saturated}
                found[f"alpha/{s.name}"] = s.alpha.double().mean().item()
        return found

    def plot(self, path: str | os.PathLike[str] | None = None, *, layers: Iterable[str] | None = None) -> Figure:
        """Draw for each layer its positive inputs against the levels (dots) and thresholds (lines) of its staircase,
        with what is above the top level in orange, and its fractions of zeros and of saturated elements.

        path: where to write the image, in the format of its suffix; None: nowhere. layers: the names of those to draw,
        in that order; all by default.

        Returns a matplotlib Figure, which notebooks show. Raises ImportError without matplotlib, and TypeError or
        ValueError for unknown layers.
        """
        places = figures.chosen([s.name for s in self], layers)
        found = [self[i] for i in places]
        fractions = [(s.zero, s.saturated) if s.elements else (math.nan, math.nan) for s in found]
        columns = [
            figures.Column.zero("zero", [zero for zero, _ in fractions]),
            figures.Column.saturated("saturated", [saturated for _, saturated in fractions]),
        ]
        names, alphas = [s.name for s in found], [range_of(s.alpha) for s in found]
        inputs = [s.inputs if s.elements else None for s in found]
        return figures.draw("stats: positive inputs by layer", names, alphas, inputs, columns, path)

    def __repr__(self) -> str:
        rows: list[tuple[str, ...]] = [
            (s.name, f"{s.elements:,}", f"{s.zero:.1%}", f"{s.saturated:.1%}", _bars(s.codes[1:])) for s in self
        ]
        return format_table(("QReLU", "elements", "zero", "saturated", "codes above 0"), rows)

    __str__ = __repr__


def _bars(counts: tuple[int, ...]) -> str:
    """At most 32 bars; neighbouring codes share a bar if there are more."""
    width = -(-len(counts) // 32)
    sums = [sum(counts[i : i + width]) for i in range(0, len(counts), width)]
    highest = max(sums)
    return "".join(" ▁▂▃▄▅▆▇█"[math.ceil(8 * count / highest)] if highest else " " for count in sums)


def stats(
    model: nn.Module,
    batches: Iterable[object],
    *,
    forward: Callable[[nn.Module, object], object] | None = None,
    progress: bool = True,
) -> StatsReport:
    """Counts what the `QReLU`s of `model` do on data: the fractions of zeros and of saturated elements (x > L[q]), and
    the number of elements with each code.

    It counts the packed codes and 2-bit states that the kernels return, byte by byte. The model runs in evaluation
    mode, without gradients, with its usual outputs; nothing in it changes.

    Arguments and errors are those of `calibrate`. In a distributed run each process reports its own batches. Warns with
    the names of layers that no batch reached.

    Returns a `StatsReport`.
    """
    layers = qrelus_of(model)
    counters = {name: _CodeCounter(layer) for name, layer in layers.items()}
    with watched(model, layers, counters):
        run_batches(model, batches, forward, progress, "stats")
    warn_about_unreached("stats", [name for name, counter in counters.items() if not counter.reached], stacklevel=2)
    return _report(counters)


class LiveStats:
    """What the block of `live_stats`, or the blocks of `counting`, have counted so far.

    model, errors: as for `live_stats`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = qrelus_of(model)
        self._counters = {name: _CodeCounter(layer) for name, layer in self._layers.items()}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts in the block, on top of what earlier ones counted."""
        counting = {
            # Its forward may be another block's, or one that a user or a package gave it.
            name: functools.partial(self._counters[name].count_and_run, layer.forward)
            for name, layer in self._layers.items()
        }
        with replaced(self._layers, counting):
            yield

    def report(self) -> StatsReport:
        """As `stats` returns it. Warns with the names of layers that nothing reached."""
        names = [name for name, counter in self._counters.items() if not counter.reached]
        warn_about_unreached("live_stats", names, stacklevel=2)
        return _report(self._counters)


@contextmanager
def live_stats(model: nn.Module) -> Iterator[LiveStats]:
    """The counts of `stats` for whatever the model does in the block, such as a step of training.

        with live_stats(model) as live:
            loss(model(x), y).backward()
        writer.add_scalars("staircases", live.report().scalars())

    The `QReLU`s compute, and save for backward, as always. A QReLULinear or QReLUConv2d computes in the block as its
    two layers. Of nested blocks each counts. A model of torch.compile is compiled anew in each block. In a distributed
    run each process counts its own inputs. Activations that are checkpointed are counted each time they are computed.

    model: has `QReLU`s.

    Yields an object whose `report()` returns a `StatsReport`. Raises TypeError or ValueError as `stats` does.
    """
    live = LiveStats(model)
    with live.counting():
        yield live


def _report(counters: dict[str, _CodeCounter]) -> StatsReport:
    return StatsReport(counter.result(name) for name, counter in counters.items())


class _CodeCounter:
    """Counts the codes, states and inputs of one layer."""

    def __init__(self, layer: QReLU) -> None:
        self._layer, self._inputs = layer, InputTally(layer)
        self.reached = False
        self._elements = 0
        self._codes = torch.zeros(2**layer.bits, dtype=torch.int64, device="cpu")
        self._states = torch.zeros(3, dtype=torch.int64, device="cpu")

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output in evaluation mode, without a gradient."""
        layer, y = self._layer, self._count(x)
        y = x.copy_(y) if layer.inplace else y
        return y.square() if layer.squared else y

    def count_and_run(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.no_grad():
            self._count(x.detach())
        return forward(x)

    def _count(self, x: Tensor) -> Tensor:
        layer, self.reached = self._layer, True
        y, states, codes = _ops.ops.qrelu_forward.default(
            x, layer.alpha, layer.bits, Rounding[layer.rounding], MaskKind.state, True, layer.channel_dim
        )
        self._elements += x.numel()
        self._codes += _count_values(codes, CODE_WIDTH[layer.bits], x.numel())[: 2**layer.bits]
        self._states += _count_values(states, 2, x.numel())[:3]
        self._inputs.add(x)
        return y

    def result(self, name: str) -> LayerStats:
        count = max(self._elements, 1)
        zero, saturated = self._codes[0].item() / count, self._states[2].item() / count
        alpha, inputs = self._layer.alpha.detach().clone(), self._inputs.result()
        return LayerStats(name, self._elements, zero, saturated, tuple(self._codes.tolist()), alpha, inputs)


def _count_values(packed: Tensor, width: int, count: int) -> Tensor:
    """The count of each value 0..2**width - 1 among the first `count` values of `packed`."""
    of_bytes = packed.bincount(minlength=256).cpu()
    every_byte = torch.arange(256, dtype=torch.uint8, device="cpu")
    values = reference.unpack(every_byte, width, 256 * (8 // width)).view(256, -1).long()
    tally = torch.zeros(2**width, dtype=torch.int64, device="cpu")
    tally.index_add_(0, values.flatten(), of_bytes[:, None].expand_as(values).flatten())
    tally[0] -= packed.numel() * (8 // width) - count  # the padding of the last byte
    return tally
