"""The code in the README and in docs/ runs, and the README's table of estimators is the registry's."""

from __future__ import annotations

import re
import textwrap

import pytest
from paths import ROOT

import coarsegrad as cg
from coarsegrad.ste import BUILT_IN

PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
# A block, and the indented lines that it prints, where the page shows them.
BLOCK = re.compile(r"^```python\n((?:.*\n)*?)```\n(?:\nprints\n\n((?:    .*\n|\n)+))?", flags=re.MULTILINE)
KEPT = {"nothing": "nothing", "positive": "1 bit", "inside": "1 bit", "x": "x"}


def test_there_are_blocks():
    assert {name for name, text in PAGES.items() if BLOCK.search(text)} == {"README.md", "fine-tuning.md", "memory.md"}


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if BLOCK.search(text)])
def test_the_blocks_of_a_page_run_and_print_what_it_shows(page, monkeypatch, request, tmp_path, capsys):
    """One after the other, as somebody would who follows the page."""
    namespace, register = {}, cg.register_ste
    monkeypatch.setattr(cg, "register_ste", lambda *args: request.addfinalizer(register(*args).close))
    monkeypatch.chdir(tmp_path)
    for match in BLOCK.finditer(PAGES[page]):
        line = PAGES[page].count("\n", 0, match.start())
        exec(compile("\n" * (line + 1) + match[1], page, "exec"), namespace)
        printed = capsys.readouterr().out
        if match[2]:
            shown = textwrap.dedent(match[2]).strip("\n")
            assert [row.split() for row in printed.splitlines()] == [row.split() for row in shown.splitlines()]


def test_the_table_of_estimators():
    rows = re.findall(r"^\| `(\w+)`.*\| (yes|no) \| (.*?) \|$", PAGES["README.md"], flags=re.MULTILINE)
    stes = cg.stes()
    assert rows == [(name, "yes" if stes[name].in_class else "no", KEPT[stes[name].needs]) for name in BUILT_IN]
