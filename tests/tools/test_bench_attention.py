"""bench.attention and its table in docs/memory.md."""

from __future__ import annotations

import re

import pytest
import torch
from bench import attention
from torch import nn

import coarsegrad as cg

pytestmark = pytest.mark.usefixtures("one_thread")
_NAMES = (*attention.CASES, attention.OURS)


def test_only_codes_that_the_forward_has_seen_are_exact():
    """A factor of two of what the page says: sums have another order elsewhere."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", attention.PAGE.read_text(), re.MULTILINE)
    shown = {name: [float(cell.replace(",", "")) for cell in cells] for name, *cells in rows if name in _NAMES}
    assert list(shown) == list(_NAMES)
    for i, sharpness in enumerate(attention.SHARPNESS):
        found = attention.errors(sharpness)
        assert found[attention.OURS] == 0
        assert all(shown[name][i] / 2 <= found[name] <= 2 * shown[name][i] for name in _NAMES)
    assert shown["q and k, to nearest"][-1] > 100 * shown["only what the Linears save, to nearest"][-1]


def test_the_codes_are_saved_as_codes():
    class Staircases(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = attention.Block(1.0)

        def forward(self, x):
            return self.block(x, staircase=True)

    x = torch.randn(2, attention.TOKENS, attention.HEADS * attention.WIDTH)
    whole = cg.saved_memory(Staircases(), x).total
    with cg.packed_activations():
        packed = cg.saved_memory(Staircases(), x).total
    # Of q, k and v, in float32, codes of 4 bits and an alpha in bfloat16 for 64 of them remain.
    assert whole - packed == 3 * x.numel() * 4 - 3 * x.numel() // 2 - 3 * x.numel() // attention.GROUP * 2
