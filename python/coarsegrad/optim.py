"""Learned alphas in an optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .nn import QReLU


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, *, alpha_lr: float | None = None
) -> list[dict[str, object]]:
    """Two groups for an optimizer: all parameters, and the learned alphas, which no weight decay may shrink; for a
    parametrized alpha, what it is computed from.

    lr, weight_decay: of the first group, where a parameter requires grad. alpha_lr: of the alphas, lr if None; their
    weight decay is 0. Without learned alphas there is the first group only.

    An optimizer's step may make an alpha negative, which is an error in the next forward; `keep_positive` prevents it.
    With many elements behind one alpha its gradient is large: `QReLU(alpha_scale="lsq")` scales it by one sample's
    elements, so that it does not depend on the batch size; or give a smaller alpha_lr, with SGD a hundredth of lr.
    """
    layers = [m for m in model.modules() if isinstance(m, QReLU)]
    alphas = list(dict.fromkeys(p for layer in layers for p in layer.parameters() if p.requires_grad))
    known = {id(alpha) for alpha in alphas}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, object]] = [{"params": others, "lr": lr, "weight_decay": weight_decay}]
    if alphas:
        alpha_lr = lr if alpha_lr is None else alpha_lr
        groups.append({"params": alphas, "lr": alpha_lr, "weight_decay": 0.0})
    return groups


def keep_positive(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Has every step of `optimizer` leave the learned alphas of `model` positive: a step at most halves one.

    Returns the optimizer, and copies of it, with `copy.deepcopy` or pickle, do so with their model. The values from
    before a step are kept during it, a number for each alpha; there is no other bound, so that alpha can get as small
    as it wants to in time. A parametrized alpha is bounded through its right_inverse, for the price of a device sync.
    """
    layers = [m for m in model.modules() if isinstance(m, QReLU) and any(True for _ in m.parameters())]
    return _bounded(optimizer, layers)


def _bounded(optimizer: torch.optim.Optimizer, layers: list[QReLU]) -> torch.optim.Optimizer:
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
                layer._set_alpha(torch.maximum(layer.alpha, half), layer.channel_dim)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(bound)
    # An optimizer's copy has no hooks: it is made so that it gets these, with the layers that belong to its parameters.
    optimizer.__reduce_ex__ = lambda _: (_bounded_copy, (type(optimizer), optimizer.__getstate__(), layers))
    return optimizer


def _bounded_copy(kind: type[torch.optim.Optimizer], state: dict, layers: list[QReLU]) -> torch.optim.Optimizer:
    optimizer = kind.__new__(kind)
    optimizer.__setstate__(state)
    return _bounded(optimizer, layers)
