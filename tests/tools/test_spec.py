"""The tables of docs/spec.md are those of the package; its code blocks run in test_readme.py."""

from __future__ import annotations

import re

from paths import ROOT

import coarsegrad as cg
from coarsegrad._types import CODE_WIDTH
from coarsegrad.nn import half_gaussian_alpha
from coarsegrad.ste import ALPHA_GRADS, ROUNDINGS

SPEC = (ROOT / "docs" / "spec.md").read_text()


def table(first_column: str) -> list[list[str]]:
    """The rows of the table whose header starts with that."""
    lines = re.search(rf"^\| {re.escape(first_column)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", SPEC, flags=re.MULTILINE)[1]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines.splitlines()]


def names(first_column: str) -> list[str]:
    return [re.match(r"`(\w+)`", row[0])[1] for row in table(first_column)]


def test_coarse_gradients():
    rows = [(name, row[3], row[4]) for name, row in zip(names("ste"), table("ste"))]
    assert rows == [(ste.name, "yes" if ste.in_class else "no", ste.needs) for ste in cg.stes().values()]


def test_words_are_complete():
    assert names("rounding") == list(ROUNDINGS)
    assert set(names("alpha_grad")) == set(ALPHA_GRADS)


def test_best_alphas():
    assert table("bits")[0][0] == "1"
    for bits, *alphas in table("bits")[:8]:
        assert [f"{half_gaussian_alpha(int(bits), rounding):.4f}" for rounding in ("ceil", "hwgq", "nearest")] == alphas


def test_code_widths():
    header, widths = re.search(r"^\| bits \| (1 .*) \|\n.*\n\| width w \| (.*) \|$", SPEC, flags=re.MULTILINE).groups()
    assert dict(zip(map(int, header.split(" | ")), map(int, widths.split(" | ")))) == CODE_WIDTH


def test_sections_keep_their_numbers():
    """Comments in the sources cite them."""
    headings = re.findall(r"^## (\d\. .*)$", SPEC, flags=re.MULTILINE)
    assert headings == [
        "1. Levels and codes",
        "2. Coarse gradients",
        "3. The gradient of alpha",
        "4. What is saved for backward",
        "5. The signed staircase",
        "6. Integer layers",
        "7. Weights",
        "8. A norm and its staircase",
    ]
