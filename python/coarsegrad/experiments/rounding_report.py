"""The results of `python -m coarsegrad rounding`: all numbers as JSON, tables, and a figure."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from .._text import format_table
from .files import replacing

FILES = ("results.json", "rounding.png")

# title, name of the score, its decimals
_NETWORKS = {
    "lenet": ("LeNet-5 on MNIST", "accuracy (%)", 2),
    "resnet": ("ResNet-14 on MNIST", "accuracy (%)", 2),
    "opt": ("A small OPT on Shakespeare", "perplexity", 3),
}
# rounding, corrected, style of the line
_KINDS = [("ceil", False, "C3-"), ("ceil", True, "C3:"), ("nearest", False, "C0-"), ("hwgq", False, "C2-")]


def save(results: dict, folder: Path) -> None:
    """Write results.json, from which the rest is generated."""
    with replacing(folder / "results.json") as file:
        file.write(json.dumps(results, indent=1).encode() + b"\n")


def write(results: dict, folder: Path) -> None:
    """Write all FILES."""
    save(results, folder)
    with replacing(folder / "rounding.png") as file:
        _figure(results).savefig(file, format="png", dpi=110)


def summary(results: dict) -> str:
    """A table for each network, followed by what the columns mean."""
    parts = []
    for name, network in results["networks"].items():
        title, score, decimals = _NETWORKS[name]
        parts += [f"{title}: {score}", _table(network["runs"], decimals)]
    config, environment = results["config"], next(iter(results["networks"].values()))["environment"]
    notes = (
        f"Alphas are calibrated and fixed. before: without training. logits: relative error before training. relu, "
        f"clipped_relu: after {config['steps']} more steps with that STE, and as many for float. saved: bytes for "
        "backward in a step, packed, relative to float. corrected: the biases of the next layers are changed so that "
        f"channel means are those of float. One seed ({config['seed']}); {environment['cpu']}, "
        f"device {environment['device']}, threads {environment['threads']}, torch {environment['torch']}, "
        f"backend {environment['backend']}."
    )
    return "\n\n".join([*parts, textwrap.fill(notes, 110)])


def _find(runs: dict, **how: object) -> dict | None:
    """The run with these settings, if done."""
    return next((run for run in runs.values() if all(run[name] == value for name, value in how.items())), None)


def _table(runs: dict, decimals: int) -> str:
    def number(run: dict | None) -> str:
        return f"{run['score']:.{decimals}f}" if run else ""

    before, after = (_find(runs, bits=None, tuned=tuned) for tuned in (False, True))
    rows: list[tuple[str, ...]] = [("float", "", number(before), "", number(after), "", number(after), "")]
    for bits in sorted({run["bits"] for run in runs.values() if run["bits"]}, reverse=True):
        for rounding, corrected, _ in _KINDS:
            kind = {"bits": bits, "rounding": rounding, "corrected": corrected}
            if not (run := _find(runs, **kind, tuned=False)):
                continue
            row = [f"{bits}", rounding + " corrected" * corrected, number(run), f"{run['output_error']:.2%}"]
            for ste in ("clipped_relu", "relu"):
                tuned = _find(runs, **kind, ste=ste)
                row += [number(tuned), f"{tuned['kept_bytes'] / after['kept_bytes']:.3f}x" if tuned and after else ""]
            rows.append(tuple(row))
    return format_table(("bits", "rounding", "before", "logits", "clipped_relu", "saved", "relu", "saved"), rows)


def _figure(results: dict) -> Figure:
    networks = results["networks"]
    figure = Figure(figsize=(4 * len(networks), 6.5), layout="constrained")
    axes = figure.subplots(2, len(networks), squeeze=False)
    for column, (name, network) in zip(axes.T, networks.items()):
        title, score, _ = _NETWORKS[name]
        for panel, tuned, ste in ((column[0], False, None), (column[1], True, "clipped_relu")):
            base = _find(network["runs"], bits=None, tuned=tuned)
            for rounding, corrected, style in _KINDS:
                kind = {"rounding": rounding, "corrected": corrected, "ste": ste, "tuned": tuned}
                runs = [run for run in network["runs"].values() if all(run[k] == v for k, v in kind.items())]
                runs = sorted((run for run in runs if run["bits"]), key=lambda run: run["bits"])
                if runs:
                    panel.plot(
                        [f"{run['bits']}" for run in runs], [run["score"] for run in runs], style, marker="o",
                        markersize=3, label=rounding + " corrected" * corrected,
                    )  # fmt: skip
            if base:
                panel.axhline(base["score"], color="0.3", linestyle="--", linewidth=1, label="float")
            when = "after a short fine-tuning, clipped_relu" if tuned else "calibrated, not trained"
            panel.set(xlabel="bits", ylabel=score, title=f"{title},\n{when}")
            panel.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    return figure
