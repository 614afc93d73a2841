"""`python -m bench.numbers`: the tables of docs/numbers.md that are found by trying every 16-bit number."""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

import coarsegrad as cg
from coarsegrad.testing import backend_ids, serving

from .pages import DOCS, fill, markdown
from .timing import BenchError

PAGE = DOCS / "numbers.md"
HALF = (torch.float16, torch.bfloat16)
BITS = range(1, 9)
SAMPLES = 2**12

_DESCRIPTION = """
Tries every positive float16 and bfloat16 number as alpha, and as x: whose levels
collapse or overflow, where a rounded reciprocal gives the wrong code, the error of
every gradient that is not exact, and which codes are FP8 and FP4 numbers. Writes the
tables of docs/numbers.md.
"""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def positive(dtype: torch.dtype) -> Tensor:
    """All positive finite numbers of a 16-bit dtype."""
    x = torch.arange(1, 2**15).to(torch.int16).view(dtype)
    return x[x.isfinite()]


# ------------------------------------------------------------------------------------------ levels


def distinct_levels(alpha: Tensor, bits: int) -> Tensor:
    """How many levels each alpha has, of alpha's dtype; 0 where the top one overflows."""
    levels = (alpha.float()[:, None] * torch.arange(2**bits)).to(alpha.dtype)
    count = 1 + (levels[:, 1:] != levels[:, :-1]).sum(1)
    return torch.where(levels[:, -1].isfinite(), count, 0)


def _level_rows(dtype: torch.dtype) -> list[tuple[str, ...]]:
    alpha, rows = positive(dtype), []
    for bits in BITS:
        count = distinct_levels(alpha, bits)
        fits = count > 0
        collapsed = fits & (count < 2**bits)
        fewest = f"{int(count[fits].min())}" if collapsed.any() else ""
        share = f"{int(collapsed.sum()):,} of {int(fits.sum()):,}" if collapsed.any() else "none"
        rows.append((_name(dtype), f"{bits}", share, fewest, f"{alpha[fits].max().item():.7g}"))
    return rows


# -------------------------------------------------------------------------------------- reciprocals


def wrong_codes(alpha: Tensor, bits: int, dtype: torch.dtype, nudge: bool = False) -> tuple[Tensor, Tensor]:
    """Whether `ceil(x * inverse)`, inverse the rounded reciprocal of alpha, is too low just above L[k] and too high at
    L[k], [alpha, k], k = 0..q-1. alpha is of the wide dtype. nudge: the reciprocal is one ulp above."""
    top = 2**bits - 1
    inverse = 1 / alpha
    if nudge:
        inverse = inverse.nextafter(torch.full_like(inverse, torch.inf))
    k = torch.arange(top, dtype=alpha.dtype)
    at = (k * alpha[:, None]).to(dtype)
    above = at.nextafter(torch.full_like(at, torch.inf))

    def guess(x: Tensor) -> Tensor:
        return (x.to(alpha.dtype) * inverse[:, None]).ceil().clamp(1, top)

    return guess(above) < k + 1, guess(at) > k.clamp(min=1)


def simplest(dtype: torch.dtype, bits: int, high: bool) -> tuple[float, int] | None:
    """The alpha in [1, 2) of the fewest bits with a wrong code, and the lowest k where it is; up to 8 bits, or what a
    number of the dtype has."""
    for length in range(min(9, -round(math.log2(torch.finfo(dtype).eps)) + 1)):
        alpha = (1 + torch.arange(2**length).double() / 2**length).to(_wide(dtype))
        wrong = wrong_codes(alpha, bits, dtype)[high].nonzero()
        if len(wrong):
            return alpha[wrong[0, 0]].item(), int(wrong[0, 1])
    return None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reciprocal_rows() -> list[tuple[str, ...]]:
    rows = []
    for dtype in (torch.float64, torch.float32, *HALF):
        # Half dtypes: all of theirs; else as many, evenly spaced.
        count = round(1 / torch.finfo(dtype).eps) if dtype in HALF else SAMPLES
        alpha = (1 + torch.arange(count).double() / count + (0 if dtype in HALF else 2**-23)).to(_wide(dtype))
        for bits in (2, 4, 8):
            cells = []
            for high, wrong in enumerate(wrong_codes(alpha, bits, dtype)):
                found = simplest(dtype, bits, bool(high))
                where = "" if found is None else f", {found[0]:g} {'at' if high else 'above'} level {found[1]}"
                cells.append(f"{100 * wrong.any(1).double().mean():.1f}%{where}")
            nudged, _ = wrong_codes(alpha, bits, dtype, nudge=True)
            rows.append((_name(dtype), f"{bits}", *cells, f"{100 * nudged.any(1).double().mean():g}%"))
    return rows


