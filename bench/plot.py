"""`python -m bench.plot`: the figures; of the benchmarks from their CSV files alone."""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

import coarsegrad as cg
from coarsegrad.experiments.files import replacing
from coarsegrad.ste import ROUNDINGS

from . import memory
from .kernels import DTYPES, IMPLEMENTATIONS, PASSES, RESULTS, size_label

STAIRCASE = Path(__file__).parent.parent / "docs" / "staircase.png"

# Okabe and Ito's palette: told apart by colour-blind readers too.
_BLUE, _SKY, _GREEN = "#0072B2", "#56B4E9", "#009E73"
_ORANGE, _VERMILION, _PURPLE = "#E69F00", "#D55E00", "#CC79A7"
_GREY = "#777777"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)
    print(f"Written: {path}")


# ------------------------------------------------------------------------------ speed of the kernels

_MARKS = {
    "qrelu": (_BLUE, "o", "-"),
    "qrelu_inplace": (_SKY, "D", "-"),
    "relu_inplace": (_GREY, "s", "--"),
    "compile": (_ORANGE, "^", "--"),
    "eager": (_VERMILION, "v", "--"),
}


Row = dict[str, str]


def _speed(row: Row, quantile: str) -> float:
    return float(row[f"speed_over_relu_{quantile}"])


def kernels_figure(source: Path) -> Figure:
    """How many times as fast as nn.ReLU, by size; a panel for each dtype and pass."""
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    # The places on the x axis: sizes, those of the default allocator after the others.
    places = sorted({(row["allocator"] == "default", int(row["size"]), row["allocator"]) for row in rows})
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    names = [name for name in _MARKS if any(row["implementation"] == name for row in rows)]
    figure = Figure(figsize=(10, 1.3 + 2.5 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(PASSES), sharex=True, sharey=True, squeeze=False)
    for (dtype, passes), axes in zip(itertools.product(dtypes, PASSES), panels.flat):
        axes.axhline(1, color="black", linewidth=1, zorder=1)
        for number, name in enumerate(names):
            case = {"dtype": dtype, "pass": passes, "implementation": name}
            mine = [row for row in rows if row.items() >= case.items()]
            _draw_speeds(axes, mine, name, places, 0.06 * (number - (len(names) - 1) / 2))
        axes.set_title(f"{passes}, {dtype}", fontsize=10)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    _label_axes(panels, places, rows)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels) or 1, frameon=False, fontsize=9
    )
    facts = rows[0]
    figure.suptitle(
        "Speed over nn.ReLU (black line): median and 20% to 80% of the rounds\n"
        f"{facts['cpu' if facts['device'] == 'cpu' else 'device']}, threads: {facts['threads']}, {facts['backend']}, "
        f"allocator: {facts['allocator']}, "
        f"{facts['clock']} clock, torch {facts['torch']}, {facts['date'][:10]}",
        fontsize=10,
    )
    return figure


def _draw_speeds(axes: Axes, rows: list[Row], name: str, places: list[tuple], dodge: float) -> None:
    """One implementation in one panel; points of the same allocator are joined."""
    color, marker, line = _MARKS[name]
    label = IMPLEMENTATIONS[name].label
    place = {(allocator, str(size)): number for number, (_, size, allocator) in enumerate(places)}
    for allocator in dict.fromkeys(row["allocator"] for row in rows):
        mine = [row for row in rows if row["allocator"] == allocator]
        median = [_speed(row, "median") for row in mine]
        axes.errorbar(
            [place[allocator, row["size"]] + dodge for row in mine],
            median,
            yerr=[
                [m - _speed(row, "q20") for m, row in zip(median, mine)],
                [_speed(row, "q80") - m for m, row in zip(median, mine)],
            ],
            color=color, marker=marker, linestyle=line, linewidth=1.2, markersize=5, capsize=2, label=label,
        )
        label = None  # once in the legend


