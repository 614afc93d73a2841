"""Sphinx configuration. `make docs` builds the site into build/docs and treats every warning as an error."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "coarsegrad"
copyright = "the coarsegrad authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "notebooks",
    "repository_pages",
    "plain_docstrings",
]
exclude_patterns = ["_ext"]
highlight_language = "none"  # where a block does not name its language
smartquotes = False  # "ceil" is code

# `[text](page.md#heading)` resolves, and is checked, by the anchors that GitHub gives to headings.
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
add_module_names = False
default_role = "py:obj"

html_theme = "furo"
html_title = "coarsegrad"
html_copy_source = False
html_show_sphinx = False
