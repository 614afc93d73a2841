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
from .table_summary import summary
from .table_training import Session

_EPILOG = """
The runs are trained those of the most worth first, one after the other or --jobs
at once, which changes no number on a CPU. A run that is finished is
OUT/SCHEDULE/RUN/results.json and is not trained again, whatever machine it comes
from. The same command again goes on where it was stopped: in an unfinished run
after the last finished epoch, from its checkpoint.pt. The float network of each
seed is OUT/float-.../checkpoint.pt; where that is not there it is trained anew, to
the same weights on the same kind of machine with the same torch and number of
threads; a run's results say which weights it started from. That a run diverges is
a result. At the end, or with --report at any time: a table, and
OUT/runs.csv, OUT/accuracy-SCHEDULE.png and OUT/features-SCHEDULE.png.
"""


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Adds the options that all tables have to `parser`."""
    parser.epilog = _EPILOG
    add = parser.add_argument
    add(
        "--runs",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="only the runs whose name, SCHEDULE/RUN, has one of these patterns, as 'full/2bit-*' (default all)",
    )
    add("--list", action="store_true", help="print the names of the runs, and which are finished; train nothing")
    add("--report", action="store_true", help="make table and figures of the finished runs; train nothing")
    add("--device", default="cpu", help="as torch names it: cpu, cuda, cuda:1 (default cpu)")
    add("--threads", type=positive(int), metavar="N", help="threads on a CPU (default: torch's choice)")
    add(
        "--jobs",
        type=positive(int),
        default=1,
        metavar="N",
        help="runs that are trained at once, each in a thread (default 1)",
    )
    add("--out", type=Path, default=Path(out), metavar="FOLDER", help=f"results and checkpoints (default {out})")


def main(table: Table, command: str, args: argparse.Namespace) -> None:
    """Runs the command; ends it with a message and status 1 for what the user can mend, 130 after Ctrl-C."""
    with ending(command, f"Finished epochs are kept in {args.out}"):
        _run(table, args)


def _run(table: Table, args: argparse.Namespace) -> None:
    from . import table_figures  # slow to import: not for --help; and if it is missing, say so first

    runs = [run for run in table.runs if any(fnmatch.fnmatchcase(run.name, pattern) for pattern in args.runs)]
    if not runs:
        raise ExperimentError(f"--runs {' '.join(args.runs)} fits no run; --list prints their names")
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
    print("", args.out / "runs.csv", *table_figures.draw(table, results, args.out), sep="\n")
