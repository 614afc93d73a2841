"""Norms whose readers get the staircase of the norm's output, from the same pass, with a derivative of both."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .._checks import check_option
from .._dtensor import is_dtensor
from .._torch_internals import functorch_active
from ..norms import Formula, NormGradient, NormKind, Pass, keeps_codes, normed, one_pass, staircased
from ..signed import QSigned
from .conversion import CannotConvert, Conversion
from .tags import attach, attached

_NORMED = "_coarsegrad_normed"


class _Normed(NamedTuple):
    """What a tensor is the norm of, with the parameters of that time: an offloaded module has its own only while it
    runs. made: staircased forms of it, by their settings: each a pass that has it; in compiled code the form itself."""

    forward: NormForward
    x: Tensor
    parameters: tuple[Tensor | None, Tensor | None]
    made: dict[object, Any]


class NormForward:
    """The forward of a norm: computes its output, and in the same pass the staircase of it that its readers took in
    earlier forwards, if they took one kind. Whatever else reads the output uses it as it is.

    staircases: those that layers of the model have, by their settings.
    """

    def __init__(
        self, norm: nn.Module, formula: Formula, gradient: NormGradient, staircases: dict[object, QSigned]
    ) -> None:
        self.norm, self.formula, self.gradient, self.staircases = norm, formula, gradient, staircases
        self.taken: dict[object, QSigned] = {}

    def __call__(self, x: Tensor, *more: object, **named: object) -> Tensor:
        if more or named or _beyond_ops(x):  # more: such as a gate, which makes it another function
            return self._own(x, *more, **named)
        x, parameters = self._in_dtype_of_output(x), self._parameters()
        if torch.compiler.is_compiling():  # what nobody reads is removed from the graph
            output = normed(x, *parameters, self.formula)
            output = output.view_as(output)  # on a node's own output dynamo sets no attribute
            made: dict[object, Any] = {key: self.staircased(x, parameters, one) for key, one in self.staircases.items()}
        else:
            keys = tuple(self.taken)
            one = self.taken[keys[0]] if len(keys) == 1 else None
            codes = one is not None and keeps_codes(x, *parameters, self.gradient)
            both = one_pass(x, *parameters, self.formula, one, output=True, codes=codes)
            output = normed(x, *parameters, self.formula, both)
            made = dict.fromkeys(keys, both) if one is not None else {}
        attach(output, _NORMED, _Normed(self, x, parameters, made))
        return output

    def staircased(
        self, x: Tensor, parameters: tuple[Tensor | None, Tensor | None], staircase: QSigned, made: Pass | None = None
    ) -> Tensor:
        return staircased(x, *parameters, self.formula, self.gradient, staircase, made)

    def _parameters(self) -> tuple[Tensor | None, Tensor | None]:
        norm: Any = self.norm
        return getattr(norm, "weight", None), getattr(norm, "bias", None)

    def _own(self, x: Tensor, *more: object, **named: object) -> Tensor:
        return type(self.norm).forward(self.norm, x, *more, **named)

    def _in_dtype_of_output(self, x: Tensor) -> Tensor:
        """x in the dtype of the module's own output, which it alone knows under autocast or with parameters of another
        dtype."""
        weight = self._parameters()[0]
        autocast = x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type)
        if not autocast and (weight is None or weight.dtype == x.dtype):
            return x
        with torch.no_grad():
            return x.to(self._own(x.reshape(-1, x.size(-1))[:0]).dtype)


def _beyond_ops(x: Tensor) -> bool:
    """Whether x is sharded, or transformed by torch.func: then the norm is its own, and its readers' staircase too."""
    return not torch.compiler.is_compiling() and (is_dtensor(x) or functorch_active())


def staircased_norm(output: Tensor, key: object, staircase: QSigned) -> Tensor | None:
    """The staircase of a norm's output; None if it is not one, or was written to since."""
    found: _Normed | None = attached(output, _NORMED)
    if found is None:
        return None
    if torch.compiler.is_compiling():
        return found.made[key]
    found.forward.taken.setdefault(key, staircase)
    return found.forward.staircased(found.x, found.parameters, staircase, found.made.pop(key, None))


def convert_norms(conversion: Conversion, gradient: NormGradient, staircases: dict[object, QSigned]) -> None:
    """Have the layers that read a norm take its gradient from few saved bits. staircases: those that layers have."""
    usual = next(iter(staircases.values()))
    for name, norm in conversion.modules():
        if not _is_norm(norm):
            continue
        try:
            formula, size = _formula(norm)
        except CannotConvert as why:
            conversion.skip(name, norm, why)
            continue
        fitting = {key: one for key, one in staircases.items() if _fits(one, size)}
        conversion.set(norm, "forward", NormForward(norm, formula, gradient, fitting))
        conversion.add(name, f"norm, {gradient} gradient", usual)


def _fits(staircase: QSigned, size: int) -> bool:
    return not any(part is not None and size % part for part in (staircase.group, staircase.rotation))


def checked_gradient(norms: Any) -> NormGradient:
    check_option("norms", norms, get_args(NormGradient))
    return norms


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


@torch.no_grad()
def _formula(norm: Any) -> tuple[Formula, int]:
    """(the formula of a norm over the last dimension, its size), found by what it computes with random parameters, as
    1 + weight is also 2 * weight where that is 1."""
    if isinstance(vars(norm).get("forward"), NormForward):
        raise CannotConvert("it has a staircase already")
    if "forward" in vars(norm):
        raise CannotConvert("its forward was replaced on this instance; convert before that")
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
    of = (parameters.get("weight"), parameters.get("bias"))
    for kind, shifted in _FORMULAS if "weight" in own else _FORMULAS[:2]:
        formula = Formula(kind, eps, shifted)
        if torch.allclose(output, one_pass(x, *of, formula, output=True).output.float(), rtol=0.02, atol=0.02):
            return formula._replace(rounds_twice=_rounds_twice(norm, x, parameters, formula)), shape[0]
    raise CannotConvert("it computes neither of RMSNorm and LayerNorm")


def _rounds_twice(norm: Any, x: Tensor, parameters: dict[str, Tensor], formula: Formula) -> bool:
    """Whether it rounds before the product with weight too: more of its output is then the same, in bfloat16."""
    x, parameters = x.bfloat16(), {name: p.bfloat16() for name, p in parameters.items()}
    try:
        output = torch.func.functional_call(norm, parameters, x)
    except Exception:  # of a norm that computes in one dtype alone
        return False
    of = (parameters.get("weight"), parameters.get("bias"))
    same = [
        (one_pass(x, *of, formula._replace(rounds_twice=twice), output=True).output == output).sum().item()
        for twice in (False, True)
    ]
    return same[1] > same[0]


_FORMULAS: tuple[tuple[NormKind, bool], ...] = (("rms", False), ("layer", False), ("rms", True), ("layer", True))


def _eps(norm: Any, dtype: torch.dtype) -> float:
    found = [getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)]
    return torch.finfo(dtype).eps if not found or found[0] is None else float(found[0])
