"""`python -m bench.behaviour`: what quantizers do where guesses go wrong, and the tables of docs/peers.md."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import coarsegrad as cg

from .pages import DOCS, fill, markdown
from .quantizers import BITS, QUANTIZERS, TOP, Activation, Quantizer
from .timing import BenchError, write_csv

RESULTS = Path(__file__).parent / "results" / "behaviour.csv"
PAGE = DOCS / "peers.md"
STEP = 0.25  # a power of two: quotients and levels are exact
ODD_STEP = 0.30078125  # a bfloat16 number whose multiples are not

_DESCRIPTION = """
Runs the 4-bit quantizers of bench/quantizers.py, those that are installed, on
inputs chosen to tell them apart, writes what they did as a row each, and the
tables of docs/peers.md from all rows. Rows of packages that are not installed here
stay as they are, so that the command can run in several environments (those of
JAX and TensorFlow exclude others). --page writes the tables alone; with an --out
that does not name the project's results, only --page writes them.
"""

Row = dict[str, str]

# ------------------------------------------------------------------------------------------ probes


def _outputs(quantize: Activation, values: Iterable[float]) -> list[float]:
    """The outputs for values, in steps."""
    with torch.no_grad():
        return (quantize(torch.tensor(list(values))) / STEP).tolist()


def _gradients(quantize: Activation, values: Iterable[float], dy: float = 1.0) -> list[float] | None:
    """dx / dy; None if there is no gradient."""
    x = torch.tensor(list(values), requires_grad=True)
    y = quantize(x)
    if not y.requires_grad:
        return None
    return torch.autograd.grad(y, x, torch.full_like(y, dy))[0].tolist()


def every_number() -> Tensor:
    """All finite bfloat16 numbers but -0."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    return x[x.isfinite() & ~((x == 0) & x.signbit())]


def _ties(k: list[int], codes: list[float]) -> str:
    """k + 1/2 became codes."""
    rules = {"even": [i + i % 2 for i in k], "the lower code": k, "the upper code": [i + 1 for i in k]}
    return next((name for name, wanted in rules.items() if codes == wanted), "mixed")


def _rounding(quantize: Activation, top: int) -> str:
    k = list(range(1, top))
    quarter, half, three_quarters = (_outputs(quantize, [(i + part) * STEP for i in k]) for part in (0.25, 0.5, 0.75))
    up = [i + 1 for i in k]
    if quarter == up and three_quarters == up:
        return "up"
    if quarter == k and three_quarters == up:
        return f"nearest, halves to {_ties(k, half)}"
    return "mixed"


def _levels(quantize: Activation) -> str:
    y = sorted(set(_outputs(quantize, (torch.arange(-4096, 4097) / 256).tolist())))
    return f"{len(y)}: {y[0]:g} to {y[-1]:g}"


def _dead_zone(quantize: Activation) -> str:
    """The largest multiple of step/1024 that becomes 0, from the least positive number on."""
    parts = [i / 1024 for i in range(1, 1025)]
    y = _outputs(quantize, [torch.finfo(torch.float32).tiny, *(part * STEP for part in parts)])
    if y[0] != 0:
        return "none"
    return f"to {max((part for part, code in zip(parts, y[1:]) if code == 0), default=0):g}"


def _quantized(quantizer: Quantizer, dtype: torch.dtype) -> tuple[Tensor, Activation] | None:
    """(every number of bfloat16 in dtype, the quantizer of the odd step); None if it takes no such step or dtype."""
    try:
        quantize = quantizer.make(ODD_STEP)
        x = every_number().to(dtype)
        with torch.no_grad():
            quantize(x)
    except (ValueError, RuntimeError, TypeError):
        return None
    return x, quantize


def _idempotence(quantizer: Quantizer) -> str:
    """Of each dtype: how many levels the quantizer moves."""
    cells = []
    for dtype in quantizer.dtypes:
        name = str(dtype).removeprefix("torch.")
        found = _quantized(quantizer, dtype)
        if found is None:
            cells.append(f"{name}: not taken")
            continue
        x, quantize = found
        with torch.no_grad():
            levels = quantize(x).unique()
            moved = int((quantize(levels) != levels).sum())
        cells.append(f"{name}: {moved} of {levels.numel()} levels move" if moved else "")
    told = [cell for cell in cells if cell]
    return "; ".join(told) if told else "yes"


def _off(quantizer: Quantizer) -> str:
    """The bfloat16 numbers whose code is not that of real numbers, of those between 0 and the top level."""
    found = _quantized(quantizer, torch.bfloat16) if torch.bfloat16 in quantizer.dtypes else None
    if found is None:
        return ""
    x, quantize = found
    with torch.no_grad():
        y = quantize(x)
    inside = (x > 0) & (x.double() <= TOP * ODD_STEP)
    u, codes = (x.double() / ODD_STEP)[inside], (y.double() / ODD_STEP).round()[inside]
    if _rounding(quantizer.make(STEP), TOP) == "up":
        off = codes != u.ceil()
    else:
        off = (codes - u).abs() > 0.5
    return f"{int(off.sum())} of {off.numel():,}{'' if y.dtype == x.dtype else f'; {y.dtype} out'}"


