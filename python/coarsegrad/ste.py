"""The coarse gradients (straight-through estimators, STEs): the one Python list of them, and what each has to keep.

    dx = dy * g'(u),   u = x / alpha,   q = 2**bits - 1

A row states g' in plain torch, straight from the formula. The native list is csrc/math/ste.h; the two are written
twice on purpose, so that one is the oracle of the other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._torch_internals import no_dispatch_modes

ROUNDINGS = ("ceil", "nearest", "hwgq")
ALPHA_GRADS = ("exact", "three_valued", "two_valued", "chain")

# What dx has to know of x: nothing, the bit x > 0, the bit 0 < x <= L[q], its code, or x itself.
NEEDS = ("nothing", "positive", "inside", "codes", "x")

_BENGIO = "Bengio et al. 2013, arXiv 1308.3432"
_CAI = "Cai et al. 2017, arXiv 1702.00953"
_YIN = "Yin et al. 2019, arXiv 1903.05662"
_LONG = "Long et al. 2021, arXiv 2011.11256"

GPrime = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class STE:
    """One straight-through estimator.

    name: the word used everywhere for it.
    needs: what dx has to know of x, one of NEEDS. Where it is a bit, g' is constant where that bit is the same. Where
        it is "codes", u is the code c, the level of x in stairs: g'(c) on the whole stair.
    gprime: g'(u, q) -> Tensor of u's shape and dtype; u is never NaN.
    in_class: whether it is in the convergence class: g'(u) = 0 for u <= 0, 0 < delta <= g'(u) <= delta~ for u > 0
        (on bounded inputs).
    formula: g' in one line.
    points: triples (u, q, g'(u)) worked by hand.
    paper: where it comes from.
    triton: of a user's own: g' once more, as a @triton.jit function.
    passes_zero: whether g'(0) is not 0.
    """

    name: str
    needs: str
    gprime: GPrime
    in_class: bool
    formula: str
    points: tuple[tuple[float, int, float], ...] = ()
    paper: str = ""
    triton: Callable | None = None
    passes_zero: bool = False


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
)
# Without a mirror in the kernels' lists: they are given the slope of each code. Derived in docs/step-constant.md.
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
BUILT_IN = tuple(ste.name for ste in _BUILT_IN)
_registry = {ste.name: ste for ste in (*_BUILT_IN, *_BY_SLOPES)}


def one_of(argument: str, got: object, known) -> str:
    """The message for a word that is not one of the known ones."""
    return f"unknown {argument} {got!r}, must be one of {', '.join(map(repr, known))}"


def get_ste(name: str) -> STE:
    """The row called `name`; a ValueError that lists the known ones if there is none."""
    try:
        return _registry[name]
    except (KeyError, TypeError):
        raise ValueError(one_of("ste", name, _registry)) from None


def format_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Rows of words as a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


class STETable(dict):
    """name -> STE, printed as a table."""

    def __repr__(self) -> str:
        rows = [(s.name, s.formula, "yes" if s.in_class else "no", s.needs, s.paper) for s in self.values()]
        return format_table(("ste", "g'(u), u = x / alpha", "in class", "dx needs", "paper"), rows)


def stes() -> STETable:
    """Every known STE by name, the user's own last. Prints as a table.

    "in class" is the convergence class of Long et al. 2021 (arXiv 2011.11256), on bounded inputs; see `check_ste`.
    """
    return STETable(_registry)


@dataclass(frozen=True)
class STECheck:
    """What `check_ste` found; true if the STE is in the convergence class.

    delta, delta_max: the smallest and the largest g'(u) seen on 0 < u <= u_max.
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
    """New tensors are on the CPU and have values, whatever the default device, and in a FakeTensorMode too."""
    with no_dispatch_modes(), torch.device("cpu"):
        yield


def _sample_positive(q: int, u_max: float) -> Tensor:
    """u on 0 < u <= u_max, float64: a linear and a geometric grid, and every integer with its two neighbours."""
    integers = torch.arange(1, min(math.floor(u_max), 2 * q + 2) + 1, dtype=torch.float64)
    beside = [torch.nextafter(integers, torch.full_like(integers, end)) for end in (-math.inf, math.inf)]
    linear = torch.linspace(0, u_max, 4097, dtype=torch.float64)
    geometric = torch.logspace(-30, math.log10(u_max), 513, dtype=torch.float64)
    u = torch.cat([linear, geometric, integers, *beside])
    return u[(u > 0) & (u <= u_max)].unique()


@real_numbers()
def check_ste(ste: str | GPrime, bits: int = 4, u_max: float | None = None) -> STECheck:
    """Check numerically whether an STE is in the convergence class of coarse gradient descent:

        g'(u) = 0 for u <= 0,   0 < delta <= g'(u) <= delta~ < inf for 0 < u <= u_max

    ste: a known name (see `stes`), or a function g'(u, q) -> Tensor that works elementwise on float64 tensors.
    bits: 1..8; q = 2**bits - 1.
    u_max: the bound on u = x / alpha, finite and > 0. Default 4 * q.

    Returns a result that is true if every condition holds and prints the ones that fail with their numbers. It looks
    at some thousand points: it can show that an STE is outside of the class, and is no proof that it is inside.

    Raises ValueError for an unknown name, bits or u_max out of range; TypeError if ste is neither name nor function.
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


def _check_gprime(name: str, gprime: GPrime, needs: str) -> None:
    """Refuse a g' that does not work elementwise, or that is not constant where `needs` says that it is."""
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
        bit = {"nothing": u == u, "positive": u > 0, "inside": (u > 0) & (u <= q)}[needs]
        g = gprime(u, q)
        for part in (bit, ~bit):
            if bool((g[part] != g[part][:1]).any()):
                i, j = g[part].argmin(), g[part].argmax()
                raise ValueError(
                    f"needs={needs!r} is too little for gprime of ste {name!r}, which differs where that is the same: "
                    f"g'({u[part][i]:.6g}) = {g[part][i]:.6g}, g'({u[part][j]:.6g}) = {g[part][j]:.6g} at q = {q}"
                )


@real_numbers()
def register_ste(
    name: str,
    gprime: GPrime,
    *,
    needs: str = "x",
    formula: str = "",
    paper: str = "",
    triton: Callable | None = None,
) -> contextlib.ExitStack:
    """Add an STE of your own: dx = dy * g'(x / alpha). From then on `ste=name` works wherever a name does.

    name: an identifier that no other STE has.
    gprime: function g'(u, q) -> Tensor in plain torch: u = x / alpha, float32 or float64 of any shape, never NaN (the
        gradient of a NaN passes, for every STE); q = 2**bits - 1. Returns a tensor of u's shape and dtype.
    needs: what the backward has to keep of x: "x" (default) always works. A g' that is constant by pieces keeps
        less: "nothing" (constant), "positive" (depends on u > 0 alone, 1 bit an element), "inside" (depends on
        0 < u <= q alone, 1 bit an element). "codes" makes any g' constant on each stair, g'(c) for the code c = 0..q,
        and keeps the packed codes; gprime is then called once for each number of bits, dtype and device.
    formula, paper: text for the table that `stes` prints.
    triton: the same g' as a @triton.jit function (u, q): u is a float32 or float64 block, q an int known as the kernel
        is compiled. It is not called for NaN's sake; where needs is a bit it sees u = 0.5 and u = -0.5
        alone, and where it is "codes" the codes.
        Nothing compares it with gprime here: `coarsegrad.testing.triton_ulps_apart` does, in Triton's interpreter.

    The forward is the same kernel as for every other STE. So is the backward where needs is "codes", but for
    alpha_grad="chain": the kernels look up the slope of each code. Else it is a Triton kernel where there is `triton`
    and Triton can serve the device (see `backends`), also beside compiled CUDA kernels; or it runs in plain torch.
    Returns a handle: its `close()` removes the STE again, and so does the end of a `with` block around it.

    Raises ValueError if the name is taken or no identifier, needs is unknown, or g' does not do what needs says;
    TypeError if gprime is not callable or triton is no @triton.jit function.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be an identifier, got {name!r}")
    if name in _registry:
        kind = "built in" if name in BUILT_IN else "registered already"
        raise ValueError(f"name {name!r} is {kind}; choose another, known are {', '.join(map(repr, _registry))}")
    if not callable(gprime):
        raise TypeError(f"gprime must be a function g'(u, q) -> Tensor, got {type(gprime).__name__}")
    if needs not in NEEDS:
        raise ValueError(one_of("needs", needs, NEEDS))
    if triton is not None and len(getattr(triton, "arg_names", ())) != 2:
        raise TypeError(f"triton must be a @triton.jit function (u, q) -> g', got {triton!r}")
    _check_gprime(name, gprime, needs)
    in_class = all(check_ste(gprime, bits) for bits in range(1, 9))
    passes_zero = any(bool(gprime(torch.zeros(1), 2**bits - 1) != 0) for bits in range(1, 9))
    _registry[name] = STE(name, needs, gprime, in_class, formula, (), paper, triton, passes_zero)
    handle = contextlib.ExitStack()
    handle.callback(_registry.pop, name, None)
    return handle


def kept(ste: str, rounding: str, alpha_grad: str | None, need_grad_x: bool = True) -> tuple[str, bool, bool]:
    """What the backward keeps: (mask, codes, x).

    alpha_grad: None where alpha is not learned.
    mask: the kind of bits kept beside y: "nothing", "positive" or "inside" (1 bit an element), "state" (2 bits).
    codes, x: whether the packed codes, or x itself, are kept.
    """
    gate = get_ste(ste).needs if need_grad_x else "nothing"
    if alpha_grad is None:
        return {"codes": ("nothing", True, False), "x": ("nothing", False, True)}.get(gate, (gate, False, False))
    if gate == "x" or alpha_grad == "chain":
        return "nothing", False, True
    if alpha_grad != "exact":
        return "state", gate == "codes", False
    if gate == "codes":
        return "nothing", True, False
    # Under ceil and hwgq T[1] = 0, so that x > 0 is c > 0 and the codes say it.
    mask = "nothing" if gate == "positive" and rounding != "nearest" else gate
    return mask, True, False


def check_inplace(ste: str, rounding: str, alpha_grad: str | None, need_grad_x: bool = True) -> None:
    """A ValueError where x must not be written over, as the backward keeps it."""
    if kept(ste, rounding, alpha_grad, need_grad_x)[2]:
        because = f"alpha_grad={alpha_grad!r}" if alpha_grad == "chain" else f"ste={ste!r}"
        raise ValueError(f"inplace=True would write over x, which the backward needs for {because}; use inplace=False")
