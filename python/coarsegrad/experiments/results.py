"""`python -m coarsegrad results`: makes the tables of a page anew from the result files that it names."""

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
from .table_runs import finished
from .table_summary import summary as table_summary

_TABLES = {"mnist": mnist_table.TABLE, **cifar_table.TABLES}
_BLOCK = re.compile(r"(<!-- results: (?P<words>[^\n]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

_DESCRIPTION = """
Writes a page of results anew: between each two lines

    <!-- results: WORDS -->
    <!-- end of results -->

comes what the result files say now. WORDS is one of

    synthetic FOLDER              what `coarsegrad synthetic --out FOLDER` left
    finetune FOLDER               what `coarsegrad finetune --out FOLDER` left
    rounding FOLDER               what `coarsegrad rounding --out FOLDER` left
    TABLE FOLDER SCHEDULE         a schedule of `coarsegrad mnist-table` (TABLE mnist)
                                  or `cifar-table` (TABLE vgg11 or resnet20), --out FOLDER

FOLDER is relative to the page's own. All else on the page stays as it is.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m coarsegrad results` to `parser`."""
    parser.description = _DESCRIPTION
    parser.add_argument(
        "page",
        nargs="?",
        type=Path,
        default=Path("docs/experiments.md"),
        help="a Markdown file (default docs/experiments.md)",
    )


def main(args: argparse.Namespace) -> None:
    """Runs the command; ends it with a message and status 1 for what the user can mend."""
    try:
        text = args.page.read_text()
        new = render(text, args.page.parent)
        if new != text:
            with replacing(args.page) as file:
                file.write(new.encode())
        print(f"{args.page}: {'as it was' if new == text else 'written anew'}")
    except (ExperimentError, OSError) as error:
        raise SystemExit(f"coarsegrad results: {error}") from error


def render(text: str, folder: Path) -> str:
    """The page `text`, which lies in `folder`, with its results as the files have them now."""
    if not _BLOCK.search(text):
        raise ExperimentError("the page has no results: wanted lines as <!-- results: synthetic FOLDER -->")
    return _BLOCK.sub(lambda match: f"{match[1]}\n{_block(match['words'], folder)}\n{match[3]}", text)


def _block(words: str, folder: Path) -> str:
    match words.split():
        case ["synthetic", results]:
            return _indented(_read(folder / results, _synthetic))
        case ["finetune", results]:
            return _indented(_read(folder / results, finetune_report.summary))
        case ["rounding", results]:
            return _indented(_read(folder / results, rounding_report.summary))
        case [name, results, schedule] if name in _TABLES and schedule in _TABLES[name].schedules:
            return _table(name, folder, results, schedule)
    raise ExperimentError(f"unknown words in <!-- results: {words} -->; --help tells what there may be")


def _read(folder: Path, summary: Callable[[dict], str]) -> str:
    path = folder / "results.json"
    try:
        return summary(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"{path} is no results file of that command ({error!r})") from error


def _synthetic(kept: dict) -> str:
    return "".join(list(synthetic_summary(kept["results"]))[1:])


def _indented(text: str) -> str:
    return textwrap.indent(text, "    ") + "\n"


def _table(name: str, folder: Path, results: str, schedule: str) -> str:
    table = _TABLES[name]
    paragraphs = list(table_summary(table, schedule, finished(table, folder / results)))
    for title, path in figure_paths(folder / results, schedule).items():
        if path.exists():
            paragraphs.append(f"![{title}]({results}/{path.name})\n\n")
    return "".join(paragraphs).removesuffix("\n")
