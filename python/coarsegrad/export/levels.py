"""The form "levels": each staircase by comparisons with its thresholds, exactly, in ops that every runtime has.

    c = #{k in 1..q : not x <= T[k]}            y = c * alpha

c is found in bits steps, from a table of the thresholds: no rounding of x / alpha decides a code, and no runtime's
contraction of a product and a sum can move one. NaN has the top code, and the output NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from .forms import Form, Staircase
from .nodes import Constants, Window, along, node
from .numbers import LayerNumbers

_EXACT = 2**24  # integers of float32


def edges(staircase: Staircase) -> Tensor:
    """The thresholds [C, top], as wide as x is compared."""
    alpha, dtype = staircase.alpha, staircase.dtype
    if not staircase.zero:
        bits = staircase.top.bit_length()
        return reference.thresholds(alpha, bits, dtype, staircase.rounding)
    levels = reference.signed_levels(alpha, staircase.top.bit_length(), dtype)
    return (levels[:, :-1] + levels[:, 1:]) / 2


class Count(Constants):
    """x -> #{k : not x <= table[k]}, float32, by bisection."""

    def __init__(self, table: Tensor, channel_dim: int | None, rank: int) -> None:
        channels, top = table.shape
        size = 2 ** top.bit_length() - 1
        table = F.pad(table, (0, size - top), value=torch.inf)
        middle = table[:, size // 2].contiguous()
        super().__init__(
            table=table.flatten(),
            start=along(torch.arange(channels, dtype=torch.int32) * size, channel_dim, rank),
            middle=along(middle, channel_dim, rank),
        )
        self.widest, self.top = (size + 1) // 2, top if top < size else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.table.dtype)
        code, step = self._reached(x, self.middle, self.widest), self.widest // 2
        while step:
            edge = node("Gather", self.table, code + self.start + (step - 1), dtype=self.table.dtype, shape=x.shape)
            code, step = code + self._reached(x, edge, step), step // 2
        code = code.to(torch.float32)
        return code if self.top is None else code.clamp(max=self.top)

    @staticmethod
    def _reached(x: Tensor, edge: Tensor, step: int) -> Tensor:
        return (~(x <= edge)).to(torch.int32) * step


class _KeepsNan(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.isnan(), x, self.inner(x))


class Sums(Constants):
    """codes -> the sums of an integer layer, as float32."""

    def __init__(self, numbers: LayerNumbers, window: Window | None) -> None:
        most = max(int(end.abs().max()) for end in numbers.ends())
        if most >= _EXACT:
            raise ValueError(
                f"a layer's sums reach {most:,}, and float32 is exact to {_EXACT:,} only: form must be 'qdq'"
            )
        weight = numbers.integers.float()
        super().__init__(weight=weight if window is None else window.filters(weight))
        self.window = window

    def forward(self, codes: Tensor) -> Tensor:
        weight, window = self.integer_weight(), self.window
        if window is None:
            return F.linear(codes, weight)
        return F.conv2d(codes, weight, None, window.stride, window.padding, window.dilation, window.groups)

    def integer_weight(self) -> Tensor:
        return self.weight


class Affine(Constants):
    """sums -> sums * scale + offset."""

    def __init__(self, numbers: LayerNumbers, images: bool) -> None:
        shape = (-1, 1, 1) if images else (-1,)
        super().__init__(scale=numbers.scale.reshape(shape), offset=numbers.offset.reshape(shape))

    def forward(self, sums: Tensor) -> Tensor:
        return sums * self.scale + self.offset


class Levels(Form):
    def codes(self, staircase: Staircase) -> nn.Module:
        return Count(edges(staircase), staircase.channel_dim, staircase.rank)

    def levels(self, staircase: Staircase) -> nn.Module:
        return _KeepsNan(nn.Sequential(self.codes(staircase), staircase.scaled(staircase.zero)))

    def layer(self, numbers: LayerNumbers, window: Window | None) -> nn.Module:
        sums, images = Sums(numbers, window), window is not None
        if numbers.first is None:
            return nn.Sequential(sums, Affine(numbers, images))
        below = (numbers.first - 1).float()
        rank = 3 if images else 1
        return nn.Sequential(sums, Count(below, 0, rank))
