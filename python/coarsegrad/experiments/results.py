"""`python -m coarsegrad results`: regenerates the tables of a page from the result files that it names."""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from . import cifar_table, finetune_report, mnist_table, rounding_report
from .files import ExperimentError, replacing
from .synthetic_summary import summary as synthetic_summary
from .table_figures import figure_paths
from .table_runs import Table, finished
from .table_summary import grid_summary
from .table_summary import summary as table_summary

_TABLES = {"mnist": mnist_table.TABLE, **cifar_table.TABLES}
_BLOCK = re.compile(r"(<!-- results: (?P<words>[^\n]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

_DESCRIPTION = """
Regenerates a page of results: replaces what is between two lines

    <!-- results: WORDS -->
    <!-- end of results -->

by the contents of the result files. WORDS is one of

    synthetic FOLDER              results of `coarsegrad synthetic --out FOLDER`
    finetune FOLDER               results of `coarsegrad finetune --out FOLDER`
    rounding FOLDER               results of `coarsegrad rounding --out FOLDER`
    TABLE FOLDER SCHEDULE         a schedule of `coarsegrad mnist-table` (TABLE mnist)
                                  or `cifar-table` (TABLE vgg11 or resnet20), --out FOLDER
    mnist FOLDER grid             the grid of `coarsegrad mnist-table --out FOLDER`

FOLDER is relative to the folder of the page. The rest of the page does not change.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m coarsegrad results` to `parser`."""
    parser.description = _DESCRIPTION
    parser.add_argument(
        "page",
        nargs="?",
        type=Path,
        default=Path("docs/experiments.md"),
        help="a Markdown file (default docs/experiments.md)",
    )


def main(args: argparse.Namespace) -> None:
    """Run the command. Exits with a message and status 1 for an error of the user."""
    try:
        text = args.page.read_text()
        new = render(text, args.page.parent)
        if new != text:
            with replacing(args.page) as file:
                file.write(new.encode())
        print(f"{args.page}: {'unchanged' if new == text else 'updated'}")
    except (ExperimentError, OSError) as error:
        raise SystemExit(f"coarsegrad results: {error}") from error


def render(text: str, folder: Path) -> str:
    """The page `text`, which is in `folder`, with its results regenerated from the files."""
    if not _BLOCK.search(text):
        raise ExperimentError("the page has no results: wanted a line like <!-- results: synthetic FOLDER -->")
    return _BLOCK.sub(lambda match: f"{match[1]}\n{_block(match['words'], folder)}\n{match[3]}", text)


def _block(words: str, folder: Path) -> str:
    match words.split():
        case ["synthetic", results]:
            return _indented(_read(folder / results, _synthetic))
        case ["finetune", results]:
            return _indented(_read(folder / results, finetune_report.summary))
        case ["rounding", results]:
            return _indented(_read(folder / results, rounding_report.summary))
        case [name, results, part] if name in _TABLES and part in _parts(_TABLES[name]):
            return _table(_TABLES[name], folder, results, part)
    raise ExperimentError(f"unknown words in <!-- results: {words} -->; --help lists what is possible")


def _read(folder: Path, summary: Callable[[dict], str]) -> str:
    path = folder / "results.json"
    try:
        return summary(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"{path} is not a results file of that command ({error!r})") from error


def _synthetic(report: dict) -> str:
    return "".join(list(synthetic_summary(report["results"]))[1:])


def _indented(text: str) -> str:
    return textwrap.indent(text, "    ") + "\n"


def _parts(table: Table) -> list[str]:
    return [*table.schedules, "grid"] if table.grid else list(table.schedules)


def _table(table: Table, folder: Path, results: str, part: str) -> str:
    done = finished(table, folder / results)
    paragraphs = list(grid_summary(table, done) if part == "grid" else table_summary(table, part, done))
    for title, path in figure_paths(folder / results, part).items():
        if path.exists():
            paragraphs.append(f"![{title}]({results}/{path.name})\n\n")
    return "".join(paragraphs).removesuffix("\n")
