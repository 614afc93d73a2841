"""The figures of a table of runs: test error by epoch, and the features of the last layer in two dimensions."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import replacing
from .table_runs import Run, Table, float_folder

_WIDTH = 2.6  # of a panel, in inches


def figure_paths(folder: Path, schedule: str) -> dict[str, Path]:
    """Title -> path of the figures of a schedule, which exist once a run is finished."""
    return {
        "Test error by epoch": folder / f"accuracy-{schedule}.png",
        "Inputs of the last layer on two principal components": folder / f"features-{schedule}.png",
    }


def draw(table: Table, results: list[tuple[Run, dict]], folder: Path) -> list[Path]:
    """Draw two figures for each schedule with finished runs, of the runs with fixed alpha. Returns their paths."""
    paths = []
    for name, schedule in table.schedules.items():
        mine = [(run, result) for run, result in results if run.schedule == name and run.learn_alpha is None]
        if not mine:
            continue
        figures = [_accuracy(mine, f"{table.title}, {schedule.epochs} epochs")]
        shown = [(run, result) for run, result in mine if run.seed == 0 and result["features"]]
        float_results = folder / float_folder(schedule, 0) / "results.json"
        if shown and float_results.exists():
            figures.append(_features(json.loads(float_results.read_text()), shown, table.title))
        for path, figure in zip(figure_paths(folder, name).values(), figures):
            with replacing(path) as file:
                figure.savefig(file, format="png", dpi=110)
            paths.append(path)
    return paths


def _accuracy(results: list[tuple[Run, dict]], title: str) -> Figure:
    """Test error on a log scale, with a panel per number of bits and a line per run."""
    bits = sorted({run.bits for run, _ in results})
    variants = list(dict.fromkeys(run.variant for run, _ in results))
    figure = Figure(figsize=(max(7.5, 4 * len(bits)), 4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(bits), sharey=True, squeeze=False)[0]
    lines = {}
    for axes, b in zip(panels, bits):
        for run, result in results:
            if run.bits == b:
                x = [row["epoch"] for row in result["history"]]
                y = [100 * (1 - row["test_accuracy"]) for row in result["history"]]
                (lines[run.variant],) = axes.plot(x, y, color=f"C{variants.index(run.variant)}", linewidth=1)
        axes.set(xlabel="epoch", yscale="log", title=f"{b} bit{'s' if b > 1 else ''}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.2g}")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("test error, 100 - accuracy (%)")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _features(float_result: dict, results: list[tuple[Run, dict]], title: str) -> Figure:
    """A row for each number of bits: the float network and each run."""
    bits = sorted({run.bits for run, _ in results})
    rows = [[("nn.ReLU", float_result)] + [(run.variant, r) for run, r in results if run.bits == b] for b in bits]
    columns = max(map(len, rows))
    figure = Figure(figsize=(_WIDTH * columns, 0.6 + _WIDTH * len(rows)), layout="constrained")
    figure.suptitle(f"{title}: inputs of the last layer,\non the first two principal components", fontsize=10)
    for panels, b, row in zip(figure.subplots(len(rows), columns, squeeze=False), bits, rows):
        for axes in panels:
            axes.set_axis_off()
        for number, (axes, (name, result)) in enumerate(zip(panels, row)):
            _scatter(axes, result["features"])
            bits_text = f", {b} bit{'s' if b > 1 else ''}" if number else ""
            axes.set_title(f"{name}{bits_text}\n{result['features']['variance']:.0%} of the variance", fontsize=8)
    return figure


def _scatter(axes: Axes, features: dict) -> None:
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    x, y = zip(*features["points"])
    axes.scatter(x, y, c=features["classes"], cmap="tab10", vmin=0, vmax=9, s=4)
