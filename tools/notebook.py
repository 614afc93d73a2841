"""`python -m tools.notebook docs/low-bit.ipynb` runs notebooks and writes what their cells print and show into them.

It needs no Jupyter, as the cells are plain Python.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch


def run(notebook: dict[str, Any], name: str) -> None:
    """Run the cells in turn, in one namespace, and replace their outputs. name: of the notebook, for tracebacks.

    Raises what a cell raises.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            shown = _execute("".join(cell["source"]), f"{name}, cell {number}", namespace)
        cell["execution_count"] = number
        cell["outputs"] = []
        if printed.getvalue():
            cell["outputs"].append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
        if shown is not None:
            data: dict[str, Any] = {"text/plain": _lines(repr(shown))}
            if hasattr(shown, "_repr_png_"):
                data = {"image/png": base64.b64encode(shown._repr_png_()).decode(), **data}
            result = {"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"}
            cell["outputs"].append(result)


def _execute(source: str, name: str, namespace: dict[str, Any]) -> Any:
    """Run a cell; returns the value of its last line, if that is an expression."""
    tree = ast.parse(source, name)
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    return None if last is None else eval(compile(last, name, "eval"), namespace)


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.notebook", description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="IPYNB", help="a notebook, which is written anew")
    torch.set_num_threads(1)
    for path in parser.parse_args(argv).notebooks:
        notebook = json.loads(path.read_text())
        run(notebook, path.name)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
