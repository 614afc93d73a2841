"""The specification once more, slowly and in float64: what every backend is compared with.

Nothing here imports coarsegrad. Codes come from `torch.searchsorted`, the row-wise form of `torch.bucketize`,
over the thresholds; gradients are the formulas evaluated in float64; the packed layout is a loop over elements.
"""

from __future__ import annotations

import math

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)
ROUNDINGS = ("ceil", "nearest", "hwgq")
STES = ("identity", "relu", "clipped_relu", "log_tailed_relu", "reverse_exponential", "trust")
MASKED_STES = ("identity", "relu", "clipped_relu", "trust")
X_STES = ("log_tailed_relu", "reverse_exponential")
SOFT_STES = ("dsq", "stable_qat")  # in the table, and not compiled in
ALPHA_GRADS = ("exact", "three_valued", "two_valued", "chain")
CODE_WIDTH = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that x of `dtype` is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def levels(alpha: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """L[c, k] = k * alpha[c] rounded to dtype, k = 0..q, shape [C, q + 1]."""
    k = torch.arange(2**bits, dtype=wide(dtype))
    return (k * alpha.detach().to(wide(dtype))[:, None]).to(dtype)


def thresholds(alpha: torch.Tensor, bits: int, dtype: torch.dtype, rounding: str) -> torch.Tensor:
    """T[c, k - 1], k = 1..q, shape [C, q]: T[k] = L[k-1] for ceil, else the midpoints (T[1] = 0 for hwgq)."""
    level = levels(alpha, bits, dtype).to(wide(dtype))
    if rounding == "ceil":
        return level[:, :-1].contiguous()
    middle = (level[:, :-1] + level[:, 1:]) / 2
    if rounding == "hwgq":
        middle[:, 0] = 0
    return middle


def ends(alpha: torch.Tensor, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Half a stair outside of the range: -alpha/2 and L[q] + alpha/2, each [C] in the wide dtype."""
    half = alpha.detach().to(wide(dtype)) / 2
    return -half, levels(alpha, bits, dtype)[:, -1].to(wide(dtype)) + half


def to_rows(x: torch.Tensor, channel_dim: int | None) -> torch.Tensor:
    """x as [C, n / C], one row per alpha."""
    if channel_dim is None:
        return x.detach().reshape(1, -1)
    return x.detach().movedim(channel_dim, 0).flatten(1) if x.dim() > 1 else x.detach().reshape(-1, 1)


def from_rows(rows: torch.Tensor, like: torch.Tensor, channel_dim: int | None) -> torch.Tensor:
    """The inverse of `to_rows`: rows in the shape of `like`."""
    if channel_dim is None or like.dim() <= 1:
        return rows.reshape(like.shape)
    return rows.reshape(like.movedim(channel_dim, 0).shape).movedim(0, channel_dim)


def codes(
    x: torch.Tensor, alpha: torch.Tensor, bits: int, rounding: str, channel_dim: int | None = None
) -> torch.Tensor:
    """c = #{k in 1..q : x > T[k]}, int64 of x's shape; q for NaN."""
    rows = to_rows(x, channel_dim).to(wide(x.dtype)).contiguous()
    edges = thresholds(alpha, bits, x.dtype, rounding)
    return from_rows(torch.searchsorted(edges, rows, right=False), x, channel_dim)


def output(
    x: torch.Tensor, alpha: torch.Tensor, bits: int, rounding: str, channel_dim: int | None = None
) -> torch.Tensor:
    """y = L[c], NaN where x is NaN."""
    code = to_rows(codes(x, alpha, bits, rounding, channel_dim), channel_dim)
    y = from_rows(torch.gather(levels(alpha, bits, x.dtype), 1, code), x, channel_dim)
    return torch.where(x.detach().isnan(), x.detach(), y)


def per_element(values: torch.Tensor, x: torch.Tensor, channel_dim: int | None) -> torch.Tensor:
    """values of shape [C] (or [1]) in a shape that broadcasts against x."""
    if channel_dim is None:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    return values.reshape(shape)


def saves_x(ste: str, alpha_grad: str | None, need_x: bool = True) -> bool:
    """Whether x itself is saved. alpha_grad is None if alpha is fixed. A state does not tell what trust needs."""
    by_state = alpha_grad in ("three_valued", "two_valued")
    return alpha_grad == "chain" or (need_x and (ste in (*X_STES, *SOFT_STES) or (ste == "trust" and by_state)))


class Staircase64:
    """Everything about one call in float64: gates, g'(u), dx and the terms of dalpha."""

    def __init__(self, x, alpha, bits, rounding, channel_dim=None):
        self.channel_dim = channel_dim
        self.x = x.detach().double()
        self.q = 2**bits - 1
        self.half = 2.0 ** (bits - 1)
        self.code = codes(x, alpha, bits, rounding, channel_dim).double()
        step = alpha.detach().to(wide(x.dtype)).double()
        self.u = self.x / per_element(step, x, channel_dim)
        top = per_element(levels(alpha, bits, x.dtype)[:, -1].double(), x, channel_dim)
        self.nan = self.x.isnan()
        self.below = self.x <= 0
        self.above = self.x > top
        self.inside = ~self.below & ~self.above
        low, high = (end.to(step.dtype) for end in ends(alpha, bits, x.dtype))
        self.near = (self.x >= per_element(low, x, channel_dim)) & (self.x <= per_element(high, x, channel_dim))

    def slope(self, ste: str) -> torch.Tensor:
        """g'(u): the table of the specification, and 1 for NaN."""
        if ste == "trust":
            return (self.near | self.nan).double()
        u, q, one = self.u, self.q, torch.ones_like(self.u)
        positive = {
            "identity": one,
            "relu": one,
            "clipped_relu": torch.where(self.above, 0.0, one),
            "log_tailed_relu": torch.where(u <= q, one, 1 / (u - q + 1)),
            "reverse_exponential": torch.exp(-u / q),
        }[ste]
        slope = positive if ste == "identity" else torch.where(self.below, 0.0, positive)
        return torch.where(self.nan, 1.0, slope)

    def grad_x(self, grad_y: torch.Tensor, ste: str) -> torch.Tensor:
        """dx = dy * g'(u) as a select: exactly 0 where g' is 0, dy where it is 1."""
        slope, dy = self.slope(ste), grad_y.detach().double()
        return torch.where(slope == 0, 0.0, torch.where(slope == 1, dy, dy * slope))

    def alpha_factor(self, ste: str, alpha_grad: str) -> torch.Tensor:
        """A of dalpha = scale * sum(dy * A)."""
        if alpha_grad == "exact":
            return self.code
        if alpha_grad == "chain":
            slope = self.slope(ste)
            return self.code - torch.where(slope == 0, 0.0, self.u * slope)
        middle = self.half if alpha_grad == "three_valued" else 0.0
        return torch.where(self.below, 0.0, torch.where(self.above, float(self.q), middle))

    def grad_alpha(self, grad_y: torch.Tensor, ste: str, alpha_grad: str, scale: float = 1.0):
        """(dalpha, the sum of the magnitudes that went into it), both of alpha's shape in float64."""
        dy = grad_y.detach().double()
        terms = dy * self.alpha_factor(ste, alpha_grad)
        size = terms.abs()
        if alpha_grad == "chain":
            size = dy.abs() * (self.code + (self.u * self.slope(ste)).abs())
        return scale * to_rows(terms, self.channel_dim).sum(1), scale * to_rows(size, self.channel_dim).sum(1)

    def condition(self, ste: str) -> torch.Tensor:
        """|u g''(u) / g'(u)|: how much one relative error in u grows in g'(u)."""
        if ste == "reverse_exponential":
            return self.u.abs() / self.q
        if ste == "log_tailed_relu":
            return torch.where(self.u > self.q, self.u / (self.u - self.q + 1), 0.0)
        return torch.zeros_like(self.u)


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Spacing of dtype at |x|, in float64."""
    near = x.to(dtype).abs()
    return torch.nextafter(near, torch.full_like(near, math.inf)).double() - near.double()


def up(x: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(x, torch.full_like(x, math.inf))


def down(x: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(x, torch.full_like(x, -math.inf))


def threshold_points(alpha: torch.Tensor, bits: int, dtype: torch.dtype, rounding: str) -> torch.Tensor:
    """Every threshold and level, one ulp of dtype below, on and one above it, shape [C, 3 * (2q + 1)].

    A midpoint of two levels need not be a number of dtype; its neighbours in dtype are then among the three.
    """
    edges = torch.cat([thresholds(alpha, bits, dtype, rounding).to(dtype), levels(alpha, bits, dtype)], 1)
    return torch.cat([down(edges), edges, up(edges)], 1)


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """NaN, infinities, zeros of both signs, the smallest and largest subnormals, the normal range's ends."""
    info = torch.finfo(dtype)
    tiny = torch.tensor([info.tiny], dtype=dtype)
    smallest = up(torch.zeros(1, dtype=dtype))
    finite = torch.cat([smallest, down(tiny), tiny, torch.tensor([info.max], dtype=dtype)])
    other = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=dtype)
    return torch.cat([other, finite, -finite])


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 bit patterns of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def log_uniform(count: int, low: float, high: float, seed: int) -> torch.Tensor:
    """`count` float32 numbers, log-uniform over low..high."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.exp(math.log(low) + span * (math.log(high) - math.log(low))).float()


def memory_order(y: torch.Tensor) -> torch.Tensor:
    """A dense contiguous or channels-last tensor as 1-d, in the order its elements lie in memory."""
    y = y.detach()
    if y.is_contiguous():
        return y.reshape(-1)
    if y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last):
        return y.permute(0, 2, 3, 1).reshape(-1)
    assert y.dim() == 5 and y.is_contiguous(memory_format=torch.channels_last_3d), f"not dense: {y.stride()}"
    return y.permute(0, 2, 3, 4, 1).reshape(-1)


def pack(values: list[int], width: int) -> bytes:
    """Element i sits in byte i*w // 8 at shift (i*w) % 8; the last byte is padded with zeros."""
    packed = bytearray(math.ceil(len(values) * width / 8))
    for i, value in enumerate(values):
        packed[i * width // 8] |= value << (i * width % 8)
    return bytes(packed)


def unpack(packed: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """The first `count` elements of a packed uint8 tensor, as int64."""
    shifts = torch.arange(0, 8, width)
    return ((packed.long()[:, None] >> shifts) & (2**width - 1)).reshape(-1)[:count]


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` packed elements."""
    return math.ceil(count * width / 8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits, except that any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    a, b = a.detach(), b.detach()
    nan = a.isnan()
    if not torch.equal(nan, b.isnan()):
        return False
    a, b = a.masked_fill(nan, 0), b.masked_fill(nan, 0)
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))
