"""`python -m bench.inference`: the time of networks converted to integers, and of other engines on the same ones."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from coarsegrad._text import format_table
from coarsegrad.integer import WEIGHT_BITS

from .engines import ENGINES, PEERS, Prepared, Subject, ours, versions
from .sweep import results_file, timed
from .timing import (
    BenchError,
    CpuTimer,
    Row,
    Times,
    at_least,
    facts,
    in_new_process,
    instruction_sets,
    interleaved,
    quantiles,
    write_csv,
)
from .workloads import WORKLOADS, Network

RESULTS = Path(__file__).parent / "results" / "inference.csv"
BASE = "float32"

_DESCRIPTION = """
Times the forward of networks with 4-bit activations, converted to integers by
coarsegrad.convert with weights of 8, 4, 2 and 1 bits, eager and in torch.compile;
the same network before (qrelu); and on the same network torch in float32,
bfloat16 and torch.compile (with nn.ReLU), oneDNN's int8 products
(torch.ops.onednn), onnxruntime and OpenVINO in int8, and onnxruntime's
MatMulNBits. The last three need packages that coarsegrad does not,
`pip install -e .[engines]`; what is not installed is skipped with a note.
"""
_EPILOG = f"""
Workloads: {"; ".join(f"{name}, {workload.label}" for name, workload in WORKLOADS.items())}.
Every engine takes the same float32 tensor and returns one; the conversions at
both ends are timed too.

Before anything is timed, outputs are compared: those of converted networks with
the reference's, bit for bit; those of other engines with what they are to compute,
within a tolerance below the change of one code in 100,000 (bfloat16 and
MatMulNBits, which round their inputs: 2% of the output). If one is off, no times
are reported. All take turns in one process, in a new order each round. A time is
the median over the rounds, with the 20% and 80% quantiles, of one thread by the
CPU time of the process, of several by the wall clock.

