"""The summary of a table of runs, as plain text that is also Markdown: tables, missing runs, and the machine."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Iterable, Iterator

from .._text import format_table
from ..ste import get_ste
from .table_runs import Run, Schedule, Table, integers_of

Results = list[tuple[Run, dict]]


def summary(table: Table, schedule: str, results: Results) -> Iterator[str]:
    """The paragraphs about the runs of one schedule, with trailing newlines."""
    mine = [(run, result) for run, result in results if run.schedule == schedule and run in table.runs]
    yield _paragraph(f"Schedule `{schedule}`: {_schedule(table.schedules[schedule])}.")
    weights = [(run, result) for run, result in mine if run.weight_bits is not None]
    fixed = [(run, result) for run, result in mine if run.learn_alpha is None and run.weight_bits is None]
    learned = [(run, result) for run, result in mine if run.learn_alpha is not None]
    if fixed:
        yield _indented(_fixed_table(fixed, table.schedules[schedule], table.published if schedule == "full" else {}))
    if learned:
        kinds = {(run.bits, run.ste) for run, _ in learned}
        base = [(run, result) for run, result in fixed if (run.bits, run.ste) in kinds and run.range_bits is None]
        yield "With fixed and with learned alpha:\n\n"
        yield _indented(_learned_table(base + learned))
    if weights:
        kinds = {(run.bits, run.ste) for run, _ in weights}
        base = [(run, result) for run, result in fixed if (run.bits, run.ste) in kinds and run.range_bits is None]
        yield "With weights of few bits, and the same networks converted to integers:\n\n"
        yield _indented(_weights_table(base + weights))
    planned = [run for run in table.runs if run.schedule == schedule]
    if missing := _missing(planned, [run for run, _ in mine]):
        yield _paragraph(f"Not run: {missing}.")
    if mine:
        yield _paragraph(_origin(mine))


def grid_summary(table: Table, results: Results) -> Iterator[str]:
    """The paragraphs about the grid, with trailing newlines."""
    mine = {run: result for run, result in results if run in table.grid}
    schedule = table.grid[0].schedule
    yield _paragraph(
        f"Accuracy on the test images after the last epoch (%), on the schedule `{schedule}`: "
        f"{_schedule(table.schedules[schedule])}. Seed {table.grid[0].seed}."
    )
    bits = sorted({run.bits for run in table.grid})
    rows: dict[tuple[str, ...], dict[int, str]] = {}
    for run in table.grid:
        row = rows.setdefault((run.rounding, run.ste), {})
        if run in mine:
            row[run.bits] = "diverged" if mine[run]["diverged"] else _mean([mine[run]["history"][-1]["test_accuracy"]])
    header = ("rounding", "ste", *(f"{b} bit{'s' if b > 1 else ''}" for b in bits))
    yield _indented(format_table(header, [(*key, *(row.get(b, "") for b in bits)) for key, row in rows.items()]))
    if missing := _missing(list(table.grid), list(mine)):
        yield _paragraph(f"Not run: {missing}.")
    if mine:
        yield _paragraph(_origin(list(mine.items())))


def _schedule(schedule: Schedule) -> str:
    def drops(epochs: tuple[int, ...]) -> str:
        return " and ".join(map(str, epochs))

    return (
        f"{schedule.float_epochs} epochs in float (rate divided by 10 after epochs {drops(schedule.float_lr_drops)}), "
        f"then {schedule.epochs} with low-bit activations (after {drops(schedule.lr_drops)}); SGD with "
        f"momentum 0.9, batches of {schedule.batch_size}, rate {schedule.lr:g}"
    )


def _fixed_table(results: Results, schedule: Schedule, published: dict[tuple[int, str], float]) -> str:
    # If several epochs have the last rate, their spread shows how much of the last accuracy is chance.
    low = range(schedule.lr_drops[-1] + 1 if schedule.lr_drops else 1, schedule.epochs + 1)
    header: tuple[str, ...] = ("bits", "ste", "in class", "seeds", "last epoch (%)", "best epoch (%)", "float (%)")
    header += (f"epochs {low[0]} to {low[-1]} (%)",) if len(low) > 1 else ()
    header += ("published (%)",) if published else ()
    # Results of earlier versions of the command lack these fractions.
    shares = any("shares" in result for _, result in results)
    header += ("zero per layer (%)", "saturated (%)") if shares else ()
    rows = []
    for (bits, ste, range_bits), cell in _cells(results, lambda run: (run.bits, run.ste, run.range_bits)):
        in_class = all(get_ste(name).in_class for name in re.split(r"\+|_then_", ste))
        row = [f"{bits}, range of {range_bits}" if range_bits else str(bits)]
        row += [ste, "yes" if in_class else "no", str(len(cell)), *_accuracies(cell)]
        if len(low) > 1:
            whole = [epoch for _, result in cell if not result["diverged"] for epoch in result["history"]]
            row.append(_mean([epoch["test_accuracy"] for epoch in whole if epoch["epoch"] in low]))
        if published:
            row.append(f"{published[bits, ste]:.2f}" if (bits, ste) in published and not range_bits else "")
        if shares:
            row += [_shares(cell, "zero"), _shares(cell, "saturated")]
        rows.append((bits, tuple(row)))
    return format_table(header, [row for _, row in sorted(rows, key=lambda pair: pair[0])])


def _learned_table(results: Results) -> str:
    layers = list(results[0][1]["alpha"])
    header = ("bits", "ste", "rule", "alpha per", "seeds", "last epoch (%)", "best epoch (%)", *layers)
    rows = []
    for key, cell in _cells(results, lambda run: (run.bits, run.ste, run.learn_alpha, run.per_channel)):
        bits, ste, rule, per_channel = key
        alphas = (_alpha([result["alpha"][layer] for _, result in cell]) for layer in layers)
        where = "channel" if per_channel else "layer"
        rows.append((str(bits), ste, rule or "fixed", where, str(len(cell)), *_accuracies(cell)[:2], *alphas))
    return format_table(header, rows)


def _weights_table(results: Results) -> str:
    """Accuracies, bytes and times of the integers are means; differing predictions are those of all seeds."""
    header = (
        "bits", "ste", "weight bits", "rho", "seeds", "last epoch (%)", "best epoch (%)", "minus float (points)",
        "integers (%)", "differing", "KiB", "of float", "time of float",
    )  # fmt: skip
    rows = []
    for key, cell in _cells(results, lambda run: (run.bits, run.ste, run.weight_bits, run.rho)):
        bits, ste, weight_bits, rho = key
        rho_text = "" if weight_bits is None else f"{rho or 0:g}"
        row = (
            str(bits),
            ste,
            str(weight_bits or 32),
            rho_text,
            str(len(cell)),
            *_accuracies(cell)[:2],
            _minus_float(cell),
        )
        rows.append(((-bits, -(weight_bits or 32), rho or 0), (*row, *_integers(cell))))
    return format_table(header, [row for _, row in sorted(rows, key=lambda pair: pair[0])])


def _minus_float(cell: Results) -> str:
    """The accuracy of the last epoch minus that of the float network of the same seed, mean and spread."""
    whole = [result for _, result in cell if not result["diverged"]]
    return _mean([r["history"][-1]["test_accuracy"] - r["start"]["test_accuracy"] for r in whole], "+.2f")


def _integers(cell: Results) -> tuple[str, ...]:
    """Of the converted networks: accuracy, predictions unlike the trained one's, bytes, and bytes and time of float."""
    found = [integers for _, result in cell if (integers := integers_of(result))]
    if not found:
        return 5 * ("",)
    pairs = [(one["integer"], one["float"]) for one in found]
    return (
        _mean([integer["test_accuracy"] for integer, _ in pairs]),
        str(sum(one["differing"] for one in found)),
        f"{statistics.mean(integer['bytes'] for integer, _ in pairs) / 1024:.0f}",
        f"1/{statistics.mean(base['bytes'] / integer['bytes'] for integer, base in pairs):.1f}",
        f"{statistics.mean(integer['batch_seconds'] / base['batch_seconds'] for integer, base in pairs):.2f}x",
    )


