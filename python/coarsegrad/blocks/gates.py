"""Gated MLPs whose gate and up are codes, and whose product is kept as these."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..gated import ACTIVATIONS, ActivationName, gated_product
from ..nn import QReLU
from ..signed import QSigned
from .conversion import CannotConvert, Conversion
from .inputs import features
from .tags import mark_codes


class Names(NamedTuple):
    """The attributes of a gated MLP. up: None if the gate's layer computes both."""

    gate: str
    up: str | None
    down: str


_FORMS = (
    Names("gate_proj", "up_proj", "down_proj"),  # Llama, Qwen, Mistral, Gemma
    Names("w1", "w3", "w2"),  # Mixtral
    Names("wi_0", "wi_1", "wo"),  # T5
    Names("gate_up_proj", None, "down_proj"),  # Phi-3, GLM
)
_ACTIVATION = ("act_fn", "activation_fn", "act", "activation")
_BETWEEN = ("ffn_sub_norm", "dropout")  # what may stand between the product and the last layer


class GatedForward:
    """The forward of a gated MLP: down(act(gate(x)) * up(x)), gate and up staircased.

    act: the name of the module that computes the activation, if that is a QReLU, else None.
    """

    def __init__(
        self,
        mlp: nn.Module,
        names: Names,
        act: str | None,
        activation: ActivationName,
        staircase: QSigned | None,
    ) -> None:
        self.mlp, self.names, self.act, self.activation, self.staircase = mlp, names, act, activation, staircase
        self.between = [name for name in _BETWEEN if isinstance(getattr(mlp, name, None), nn.Module)]

    def __call__(self, x: Tensor) -> Tensor:
        mlp, names = self.mlp, self.names
        if names.up is None:
            gate, up = getattr(mlp, names.gate)(x).chunk(2, dim=-1)
        else:
            gate, up = getattr(mlp, names.gate)(x), getattr(mlp, names.up)(x)
        if self.act is not None:
            gate = getattr(mlp, self.act)(gate)
        elif self.staircase is not None:
            gate = self.staircase(gate)
        y = gated_product(gate, up if self.staircase is None else self.staircase(up), self.activation)
        if self.staircase is not None:
            mark_codes(y)  # it is kept as the two
        for name in self.between:
            y = getattr(mlp, name)(y)
        return getattr(mlp, names.down)(y)


def convert_gates(conversion: Conversion, settings: dict[str, Any]) -> None:
    """Replace the forward of every gated MLP."""
    for name, mlp in conversion.modules():
        names = next((form for form in _FORMS if _has(mlp, form)), None)
        if names is None:
            if isinstance(getattr(mlp, "gate_up_proj", None), nn.Parameter):
                conversion.skip(name, mlp, "its experts' weights are parameters, not layers")
            continue
        try:
            forward = _forward_for(mlp, names, settings)
        except CannotConvert as why:
            conversion.skip(name, mlp, why)
            continue
        conversion.set(mlp, "forward", forward)
        note = ""
        if not forward.between:
            conversion.reads_codes.update(getattr(mlp, names.down).modules())
            note = f"{names.down} keeps these codes"
        conversion.add(name, "gate and up" if forward.act is None else "up", QSigned(**settings), note)


def _has(mlp: nn.Module, names: Names) -> bool:
    layers = [getattr(mlp, name, None) for name in names if name is not None]
    return all(isinstance(layer, nn.Module) and _size(layer) is not None for layer in layers)


def _size(layer: Any) -> int | None:
    """The size of the input of a layer, or of the layer that an adapter wraps; see `features`."""
    return features(getattr(layer, "base_layer", layer))


def _forward_for(mlp: nn.Module, names: Names, settings: dict[str, Any]) -> GatedForward:
    if isinstance(vars(mlp).get("forward"), GatedForward):
        raise CannotConvert("it has staircases already")
    if "forward" in vars(mlp):
        raise CannotConvert("its forward was replaced on this instance; convert before that")
    group, size = settings.get("group"), _size(getattr(mlp, names.down))
    if group is not None and size and size % group:
        raise CannotConvert(f"a group of {group} does not divide its {size} features")
    act = next((name for name in _ACTIVATION if callable(getattr(mlp, name, None))), None)
    if act is None:
        raise CannotConvert(f"its activation is not called {', '.join(_ACTIVATION)}")
    quantized = isinstance(getattr(mlp, act), QReLU)
    activation: ActivationName = "identity" if quantized else _name_of(getattr(mlp, act))
    plain = GatedForward(mlp, names, act if quantized else None, activation, None)
    if why := _why_different(mlp, plain, names):
        raise CannotConvert(why)
    plain.staircase = QSigned(**settings)
    return plain


@torch.no_grad()
def _name_of(act: Any) -> ActivationName:
    """The name of what an activation computes, to the bit."""
    x = torch.linspace(-8, 8, 1001, device="cpu")
    try:
        y = act(x)
    except Exception as error:
        raise CannotConvert(f"its activation fails: {type(error).__name__}: {error}") from error
    ones = torch.ones_like(x)
    for name in ACTIVATIONS:
        if isinstance(y, Tensor) and torch.equal(gated_product(x, ones, name), y):
            return name
    raise CannotConvert(f"its activation is none of {', '.join(ACTIVATIONS)}")


def _why_different(mlp: nn.Module, forward: GatedForward, names: Names) -> str:
    """Why another forward is not the module's: it gives other bits on a random input. "" if it is."""
    layer: Any = getattr(mlp, names.gate)
    weight = layer.weight
    if weight.is_meta:
        return "its weights have no values to check the new forward with"
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.device.type == "cuda" else []):
        x = torch.randn(2, 3, _size(layer) or 1, device="cpu").to(weight.device, dtype)
        outputs = []
        for compute in (mlp, forward):
            torch.manual_seed(0)  # for its dropout
            try:
                outputs.append(compute(x))
            except Exception as error:
                return f"it cannot be run on a random input: {type(error).__name__}: {error}"
    same = all(isinstance(y, Tensor) for y in outputs) and torch.equal(*outputs)
    return "" if same else "down(act(gate(x)) * up(x)) gives other values"
