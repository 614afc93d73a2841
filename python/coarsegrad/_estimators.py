"""The table of coarse gradients: g' of each in plain torch, straight from its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._types import Needs

_BENGIO = "Bengio et al. 2013, arXiv 1308.3432"
_CAI = "Cai et al. 2017, arXiv 1702.00953"
_YIN = "Yin et al. 2019, arXiv 1903.05662"
_LONG = "Long et al. 2021, arXiv 2011.11256"
_PANFEROV = "Panferov et al. 2025, arXiv 2502.05003"
_GONG = "Gong et al. 2019, arXiv 1908.05033"
_CHEN = "Chen et al. 2026, arXiv 2601.19320"

GPrime = Callable[..., Tensor]


@dataclass(frozen=True)
class STE:
    """One straight-through estimator.

    name: the name of the STE in every argument `ste`.
    needs: what dx depends on: "nothing", "positive" (the bit x > 0), "inside" (the bit 0 < x <= L[q]), "near" (the bit
        -alpha/2 <= x <= L[q] + alpha/2), "codes" (u is the code c, so that g' is constant on each stair) or "x".
    gprime: g'(u, q) -> Tensor of u's shape and dtype; u is never NaN. g'(u, q, rounding="nearest") if by_rounding.
    in_class: whether it is in the convergence class: g'(u) = 0 for u <= 0, 0 < delta <= g'(u) <= delta~ for u > 0
        (on bounded inputs).
    formula: g' in one line.
    points: triples (u, q, g'(u)) worked out by hand.
    paper: the source.
    triton: g' as a @triton.jit function, for a custom STE; or the name of one in triton/ste.py, for an STE of the table
        that is not compiled in.
    passes_zero: whether g'(0) != 0.
    by_rounding: whether g' follows the thresholds, and so depends on the rounding.
    """

    name: str
    needs: Needs
    gprime: GPrime
    in_class: bool
    formula: str
    points: tuple[tuple[float, int, float], ...] = ()
    paper: str = ""
    triton: Callable | str | None = None
    passes_zero: bool = False
    by_rounding: bool = False

    def at(self, u: Tensor, q: int, rounding: str) -> Tensor:
        """g'(u) under a rounding."""
        return self.gprime(u, q, rounding) if self.by_rounding else self.gprime(u, q)


# dsq: where it starts in the paper, its characteristic variable is 0.2: the slope log(2 / 0.2 - 1) of the tanh, and the
# factor 1 / (1 - 0.2) that stretches each stair to its levels. stable_qat: the amplitude 0.21 of the paper's one wave.
DSQ_SLOPE, DSQ_STRETCH = math.log(9), 1.25
STABLE_QAT = 0.21 * math.sqrt(2) * math.pi


def _identity(u: Tensor, q: int) -> Tensor:
    return torch.ones_like(u)


def _relu(u: Tensor, q: int) -> Tensor:
    return (u > 0).to(u.dtype)


def _clipped_relu(u: Tensor, q: int) -> Tensor:
    return ((u > 0) & (u <= q)).to(u.dtype)


def _log_tailed_relu(u: Tensor, q: int) -> Tensor:
    return torch.where(u <= 0, 0.0, torch.where(u <= q, 1.0, 1 / (u - q + 1)))


def _reverse_exponential(u: Tensor, q: int) -> Tensor:
    return torch.where(u <= 0, 0.0, torch.exp(-u / q))


def _trust(u: Tensor, q: int) -> Tensor:
    return ((u >= -0.5) & (u <= q + 0.5)).to(u.dtype)


def _to_threshold(u: Tensor, q: int, rounding: str) -> Tensor:
    """The distance from 0 < u <= q to the nearest threshold in units of alpha, at most 1/2."""
    if rounding == "ceil":
        threshold = u.round().clamp(max=q - 1)
    else:
        threshold = u.floor() + 0.5
        if rounding == "hwgq":
            threshold = torch.where(u < 1, 0.0, threshold)
    return (u - threshold).abs().clamp(max=0.5)


def _dsq(u: Tensor, q: int, rounding: str = "nearest") -> Tensor:
    tail = torch.exp(-2 * DSQ_SLOPE * _to_threshold(u, q, rounding))
    # tail / (1 + tail)**2 is 1 / (2 cosh)**2.
    return torch.where((u > 0) & (u <= q), 2 * DSQ_SLOPE * DSQ_STRETCH * tail / (1 + tail).square(), 0.0)


def _stable_qat(u: Tensor, q: int, rounding: str = "nearest") -> Tensor:
    # 1 - cos by a sine, which loses nothing near a level.
    below_one = 2 * STABLE_QAT * torch.sin(math.pi / 2 * (0.5 - _to_threshold(u, q, rounding))).square()
    slope = ((1 - STABLE_QAT) + below_one) / ((1 + STABLE_QAT) - below_one)
    return torch.where((u > 0) & (u <= q), slope, 0.0)


COMPILED = (
    STE(
        name="identity",
        needs="nothing",
        gprime=_identity,
        in_class=False,
        passes_zero=True,
        formula="1",
        points=((-2.0, 3, 1.0), (0.0, 3, 1.0), (0.5, 3, 1.0), (3.0, 3, 1.0), (9.0, 3, 1.0)),
        paper=_BENGIO,
    ),
    STE(
        name="relu",
        needs="positive",
        gprime=_relu,
        in_class=True,
        formula="1 if u > 0 else 0",
        points=((-2.0, 3, 0.0), (0.0, 3, 0.0), (0.5, 3, 1.0), (3.0, 3, 1.0), (9.0, 3, 1.0)),
        paper=_YIN,
    ),
    STE(
        name="clipped_relu",
        needs="inside",
        gprime=_clipped_relu,
        in_class=False,
        formula="1 if 0 < u <= q else 0",
        points=((-2.0, 3, 0.0), (0.0, 3, 0.0), (0.5, 3, 1.0), (3.0, 3, 1.0), (3.5, 3, 0.0), (9.0, 15, 1.0)),
        paper=_CAI,
    ),
    STE(
        name="log_tailed_relu",
        needs="x",
        gprime=_log_tailed_relu,
        in_class=True,
        formula="1 if 0 < u <= q, 1 / (u - q + 1) above, else 0",
        points=(
            (-2.0, 3, 0.0),
            (0.0, 3, 0.0),
            (0.5, 3, 1.0),
            (3.0, 3, 1.0),
            (4.0, 3, 0.5),
            (6.0, 3, 0.25),
            (2.0, 1, 0.5),
        ),
        paper=f"{_CAI}; {_LONG}",
    ),
    STE(
        name="reverse_exponential",
        needs="x",
        gprime=_reverse_exponential,
        in_class=True,
        formula="exp(-u / q) if u > 0 else 0",
        points=(
            (-2.0, 3, 0.0),
            (0.0, 3, 0.0),
            (1.5, 3, 0.6065306597126334),
            (3.0, 3, 0.36787944117144233),
            (6.0, 3, 0.1353352832366127),
            (15.0, 15, 0.36787944117144233),
        ),
        paper=_LONG,
    ),
    STE(
        name="trust",
        needs="near",
        gprime=_trust,
        in_class=False,
        passes_zero=True,
        formula="1 if -1/2 <= u <= q + 1/2 else 0",
        points=((-2.0, 3, 0.0), (-0.5, 3, 1.0), (0.0, 3, 1.0), (2.0, 3, 1.0), (3.5, 3, 1.0), (3.75, 3, 0.0)),
        paper=_PANFEROV,
    ),
)
# Not compiled in: the kernels are given the slope of each code. Derived in docs/step-constant.md.
BY_SLOPES = (
    STE(
        name="reverse_exponential_step",
        needs="codes",
        gprime=_reverse_exponential,
        in_class=True,
        formula="exp(-c / q) if c > 0 else 0, c the code",
        points=((0.0, 3, 0.0), (1.0, 3, 0.7165313105737893), (3.0, 3, 0.36787944117144233)),
        paper=_LONG,
    ),
)
# Not compiled in either: their backward runs as torch ops, or on a GPU in Triton.
NOT_COMPILED = (
    STE(
        name="dsq",
        needs="x",
        gprime=_dsq,
        in_class=False,
        formula="1.3733 / cosh(2.1972 d)**2 if 0 < u <= q else 0, d <= 1/2 from a threshold",
        points=(
            (-0.5, 3, 0.0),
            (0.0, 3, 0.0),
            (0.5, 3, 1.3732653608351373),
            (2.75, 3, 1.0299490206263529),
            (3.0, 3, 0.49437552990064943),
            (3.25, 3, 0.0),
        ),
        paper=_GONG,
        triton="dsq",
        by_rounding=True,
    ),
    STE(
        name="stable_qat",
        needs="x",
        gprime=_stable_qat,
        in_class=False,
        formula="(1 - w) / (1 + w) if 0 < u <= q else 0, w = 0.933 sin(pi d), d <= 1/2 from a threshold",
        points=(
            (-0.5, 3, 0.0),
            (0.0, 3, 0.0),
            (0.5, 3, 1.0),
            (2.75, 3, 0.20501203747323293),
            (3.0, 3, 0.03465824896148423),
            (3.25, 3, 0.0),
        ),
        paper=_CHEN,
        triton="stable_qat",
        by_rounding=True,
    ),
)
