"""The CPU kernels of AVX-512 against the reference on a machine without it: their own source, with its instructions in
plain C++ (tests/cpp/avx512_host_floats.h). What a compiler makes of it is not seen."""

from __future__ import annotations

import platform

import cuda_host
import host_cases
import host_cases_signed
import pytest
from cpu_host_cases import cases_of
from cuda_host import DTYPES

from coarsegrad import _ops

why_not = cuda_host.why_not()
if platform.machine() not in ("x86_64", "AMD64") or not _ops.native or "avx2" not in _ops.native.isas():
    why_not = "the instructions are written in those of AVX2, which this machine lacks"
pytestmark = [pytest.mark.costly, pytest.mark.skipif(why_not is not None, reason=str(why_not))]

# Two blocks and parts of one; chunks of sums.
SIZES = (1, 31, 150, 64 * 21 + 5)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return cuda_host.build_once(tmp_path_factory.mktemp("avx512"), "cpu_host_avx512", "-O0 -w")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_kernels_are_the_reference(program, dtype):
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
    for case, result in zip(cases, cuda_host.run((program, "avx512"), cases), strict=True):
        described = (case.op, case.bits, case.count, case.rounding, case.mask, case.ste, case.alpha_grad, case.channels)
        assert not (wrong := host_cases.wrong_outputs(case, result)), (wrong, described, case.inner, case.group)
