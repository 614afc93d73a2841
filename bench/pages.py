"""Pages of docs/ and the tables in them that commands write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from coarsegrad.experiments.files import replacing

from .timing import BenchError

DOCS = Path(__file__).parent.parent / "docs"
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(list(header)), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def write(path: Path, text: str) -> None:
    """Write a page whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())
    print(f"Written: {path}")


def filled(text: str, tables: Mapping[str, str]) -> str:
    """`text` with what stands between <!-- table: NAME --> and <!-- end of table --> replaced by tables[NAME].

    Blocks of other names stay as they are.
    """
    absent = tables.keys() - {match["name"] for match in _BLOCK.finditer(text)}
    if absent:
        raise BenchError(f"the page has no line <!-- table: {sorted(absent)[0]} -->")
    return _BLOCK.sub(
        lambda match: f"{match[1]}\n{tables[match['name']]}\n{match[3]}" if match["name"] in tables else match[0], text
    )


def fill(path: Path, tables: Mapping[str, str]) -> None:
    """Rewrite the blocks of a page."""
    write(path, filled(path.read_text(), tables))
