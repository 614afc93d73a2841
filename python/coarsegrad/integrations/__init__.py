"""What other packages must know of coarsegrad. They are imported when they, or their part of this package, are used."""

import importlib
from typing import Any

from .hook import after_import

# name -> the file of this folder that has it, which needs another package
_LAZY = {"CoarseGradConfig": "transformers", "StatsCallback": "trainer"}

__all__ = [*_LAZY]

# transformers takes a second to import, and may be missing.
after_import("transformers.quantizers.auto", f"{__name__}.transformers")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
