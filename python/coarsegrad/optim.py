"""Learned alphas in an optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .nn import QReLU


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, *, alpha_lr: float | None = None
) -> list[dict[str, object]]:
    """Two groups for an optimizer: all parameters, and the learned alphas, which no weight decay may shrink.

    lr, weight_decay: of the first group, where a parameter requires grad. alpha_lr: of the alphas, lr if None; their
    weight decay is 0. Without learned alphas there is the first group only.

    An optimizer's step may make an alpha negative, which is an error in the next forward; `keep_positive` prevents it.
    With many elements behind one alpha its gradient is large: `QReLU(alpha_scale="lsq")` scales it by one sample's
    elements, so that it does not depend on the batch size; or give a smaller alpha_lr, with SGD a hundredth of lr.
    """
    alphas = [m.alpha for m in model.modules() if isinstance(m, QReLU) and m.alpha.requires_grad]
    known = {id(alpha) for alpha in alphas}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, object]] = [{"params": others, "lr": lr, "weight_decay": weight_decay}]
    if alphas:
        alpha_lr = lr if alpha_lr is None else alpha_lr
        groups.append({"params": list(dict.fromkeys(alphas)), "lr": alpha_lr, "weight_decay": 0.0})
    return groups


def keep_positive(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Has every step of `optimizer` leave the learned alphas of `model` positive: a step at most halves one.

    Returns the optimizer. The values from before a step are kept during it, a number for each alpha; there is no other
    bound, so that alpha can get as small as it wants to in time.
    """
    alphas = [m.alpha for m in model.modules() if isinstance(m, QReLU) and isinstance(m.alpha, nn.Parameter)]
    before: list[Tensor] = []

    @torch.no_grad()
    def remember(*_: object) -> None:
        before[:] = [alpha.detach() / 2 for alpha in alphas]

    @torch.no_grad()
    def bound(*_: object) -> None:
        for alpha, half in zip(alphas, before):
            alpha.copy_(torch.maximum(alpha, half))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(bound)
    return optimizer
