"""Helpers for optimizers: learned alphas without weight decay, and kept positive; blended steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ._dtensor import is_dtensor
from .nn import QReLU
from .parametrization import QWeight, quantized_parameters, quantized_shard
from .signed import QSigned


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, *, alpha_lr: float | None = None
) -> list[dict[str, object]]:
    """Two parameter groups for an optimizer: the learned alphas, without weight decay, and all other parameters. A
    parametrized alpha is represented by the parameters that it is computed from.

    lr, weight_decay: of the other parameters that require grad. alpha_lr: of the alphas; lr if None. Without learned
    alphas there is one group.

    A step may make an alpha negative, which is an error in the next forward; `keep_positive` prevents it. The gradient
    of an alpha is a sum over all its elements and therefore large: `QReLU(alpha_scale="lsq")` scales it by the elements
    of one sample, independently of the batch size. Alternatively give a smaller alpha_lr, with SGD lr / 100.
    """
    layers = [m for m in model.modules() if isinstance(m, (QReLU, QSigned))]
    alphas = list(dict.fromkeys(p for layer in layers for p in layer.parameters() if p.requires_grad))
    known = {id(alpha) for alpha in alphas}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, object]] = [{"params": others, "lr": lr, "weight_decay": weight_decay}]
    if alphas:
        alpha_lr = lr if alpha_lr is None else alpha_lr
        groups.append({"params": alphas, "lr": alpha_lr, "weight_decay": 0.0})
    return groups


def keep_positive(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Keeps the learned alphas of `model` positive: a step of `optimizer` at most halves each of them.

    Returns the optimizer. Copies made with `copy.deepcopy` or pickle together with the model do the same. Over several
    steps an alpha can become arbitrarily small. A parametrized alpha is set through its right_inverse, which costs a
    device sync.
    """
    layers = [m for m in model.modules() if isinstance(m, (QReLU, QSigned)) and any(True for _ in m.parameters())]
    return _with_hooks(optimizer, [_Bound(layers)])


def blended(optimizer: torch.optim.Optimizer, model: nn.Module, rho: float = 1e-5) -> torch.optim.Optimizer:
    """Blended coarse gradient descent: before each step of `optimizer` every quantized weight of `model` moves towards
    its quantized value.

        w <- (1 - rho) * w + rho * Q(w) - lr * gradient at Q(w)

    The step is the optimizer's own, of any kind; the weight is rounded to its dtype after the blend and after the step.
    With rho = 0 this is the plain straight-through step.

    optimizer: holds parameters with a `QWeight` (`quantize_(model, weight_bits=2)`), all or some of the model's.
    model: also wrapped (DDP) or sharded (`fully_shard`, before the optimizer is made). A weight that is not sharded
        along the dimension of its scales is gathered for each step.
    rho: from 0 to 1. In bfloat16 weights a blend of rho below 2**-9 is mostly lost to rounding.

    A weight is blended if the step updates it: if it has a gradient, or the step gets a closure. A closure sees the
    blended weight. Its Q is the same, as Q(w) is the point of its kind next to w: of 1 and 2 bits up to rounding, of 4
    and 8 bits up to what the search for their scale leaves. A step that `torch.amp.GradScaler` skips blends nothing,
    nor does a fused optimizer that it tells to skip.

    Returns the optimizer. Copies made with `copy.deepcopy` together with the model do the same, and so does a pickle of
    the optimizer alone; torch refuses to pickle a model with parametrizations. Where a QWeight is taken off, as by the
    report's `undo`, the optimizer goes on to blend: make a new one.

    Raises TypeError or ValueError if an argument is of another type, rho no such number, if the model has no QWeight,
    or the optimizer none of the parameters that have one, or blends them already.

    Source: Yin et al. 2018, arXiv 1808.05240.
    """
    if isinstance(rho, bool) or not isinstance(rho, (int, float)):
        raise TypeError(f"rho must be a number from 0 to 1, got {rho!r}")
    if not 0 <= rho <= 1:
        raise ValueError(f"rho must be a number from 0 to 1, got {rho}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    weights = {id(weight): (weight, quantizer) for _, weight, quantizer in quantized_parameters(model)}
    if not weights:
        raise ValueError("model must have a QWeight, as quantize_(model, weight_bits=...) gives it, got one without")
    if not any(id(p) in weights for p in _parameters(optimizer)):
        raise ValueError("optimizer must hold a weight of model with a QWeight, got one made of other parameters")
    hooks = vars(optimizer).get("_coarsegrad_hooks", [])
    if any(isinstance(hook, _Blend) and hook.blends(weights) for hook in hooks):
        raise ValueError("optimizer must blend a weight once, got one that blends weights of model already")
    return _with_hooks(optimizer, [_Blend(list(weights.values()), float(rho))])


class _Bound:
    """A step at most halves the alphas of these layers."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self._halves: list[Tensor] = []

    @torch.no_grad()
    def before(self, *_: object) -> None:
        self._halves = [layer.alpha.detach() / 2 for layer in self._layers]

    @torch.no_grad()
    def after(self, *_: object) -> None:
        for layer, half in zip(self._layers, self._halves):
            if not is_parametrized(layer, "alpha"):
                layer.alpha.copy_(torch.maximum(layer.alpha, half))
            elif not (layer.alpha >= half).all():
                layer.alpha = torch.maximum(layer.alpha, half)


class _Blend:
    """Moves weights towards their quantized values before a step."""

    def __init__(self, weights: list[tuple[Tensor, QWeight]], rho: float) -> None:
        self._weights, self._rho = weights, rho

    def blends(self, weights: Mapping[int, object]) -> bool:
        """Whether one of these, by id, is among its own."""
        return any(id(weight) in weights for weight, _ in self._weights)

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._rho:
            return
        closure = any(map(callable, (*args, *kwargs.values())))
        skipped = getattr(optimizer, "found_inf", None)  # set by a GradScaler for a fused optimizer
        held = {id(p) for p in _parameters(optimizer)}
        for weight, quantizer in self._weights:
            if id(weight) in held and (closure or weight.grad is not None):
                _blend_(weight, quantizer, self._rho, skipped)

    def after(self, *_: object) -> None:
        pass


def _blend_(weight: Any, quantizer: QWeight, rho: float, skipped: Tensor | None) -> None:
    wanted = quantized_shard(weight, quantizer)
    local = weight.to_local() if is_dtensor(weight) else weight
    if skipped is None:
        local.lerp_(wanted, rho)
    else:
        local.lerp_(wanted, (rho * (1 - skipped.to(local.device))).to(local.dtype))


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _with_hooks(optimizer: torch.optim.Optimizer, added: list[_Bound | _Blend]) -> torch.optim.Optimizer:
    for hook in added:
        optimizer.register_step_pre_hook(hook.before)
        optimizer.register_step_post_hook(hook.after)
    # Copying an optimizer drops its hooks: register them again, with what belongs to the copy's parameters.
    hooks = [*vars(optimizer).get("_coarsegrad_hooks", []), *added]
    setattr(optimizer, "_coarsegrad_hooks", hooks)
    setattr(optimizer, "__reduce_ex__", lambda _: (_copied, (type(optimizer), optimizer.__getstate__(), hooks)))
    return optimizer


def _copied(
    kind: type[torch.optim.Optimizer], state: dict[str, Any], hooks: list[_Bound | _Blend]
) -> torch.optim.Optimizer:
    optimizer = kind.__new__(kind)
    optimizer.__setstate__(state)
    return _with_hooks(optimizer, hooks)
