"""`stats`: zeros, saturation and code counts of each layer, counted from the bits that the kernels return."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _ops, reference
from .._text import format_table
from .._types import CODE_WIDTH, MaskKind, Rounding
from ..nn import QReLU
from .watching import qrelus_of, run_batches, warn_about_unreached, watched


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one QReLU.

    elements: the number of input elements. zero, saturated: the fractions with code 0 and above the top level L[q].
    codes: the number of elements with each code 0..q.
    """

    name: str
    elements: int
    zero: float
    saturated: float
    codes: tuple[int, ...]


class StatsReport(tuple):
    """`LayerStats` of each layer. Prints as a table; the last column is a bar chart of the codes 1..q."""

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
    return StatsReport(counter.result(name) for name, counter in counters.items())


class _CodeCounter:
    """Computes in place of one layer and counts its codes and states."""

    def __init__(self, layer: QReLU) -> None:
        self._layer = layer
        self.reached = False
        self._elements = 0
        self._codes = torch.zeros(2**layer.bits, dtype=torch.int64, device="cpu")
        self._states = torch.zeros(3, dtype=torch.int64, device="cpu")

    def __call__(self, x: Tensor) -> Tensor:
        layer, self.reached = self._layer, True
        y, states, codes = _ops.ops.qrelu_forward.default(
            x, layer.alpha, layer.bits, Rounding[layer.rounding], MaskKind.state, True, layer.channel_dim
        )
        self._elements += x.numel()
        self._codes += _count_values(codes, CODE_WIDTH[layer.bits], x.numel())[: 2**layer.bits]
        self._states += _count_values(states, 2, x.numel())[:3]
        y = x.copy_(y) if layer.inplace else y
        return y.square() if layer.squared else y

    def result(self, name: str) -> LayerStats:
        count = max(self._elements, 1)
        zero, saturated = self._codes[0].item() / count, self._states[2].item() / count
        return LayerStats(name, self._elements, zero, saturated, tuple(self._codes.tolist()))


def _count_values(packed: Tensor, width: int, count: int) -> Tensor:
    """The count of each value 0..2**width - 1 among the first `count` values of `packed`."""
    of_bytes = packed.bincount(minlength=256).cpu()
    every_byte = torch.arange(256, dtype=torch.uint8, device="cpu")
    values = reference.unpack(every_byte, width, 256 * (8 // width)).view(256, -1).long()
    tally = torch.zeros(2**width, dtype=torch.int64, device="cpu")
    tally.index_add_(0, values.flatten(), of_bytes[:, None].expand_as(values).flatten())
    tally[0] -= packed.numel() * (8 // width) - count  # the padding of the last byte
    return tally
