"""The directions in which files may depend on each other, and the compiler flags that may never be used."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "python" / "coarsegrad"
CSRC = ROOT / "csrc"

# A file imports only from files above it.
ORDER = (
    "_torch_internals",
    "ste",
    "reference",
    "_build",
    "_C",
    "_ops",
    "_autograd",
    "_fused",
    "packed",
    "triton",
    "backends",
    "_dtensor",
    "functional",
    "nn",
    "sources",
    "rewriting",
    "executions",
    "report",
    "surgery",
    "by_execution",
    "quantize",
    "histogram",
    "calibrate",
    "stats",
    "optim",
    "memory",
    "experiments",
    "testing",
    "__init__",
    "__main__",
)

TORCH_HEADER = re.compile(r"(torch|ATen|c10)/")


def _place(path: Path) -> str:
    """The entry of ORDER that a Python file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> list[tuple[str, str]]:
    """(place, name) for every name that a file of the package imports from the package, at any depth of the file."""
    package = ("coarsegrad", *path.relative_to(PACKAGE).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        found += [(name[1] if len(name) > 1 else "__init__", name[-1]) for name in names if name[0] == "coarsegrad"]
    return found


def _python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _native_files() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.is_file())


def _includes(path: Path) -> list[str]:
    """What a file includes; quoted names come as paths relative to csrc/."""
    found = []
    for quote, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE):
        found.append(name if quote == "<" else str((path.parent / name).resolve().relative_to(CSRC)))
    return found


def test_every_python_file_has_a_place():
    assert {_place(path) for path in _python_files()} <= set(ORDER)


@pytest.mark.parametrize("path", _python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_imports_go_up_the_order(path):
    place = _place(path)
    for other, name in _imports(path):
        # The version is a fact that the package's own file has before all else.
        allowed = place == other or name == "__version__" or ORDER.index(other) < ORDER.index(place)
        assert allowed, f"{place} may not import {name} from {other}"


def test_package_needs_nothing_beside_it():
    for path in _python_files():
        roots = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
        }
        assert not roots & {"tests", "bench", "oracle"}, path


def test_reference_calls_no_op_of_its_own_package():
    assert "torch.ops" not in (PACKAGE / "reference.py").read_text()


def test_math_headers_include_only_the_standard_library_and_each_other():
    headers = sorted((CSRC / "math").iterdir())
    assert headers
    for path in headers:
        for name in _includes(path):
            assert "/" not in name or name.startswith("math/"), f"{path.name} includes {name}"


def test_kernel_files_see_no_torch_header():
    queue = sorted((CSRC / "cpu").glob("isa_*.cpp"))
    assert len(queue) == 3
    seen = set()
    while queue:
        path = queue.pop()
        seen.add(path)
        for name in _includes(path):
            assert not TORCH_HEADER.match(name), f"{path.name} includes {name}"
            if (CSRC / name).is_file() and CSRC / name not in seen:
                queue.append(CSRC / name)
    assert CSRC / "math" / "ste.h" in seen


def test_devices_do_not_know_each_other():
    for path in _native_files():
        device = path.relative_to(CSRC).parts[0]
        for name in _includes(path):
            assert not (device == "cpu" and name.startswith("cuda/")), path
            assert not (device == "cuda" and name.startswith("cpu/")), path
        if path.name != "module.cpp":
            assert "WITH_CUDA" not in path.read_text(), path


def test_no_flag_that_changes_results():
    wrong = re.compile(
        r"-Ofast|-f(fast-math|unsafe-math-optimizations|associative-math|reciprocal-math|finite-math-only|no-signed-zeros)"
        r"|use_fast_math|-ffp-contract=(?!off)|pragma (GCC|clang) (optimize|fp)|__fast_math__"
    )
    files = [ROOT / "CMakeLists.txt", ROOT / "setup.py", ROOT / "build_backend.py", *_native_files()]
    for path in files:
        assert not wrong.search(path.read_text()), path
    assert "-ffp-contract=off" in (ROOT / "CMakeLists.txt").read_text()
