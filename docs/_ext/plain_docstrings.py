"""Renders the package's docstrings, which are plain text, as reStructuredText.

An indented paragraph is a formula or code. In a paragraph that starts with `name: ...` every such line begins the
description of an argument (`alpha, bits: ...` describes two); indented lines continue it. All else is prose, in which
only `names in backticks` have a meaning.
"""

import re

from sphinx.application import Sphinx

_ARGUMENT = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][\w.]*")


def _inline(text: str) -> str:
    """Prose with names in backticks as references, other code in backticks as literals, and no other markup."""
    parts = re.split(r"`([^`]+)`", text)
    for i, part in enumerate(parts):
        if i % 2:
            code = f"`{part}`" if _NAME.fullmatch(part) else f"``{part}``"
            parts[i] = rf"\ {code}\ "  # escaped spaces, so that letters may follow
        else:
            parts[i] = re.sub(r"[\\*|_`]", r"\\\g<0>", part)
    return "".join(parts)


def _argument_list(lines: list[str]) -> list[str]:
    items: list[str] = []
    for line in lines:
        starts = not line.startswith(" ") and (_ARGUMENT.match(line) or not items or not _ARGUMENT.match(items[-1]))
        sentence = not line.startswith(" ") and not starts
        if starts or sentence:
            items.append(line)
        else:
            items[-1] += " " + line.strip()
    found = []
    for item in items:
        if match := _ARGUMENT.match(item):
            found.append(f":param {match[1]}: {_inline(match[2])}")
        else:
            found += ["", _inline(item), ""]
    return found


def to_rst(docstring: list[str]) -> list[str]:
    """The lines of a docstring, dedented, as lines of reStructuredText."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(docstring).strip("\n")):
        lines = paragraph.split("\n")
        if all(line.startswith("    ") for line in lines):
            found += ["::", "", *lines]
        elif _ARGUMENT.match(lines[0]):
            found += _argument_list(lines)
        else:
            # A formula may follow its sentence without a blank line between.
            prose = [line for line in lines if not line.startswith("    ")]
            code = lines[len(prose) :]
            found += [_inline(" ".join(prose))] + (["", "::", "", *code] if code else [])
        found.append("")
    return found


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = to_rst(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}
