"""The figures of `python -m bench.report`, drawn from the rows of the CSV files alone."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

import coarsegrad as cg
from coarsegrad.ste import BUILT_IN, ROUNDINGS

from .activations import IMPLEMENTATIONS
from .engines import ENGINES, OURS
from .kernels import COPIES
from .peers import PASSES
from .sweep import DTYPES, size_label
from .workloads import WORKLOADS

Row = dict[str, str]

# Okabe and Ito's palette, which colour-blind readers can distinguish.
_BLUE, _SKY, _GREEN = "#0072B2", "#56B4E9", "#009E73"
_ORANGE, _VERMILION, _PURPLE = "#E69F00", "#D55E00", "#CC79A7"
_GREY = "#777777"


# ---------------------------------------------------------------------- kernels compared with a copy

_KINDS = {"forward": (_BLUE, "o"), "backward": (_GREEN, "s"), "learned": (_ORANGE, "D"), "codes": (_PURPLE, "^")}


def _kind(kernel: str) -> str:
    return "learned" if "learned" in kernel else kernel.split(",")[0].split(" ")[0]


def _setting(row: Row) -> str:
    """What the times depend on, for a title."""
    return (
        f"{row['cpu' if row['device'] == 'cpu' else 'device']}, threads: {row['threads']}, {row['backend']}, "
        f"allocator: {row['allocator']}, {row['clock']} clock, torch {row['torch']}, {row['date'][:10]}"
    )


def roofline_figure(kernels: list[Row], peers: list[Row]) -> Figure:
    """ns per element against bytes moved per element; the line is a copy's speed. Peers: forward and backward."""
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in kernels)]
    size = max(int(row["size"]) for row in kernels)
    figure = Figure(figsize=(6 * len(dtypes), 5.5), layout="constrained")
    panels = figure.subplots(1, len(dtypes), squeeze=False)[0]
    for dtype, axes in zip(dtypes, panels):
        case = {"dtype": dtype, "size": str(size)}
        mine = {row["kernel"]: row for row in kernels if row.items() >= case.items()}
        copies = [float(mine[copy]["seconds_median"]) / float(mine[copy]["bytes_per_element"]) for copy in COPIES]
        per_byte = 1e9 * sum(copies) / len(copies) / size
        bytes_ = np.array([1.0, 40.0])
        axes.plot(bytes_, per_byte * bytes_, color="black", linewidth=1, label="a copy")
        for kind, (color, marker) in _KINDS.items():
            points = [
                (float(row["bytes_per_element"]), 1e9 * float(row["seconds_median"]) / size)
                for kernel, row in mine.items()
                if kernel not in COPIES and _kind(kernel) == kind
            ]
            axes.plot(*zip(*points), color=color, marker=marker, markersize=5, linestyle="", label=f"kernels: {kind}")
        passes = case | {"pass": PASSES[1]}
        moved, label_height = 4 * DTYPES[dtype].itemsize + 2 / 8, 0.0
        for row in sorted(peers, key=lambda row: float(row["seconds_median"])):
            if row.items() >= passes.items():
                ns = 1e9 * float(row["seconds_median"]) / size
                ours = row["implementation"].startswith("qrelu")
                axes.plot(moved, ns, color=_BLUE if ours else _VERMILION, marker="x", markersize=6)
                label_height = max(ns, 1.17 * label_height)  # no overlap
                label = IMPLEMENTATIONS[row["implementation"]].label
                axes.annotate(label, (1.1 * moved, label_height), va="center", fontsize=8)
        axes.set(xscale="log", yscale="log", xlim=bytes_, xlabel="bytes moved per element", ylabel="ns per element")
        axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{dtype}, {size_label(size)} elements", fontsize=10)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        "Kernels, and forward + backward of QReLU and others (x), compared with a copy\n" + _setting(kernels[0]),
        fontsize=10,
    )
    return figure


# ------------------------------------------------------------------------------ QReLU and alternatives


def peers_figure(rows: list[Row]) -> Figure:
    """The speed relative to nn.ReLU, forward and backward; one panel per dtype and size."""
    rows = [row for row in rows if row["pass"] == PASSES[1]]
    # Sizes; those with the default allocator last.
    places = sorted({(row["allocator"] == "default", int(row["size"]), row["allocator"]) for row in rows})
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    names = [name for name in IMPLEMENTATIONS if any(row["implementation"] == name for row in rows)]
    figure = Figure(figsize=(1.6 + 2.2 * len(places), 0.9 + 0.27 * len(names) * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(places), sharex=True, sharey=True, squeeze=False)
    for (dtype, (is_default, size, allocator)), axes in zip(itertools.product(dtypes, places), panels.flat):
        case = {"dtype": dtype, "size": str(size), "allocator": allocator}
        axes.axvline(1, color="black", linewidth=1, zorder=3)
        for row in rows:
            if row.items() >= case.items():
                color = _BLUE if row["implementation"].startswith("qrelu") else _GREY
                _speed_bar(axes, row, names.index(row["implementation"]), "speed_over_relu", color)
        axes.set_title(f"{dtype}, {size_label(size)}" + (", default malloc" if is_default else ""), fontsize=9)
        axes.set_yticks(range(len(names)), [IMPLEMENTATIONS[name].label for name in names], fontsize=8)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    axes = panels[0, 0]
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([0.01, 0.1, 1, 10]))
    axes.xaxis.set_major_formatter(_as_factor)
    figure.suptitle(
        "Speed relative to nn.ReLU (black line), forward and backward: medians, and 20% to 80% of the rounds\n"
        + _setting(rows[0]),
        fontsize=10,
    )
    return figure


