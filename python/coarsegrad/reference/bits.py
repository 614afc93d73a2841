"""Packed layout: element i of width w in byte i*w // 8 at shift (i*w) % 8, in the memory order of a dense tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(values: Tensor, width: int) -> Tensor:
    """1-d uint8 values below 2**width, packed: element i in byte i*width // 8 at shift (i*width) % 8."""
    if width == 0 or values.numel() == 0:
        return values.new_empty(0)
    per_byte = 8 // width
    values = torch.nn.functional.pad(values, (0, -values.numel() % per_byte)).view(-1, per_byte)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=values.device)
    return (values << shifts).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` packed values, 1-d uint8: the inverse of `pack`."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & (2**width - 1)).reshape(-1)[:count]


_CHANNELS_LAST = {torch.channels_last: (0, 2, 3, 1), torch.channels_last_3d: (0, 2, 3, 4, 1)}
_CHANNELS_FIRST = {torch.channels_last: (0, 3, 1, 2), torch.channels_last_3d: (0, 4, 1, 2, 3)}


def to_memory_order(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The elements of t, 1-d, in the memory order of a dense tensor of this format."""
    order = _CHANNELS_LAST.get(memory_format)
    return (t if order is None else t.permute(order)).reshape(-1)


def from_memory_order(flat: Tensor, shape, memory_format: torch.memory_format) -> Tensor:
    """The inverse of `to_memory_order`."""
    order = _CHANNELS_LAST.get(memory_format)
    if order is None:
        return flat.view(shape)
    return flat.view([shape[i] for i in order]).permute(_CHANNELS_FIRST[memory_format])
