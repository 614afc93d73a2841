"""The gate on the kernels' machine code: it notices what is spoiled, and passes the kernels.

And the list of the instructions in their PTX that may flush or approximate.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_sass_code import ADD, LOAD, STORE, loop
from tools.sass import triton_kernels
from tools.sass.__main__ import main
from tools.sass.code import Data, SassError, parse
from tools.sass.compiler import FLAGS, Binary, compile_cuda, instances, read, source_of, tool
from tools.sass.gate import (
    ARCHS,
    DTYPES,
    KERNELS,
    NORM_KERNELS,
    WEIGHT_KERNELS,
    Kernel,
    Report,
    cuda_cubin,
    cuda_reports,
)
from tools.sass.ptx import listed

pytestmark = pytest.mark.costly
needs_triton = pytest.mark.skipif(not triton_kernels.installed(), reason="triton is not installed")


# ------------------------------------------------------------------------------- small kernels, compiled

TOYS = """
#include <cstdint>
#include <cuda_bf16.h>
#include <mma.h>
namespace cg {
struct alignas(16) Chunk { uint32_t v[4]; };
struct alignas(8) Half { uint32_t v[2]; };
using bf16 = __nv_bfloat16;

template <class T>
__global__ void __launch_bounds__(256) copy(const T* __restrict__ x, T* __restrict__ y, int64_t n) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x * 2;
  #pragma unroll 1
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 2; i < n; i += step) {
    const T a = x[i], b = x[i + 1];
    y[i] = a;
    y[i + 1] = b;
  }
}
__global__ void __launch_bounds__(256) scalar(const bf16* x, bf16* y, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + x[i];
}
__global__ void __launch_bounds__(256) narrow_stores(const Chunk* __restrict__ x, Half* __restrict__ y, int64_t n) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  #pragma unroll 1
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const Chunk a = x[i];
    y[2 * i + (a.v[0] & 1)] = {a.v[0], a.v[1]};
    y[2 * i + (~a.v[0] & 1)] = {a.v[2], a.v[3]};
  }
}
// 64 sums at once do not fit into the 64 registers of a thread of 1024.
template <int threads>
__global__ void __launch_bounds__(threads) crowded(const float* __restrict__ x, float* y, int n) {
  float sums[64];
  for (int k = 0; k < 64; ++k) sums[k] = x[32 * k + threadIdx.x];
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < 64; ++k) sums[k] = sums[k] * x[i] + sums[(k + 1) % 64];
  for (int k = 0; k < 64; ++k) y[32 * k + threadIdx.x] = sums[k];
}
__global__ void multiply(const half* a, const half* b, float* c) {
  using namespace nvcuda::wmma;
  fragment<matrix_a, 16, 16, 16, half, row_major> left;
  fragment<matrix_b, 16, 16, 16, half, col_major> right;
  fragment<accumulator, 16, 16, 16, float> sums;
  fill_fragment(sums, 0.0f);
  load_matrix_sync(left, a, 16);
  load_matrix_sync(right, b, 16);
  mma_sync(sums, left, right, sums);
  store_matrix_sync(c, sums, 16, mem_row_major);
}
}  // namespace cg
"""

FLOATS = Data(4, 1, 1, 0)
TOY_KERNELS = {
    "copy": Kernel("copy", "float32", "copy<Chunk>", FLOATS, 8, instructions=3),
    "copy_halves": Kernel("copy of 8 bytes", "float32", "copy<Half>", FLOATS, 4),
    "scalar": Kernel("scalar", "bfloat16", "scalar", Data(2, 1, 1, 0)),
    "narrow_stores": Kernel("narrow stores", "float32", "narrow_stores", FLOATS, 4),
    "roomy": Kernel("roomy", "float32", "crowded<64>", FLOATS, wide=False),
    "crowded": Kernel("crowded", "float32", "crowded<1024>", FLOATS, wide=False),
    "multiply": Kernel("multiply", "float16", "multiply", FLOATS, wide=False, opcodes=("HMMA",)),
}


@pytest.fixture(scope="module")
def folder(tools, tmp_path_factory):
    return tmp_path_factory.mktemp("toys")


@pytest.fixture(scope="module", params=["sm_80", "sm_120"])  # the oldest and the newest
def toys(request, folder) -> dict[str, Report]:
    (folder / "toys.cuh").write_text(TOYS)
    source = folder / "toys.cu"
    source.write_text(source_of([each.expression for each in TOY_KERNELS.values()], '#include "toys.cuh"\n'))
    binaries = instances(compile_cuda(source, request.param, folder, ("-std=c++17", f"-I{folder}")))
    pairs = zip(TOY_KERNELS.items(), binaries, strict=True)
    return {name: Report(kernel, request.param, binary) for (name, kernel), binary in pairs}


def test_a_good_kernel_keeps_its_promises(toys):
    report = toys["copy"]
    assert report.path.loop and report.elements == 8 and report.instructions < 3
    assert (report.path.accesses("load"), report.path.accesses("store")) == ([16, 16], [16, 16])
    assert list(report.broken()) == list(toys["multiply"].broken()) == []


def test_narrow_accesses_are_noticed(toys):
    for name, elements in (("copy_halves", 4), ("narrow_stores", 4), ("scalar", 1)):
        assert toys[name].elements == elements
        (line,) = toys[name].broken()
        assert line.endswith(f"bytes for {elements} elements, promised 128-bit ones for all numbers")


def test_a_spill_is_noticed(toys):
    assert not any("stack" in line for line in toys["roomy"].broken())
    assert any(re.match(r"[1-9]\d* bytes of stack", line) for line in toys["crowded"].broken())


def test_too_many_instructions_or_registers_and_missing_opcodes_are_noticed(toys):
    for change, message in (
        ({"instructions": 1}, r"\d\.\d instructions an element, promised at most 1"),
        ({"registers": 4}, r"\d+ registers, promised at most 4"),
        ({"opcodes": ("HMMA", "LDG")}, "no HMMA instruction"),
    ):
        report = toys["copy"]
        (line,) = Report(replace(report.kernel, **change), report.arch, report.binary).broken()
        assert re.fullmatch(message, line)


def test_calls_and_nested_loops_are_noticed(toys):
    report, copy = toys["copy"], [LOAD, LOAD, STORE, STORE]
    for extra, message in ((["CALL.REL.NOINC `($slow)"], "1 calls"), (loop(".L_x_2", ADD), "2 instructions in loops")):
        lines = [*loop(".L_x_1", *copy, *extra), "EXIT"]
        text = "\n".join(line if line.endswith(":") else f"        /*0000*/      {line} ;" for line in lines)
        function = parse(f'\t.section\t.text.hand,"ax",@progbits\nhand:\n{text}\n')["hand"]
        (line,) = Report(report.kernel, report.arch, report.binary._replace(function=function)).broken()
        assert line.startswith(message)


def test_a_step_that_is_too_large_is_refused(toys):
    report = toys["copy"]
    with pytest.raises(SassError, match="a pass of 8 elements, fewer than the 16 of a step"):
        list(Report(replace(report.kernel, step=16), report.arch, report.binary).broken())


def test_code_stays_until_a_header_changes(folder, capsys):
    def compiled() -> bool:
        compile_cuda(source, "sm_90", folder, [f"-I{folder}"])
        return "compiling" in capsys.readouterr().err

    source, header = folder / "kept.cu", folder / "kept.cuh"
    source.write_text('#include "kept.cuh"\n')
    header.write_text("__global__ void kept(float* y) { *y = 1; }\n")
    assert [compiled(), compiled()] == [True, False]
    header.write_text("__global__ void kept(float* y) { *y = 2; }\n")
    assert [compiled(), compiled()] == [True, False]


def test_errors_of_the_compiler_and_missing_programs_are_reported(folder, monkeypatch):
    broken = folder / "broken.cu"
    broken.write_text("__global__ void broken() { nonsense; }\n")
    with pytest.raises(SassError, match="nonsense"):
        compile_cuda(broken, "sm_90", folder)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(SassError, match=r"nvcc is neither on the PATH nor in \$CUDA_HOME/bin"):
        tool("nvcc")


# ------------------------------------------------------------------------------------ the project's kernels


@pytest.mark.parametrize("arch", ARCHS)
def test_the_promises_hold(tools, arch):
    assert not {report.row()[:3]: lines for report in cuda_reports(arch, KERNELS) if (lines := list(report.broken()))}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernels", (WEIGHT_KERNELS, NORM_KERNELS), ids=("weights", "norms"))
def test_kernels_of_weights_and_norms(tools, kernels, arch):
    """No stack, few registers; of chunks, no path that reads some of them in narrower accesses."""

    def reads_wide(binary: Binary) -> bool:
        loads = [path.accesses("load") for path in binary.function.paths() if path.wide_bytes("load")]
        return loads != [] and {width for each in loads for width in each} == {16}

    binaries = instances(cuda_cubin(arch, kernels))
    for kernel, binary in zip(kernels, binaries, strict=True):
        good = not binary.stack and binary.registers <= kernel.registers and (reads_wide(binary) or not kernel.wide)
        assert good, (kernel.name, kernel.dtype, binary.registers, binary.stack)


@pytest.mark.parametrize("arch", ARCHS)
def test_norms_round_products_and_sums_apart(tools, arch):
    """Every fma rounds the guess of a code down, or is the sum of a rotation's butterfly, whose factor is 1 or -1: of
    five stages, for each of the 8 elements of a thread."""
    counts = []
    for entry in cuda_cubin(arch, NORM_KERNELS).with_suffix(".ptx").read_text().split(".entry ")[1:]:
        found = Counter(re.findall(r"fma\.[a-z.]+\.f\d\d", entry))
        assert found.keys() <= {"fma.rm.f32", "fma.rn.f32"}
        if "norm_kernel" in entry.partition("(")[0] and "instance" not in entry.partition("(")[0]:
            counts.append(found["fma.rn.f32"])
    assert sorted(counts) == [0] * 4 + [5 * 8] * 6


def test_what_is_promised():
    """In figures, so that no promise is lost by a change of the list."""
    assert all(kernel.wide and kernel.instructions <= 100 and kernel.registers <= 96 for kernel in KERNELS)
    bounds = {(kernel.name, kernel.dtype): (kernel.instructions, kernel.registers) for kernel in KERNELS}
    for dtype in DTYPES:
        assert bounds["forward, mask", dtype] == (20, 64) and bounds["backward, mask", dtype] == (7.6, 64)
        assert bounds["signed forward, groups", dtype] == (62, 64) and bounds["hadamard", dtype] == (23, 64)
    assert all(kernel.step * kernel.data.item == 32 for kernel in KERNELS)


def test_pairwise():
    options = {"a": (1, 2, 3), "b": (True, False), "c": ("x", "y", "z", None), "d": (5,)}
    settings = triton_kernels.pairwise(**options)
    assert all(setting.keys() == options.keys() for setting in settings)
    for a, b in itertools.combinations(options, 2):
        assert {(s[a], s[b]) for s in settings} == set(itertools.product(options[a], options[b]))
    assert len(settings) <= 14 < 24


@pytest.fixture(scope="module")
def every_pair():
    """(architecture, kernel, what is compiled), in settings in which any two options meet."""
    return [(arch, kernel, triton_kernels.in_ptx(kernel, arch)) for arch, kernel in triton_kernels.covering(ARCHS)]


@needs_triton
@pytest.mark.parametrize("arch", ARCHS)
def test_triton_with_every_pair_of_options(tools, every_pair, arch):
    """No stack, 128-bit accesses."""
    kernels, made = zip(*((kernel, made) for of, kernel, made in every_pair if of == arch), strict=True)
    found = [Report(kernel, arch, each) for kernel, each in zip(kernels, triton_kernels.binaries(made), strict=True)]
    assert not {report.row()[:3]: lines for report in found if (lines := list(report.broken()))}


@needs_triton
def test_code_read_together_is_that_of_each_by_itself(tools, every_pair, tmp_path):
    """Instructions, guards, registers and stack are those of what Triton made itself."""
    some = [(kernel, made) for arch, kernel, made in every_pair if arch == "sm_90"][::12]
    for (kernel, _), together in zip(some, triton_kernels.binaries([made for _, made in some]), strict=True):
        path = tmp_path / "alone.cubin"
        path.write_bytes(triton_kernels.compiled(kernel, "sm_90", tmp_path).asm["cubin"])
        (alone,) = read(path).values()
        assert together[1:] == alone[1:]
        codes = [
            [[(each.guard, each.opcode) for each in block.instructions] for block in binary.function.blocks]
            for binary in (together, alone)
        ]
        assert codes[0] == codes[1]


@needs_triton
@pytest.mark.parametrize("arch", triton_kernels.AMD)
def test_triton_for_amd(arch, tmp_path):
    """To machine code, without spills, in wide accesses. Nothing runs."""
    this = triton_kernels.AMD.index(arch)
    for kernel in triton_kernels.examples()[this :: len(triton_kernels.AMD)]:
        made = triton_kernels.compiled(kernel, arch, tmp_path)
        assert made.asm["hsaco"].startswith(b"\x7fELF")
        code = made.asm["amdgcn"]
        assert re.search(rf"amdgcn_target .*-{arch}\"", code)
        assert re.findall(r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size): +(\d+)", code) == ["0"] * 3
        for access, count in (("load", kernel.data.reads), ("store", kernel.data.writes)):
            # With x a program has half as many elements: 64 bits for each of the 64 lanes that a wave of gfx9 has.
            keeps_x = all(kernel.arguments.get(name) is not None for name in ("x_ptr", "dy_ptr"))
            wide = "dwordx2|dwordx4|b128" if keeps_x else "dwordx4|b128"
            assert not kernel.wide or count == 0 or re.search(rf"_{access}_({wide})\b", code), (kernel.name, access)
        assert re.findall(r"\.amdhsa_float_denorm_mode_\w+ (\d)", code) == ["3", "3"]  # subnormals are numbers


def _example(name: str, dtype: str) -> Kernel:
    return next(each for each in triton_kernels.examples() if each.name.startswith(name) and each.dtype == dtype)


@needs_triton
def test_triton_rounds_to_bfloat16_by_the_instruction(tmp_path):
    """Triton's interpreter runs integer arithmetic instead, which triton_interpreted.py proves equal."""
    for arch in ARCHS:
        ptx = triton_kernels.compiled(_example("Triton forward, mask:", "bfloat16"), arch, tmp_path).asm["ptx"]
        assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", ptx), arch
        assert not re.search(r"\b(32767|0x7FFF|2143289344)\b", ptx), arch


