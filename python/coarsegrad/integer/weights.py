"""Integer weights: how they are chosen, and how a row of them lies in bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 32  # bytes: one AVX2 register, two of NEON, half of one of AVX-512

# (the least and the largest integer, the scales that are tried for a row, as divisors of its largest magnitude)
_TWO_BITS = [1 + i / 8 for i in range(33)]
_GRIDS = {
    8: [(-127, 127, [127.0])],
    4: [(-7, 7, [*range(1, 8), *(7 + i / 2 for i in range(1, 15))])],
    2: [(-1, 1, _TWO_BITS), (-2, 1, _TWO_BITS)],
    1: [],
}
_CHUNK = 2**18  # weights at a time, to stay within a cache


def choose_weights(weight: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """(integers [C, K], scale [C] in float32) with the least squared error of weight - scale * integers found per row.

    weight: float64 [C, K]. 8 bits are -127..127, 4 bits -7..7, 2 bits -2..1 (-1..1 if symmetric), and 1 bit is -1 or 1.
    For integers q the best scale is <weight, q> / <q, q>; the integers are those of rounding to a few scales. A row of
    zeros has scale 0.
    """
    grids = [grid for grid in _GRIDS[bits] if not symmetric or grid[0] == -grid[1]]
    chunks = weight.split(max(1, _CHUNK // max(1, weight.size(1))))
    integers, scales = zip(*(_choose(chunk, bits, grids) for chunk in chunks))
    return torch.cat(integers), torch.cat(scales).float()


def _choose(weight: Tensor, bits: int, grids: list[tuple[int, int, list[float]]]) -> tuple[Tensor, Tensor]:
    largest = weight.abs().amax(1) if weight.size(1) else weight.new_zeros(weight.size(0))
    unit = weight / torch.where(largest > 0, largest, 1)[:, None]
    integers, scale, explained = _fitted(
        unit, torch.where(unit < 0, -1.0, 1.0) if bits == 1 else torch.zeros_like(unit)
    )
    for low, high, divisor in ((low, high, divisor) for low, high, divisors in grids for divisor in divisors):
        tried, tried_scale, tried_explained = _fitted(unit, (unit * divisor).round().clamp(low, high))
        better = tried_explained > explained
        integers = torch.where(better[:, None], tried, integers)
        scale, explained = torch.where(better, tried_scale, scale), torch.where(better, tried_explained, explained)
    return integers.long(), scale * largest


def _fitted(weight: Tensor, integers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(integers, the best scale, what it takes off the squared error of 0) per row."""
    product, square = (weight * integers).sum(1), integers.square().sum(1).clamp(min=1)
    return integers, product / square, product.square() / square


@torch.no_grad()
def round_weights(weight: Tensor, bits: int) -> Tensor:
    """The weight of a Linear or convolution as scale * integers, in float64: what `convert` computes with if its input
    has one step. Only where it compares with thresholds, 2-bit rows with a negative gain of the BatchNorm are -1..1."""
    rows = weight.double().movedim(1, -1)
    integers, scale = choose_weights(rows.flatten(1), bits)
    return (integers * scale.double()[:, None]).view(rows.shape).movedim(-1, 1)


def row_bytes(count: int, bits: int) -> int:
    """Bytes of a packed row of `count` weights."""
    return -(-count * bits // (8 * _BLOCK)) * _BLOCK


def pack_weights(weight: Tensor, bits: int) -> Tensor:
    """Integer weights [C, K] as uint8 [C, row_bytes(K, bits)].

    A row is made of blocks of 32 bytes, each of 256 / bits weights: weight 32 p + j of a block sits in byte j at shift
    p * bits, so that a shift and a mask unpack 32 neighbors at once. The last block is filled up with zero bits.
    8, 4 and 2 bits are two's complement; one bit is 0 for -1 and 1 for +1.
    """
    values = (weight + 1) // 2 if bits == 1 else weight & (2**bits - 1)
    per_byte = 8 // bits
    values = F.pad(values.to(torch.uint8), (0, -values.size(1) % (per_byte * _BLOCK)))
    planes = values.view(values.size(0), values.size(1) // (per_byte * _BLOCK), per_byte, _BLOCK)
    return (planes << _shifts(bits, weight)).sum(2, dtype=torch.uint8).flatten(1)


def unpack_weights(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` weights of each row of what `pack_weights` made, int16 [C, count]."""
    planes = packed.view(packed.size(0), packed.size(1) // _BLOCK, 1, _BLOCK) >> _shifts(bits, packed)
    values = (planes & (2**bits - 1)).flatten(1)[:, :count].to(torch.int16)
    if bits == 1:
        return 2 * values - 1
    return values - 2**bits * (values >= 2 ** (bits - 1)).to(torch.int16)


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)[:, None]
