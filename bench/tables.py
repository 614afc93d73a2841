"""The tables of the pages that bench.report writes, each from the rows of a CSV file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from .activations import IMPLEMENTATIONS
from .engines import ENGINES, ours
from .kernels import COPIES
from .layers import BASE as LAYER_BASE
from .pages import markdown
from .peers import PASSES
from .sweep import DTYPES, size_label
from .workloads import WORKLOADS


def number(text: str) -> str:
    """Three significant figures; empty if not measured."""
    return "" if text == "nan" else f"{float(text):.3g}"


def kernel_table(
    rows: list[dict[str, str]], column: str = "time_over_copy", without: Iterable[str] = tuple(COPIES)
) -> str:
    """A line for each kernel but `without`, a column for each dtype and size."""
    cases = list(dict.fromkeys((row["dtype"], row["size"]) for row in rows))
    times = {(row["kernel"], row["dtype"], row["size"]): row[column] for row in rows}
    kernels = [kernel for kernel in dict.fromkeys(row["kernel"] for row in rows) if kernel not in without]
    header = ["kernel", *(f"{dtype} {size_label(int(size))}" for dtype, size in cases)]
    cells = ((kernel, *(number(times.get((kernel, *case), "nan")) for case in cases)) for kernel in kernels)
    return markdown(header, cells)


thread_table = functools.partial(kernel_table, column="speed_over_one_thread", without=())


def peer_table(rows: list[dict[str, str]]) -> str:
    """Speeds of a forward and backward: a line for each implementation, a column for each dtype, size and malloc."""
    rows = [row for row in rows if row["pass"] == PASSES[1]]
    cases = list(dict.fromkeys((row["dtype"], row["size"], row["allocator"]) for row in rows))
    cases.sort(key=lambda case: list(DTYPES).index(case[0]))
    speeds = {(row["implementation"], row["dtype"], row["size"], row["allocator"]): row for row in rows}
    header = ["", *(
        f"{dtype} {size_label(int(size))}" + (", default malloc" if allocator == "default" else "")
        for dtype, size, allocator in cases
    )]  # fmt: skip
    cells = []
    for name in (name for name in IMPLEMENTATIONS if any(row["implementation"] == name for row in rows)):
        found = (speeds.get((name, *case), {"speed_over_relu": "nan"}) for case in cases)
        cells.append([IMPLEMENTATIONS[name].label, *(number(row["speed_over_relu"]) for row in found)])
    return markdown(header, cells)


def training_table(rows: list[dict[str, str]]) -> str:
    """A line per network, pass and activation; eager and compiled side by side."""
    found = {(row["network"], row["dtype"], row["pass"], row["activation"], row["mode"]): row for row in rows}
    lines = []
    for case in dict.fromkeys(key[:-1] for key in sorted(found, key=lambda key: key[:3])):
        cells = [
            (f"{1e3 * float(row['seconds_median']):.2f}", f"{float(row['time_over_relu_median']):.3f}")
            for row in (found[(*case, mode)] for mode in ("eager", "compiled"))
        ]
        lines.append(
            (*case, *(cell for pair in cells for cell in pair), found[(*case, "compiled")]["seconds_to_compile"])
        )
    times = ("eager, ms", "over nn.ReLU", "compiled, ms", "over nn.ReLU", "compile, s")
    header = ("network", "dtype", "pass", "activation", *times)
    return markdown(header, lines)


def memory_table(rows: list[dict[str, str]]) -> str:
    """A line for each network, dtype and activation."""
    first: dict[tuple[str, str], float] = {}  # without staircases
    for row in rows:
        first.setdefault((row["network"], row["dtype"]), float(row["seconds_median"]))
    return markdown(
        ("network", "dtype", "activation", "saved, MiB", "peak, MiB", "ms a step", "over the first"),
        (
            (
                row["network"], row["dtype"], row["activation"],
                f"{int(row['kept_bytes']) / 2**20:,.0f}" if row["kept_bytes"] else "hidden",
                f"{int(row['peak_bytes']) / 2**20:,.0f}", f"{1e3 * float(row['seconds_median']):.1f}",
                f"{float(row['seconds_median']) / first[row['network'], row['dtype']]:.3f}",
            )
            for row in rows
        ),
    )  # fmt: skip


def inference_table(
    rows: list[dict[str, str]],
    engines: Iterable[str],
    cell: Callable[[dict[str, dict[str, str]], str], str],
    case: Callable[[dict[str, str]], tuple[str, ...]] = lambda row: (row["workload"], row["batch"]),
) -> str:
    """A line for each case, a column for each engine measured. cell(the case's rows by engine, engine); case(row)
    begins with the workload."""
    names = [name for name in engines if any(row["engine"] == name for row in rows)]
    lines = []
    for workload, *others in dict.fromkeys(map(case, rows)):
        mine = {row["engine"]: row for row in rows if case(row) == (workload, *others)}
        cells = (cell(mine, name) if name in mine else "" for name in names)
        lines.append((WORKLOADS[workload].label, *others, *cells))
    batch = ["batch"] if len(case(rows[0])) > 1 else []
    return markdown(("network", *batch, *(ENGINES[name].label for name in names)), lines)


def milliseconds(mine: dict[str, dict[str, str]], name: str) -> str:
    value = 1e3 * float(mine[name]["seconds_median"])
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def speed(mine: dict[str, dict[str, str]], name: str) -> str:
    """Of W8A4 relative to an engine; empty if it was not measured."""
    if ours(8) not in mine:
        return ""
    return number(str(float(mine[name]["seconds_median"]) / float(mine[ours(8)]["seconds_median"])))


def kibibytes(mine: dict[str, dict[str, str]], name: str) -> str:
    return f"{int(mine[name]['weight_bytes']) / 1024:,.0f}"


def layer_table(rows: list[dict[str, str]]) -> str:
    """A line for each layer and batch, a column for each kind of numbers."""
    cases: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        cases.setdefault((row["layer"], row["shape"], row["batch"]), {})[row["numbers"]] = row
    names = [name for name in dict.fromkeys(row["numbers"] for row in rows) if name != LAYER_BASE]
    lines = []
    for case, found in cases.items():
        speeds = (number(found[name][f"speed_over_{LAYER_BASE}"]) for name in names)
        lines.append((*case, f"{1e6 * float(found[LAYER_BASE]['seconds_median']):,.0f}", *speeds))
    return markdown(("layer", "", "batch", f"{LAYER_BASE}, us", *map(str.upper, names)), lines)


def mlp_table(rows: list[dict[str, str]]) -> str:
    """A line for each shape and way to compute it."""

    def megabytes(row: dict[str, str], name: str) -> str:
        return f"{int(row[name]) / 1e6:,.1f}" if row[name] else ""

    lines = (
        (
            row["shape"], row["way"], f"{1e3 * float(row['seconds_median']):.3f}", number(row["speed_over_relu"]),
            megabytes(row, "kept_bytes"), megabytes(row, "peak_bytes"),
        )
        for row in rows
    )  # fmt: skip
    return markdown(("", "activation", "ms", "speed", "kept, MB", "peak, MB"), lines)
