"""Staircases in front of layers: one for all that read the same tensor."""

from __future__ import annotations

import collections
import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import QReLU, QReLUConv2d, QReLULinear
from ..parametrization import float_weight
from ..signed import QSigned, hadamard
from .conversion import CannotConvert, Conversion
from .norms import staircased_norm
from .tags import is_codes, mark_codes, shared

_CONVS = (nn.Conv1d, nn.Conv2d)


class StaircaseInput:
    """A forward pre-hook: the layer reads the staircased form of its input, unless that is codes already."""

    def __init__(self, staircase: QSigned) -> None:
        self.staircase = staircase
        self.key = (staircase.bits, staircase.group, staircase.rotation)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (self._staircased(args[0]), *args[1:]), kwargs
        return args, {name: self._staircased(x) for name, x in kwargs.items()}

    def _staircased(self, x: Tensor) -> Tensor:
        # A rotated layer needs a rotated input, which codes are not.
        if self.staircase.rotation is None and is_codes(x):
            return x
        return shared(x, self.key, lambda: self._made(x))

    def _made(self, x: Tensor) -> Tensor:
        y = staircased_norm(x, self.key, self.staircase)
        return self.staircase(x) if y is None else y


def mark_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """A forward hook of QReLUs and QSigneds."""
    return mark_codes(output)


def convert_inputs(conversion: Conversion, settings: dict[str, Any]) -> dict[object, QSigned]:
    """Insert a staircase in front of every Linear and Conv. Returns those in front of Linears, by their settings."""
    made: dict[object, QSigned] = {}
    owners = _owners_of_weights(conversion.model)
    inside = _inside_others(conversion.model)
    for name, layer in conversion.modules():
        size = features(layer)
        if size is None or layer in conversion.reads_codes:
            continue
        try:
            if layer in inside:
                raise CannotConvert(inside[layer])
            staircase, note = _staircase_for(layer, size, settings, owners)
        except CannotConvert as why:
            conversion.skip(name, layer, why)
            continue
        hook = StaircaseInput(staircase)
        conversion.hook(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if staircase.rotation is not None:
            _rotate_(layer, staircase.rotation)
            conversion.undo_steps.append(functools.partial(_rotate_, layer, staircase.rotation))
        conversion.add(name, "input", staircase, note)
        if size:
            made.setdefault(hook.key, staircase)
    for module in conversion.model.modules():
        if isinstance(module, (QReLU, QSigned)):
            conversion.hook(module.register_forward_hook(mark_output))
    return made


def features(layer: Any) -> int | None:
    """The size of the input's last dimension, 0 if it is not fixed; None for a module that is no such layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, _CONVS):
        return 0
    return layer.nx if is_transposed(layer) else None


def is_transposed(layer: nn.Module) -> bool:
    """Whether this is a linear layer of transformers whose weight is [in, out]."""
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and isinstance(layer, module.Conv1D)


def _inside_others(model: nn.Module) -> dict[nn.Module, str]:
    """The layers that another module does not call, or gives codes."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            found[module.out_proj] = "nn.MultiheadAttention reads its weight and does not call it"
        elif isinstance(module, (QReLULinear, QReLUConv2d)):
            found[module.layer] = "its input is codes already"
    return found


def _owners_of_weights(model: nn.Module) -> collections.Counter[int]:
    """How many modules have each parameter."""
    return collections.Counter(id(p) for module in model.modules() for p in module._parameters.values())


def _staircase_for(
    layer: nn.Module, size: int, settings: dict[str, Any], owners: collections.Counter[int]
) -> tuple[QSigned, str]:
    """The staircase in front of a layer, and what differs from the settings."""
    if any(isinstance(hook, StaircaseInput) for hook in layer._forward_pre_hooks.values()):
        raise CannotConvert("it has a staircase already")
    if isinstance(layer, nn.LazyLinear):
        raise CannotConvert("it is not initialized")
    settings, notes = dict(settings), []
    group, rotation = settings.get("group"), settings.get("rotation")
    if group is not None and not size:
        del settings["group"]
        notes.append("one alpha for each row of the image, as its width is unknown")
    elif group is not None and size % group:
        raise CannotConvert(f"a group of {group} does not divide its {size} features")
    if rotation is not None and (why := _why_not_rotated(layer, size, rotation, owners)):
        del settings["rotation"]
        notes.append(f"not rotated: {why}")
    return QSigned(**settings), "; ".join(notes)


def _why_not_rotated(layer: nn.Module, size: int, rotation: int, owners: collections.Counter[int]) -> str:
    weight = float_weight(layer)
    if not size:
        return "a convolution reads channels, not rows"
    if size % rotation:
        return f"{rotation} does not divide its {size} features"
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return "its weight is not a plain matrix of floats"
    return "its weight belongs to other modules too" if owners[id(weight)] > 1 else ""


@torch.no_grad()
def _rotate_(layer: nn.Module, size: int) -> None:
    """Rotate the weight over the layer's input features. Twice gives the weight again, up to rounding."""
    weight: Any = float_weight(layer)
    rows = weight.t() if is_transposed(layer) else weight
    rows.copy_(hadamard(rows, size))
