"""Helpers for optimizers: learned alphas without weight decay, and kept positive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .nn import QReLU
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
    return _bounded(optimizer, layers)


def _bounded(optimizer: torch.optim.Optimizer, layers: list[Any]) -> torch.optim.Optimizer:
    before: list[Tensor] = []

    @torch.no_grad()
    def remember(*_: object) -> None:
        before[:] = [layer.alpha.detach() / 2 for layer in layers]

    @torch.no_grad()
    def bound(*_: object) -> None:
        for layer, half in zip(layers, before):
            if not is_parametrized(layer, "alpha"):
                layer.alpha.copy_(torch.maximum(layer.alpha, half))
            elif not (layer.alpha >= half).all():
                layer.alpha = torch.maximum(layer.alpha, half)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(bound)
    # Copying an optimizer drops its hooks: register them again, with the layers that belong to the copy's parameters.
    setattr(optimizer, "__reduce_ex__", lambda _: (_bounded_copy, (type(optimizer), optimizer.__getstate__(), layers)))
    return optimizer


def _bounded_copy(kind: type[torch.optim.Optimizer], state: dict, layers: list[Any]) -> torch.optim.Optimizer:
    optimizer = kind.__new__(kind)
    optimizer.__setstate__(state)
    return _bounded(optimizer, layers)