@needs_triton
def test_triton_rounds_products_and_sums_apart(tmp_path):
    """The option for it has an effect, on both makes."""
    kernel = _example("Triton forward, mask, 8 bits:", "bfloat16")
    for arch, text, fused in (("sm_90", "sass", r"\bFFMA"), ("gfx942", "amdgcn", r"\bv_(pk_)?fma")):
        counts = []
        for fusion in (False, True):
            made = triton_kernels.compiled(kernel, arch, tmp_path, enable_fp_fusion=fusion)
            counts.append(len(re.findall(fused, made.asm[text])))
        assert counts[0] < counts[1], arch


LAYERS = (  # bits, weight_bits, output, channels of a convolution
    (4, 8, "affine", None),
    (8, 8, "float", None),
    (2, 2, "affine", None),
    (4, 4, "affine", 64),
    (8, 1, "thresholds", 64),
    (4, 8, "float", 3),
)
# Products of int8 on tensor cores.
_PRODUCTS = {
    "sm_80": r"mma\.sync\.aligned\.m16n8k32\S*\.s8\.s8",
    "sm_90": r"wgmma\.mma_async\S*\.s8\.s8",
    "sm_100": r"tcgen05\.mma\S*kind::i8",
    "sm_120": r"mma\.sync\.aligned\.m16n8k32\S*\.s8\.s8",
}


