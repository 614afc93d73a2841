"""The notebooks in docs/ run, and show what is stored in them."""

from __future__ import annotations

import copy
import json
import re
import sys

import pytest
from paths import ROOT
from tools import notebook

from coarsegrad.integer import ops as integer_ops

pytestmark = pytest.mark.usefixtures("one_thread")
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))


def _outputs(content):
    """What each cell shows, without its numbers and the widths of its columns."""
    found = []
    for cell in content["cells"]:
        for output in cell.get("outputs", []):
            text = "".join(output.get("text") or output["data"]["text/plain"])
            text = re.sub(r"[\s-]+", " ", re.sub(r"\d[\d.,]*", "#", text))
            found.append((cell["id"], sorted(output.get("data", ())), text))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_shows_what_its_cells_do(path, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the figures")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(integer_ops.serving, "cpu", "native")  # pages show what is printed where all is built
    stored = json.loads(path.read_text())
    run = copy.deepcopy(stored)
    notebook.run(run, path.name)
    assert _outputs(run) == _outputs(stored)
    before, rounded, tuned, integers = (
        float(output["data"]["text/plain"][0].strip("'%"))
        for cell in run["cells"]
        for output in cell.get("outputs", [])
        if output.get("data", {}).get("text/plain", [""])[0].endswith("%'")
    )
    assert rounded + 1 < tuned < before and abs(integers - tuned) < 1


def test_the_runner_stores_what_is_printed_and_shown(tmp_path, monkeypatch):
    class Picture:
        def __repr__(self):
            return "a picture"

        def _repr_png_(self):
            return b"png"

    sources = ["x = 2\nprint('one\\ntwo')\nx", "x = None\nx", "", "shown"]
    cells = [{"cell_type": "code", "source": [line], "outputs": ["old"]} for line in sources]
    cells.insert(1, {"cell_type": "markdown", "source": ["x ="]})
    path = tmp_path / "small.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(sys, "argv", ["notebook", str(path)])
    monkeypatch.setattr("builtins.shown", Picture(), raising=False)
    notebook.main()
    first, _, second, empty, picture = json.loads(path.read_text())["cells"]
    assert first["outputs"][0] == {"name": "stdout", "output_type": "stream", "text": ["one\n", "two\n"]}
    assert first["outputs"][1]["data"] == {"text/plain": ["2"]} and first["execution_count"] == 1
    assert second["outputs"] == empty["outputs"] == []
    assert picture["outputs"][0]["data"] == {"image/png": "cG5n", "text/plain": ["a picture"]}
    with pytest.raises(ZeroDivisionError):
        notebook.run({"cells": [{"cell_type": "code", "source": ["1 / 0"]}]}, "bad")
