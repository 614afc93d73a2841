"""The results of `python -m coarsegrad finetune`: all numbers as JSON, a table, and a figure."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from .._text import format_table
from .files import replacing

FILES = ("results.json", "finetune.png")


def save(results: dict, folder: Path) -> None:
    """Write results.json, from which the rest is generated."""
    with replacing(folder / "results.json") as file:
        file.write(json.dumps(results, indent=1).encode() + b"\n")


def write(results: dict, folder: Path) -> None:
    """Write all FILES."""
    save(results, folder)
    with replacing(folder / "finetune.png") as file:
        _figure(results).savefig(file, format="png", dpi=110)


def ordered(results: dict) -> dict[str, dict]:
    """The runs: float first, then by decreasing bits."""
    return dict(sorted(results["runs"].items(), key=lambda item: -(item[1]["bits"] or 32)))


def perplexities(run: dict) -> list[float]:
    """Perplexity on the validation text, at each step of the history."""
    return [math.exp(row["validation_loss"]) for row in run["history"]]


def has_activations(results: dict) -> bool:
    """Whether ReLUs were quantized, of which the rest of the network is independent; else whole blocks."""
    return not results["config"].get("blocks")


def activation_bytes(run: dict, base: dict) -> tuple[int, int]:
    """(in float, with low bits): bytes saved for the activations' outputs and masks; the rest of both networks is the
    same. In float that is each output once, 4 bytes per element."""
    in_float = 4 * sum(layer["elements"] for layer in run["layers"].values())
    return in_float, in_float - (base["kept_bytes"] - run["kept_bytes"])


def summary(results: dict) -> str:
    """A row for each run, followed by what the columns mean."""
    runs = ordered(results)
    base = runs["float"]
    rows = []
    for name, run in runs.items():
        before, *_, after = perplexities(run)
        row = [name, f"{before:.3f}", f"{after:.3f}"]
        if run is base:
            row += ["", "", "", f"{base['kept_bytes'] / 2**10:,.0f} KiB", "", ""]
        else:
            seconds, relative = run["step_seconds"], run["kept_bytes"] / base["kept_bytes"]
            if has_activations(results):
                in_float, low_bit = activation_bytes(run, base)
                relative = low_bit / in_float
            row += [
                f"{after / perplexities(base)[-1] - 1:+.2%}", f"{run['logits']['relative_error']:.2%}",
                f"{run['logits']['same_top_token']:.1%}", f"{run['kept_bytes'] / 2**10:,.0f} KiB",
                f"{relative:.4f}x", f"{seconds['quantized'] / seconds['float']:.3f}x",
            ]  # fmt: skip
        rows.append(tuple(row))
    what = "activations" if has_activations(results) else "of float"
    header = ("run", "ppl before", "ppl after", "vs float", "logits", "same top", "saved", what, "step")
    config, environment = results["config"], next(iter(runs.values()))["environment"]
    pretrained = ""
    if results["pretraining"]:
        loss = results["pretraining"][-1]["validation_loss"]
        pretrained = f"Pretraining reached a perplexity of {math.exp(loss):.2f} on its own validation text. "
    when = "before training and after"
    column = "of float: saved, relative to float"
    if has_activations(results):
        silent = f"{math.exp(base['silent_loss']):.2f}"
        when = (
            f"before training, with calibrated alphas, and after. With all activations set to 0 it is {silent} before"
        )
        column = "activations: bytes saved for their outputs and masks, relative to float"
    weights = _weights(config)
    processes = config.get("processes", 1)
    each = f" in each of {processes} processes ({config['parallel']})" if "parallel" in config else ""
    notes = (
        f"{pretrained}{weights}ppl: perplexity on the validation text {when}. vs float: ppl after, relative to "
        "float. logits: relative error before training. same top: how often the most likely token is that of float, "
        f"before training. saved: for backward in a step{each} on {config['batch_size'] // processes} x "
        f"{config['length']} tokens, without weights. {column}. step: median time "
        f"of a packed training step, relative to float, in turn: {environment['cpu']}, device {environment['device']}, "
        f"threads {environment['threads']}, torch {environment['torch']}, backend {environment['backend']}."
    )
    tables = [format_table(header, rows), textwrap.fill(notes, 110)]
    if by_kind := results.get("by_kind"):
        tables += [_kinds(by_kind)]
    return "\n\n".join(tables)


def _weights(config: dict) -> str:
    """What is said of quantized weights, if there are any."""
    parts = [
        f"{config[name]} bits{of}"
        for name, of in (("weight_bits", " in all layers but the last"), ("head_bits", " in the last layer"))
        if name in config
    ]
    if not parts:
        return ""
    step = f"blended steps, rho {config['rho']:g}" if config.get("rho") else "plain steps"
    return f"The weights of all runs but float have {' and '.join(parts)}, trained by {step}. "


def _kinds(by_kind: dict[str, dict[str, float]]) -> str:
    """A row for each kind of staircase."""
    header = ("staircases", *(f"{bits}bit" for bits in by_kind))
    rows = []
    for kind in next(iter(by_kind.values())):
        cells = []
        for found in by_kind.values():
            more = "" if kind == "none" else f" {found[kind] / found['none'] - 1:+.2%}"
            cells.append(f"{found[kind]:.3f}{more}")
        rows.append((kind, *cells))
    weights = "; or with quantized weights alone" if "weights" in next(iter(by_kind.values())) else ""
    notes = (
        "Perplexity before training with the staircases of one kind alone: in front of the layers of that name, in "
        f"gated MLPs, or in attention{weights}."
    )
    return f"{format_table(header, rows)}\n\n{textwrap.fill(notes, 110)}"


def _figure(results: dict) -> Figure:
    runs = ordered(results)
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, run in runs.items():
        steps = [row["step"] for row in run["history"]]
        style = {"color": "0.3", "linestyle": "--", "zorder": 3} if run["bits"] is None else {}
        curves.plot(steps, perplexities(run), marker="o", markersize=3, label=name, **style)
    curves.set(xlabel="step", ylabel="validation perplexity", yscale="log", title="Fine-tuning")
    for formatter in (curves.yaxis.set_major_formatter, curves.yaxis.set_minor_formatter):
        formatter("{x:g}")
    curves.grid(alpha=0.3, which="both")
    curves.legend()
    base, *low = runs.values()
    if has_activations(results):
        sizes = [activation_bytes(low[0], base)[0], *(activation_bytes(run, base)[1] for run in low)]
        rest = base["kept_bytes"] - sizes[0]
        bars.bar(list(runs), [rest / 2**20] * len(runs), color="0.8", label="everything else")
        bars.bar(list(runs), [size / 2**20 for size in sizes], bottom=rest / 2**20, label="activations")
        bars.legend(loc="lower right")
    else:
        bars.bar(list(runs), [run["kept_bytes"] / 2**20 for run in runs.values()])
    each = ", per process" if "parallel" in results["config"] else ""
    bars.set(ylabel=f"MiB saved for backward{each}", title="One training step")
    return figure
