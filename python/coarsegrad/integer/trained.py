"""Weights that a `QWeight` has trained to few bits: `convert` takes its codes and scales as they are."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..parametrization import qweight_of
from .layers import CannotConvert

PARAMETRIZED = ".parametrizations.weight.original"  # after a layer's name: its weight in a state_dict


@dataclass(frozen=True)
class TrainedCodes:
    """What a QWeight makes of a layer's weight: scale * integers. integers: int64, in the weight's shape.

    per_row: whether scale has one number for each row, or one for all.
    """

    bits: int
    integers: Tensor
    scale: Tensor
    per_row: bool

    def by_row(self) -> Tensor:
        """The scale of each row. Raises CannotConvert."""
        if not self.per_row:
            raise CannotConvert("its QWeight has no scale for each output channel")
        return self.scale.expand(self.integers.size(0)).cpu()


@torch.no_grad()
def trained_codes(model: nn.Module) -> dict[str, TrainedCodes]:
    """Those of each layer with a QWeight, under all of its names."""
    found = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if (quantizer := qweight_of(layer)) is not None:
            held: Any = layer.parametrizations
            integers, scale = quantizer.codes(held.weight.original)
            per_row = quantizer.groups == 1 and (scale.dim() == 0 or quantizer.channel_dim in (0, -integers.dim()))
            found[name] = TrainedCodes(quantizer.bits, integers.long(), scale, per_row)
    return found


@torch.no_grad()
def with_plain_weights(model: nn.Module) -> nn.Module:
    """A copy in which Q(w) takes the place of each w with a QWeight, so that a graph has it as a constant."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if qweight_of(layer) is not None:
            # torch's remove_parametrizations would take them off the original too, whose class the copy shares.
            held: Any = layer.parametrizations
            weight = nn.Parameter(held.weight(), requires_grad=False)
            held.weight.original, held.weight[0] = weight, nn.Identity()
    return model
