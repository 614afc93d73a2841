"""What adds codes: average pooling, means, and sums of branches.

A sum of codes is again a code: of a step that is the inputs' by the divisor of the average, or their common unit. It is
exact, and kept as long as it cannot exceed 255.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from .layers import CannotConvert
from .moves import Call, arguments, aten, each, first_input, target

MOST = 255  # codes are uint8
ADDITIONS = {aten.add.Tensor}

_POOLS = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2}
_ADAPTIVE = {aten.adaptive_avg_pool1d.default: 1, aten.adaptive_avg_pool2d.default: 2}
_REDUCTIONS = {aten.mean.dim, aten.sum.dim_IntList}
AVERAGES = _POOLS.keys() | _ADAPTIVE.keys() | _REDUCTIONS


@dataclass(frozen=True)
class Pool:
    """Windows along the last dimensions, padded by zeros. The sum of each is divided by `divisor`."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    divisor: int

    @property
    def count(self) -> int:
        return math.prod(self.kernel)

    def maximum(self, t: Tensor) -> Tensor:
        pool = F.max_pool1d if len(self.kernel) == 1 else F.max_pool2d
        return pool(t, self.kernel, self.stride, self.padding)

    def sums(self, call: Call, codes: Node) -> Node:
        """torch pools no uint8. float32 is exact up to 2**24."""
        window, flat = [self.kernel, self.stride, self.padding], len(self.kernel) == 1
        codes = call(aten.to.dtype, codes, torch.float32)
        if flat:  # only avg_pool2d takes a divisor
            codes = call(aten.unsqueeze.default, codes, -2)
            window = [[first, *value] for first, value in zip((1, 1, 0), window)]
        codes = call(aten.avg_pool2d.default, codes, *window, False, True, 1)
        codes = call(aten.squeeze.dim, codes, -2) if flat else codes
        return call(aten.to.dtype, codes, torch.uint8)


@dataclass(frozen=True)
class Reduction:
    """A sum over whole dimensions of `count` elements, divided by `divisor`."""

    dims: list[int]
    keepdim: bool
    count: int
    divisor: int

    def maximum(self, t: Tensor) -> Tensor:
        return t.amax(self.dims, self.keepdim)

    def sums(self, call: Call, codes: Node) -> Node:
        total = call(aten.sum.dim_IntList, codes, self.dims, self.keepdim)
        total.kwargs = {"dtype": torch.uint8}
        return total


def average(node: Node) -> Pool | Reduction:
    """The sums that one of AVERAGES divides by one number. Raises CannotConvert if there is no such number."""
    given, op, shape = arguments(node), target(node), first_input(node).meta["val"].shape
    if op in _REDUCTIONS:
        dims = [dim % len(shape) for dim in given["dim"] or range(len(shape))]
        sizes = _fixed([shape[dim] for dim in dims])
        count = math.prod(sizes)
        return Reduction(dims, given["keepdim"], count, count if op is aten.mean.dim else 1)
    if op in _ADAPTIVE:
        outputs = each(given["output_size"], _ADAPTIVE[op])
        sizes = _fixed(shape[-len(outputs) :])
        if any(size % output for size, output in zip(sizes, outputs)):
            raise CannotConvert("whose windows are not all of one size")
        kernel = [size // output for size, output in zip(sizes, outputs)]
        return Pool(kernel, kernel, [0] * len(kernel), math.prod(kernel))
    rank = _POOLS[op]
    kernel, padding = each(given["kernel_size"], rank), each(given["padding"], rank)
    stride = each(given["stride"], rank) if given["stride"] else kernel
    fixed = given.get("divisor_override")
    if given["ceil_mode"] or (fixed is None and any(padding) and not given["count_include_pad"]):
        raise CannotConvert("whose windows are not all of one size")
    return Pool(kernel, stride, padding, fixed or math.prod(kernel))


def _fixed(sizes: Sequence[Any]) -> list[int]:
    if not all(isinstance(size, int) for size in sizes):
        raise CannotConvert("which averages over a dimension that has no fixed size")
    return list(sizes)


def averaged_step(over: Pool | Reduction, step: Fraction | Tensor) -> Fraction | Tensor:
    """The step of sums of codes of a step, which must be one number within each window."""
    if isinstance(step, Fraction):
        return step / over.divisor
    high, low = over.maximum(step), -over.maximum(torch.where(step > 0, -step, -torch.inf))
    if not bool(((high == low) | (high == 0)).all()):
        raise CannotConvert("whose windows hold codes of different steps")
    return high / over.divisor


def common_step(a: Fraction | Tensor, b: Fraction | Tensor) -> tuple[Fraction | Tensor, tuple[int, int]]:
    """(step, (m, n)): a = m * step and b = n * step, the largest such step."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        numerator = math.gcd(a.numerator * b.denominator, b.numerator * a.denominator)
        step = Fraction(numerator, a.denominator * b.denominator)
        return step, (int(a / step), int(b / step))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        first, second = torch.broadcast_tensors(a, b)
        if torch.equal(first, second):
            return first, (1, 1)
    raise CannotConvert("whose terms have different steps in one channel")


def weighted_sum(call: Call, terms: Sequence[Node], factors: Sequence[int]) -> Node:
    first, second = (
        codes if factor == 1 else call(aten.mul.Tensor, codes, factor) for codes, factor in zip(terms, factors)
    )
    return call(aten.add.Tensor, first, second)
