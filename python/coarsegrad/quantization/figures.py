"""Figures of `calibrate` and `stats`: the inputs of each layer against its staircase, and numbers beside them."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .inputs import InputHistogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INPUTS, _SATURATED, _STAIRS = "#7a9cc6", "#e07b39", "0.35"
_MOST_STAIRS = 15  # of which lines can still be told apart
_SCALE = "x / top level        dots: levels, lines: thresholds, heights: square root of counts"
_BAR = 0.3  # inches, at most


@dataclass(frozen=True)
class Column:
    """Numbers beside the inputs, one for each layer; NaN draws no bar. form: as for `format`. scale: what the longest
    bar stands for, or more if a number exceeds it."""

    label: str
    values: Sequence[float]
    color: str
    form: str
    scale: float

    @classmethod
    def zero(cls, label: str, values: Sequence[float]) -> Column:
        return cls(label, values, _INPUTS, ".1%", 1.0)

    @classmethod
    def saturated(cls, label: str, values: Sequence[float]) -> Column:
        return cls(label, values, _SATURATED, ".1%", 0.1)


def chosen(names: Sequence[str], layers: Iterable[str] | None) -> list[int]:
    """The places in names of the layers that a user wants drawn."""
    if layers is None:
        return list(range(len(names)))
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(
            f"layers must be names of layers, such as [{names[0] if names else ''!r}],"
            f" got the {type(layers).__name__} {layers!r}"
        )
    wanted = list(layers)
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(f"layers must be of {', '.join(names)}, got {', '.join(map(str, unknown))}")
    return [names.index(name) for name in wanted]


def draw(
    title: str,
    names: Sequence[str],
    alphas: Sequence[str],
    inputs: Sequence[InputHistogram | None],
    columns: Sequence[Column],
    path: str | os.PathLike[str] | None,
) -> Figure:
    """A row for each layer, at most as high as a hand: the histogram of its inputs, then a bar of each column.

    inputs: None for a layer that nothing, or a batch of no samples, reached.
    """
    figure_class = _figure_class()
    count = len(names)
    row = min(1.3, max(0.24, 5 / max(count, 1)))  # inches
    size = 9 if row > 0.5 else 7
    labels = [f"{name}\nalpha {alpha}" for name, alpha in zip(names, alphas)] if row > 0.5 else names
    figure = figure_class(figsize=(11, 1.3 + row * max(count, 1)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    ridges, *bars = figure.subplots(
        1, 1 + len(columns), sharey=True, squeeze=False, width_ratios=[4, *(1 for _ in columns)]
    )[0]
    for place, found in enumerate(inputs):
        _draw_inputs(ridges, place, found, size)
    ridges.set(xlim=(0, 2), ylim=(max(count, 1) - 0.45, -0.6))
    ridges.set_yticks(range(count), labels, fontsize=size, parse_math=False)  # a name may have a $
    ridges.tick_params(axis="y", length=0)
    ridges.axvline(1, color=_STAIRS, linewidth=0.8, zorder=0)
    ridges.set_xlabel(_SCALE)
    for axes, column in zip(bars, columns):
        _draw_bars(axes, column, min(0.6, _BAR / row), size)
    for axes in (ridges, *bars):
        axes.spines[["top", "right", "left"]].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_inputs(axes: Axes, place: int, found: InputHistogram | None, size: int) -> None:
    """The histogram stands on the line y = place + 0.4, and is at most 0.85 high."""
    base, height = place + 0.4, 0.85
    axes.axhline(base, color="0.85", linewidth=0.6, zorder=0)
    if found is None or not (sum(found.counts) or found.beyond):
        said = "no input reached it" if found is None else "no positive input"
        axes.text(0.02, place + 0.2, said, fontsize=size, color="0.4")
        return
    highest = max(found.counts) or 1
    tops = [base - height * math.sqrt(n / highest) for n in found.counts]
    few = len(found.levels) <= _MOST_STAIRS
    middle = found.edges.index(1.0)
    for part, color in ((slice(middle), _INPUTS), (slice(middle, None), _SATURATED)):
        edges = found.edges[part.start or 0 : (part.stop or len(found.counts)) + 1]
        axes.stairs(tops[part], edges, baseline=base, fill=True, color=color, linewidth=0, zorder=1)
    if few:
        axes.vlines(found.thresholds, base - height, base, color=_STAIRS, linewidth=0.5, alpha=0.7, zorder=2)
        axes.plot(found.levels, [base] * len(found.levels), ".", color="black", markersize=size - 5, zorder=3)
    total = sum(found.counts) + found.beyond
    if found.beyond / total >= 0.0005:
        said = f"{found.beyond / total:.1%} beyond"
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
        axes.text(1.99, place + 0.1, said, fontsize=size - 1, ha="right", bbox=box, zorder=3)


def _draw_bars(axes: Axes, column: Column, thickness: float, size: int) -> None:
    drawn = [(place, value) for place, value in enumerate(column.values) if math.isfinite(value)]
    axes.barh([place for place, _ in drawn], [value for _, value in drawn], thickness, color=column.color)
    highest = max([column.scale, *(value for _, value in drawn)])
    lowest = min([0, *(value for _, value in drawn)])
    for place, value in drawn:
        axes.text(max(value, 0) + 0.03 * highest, place, format(value, column.form), va="center", fontsize=size - 1)
    axes.set_xlim(lowest, 1.5 * highest)  # room for the numbers
    axes.set_xticks([])
    axes.set_xlabel(column.label)
    axes.tick_params(axis="y", length=0)


def _figure_class() -> Any:
    """A Figure that notebooks show by itself, without pyplot and its list of open figures."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib, which coarsegrad[experiments] has") from error

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=100)
            return file.getvalue()

    return ShownFigure
