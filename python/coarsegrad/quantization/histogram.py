"""A histogram of the positive inputs of a layer, and the error of a staircase on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..reference import levels, thresholds

# A bin holds the inputs that share the 16 leading bits of a float32, its key: 128 bins per power of two, one for each
# bfloat16 number. A row has the bins of the 24 powers of two that end at its largest input.
_SHIFT = 16
BINS = 24 << 7
_OFFSET = 2  # sums are in units of 4 ulps: the sum of 2**35 squares, each below 2**28, fits into 63 bits

Reduce = Callable[[Tensor, str], None]  # in place: sum, min or max of a tensor over all processes


class Histogram:
    """The positive inputs of one layer by bin, int64 and int32 of [rows, BINS], with a row per alpha.

    Each bin has the count, the sum and the sum of squares of the offsets from its lower edge, and its least and largest
    input as bits of float32. All are integers, so they do not depend on the order and merge exactly. Inputs below the
    window of a row count in its first bin. The window only moves up, so this does not depend on the order either.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        def full(value: int, dtype: torch.dtype) -> Tensor:
            return torch.full((rows, BINS), value, dtype=dtype, device=device)

        self.top = torch.full((rows,), BINS - 1, device=device)  # the key of the last bin
        self.sums = [full(0, torch.int64) for _ in range(3)]  # of offset**0, **1, **2
        self.low, self.high = full(torch.iinfo(torch.int32).max, torch.int32), full(0, torch.int32)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.sums, self.low, self.high))

    def add(self, x: Tensor) -> None:
        """x: [rows, any], finite or -inf."""
        if not x.numel():
            return
        x = _float32(x)
        bits = x.view(torch.int32)
        self._move((bits.amax(1) >> _SHIFT).long())
        start = (
            torch.arange(x.size(0), device=x.device) * BINS + BINS - 1 - self.top
        )  # the index that key 0 of a row would have
        index = (bits >> _SHIFT) + start[:, None]
        if x.size(0) == 1:
            index = index.clamp_(min=0)
        else:
            index = index.maximum(torch.arange(x.size(0), device=x.device)[:, None] * BINS)
        positive = (x > 0).view(-1).nonzero().squeeze(1)
        index, bits = index.view(-1)[positive], bits.view(-1)[positive]
        offset = _offset(bits).long()
        for total, value in zip(self.sums, (torch.ones_like(offset), offset, offset.square())):
            total.view(-1).index_add_(0, index, value)
        self.low.view(-1).scatter_reduce_(0, index, bits, "amin")
        self.high.view(-1).scatter_reduce_(0, index, bits, "amax")

    def merge(self, reduce: Reduce) -> None:
        """Make this the histogram over all processes."""
        top = self.top.clone()
        reduce(top, "max")
        self._move(top)
        for total in self.sums:
            reduce(total, "sum")
        reduce(self.low, "min")
        reduce(self.high, "max")

    def _move(self, top: Tensor) -> None:
        """Move the windows that end below `top` up to it."""
        by = (top - self.top).clamp_(min=0)
        if not by.any():
            return
        self.top = self.top + by
        to = (torch.arange(BINS, device=by.device) - by[:, None]).clamp_(min=0)
        self.sums = [torch.zeros_like(total).scatter_add_(1, to, total) for total in self.sums]
        self.low = torch.full_like(self.low, torch.iinfo(torch.int32).max).scatter_reduce_(1, to, self.low, "amin")
        self.high = torch.zeros_like(self.high).scatter_reduce_(1, to, self.high, "amax")

    def rows(self, power: int, dtype: torch.dtype) -> list[InputDistribution]:
        """The inputs of each row; the target of a staircase is x**power, rounded to the dtype."""
        fields = [t.cpu() for t in (*self.sums, self.low, self.high)]
        return [
            InputDistribution(count, first, second, low, high, power, dtype)
            for count, first, second, low, high in zip(*fields)
        ]


def _float32(x: Tensor) -> Tensor:
    """x as float32, with float64 rounded up: rounding an input that is a level down would cost a stair under "ceil"."""
    if x.dtype != torch.float64:
        return x.float().contiguous()
    rounded = x.clamp(max=torch.finfo(torch.float32).max).float()
    return torch.where(rounded < x, rounded.nextafter(torch.full_like(rounded, math.inf)), rounded)


def _offset(bits: Tensor) -> Tensor:
    return (bits & ((1 << _SHIFT) - 1)) >> _OFFSET


