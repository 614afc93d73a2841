"""`python -m bench.compiled`: a staircase in plain torch, eager and compiled, pass after pass, and QReLU."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import coarsegrad as cg
from coarsegrad.experiments.files import replacing
from coarsegrad.nn import half_gaussian_alpha

from .pages import DOCS, fill, markdown
from .timing import BenchError, Row, write_csv

RESULTS = Path(__file__).parent / "results" / "compiled.csv"
FIGURE = RESULTS.with_suffix(".png")
PAGE = DOCS / "numbers.md"
BITS = (1, 2, 3, 4, 6, 8)
PASSES = 6

_DESCRIPTION = """
Applies a bfloat16 staircase to 2**20 normally distributed numbers, and again to
its own output, which is to change nothing: in plain torch, eager and compiled by
Inductor, without and with its option emulate_precision_casts, and QReLU compiled.
Writes the share of outputs that differ from the eager first pass and that each
pass moves, a figure of them, and the table of docs/numbers.md.
"""


def _staircase(bits: int) -> Callable[[Tensor], Tensor]:
    alpha, top = half_gaussian_alpha(bits), 2**bits - 1
    return lambda x: torch.clamp(torch.ceil(x / alpha), 0, top) * alpha


def _compiled(function: Callable[[Tensor], Tensor], casts: bool) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False, options={"emulate_precision_casts": casts})


def _forms(bits: int) -> dict[str, Callable[[Tensor], Tensor]]:
    plain = _staircase(bits)
    return {
        "eager": plain,
        "compiled": _compiled(plain, False),
        "compiled, emulate_precision_casts": _compiled(plain, True),
        "QReLU, compiled": _compiled(cg.QReLU(bits), False),
    }


def measured(bits: int, name: str, form: Callable[[Tensor], Tensor], x: Tensor) -> list[Row]:
    """A row for each pass."""
    alpha = half_gaussian_alpha(bits)
    exact = cg.QReLU(bits)(x) if name.startswith("QReLU") else _staircase(bits)(x)
    rows, y = [], x
    for i in range(PASSES):
        again = form(y)
        steps = (again.float() - y.float()).abs() / alpha
        rows.append({
            "bits": bits, "form": name, "pass": i + 1, "differ": f"{(again != exact).double().mean():.6f}",
            "moved": f"{(again != y).double().mean():.6f}" if i else "",
            "levels_moved": round(steps.max().item()) if i else "", "torch": torch.__version__.partition("+")[0],
        })  # fmt: skip
        y = again
    return rows


def load() -> list[dict[str, str]]:
    with open(RESULTS, newline="") as file:
        return list(csv.DictReader(file))


def _percent(share: str) -> str:
    return f"{100 * float(share):.2f}%" if float(share) else "0"


def tables(rows: list[dict[str, str]]) -> dict[str, str]:
    """The table of docs/numbers.md by its name."""
    found = {(row["bits"], row["form"], row["pass"]): row for row in rows}
    forms = list(dict.fromkeys(row["form"] for row in rows))
    lines = []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        first = (_percent(found[bits, form, "1"]["differ"]) for form in forms[1:])
        second = (
            f"{_percent(row['moved'])}{', ' + row['levels_moved'] if float(row['moved']) else ''}"
            for row in (found[bits, form, "2"] for form in forms)
        )
        lines.append((bits, *first, *second))
    header = ("bits", *(f"{form}: differ" for form in forms[1:]), *(f"{form}: moved again" for form in forms))
    return {"compiled": markdown(header, lines)}


def figure(rows: list[dict[str, str]]) -> Figure:
    """How many outputs are no longer those of the first pass, by pass."""
    drawn = Figure(figsize=(8, 3), layout="constrained")
    colors = ("#777777", "#D55E00", "#E69F00", "#0072B2")
    panels = drawn.subplots(1, 2, sharey=True)
    for bits, axes in zip(("4", "8"), panels):
        mine = [row for row in rows if row["bits"] == bits]
        for (number, form), color in zip(enumerate(dict.fromkeys(row["form"] for row in mine)), colors):
            shares = [100 * float(row["differ"]) for row in mine if row["form"] == form]
            width, style = 5 - number, "-" if number < 2 else "--"
            axes.plot(range(1, PASSES + 1), shares, style, color=color, marker="o", linewidth=width / 2, label=form)
        axes.set(title=f"{bits} bits", xlabel="pass")
        axes.grid(color="0.9")
    panels[0].set_ylabel("% other than one eager pass")
    panels[0].legend(frameon=False, fontsize=8)
    drawn.suptitle(f"A staircase applied to its own output, bfloat16, torch {rows[0]['torch']}", fontsize=10)
    return drawn


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compiled", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="only draw and write, from the results that are there")
    args = parser.parse_args(argv)
    try:
        if not args.page:
            x = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
            found: list[Row] = []
            for bits in BITS:
                for name, form in _forms(bits).items():
                    found += measured(bits, name, form, x)
            write_csv(found, RESULTS)
        rows = load()
        with replacing(FIGURE) as file:
            figure(rows).savefig(file, format="png", dpi=100)
        fill(PAGE, tables(rows))
    except (BenchError, OSError) as error:
        raise SystemExit(f"bench.compiled: {error}") from error


if __name__ == "__main__":
    main()
