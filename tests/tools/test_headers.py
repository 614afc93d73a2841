"""Each C++ header compiles by itself, as an editor opens it."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from paths import ROOT

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
CSRC = ROOT / "csrc"
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
ARM = shutil.which("aarch64-linux-gnu-g++")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")

# Folder: flags. CUDA headers get the CPU's stand-ins for CUDA. Headers that include torch are left out.
FOLDERS = {
    "math": (),
    "cpu": (),
    "cpu/generic": (),
    "cpu/scalar": (),
    "cpu/x86": (*AVX2, "-mavxvnni"),
    "cpu/avx2": AVX2,
    "cpu/avxvnni": (*AVX2, "-mavxvnni"),
    "cpu/avx512": AVX512,
    "cpu/avx512vnni": (*AVX512, "-mavx512vnni"),
    "cpu/amx": (*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"),
    "cpu/neon": (),
    "cpu/neondot": ("-march=armv8.2-a+dotprod",),
    "cpu/neoni8mm": ("-march=armv8.2-a+dotprod+i8mm",),
    "cuda": ("-include", str(ROOT / "tests" / "cpp" / "cuda_host.h"), "-Wno-unknown-pragmas"),
}
TORCH = {CSRC / name for name in ("checks.h", "register.h", "cpu/tensors.h", "cuda/tensors.h", "cuda/launch.cuh")}

pytestmark = [
    pytest.mark.costly,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


def _headers(folder):
    return sorted(path for path in (CSRC / folder).glob("*.*h") if path not in TORCH)


def _compile(headers, flags, compiler=COMPILER):
    quiet = ("-w", "-Werror=return-type")
    command = [compiler, "-std=c++20", "-fsyntax-only", *quiet, *flags, "-x", "c++", *map(str, headers)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_headers_compile_alone(folder):
    headers = _headers(folder)
    assert headers
    if not folder.startswith("cpu/neon"):
        _compile(headers, FOLDERS[folder])
    elif ARM is None:
        pytest.skip("no compiler for AArch64")
    else:
        _compile(headers, FOLDERS[folder], ARM)


def test_every_folder_is_checked():
    folders = {str(path.parent.relative_to(CSRC)) for path in CSRC.rglob("*.*h")} - {"."}
    assert folders == set(FOLDERS)
    _compile(_headers("."), ())
