"""The CPU kernels of AVX-512 against the reference, by an emulated processor that has it."""

from __future__ import annotations

import importlib.util
import itertools
import platform
import sys

import cuda_host
import host_cases
import host_cases_signed
import pytest
import torch
import x86_emulator
from bench import instructions
from cpu_host_cases import cases_of
from cuda_host import DTYPES
from paths import ROOT

why_not = cuda_host.why_not()
if platform.machine() not in ("x86_64", "AMD64"):
    why_not = "the compiler is not for x86-64"
elif importlib.util.find_spec("bochscpu") is None:
    why_not = "no bochscpu-python found"
pytestmark = [pytest.mark.costly, pytest.mark.skipif(why_not is not None, reason=str(why_not))]

# Two blocks and parts of one; chunks of sums.
SIZES = (1, 31, 150, 64 * 21 + 5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(instruction set, cases) -> the outputs."""
    folder = tmp_path_factory.mktemp("avx512")
    flags = f"-O1 -w -include '{ROOT / 'tests/cpp/bochs_half.h'}'"
    cuda_host.configure(ROOT, folder, flags, EXE_LINKER_FLAGS="-static")
    program = cuda_host.build(folder, "cpu_host")
    return lambda isa, cases: cuda_host.run((sys.executable, x86_emulator.__file__, str(program), isa), cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_kernels_are_the_reference(run, dtype):
    cases = [
        *cases_of(dtype),
        *host_cases.forward_cases(dtype, SIZES),
        *host_cases.backward_cases(dtype, SIZES[2:]),
        *host_cases.backward_from_slopes_cases(dtype, SIZES[1:]),
        *host_cases.channel_cases(dtype, host_cases.CHANNELS[1::2]),
        *host_cases_signed.channel_cases(dtype),
        *host_cases_signed.given_cases(dtype, SIZES),
        *host_cases_signed.group_cases(dtype),
    ]
    for case, result in zip(cases, run("avx512", cases), strict=True):
        described = (case.op, case.bits, case.count, case.rounding, case.mask, case.ste, case.alpha_grad, case.channels)
        assert not (wrong := host_cases.wrong_outputs(case, result)), (wrong, described, case.inner, case.group)


@pytest.mark.parametrize("isa", ["avx512", "avx512vnni"])
def test_layers_on_codes_are_exact(run, isa):
    cases = list(itertools.chain(*instructions.cases(torch.uint8, instructions.COUNTS[0]).values()))
    for case, result in zip(cases, run(isa, cases), strict=True):
        assert not (wrong := host_cases.wrong_outputs(case, result)), (wrong, case.op, case.bits, case.inner)
