"""The coarse gradients (straight-through estimators, STEs) and what each of them saves for backward.

    dx = dy * g'(u),   u = x / alpha,   q = 2**bits - 1

A row of the table states g' in plain torch, straight from the formula. csrc/math/ste.h states it independently for the
kernels, so that each is the oracle of the other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ._text import format_table, one_of
from ._torch_internals import no_dispatch_modes
from ._types import (
    ALPHA_GRADS,
    BUILT_IN,
    ROUNDINGS,
    AlphaGrad,
    MaskKind,
    Needs,
    Rounding,
    Ste,
    SteName,
    parse,
)

__all__ = [
    "ALPHA_GRADS",
    "BUILT_IN",
    "ROUNDINGS",
    "STE",
    "STECheck",
    "STETable",
    "Saved",
    "check_inplace",
    "check_ste",
    "get_ste",
    "register_ste",
    "saved",
    "stes",
]

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


_BUILT_IN = (
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
_BY_SLOPES = (
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
_NOT_COMPILED = (
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
_registry = {ste.name: ste for ste in (*_BUILT_IN, *_BY_SLOPES, *_NOT_COMPILED)}


def get_ste(name: SteName) -> STE:
    """The STE with this name; a ValueError lists the known names."""
    try:
        return _registry[name]
    except (KeyError, TypeError):
        raise ValueError(one_of("ste", name, _registry)) from None


def ste_of(ste: str | int) -> STE:
    """The STE that an op is given: a built-in one by its number, any by its name."""
    return get_ste(ste if isinstance(ste, str) else parse("ste", ste, Ste).name)


class STETable(dict):
    """Maps names to `STE`. Prints as a table."""

    def __repr__(self) -> str:
        rows = [(s.name, s.formula, "yes" if s.in_class else "no", s.needs, s.paper) for s in self.values()]
        return format_table(("ste", "g'(u), u = x / alpha", "in class", "dx needs", "paper"), rows)


def stes() -> STETable:
    """All known STEs by name, custom ones last. Prints as a table.

    "in class" means the convergence class of Long et al. 2021 (arXiv 2011.11256) on bounded inputs; see `check_ste`.
    """
    return STETable(_registry)


@dataclass(frozen=True)
class STECheck:
    """The result of `check_ste`. It is true if the STE is in the convergence class.

    delta, delta_max: the smallest and largest g'(u) seen on 0 < u <= u_max.
    failures: one sentence for each condition that fails, with the numbers.
    """

    name: str
    bits: int
    u_max: float
    delta: float
    delta_max: float
    failures: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        where = f"{self.name} at {self.bits} bits, 0 < u <= {self.u_max:g}"
        if self:
            return f"{where}: in the convergence class, {self.delta:.6g} <= g'(u) <= {self.delta_max:.6g}"
        return f"{where}: not in the convergence class\n" + "\n".join(f"  {line}" for line in self.failures)

    __repr__ = __str__


@contextlib.contextmanager
def real_numbers() -> Iterator[None]:
    """New tensors are on the CPU and have values, whatever the default device and even in a FakeTensorMode."""
    with no_dispatch_modes(), torch.device("cpu"):
        yield


def _sample_positive(q: int, u_max: float) -> Tensor:
    """u on 0 < u <= u_max, float64: a linear and a geometric grid, and every integer with both neighbours."""
    integers = torch.arange(1, min(math.floor(u_max), 2 * q + 2) + 1, dtype=torch.float64)
    neighbours = [torch.nextafter(integers, torch.full_like(integers, end)) for end in (-math.inf, math.inf)]
    linear = torch.linspace(0, u_max, 4097, dtype=torch.float64)
    geometric = torch.logspace(-30, math.log10(u_max), 513, dtype=torch.float64)
    u = torch.cat([linear, geometric, integers, *neighbours])
    return u[(u > 0) & (u <= u_max)].unique()


@real_numbers()
def check_ste(ste: SteName | GPrime, bits: int = 4, u_max: float | None = None) -> STECheck:
    """Check numerically whether an STE is in the convergence class of coarse gradient descent.

        g'(u) = 0 for u <= 0,   0 < delta <= g'(u) <= delta~ < inf for 0 < u <= u_max

    ste: a known name (see `stes`), or an elementwise function g'(u, q) -> Tensor of float64 tensors.
    bits: 1..8; q = 2**bits - 1.
    u_max: the upper bound of u = x / alpha, finite and > 0. Default: 4 * q.

    Returns an `STECheck`, which is true if every condition holds and otherwise prints the failures with their numbers.
    The check samples a few thousand points. It can show that an STE is outside the class, but not prove that it is
    inside.

    Raises ValueError for an unknown name and for bits or u_max out of range; TypeError if ste is neither a name nor a
    function.
    Source: Long, Yin, Xin 2021, arXiv 2011.11256.
    """
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"bits must be an int in 1..8, got {bits!r}")
    q = 2**bits - 1
    u_max = 4.0 * q if u_max is None else float(u_max)
    if not 0 < u_max < math.inf:
        raise ValueError(f"u_max must be finite and > 0, got {u_max!r}")
    if isinstance(ste, str):
        name, gprime = ste, get_ste(ste).gprime
    elif callable(ste):
        name, gprime = getattr(ste, "__name__", repr(ste)), ste
    else:
        raise TypeError(f"ste must be a name or a function g'(u, q), got {type(ste).__name__}")

    failures = []

    def require(condition: str, u: Tensor, g: Tensor, holds: Tensor) -> None:
        failing = (~holds).nonzero()[:, 0]
        if failing.numel():
            i = failing[u[failing].abs().argmax()]
            failures.append(f"{condition} fails: g'({u[i]:.6g}) = {g[i]:.6g}")

    positive = _sample_positive(q, u_max)
    not_positive = torch.cat([-positive, positive.new_zeros(1), -positive.new_zeros(1)])
    g = gprime(not_positive, q)
    require("g'(u) = 0 for u <= 0", not_positive, g, g == 0)
    g = gprime(positive, q)
    require("0 < delta <= g'(u) for u > 0", positive, g, g > 0)
    require("g'(u) <= delta~ < inf for u > 0", positive, g, g < math.inf)
    return STECheck(name, bits, u_max, float(g.min()), float(g.max()), tuple(failures))


def _check_gprime(name: str, gprime: GPrime, needs: Needs) -> None:
    """Reject a g' that is not elementwise, or that depends on more than `needs`."""
    for dtype in (torch.float32, torch.float64):
        for shape in ((9,), (3, 3), ()):
            u = torch.linspace(-2, 30, math.prod(shape), dtype=dtype).reshape(shape)
            g = gprime(u, 3)
            if not isinstance(g, Tensor) or g.shape != u.shape or g.dtype != dtype:
                got = f"{g.dtype} of shape {tuple(g.shape)}" if isinstance(g, Tensor) else type(g).__name__
                raise ValueError(f"gprime of ste {name!r} must return {dtype} of shape {shape}, got {got}")
            if not bool(g.isfinite().all()):
                raise ValueError(
                    f"gprime of ste {name!r} must be finite for finite u, got {g.tolist()} at {u.tolist()}"
                )
    if needs in ("codes", "x"):
        return
    for q in (2**bits - 1 for bits in range(1, 9)):
        positive = _sample_positive(q, 4.0 * q)
        u = torch.cat([-positive, positive.new_zeros(1), positive])
        near = (u >= -0.5) & (u <= q + 0.5)
        bit = {"nothing": u == u, "positive": u > 0, "inside": (u > 0) & (u <= q), "near": near}[needs]
        g = gprime(u, q)
        for part in (bit, ~bit):
            if bool((g[part] != g[part][:1]).any()):
                i, j = g[part].argmin(), g[part].argmax()
                raise ValueError(
                    f"needs={needs!r} is too little for gprime of ste {name!r}, which takes two values for one bit: "
                    f"g'({u[part][i]:.6g}) = {g[part][i]:.6g}, g'({u[part][j]:.6g}) = {g[part][j]:.6g} at q = {q}"
                )


