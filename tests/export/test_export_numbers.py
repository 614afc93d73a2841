"""The numbers of exported layers where they do not fit, without any runtime."""

from __future__ import annotations

import pytest
import torch

from coarsegrad.export.forms import Staircase
from coarsegrad.export.levels import Sums
from coarsegrad.export.numbers import LayerNumbers
from coarsegrad.export.qonnx import Qonnx


def numbers(integers, scale, offset, first=None, top=15):
    integers = torch.tensor(integers)
    scale, offset = (torch.tensor(values, dtype=torch.float32) for values in (scale, offset))
    return LayerNumbers(integers, scale, offset, first, top, 8)


def test_bias():
    """Of weights of few bits, of ones with no room, of a negative scale, and of sums that the bias outweighs."""
    layer = numbers([[1, -1], [127, 3], [7, 7], [5, 5], [0, 0]], [0.1, 0.1, -0.1, 1e-30, 0], [0.33, 0.33, 0.33, 0.7, 0])
    weight, scale, bias = layer.with_bias(0.5)
    codes = torch.randint(16, (50, 2))
    wanted = codes.double() @ layer.integers.double().T * layer.scale.double() + layer.offset.double() + 0.5
    got = (codes @ weight.long().T + bias) * scale.double()
    half_units = torch.tensor([0.1 / 127, 0.1, 0.1 / 18, 1e-6, 1e-6]) / 2
    assert bool(((got - wanted).abs() <= half_units * 1.01).all())
    assert weight.dtype == torch.int8 and bias.dtype == torch.int32 and bool((scale > 0).all())


def test_staircases_of_thresholds():
    even = torch.tensor([[1, 11, 21]])  # ceil(0.1 * a) reaches k at 10 (k - 1) + 1
    assert not numbers([[9]], [0.1], [0], even).stairs_shift()
    assert numbers([[9]], [0.1], [-0.5], torch.tensor([[1, 16, 26]])).stairs_shift()
    with pytest.raises(ValueError, match="not evenly spaced: form must be 'qonnx' or 'levels'"):
        numbers([[9]], [0.1], [0], torch.tensor([[1, 15, 21]])).stairs_shift()


def test_what_forms_refuse():
    with pytest.raises(ValueError, match="sums reach 32,385,000, and float32 is exact to 16,777,216 only"):
        Sums(numbers([[127] * 1000], [0.1], [0], top=255), None)
    staircase = Staircase(torch.ones(3), 3, 0, "ceil", 0, 2, torch.float32)
    with pytest.raises(ValueError, match="no thresholds for each index of dimension 0 of 2: form must be 'qdq' or"):
        Qonnx().codes(staircase)