def _speed_bar(axes: Axes, row: Row, place: int, column: str, color: str) -> None:
    median, low, high = (float(row[f"{column}{q}"]) for q in ("", "_q20", "_q80"))
    axes.barh(place, median, 0.7, color=color)
    axes.plot([low, high], [place, place], color="black", linewidth=1.2)


# ------------------------------------------------------------------------------ inference with integers


def inference_figure(rows: list[Row]) -> Figure:
    """The speed relative to torch in float32; one panel per network and batch."""
    cases = list(dict.fromkeys((row["workload"], row["batch"]) for row in rows))
    names = [name for name in ENGINES if any(row["engine"] == name for row in rows)]
    columns = min(4, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(1.8 + 2.3 * columns, 0.8 + (0.4 + 0.17 * len(names)) * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(cases) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, len(cases) - columns) : len(cases)]:
        axes.tick_params(labelbottom=True)  # the lowest of each column
    for (workload, batch), axes in zip(cases, panels.flat):
        axes.axvline(1, color="black", linewidth=1, zorder=3)
        for row in rows:
            if (row["workload"], row["batch"]) == (workload, batch):
                name = row["engine"]
                _speed_bar(axes, row, names.index(name), "speed_over_float32", _BLUE if name in OURS else _GREY)
        axes.set_title(f"{WORKLOADS[workload].label}, batch {batch}", fontsize=8)
        axes.set_yticks(range(len(names)), [ENGINES[name].label for name in names], fontsize=7)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    axes = panels[0, 0]
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([1 / 64, 1 / 16, 1 / 4, 1, 4, 16, 64]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_as_factor)
    figure.suptitle(
        "Speed relative to torch in float32 (black line): medians, and 20% to 80% of the rounds\n" + _setting(rows[0]),
        fontsize=9,
    )
    return figure


def _as_factor(speed: float, _: object) -> str:
    return f"{speed:g}x" if speed >= 1 else f"1/{1 / speed:g}"


# --------------------------------------------------------------------------------- training steps


def training_figure(rows: list[Row]) -> Figure:
    """The time relative to nn.ReLU in the same mode, of steps and of inference; one panel per network."""
    cases = list(dict.fromkeys((row["network"], row["dtype"]) for row in rows))
    bars = list(dict.fromkeys((row["pass"], row["mode"], row["activation"]) for row in rows))
    bars = sorted((bar for bar in bars if bar[2] != "relu"), key=lambda bar: bar[:2], reverse=True)
    figure = Figure(figsize=(2.5 + 2.1 * len(cases), 3.2), layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for (network, dtype), axes in zip(cases, panels):
        ratios = {
            (row["pass"], row["mode"], row["activation"]): float(row["time_over_relu_median"])
            for row in rows
            if (row["network"], row["dtype"]) == (network, dtype)
        }
        colors = [_GREY if activation == "none" else _BLUE for *_, activation in bars]
        axes.barh(range(len(bars)), [ratios.get(bar, math.nan) for bar in bars], 0.7, color=colors)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_yticks(range(len(bars)), [", ".join(bar) for bar in bars] if axes is panels[0] else [], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0.5, 1.5)
        axes.set_title(f"{network}, {dtype}", fontsize=9)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    figure.supxlabel("time over that with nn.ReLU, same mode", fontsize=8)
    figure.suptitle(_setting(rows[0]), fontsize=8)
    return figure


# ------------------------------------------------------------------- the staircase and its gradients

_BITS = 2
_TOP_CODE = 2**_BITS - 1

# Drawn in this order, each narrower than the one below, so that all are visible where they coincide.
_STAIRS = {
    "nearest": {"color": _ORANGE, "linewidth": 8},
    "hwgq": {"color": _SKY, "linewidth": 4.5},
    "ceil": {"color": "black", "linewidth": 1.6},
}


def staircase_figure() -> Figure:
    """The staircase at 2 bits for every rounding, and g'(u) of every compiled STE, as computed by coarsegrad."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    forward, backward = figure.subfigures(1, 2, width_ratios=(1, 1.2))
    _draw_staircases(forward)
    _draw_gradients(backward)
    return figure


def _pieces(u: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(u, values) with a gap at every jump, so that no line is drawn across it."""
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
    table = [cg.stes()[name] for name in BUILT_IN]
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


def memory_figure(rows: list[Row]) -> Figure:
    """Bytes saved, peak memory and time of a step for each activation; one row of panels per network."""
    cases = list(dict.fromkeys((row["network"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(10, 0.9 + 2.1 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), 2, squeeze=False)
    for (network, dtype), (sizes, times) in zip(cases, panels):
        mine = [row for row in rows if (row["network"], row["dtype"]) == (network, dtype)]
        places, names = range(len(mine)), [row["activation"] for row in mine]
        for number, (column, color) in enumerate(_MEMORY_COLORS.items()):
            lengths = [int(row[column] or 0) / 2**20 for row in mine]
            sizes.barh(
                [i + 0.4 * number - 0.2 for i in places],
                lengths,
                0.4,
                color=color,
                label={"kept_bytes": "saved", "peak_bytes": "peak"}[column],
            )
        sizes.set(title=f"{network}, {dtype}: MiB", yticks=places, yticklabels=names)
        seconds = [1e3 * float(row["seconds_median"]) for row in mine]
        times.barh(places, seconds, 0.6, color=_GREEN)
        times.set(title="ms a step", yticks=places, yticklabels=[])
        for axes in (sizes, times):
            axes.invert_yaxis()
            axes.grid(axis="x", color="0.9")
            axes.set_axisbelow(True)
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        "Saved for backward, peak memory of a step (no saved bar: hidden by a checkpoint), and time\n"
        + _setting(rows[0]),
        fontsize=10,
    )
    return figure