@real_numbers()
def register_ste(
    name: str,
    gprime: GPrime,
    *,
    needs: Needs = "x",
    formula: str = "",
    paper: str = "",
    triton: Callable | None = None,
) -> contextlib.ExitStack:
    """Register a custom STE, dx = dy * g'(x / alpha). `ste=name` then works wherever a name does.

    name: an identifier that no other STE has.
    gprime: g'(u, q) -> Tensor in plain torch, elementwise. u = x / alpha is float32 or float64, of any shape, and never
        NaN (the gradient of a NaN passes, for every STE); q = 2**bits - 1. Returns a tensor of u's shape and dtype.
    needs: what g' depends on, and so what is saved for backward. "x" (default) always works. A piecewise constant g'
        saves less: "nothing" if it is constant, "positive" if it depends on u > 0 only (1 bit per element), "inside" if
        it depends on 0 < u <= q only (1 bit per element), "near" if on -1/2 <= u <= q + 1/2 only (1 bit per element).
        "codes" makes any g' constant on each stair, g'(c) for the code c = 0..q, and saves the packed codes. gprime is
        then called once per number of bits, dtype and device.
    formula, paper: text for the table of `stes`.
    triton: g' as a @triton.jit function (u, q), with u a float32 or float64 block and q a compile-time int. It is never
        called for a NaN. If needs is a bit, u is 0.5 or -1; if needs is "codes", u is the code. It is not compared
        with gprime here; `coarsegrad.testing.triton_ulps_apart` does that in Triton's interpreter. In float32 on an
        NVIDIA GPU, unlike there, `/` errs by 2 ulps, and somewhat more by a literal, and tl.ceil, tl.floor, tl.exp2,
        tl.sqrt and tl.rsqrt take subnormals for 0.

    The forward kernel is the same for every STE. So is the backward kernel if needs is "codes", except for
    alpha_grad="chain": it looks up the slope of each code. Otherwise the backward is a Triton kernel if `triton` is
    given and Triton can serve the device (see `backends`), even next to compiled CUDA kernels, and plain torch if not.

    Returns a handle. Its `close()`, or the end of a `with` block around it, unregisters the STE.

    Raises ValueError if the name is taken or not an identifier, needs is unknown, or g' depends on more than needs;
    TypeError if gprime is not callable or triton is not a @triton.jit function.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be an identifier, got {name!r}")
    if name in _registry:
        kind = "built in" if name in BUILT_IN else "registered already"
        raise ValueError(f"name {name!r} is {kind}; choose another, known are {', '.join(map(repr, _registry))}")
    if not callable(gprime):
        raise TypeError(f"gprime must be a function g'(u, q) -> Tensor, got {type(gprime).__name__}")
    if needs not in get_args(Needs):
        raise ValueError(one_of("needs", needs, get_args(Needs)))
    if triton is not None and len(getattr(triton, "arg_names", ())) != 2:
        raise TypeError(f"triton must be a @triton.jit function (u, q) -> g', got {triton!r}")
    _check_gprime(name, gprime, needs)
    in_class = all(check_ste(gprime, bits) for bits in range(1, 9))
    passes_zero = any(bool(gprime(torch.zeros(1), 2**bits - 1) != 0) for bits in range(1, 9))
    _registry[name] = STE(name, needs, gprime, in_class, formula, (), paper, triton, passes_zero)
    handle = contextlib.ExitStack()
    handle.callback(_registry.pop, name, None)
    return handle


class Saved(NamedTuple):
    """What is saved for backward: bits of x, of the kind with the number `mask`; the packed codes; x itself."""

    mask: int
    codes: bool
    x: bool


def codes_give(mask: int, rounding: int) -> bool:
    """Whether the codes determine the mask. Under ceil and hwgq T[1] = 0, so that x > 0 is c > 0."""
    return mask == MaskKind.positive and rounding != Rounding.nearest


def saved(needs: Needs, rounding: int, alpha_grad: int, need_grad_x: bool, need_grad_alpha: bool) -> Saved:
    """The least that these gradients can be computed from. needs: of the STE."""
    gate = needs if need_grad_x else "nothing"
    by_state = need_grad_alpha and alpha_grad in (AlphaGrad.three_valued, AlphaGrad.two_valued)
    if gate == "x" or (need_grad_alpha and alpha_grad == AlphaGrad.chain) or (gate == "near" and by_state):
        return Saved(MaskKind.nothing.value, False, True)  # no state tells what is near
    mask = MaskKind["nothing" if gate == "codes" else gate].value
    if not need_grad_alpha:
        return Saved(mask, gate == "codes", False)
    if by_state:
        return Saved(MaskKind.state.value, gate == "codes", False)
    return Saved(MaskKind.nothing.value if codes_give(mask, rounding) else mask, True, False)


def check_inplace(
    ste: SteName, rounding: str, alpha_grad: str, need_grad_x: bool = True, need_grad_alpha: bool = True
) -> None:
    """A ValueError if x must not be overwritten because it is saved for backward."""
    rule = parse("alpha_grad", alpha_grad, AlphaGrad)
    if saved(get_ste(ste).needs, parse("rounding", rounding, Rounding), rule, need_grad_x, need_grad_alpha).x:
        because = f"ste={ste!r}"
        if need_grad_alpha and get_ste(ste).needs != "x":
            because = (
                f"alpha_grad={alpha_grad!r}" if rule == AlphaGrad.chain else f"{because}, alpha_grad={alpha_grad!r}"
            )
        raise ValueError(f"inplace=True would overwrite x, which the backward needs for {because}; use inplace=False")