Weights are those stored, without what an engine packs for itself.
"""


@dataclass(frozen=True)
class Part:
    """What one process measures: a workload, and the names in ENGINES that take turns."""

    workload: str
    batches: tuple[int, ...]
    names: tuple[str, ...]
    rounds: int
    threads: int


# -------------------------------------------------------------------------------------- measuring


def _checked(name: str, subject: Subject, case: str) -> Prepared:
    """An engine set up for an input, called once and compared."""
    label = ENGINES[name].label
    try:
        prepared = ENGINES[name].prepare(subject)
        error = prepared.error()
    except Exception as cause:
        reason = str(cause).strip().partition("\n")[0]
        raise BenchError(f"{label} failed on {case} (--peers leaves peers out): {reason}") from cause
    if not error <= prepared.tolerance:
        raise BenchError(
            f"the output of {label} on {case} is off by {error:.2g} of its size, more than {prepared.tolerance:g};"
            " no times are reported"
        )
    return prepared


def _facts(threads: int) -> Row:
    here = facts(torch.device("cpu"), "keep") | {"instruction_sets": instruction_sets(), "versions": versions()}
    return here | ({"clock": "process CPU time"} if threads == 1 else {})


def _measure(part: Part) -> list[Row]:
    sys.stdout.reconfigure(line_buffering=True)  # also when piped
    torch.set_num_threads(part.threads)
    workload, network, here = WORKLOADS[part.workload], Network(WORKLOADS[part.workload]), _facts(part.threads)
    timer = CpuTimer(time.process_time)  # OpenVINO has threads of its own
    names = [name for name in part.names if ENGINES[name].suits(network)]
    found: list[Row] = []
    with (
        torch.no_grad(),
        tqdm(total=len(part.batches) * (len(names) + part.rounds), disable=None, leave=False) as progress,
    ):
        for batch in part.batches:
            torch._dynamo.reset()  # after some recompilations torch falls back to eager
            case, prepared = f"{workload.label}, batch {batch}", {}
            subject = Subject(network, network.input(batch), part.threads)
            for name in names:
                progress.set_description(f"{case}: {ENGINES[name].label}")
                prepared[name] = _checked(name, subject, case)
                progress.update()
            progress.set_description(case)
            jobs = {name: engine.run for name, engine in prepared.items()}
            rows = _rows(part.workload, batch, prepared, interleaved(jobs, timer, part.rounds, progress.update))
            progress.write(f"\n{case}\n\n{_table(rows)}")
            found += [{**row, **here} for row in rows]
    return found


# -------------------------------------------------------------------------------------- the report


def _rows(workload: str, batch: int, prepared: dict[str, Prepared], times: dict[str, Times]) -> list[Row]:
    base = quantiles(times[BASE].seconds)[1]
    rows = []
    for name, own in times.items():
        slow, _, fast = quantiles(own.speeds_over(times[BASE]))
        rows.append({
            "workload": workload, "batch": batch, "engine": name, **timed(own),
            f"speed_over_{BASE}": f"{base / quantiles(own.seconds)[1]:.4g}",
            f"speed_over_{BASE}_q20": f"{slow:.4g}", f"speed_over_{BASE}_q80": f"{fast:.4g}",
            "weight_bytes": prepared[name].weight_bytes,
        })  # fmt: skip
    return rows


def _table(rows: list[Row]) -> str:
    """Of one case: times, and how many times faster the converted networks are than each peer."""
    median = {row["engine"]: float(row["seconds_median"]) for row in rows}
    peers = [name for name in median if name in PEERS]
    header = ("", "ms", "(20% to 80%)", "weights, KiB", *(f"over {name}" for name in peers))
    lines = []
    for row in rows:
        name = row["engine"]
        low, middle, high = (1e3 * float(row[f"seconds_{q}"]) for q in ("q20", "median", "q80"))
        speeds = ("" if name in PEERS else f"{median[peer] / median[name]:.3g}" for peer in peers)
        size = f"{row['weight_bytes'] / 1024:,.0f}"
        lines.append((ENGINES[name].label, f"{middle:.4g}", f"({low:.4g} to {high:.4g})", size, *speeds))
    return format_table(header, lines)


# ------------------------------------------------------------------------------------ the command


def _names(args: argparse.Namespace) -> tuple[str, ...]:
    """Of the engines to time; says why others are left out."""
    compiled = (False,) if args.quick else (False, True)
    converted = [ours(bits, form) for bits in args.weight_bits for form in compiled]
    chosen = []
    for name in args.peers or PEERS:
        engine = PEERS[name]
        if missing := engine.missing():
            print(f"Skipped: {engine.label}: not installed: {', '.join(missing)} (pip install {' '.join(missing)})")
        elif not args.peers and (reason := engine.why_not()):
            print(f"Skipped: {engine.label}: {reason} (--peers {name} measures it)")
        elif not (args.quick and not args.peers and name == "compile"):
            chosen.append(name)
    return tuple([*converted, *(name for name in PEERS if name in chosen or name == BASE)])


def _batches(args: argparse.Namespace, workload: str) -> tuple[int, ...]:
    known = WORKLOADS[workload].batches
    return tuple(args.batches or (batch for batch in known if not args.quick or batch in (known[0], 128)))


def _choices(known: Iterable[object]) -> str:
    return f"some of {', '.join(map(str, known))} (default all)"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.inference", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer batches and rounds, and nothing compiled")
    add(
        "--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME", help=_choices(WORKLOADS)
    )  # fmt: skip
    default = "; ".join(f"{name} {' '.join(map(str, workload.batches))}" for name, workload in WORKLOADS.items())
    add("--batches", nargs="+", type=at_least(1), metavar="N", help=f"batches of all workloads (default {default})")
    add(
        "--weight-bits", nargs="+", type=int, choices=WEIGHT_BITS, default=list(WEIGHT_BITS), metavar="BITS",
        help=_choices(WEIGHT_BITS),
    )  # fmt: skip
    add(
        "--peers", nargs="+", choices=PEERS, metavar="NAME",
        help=f"{_choices(PEERS)[:-1]} that are installed and suit the CPU); always with {BASE} to compare with",
    )  # fmt: skip
    add("--rounds", type=at_least(5), metavar="N", help="measured rounds, at least 5 (default 15; with --quick 7)")
    add("--threads", type=at_least(1), default=1, metavar="N", help="threads of each engine (default 1)")
    add(
        "--out", type=Path, metavar="CSV",
        help=f"the results (default {os.path.relpath(RESULTS)}; none for a part of the measurements)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.out = results_file(parser, args, RESULTS)
    names, rounds = _names(args), args.rounds or (7 if args.quick else 15)
    rows: list[Row] = []
    try:
        for workload in args.workloads:
            part = Part(workload, _batches(args, workload), names, rounds, args.threads)
            rows += in_new_process("keep", _measure, part)
            if args.out:
                write_csv(rows, args.out)
    except (BenchError, OSError) as error:
        raise SystemExit(f"bench.inference: {error}") from error
    except KeyboardInterrupt:
        written = rows and args.out
        print("\nInterrupted.", f"{args.out} has the workloads that finished." if written else "Nothing was written.")
        raise SystemExit(130) from None
    if args.out:
        print(
            f"\nWritten: {args.out}. `python -m bench.report` draws it and writes docs/benchmarks.md from all results."
        )


if __name__ == "__main__":
    main()