def _special(quantize: Activation, value: float) -> str:
    (y,) = _outputs(quantize, [value])
    return "NaN" if math.isnan(y) else "-0" if y == 0 and math.copysign(1, y) < 0 else f"{y:g}"


def _gradient(quantize: Activation, x: float) -> str:
    found = _gradients(quantize, [x])
    return "none" if found is None else f"{found[0]:g}"


def _masked(quantize: Activation) -> str:
    """dx far above the top for an infinite dy."""
    found = _gradients(quantize, [100 * STEP], math.inf)
    return "none" if found is None else "NaN" if math.isnan(found[0]) else f"{found[0]:g}"


def _kept(quantizer: Quantizer, packed: bool = False) -> str:
    """Bits per element between two Linears in float32."""
    if quantizer.framework != "torch":
        return "not measured"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), quantizer.make(STEP), nn.Linear(64, 8))
    if packed:
        cg.pack_activations_(net)
    y = net(torch.randn(64, 8))
    if not any(t is not None for t in torch.autograd.grad(y.sum(), net[0].parameters(), allow_unused=True)):
        return "none"
    bits = 8 * cg.saved_memory(net, torch.randn(64, 8)).total / 64**2
    return f"{bits:.3g}"


def _moved(quantizer: Quantizer) -> str:
    """What a forward of training changes."""
    if quantizer.framework != "torch":
        return "not measured"
    module = quantizer.moving() if quantizer.moving else quantizer.make(STEP)
    assert isinstance(module, nn.Module)
    module.train()
    torch.manual_seed(0)

    def state() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}

    module(torch.randn(64))
    before = state()
    module(4 * torch.randn(64))
    after = state()
    moved = [name for name in after if name not in before or not torch.equal(before[name], after[name])]
    return ", ".join(f"`{name.rpartition('.')[2]}`" for name in moved) if moved else "nothing"


def _of_step(make: Callable[[], nn.Module], step_of: Callable[[Any], tuple[nn.Parameter, int]]) -> str:
    """The derivative of y by the step below 0, inside, just above the top and far above, in steps."""
    cells = []
    for u in (-0.25, 2.75, TOP + 0.25, 100.0):
        made = make()
        parameter, steps = step_of(made)
        (gradient,) = torch.autograd.grad(made(torch.tensor([u * STEP])).sum(), parameter)
        cells.append(f"{steps * gradient.item():.4g}")
    return ", ".join(cells)


def _learned(quantizer: Quantizer) -> str:
    return _of_step(lambda: quantizer.make(STEP), quantizer.step_of) if quantizer.step_of else ""


def _learned_by_match(quantizer: Quantizer) -> str:
    """What the QReLU of the settings has for it; empty if that is the same."""
    if quantizer.step_of is None or quantizer.settings is None:
        return ""
    ours = _of_step(lambda: quantizer.match(STEP), lambda made: (next(made.parameters()), 1))
    return "the same" if ours == _learned(quantizer) else ours


def _agreement(quantizer: Quantizer) -> tuple[str, str]:
    """On how many of every_number() outputs and gradients differ from those of the QReLU of the settings."""
    if quantizer.settings is None:
        return "", ""
    ours, theirs = quantizer.match(STEP), quantizer.make(STEP)
    x = every_number().float()
    results = []
    for quantize in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = quantize(leaf)
        grad = torch.autograd.grad(y.sum(), leaf)[0] if y.requires_grad else None
        results.append((y.detach(), grad))
    (y, dx), (their_y, their_dx) = results
    u = x.double() / STEP
    ties = (u - u.floor() == 0.5) & (u.abs() < 2 * TOP)

    def told(differs: Tensor) -> str:
        if not differs.any():
            return "0"
        if not (differs & ~ties).any():
            return f"{int(differs.sum())}, at halves"
        first, last = (f"{end:.3g}" for end in u[differs & ~ties].aminmax())
        return f"{int(differs.sum()):,}, {f'at {first}' if first == last else f'from {first} to {last} steps'}"

    return told(y != their_y), "none" if their_dx is None else told(dx != their_dx)