@needs_triton
@pytest.mark.parametrize(
    "case, arch", [(case, arch) for i, case in enumerate(LAYERS) for arch in ARCHS[i % 2 :: 2]], ids=str
)
def test_layers_in_triton(tools, case, arch, tmp_path):
    """Tensor cores, no stack, 16 bytes of aligned codes at a time; no fused or flushed step that moves a code."""
    *_, channels = case
    made = triton_kernels.compiled(triton_kernels.layer(str(case), *case), arch, tmp_path)
    ptx = made.asm["ptx"]
    assert re.search(_PRODUCTS[arch], ptx)
    assert not listed(ptx) and "fma.rn" not in ptx
    assert triton_kernels.binaries([made])[0].stack == 0
    assert bool(re.search(r"ld\.global\S*\.b8", ptx)) == (channels == 3)


# ------------------------------------------------------------------------- what flushes or approximates

_ROUNDED = "rounded once, and flushes nothing"
_GUESS = "1 / alpha, where normal: the guess of a code, which comparisons with the thresholds correct by a stair"
_REFINED = f"{_GUESS}; and 1 / m, 1 <= m < 2, whose last bits do not reach the rounded quotient made of it"
_SLOPE = "a slope of reverse_exponential, which is promised in ulps"
# (kernel, instruction): why no code, level, mask bit or exact gradient depends on how it rounds or on subnormals.
TRITON_LISTED = {
    ("linear_to_codes_kernel", "div.full.f32"): _GUESS,
    ("qrelu_forward_kernel", "div.full.f32"): _GUESS,
    ("qrelu_backward_kernel", "div.full.f32"): _REFINED,
    ("grad_alpha_channels_kernel", "div.full.f32"): _REFINED,
    ("qsigned_forward_kernel", "div.full.f32"): _GUESS,
    ("qsigned_groups_kernel", "div.full.f32"): _GUESS,
    ("qrelu_forward_kernel", "div.rn.f64"): _ROUNDED,
    ("qrelu_backward_kernel", "div.rn.f64"): _ROUNDED,
    ("grad_alpha_channels_kernel", "div.rn.f64"): _ROUNDED,
    ("qsigned_forward_kernel", "div.rn.f64"): _ROUNDED,
    ("qsigned_groups_kernel", "div.rn.f64"): _ROUNDED,
    ("norm_qsigned_kernel", "div.full.f32"): _GUESS,
    ("norm_qsigned_kernel", "div.rn.f32"): _ROUNDED,
    ("norm_qsigned_kernel", "sqrt.rn.f32"): _ROUNDED,
    ("norm_qsigned_kernel", "div.rn.f64"): _ROUNDED,
    ("norm_qsigned_kernel", "sqrt.rn.f64"): _ROUNDED,
    ("sums_kernel", "div.rn.f64"): _ROUNDED,
    ("ternary_kernel", "div.rn.f64"): _ROUNDED,
    ("scale_kernel", "div.rn.f64"): _ROUNDED,
}
CUDA_LISTED = {
    ("qrelu_forward_kernel", "rcp.rn.f32"): _ROUNDED,
    ("qrelu_forward_channels_kernel", "rcp.rn.f32"): _ROUNDED,
    ("qrelu_backward_x_kernel", "rcp.rn.f32"): _ROUNDED,
    ("qrelu_backward_x_kernel", "div.rn.f32"): _ROUNDED,
    ("qrelu_backward_x_kernel", "ex2.approx.f32"): _SLOPE,
    ("qrelu_backward_x_kernel", "rcp.approx.ftz.f32"): "a slope of log_tailed_relu, 0 where its divisor exceeds 2**126",
    ("qrelu_backward_x_channels_kernel", "rcp.rn.f32"): _ROUNDED,
    ("qrelu_backward_x_channels_kernel", "div.rn.f32"): _ROUNDED,
    ("qrelu_backward_x_channels_kernel", "ex2.approx.f32"): _SLOPE,
    ("qsigned_forward_kernel", "rcp.rn.f32"): _ROUNDED,
    ("qsigned_groups_kernel", "div.rn.f32"): _ROUNDED,
    ("qsigned_groups_kernel", "rcp.rn.f32"): _ROUNDED,
    ("qsigned_rows_kernel", "div.rn.f32"): _ROUNDED,
    ("qsigned_rows_kernel", "rcp.rn.f32"): _ROUNDED,
    ("norm_kernel", "div.rn.f32"): _ROUNDED,
    ("norm_kernel", "rcp.rn.f32"): _ROUNDED,
    ("norm_kernel", "sqrt.rn.f32"): _ROUNDED,
    ("norm_kernel", "div.rn.f64"): _ROUNDED,
    ("norm_kernel", "rcp.rn.f64"): _ROUNDED,
    ("norm_kernel", "sqrt.rn.f64"): _ROUNDED,
    ("weight_sums_kernel", "div.rn.f64"): _ROUNDED,
    ("weight_ternary_kernel", "div.rn.f64"): _ROUNDED,
    ("weight_scale_kernel", "div.rn.f64"): _ROUNDED,
}