def _label_axes(panels: np.ndarray, places: list[tuple], rows: list[Row]) -> None:
    """A logarithmic axis from the slowest to the fastest, 1x and 2x always on it; sizes below."""
    axes = panels[0, 0]
    low = math.floor(math.log2(min(1.0, *(_speed(row, "q20") for row in rows))))
    high = math.ceil(math.log2(max(2.0, *(_speed(row, "q80") for row in rows))))
    axes.set_yscale("log", base=2)
    axes.set_ylim(2.0**low / 1.1, 2.0**high * 1.1)
    axes.yaxis.set_major_locator(FixedLocator([2.0**i for i in range(low, high + 1)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda speed, _: f"{speed:g}x" if speed >= 1 else f"1/{1 / speed:g}x")
    labels = []
    for is_default, size, _ in places:
        exponent = size_label(size).partition("^")[2]
        labels.append(f"$2^{{{exponent}}}$" if exponent else str(size))
        if is_default and rows[0]["allocator"] != "default":
            labels[-1] += "\ndefault malloc"
    for axes in panels[-1]:
        axes.set_xticks(range(len(places)), labels, fontsize=9)
        axes.set_xlabel("elements")


# ------------------------------------------------------------------- the staircase and its gradients

_BITS = 2
_TOP_CODE = 2**_BITS - 1

# Drawn in this order, each narrower than the one below: where they coincide all are seen.
_STAIRS = {
    "nearest": {"color": _ORANGE, "linewidth": 8},
    "hwgq": {"color": _SKY, "linewidth": 4.5},
    "ceil": {"color": "black", "linewidth": 1.6},
}


def staircase_figure() -> Figure:
    """The staircase at 2 bits under every rounding, and g'(u) of every STE, as coarsegrad computes them."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    forward, backward = figure.subfigures(1, 2, width_ratios=(1, 1.2))
    _draw_staircases(forward)
    _draw_gradients(backward)
    return figure


def _pieces(u: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(u, values) with a gap at every jump, so that no line is drawn where there is no value."""
    jumps = ((values[1:] - values[:-1]).abs() > 0.1).nonzero()[:, 0] + 1
    gap = torch.full_like(u[:1], torch.nan)
    with_gaps = ([t for piece in all_.tensor_split(jumps) for t in (piece, gap)] for all_ in (u, values))
    return tuple(map(torch.cat, with_gaps))


def _draw_staircases(figure: SubFigure) -> None:
    axes = figure.subplots()
    u = torch.linspace(-1.1, _TOP_CODE + 1.3, 4801, dtype=torch.float64)
    axes.plot(u, u.clamp(min=0), color="0.6", linewidth=1, linestyle=":", label="nn.ReLU")
    for rounding in sorted(ROUNDINGS, key=list(_STAIRS).index):
        y = cg.qrelu(u, 1.0, _BITS, rounding=rounding)
        axes.plot(*_pieces(u, y), **_STAIRS[rounding], solid_capstyle="butt", label=rounding)
    axes.set_title(f"The staircase: forward, {_BITS} bits", fontsize=11)
    axes.set(xlabel=r"$u = x\,/\,\alpha$", ylabel=r"$y\,/\,\alpha$")
    axes.set(xlim=(u[0], u[-1]), ylim=(-0.3, _TOP_CODE + 0.6))
    axes.set_xticks(range(-1, _TOP_CODE + 2))
    axes.set_yticks(range(_TOP_CODE + 1))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], title="rounding", loc="upper left", frameon=False)


