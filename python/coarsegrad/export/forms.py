"""What a form of export has for each kind of node: modules that compute in ONNX ops, or in torch ops that export.

A form's `code_dtype` is that of codes between layers. In `dtype` is what a staircase reads and its levels are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._types import wide_dtype
from .nodes import Scaled, Window, along
from .numbers import LayerNumbers


@dataclass(frozen=True)
class Staircase:
    """A staircase on a tensor of `rank` dimensions: levels `(code - zero) * alpha`, codes 0..top.

    alpha: [1], or [C] along channel_dim, at least float32. rounding: of a signed staircase "nearest", and then zero
    is p.
    """

    alpha: Tensor
    top: int
    zero: int
    rounding: str
    channel_dim: int | None
    rank: int
    dtype: torch.dtype

    def scaled(self, zero: int) -> Scaled:
        """codes, of which `zero` stands for 0, -> levels."""
        return Scaled(along(self.alpha.to(wide_dtype(self.dtype)), self.channel_dim, self.rank), self.dtype, zero)


class Form(ABC):
    """What `export_onnx` offers under one name."""

    code_dtype = torch.float32

    def shift(self, staircase: Staircase) -> Tensor | None:
        """What the form adds to x, [1] or [C], so that the staircase is one that rounds by nearest; None for nothing.
        The layer before can do that in its bias."""
        return None

    @abstractmethod
    def codes(self, staircase: Staircase) -> nn.Module:
        """x -> codes, of a staircase whose zero is 0."""

    @abstractmethod
    def levels(self, staircase: Staircase) -> nn.Module:
        """x -> its level."""

    def steps(self, step: float) -> nn.Module:
        """codes -> step * codes in float32."""
        return Scaled(torch.tensor(step), torch.float32)

    @abstractmethod
    def layer(self, numbers: LayerNumbers, window: Window | None) -> nn.Module:
        """codes -> codes, or floats if numbers.first is None; a Linear if window is None."""
