"""The numbers of an integer layer, as other runtimes take them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..integer import first_sums, unpack_weights

_MOST_SUM = 2**30 - 1  # of codes times weights, and a bias on top of it, in int32


@dataclass(frozen=True)
class LayerNumbers:
    """A layer on codes of which no output code falls as its sum rises.

        acc[n] = sum_k codes[k] * integers[n, k]
        v[n]   = acc[n] * scale[n] + offset[n],   code = clamp(ceil(v), 0, levels)

    integers: int64 [C, K], within -127..127. scale >= 0 and offset: float32 [C]. first: int64 [C, levels], the least
    sum with at least code k; None where the output is v, whose scale may have any sign. top: the largest code that is
    read. weight_bits: those that the weights were stored with.
    """

    integers: Tensor
    scale: Tensor
    offset: Tensor
    first: Tensor | None
    top: int
    weight_bits: int

    def ends(self) -> tuple[Tensor, Tensor]:
        """The least and the largest sum that there can be, int64 [C]."""
        low, high = (self.top * part.sum(1) for part in (self.integers.clamp(max=0), self.integers.clamp(min=0)))
        return low, high

    def with_bias(self, shift: float) -> tuple[Tensor, Tensor, Tensor]:
        """(weight int8 [C, K], its scale [C], bias int32 [C]): v + shift is scale * (codes @ weight + bias), up to the
        rounding of the bias.

        That is half a scale, so weights of few bits are multiplied by what 8 bits have room for, and their scale is
        divided by it. Where a bias would not fit, scale is larger and the weights are rounded again: such a bias
        outweighs all that they add up to.
        """
        offset, scale = self.offset.double() + shift, self.scale.double()
        low, high = self.ends()
        factor = torch.minimum(
            127 // self.integers.abs().amax(1).clamp(min=1), _MOST_SUM // torch.maximum(-low, high).clamp(min=1)
        ).clamp(min=1)
        sign, exact = torch.where(scale < 0, -1, 1), scale.abs() / factor
        wide = torch.maximum(exact, offset.abs() / _MOST_SUM).float().double()
        wide = torch.where(wide > 0, wide, 1)
        weight = (self.integers * (factor * sign * (exact / wide))[:, None]).round().to(torch.int8)
        return weight, wide.float(), (offset / wide).round().to(torch.int32)

    def stairs_shift(self) -> bool:
        """Whether the first threshold is at v > -1/2 and the others at v > k - 1: a staircase that rounds by hwgq.

        Raises ValueError if the thresholds are of neither kind.
        """
        if self.first is None:
            return False
        count = self.first.size(1)
        plain = first_sums(self.scale, self.offset, count, *self.ends())
        near = self._near(self.first, plain)
        if bool(near.all()):
            return False
        moved = first_sums(self.scale, self.offset + 0.5, 1, *self.ends())
        if bool(near[:, 1:].all()) and bool(self._near(self.first[:, :1], moved).all()):
            return True
        raise ValueError("a layer has thresholds that are not evenly spaced: form must be 'qonnx' or 'levels'")

    def _near(self, sums: Tensor, others: Tensor) -> Tensor:
        """Whether they are at most one step of the sum or 1/1000 stair apart."""
        apart = (sums - others).abs()
        return (apart <= 1) | (apart * self.scale.double()[:, None] <= 1e-3)


def layer_numbers(
    weight: Tensor,
    count: int,
    bits: int,
    weight_bits: int,
    scale: Tensor,
    offset: Tensor,
    thresholds: Tensor | None = None,
    levels: int | None = None,
) -> LayerNumbers:
    """Of the arguments of an op for integer layers. count: the weights of a row. levels: None for a float output."""
    integers = unpack_weights(weight, weight_bits, count).long()
    top = 2**bits - 1
    if levels is None:
        return LayerNumbers(integers, scale, offset, None, top, weight_bits)
    if thresholds is not None:
        return LayerNumbers(integers, scale, offset, thresholds.long(), top, weight_bits)
    sign = torch.where(scale < 0, -1, 1)
    rising = LayerNumbers(integers * sign[:, None], scale.abs(), offset, None, top, weight_bits)
    return replace(rising, first=first_sums(rising.scale, offset, levels, *rising.ends()))
