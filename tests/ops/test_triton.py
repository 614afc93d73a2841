"""The Triton backend: who gets it, that its lists are complete, and that it computes what the reference does.

The kernels run in Triton's interpreter, which has to be asked for before triton is imported: in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from paths import ROOT, TESTS

import coarsegrad as cg
from coarsegrad import _mlp, _ops, integer
from coarsegrad.backends import _serving

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*arguments, interpret=True, **environment):
    settings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    settings.pop("TRITON_INTERPRET", None)
    if interpret:
        settings["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *arguments], env=settings, capture_output=True, text=True, cwd=TESTS)


@pytest.mark.costly
@needs_triton
def test_in_the_interpreter():
    """The files triton_*.py; opcheck, and tests of the signed staircase and of an own STE, with Triton serving."""
    # The largest sums are long, and of the interpreter's own arithmetic. It has no threads.
    chosen = "triton and not largest_sums and not threads and not any_groups"
    options = ["-q", "-p", "no:cacheprovider", "-k", chosen, "--no-header", "-rf"]
    files = (
        "triton_interpreted.py", "triton_signed.py", "triton_weights.py", "triton_norm.py", "triton_gpu_arithmetic.py",
        "triton_mlp.py", "triton_inductor.py",
        "ops/test_ops.py::test_opcheck", "ops/test_signed.py", "ops/test_ste_registry.py",
        "integer/test_integer_ops.py",
    )  # fmt: skip
    done = run("-W", "ignore", "-m", "pytest", *options, *files)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d{3,} passed", done.stdout), done.stdout[-2000:]


@needs_triton
def test_a_gpu_is_served_by_triton_where_there_is_nothing_native():
    table = _serving("cuda")
    if _ops.why_not_native("cuda") is None:
        assert table.backend == "native" and table.why_not["triton"] == "native comes first"
    else:
        assert table.backend == "triton"
    for device in ("CUDA", "XPU"):
        for op in (*_ops.KERNELS, *integer.KERNELS, *_mlp.KERNELS):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"coarsegrad::{op}", device), (op, device)


def test_a_gpu_without_triton_runs_integer_layers_on_the_reference_and_is_told(tmp_path):
    code = """
import warnings, torch
from coarsegrad import integer
from coarsegrad.backends import _triton_layer_kernel
integer.serving["cpu"] = "triton"
kernel = _triton_layer_kernel("integer_quantize")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        codes = kernel(torch.tensor([0.3]), torch.tensor([0.5]), 1, "ceil", None)
        print(codes.tolist(), integer.integer_kernels("cpu"))
print(*[w.message for w in caught if "integer layers" in str(w.message)], sep="\\n")
"""
    done = broken_triton(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[1] reference\n[1] reference\n")
    assert done.stdout.count("integer layers run in plain torch") == 1


@needs_triton
def test_a_cpu_is_not():
    assert cg.backends()["cpu"].backend != "triton"
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert "TRITON_INTERPRET=1" in cg.backends()["cpu"].why_not["triton"]
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            cg.use_backend("triton")


@needs_triton
def test_in_the_interpreter_it_serves_a_cpu_where_it_is_asked_for():
    code = """
import coarsegrad as cg, sys
assert "triton" not in sys.modules
serving = cg.backends()["cpu"]
print(serving.backend, "|", serving.why_not["triton"])
with cg.use_backend("triton"):
    print(cg.backends()["cpu"].backend, "|", cg.backends()["cpu"].detail)
    assert "coarsegrad.triton" in sys.modules
"""
    for native in ("auto", "0"):
        done = run("-c", code, COARSEGRAD_NATIVE=native)
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.splitlines()
        assert not first.startswith("triton") and "use_backend('triton')" in first
        assert second == "triton | its interpreter"


def broken_triton(tmp_path, *arguments):
    """Python code with a triton that cannot be imported."""
    (tmp_path / "triton.py").write_text("raise ImportError('undefined symbol: _Zxyz')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "python")])
    return run(*arguments, PYTHONPATH=path)


def test_a_triton_that_does_not_load_is_told(tmp_path):
    done = broken_triton(tmp_path, "-c", "import coarsegrad as cg; cg.use_backend('triton')")
    assert done.returncode != 0 and "RuntimeError" in done.stderr and "undefined symbol: _Zxyz" in done.stderr


def test_a_gpu_without_triton_runs_on_the_reference_and_is_told_why(tmp_path):
    """The kernel that a GPU tensor comes to, called with CPU tensors."""
    code = """
import warnings, torch
from coarsegrad.backends import _triton_kernel
kernel = _triton_kernel("qrelu_codes")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        print(kernel(torch.tensor([0.3]), torch.tensor([0.5]), 1, "ceil", None).tolist())
print(*[w.message for w in caught if "coarsegrad" in str(w.message)], sep="\\n")
"""
    done = broken_triton(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[1]\n[1]\n")
    assert done.stdout.count("runs on its plain-torch reference") == 1
    assert "Triton: its import failed: undefined symbol: _Zxyz" in done.stdout


@needs_triton
def test_no_ste_and_no_rule_is_missing_from_any_of_the_three_lists():
    from coarsegrad.triton import ste as mirror

    assert tuple(mirror.STES) == cg.ste.BUILT_IN
    assert tuple(mirror.ALPHA_GRADS) == cg.ste.ALPHA_GRADS
    if _ops.native is not None:
        assert tuple(_ops.native.stes()) == tuple(mirror.STES)
        assert tuple(_ops.native.alpha_grads()) == tuple(mirror.ALPHA_GRADS)


def test_register_ste_refuses_what_is_no_triton_function():
    for wrong in (3, lambda u, q: u, "relu"):
        with pytest.raises(TypeError, match="triton must be a @triton.jit function"):
            cg.register_ste("own", lambda u, q: torch.ones_like(u), triton=wrong)
    assert "own" not in cg.stes()


def test_triton_is_imported_in_its_package_alone():
    package = ROOT / "python" / "coarsegrad"
    for path in package.rglob("*.py"):
        if path.parent.name != "triton":
            assert not re.search(r"^\s*(import triton|from triton)\b", path.read_text(), re.MULTILINE), path
