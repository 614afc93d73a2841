"""Asks CMake for the native library and adds nothing to what CMakeLists.txt says; pyproject.toml has the rest."""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import sys
from pathlib import Path

from build_backend import ROOT, build_mode, find_cmake, find_compiler, find_tool, find_torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


class NativeBuildError(Exception):
    """Why there is no native library."""


def run(command: list[str], env: dict[str, str]) -> None:
    """Runs a step of the build, showing its output as it comes; an error ends with the output's last lines."""
    print("+", *command, flush=True)
    last = collections.deque(maxlen=15)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.strip():
                last.append(line)
    if process.returncode:
        raise NativeBuildError(f"{command[0]} failed; its last lines:\n{''.join(last)}")


def build_native(build_dir: Path, prefix: Path) -> None:
    """Builds coarsegrad/_C and coarsegrad/_build.py under `prefix`."""
    compiler, cmake, torch_dir = find_compiler(), find_cmake(), find_torch()
    if compiler is None:
        raise NativeBuildError("no C++ compiler found at build time; install one (g++), or set CXX")
    if cmake is None:
        raise NativeBuildError("no CMake found at build time, or too old a one; pip install cmake")
    if torch_dir is None:
        raise NativeBuildError("no torch found at build time; pip install torch")
    # What an earlier build left may be of another torch or compiler.
    shutil.rmtree(build_dir, ignore_errors=True)
    env = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()), **os.environ}
    if find_tool("ninja"):
        env.setdefault("CMAKE_GENERATOR", "Ninja")
    configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), f"-DPython_EXECUTABLE={sys.executable}"]
    run([*configure, f"-DCOARSEGRAD_TORCH_DIR={torch_dir}", f"-DCOARSEGRAD_CUDA={build_mode('COARSEGRAD_CUDA')}"], env)
    run([cmake, "--build", str(build_dir), "--target", "_C"], env)
    run([cmake, "--install", str(build_dir), "--prefix", str(prefix)], env)


def write_reason(package: Path, reason: str) -> None:
    """Writes coarsegrad/_build.py for an install without coarsegrad/_C."""
    package.mkdir(parents=True, exist_ok=True)
    facts = f"TORCH_VERSION = None\nREASON = {reason!r}\n"
    (package / "_build.py").write_text(f"# Written by the build: there is no coarsegrad/_C.\n{facts}")


class CMakeBuild(build_ext):
    def run(self) -> None:
        prefix = ROOT / "python" if self.inplace else Path(self.build_lib)
        package = prefix / "coarsegrad"
        for stale in package.glob("_C.*"):
            stale.unlink()
        try:
            build_native(Path(self.build_temp), prefix)
        except NativeBuildError as error:
            for demand in ("COARSEGRAD_NATIVE", "COARSEGRAD_CUDA"):
                if build_mode(demand) == "1":
                    raise SystemExit(f"{demand}=1, but the native library was not built: {error}") from None
            print(f"\nWARNING: coarsegrad is installed without its native library: {error}", file=sys.stderr)
            write_reason(package, str(error))


class PureBuild(build_py):
    """What COARSEGRAD_NATIVE=0 builds has no extension, and so its wheel is for every platform."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # a working copy may have the library of `make build`
            write_reason(Path(self.build_lib, "coarsegrad"), "COARSEGRAD_NATIVE=0 was set at build time")


if build_mode("COARSEGRAD_NATIVE") == "0":
    setup(cmdclass={"build_py": PureBuild})
else:
    setup(ext_modules=[Extension("coarsegrad._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