def _cells(results: Results, key) -> Iterable[tuple[tuple, Results]]:
    cells: dict[tuple, Results] = {}
    for run, result in results:
        cells.setdefault(key(run), []).append((run, result))
    return cells.items()


def _accuracies(cell: Results) -> tuple[str, str, str]:
    """Accuracy of the last epoch, the best epoch and the float network: mean and sample standard deviation, in %."""
    whole = [result["history"] for _, result in cell if not result["diverged"]]
    last = _mean([history[-1]["test_accuracy"] for history in whole])
    best = _mean([max(row["test_accuracy"] for row in history) for history in whole])
    if len(whole) < len(cell):
        epochs = sorted(len(result["history"]) + 1 for _, result in cell if result["diverged"])
        last += f" ({len(epochs)} diverged, in epoch {', '.join(map(str, epochs))})"
    return last.strip(), best, _mean([result["start"]["test_accuracy"] for _, result in cell])


def _shares(cell: Results, of: str) -> str:
    """The fraction of the inputs of each layer, in whole %, as the mean over the seeds."""
    found = [result["shares"].values() for _, result in cell if result.get("shares")]
    return " ".join(f"{100 * statistics.mean(layer[of] for layer in layers):.0f}" for layers in zip(*found))


def _mean(accuracies: list[float], form: str = ".2f") -> str:
    if not accuracies:
        return ""
    percent = [100 * accuracy for accuracy in accuracies]
    spread = f" +- {statistics.stdev(percent):.2f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):{form}}{spread}"


