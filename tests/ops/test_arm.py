"""The CPU kernels of AArch64 against the reference: cross-compiled, and run by an emulator."""

from __future__ import annotations

import itertools
import shutil
import subprocess

import cuda_host
import pytest
import torch
from bench import counters, instructions
from cpu_host_cases import cases_of
from cuda_host import DTYPES
from host_cases import wrong_outputs
from paths import ROOT

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
MISSING = [name for name in ("cmake", COMPILER) if shutil.which(name) is None]
MISSING += [] if EMULATOR else ["qemu-aarch64-static"]
pytestmark = [
    pytest.mark.costly,
    pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)} found"),
]

SETS = ("default", "neon")
LAYER_SETS = ("neon", "neondot", "neoni8mm")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arm")
    settings = {"SYSTEM_NAME": "Linux", "SYSTEM_PROCESSOR": "aarch64", "CXX_COMPILER": COMPILER}
    cuda_host.configure(ROOT, folder, "-O0 -w", **settings, EXE_LINKER_FLAGS="-static")
    return lambda program: (EMULATOR, str(cuda_host.build(folder, program)))


@by_dtype
@pytest.mark.parametrize("isa", SETS)
def test_kernels_are_the_reference(build, isa, dtype):
    cases = cases_of(dtype)
    for case, result in zip(cases, cuda_host.run((*build("cpu_host"), isa), cases), strict=True):
        described = (case.op, case.bits, case.count, case.rounding, case.mask, case.ste, case.alpha_grad, case.channels)
        assert not (wrong := wrong_outputs(case, result)), (wrong, described, case.inner, case.group, case.offset)


def test_what_is_counted_is_right(build):
    """The cases of bench.instructions, with chunks of sums as long as its."""
    cases = list(itertools.chain(*instructions.cases(torch.bfloat16, instructions.COUNTS[0]).values()))
    command = (*build("cpu_host"), "neon", str(counters.CHUNK_BLOCKS))
    for case, result in zip(cases, cuda_host.run(command, cases), strict=True):
        assert not (wrong := wrong_outputs(case, result)), (wrong, case.op, case.bits, case.ste, case.channels)


@pytest.mark.parametrize("cpu, features", [("cortex-a72", "0 0"), ("neoverse-n1", "1 0"), ("max", "1 1")])
def test_what_a_cpu_has(tmp_path, cpu, features):
    """SDOT and I8MM, by which the kernels are chosen."""
    source = tmp_path / "features.cpp"
    source.write_text("""
        #include <asm/hwcap.h>
        #include <cstdio>
        #include "cpu/neon/features.h"
        static_assert(cg::neon::kDot == HWCAP_ASIMDDP && cg::neon::kI8mm == HWCAP2_I8MM);
        int main() { std::printf("%d %d", cg::neon::has_dot(), cg::neon::has_i8mm()); }
    """)
    program = tmp_path / "features"
    subprocess.run([COMPILER, "-std=c++20", "-static", "-I", ROOT / "csrc", "-o", program, source], check=True)
    assert subprocess.run([EMULATOR, "-cpu", cpu, program], capture_output=True, text=True).stdout == features


@pytest.mark.parametrize("isa", ("default", *LAYER_SETS))
def test_counted_layers_are_right(build, isa):
    cases = list(itertools.chain(*instructions.cases(torch.uint8, instructions.COUNTS[0]).values()))
    for case, result in zip(cases, cuda_host.run((*build("cpu_host"), isa), cases), strict=True):
        assert not (wrong := wrong_outputs(case, result)), (wrong, case.bits, case.inner)


@pytest.mark.parametrize("isa", LAYER_SETS)
def test_layers_on_codes_are_exact(build, isa):
    done = subprocess.run([*build(f"test_integer_layer_{isa}"), "30"], capture_output=True, text=True)
    assert done.returncode == 0 and "are exact" in done.stdout, done.stdout + done.stderr
