"""Norms whose readers get the staircase of the norm's output, with a derivative of both."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .._checks import check_option
from ..norms import NormGradient, NormKind, norm_staircase
from ..signed import QSigned
from .conversion import CannotConvert, Conversion
from .tags import attach, attached

_NORMED = "_coarsegrad_normed"


class Normed(NamedTuple):
    """What a tensor is the norm of. made: staircased forms of it, by their settings."""

    norm: nn.Module
    hook: NormOutput
    x: Tensor
    made: dict[object, Tensor]


class NormOutput:
    """A forward hook of a norm: notes on the output what it is the norm of, for the layers that read it. Whatever else
    reads it uses it as it is.

    shifted: whether the norm multiplies by 1 + weight. staircases: those that layers of the model have, by their
    settings.
    """

    def __init__(
        self, kind: NormKind, shifted: bool, eps: float, gradient: NormGradient, staircases: dict[object, QSigned]
    ) -> None:
        self.kind, self.shifted, self.eps, self.gradient = kind, shifted, eps, gradient
        self.staircases = staircases

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        made = {}
        if torch.compiler.is_compiling():  # what nobody reads is removed from the graph
            made = {key: self.staircased(module, args[0], output, one) for key, one in self.staircases.items()}
        attach(output, _NORMED, Normed(module, self, args[0], made))

    def staircased(self, norm: nn.Module, x: Tensor, output: Tensor, staircase: QSigned) -> Tensor:
        weight: Any = getattr(norm, "weight", None)
        weight = 1.0 + weight if self.shifted else weight
        how: Any = {"eps": self.eps, "kind": self.kind, "gradient": self.gradient}
        return norm_staircase(x, output, weight, getattr(norm, "bias", None), **how, staircase=staircase)


def staircased_norm(output: Tensor, key: object, staircase: QSigned) -> Tensor | None:
    """The staircase of a norm's output; None if it is not one, or was written to since."""
    normed: Normed | None = attached(output, _NORMED)
    if normed is None:
        return None
    if key in normed.made:
        return normed.made[key]
    return normed.hook.staircased(normed.norm, normed.x, output, staircase)


def convert_norms(conversion: Conversion, gradient: NormGradient, staircases: dict[object, QSigned]) -> None:
    """Have the layers that read a norm take its gradient from few saved bits. staircases: those that layers have."""
    usual = next(iter(staircases.values()))
    for name, norm in conversion.modules():
        if not _is_norm(norm):
            continue
        try:
            kind, shifted, eps = _formula(norm)
        except CannotConvert as why:
            conversion.skip(name, norm, why)
            continue
        hook = NormOutput(kind, shifted, eps, gradient, staircases)
        conversion.hook(norm.register_forward_hook(hook))
        conversion.add(name, f"norm, {gradient} gradient", usual)


def checked_gradient(norms: Any) -> NormGradient:
    check_option("norms", norms, get_args(NormGradient))
    return norms


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


@torch.no_grad()
def _formula(norm: Any) -> tuple[NormKind, bool, float]:
    """(kind, whether by 1 + weight, eps) of a norm over the last dimension, found by what it computes with random
    parameters, as 1 + weight is also 2 * weight where that is 1."""
    if any(isinstance(hook, NormOutput) for hook in norm._forward_hooks.values()):
        raise CannotConvert("it has a staircase already")
    own = {name: p for name in ("weight", "bias") if isinstance(p := getattr(norm, name, None), Tensor)}
    shape = tuple(own["weight"].shape if "weight" in own else getattr(norm, "normalized_shape", ()))
    if len(shape) != 1:
        raise CannotConvert(f"it must be over one dimension, got {list(shape)}")
    like = own.get("weight", torch.empty(0, device="cpu"))
    generator = torch.Generator("cpu").manual_seed(0)
    device = "cpu" if like.is_meta else like.device

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, like.dtype)

    x, parameters = random(8, shape[0]), {name: random(*shape) for name in own}
    try:
        output = torch.func.functional_call(norm, parameters, x).float()
    except Exception as error:
        raise CannotConvert(f"it cannot be run on a random input: {type(error).__name__}: {error}") from error
    eps = _eps(norm, like.dtype)
    for kind, shifted in _FORMULAS if "weight" in own else _FORMULAS[:2]:
        expected = _normalized(x.float(), kind, eps)
        if "weight" in own:
            expected = expected * (parameters["weight"].float() + shifted)
        if "bias" in own:
            expected = expected + parameters["bias"].float()
        if torch.allclose(output, expected, rtol=0.02, atol=0.02):
            return kind, shifted, eps
    raise CannotConvert("it computes neither of RMSNorm and LayerNorm")


_FORMULAS: tuple[tuple[NormKind, bool], ...] = (("rms", False), ("layer", False), ("rms", True), ("layer", True))


def _eps(norm: Any, dtype: torch.dtype) -> float:
    found = [getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)]
    return torch.finfo(dtype).eps if not found or found[0] is None else float(found[0])


def _normalized(x: Tensor, kind: NormKind, eps: float) -> Tensor:
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
