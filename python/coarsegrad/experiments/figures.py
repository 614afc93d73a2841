"""Figures of training runs, drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .files import replacing


def training_curves(history: dict[str, list[dict]], title: str, path: Path) -> None:
    """Plot training loss and test accuracy by epoch, one phase of `history` after the other, as a PNG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    loss, accuracy = figure.subplots(1, 2)
    end = 0
    for number, (phase, epochs) in enumerate(history.items()):
        x = [end + row["epoch"] for row in epochs]
        style = {"marker": "o", "markersize": 4, "color": f"C{number}", "label": phase}
        loss.plot(x, [row["loss"] for row in epochs], **style)
        accuracy.plot(x, [100 * row["test_accuracy"] for row in epochs], **style)
        for axes in (loss, accuracy):
            if end:
                axes.axvline(end + 0.5, color="0.8", linewidth=1, zorder=0)
        end += len(epochs)
    loss.set(ylabel="training loss", yscale="log")
    for formatter in (loss.yaxis.set_major_formatter, loss.yaxis.set_minor_formatter):
        formatter("{x:g}")
    accuracy.set(ylabel="test accuracy (%)")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    loss.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
