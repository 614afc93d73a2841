"""The directions in which files may depend on each other, and the compiler flags that may never be used."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "python" / "coarsegrad"
CSRC = ROOT / "csrc"

# A file imports only from files and folders before it. A folder is a room: files outside import its __init__ alone.
# fmt: off
ORDER = {
    "coarsegrad": """
        _text  _types  _host  _inductor  _torch_internals  _estimators  ste  _checks  _alphas  reference
        _build  _C  _ops  _autograd  _inductor_gates  _signed  _weights  _fused  _mlp
        packing  _dtensor  functional  gated  mlp  weights  parametrization  integer  triton  backends  nn  signed
        norms  blocks  quantization  optim  memory  integrations  export  experiments  testing  __init__  __main__
    """.split(),
    "coarsegrad.packing": "saved  records  function  graphs  hooks  blocks  __init__".split(),
    "coarsegrad.blocks": "tags  conversion  norms  inputs  gates  attention  description  __init__".split(),
    "coarsegrad.reference": "bits  staircase  signed  norm  weights  __init__".split(),
    "coarsegrad.triton": """
        staircase  ste  kernels  qrelu  signed_kernels  signed  norm_kernels  norm  weight_kernels  weights
        layer_kernels  layers  mlp_kernels  mlp  __init__
    """.split(),
    "coarsegrad.integer": """
        weights  checks  reference  ops  exact  layers  trained  moves  pools  sums  flow  names  report  rewriting
        conversion  __init__
    """.split(),
    "coarsegrad.quantization": """
        relus  source  editing  rewriting  running  frames  recording  report  surgery  dynamic  weights  description
        quantize  histogram  counting  watching  inputs  figures  calibration  code_stats  __init__
    """.split(),
    "coarsegrad.export": """
        packages  numbers  nodes  pooling  forms  levels  qdq  qonnx  lowering  translations  onnx  __init__
    """.split(),
    "coarsegrad.integrations": "hook  transformers  trainer  torchao  torchtitan  __init__".split(),
    "coarsegrad.experiments": """
        files  arguments  download  measure  figures  processes  checkpoints  data  cifar  text  smollm2  models
        transformers  training  language  integers  mnist
        table_runs  table_training  table_summary  table_figures  table  mnist_table  cifar_table
        synthetic_summary  synthetic_figures  synthetic
        finetune_options  finetune_report  finetune  rounding_report  rounding_tasks  rounding  memory
        export  results  __init__
    """.split(),
}
# fmt: on

TORCH_HEADER = re.compile(r"(torch|ATen|c10)/")


def _module(path: Path) -> tuple[str, str]:
    """(room, name) of a Python file of the package."""
    *room, name = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(room), name


def _imports(path: Path) -> list[tuple[str, ...]]:
    """The dotted names that a file imports from the package, at any depth of the file."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            found += [(*base, alias.name) for alias in node.names]
    return [name for name in found if name[0] == "coarsegrad"]


def _why_not(path: Path, name: tuple[str, ...]) -> str:
    """Why a file may not import a dotted name; "" if it may."""
    own, depth = (*_module(path)[0].split("."), _module(path)[1]), 1
    while depth < len(own) - 1 and name[depth : depth + 1] == own[depth : depth + 1]:
        depth += 1
    room, rest = ".".join(own[:depth]), name[depth:]  # the innermost room that both are in
    order, other = ORDER[room], rest[0] if rest and rest[0] in ORDER[room] else "__init__"
    if rest == ("__version__",):  # a fact that the package's own file has before all else
        return ""
    if order.index(other) >= order.index(own[depth]):
        return f"{'.'.join(own)} may not import {'.'.join(name)}: {other} does not come before {own[depth]}"
    if len(rest) > 1 and rest[1] in ORDER.get(f"{room}.{other}", ()):
        return f"{'.'.join(own)} may not import {'.'.join(name)}, which is inside {room}.{other}"
    return ""


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
    for room, name in map(_module, _python_files()):
        assert name in ORDER[room], f"{room}.{name} is missing in ORDER"


@pytest.mark.parametrize("path", _python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_imports_go_up_the_order(path):
    for name in _imports(path):
        assert not (why := _why_not(path, name)), why


@pytest.mark.parametrize(
    "file, name, allowed",
    [
        ("packing/hooks.py", "coarsegrad.packing.saved.SavedTensor", True),
        ("packing/saved.py", "coarsegrad.packing.hooks.Packing", False),
        ("packing/saved.py", "coarsegrad.packing.Packing", False),
        ("quantization/code_stats.py", "coarsegrad.packing.packed_activations", True),
        ("quantization/code_stats.py", "coarsegrad.packing.saved.SavedTensor", False),
        ("packing/saved.py", "coarsegrad.quantization.stats", False),
        ("nn.py", "coarsegrad.functional.qrelu", True),
        ("nn.py", "coarsegrad.qrelu", False),
    ],
)
def test_the_order_sees_inside_rooms(file, name, allowed):
    assert (not _why_not(PACKAGE / file, tuple(name.split(".")))) == allowed


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


def _private_torch_names(path: Path) -> set[str]:
    """Names of torch with a part that begins with one underscore: imported, or reached from an imported name."""
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    bound, found = {"torch"}, set()
    for node in imports:
        for alias in node.names:
            name = alias.name if isinstance(node, ast.Import) else f"{'.' * node.level}{node.module}.{alias.name}"
            if name.split(".")[0] == "torch":
                bound.add((alias.asname or alias.name).split(".")[0])
                found.add(name)
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts, inner = [inner.attr, *parts], inner.value
        if isinstance(inner, ast.Name) and inner.id in bound:
            found.add(".".join([inner.id, *parts]))
    return {name for name in found if any(re.match(r"_[^_]", part) for part in name.split("."))}


def test_private_torch_names_are_in_one_file():
    """And Inductor's in two that are imported after Inductor."""
    files = {path.name: names for path in _python_files() if (names := _private_torch_names(path))}
    assert files.keys() == {"_torch_internals.py", "_inductor.py", "_inductor_gates.py"}, files


def test_reference_calls_no_op_of_its_own_package():
    assert all("torch.ops" not in path.read_text() for path in (PACKAGE / "reference").glob("*.py"))


def test_math_headers_include_only_the_standard_library_and_each_other():
    headers = sorted((CSRC / "math").iterdir())
    assert headers
    for path in headers:
        for name in _includes(path):
            assert "/" not in name or name.startswith("math/"), f"{path.name} includes {name}"


def test_kernel_files_see_no_torch_header():
    queue = sorted((CSRC / "cpu").glob("*/*.cpp"))
    assert {path.name for path in queue} == {"kernels.cpp", "signed.cpp", "integer.cpp"}
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
            assert "CG_HAVE_CUDA" not in path.read_text(), path


def test_no_flag_that_changes_results():
    wrong = re.compile(
        r"-Ofast|-f(fast-math|unsafe-math-optimizations|associative-math|reciprocal-math|finite-math-only|no-signed-zeros)"
        r"|use_fast_math|-(ftz|prec-div|prec-sqrt)=|-ffp-contract=(?!off)|pragma (GCC|clang) (optimize|fp)"
        r"|__fast_math__"
    )
    files = [ROOT / "CMakeLists.txt", ROOT / "setup.py", ROOT / "build_backend.py", *_native_files()]
    for path in files:
        assert not wrong.search(path.read_text()), path
    assert "-ffp-contract=off" in (ROOT / "CMakeLists.txt").read_text()
