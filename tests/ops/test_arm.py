"""The CPU kernels of AArch64 against the reference: cross-compiled, and run by an emulator."""

from __future__ import annotations

import functools
import itertools
import shutil
import subprocess

import cuda_host
import pytest
import torch
from bench import instructions
from cuda_host import DTYPES, MASKS, ROUNDINGS, Case
from host_cases import (
    alpha_tensor,
    backward_cases,
    backward_from_slopes_cases,
    dequantize_cases,
    forward_case,
    make_x,
    wrong_outputs,
)
from host_cases_signed import given_cases, group_cases, hadamard_cases
from paths import ROOT

from coarsegrad import reference
from coarsegrad._types import WEIGHT_BITS, wide_dtype

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
MISSING = [name for name in ("cmake", COMPILER) if shutil.which(name) is None]
MISSING += [] if EMULATOR else ["qemu-aarch64-static"]
pytestmark = [
    pytest.mark.costly,
    pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)} found"),
]

SETS = ("default", "neon")
LAYER_SETS = ("neon", "neondot", "neoni8mm")
# Less than a vector, than a block; two chunks of sums and a part of a block.
SIZES = (3, 33, 64 * 5 + 21)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arm")
    settings = {"SYSTEM_NAME": "Linux", "SYSTEM_PROCESSOR": "aarch64", "CXX_COMPILER": COMPILER}
    cuda_host.configure(ROOT, folder, "-O0 -w", **settings, EXE_LINKER_FLAGS="-static")
    return lambda program: (EMULATOR, str(cuda_host.build(folder, program)))


def norm_cases(dtype):
    """RMSNorm and LayerNorm of rows shorter than a vector, not of whole vectors, and longer than all lanes of sums."""
    for n, (length, centred) in enumerate(itertools.product((3, 70, 1100), (False, True))):
        x = torch.randn(5, length, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
        weight, bias = (torch.linspace(low, 2, length).to(wide_dtype(dtype)) for low in (-1, 0.3))
        made = reference.norm_qsigned(
            x, weight, bias, 1e-5, centred, False, n % 3 == 0, None, None, None, True, False
        )  # fmt: skip
        names = ("out", *(("mean",) if centred else ()), "inverse")
        expected = {name: made[{"out": 0, "mean": 4, "inverse": 5}[name]].reshape(-1) for name in names}
        inputs = {"x": x.reshape(-1), "weight": weight, "bias": bias}
        flags = ("rounds_twice",) if n % 3 == 0 else ()
        yield Case("norm", dtype, 0, x.numel(), inputs, expected, channels=5, inner=length, flags=flags, scale=1e-5,
                   expected=expected)  # fmt: skip


def weight_cases(dtype):
    for n, (length, bits) in enumerate(itertools.product((9, 700), WEIGHT_BITS)):
        rows = torch.randn(3, length, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
        expected = {"alpha": reference.weight_scale(rows, bits, 0)}
        inputs = {"x": rows.flatten()}
        yield Case("weight_scale", dtype, bits, rows.numel(), inputs, expected, channels=3, expected=expected)


def channel_cases(dtype):
    """An alpha for each channel, now and then one that is not regular: innermost, and in short and long runs."""
    irregular = 1e-310 if dtype == torch.float64 else 4e-8 if dtype == torch.float16 else 1e-40
    for n, (rounding, (channels, inner), bits) in enumerate(
        itertools.product(ROUNDINGS, ((32, 1), (5, 1), (4, 9), (2, 150)), (2, 4))
    ):
        alpha = [0.3, 0.5, 1.7, 41.0][: min(channels, 4)] * -(-channels // 4)
        alpha = alpha_tensor(alpha[:channels] if n % 6 else [irregular, *alpha[1:channels]], dtype)
        rows = 300 // (channels * inner) + 9
        x = torch.stack([make_x(dtype, a.item(), bits, rounding, rows * inner, n + i).view(rows, inner)
                         for i, a in enumerate(alpha)], 1).reshape(-1)  # fmt: skip
        yield forward_case(x, alpha, bits, rounding, MASKS[n % len(MASKS)], n % 2 == 0, shape=(rows, channels, inner))


def forward_cases(dtype):
    for n, (rounding, bits, codes) in enumerate(itertools.product(ROUNDINGS, range(1, 9), (False, True))):
        alpha = alpha_tensor([(0.5, 0.3, 0.0154)[n % 3]], dtype)
        x = make_x(dtype, alpha.item(), bits, rounding, SIZES[n % 7 % 3 - 1], n)
        settings = {"y": not codes or n % 3 > 0, "in_place": codes and n % 3 == 1, "offset": n % 2}
        yield forward_case(x, alpha, bits, rounding, MASKS[n % len(MASKS)], codes, **settings)


@functools.cache
def cases_of(dtype):
    return [
        *forward_cases(dtype),
        *channel_cases(dtype),
        *dequantize_cases(dtype, SIZES[1:]),
        *backward_from_slopes_cases(dtype, SIZES[1:]),
        *backward_cases(dtype, SIZES[2:], (1, 2, 5), ROUNDINGS[:1]),
        *given_cases(dtype, (33, 341)),
        *group_cases(dtype, (2, 8), (((7, 9), 3), ((9, 32), 8), ((3, 96), 32), ((3, 101), 101))),
        *hadamard_cases(dtype, (2, 8, 64, 128)),
        *norm_cases(dtype),
        *weight_cases(dtype),
    ]


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
    command = (*build("cpu_host"), "neon", str(instructions.CHUNK_BLOCKS))
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
