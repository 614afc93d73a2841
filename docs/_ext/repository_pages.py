"""Lets pages link to the repository: the site works, and the same Markdown still works in a checkout.

A link that leaves docs/ becomes a link to the page that shows that file (README.md, CONTRIBUTING.md, CHANGELOG.md), or
plain text if no page does. A target that does not exist is a warning, hence an error in `make docs`.
"""

import os.path
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).parent.parent
ROOT = DOCS.parent
# page -> the file at the root of the repository that it shows
SHOWN = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}

_CODE = re.compile(r"(^```.*?^```$|^    [^\n]*$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_logger = logging.getLogger(__name__)


def adapt(text: str, folder: Path, page: str) -> str:
    """The text of a Markdown file in `folder`, with its links as seen from docs/."""

    def link(match: re.Match) -> str:
        image, label, target, anchor = match.groups()
        if "://" in target:
            return match[0]
        path = (folder / target).resolve()
        if not path.exists():
            _logger.warning("link to a missing file: %s", target, location=page)
        pages = {ROOT / file: DOCS / f"{name}.md" for name, file in SHOWN.items()}
        path = pages.get(path, path)
        if image or path.is_relative_to(DOCS):
            return f"{image}[{label}]({os.path.relpath(path, DOCS)}{anchor or ''})"
        return label

    parts = _CODE.split(text)
    return "".join(part if i % 2 else _LINK.sub(link, part) for i, part in enumerate(parts))


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    if page in SHOWN:
        file = ROOT / SHOWN[page]
        app.env.note_dependency(str(file))
        source[0] = adapt(file.read_text(), ROOT, page) + "\n" + source[0]
    else:
        source[0] = adapt(source[0], DOCS, page)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True}
