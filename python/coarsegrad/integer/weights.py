"""Integer weights: how a row of them lies in bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT_BITS = (8, 4, 2, 1)
_BLOCK = 32  # bytes: one AVX2 register, two of NEON, half of one of AVX-512


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
    return (
        (values.view(values.size(0), -1, per_byte, _BLOCK) << _shifts(bits, weight))
        .sum(2, dtype=torch.uint8)
        .flatten(1)
    )


def unpack_weights(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` weights of each row of what `pack_weights` made, int16 [C, count]."""
    planes = packed.view(packed.size(0), packed.size(1) // _BLOCK, 1, _BLOCK) >> _shifts(bits, packed)
    values = (planes & (2**bits - 1)).flatten(1)[:, :count].to(torch.int16)
    if bits == 1:
        return 2 * values - 1
    return values - 2**bits * (values >= 2 ** (bits - 1)).to(torch.int16)


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)[:, None]
