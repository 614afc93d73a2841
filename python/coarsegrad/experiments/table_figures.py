"""The figures of a table of runs: test error by epoch, and the features of the last layer in two dimensions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import replacing
from .table_runs import Run, Table, float_folder

_WIDTH = 2.6  # of a panel, in inches


def figure_paths(folder: Path, schedule: str) -> dict[str, Path]:
    """Title -> path of the figures of a schedule, or of the "grid", which exist once a run is finished."""
    if schedule == "grid":
        return {"Test error by bits, rounding and coarse gradient": folder / "grid.png"}
    return {
        "Test error by epoch": folder / f"accuracy-{schedule}.png",
        "Inputs of the last layer on two principal components": folder / f"features-{schedule}.png",
        "Test error by bits of the weights": folder / f"weights-{schedule}.png",
    }


def draw(table: Table, results: list[tuple[Run, dict]], folder: Path) -> list[Path]:
    """Draw the figures of each schedule, of its finished runs with fixed alpha, and of the grid. Returns the paths."""
    paths = []

    def save(figure: Figure, path: Path) -> None:
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=110)
        paths.append(path)

    for name, schedule in table.schedules.items():
        planned = {run for run in table.runs if run.schedule == name and run.learn_alpha is None}
        fixed = [(run, result) for run, result in results if run in planned]
        mine = [(run, result) for run, result in fixed if run.weight_bits is None]
        figures: list[Figure | None] = [None, None, None]
        title = f"{table.title}, {schedule.epochs} epochs"
        if mine:
            figures[0] = _accuracy(mine, title)
        shown = [(run, result) for run, result in mine if run.seed == 0 and result["features"]]
        float_results = folder / float_folder(schedule, 0) / "results.json"
        if shown and float_results.exists():
            figures[1] = _features(json.loads(float_results.read_text()), shown, table.title)
        if len(mine) < len(fixed):
            figures[2] = _weights(fixed, title)
        for path, figure in zip(figure_paths(folder, name).values(), figures):
            if figure is not None:
                save(figure, path)
    if grid := [(run, result) for run, result in results if run in table.grid and not result["diverged"]]:
        save(_grid(table, grid), *figure_paths(folder, "grid").values())
    return paths


def _accuracy(results: list[tuple[Run, dict]], title: str) -> Figure:
    """Test error on a log scale, with a panel per number of bits and a line per run."""
    bits = sorted({run.bits for run, _ in results})
    variants = list(dict.fromkeys(run.variant for run, _ in results))
    figure, panels = _error_panels(title, [f"{b} bit{'s' if b > 1 else ''}" for b in bits], "epoch")
    lines = {}
    for axes, b in zip(panels, bits):
        for run, result in results:
            if run.bits == b:
                x = [row["epoch"] for row in result["history"]]
                y = [100 * (1 - row["test_accuracy"]) for row in result["history"]]
                (lines[run.variant],) = axes.plot(x, y, color=f"C{variants.index(run.variant)}", linewidth=1)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _error_panels(title: str, titles: list[str], xlabel: str) -> tuple[Figure, list[Axes]]:
    """Panels side by side that share an axis of test errors, on a log scale."""
    figure = Figure(figsize=(max(7.5, 4 * len(titles)), 4), layout="constrained")
    figure.suptitle(title)
    panels = list(figure.subplots(1, len(titles), sharey=True, squeeze=False)[0])
    for axes, name in zip(panels, titles):
        axes.set(xlabel=xlabel, yscale="log", title=name)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.2g}")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("test error, 100 - accuracy (%)")
    return figure, panels


def _weights(results: list[tuple[Run, dict]], title: str) -> Figure:
    """Test error after the last epoch by bits of the weights, mean and range over the seeds: a panel per number of bits
    of the activations, with a line for each kind of step."""
    trained = [run for run, _ in results if run.weight_bits is not None]
    bits, stes = sorted({run.bits for run in trained}), {run.ste for run in trained}
    # Plain and blended steps at float weights are one.
    lines = [(ste, rho) for ste in sorted(stes) for rho in sorted({run.rho or 0.0 for run in trained})]
    widths = [32, *sorted({run.weight_bits or 32 for run in trained}, reverse=True)]
    titles = [f"activations of {b} bit{'s' if b > 1 else ''}" for b in bits]
    figure, panels = _error_panels(title, titles, "bits of a weight")
    drawn: dict[str, Any] = {}  # a legend takes containers too; its type says artists
    for axes, b in zip(panels, bits):
        for number, (ste, rho) in enumerate(lines):
            errors = {
                width: [
                    100 * (1 - result["history"][-1]["test_accuracy"])
                    for run, result in results
                    if (run.bits, run.ste, run.weight_bits or 32) == (b, ste, width)
                    and run.range_bits is None and not result["diverged"]
                    and (width == 32 or (run.rho or 0.0) == rho)
                ]
                for width in widths
            }  # fmt: skip
            at = [i for i, width in enumerate(widths) if errors[width]]
            if not at:
                continue
            each = [errors[widths[i]] for i in at]
            means = [sum(some) / len(some) for some in each]
            spread = [[m - min(some) for m, some in zip(means, each)], [max(some) - m for m, some in zip(means, each)]]
            place = [i + 0.06 * number for i in at]
            name = f"{ste}, rho {rho:g}"
            drawn[name] = axes.errorbar(place, means, spread, color=f"C{number}", marker="o", markersize=4, capsize=3)
        axes.set_xticks(range(len(widths)), [str(width) for width in widths])
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _grid(table: Table, results: list[tuple[Run, dict]]) -> Figure:
    """Test error after the last epoch by bits of the activations: a panel for each rounding, a line for each STE."""
    bits = sorted({run.bits for run in table.grid})
    roundings = list(dict.fromkeys(run.rounding for run in table.grid))
    stes = list(dict.fromkeys(run.ste for run in table.grid))
    errors = {
        (run.rounding, run.ste, run.bits): 100 * (1 - result["history"][-1]["test_accuracy"]) for run, result in results
    }
    epochs = table.schedules[table.grid[0].schedule].epochs
    figure, panels = _error_panels(f"{table.title}, {epochs} epochs", list(roundings), "bits of an activation")
    lines: dict[str, Any] = {}
    for axes, rounding in zip(panels, roundings):
        for number, ste in enumerate(stes):
            at = [i for i, b in enumerate(bits) if (rounding, ste, b) in errors]
            y = [errors[rounding, ste, bits[i]] for i in at]
            # Points apart, as most lines meet from 4 bits on.
            x = [i + 0.06 * (number - (len(stes) - 1) / 2) for i in at]
            (lines[ste],) = axes.plot(x, y, color=f"C{number}", marker="o", markersize=4, linewidth=1)
        start = 100 * (1 - sum(result["start"]["test_accuracy"] for _, result in results) / len(results))
        lines["nn.ReLU"] = axes.axhline(start, color="grey", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(bits)), [str(b) for b in bits])
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, frameon=False)
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
