"""The command of a table of runs: one network, trained in float and then with many kinds of low-bit activations."""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path

import torch

from .arguments import ending, positive, usable_device
from .files import ExperimentError
from .measure import environment
from .table_runs import Table, finished, read_results, write_csv
from .table_summary import grid_summary, summary
from .table_training import Session

_EPILOG = """
Runs are trained in order of importance, one after the other or --jobs at a time,
which does not change results on a CPU. A finished run is the file
OUT/SCHEDULE/RUN/results.json and is not trained again, whatever machine it comes
from. Running the same command again continues where it was stopped; an unfinished
run continues after its last finished epoch, from its checkpoint.pt. The float
network of each seed is OUT/float-.../checkpoint.pt. If it is missing it is trained
again, with the same weights on the same kind of machine with the same torch and
number of threads; the results of a run record which weights it started from.
Divergence is a result. At the end, or at any time with --report, the command
prints tables and writes OUT/runs.csv and figures.
"""


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options that all tables share to `parser`."""
    parser.epilog = _EPILOG
    add = parser.add_argument
    add(
        "--runs",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="only the runs whose name, SCHEDULE/RUN, matches a pattern, such as 'full/2bit-*' (default all)",
    )
    add("--list", action="store_true", help="print the names of the runs, and which are finished, without training")
    add("--report", action="store_true", help="write table and figures of the finished runs, without training")
    add("--device", default="cpu", help="a torch device: cpu, cuda, cuda:1 (default cpu)")
    add("--threads", type=positive(int), metavar="N", help="threads on a CPU (default: torch's choice)")
    add(
        "--jobs",
        type=positive(int),
        default=1,
        metavar="N",
        help="runs to train at a time, each in a thread (default 1)",
    )
    add("--out", type=Path, default=Path(out), metavar="FOLDER", help=f"results and checkpoints (default {out})")


def main(table: Table, command: str, args: argparse.Namespace) -> None:
    """Run the command. Exits with a message and status 1 for an error of the user, with 130 after Ctrl-C."""
    with ending(command, f"Finished epochs are saved in {args.out}"):
        _run(table, args)


def _run(table: Table, args: argparse.Namespace) -> None:
    from . import table_figures  # slow to import: not for --help; fails early if missing

    runs = [run for run in table.all_runs if any(fnmatch.fnmatchcase(run.name, pattern) for pattern in args.runs)]
    if not runs:
        raise ExperimentError(f"--runs {' '.join(args.runs)} matches no run; --list prints their names")
    if args.list:
        done = {run for run, _ in finished(table, args.out)}
        print("\n".join(f"{run.name}{'  finished' if run in done else ''}" for run in runs))
        return
    if not args.report:
        device = usable_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        train, test, sha256 = table.load(args.data)
        session = Session(table, args.out, train.to(device), test.to(device), sha256, device, environment(device))
        session.train_all([run for run in runs if read_results(table, run, args.out, sha256) is None], args.jobs)
    results = finished(table, args.out)
    if not results:
        raise ExperimentError(f"no run is finished in {args.out}")
    write_csv(results, args.out / "runs.csv")
    print(f"\n{table.title}")
    for schedule in table.schedules:
        print("\n", *summary(table, schedule, results), sep="")
    if table.grid:
        print("\n", *grid_summary(table, results), sep="")
    print("", args.out / "runs.csv", *table_figures.draw(table, results, args.out), sep="\n")