class InputDistribution:
    """The positive inputs x of one row, as points plus intervals of uniform density, in float64, and their targets.

    A bin becomes points at its least and largest input with a uniform interval between them or, if its variance is too
    small for that, one point within a uniform interval. Count, sum, sum of squares and range are those of the bin. So
    one or two distinct values, however frequent, are exact points, and evenly spread values are an even density.
    """

    def __init__(
        self, count: Tensor, first: Tensor, second: Tensor, low: Tensor, high: Tensor, power: int, dtype: torch.dtype
    ) -> None:
        self.power, self.dtype = power, dtype
        used = count.nonzero().flatten()
        n, first, second = (t[used].double() for t in (count, first, second))
        low, high = low[used], high[used]
        start, width = _offset(low).double(), (_offset(high) - _offset(low)).double()
        spread = width > 0
        # Inputs below the window count as the largest of them: they are too small to matter.
        spread[:1] &= used[:1] > 0
        width[~spread] = 1
        mean = (first / n - start) / width  # of t, from 0 at low to 1 at high
        square = (second / n - 2 * start * first / n + start.square()) / width.square()
        left, right = 1 - 4 * mean + 3 * square, 3 * square - 2 * mean
        at_ends = (left > -1e-6) & (right > -1e-6)
        a, b = mean - 0.5, square - mean + 1 / 6
        inside = (36 * b.square() + 12 * a.square()).sqrt() - 6 * b
        where = (0.5 + a / inside.clamp(min=1e-9)).clamp(0, 1)
        left, right = (torch.where(spread & at_ends, share, 0).clamp(min=0) for share in (left, right))
        inside = torch.where(spread & ~at_ends, inside, 0)
        right = torch.where(spread, right, 1)
        low, high = low.view(torch.float32).double(), high.view(torch.float32).double()

        places = torch.stack([low, low + where * (high - low), high], 1).flatten()
        weights = (torch.stack([left, inside, right], 1) * n[:, None]).flatten()
        self.places, self._weights = places[weights > 0], weights[weights > 0]
        part = n * (1 - left - inside - right).clamp(min=0)
        self._low, self._high = low[part > 0], high[part > 0]
        self._density = part[part > 0] / (self._high - self._low)
        self._cumulative, self._ends = n.cumsum(0), high
        self.count = n.sum().item()
        self.largest = high[-1].item() if len(high) else 0.0
        self.in_points = self._weights.sum().item() / max(self.count, 1)

    @functools.cached_property
    def _prefixes(self) -> tuple[Tensor, Tensor]:
        """The sums of target**n, n = 0, 1, 2, over the first i points and over the first i intervals: [i, 3] each."""
        n = torch.arange(3)
        targets = (self.places**self.power).to(self.dtype).double()
        points = self._weights[:, None] * targets[:, None] ** n
        exponent = n * self.power + 1
        parts = (self._high[:, None] ** exponent - self._low[:, None] ** exponent) / exponent * self._density[:, None]
        return pad(points.cumsum(0), (0, 0, 1, 0)), pad(parts.cumsum(0), (0, 0, 1, 0))

    def sums_up_to(self, bounds: Tensor) -> Tensor:
        """The sums of target**n, n = 0, 1, 2, over the inputs x <= bound, for each bound (any shape): [..., 3]."""
        points, parts = self._prefixes
        total = points[torch.searchsorted(self.places, bounds, right=True)]
        if len(self._low):
            index = (torch.searchsorted(self._low, bounds, right=True) - 1).clamp_(min=0)
            total = total + parts[index]  # not in place: a 0-d index gives a view
            low, density = self._low[index], self._density[index]
            end = bounds.minimum(self._high[index]).maximum(low)
            for n in range(3):
                exponent = n * self.power + 1
                total[..., n] += density * (end**exponent - low**exponent) / exponent
        return total

    @functools.cached_property
    def totals(self) -> list[float]:
        """The sums of target**n, n = 0, 1, 2."""
        return self.sums_up_to(torch.tensor(math.inf, dtype=torch.float64)).tolist()

    def percentile(self, percent: float) -> float:
        """The percentile, rounded up to the largest input of its bin."""
        last = torch.searchsorted(self._cumulative, self.count * percent / 100).clamp(max=len(self._ends) - 1)
        return self._ends[last].item()


