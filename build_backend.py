"""The build backend: setuptools, asked also for what the native build needs and the target environment lacks.

An extension fits one torch only, so it is built against the torch that the target environment has, build isolation
or not. A torch is fetched for the build only where the target has none yet, and nothing is fetched where no native
build will happen.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  every hook that is not overridden below

ROOT = Path(__file__).resolve().parent
_FIND_TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(*s.submodule_search_locations if s else '')"


def build_mode(name: str) -> str:
    """COARSEGRAD_NATIVE, or COARSEGRAD_CUDA: "auto" (build if possible), "0" (do not build) or "1" (build or fail)."""
    mode = os.environ.get(name, "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"{name}: got {mode!r}, wanted auto, 0 or 1")
    return mode


def find_compiler() -> str | None:
    """The C++ compiler that CMake will take, or None."""
    names = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def find_torch() -> Path | None:
    """The folder of the torch that will run, found without importing it; else of the build environment's, else None.

    Under isolation pip runs the target's interpreter and hides the target's packages behind PYTHONPATH; other
    front ends run an interpreter of their own, and an active virtual environment is then the target.
    """
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    target = {name: value for name, value in os.environ.items() if name not in hidden}
    tries = [(sys.executable, target)]
    if "VIRTUAL_ENV" in os.environ:
        tries.append((str(Path(os.environ["VIRTUAL_ENV"], "bin", "python")), target))
    tries.append((sys.executable, os.environ))
    for python, env in tries:
        if shutil.which(python):
            found = subprocess.run([python, "-c", _FIND_TORCH], env=env, capture_output=True, text=True).stdout.strip()
            if found:
                return Path(found)
    return None


def find_tool(name: str, minimum: tuple[int, ...] = ()) -> str | None:
    """A tool on PATH that runs here and is new enough, or None. A wheel's launcher may be on PATH and not run."""
    path = shutil.which(name)
    if path is None:
        return None
    answer = subprocess.run([path, "--version"], capture_output=True, text=True)
    version = re.search(r"(\d+)\.(\d+)", answer.stdout)
    usable = answer.returncode == 0 and version and tuple(map(int, version.groups())) >= minimum
    return path if usable else None


def find_cmake() -> str | None:
    """CMake, not older than CMakeLists.txt demands, or None."""
    demanded = re.search(r"VERSION (\d+)\.(\d+)", (ROOT / "CMakeLists.txt").read_text())
    return find_tool("cmake", tuple(map(int, demanded.groups())))


def _native_requirements() -> list[str]:
    if build_mode("COARSEGRAD_NATIVE") == "0" or find_compiler() is None:
        return []
    missing = []
    if find_torch() is None:
        missing += re.findall(r'^ *"(torch>=[^"]*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    if find_cmake() is None:
        missing.append("cmake")
    if find_tool("ninja") is None:
        missing.append("ninja")
    return missing


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + _native_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + _native_requirements()
