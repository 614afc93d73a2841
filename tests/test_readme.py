"""The code in the README and in docs/ runs, and the README's table of estimators is the registry's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import coarsegrad as cg
from coarsegrad.ste import BUILT_IN

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [
    block
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)
]
KEPT = {"nothing": "nothing", "positive": "1 bit", "inside": "1 bit", "x": "x"}


def test_there_are_blocks():
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_runs(block):
    handles = []
    register = cg.register_ste
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cg, "register_ste", lambda *args, **kwargs: handles.append(register(*args, **kwargs)))
        exec(block, {})
    for handle in handles:
        handle.close()


def test_the_table_of_estimators():
    rows = re.findall(r"^\| `(\w+)`.*\| (yes|no) \| (.*?) \|$", README, flags=re.MULTILINE)
    stes = cg.stes()
    assert rows == [(name, "yes" if stes[name].in_class else "no", KEPT[stes[name].needs]) for name in BUILT_IN]


def test_the_printed_comparison_of_the_docs(capsys):
    text = (ROOT / "docs" / "memory.md").read_text()
    block = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[-1]
    exec(block, {})
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    shown = [line.strip() for line in text.partition("prints\n\n")[2].splitlines()[: len(lines)]]
    assert [line.split() for line in shown] == [line.split() for line in lines]
