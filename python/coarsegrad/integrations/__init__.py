"""What other packages must know of coarsegrad. They are imported when they, or their part of this package, are used."""

from typing import Any

from .hook import after_import

__all__ = ["CoarseGradConfig"]

# transformers takes a second to import, and may be missing.
after_import("transformers.quantizers.auto", f"{__name__}.transformers")


def __getattr__(name: str) -> Any:
    if name == "CoarseGradConfig":
        from .transformers import CoarseGradConfig

        return CoarseGradConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
