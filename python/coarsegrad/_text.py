"""Text for errors and reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def one_of(argument: str, got: object, known: Iterable[str]) -> str:
    """The error message for an unknown name."""
    return f"unknown {argument} {got!r}, must be one of {', '.join(map(repr, known))}"


def format_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of text as a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)
