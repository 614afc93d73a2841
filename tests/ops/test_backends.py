"""Which backend serves: what the library says of it, how a person chooses, what COARSEGRAD_NATIVE does."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from paths import TESTS

import coarsegrad as cg
from coarsegrad import _ops, reference
from coarsegrad._host import usable_cores

PACKAGE = Path(cg.__file__).parent
needs_native = pytest.mark.skipif(_ops.native is None, reason=f"native library not in use: {_ops.native_why_not}")


def run_python(code, native, path=PACKAGE.parent):
    """`python -c code` with COARSEGRAD_NATIVE=native (None: not set), the package taken from `path`."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    environment.pop("COARSEGRAD_NATIVE", None)
    if native is not None:
        environment["COARSEGRAD_NATIVE"] = native
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


USE_IT = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import coarsegrad as cg
    from coarsegrad.backends import info
    x = torch.tensor([-1.0, 0.3, 0.7, 9.0], requires_grad=True)
    for _ in range(2):
        y = cg.qrelu(x, torch.tensor([0.5]), 2)
    y.sum().backward()
print(y.tolist(), x.grad.tolist())
print("served by", cg.backends()["cpu"].backend)
print("warnings:", *[str(w.message) for w in caught if "coarsegrad" in str(w.message)], sep="\\n  ")
print(info())
"""
RESULT = "[0.0, 0.5, 1.0, 1.5] [0.0, 1.0, 1.0, 0.0]"


@pytest.fixture
def without_native(tmp_path):
    """A folder with the package as it is before anything is compiled."""
    shutil.copytree(PACKAGE, tmp_path / "coarsegrad", ignore=shutil.ignore_patterns("_C*", "_build.py", "__pycache__"))
    return tmp_path


def test_the_table():
    table = cg.backends()
    assert "cpu" in table
    serving = table["cpu"]
    assert serving.backend == ("reference" if _ops.native is None else "native")
    other = "native" if _ops.native is None else "reference"
    assert serving.why_not[other]
    for word in ("cpu", "native", "reference"):
        assert word in str(table)


def test_use_backend_switches_and_switches_back(monkeypatch):
    calls = []
    real = reference.qrelu_forward
    monkeypatch.setattr(reference, "qrelu_forward", lambda *args: calls.append(1) or real(*args))
    x, alpha = torch.randn(9), torch.tensor([0.5])
    default = cg.backends()["cpu"].backend
    with cg.use_backend("reference"):
        assert cg.backends()["cpu"].backend == "reference"
        cg.qrelu(x, alpha, 2)
        assert len(calls) == 1, "the reference really ran"
        with cg.use_backend(default):
            assert cg.backends()["cpu"].backend == default
        assert cg.backends()["cpu"].backend == "reference"
        cg.qrelu(x, alpha, 2)
        assert len(calls) == 2
    assert cg.backends()["cpu"].backend == default
    with pytest.raises(KeyError), cg.use_backend("reference"):
        raise KeyError
    assert cg.backends()["cpu"].backend == default


@needs_native
def test_native_really_serves(monkeypatch):
    def unexpected(*args):
        raise AssertionError("the reference was called")

    for name in _ops.KERNELS.values():
        monkeypatch.setattr(reference, name, unexpected)
    x, alpha = torch.randn(9, requires_grad=True), torch.tensor([0.5], requires_grad=True)
    for block in (cg.use_backend("native"), cg.use_backend("native")):
        with block:
            for ste in oracle.STES:
                cg.qrelu(x, alpha, 2, ste=ste, alpha_grad="exact").sum().backward()
            cg.dequantize(cg.qrelu_codes(x, alpha, 2), alpha, 2, (9,), torch.float32)
            cg.qrelu(x.detach().clone(), alpha.detach(), 2, inplace=True)


def test_use_backend_bad_names():
    for wrong in ("no_such", "", None):
        with pytest.raises(ValueError, match="(?s)native.*reference"):
            cg.use_backend(wrong)
    if _ops.native is None:
        with pytest.raises(RuntimeError, match=f"(?s){re.escape(_ops.native_why_not)}.*reference"):
            cg.use_backend("native")


@needs_native
def test_every_instruction_set_gives_the_same_bits():
    """Beyond the oracle's word on each: masked gradients and kept bits are equal from one to the next."""
    x = torch.randn(2, 37, 11, 13, generator=torch.Generator().manual_seed(0))
    alpha = oracle.log_uniform(37, 0.1, 1, seed=0)
    before, results = _ops.native.isa(), []
    assert set(_ops.native.isas()) <= {"default", "avx2", "avx512", "neon"} and "default" in _ops.native.isas()
    try:
        for isa in _ops.native.isas():
            _ops.native.set_isa(isa)
            assert _ops.native.isa() == isa
            leaf = x.clone().requires_grad_()
            y = cg.qrelu(leaf, alpha, 3, channel_dim=1)
            y.backward(x)
            results.append((y.detach(), leaf.grad, cg.qrelu_codes(x, alpha, 3, channel_dim=1)))
        for wrong in ("avx1024", ""):
            with pytest.raises((RuntimeError, ValueError)):
                _ops.native.set_isa(wrong)
    finally:
        _ops.native.set_isa(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_switched_off_by_the_environment():
    """COARSEGRAD_NATIVE=0: the reference serves, by request, hence without a warning."""
    done = run_python(USE_IT, "0")
    assert done.returncode == 0, done.stderr
    assert RESULT in done.stdout and "served by reference" in done.stdout
    assert "COARSEGRAD_NATIVE=0" in done.stdout
    assert "warnings:\n  \n" in done.stdout or "warnings:\ncoarsegrad" in done.stdout, done.stdout


@needs_native
def test_demanded_by_the_environment():
    done = run_python(USE_IT, "1")
    assert done.returncode == 0, done.stderr
    assert RESULT in done.stdout and "served by native" in done.stdout
    assert torch.__version__ in done.stdout and _ops.native.isa() in done.stdout


def test_demanded_but_absent(without_native):
    done = run_python("import coarsegrad", "1", without_native)
    assert done.returncode != 0
    assert "ImportError" in done.stderr and "COARSEGRAD_NATIVE=1" in done.stderr and "not built" in done.stderr


def test_absent_is_said_once_and_all_runs(without_native):
    """Not built: it runs on the reference, warns once, and info gives the reason."""
    done = run_python(USE_IT, None, without_native)
    assert done.returncode == 0, done.stderr
    assert RESULT in done.stdout and "served by reference" in done.stdout
    assert done.stdout.count("runs on its plain-torch reference") == 1
    assert "not built" in done.stdout


def test_an_extension_for_another_torch_is_refused(without_native):
    """Both versions and the mending command, never a crash: the library is not even opened."""
    (without_native / "coarsegrad" / "_build.py").write_text('TORCH_VERSION = "1.2.3"\nREASON = None\n')
    (without_native / "coarsegrad" / "_C.py").write_text("raise SystemExit('it was opened')\n")
    done = run_python(USE_IT, None, without_native)
    assert done.returncode == 0, done.stderr
    assert RESULT in done.stdout
    for word in ("1.2.3", torch.__version__, f"ends in +torch{torch.__version__.split('+')[0]},", "pip install"):
        assert word in done.stdout
    done = run_python("import coarsegrad", "1", without_native)
    assert done.returncode != 0 and "ImportError" in done.stderr
    for word in ("1.2.3", torch.__version__, "pip install"):
        assert word in done.stderr


def test_an_extension_with_kernels_for_another_cuda_is_refused(without_native):
    (without_native / "coarsegrad" / "_build.py").write_text(
        f'TORCH_VERSION = "{torch.__version__}"\nCUDA_VERSION = "1.0"\n'
    )
    (without_native / "coarsegrad" / "_C.py").write_text("raise SystemExit('it was opened')\n")
    done = run_python(USE_IT, None, without_native)
    assert done.returncode == 0, done.stderr
    assert RESULT in done.stdout
    for word in ("CUDA 1.0", f"CUDA: {torch.version.cuda}", "pip install"):
        assert word in done.stdout


def test_an_extension_that_does_not_load_is_told(without_native):
    (without_native / "coarsegrad" / "_build.py").write_text(f'TORCH_VERSION = "{torch.__version__}"\nREASON = None\n')
    (without_native / "coarsegrad" / "_C.py").write_text("raise ImportError('undefined symbol: _Zxyz')\n")
    done = run_python(USE_IT, None, without_native)
    assert done.returncode == 0, done.stderr
    assert RESULT in done.stdout and "undefined symbol: _Zxyz" in done.stdout


def test_a_word_that_is_none_of_the_three():
    done = run_python("import coarsegrad", "yes")
    assert done.returncode != 0
    assert "COARSEGRAD_NATIVE must be auto, 0 or 1, got 'yes'" in done.stderr


def test_info_on_the_command_line():
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-m", "coarsegrad", "info"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("torch", torch.__version__, "threads", "native", "reference", "cpu"):
        assert word in done.stdout
    if _ops.native is None:
        assert _ops.native_why_not in done.stdout


def test_a_reader_that_has_seen_enough():
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "coarsegrad", "info"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"BrokenPipe" not in process.stderr.read()
    assert process.returncode == 1


def test_info_names_the_kernels_of_norms(monkeypatch):
    """Of a GPU, the compiled ones wherever they serve it."""
    backends = sys.modules["coarsegrad.backends"]  # cg.backends is the function
    for native, triton, kernels in (
        (None, object(), "native kernels"),
        ("built without CUDA kernels", object(), "a Triton kernel"),
        ("built without CUDA kernels", None, "plain torch"),
    ):
        monkeypatch.setattr(_ops, "why_not_native", lambda device, why=native: why)
        monkeypatch.setattr(backends, "_load_triton", lambda loaded=triton: loaded)
        assert backends._norm_kernels("cuda") == kernels


@pytest.mark.costly
@needs_native
def test_the_python_derivative_passes_the_same_tests():
    """Without the native library the derivative is written in Python: these files again, without it."""
    names = ("autograd.py", "saved_bytes.py", "bad_input.py", "ste_registry.py", "transforms.py",
             "ops.py::test_compile_in_place")  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "COARSEGRAD_NATIVE": "0"}
    options = ["-q", "-p", "no:cacheprovider", "-k", "not native", "--no-header", "-rf"]
    command = [sys.executable, "-m", "pytest", *options, *(str(TESTS / "ops" / f"test_{name}") for name in names)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d{3,} passed", done.stdout), done.stdout[-2000:]


@pytest.mark.parametrize(
    "environment, reasons",
    [
        ({"OMP_NUM_THREADS": "1"}, ["1 thread on", "glibc's malloc returns freed"]),
        ({"OMP_NUM_THREADS": f"{usable_cores()}", "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296"}, []),
        ({"OMP_NUM_THREADS": f"{usable_cores()}", "MALLOC_MMAP_THRESHOLD_": str(2**20)},
         ["glibc's malloc returns freed"]),
        ({"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**32), "COARSEGRAD_NATIVE": "0"},
         ["no native library", "1 thread on"]),
    ],
)  # fmt: skip
def test_info_says_what_is_slow_here(environment, reasons):
    ours = ("MALLOC_", "GLIBC_", "OMP_", "COARSE")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    run = subprocess.run(
        [sys.executable, "-m", "coarsegrad", "info"], env={**clean, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    _, _, slow = run.stdout.partition("slower than it could be on the CPU\n")
    found = [line for line in slow.splitlines() if line.startswith("- ")]
    known = {"glibc": platform.libc_ver()[0] == "glibc", "1 thread": usable_cores() > 1}
    expected = [reason for reason in reasons if all(holds for word, holds in known.items() if word in reason)]
    if "COARSEGRAD_NATIVE" not in environment and not (_ops.native and "avx512" in _ops.native.isas()):
        found = found[1:]  # that AVX-512 or the library is not there
    assert len(found) == len(expected)
    assert all(line.startswith(f"- {reason}") for line, reason in zip(found, expected))
