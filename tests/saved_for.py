"""What the package saves for backward, for options by name."""

from __future__ import annotations

from coarsegrad._types import AlphaGrad, Rounding
from coarsegrad.ste import Saved, get_ste, saved


def saved_for(ste: str, rounding: str, alpha_grad: str | None, need_grad_x: bool = True) -> Saved:
    """alpha_grad: None if alpha is not learned."""
    rule = AlphaGrad[alpha_grad or "exact"]
    return saved(get_ste(ste).needs, Rounding[rounding], rule, need_grad_x, alpha_grad is not None)
