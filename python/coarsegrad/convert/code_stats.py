"""`stats`: what the layers make of data, counted in the kernels' bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _ops, reference
from ..nn import QReLU
from ..reference import CODE_WIDTH
from ..ste import format_table
from .watching import layers_of, run_batches, warn_of_unreached, watched


@dataclass(frozen=True)
class LayerStats:
    """What `stats` saw of one QReLU.

    elements: of its inputs. zero, saturated: shares of them that gave code 0, and that were above the top level L[q].
    codes: how many gave each code 0..q.
    """

    name: str
    elements: int
    zero: float
    saturated: float
    codes: tuple[int, ...]


class StatsReport(tuple):
    """`LayerStats` of each layer. Prints as a table; the last column is the histogram of the codes 1..q, by eye."""

    def __repr__(self) -> str:
        rows = [(s.name, f"{s.elements:,}", f"{s.zero:.1%}", f"{s.saturated:.1%}", _bars(s.codes[1:])) for s in self]
        return format_table(("QReLU", "elements", "zero", "saturated", "codes above 0"), rows)

    __str__ = __repr__


def _bars(counts: tuple[int, ...]) -> str:
    """A row of at most 32 bars, each of neighbouring codes."""
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
    """What the `QReLU`s of `model` make of data: shares of zeros and of saturated elements, and how often each code.

    It counts the packed bits that the kernels return anyway, 2 for the state and those of the code of each element,
    through tables of bytes; the outputs are those of ever. Evaluation mode, no gradients, nothing is changed.

    Arguments and errors are those of `calibrate`; in a distributed run each process reports its own batches. Warns, by
    name, of layers that no batch reached.
    Returns a `StatsReport`. An element is saturated if x > L[q].
    """
    layers = layers_of(model)
    tallies = {name: _Tally(layer) for name, layer in layers.items()}
    with watched(model, layers, tallies):
        run_batches(model, batches, forward, progress, "stats")
    warn_of_unreached("stats", [name for name, tally in tallies.items() if not tally.reached], stacklevel=2)
    return StatsReport(tally.result(name) for name, tally in tallies.items())


class _Tally:
    """Counts of the codes and states of one layer."""

    def __init__(self, layer: QReLU) -> None:
        self._layer = layer
        self.reached = False
        self._elements = 0
        self._codes = torch.zeros(2**layer.bits, dtype=torch.int64, device="cpu")
        self._states = torch.zeros(3, dtype=torch.int64, device="cpu")

    def __call__(self, x: Tensor) -> Tensor:
        layer, self.reached = self._layer, True
        y, states, codes = _ops.ops.qrelu_forward.default(
            x, layer.alpha, layer.bits, layer.rounding, "state", True, layer.channel_dim
        )
        self._elements += x.numel()
        self._codes += _tally(codes, CODE_WIDTH[layer.bits], x.numel())[: 2**layer.bits]
        self._states += _tally(states, 2, x.numel())[:3]
        y = x.copy_(y) if layer.inplace else y
        return y.square() if layer.squared else y

    def result(self, name: str) -> LayerStats:
        count = max(self._elements, 1)
        zero, saturated = self._codes[0].item() / count, self._states[2].item() / count
        return LayerStats(name, self._elements, zero, saturated, tuple(self._codes.tolist()))


def _tally(packed: Tensor, width: int, count: int) -> Tensor:
    """How often each value 0..2**width - 1 is among the first `count` values of `packed`."""
    of_bytes = packed.bincount(minlength=256).cpu()
    every_byte = torch.arange(256, dtype=torch.uint8, device="cpu")
    values = reference.unpack(every_byte, width, 256 * (8 // width)).view(256, -1).long()
    tally = torch.zeros(2**width, dtype=torch.int64, device="cpu")
    tally.index_add_(0, values.flatten(), of_bytes[:, None].expand_as(values).flatten())
    tally[0] -= packed.numel() * (8 // width) - count  # what fills up the last byte
    return tally
