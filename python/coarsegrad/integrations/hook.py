"""Importing one module after another, whenever that is imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType


def after_import(module: str, ours: str) -> None:
    """Import `ours` as soon as somebody has imported `module`: now, if that is so already."""
    if module in sys.modules:
        _import(module, ours)
    else:
        sys.meta_path.insert(0, _Finder(module, ours))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what Python finds, and has `ours` imported after that is run for the first time."""

    def __init__(self, module: str, ours: str) -> None:
        self._module, self._ours = module, ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                run(module)
                _import(fullname, self._ours)

            vars(spec.loader)["exec_module"] = exec_module
        return spec


def _import(module: str, ours: str) -> None:
    """A package that we cannot work with works without us."""
    try:
        importlib.import_module(ours)
    except ImportError as error:
        warnings.warn(f"{module} is without coarsegrad: {error}", stacklevel=2)
