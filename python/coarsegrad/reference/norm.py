"""RMSNorm and LayerNorm, and the signed staircase of their output (docs/spec.md, section 8).

    m = sum(x) / n, 0 for RMSNorm;  r = 1 / sqrt(sum((x - m)**2) / n + eps);  (x - m) * r * weight + bias

Every operation is rounded to the wide dtype, and sums have an order of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_norm
from .._types import wide_dtype
from .signed import hadamard, qsigned_forward

LANES = 1024


def row_sum(terms: Tensor) -> Tensor:
    """The sum over the last dimension, [..., 1]: element i is added to lane i % LANES, in order from 0; then the upper
    half of the lanes is added to the lower one until one is left."""
    sums = terms.new_zeros((*terms.shape[:-1], LANES))
    for some in terms.split(LANES, -1):
        sums[..., : some.size(-1)] += some
    while sums.size(-1) > 1:
        low, high = sums.chunk(2, -1)
        sums = low + high
    return sums


def square_root(x: Tensor) -> Tensor:
    """Rounded to nearest, which torch.sqrt of the CPU is not: it may be off by an ulp."""
    if x.dtype != torch.float64:
        return x.double().sqrt().to(x.dtype)  # a float32's root is never so close to the middle of two
    mantissa, exponent = torch.frexp(x)
    up = 2 - exponent % 2
    a, unit = mantissa * 2.0**up, 2.0**-52  # of [1, 4), and the distance of its roots
    root = a.sqrt().clamp(min=1)
    # a - root**2, exactly, as the product of halves of root is.
    high = root * (2**27 + 1) - (root * (2**27 + 1) - root)
    low = root - high
    square = root * root
    rest = (a - square) - (((high * high - square) + 2 * high * low) + low * low)
    # (root + unit / 2)**2 - root**2 is root * unit and a quarter of the unit of the rest.
    root = root + unit * ((rest > root * unit).double() - (rest <= -root * unit).double())
    root = root * torch.exp2((exponent - up).double() / 2)
    return torch.where(x.isfinite() & (x > 0), root, x.sqrt())


def norm_qsigned(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool, shifted: bool, rounds_twice: bool,
    bits: int | None, group: int | None, rotation: int | None, output: bool, codes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(the norm's output, y, packed codes, alphas, m, r); [0] for an output that is not asked for, for m unless
    centred, and without bits for what is of the staircase."""
    group = check_norm(x, weight, bias, bits, group, rotation, output)
    wide = x.to(wide_dtype(x.dtype))
    # A tensor: some devices divide by a number by a multiplication.
    count = torch.full((), x.size(-1), dtype=wide.dtype, device=x.device)
    mean = row_sum(wide) / count if centred else wide.new_empty(0)
    centre = wide - mean if centred else wide
    inverse = 1 / square_root(row_sum(centre * centre) / count + torch.full_like(count, eps))
    n = centre * inverse
    if rounds_twice:
        n = n.to(x.dtype).to(wide.dtype)
    if weight is not None:
        n = n * (weight.to(wide.dtype) + 1 if shifted else weight.to(wide.dtype))
    if bias is not None:
        n = n + bias.to(wide.dtype)
    normed = n.to(x.dtype).contiguous()
    y, packed, alpha = normed.new_empty(0), x.new_empty(0, dtype=torch.uint8), x.new_empty(0, dtype=torch.bfloat16)
    if bits is not None:
        rotated = normed if rotation is None else hadamard(normed, rotation)
        y, alpha, _, packed = qsigned_forward(rotated, None, bits, group, False, codes, None)
    return normed if output else normed.new_empty(0), y, packed, alpha, mean, inverse
