"""Renders the notebooks in docs/ as pages: their text, code, and the outputs that are stored in them.

Nothing is run: `python -m tools.notebook` writes the outputs.
"""

import json
import re

from myst_parser.sphinx_ import Parser
from sphinx.application import Sphinx


def to_markdown(notebook: dict) -> str:
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_fenced(source, "python"))
        for output in cell["outputs"]:
            image = output.get("data", {}).get("image/png")
            if image is not None:
                parts.append(f'<img src="data:image/png;base64,{image}" alt="the figure that the cell above draws">')
            else:
                parts.append(_fenced("".join(output.get("text") or output["data"]["text/plain"]).rstrip("\n"), "text"))
    return "\n\n".join(parts) + "\n"


def _fenced(text: str, language: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


class NotebookParser(Parser):
    supported = ("notebook",)


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    if app.env.doc2path(page).suffix == ".ipynb":
        source[0] = to_markdown(json.loads(source[0]))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    app.connect("source-read", _read, priority=400)  # before links are adapted
    return {"parallel_read_safe": True}