def _draw_gradients(figure: SubFigure) -> None:
    table = [ste for ste in cg.stes().values() if ste.needs != "codes"]
    panels = figure.subplots(len(table), 1, sharex=True, sharey=True)
    u = torch.linspace(-1.5, 3 * _TOP_CODE, 4201, dtype=torch.float64)
    colors = itertools.cycle((_VERMILION, _GREEN, _BLUE, _PURPLE, _ORANGE))
    for axes, ste, color in zip(panels, table, colors):
        g = ste.gprime(u, _TOP_CODE)
        axes.fill_between(u, g, color=color, alpha=0.2, linewidth=0)
        axes.plot(*_pieces(u, g), color=color, linewidth=2.2, solid_capstyle="butt")
        axes.axvline(0, color="0.8", linewidth=1, zorder=0)
        axes.axvline(_TOP_CODE, color="0.8", linewidth=1, linestyle="--", zorder=0)
        axes.text(1.02, 0.62, ste.name, transform=axes.transAxes, va="center", weight="bold")
        axes.text(1.02, 0.25, ste.formula, transform=axes.transAxes, va="center", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(r"The coarse gradients $g'(u)$: backward", fontsize=11)
    panels[0].set(xlim=(u[0], u[-1]), ylim=(0, 1.15), yticks=(0, 1))
    panels[-1].set_xticks([0, _TOP_CODE, 2 * _TOP_CODE, 3 * _TOP_CODE], ["0", "q", "2q", "3q"])
    panels[-1].set_xlabel(rf"$u = x\,/\,\alpha$;  $q = 2^{{bits}} - 1$, here {_TOP_CODE}")


# -------------------------------------------------------------------------------------------- memory

_MEMORY_COLORS = {"kept_bytes": _BLUE, "peak_bytes": _SKY}


def memory_figure(source: Path) -> Figure:
    """Bytes kept, peak memory, and the time of a step, for each activation; a row of panels for each network."""
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    cases = list(dict.fromkeys((row["network"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(10, 0.9 + 2.1 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), 2, squeeze=False)
    for (network, dtype), (sizes, times) in zip(cases, panels):
        mine = [row for row in rows if (row["network"], row["dtype"]) == (network, dtype)]
        places, names = range(len(mine)), [row["activation"] for row in mine]
        for number, (column, color) in enumerate(_MEMORY_COLORS.items()):
            lengths = [int(row[column] or 0) / 2**20 for row in mine]
            sizes.barh([i + 0.4 * number - 0.2 for i in places], lengths, 0.4, color=color, label=column[:4])
        sizes.set(title=f"{network}, {dtype}: MiB", yticks=places, yticklabels=names)
        seconds = [1e3 * float(row["seconds_median"]) for row in mine]
        times.barh(places, seconds, 0.6, color=_GREEN)
        times.set(title="ms a step", yticks=places, yticklabels=[])
        for axes in (sizes, times):
            axes.invert_yaxis()
            axes.grid(axis="x", color="0.9")
            axes.set_axisbelow(True)
    panels[0, 0].legend(frameon=False, fontsize=8)
    facts = rows[0]
    figure.suptitle(
        "Kept for the backward, peak memory of a step (no kept bar: hidden by a checkpoint), and time\n"
        f"{facts['cpu']}, threads: {facts['threads']}, {facts['backend']}, torch {facts['torch']}, "
        f"{facts['date'][:10]}",
        fontsize=10,
    )
    return figure


# ------------------------------------------------------------------------------------ the command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plot",
        description="Draws what bench.kernels or bench.memory measured, from its CSV; or the README's picture.",
    )
    add = parser.add_argument
    add("--memory", action="store_true", help="draw what bench.memory measured")
    add("--staircase", action="store_true", help="draw the staircase and its coarse gradients, and no times")
    add("--csv", type=Path, metavar="CSV",
        help=f"the results (default {os.path.relpath(RESULTS)}, or {os.path.relpath(memory.RESULTS)})")
    add("--out", type=Path, metavar="PNG",
        help=f"the picture (default: the CSV's name with .png, or {os.path.relpath(STAIRCASE)})")
    args = parser.parse_args()
    try:
        if args.staircase:
            _save(staircase_figure(), args.out or STAIRCASE)
        else:
            source = args.csv or (memory.RESULTS if args.memory else RESULTS)
            figure = memory_figure(source) if args.memory else kernels_figure(source)
            _save(figure, args.out or source.with_suffix(".png"))
    except FileNotFoundError as error:
        command = "bench.memory" if args.memory else "bench.kernels"
        raise SystemExit(f"bench.plot: {error}; `python -m {command}` writes it") from error


if __name__ == "__main__":
    main()