@needs_triton
def test_what_flushes_or_approximates_in_triton(every_pair):
    """That what they may return changes nothing exact is tested in triton_interpreted.py and triton_signed.py."""
    found = [made for *_, made in every_pair]
    found += [triton_kernels.in_ptx(kernel, arch) for arch, kernel in triton_kernels.in_float64(ARCHS)]
    found += (norms := [triton_kernels.in_ptx(kernel, arch) for arch, kernel in triton_kernels.norms(ARCHS)])
    found.append(triton_kernels.in_ptx(triton_kernels.mlp("linear_to_codes", 0), "sm_90"))
    assert not any("fma.rn" in made.asm["ptx"] for made in norms)
    assert set().union(*(listed(made.asm["ptx"]) for made in found)) == TRITON_LISTED.keys()


@pytest.mark.parametrize("arch", ARCHS)
def test_what_flushes_or_approximates_in_cuda(tools, arch):
    every = (KERNELS, WEIGHT_KERNELS, NORM_KERNELS)
    found = (listed(cuda_cubin(arch, some).with_suffix(".ptx").read_text()) for some in every)
    assert set().union(*found) == CUDA_LISTED.keys()


@needs_triton
@pytest.mark.parametrize("arch", ARCHS)
def test_the_gpus_arithmetic_of_the_interpreter_is_that_of_these_instructions(arch, tmp_path, monkeypatch):
    import gpu_arithmetic

    from coarsegrad.triton import kernels

    monkeypatch.setattr(kernels, "every_operation", gpu_arithmetic.every_operation, raising=False)
    pointers = {"x_ptr": torch.empty(128), "y_ptr": torch.empty(128), "out_ptr": torch.empty(1024)}
    kernel = triton_kernels.TritonKernel("", "float32", "every_operation", FLOATS, arguments=pointers)
    ptx = triton_kernels.compiled(kernel, arch, tmp_path, enable_fp_fusion=False).asm["ptx"]
    modelled = itertools.chain(*(model.instructions for model in gpu_arithmetic.MODELS.values()))
    assert sorted(instruction for _, instruction in listed(ptx)) == sorted(modelled)