class StaircaseErrors:
    """Squared errors of a staircase on the inputs of a row, for any alpha. Levels and thresholds are the kernels'.

    alpha_dtype: the dtype of the layer's alpha. limit: upper bound of the top level of the best alpha.
    """

    def __init__(
        self, inputs: InputDistribution, bits: int, rounding: str, limit: float, alpha_dtype: torch.dtype
    ) -> None:
        self._inputs, self._bits, self._rounding = inputs, bits, rounding
        self._alpha_dtype, self._q = alpha_dtype, 2**bits - 1
        self._eps, smallest = torch.finfo(alpha_dtype).eps, torch.finfo(alpha_dtype).tiny
        finite = min(torch.finfo(inputs.dtype).max, torch.finfo(alpha_dtype).max) * (1 - 4 * self._eps)
        self._range = smallest, max(min(limit, finite) / self._q, smallest)

    def rounded(self, alphas: Tensor) -> Tensor:
        """float64 alphas as values that the layer can have."""
        return alphas.clamp(*self._range).to(self._alpha_dtype)

    def _cells(self, alphas: Tensor) -> tuple[Tensor, ...]:
        """The outputs, and the sums of target**n, n = 0, 1, 2, over the inputs that give each; all [A, q + 1]."""
        inputs = self._inputs
        outputs = (levels(alphas, self._bits, inputs.dtype) ** inputs.power).to(inputs.dtype).double()
        edges = thresholds(alphas, self._bits, inputs.dtype, self._rounding).double()
        edges = pad(pad(edges, (1, 0)), (0, 1), value=math.inf)
        return outputs, *inputs.sums_up_to(edges).diff(dim=1).unbind(-1)

    def __call__(self, alphas: Tensor) -> Tensor:
        """The sum of (target - Q)**2 for each alpha [A], where the target is x or its square, over positive x."""
        outputs, mass, first, second = self._cells(alphas)
        errors = (second - 2 * outputs * first + outputs.square() * mass).sum(1)
        return errors.nan_to_num(nan=math.inf).clamp_(min=0)

    def counts_at_ends(self, alpha: Tensor) -> tuple[float, float]:
        """The numbers of inputs that give 0 and that do not exceed the top level; alpha: [1]."""
        first = thresholds(alpha, self._bits, self._inputs.dtype, self._rounding)[0, 0]
        top = levels(alpha, self._bits, self._inputs.dtype)[0, -1]
        zero, full = self._inputs.sums_up_to(torch.stack([first, top]).double())[:, 0].tolist()
        return zero, full

    def best(self) -> float:
        """The alpha of least error: on a grid of 1/8 octaves, then a finer one, then by least squares for its codes."""
        anchor, places = torch.tensor([self._inputs.largest / self._q], dtype=torch.float64), self._inputs.places
        center = self._least(_octaves(anchor, -12, 1, 8), 1)
        candidates = [anchor, _octaves(center, -1 / 8, 1 / 8, 128)]
        if self._inputs.in_points > 0.1:  # All may lie on levels, which needs alpha to half a stair at the top.
            candidates.append(_octaves(center, -1, 1, 2 * self._q + 32))
        if len(places) * self._q <= 1024:
            on_levels = places[:, None] / torch.arange(1, self._q + 1)
            candidates.append((on_levels * (1 + self._eps)).flatten())
        best = self._least(torch.cat(candidates), 8)
        return self._least(torch.cat([best, *self._refined(best)]), 1).item()

    def _least(self, alphas: Tensor, count: int) -> Tensor:
        alphas = self.rounded(alphas)
        return alphas[self(alphas).topk(min(count, len(alphas)), largest=False).indices].double()

    def _refined(self, alphas: Tensor) -> list[Tensor]:
        """The best alphas for the codes that these alphas give, and the numbers just above."""
        _, mass, first, _ = self._cells(self.rounded(alphas))
        power = self._inputs.power
        k = torch.arange(self._q + 1, dtype=torch.float64) ** power
        refined = ((k * first).sum(1) / (k.square() * mass).sum(1)) ** (1 / power)
        refined = refined[refined.isfinite() & (refined > 0)]
        return [refined * (1 + n * self._eps) for n in range(3)]


def _octaves(center: Tensor, first: float, last: float, steps: int) -> Tensor:
    """center times 2**first to 2**last, in the given number of steps per factor of 2."""
    return center * torch.exp2(torch.arange(round(first * steps), round(last * steps) + 1, dtype=torch.float64) / steps)
