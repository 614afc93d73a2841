"""`python -m bench.attention`: gradients of an attention block if what it saves is quantized, and if its inputs are."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

import coarsegrad as cg

from .pages import DOCS, fill, markdown
from .timing import BenchError

PAGE = DOCS / "memory.md"
HEADS, WIDTH, TOKENS, GROUP = 4, 64, 256, 64
SHARPNESS = (1.0, 4.0, 16.0)

_DESCRIPTION = """
The error of the weights' gradients of an attention block if its backward finds 4-bit
numbers (one alpha for 64 elements) where the forward had others, and if the forward
had the same. Writes the table of docs/memory.md.
"""

Round = Callable[[Tensor], Tensor]


def nearest(t: Tensor) -> Tensor:
    return cg.qsigned(t, None, 4, group=GROUP)


def stochastic(t: Tensor) -> Tensor:
    """Up or down, unbiased."""
    groups = t.unflatten(-1, (-1, GROUP))
    step = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / step + torch.rand_like(groups)).floor() * step).flatten(-2)


class Block(nn.Module):
    """q, k, v, attention and the output's projection. sharpness: the standard deviation of the logits, about."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        width = HEADS * WIDTH
        self.project = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))
        for linear, gain in zip(self.project, (sharpness**0.5, sharpness**0.5, 1.0, 1.0)):
            nn.init.normal_(linear.weight, std=gain * width**-0.5)

    def forward(self, x: Tensor, saved: dict[int, Round] | None = None, staircase: bool = False) -> Tensor:
        """saved: what is done with the q (0), k (1), v (2) and output (3) that attention saves, and the input (4) that
        Linears save. staircase: q, k and v are quantized in the forward."""
        rules = saved or {}
        with _saving({x.data_ptr(): rules.get(4)}):
            q, k, v = (linear(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for linear in self.project[:3])
        if staircase:
            q, k, v = map(nearest, (q, k, v))
        with _saving({t.data_ptr(): rules.get(i) for i, t in enumerate((q, k, v))}, others=rules.get(3)):
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).flatten(-2)
        with _saving({y.data_ptr(): rules.get(4)}):
            return self.project[3](y)


def _saving(rules: dict[int, Round | None], others: Round | None = None) -> AbstractContextManager:
    """What is at one of these addresses is replaced where it is saved, and so is what else has four dimensions.

    Without a rule there is no hook, which would take the place of those that pack.
    """
    if others is None and not any(rules.values()):
        return nullcontext()

    def pack(t: Tensor) -> Tensor:
        rule = rules.get(t.data_ptr(), others if t.dim() == 4 else None)
        return t if rule is None else rule(t.detach())

    return saved_tensors_hooks(pack, lambda t: t)


def gradients(sharpness: float, **options: Any) -> Tensor:
    """Of the weights of all projections, one after the other, for a fixed dy."""
    torch.manual_seed(0)
    block, x = Block(sharpness), torch.randn(2, TOKENS, HEADS * WIDTH, requires_grad=True)
    dy = torch.randn(2, TOKENS, HEADS * WIDTH)
    torch.manual_seed(1)  # of the stochastic rounding
    found = torch.autograd.grad(block(x, **options), list(block.parameters()), dy)
    return torch.cat([t.flatten() for t in found])


def _error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


CASES: dict[str, dict[str, Any]] = {
    "q and k, to nearest": {"saved": {0: nearest, 1: nearest}},
    "q and k, stochastically": {"saved": {0: stochastic, 1: stochastic}},
    "q, k, v and the output, to nearest": {"saved": dict.fromkeys(range(4), nearest)},
    "only what the Linears save, to nearest": {"saved": {4: nearest}},
}
OURS = "q, k and v are quantized in the forward, and saved as codes"


def errors(sharpness: float) -> dict[str, float]:
    """By what is saved with 4 bits: the error relative to the gradients of the same forward that saves all in full."""
    whole = gradients(sharpness)
    found = {name: _error(gradients(sharpness, **options), whole) for name, options in CASES.items()}
    staircases = gradients(sharpness, staircase=True)
    with cg.packed_activations():
        return {**found, OURS: _error(gradients(sharpness, staircase=True), staircases)}


def _number(value: float) -> str:
    """Two digits; of large ones, which another machine's sums may change, one."""
    return f"{value:.2g}" if value < 100 else f"{float(f'{value:.1g}'):,.0f}"


def tables() -> dict[str, str]:
    """The table of docs/memory.md by its name."""
    by_sharpness = [errors(sharpness) for sharpness in SHARPNESS]
    rows = ((name, *(_number(found[name]) for found in by_sharpness)) for name in by_sharpness[0])
    return {"attention": markdown(("saved with 4 bits", *(f"logits of {s:g}" for s in SHARPNESS)), rows)}


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m bench.attention", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    try:
        fill(PAGE, tables())
    except BenchError as error:
        raise SystemExit(f"bench.attention: {error}") from error


if __name__ == "__main__":
    main()
