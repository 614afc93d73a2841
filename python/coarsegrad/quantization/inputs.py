"""The positive inputs of a layer in units of its top level, to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..nn import QReLU
from ..reference import levels
from .histogram import InputDistribution

# Intervals up to the top level, and of the same width above it.
_BELOW, _ABOVE = 64, 64


@dataclass(frozen=True)
class InputHistogram:
    """The positive inputs of one QReLU by x / L[q], each by the alpha of its channel.

    counts: in 128 intervals of equal width from 0 to 2, which have their upper ends; 1 is the top level. beyond: the
        number of inputs above 2, and of NaNs, whose code is the top one, though `stats` has them not as saturated.
    bits, rounding: the layer's.
    """

    counts: tuple[float, ...]
    beyond: float
    bits: int
    rounding: str

    @property
    def edges(self) -> tuple[float, ...]:
        """The ends of the intervals, one more than there are intervals."""
        return tuple(i / _BELOW for i in range(_BELOW + _ABOVE + 1))

    @property
    def levels(self) -> tuple[float, ...]:
        """L[1] to L[q], in units of L[q]."""
        q = 2**self.bits - 1
        return tuple(k / q for k in range(1, q + 1))

    @property
    def thresholds(self) -> tuple[float, ...]:
        """T[1] to T[q], in units of L[q], without the rounding of each."""
        below = 1.0 if self.rounding == "ceil" else 0.5
        q = 2**self.bits - 1
        return tuple(0.0 if self.rounding == "hwgq" and k == 1 else (k - below) / q for k in range(1, q + 1))


class InputTally:
    """Counts the inputs of a layer, batch by batch, for an `InputHistogram`."""

    def __init__(self, layer: QReLU) -> None:
        self._layer = layer
        self._counts = torch.zeros(_BELOW + _ABOVE + 2, dtype=torch.int64, device="cpu")  # the first: not positive

    def add(self, x: Tensor) -> None:
        layer = self._layer
        top = levels(layer.alpha.detach(), layer.bits, x.dtype)[:, -1]
        if layer.channel_dim is not None:
            top = top.view([-1 if dim == layer.channel_dim % x.dim() else 1 for dim in range(x.dim())])
        place = (x / top).mul_(_BELOW).ceil_()  # 0 if x is not positive; the top level is not above itself
        place = place.nan_to_num_(nan=math.inf).clamp_(0, _BELOW + _ABOVE + 1).long()  # a NaN has the top code
        self._counts += place.flatten().bincount(minlength=len(self._counts)).cpu()

    def result(self) -> InputHistogram:
        _, *counts, beyond = self._counts.tolist()
        return InputHistogram(tuple(counts), beyond, self._layer.bits, self._layer.rounding)


def of_distributions(rows: list[InputDistribution], alphas: Tensor, bits: int, rounding: str) -> InputHistogram:
    """From the inputs of each row and its alpha."""
    edges = torch.arange(_BELOW + _ABOVE + 1, dtype=torch.float64, device="cpu") / _BELOW
    counts = torch.zeros(_BELOW + _ABOVE, dtype=torch.float64, device="cpu")
    beyond = 0.0
    for inputs, alpha in zip(rows, alphas.split(1)):
        if inputs.count:
            top = levels(alpha, bits, inputs.dtype)[0, -1].double()
            up_to = inputs.sums_up_to(edges * top)[:, 0]
            counts += up_to.diff()
            beyond += inputs.count - up_to[-1].item()
    return InputHistogram(tuple(counts.tolist()), beyond, bits, rounding)


def range_of(alpha: Tensor) -> str:
    """An alpha, or those of all channels, as text."""
    low, high = alpha.min().item(), alpha.max().item()
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
