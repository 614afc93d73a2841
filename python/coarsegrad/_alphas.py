"""alpha as a module keeps it: made, widened, reshaped."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from ._checks import check_number, checked_values
from ._types import wide_dtype


def readable(t: Tensor) -> bool:
    """Whether all values of t can be read here: it is not meta, fake or a shard."""
    return type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta"


def keep_wide(new: Tensor, old: Tensor) -> Tensor:
    """new, or old in float32 on new's device if new has fewer than 32 bits."""
    return old.to(new.device, torch.float32) if new.is_floating_point() and new.element_size() < 4 else new


def reshape_alpha(t: Tensor, alpha: Tensor) -> None:
    """Give t the values and shape of alpha; a ValueError if an optimizer or shard would keep the old shape."""
    change = f"alpha cannot change its shape from {list(t.shape)} to {list(alpha.shape)}"
    if type(t) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"{change} as a {type(t).__name__}; do it before sharding")
    for holder in gc.get_referrers(t) if t.requires_grad else ():
        state = holder.get(t) if isinstance(holder, dict) else None
        if isinstance(state, dict) and any(isinstance(s, Tensor) and s.shape == t.shape for s in state.values()):
            raise ValueError(f"{change}, as an optimizer has state for it; do it before the optimizer's first step")
    t.data, t.grad = alpha.detach().to(t, copy=True), None


def initial_alpha(alpha: float | Tensor, size: int) -> Tensor:
    """A new tensor of shape [size], checked."""
    if not isinstance(alpha, Tensor):
        check_number("alpha", alpha)
        return torch.full((size,), float(alpha), dtype=torch.float32)
    if not alpha.is_floating_point():
        raise TypeError(f"alpha must be of a floating dtype, got {alpha.dtype}")
    if alpha.shape != (size,):
        raise ValueError(f"alpha must have shape [{size}], got {list(alpha.shape)}")
    if readable(alpha):
        checked_values(alpha.cpu(), wide_dtype(alpha.dtype))
    return alpha.detach().to(wide_dtype(alpha.dtype), copy=True)