def _alpha(spreads: list[dict[str, float]]) -> str:
    mean = f"{statistics.mean(spread['mean'] for spread in spreads):.3g}"
    low, high = min(spread["min"] for spread in spreads), max(spread["max"] for spread in spreads)
    return mean if f"{low:.3g}" == f"{high:.3g}" else f"{mean} ({low:.3g} to {high:.3g})"


def _missing(planned: list[Run], done: list[Run]) -> str:
    """The planned runs that are missing, as text: by bits, and by seed if some seeds are done."""
    if not done:
        return "all"
    parts = []
    for bits in sorted({run.bits for run in planned}):
        of_bits = [run for run in planned if run.bits == bits]
        variants = []
        for variant in dict.fromkeys(run.variant for run in of_bits):
            seeds = [run for run in of_bits if run.variant == variant]
            missing = [str(run.seed) for run in seeds if run not in done]
            if missing:
                variants.append(f"`{variant}`" + (f" (seed {', '.join(missing)})" if len(missing) < len(seeds) else ""))
        if variants:
            untouched = not any(run in done for run in of_bits)
            parts.append(f"at {bits} bit{'s' if bits > 1 else ''} {'all' if untouched else ', '.join(variants)}")
    return "; ".join(parts)


def _origin(results: Results) -> str:
    """The machines, commits, epochs and time; and whether the runs of a seed share one float network."""
    machines, commits = {}, {}
    for _, result in results:
        where = result["environment"]
        threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
        machine = f"{where['cpu']}, {where['device']}, {threads}, torch {where['torch']}, {where['backend']}"
        machines[machine] = commits[(where["git"] or "unknown")[:10]] = True
    rows = [row for _, result in results for row in result["history"]]
    hours = sum(row["seconds"] for row in rows) / 3600
    runs = f"{len(results)} run{'s' if len(results) > 1 else ''}"
    text = (
        f"{runs}, {len(rows)} epochs, {hours:.1f} hours of training, on {'; '.join(machines)}; "
        f"coarsegrad at commit {', '.join(commits)}."
    )
    starts: dict[int, set[str]] = {}
    for run, result in results:
        starts.setdefault(run.seed, set()).add(result["start"]["weights"])
    if several := [f"{seed} ({len(weights)})" for seed, weights in starts.items() if len(weights) > 1]:
        text += f" The runs of seed {', '.join(several)} start from more than one float network, which was retrained."
    return text


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n\n"


def _indented(text: str) -> str:
    return textwrap.indent(text, "    ") + "\n\n"
