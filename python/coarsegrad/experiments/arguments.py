"""What the commands' options have in common."""

from __future__ import annotations

from collections.abc import Callable


def positive(kind: type) -> Callable[[str], float]:
    """The `type` of an option that takes a number of `kind`, finite and above 0."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # what argparse calls it in its message
    return parse
