"""The packages that an export to ONNX needs, and coarsegrad does not."""

from __future__ import annotations

import importlib.util

_PACKAGES = ("onnx", "onnxscript")


def check_packages() -> None:
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ImportError(f"ONNX export needs {' and '.join(missing)}: pip install {' '.join(_PACKAGES)}")