# --------------------------------------------------------------------------------------- gradients

SETTINGS = tuple((bits, alpha) for bits in (2, 4) for alpha in (0.25, 0.3, 1.1))


def inexact() -> list[str]:
    """The estimators whose gradient is not a select."""
    return [name for name, row in cg.stes().items() if row.needs in ("x", "codes")]


def worst_ulps(ste: str, dtype: torch.dtype) -> float:
    """The largest error of dx in ulps of dtype, for dy = 1 and every positive bfloat16 or float16 number as x, on the
    backend in use. 0.5 is that of a correctly rounded result. float32: at every bfloat16 number."""
    row, worst = cg.stes()[ste], 0.0
    x = positive(torch.bfloat16 if dtype == torch.float32 else dtype).to(dtype)
    for bits, alpha in SETTINGS:
        step, top = torch.tensor([alpha]), 2**bits - 1
        leaf = x.clone().requires_grad_()
        y = cg.qrelu(leaf, step, bits, ste=ste)
        (dx,) = torch.autograd.grad(y.sum(), leaf)
        u = x.double() / step.double()
        if row.needs == "codes":
            u = (y.detach().double() / step.double()).round()
        right = row.at(u, top, "ceil")
        size = torch.finfo(dtype)
        # At the top itself one ulp decides whether a gradient passes at all.
        kept = ((u - top).abs() > 1e-6) & (right > size.smallest_normal)
        ulp = size.eps * 2 ** (torch.frexp(right).exponent.double() - 1)
        worst = max(worst, ((dx.double() - right).abs() / ulp)[kept].max().item())
    return worst


def _ulp_rows() -> list[tuple[str, ...]]:
    """The worst of all instruction sets is the native one."""
    rows = []
    for ste in inexact():
        found: dict[tuple[str, torch.dtype], float] = {}
        for backend in backend_ids():
            with serving(backend):
                for dtype in (*HALF, torch.float32):
                    key = backend.partition("-")[0], dtype
                    found[key] = max(found.get(key, 0.0), worst_ulps(ste, dtype))
        cells = [" / ".join(f"{found[name, dtype]:.3f}" for name in ("reference", "native") if (name, dtype) in found)
                 for dtype in (*HALF, torch.float32)]  # fmt: skip
        rows.append((f"`{ste}`", *cells))
    return rows


# --------------------------------------------------------------------------------------------- FP8

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the positive numbers of the 4-bit float


def carried(bits: int) -> tuple[int, int]:
    """How many codes are exactly E4M3 numbers, and E2M1 numbers."""
    codes = torch.arange(2**bits).float()
    return int((codes.to(torch.float8_e4m3fn).float() == codes).sum()), sum(code in E2M1 for code in codes.tolist())


def tables() -> dict[str, str]:
    """The tables of docs/numbers.md by name, but for those of bench.compiled."""
    return {
        "levels": markdown(
            ("dtype", "bits", "alphas with equal levels", "fewest levels", "largest alpha"),
            (row for dtype in HALF for row in _level_rows(dtype)),
        ),
        "reciprocals": markdown(
            ("dtype of x", "bits", "alphas with a code too low", "with a code too high", "too low if nudged"),
            _reciprocal_rows(),
        ),
        "ulps": markdown(("ste", *map(_name, HALF), "float32"), _ulp_rows()),
        "carriers": markdown(
            ("bits", "codes", "E4M3", "E2M1"), ((bits, 2**bits, *carried(bits)) for bits in BITS)
        ),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m bench.numbers", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    try:
        fill(PAGE, tables())
    except BenchError as error:
        raise SystemExit(f"bench.numbers: {error}") from error


if __name__ == "__main__":
    main()
