"""What an install builds, finds and says. Building the whole extension anew is left to .ci/run, which takes minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from paths import ROOT

from coarsegrad import _ops

needs_native = pytest.mark.skipif(_ops.native is None, reason=f"native library not in use: {_ops.native_why_not}")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what a clone has, since a build writes beside the sources."""
    copy = tmp_path_factory.mktemp("sources") / "coarsegrad"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "_C.*", "results")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    return copy


def build(sources, out, kind="wheel", **environment):
    """Runs one hook of the build backend as a front end does, in this environment."""
    out.mkdir(exist_ok=True)
    hook = f"import sys; sys.path.insert(0, '.'); import build_backend as b; b.build_{kind}({str(out)!r})"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # CMake may be in this environment
    env = {**os.environ, "PATH": path, "COARSEGRAD_NATIVE": "auto", **environment}
    return subprocess.run([sys.executable, "-c", hook], cwd=sources, env=env, capture_output=True, text=True)


def facts_of(out):
    """(the facts in _build.py, whether there is a library) of the one wheel in `out`, which is marked as typed."""
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        assert "coarsegrad/py.typed" in files.namelist()
        facts = {}
        exec(files.read("coarsegrad/_build.py"), facts)
        return facts, any("/_C." in name for name in files.namelist())


@pytest.mark.parametrize(
    "compiler, reason",
    [("no-such-compiler", "no C++ compiler"), ("false", "CMake Error|not able to compile|broken|errors occurred")],
)
def test_without_a_working_compiler_pure_python_is_built_and_says_why(sources, tmp_path, compiler, reason):
    done = build(sources, tmp_path, CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert "WARNING: coarsegrad is installed without its native library" in done.stderr
    facts, has_library = facts_of(tmp_path)
    assert not has_library and facts["TORCH_VERSION"] is None
    assert any(part in facts["REASON"] for part in reason.split("|"))


def test_without_the_native_library_the_wheel_is_for_every_platform(sources, tmp_path):
    done = build(sources, tmp_path, COARSEGRAD_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    facts, has_library = facts_of(tmp_path)
    assert not has_library and facts["TORCH_VERSION"] is None
    assert facts["REASON"] == "COARSEGRAD_NATIVE=0 was set at build time"


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_demanded_native_library_fails_loudly(sources, tmp_path, compiler):
    done = build(sources, tmp_path, COARSEGRAD_NATIVE="1", CXX=compiler)
    assert done.returncode != 0
    assert "COARSEGRAD_NATIVE=1, but the native library was not built" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_demanded_cuda_kernels_fail_loudly(sources, tmp_path):
    done = build(sources, tmp_path, COARSEGRAD_CUDA="1", CUDACXX="no-such-compiler")
    assert done.returncode != 0
    assert "COARSEGRAD_CUDA=1, but the native library was not built" in done.stderr
    why = "no CUDA compiler that works" if torch.version.cuda else f"torch {torch.__version__} is no CUDA build"
    assert why in " ".join(done.stderr.split())
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.parametrize("name", ["COARSEGRAD_NATIVE", "COARSEGRAD_CUDA"])
def test_unknown_modes_are_refused(sources, tmp_path, name):
    done = build(sources, tmp_path, **{"COARSEGRAD_CUDA": "auto", name: "yes"})
    assert done.returncode != 0
    assert f"{name}: got 'yes', wanted auto, 0 or 1" in done.stderr


def test_source_distribution_can_build_the_native_library(sources, tmp_path):
    done = build(sources, tmp_path, kind="sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    folders = ("bench", "csrc", "docs", "python", "tests", "tools")
    wanted = {path for folder in folders for path in (sources / folder).rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(sources)) for path in wanted} - {"python/coarsegrad/_build.py"}
    assert len(wanted) > 400 and wanted - names == set()
    assert {"CMakeLists.txt", "build_backend.py", "setup.py", "LICENSE", "CITATION.cff", "SECURITY.md"} <= names
    assert "python/coarsegrad/py.typed" in names
    assert "python/coarsegrad/_build.py" not in names


@pytest.fixture
def backend(monkeypatch, sources):
    """build_backend, told that there is a compiler."""
    monkeypatch.chdir(sources)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("COARSEGRAD_NATIVE", raising=False)
    import build_backend

    monkeypatch.setattr(build_backend, "find_compiler", lambda: "c++")
    return build_backend


def test_build_takes_the_torch_that_runs(backend, monkeypatch):
    found = backend.find_torch()
    assert found == Path(torch.__file__).parent
    # As a front end does that isolates the build.
    monkeypatch.setenv("PYTHONPATH", "nowhere")
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    assert backend.find_torch() == found
    monkeypatch.setattr(backend, "find_tool", lambda *_: "a tool")
    assert backend.get_requires_for_build_wheel() == backend.get_requires_for_build_editable() == []


def test_build_asks_for_what_is_missing(backend, monkeypatch):
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    monkeypatch.setattr(backend, "find_tool", lambda *_: None)
    asked = backend.get_requires_for_build_wheel()
    assert len(asked) == 3 and asked[0].startswith("torch>=") and asked[1:] == ["cmake", "ninja"]
    monkeypatch.setenv("COARSEGRAD_NATIVE", "0")
    assert backend.get_requires_for_build_wheel() == []
    monkeypatch.delenv("COARSEGRAD_NATIVE")
    monkeypatch.setattr(backend, "find_compiler", lambda: None)
    assert backend.get_requires_for_build_wheel() == []


def test_tool_that_does_not_run_or_is_too_old_is_not_found(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    tool = tmp_path / "some-tool"
    for script, usable in (("exit 1", False), ("echo some-tool version 3.19.7", False), ("echo 3.20.0", True)):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert (backend.find_tool("some-tool", (3, 20)) is not None) == usable


@needs_native
def test_library_was_built_for_this_torch():
    from coarsegrad import _build

    assert _build.TORCH_VERSION == torch.__version__
    assert set(_ops.native.isas()) <= set(_build.ISAS)


@needs_native
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list loaded libraries in /proc")
def test_library_brings_no_second_thread_pool():
    show = "print(*sorted({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rpartition('/')[2]}))"

    def loaded(modules):
        done = subprocess.run([sys.executable, "-c", f"import {modules}; {show}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "omp" in loaded("torch")
    assert loaded("torch, coarsegrad._C") == loaded("torch")