_PROBES: dict[str, Callable[[Quantizer, Activation], str]] = {
    "rounding": lambda q, f: _rounding(f, TOP if not q.signed else TOP // 2),
    "levels": lambda q, f: _levels(f),
    "dead_zone": lambda q, f: _dead_zone(f),
    "idempotent": lambda q, f: _idempotence(q),
    "off_in_bfloat16": lambda q, f: "" if q.signed else _off(q),
    "of_nan": lambda q, f: _special(f, math.nan),
    "of_infinity": lambda q, f: _special(f, math.inf),
    "of_minus_infinity": lambda q, f: _special(f, -math.inf),
    "of_minus_zero": lambda q, f: _special(f, -0.0),
    "gradient_below": lambda q, f: _gradient(f, -0.25 * STEP),
    "gradient_far_below": lambda q, f: _gradient(f, -2 * TOP * STEP),
    "gradient_at_zero": lambda q, f: _gradient(f, 0.0),
    "gradient_at_top": lambda q, f: _gradient(f, (TOP // 2 if q.signed else TOP) * STEP),
    "gradient_above": lambda q, f: _gradient(f, ((TOP // 2 if q.signed else TOP) + 0.25) * STEP),
    "gradient_far_above": lambda q, f: _gradient(f, 100 * STEP),
    "gradient_of_nan": lambda q, f: _gradient(f, math.nan),
    "gradient_masked": lambda q, f: _masked(f),
    "gradient_of_step": lambda q, f: _learned(q),
    "kept_bits": lambda q, f: _kept(q),
    "kept_bits_packed": lambda q, f: _kept(q, packed=True) if q.distribution == "coarsegrad" else "",
    "moved_by_a_forward": lambda q, f: _moved(q),
    "outputs_that_differ": lambda q, f: _agreement(q)[0],
    "gradients_that_differ": lambda q, f: _agreement(q)[1],
    "gradient_of_step_by_match": lambda q, f: _learned_by_match(q),
}


def observed(quantizer: Quantizer) -> Row:
    """Everything about one quantizer."""
    made = quantizer.make(STEP)
    cells = {name: probe(quantizer, made) for name, probe in _PROBES.items()}
    return {"quantizer": quantizer.label, "package": quantizer.distribution, "version": quantizer.version, **cells}


# ------------------------------------------------------------------------------------------ tables

_STAIRCASE = {
    "rounding": "rounding", "levels": "levels, in steps", "dead_zone": "becomes 0, in steps",
    "idempotent": "idempotent", "off_in_bfloat16": "wrong codes in bfloat16",
    "of_nan": "NaN", "of_infinity": "inf", "of_minus_infinity": "-inf", "of_minus_zero": "-0",
}  # fmt: skip
_GRADIENTS = {
    "gradient_far_below": "far below 0", "gradient_below": "-1/4 step", "gradient_at_zero": "0",
    "gradient_at_top": "top level", "gradient_above": "1/4 step above", "gradient_far_above": "far above",
    "gradient_of_nan": "NaN", "gradient_masked": "far above, dy infinite",
    "gradient_of_step": "of a learned step, at -0.25, 2.75, 15.25, 100 steps",
}  # fmt: skip
_STATE = {"kept_bits": "bits kept", "kept_bits_packed": "packed", "moved_by_a_forward": "moved by a forward"}
_AGREEMENT = {
    "outputs_that_differ": "outputs that differ", "gradients_that_differ": "gradients that differ",
    "gradient_of_step_by_match": "gradient of a learned step",
}  # fmt: skip


def load(path: Path = RESULTS) -> dict[str, Row]:
    """The committed rows by quantizer."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {row["quantizer"]: row for row in csv.DictReader(file)}


def _table(rows: dict[str, Row], columns: dict[str, str]) -> str:
    return markdown(("", *columns.values()), ((f"`{name}`", *(row[c] for c in columns)) for name, row in rows.items()))


def _settings(quantizer: Quantizer) -> str:
    words = ", ".join(f"{name}={value!r}".replace("'", '"') for name, value in (quantizer.settings or {}).items())
    kind = "QSigned" if quantizer.signed else "QReLU"
    return f"{'`nn.ReLU()`, ' if quantizer.after_relu else ''}`{kind}({BITS}, {words})`"


def tables(rows: dict[str, Row]) -> dict[str, str]:
    """The tables of docs/peers.md by name."""
    versions = dict.fromkeys((row["package"], row["version"]) for row in rows.values())
    matched = {name: row for name, row in rows.items() if QUANTIZERS[name].settings is not None}
    return {
        "versions": markdown(("package", "version"), versions),
        "staircase": _table(rows, _STAIRCASE),
        "gradients": _table(rows, _GRADIENTS),
        "state": _table(rows, _STATE),
        "settings": markdown(
            ("from", "to", *_AGREEMENT.values()),
            ((f"`{n}`", _settings(QUANTIZERS[n]), *(row[c] for c in _AGREEMENT)) for n, row in matched.items()),
        ),
    }


# ------------------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.behaviour", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--page", action="store_true", help="only write the tables, from the results that are there")
    add("--only", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS), metavar="NAME", help="of the quantizers")
    add("--out", type=Path, default=RESULTS, help=f"the CSV file (default {RESULTS.relative_to(DOCS.parent)})")
    args = parser.parse_args(argv)
    rows = load(args.out)
    if not args.page:
        for name in args.only:
            if QUANTIZERS[name].installed:
                print(f"Observed: {name}")
                rows[name] = observed(QUANTIZERS[name])
            else:
                print(f"Not installed: {name}{' (its row stays)' if name in rows else ''}")
        rows = {name: rows[name] for name in QUANTIZERS if name in rows}
        write_csv(rows.values(), args.out)
    if not rows:
        raise SystemExit(f"bench.behaviour: {args.out} has no rows")
    try:
        if args.page or args.out == RESULTS:
            fill(PAGE, tables(rows))
    except BenchError as error:
        raise SystemExit(f"bench.behaviour: {error}") from error


if __name__ == "__main__":
    main()
