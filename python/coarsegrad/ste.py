"""The coarse gradients (straight-through estimators, STEs) and what each of them saves for backward.

    dx = dy * g'(u),   u = x / alpha,   q = 2**bits - 1

The table is in _estimators.py. csrc/math/ste.h states g' independently for the kernels, so that each is the oracle of
the other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ._estimators import BY_SLOPES, COMPILED, NOT_COMPILED, STE, GPrime
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
    "GPrime",
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

_registry = {ste.name: ste for ste in (*COMPILED, *BY_SLOPES, *NOT_COMPILED)}


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
