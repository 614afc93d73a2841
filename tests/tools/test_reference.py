"""docs/reference.md has every public name, and every name in it exists and has a docstring."""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType

from paths import ROOT

import coarsegrad as cg

PAGE = (ROOT / "docs" / "reference.md").read_text()
DOCUMENTED = re.findall(r"^\.\. auto(?:function|class):: ([\w.]+)$", PAGE, flags=re.MULTILINE)


def test_every_public_name_is_in_the_reference():
    public = {f"coarsegrad.{name}" for name in cg.__all__ if not isinstance(getattr(cg, name), ModuleType)}
    defined = (name for name, value in vars(cg.nn).items() if getattr(value, "__module__", None) == cg.nn.__name__)
    public |= {f"coarsegrad.nn.{name}" for name in defined if not name.startswith("_")} - {"coarsegrad.nn.QReLU"}
    assert public <= set(DOCUMENTED)
    assert len(DOCUMENTED) == len(set(DOCUMENTED))


def test_every_name_in_the_reference_exists_and_is_documented():
    for full_name in DOCUMENTED:
        module, name = full_name.rsplit(".", 1)
        assert inspect.getdoc(getattr(importlib.import_module(module), name)), full_name
