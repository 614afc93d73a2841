"""The code in the README and in docs/ runs, and prints what the pages show."""

from __future__ import annotations

import re
import textwrap

import pytest
from paths import ROOT

import coarsegrad as cg
from coarsegrad.integer import ops as integer_ops

PAGES = {path.name: path.read_text() for path in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")))}
# A block, and the indented lines that it prints, where the page shows them.
BLOCK = re.compile(r"^```python\n((?:.*\n)*?)```\n(?:\nprints\n\n((?:    .*\n|\n)+))?", flags=re.MULTILINE)
PAGES_WITH_CODE = {
    "README.md",
    "blocks.md",
    "estimators.md",
    "fine-tuning.md",
    "guide.md",
    "hosts.md",
    "hugging-face.md",
    "integer.md",
    "memory.md",
    "onnx.md",
    "spec.md",
    "weights.md",
}


def test_there_are_blocks():
    assert {name for name, text in PAGES.items() if BLOCK.search(text)} == PAGES_WITH_CODE


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if BLOCK.search(text)])
def test_the_blocks_of_a_page_run_and_print_what_it_shows(page, monkeypatch, request, tmp_path, capsys):
    """One after the other, as somebody would who follows the page."""
    namespace, register = {}, cg.register_ste
    monkeypatch.setattr(cg, "register_ste", lambda *args: request.addfinalizer(register(*args).close))
    monkeypatch.setitem(integer_ops.serving, "cpu", "native")  # pages show what is printed where all is built
    monkeypatch.chdir(tmp_path)
    for match in BLOCK.finditer(PAGES[page]):
        line = PAGES[page].count("\n", 0, match.start())
        exec(compile("\n" * (line + 1) + match[1], page, "exec"), namespace)
        printed = capsys.readouterr().out
        if match[2]:
            shown = textwrap.dedent(match[2]).strip("\n")
            assert [row.split() for row in printed.splitlines()] == [row.split() for row in shown.splitlines()]


def test_the_first_code_of_the_readme_comes_early():
    assert len(PAGES["README.md"].split("```")[0].split()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    names = re.findall(r"`((?:bench|csrc|docs|python|tests|tools)/[\w./-]+)`", PAGES[page])
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_demo_has_the_rows_that_the_docs_show():
    (rows,) = re.findall(r"^    -----.*\n((?:    .+\n)+)", PAGES["install.md"], flags=re.MULTILINE)
    demo = (ROOT / "python" / "coarsegrad" / "experiments" / "mnist.py").read_text()
    labels = [re.split(r"\s{2,}", row.strip())[0] for row in rows.splitlines()]
    assert len(labels) == 6 and all(f'("{label}"' in demo for label in labels)
