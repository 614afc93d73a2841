"""Rows that a norm may get wrong."""

from __future__ import annotations

import math

import torch


def make_special(x: torch.Tensor) -> None:
    """Writes rows of zeros, of NaN and infinities, of huge and of tiny numbers into the first ten of x."""
    info = torch.finfo(x.dtype)
    x[0], x[1] = 0, -0.0
    x[2, 1], x[3, 2], x[4, -1] = math.nan, math.inf, -math.inf
    x[5] *= info.max / 8
    x[6] *= info.smallest_normal
    x[7] = info.smallest_normal * info.eps
    x[8] = info.max
    x[9, ::2] = -0.0
