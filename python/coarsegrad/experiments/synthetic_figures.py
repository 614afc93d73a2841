"""The figures of `python -m coarsegrad synthetic`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import replacing
from .synthetic_summary import reached


def draw(results: list[dict], hidden: int, angle: float, folder: Path) -> list[Path]:
    """Draw iterations against neurons (at `angle`) and angle (at `hidden`), and the loss there. Returns the paths."""
    bits = list(dict.fromkeys(result["setting"]["bits"] for result in results))
    figures = {
        "neurons.png": _panels(bits, results, _against("hidden", {"angle": angle}), "hidden neurons",
                               f"Iterations to zero loss, {angle:g} degrees between the subspaces"),
        "angles.png": _panels(bits, results, _against("angle", {"hidden": hidden}), "degrees between the subspaces",
                              f"Iterations to zero loss, {hidden} hidden neurons"),
        "loss.png": _panels(bits, results, _losses(hidden, angle), "iteration",
                            f"Mean loss over the seeds, {hidden} hidden neurons, {angle:g} degrees"),
    }  # fmt: skip
    for name, figure in figures.items():
        with replacing(folder / name) as file:
            figure.savefig(file, format="png", dpi=110)
    return [folder / name for name in figures]


Drawing = Callable[[Axes, str, list[dict], dict], None]


def _panels(bits: list[int], results: list[dict], drawing: Drawing, xlabel: str, title: str) -> Figure:
    """A panel per number of bits, with a line per STE."""
    figure = Figure(figsize=(max(7.5, 3.2 * len(bits)), 3.6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(bits), sharey=True, squeeze=False)[0]
    stes = list(dict.fromkeys(result["setting"]["ste"] for result in results))
    for axes, b in zip(panels, bits):
        for number, ste in enumerate(stes):
            mine = [r for r in results if r["setting"]["ste"] == ste and r["setting"]["bits"] == b]
            drawing(axes, ste, mine, {"color": f"C{number}", "label": ste})
        axes.set(xlabel=xlabel, title=f"{b} bit{'s' if b > 1 else ''}")
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def _against(name: str, others: dict) -> Drawing:
    """Median, minimum and maximum iterations if all runs of a setting succeed; otherwise a cross at the top."""

    def drawing(axes: Axes, ste: str, results: list[dict], style: dict) -> None:
        mine = sorted((r for r in results if r["setting"].items() >= others.items()), key=lambda r: r["setting"][name])
        done = [(r["setting"][name], reached(r)) for r in mine if len(reached(r)) == len(r["runs"])]
        failed = [r["setting"][name] for r in mine if len(reached(r)) < len(r["runs"])]
        median = [statistics.median(iterations) for _, iterations in done]
        spread = [
            [m - iterations[0] for m, (_, iterations) in zip(median, done)],
            [iterations[-1] - m for m, (_, iterations) in zip(median, done)],
        ]
        axes.errorbar([x for x, _ in done], median, yerr=spread, marker="o", markersize=4, capsize=2, **style)
        # One row of crosses per STE.
        lift = 0.98 - 0.035 * int(style["color"][1:])
        axes.plot(failed, [lift] * len(failed), "x", color=style["color"], transform=axes.get_xaxis_transform())
        axes.set_yscale("log")
        if _is_first_column(axes):
            axes.set_ylabel("iterations (x: not all runs succeed)")

    return drawing


def _is_first_column(axes: Axes) -> bool:
    place = axes.get_subplotspec()
    return place is not None and place.is_first_col()


def _losses(hidden: int, angle: float) -> Drawing:
    def drawing(axes: Axes, ste: str, results: list[dict], style: dict) -> None:
        for result in results:
            if result["setting"]["hidden"] == hidden and result["setting"]["angle"] == angle:
                curve = result["curve"]
                # A zero loss is not on the log axis: the line ends there.
                points = [(max(1, i * curve["stride"]), loss) for i, loss in enumerate(curve["loss"]) if loss > 0]
                axes.plot(*zip(*points), **style)
        axes.set(xscale="log", yscale="log")
        if _is_first_column(axes):
            axes.set_ylabel("hinge loss")

    return drawing