def test_a_flag_that_flushes_is_noticed(folder):
    source = folder / "flushed.cu"
    source.write_text("__global__ void my_kernel(float* y, float x) { y[0] = ceilf(x); y[1] = y[2] / x; }\n")
    for flag, found in (("-ftz=false", {"div.rn.f32"}), ("-ftz=true", {"cvt.rpi.ftz.f32.f32", "div.rn.ftz.f32"})):
        ptx = compile_cuda(source, "sm_90", folder, (*FLAGS, flag)).with_suffix(".ptx")
        assert listed(ptx.read_text()) == {("my_kernel", each) for each in found}
    with pytest.raises(ValueError, match="no function of PTX"):
        listed("")


def test_the_command(tools, capsys):
    with pytest.raises(SystemExit) as done:
        main(["--arch", "sm_90", "--only", "backward, mask*", "--show"])
    shown = capsys.readouterr()
    assert done.value.code == 0, shown.err
    assert shown.out.count("\nsm_90  backward, mask") == 3 and shown.out.count("LDG.E.128") >= 6
    assert "All promises hold." in shown.err


def test_the_command_says_what_is_wrong(tools, capsys, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no kernel matches 'nothing'"):
        main(["--arch", "sm_90", "--only", "nothing"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(SystemExit) as done:
        main(["--arch", "sm_90"])
    assert done.value.code == 2 and "nvcc is neither on the PATH" in capsys.readouterr().err
