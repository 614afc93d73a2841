"""The gate on the CUDA kernels' machine code: that it reads code rightly, and that the promised figures hold."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bench import sass, sass_triton
from bench.sass_model import ARCHS, BulkPath, Data, SassError, bulk_path, occupancy, parse
from bench.sass_page import document
from paths import ROOT


def _skip_without_tools() -> None:
    try:
        sass.toolchain()
    except SassError as error:
        pytest.skip(str(error))


needs_triton = pytest.mark.skipif(not sass_triton.installed(), reason="triton is not installed")


@pytest.fixture(scope="session")
def tools():
    _skip_without_tools()


# ------------------------------------------------------------------------------- code written by hand


def _bulk(*lines: str, reads: int = 1, writes: int = 1) -> BulkPath:
    """The bulk path of a function of the disassembler's lines; those that end in ":" are labels."""
    text = "\n".join(line if line.endswith(":") else f"        /*0000*/      {line} ;" for line in lines)
    function = parse(f'\t.section\t.text.hand,"ax",@progbits\nhand:\n{text}\n')["hand"]
    return bulk_path(function, Data(4, reads, writes, 0))


def _names(path: BulkPath) -> list[str]:
    return [each.name for each in path.instructions]


LOAD, STORE = "LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64+0x10], R4"
NARROW_LOAD, NARROW_STORE = "LDG.E.U16 R4, desc[UR4][R2.64]", "STG.E.U16 desc[UR4][R2.64], R4"
ADD = "FADD R4, R4, 1"


def test_code_without_a_loop_is_one_path_and_what_follows_the_end_is_not_counted():
    path = _bulk(LOAD, "@P0 EXIT", STORE, "EXIT", ".L_x_0:", "BRA `(.L_x_0)", "NOP")
    assert not path.loop
    assert _names(path) == ["LDG", "EXIT", "STG", "EXIT"]
    assert (path.accesses("load"), path.accesses("store")) == ([16], [16])


@pytest.mark.parametrize("first", [0, 1])
def test_a_loop_of_wide_accesses_is_the_bulk_path_however_much_a_narrow_one_does(first):
    wide = [".L_x_1:", LOAD, ADD, STORE, "@P0 BRA `(.L_x_1)"]
    narrow = [".L_x_2:", *[NARROW_LOAD, ADD, NARROW_STORE] * 20, "@P1 BRA `(.L_x_2)"]
    loops = [wide, narrow] if first == 0 else [narrow, wide]
    path = _bulk("MOV R2, R3", *loops[0], *loops[1], "EXIT")
    assert path.loop and _names(path) == ["LDG", "FADD", "STG", "BRA"]


def test_without_loops_of_wide_accesses_it_is_the_whole_with_some_or_the_loop_that_moves_most():
    loops = [".L_x_1:", NARROW_LOAD, ADD, "@P0 BRA `(.L_x_1)"]
    loops += [".L_x_2:", NARROW_LOAD, NARROW_STORE, "@P0 BRA `(.L_x_2)"]
    assert _names(_bulk(*["LDG.E R4, desc[UR4][R2.64]"] * 3, *loops, "EXIT")) == ["LDG", "STG", "BRA"]
    path = _bulk(LOAD, *loops, STORE, "EXIT")
    assert not path.loop and path.accesses("load") == [16] and len(path.inner) == 6


def test_of_several_loops_it_is_the_slowest_that_does_all_that_is_asked_for():
    def loop(label: str, *lines: str) -> list[str]:
        return [f"{label}:", *lines, f"@P0 BRA `({label})"]

    copies = loop(".L_x_1", LOAD, STORE, LOAD, STORE)
    works = loop(".L_x_2", LOAD, ADD, STORE)
    sums = loop(".L_x_3", LOAD, *[ADD] * 9)
    assert _names(_bulk(*copies, *works, *sums, "EXIT")) == ["LDG", "FADD", "STG", "BRA"]
    assert len(_bulk(*copies, *works, *sums, "EXIT", writes=0).instructions) == 11
    # None does: then any.
    assert len(_bulk(*copies, *works, *sums, "EXIT", reads=3).instructions) == 11


def test_of_two_ways_through_a_loop_the_one_that_moves_more_counts_then_the_longer():
    def way(*other: str) -> list[str]:
        lines = [".L_x_1:", "@P0 BRA `(.L_x_2)", LOAD, STORE, "BRA `(.L_x_3)", ".L_x_2:", *other, ".L_x_3:"]
        return _names(_bulk(*lines, "@P1 BRA `(.L_x_1)", "EXIT"))

    assert way(*[ADD] * 20) == ["BRA", "LDG", "STG", "BRA", "BRA"]
    assert way(LOAD, ADD, ADD, STORE) == ["BRA", "LDG", "FADD", "FADD", "STG", "BRA"]
    # Unless it is the way of rare cases.
    assert way(LOAD, ADD, "CALL.REL.NOINC `($slow)", STORE) == ["BRA", "LDG", "STG", "BRA", "BRA"]
    assert way(LOAD, ".L_x_4:", ADD, ADD, "@P2 BRA `(.L_x_4)", STORE) == ["BRA", "LDG", "STG", "BRA", "BRA"]


def test_of_nested_loops_the_inner_one_counts_if_it_moves_the_data_and_is_told_apart_if_not():
    inner = [".L_x_2:", LOAD, STORE, "@P0 BRA `(.L_x_2)"]
    path = _bulk(".L_x_1:", "MOV R2, R3", *inner, "@P1 BRA `(.L_x_1)", "EXIT")
    assert _names(path) == ["LDG", "STG", "BRA"] and not path.inner
    inner = [".L_x_2:", NARROW_LOAD, ADD, "@P0 BRA `(.L_x_2)"]
    path = _bulk(".L_x_1:", LOAD, *inner, STORE, "@P1 BRA `(.L_x_1)", "EXIT")
    assert _names(path) == ["LDG", "LDG", "FADD", "BRA", "STG", "BRA"]
    assert [each.name for each in path.inner] == ["LDG", "FADD", "BRA"] and path.accesses("load") == [16]


def test_branches_on_predicates_among_the_operands_may_fall_through():
    path = _bulk(".L_x_1:", LOAD, "BRA.U UP0, `(.L_x_2)", STORE, ".L_x_2:", "BRA.U !UP1, `(.L_x_1)", "EXIT")
    assert _names(path) == ["LDG", "BRA", "STG", "BRA"]
    path = _bulk(".L_x_1:", LOAD, "BRA.DIV ~URZ, `(.L_x_2)", STORE, "@P0 BRA P1, `(.L_x_1)", "EXIT", ".L_x_2:", "EXIT")
    assert _names(path) == ["LDG", "BRA", "STG", "BRA"]
    table = '(*"BRANCH_TARGETS .L_x_1,.L_x_2"*)'
    path = _bulk(".L_x_1:", LOAD, STORE, f"BRX R8 -0x10 {table}", ADD, ".L_x_2:", "EXIT")
    assert _names(path) == ["LDG", "STG", "BRX"]


def test_the_call_of_a_label_is_a_jump_and_that_of_a_function_is_noted():
    path = _bulk(".L_x_1:", LOAD, STORE, "@P0 CALL.REL.NOINC `(.L_x_2)", "BRA `(.L_x_1)", ".L_x_2:", "EXIT")
    assert path.loop and path.calls == 0
    assert _bulk(LOAD, "CALL.REL.NOINC `($slow)", STORE, "EXIT", "$slow:", "RET.REL.NODEC R4 `(hand)").calls == 1


def test_accesses_under_opposite_guards_count_once():
    path = _bulk(f"@P1 {NARROW_LOAD}", f"@P1 {LOAD}", f"@!P1 {LOAD}", STORE, "EXIT")
    assert (path.accesses("load"), path.accesses("store")) == ([2, 16], [16])


def test_bytes_in_flight():
    other = LOAD.replace("R4", "R8")
    use = ["FADD R5, R5, 1", "FADD R11, R11, 1"]
    assert _bulk(LOAD, other, *use, "EXIT").bytes_in_flight == 32
    assert _bulk(LOAD, use[0], other, use[1], "EXIT").bytes_in_flight == 16
    # The first load is for the next iteration, and the second is under way when it is asked for again.
    assert _bulk(".L_x_1:", use[0], LOAD, use[1], other, "@P0 BRA `(.L_x_1)", "EXIT").bytes_in_flight == 32
    # Stores, up to the next wait for a load.
    assert _bulk(NARROW_LOAD, ADD, *[STORE] * 3, "EXIT").bytes_in_flight == 48
    assert _bulk(LOAD, *[STORE] * 2, other, use[1], STORE, "EXIT").bytes_in_flight == 32


def test_unknown_targets_and_empty_text_are_errors():
    with pytest.raises(SassError, match=r"hand: no target is known for `BRX R4 -0x10`"):
        _bulk("BRX R4 -0x10", "EXIT")
    with pytest.raises(SassError, match="no code sections"):
        parse("")
    with pytest.raises(SassError, match="hand: no instructions"):
        _bulk()


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "warps"),
    [
        ("sm_80", 256, 32, 0, 64),
        ("sm_80", 256, 33, 0, 48),  # 40 registers a thread: 51 warps, 6 blocks of 8
        ("sm_90", 256, 255, 0, 8),
        ("sm_90", 32, 16, 0, 32),  # 32 blocks
        ("sm_100", 256, 32, 50 * 1024, 32),  # 4 blocks of 51 KiB in 228 KiB
        ("sm_120", 256, 32, 0, 48),
        ("sm_120", 1024, 32, 0, 32),
    ],
)
def test_occupancy(arch, threads, registers, shared, warps):
    assert occupancy(ARCHS[arch], threads, registers, shared) == warps / ARCHS[arch].warps


# ------------------------------------------------------------------------------- small kernels, compiled

TOYS = """
#include <cstdint>
#include <cuda_bf16.h>
namespace cg {
struct alignas(16) Pack { uint32_t v[4]; };
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
__global__ void __launch_bounds__(256) narrow_stores(const Pack* __restrict__ x, Half* __restrict__ y, int64_t n) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  #pragma unroll 1
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const Pack a = x[i];
    y[2 * i + (a.v[0] & 1)] = {a.v[0], a.v[1]};
    y[2 * i + (~a.v[0] & 1)] = {a.v[2], a.v[3]};
  }
}
// The logarithms take turns on 16 lanes.
__global__ void __launch_bounds__(256) logarithms(const float4* __restrict__ x, float4* __restrict__ y, int64_t n) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  #pragma unroll 1
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    float4 a = x[i];
    for (int k = 0; k < 16; ++k) a = {__log2f(a.x), __log2f(a.y), __log2f(a.z), __log2f(a.w)};
    y[i] = a;
  }
}
// 64 sums at once do not fit into 24 registers.
__global__ void crowded(const float* __restrict__ x, float* __restrict__ y, int n) {
  float sums[64];
  for (int k = 0; k < 64; ++k) sums[k] = x[32 * k + threadIdx.x];
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < 64; ++k) sums[k] = sums[k] * x[i] + sums[(k + 1) % 64];
  for (int k = 0; k < 64; ++k) y[32 * k + threadIdx.x] = sums[k];
}
}  // namespace cg
"""

TOY_INSTANCES = {
    "copy": sass.Instance("copy", "float32", "copy<Pack>", 256, Data(4, 1, 1, 0), 8, shares=dict.fromkeys(ARCHS, 1.0)),
    "copy_halves": sass.Instance("copy of 8-byte packs", "float32", "copy<Half>", 256, Data(4, 1, 1, 0), 4),
    "scalar": sass.Instance("scalar", "bfloat16", "scalar", 256, Data(2, 1, 1, 0), 1, shares=dict.fromkeys(ARCHS, 1.0)),
    "narrow_stores": sass.Instance("narrow stores", "float32", "narrow_stores", 256, Data(4, 1, 1, 0), 4),
    "logarithms": sass.Instance("logarithms", "float32", "logarithms", 256, Data(4, 1, 1, 0), 4),
}


@pytest.fixture(scope="module")
def toy_folder(tools, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toys.cuh").write_text(TOYS)
    (folder / "toys.cu").write_text(sass.source_of(TOY_INSTANCES.values(), '#include "toys.cuh"\n'))
    return folder


@pytest.fixture(scope="module", params=ARCHS)
def toys(request, toy_folder) -> dict[str, sass.Report]:
    instances = list(TOY_INSTANCES.values())
    flags = ["-std=c++17", f"-I{toy_folder}"]
    kernels = sass.find(instances, sass.compile_kernels(toy_folder / "toys.cu", request.param, toy_folder, flags))
    made = (sass.Report.of(*pair, ARCHS[request.param]) for pair in zip(instances, kernels, strict=True))
    return dict(zip(TOY_INSTANCES, made, strict=True))


def test_a_copy_of_two_packs_a_thread(toys):
    row = toys["copy"].row()
    assert (row["wide_loads"], row["loads"], row["wide_stores"], row["stores"]) == (2, 2, 2, 2)
    assert row["loop"] and row["elements"] == 8 and row["instructions_per_element"] < 3
    assert row["thread_bytes_in_flight"] == 32
    assert row["spill_bytes"] == row["stack_bytes"] == row["shared_bytes"] == row["inner_instructions"] == 0
    assert row["share"] == 1 and row["bound"] == "memory"
    assert list(toys["copy"].broken()) == []


def test_a_scalar_bfloat16_kernel_is_bound_by_the_bytes_in_flight(toys):
    report = toys["scalar"]
    arch = report.model.arch
    row = report.row()
    assert not row["loop"] and row["elements"] == 1 and row["wide_loads"] == 0 and row["occupancy"] == 1
    expected = 2 * 32 * arch.warps / (700 * arch.bytes_per_clock)
    if arch.name in ("sm_90", "sm_100"):
        assert expected < 0.41
        assert row["share"] == pytest.approx(expected) and row["bound"] == "latency"
        assert any("of the bandwidth by the model, promised 100%" in line for line in report.broken())
    assert any(line.startswith("loads of [2] and stores of [2] bytes for 1 elements") for line in report.broken())


def test_accesses_of_8_bytes_are_noticed(toys):
    for name in ("copy_halves", "narrow_stores"):
        report = toys[name]
        assert report.row()["elements"] == 4
        (line,) = report.broken()
        assert line.endswith("bytes for 4 elements, promised 128-bit ones for all numbers")
    assert toys["copy_halves"].row()["wide_loads"] == toys["narrow_stores"].row()["wide_stores"] == 0
    assert toys["narrow_stores"].row()["wide_loads"] == 1


def test_special_functions_are_bound_by_their_units(toys):
    model = toys["logarithms"].model
    assert model.path.mix["MUFU"] == 64
    assert model.slow_clocks == 128
    if model.arch.name in ("sm_80", "sm_90", "sm_100"):
        assert model.bound == "slow units"
        assert model.share == pytest.approx(32 * 32 / model.arch.bytes_per_clock / 128)


def test_a_spill_is_noticed(toy_folder):
    instance = sass.Instance("crowded", "float32", "crowded", 32, Data(4, 1, 0, 0), 1, wide=False)
    source = toy_folder / "crowded.cu"
    source.write_text(sass.source_of([instance], '#include "toys.cuh"\n'))
    flags = ["-std=c++17", f"-I{toy_folder}"]
    spills = {}
    for limit in ([], ["-maxrregcount=24"]):
        (kernel,) = sass.find([instance], sass.compile_kernels(source, "sm_80", toy_folder, flags + limit))
        lines = list(sass.Report.of(instance, kernel, ARCHS["sm_80"]).broken())
        spills[bool(limit)] = [line for line in lines if "spilled" in line]
    assert spills[False] == []
    assert re.match(r"[1-9]\d* bytes spilled and [1-9]\d* bytes of stack, promised none", spills[True][0])


def test_a_step_that_is_too_large_is_refused(toys):
    instance = sass.Instance("copy", "float32", "copy<Pack>", 256, Data(4, 1, 1, 0), 16)
    with pytest.raises(SassError, match="a pass of 8 elements, fewer than a step of 16"):
        sass.Report.of(instance, toys["copy"].kernel, toys["copy"].model.arch).row()


def test_code_is_kept_until_the_source_changes(toy_folder, capsys):
    def compiled() -> bool:
        sass.compile_kernels(source, "sm_90", toy_folder, [f"-I{toy_folder}"])
        return "compiling" in capsys.readouterr().err

    source, header = toy_folder / "kept.cu", toy_folder / "kept.cuh"
    source.write_text('#include "kept.cuh"\n')
    header.write_text("__global__ void kept(float* y) { *y = 1; }\n")
    assert [compiled(), compiled()] == [True, False]
    header.write_text("__global__ void kept(float* y) { *y = 2; }\n")
    assert [compiled(), compiled()] == [True, False]


def test_errors_of_the_compiler_and_missing_programs_are_told(toy_folder, monkeypatch):
    broken = toy_folder / "broken.cu"
    broken.write_text("__global__ void broken() { nonsense; }\n")
    with pytest.raises(SassError, match="nonsense"):
        sass.compile_kernels(broken, "sm_90", toy_folder)
    monkeypatch.setenv("PATH", str(toy_folder))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(SassError, match=r"nvcc is neither on the PATH nor in \$CUDA_HOME/bin"):
        sass.toolchain()


# ------------------------------------------------------------------------------------ the project's kernels


@pytest.fixture(scope="module", params=ARCHS)
def reports(request, tools) -> list[sass.Report]:
    return sass.reports([request.param])


def test_the_promises_hold(reports):
    assert sass.broken_promises(reports) == []


def test_what_is_promised(reports):
    """In figures, so that no promise is lost by a change of the list."""
    rows = [report.row() for report in reports]
    assert all(row["spill_bytes"] == row["stack_bytes"] == 0 for row in rows)
    assert all(row["all_wide"] for row in rows)
    least = {"sm_80": 1.0, "sm_90": 1.0, "sm_100": 0.9, "sm_120": 0.0}
    promised = [row for row in rows if row["kernel"] in ("forward, mask", "backward, mask")]
    assert [row["dtype"] for row in promised] == ["float32", "bfloat16", "float16"] * 2
    for row in promised:
        assert row["share"] >= least[row["arch"]], row
        assert row["wide_loads"] >= 2 and row["wide_stores"] >= 2 and row["thread_bytes_in_flight"] >= 16


def test_pairwise():
    options = {"a": (1, 2, 3), "b": (True, False), "c": ("x", "y", "z", None), "d": (5,)}
    settings = sass_triton.pairwise(**options)
    assert all(setting.keys() == options.keys() for setting in settings)
    for a, b in itertools.combinations(options, 2):
        assert {(s[a], s[b]) for s in settings} == set(itertools.product(options[a], options[b]))
    assert len(settings) <= 14 < 24


@needs_triton
def test_triton_with_every_pair_of_options(tools):
    """No spills, no stack, 128-bit accesses, in settings in which every two options meet."""
    pairs = sass_triton.covering(tuple(ARCHS))
    assert {arch for arch, _ in pairs} == set(ARCHS)
    assert sass.broken_promises(sass.triton_report(kernel, arch) for arch, kernel in pairs) == []


@needs_triton
@pytest.mark.parametrize("arch", sass_triton.AMD)
def test_triton_for_amd(arch, tmp_path):
    """To machine code, without spills, in wide accesses. Nothing ran."""
    of_this_arch = sass_triton.AMD.index(arch)
    for kernel in sass_triton.rows()[of_this_arch :: len(sass_triton.AMD)]:
        made = sass_triton.compiled(kernel, arch, tmp_path)
        assert made.asm["hsaco"].startswith(b"\x7fELF")
        code = made.asm["amdgcn"]
        assert re.search(rf"amdgcn_target .*-{arch}\"", code)
        assert re.findall(r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size): +(\d+)", code) == ["0"] * 3
        for access, count in (("load", kernel.data.reads), ("store", kernel.data.writes)):
            # With x a program has half as many elements: 64 bits for each of the 64 lanes that a wave of gfx9 has.
            keeps_x = {"x_ptr", "dy_ptr"} <= kernel.pointers.keys()
            wide = "dwordx2|dwordx4|b128" if keeps_x else "dwordx4|b128"
            assert count == 0 or re.search(rf"_{access}_({wide})\b", code), (kernel.name, access)


@needs_triton
def test_triton_rounds_to_bfloat16_by_the_instruction(tmp_path):
    """Triton's interpreter runs integer arithmetic in its place, which triton_interpreted.py proves to be the same."""
    kernel = next(each for each in sass_triton.rows() if each.name == "forward, mask" and each.dtype == "bf16")
    for arch in ARCHS:
        ptx = sass_triton.compiled(kernel, arch, tmp_path).asm["ptx"]
        assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", ptx), arch
        assert not re.search(r"\b(32767|0x7FFF|2143289344)\b", ptx), arch


@needs_triton
def test_triton_rounds_products_and_sums_apart(tmp_path):
    """The option that says so has an effect, on both makes."""
    kernel = next(each for each in sass_triton.rows() if each.name == "forward, mask, 8 bits")
    for arch, text, fused in (("sm_90", "sass", r"\bFFMA"), ("gfx942", "amdgcn", r"\bv_(pk_)?fma")):
        counts = []
        for fusion in (False, True):
            made = sass_triton.compiled(kernel, arch, tmp_path, enable_fp_fusion=fusion)
            counts.append(len(re.findall(fused, made.asm[text])))
        assert counts[0] < counts[1], arch


def test_the_table_in_the_docs_is_what_the_command_writes(tools):
    page = (ROOT / "docs" / "sass.md").read_text()
    written_by = re.search(r"machine code of (nvcc .*?)\. No GPU", page)[1]
    if written_by != sass.compiler():
        pytest.skip(f"docs/sass.md was written with {written_by}, and here is {sass.compiler()}")
    made = document(sass.reports(), sass.compiler())
    assert page == made, "write it again: python -m bench.sass --write docs/sass.md"


def _command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench.sass", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_the_command(tools):
    done = _command("--json", "--arch", "sm_90", "--only", "backward, mask*")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["kernel"], row["arch"]) for row in rows] == [("backward, mask", "sm_90")] * 3


def test_the_command_shows_instructions(tools, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.sass", "--arch", "sm_90", "--show"])  # its reports were made above
    with pytest.raises(SystemExit) as done:
        sass.main()
    shown = capsys.readouterr()
    assert done.value.code == 0, shown.err
    assert "no timing" in shown.out and shown.out.count("LDG.E.128") >= 2


def test_the_command_says_what_is_wrong(tmp_path):
    done = _command("--only", "nothing")
    assert done.returncode == 1 and "no kernel matches 'nothing'; there are forward, forward, mask" in done.stderr
    assert "leave out --only and --arch" in _command("--write", "page.md", "--arch", "sm_80").stderr
    done = _command(PATH=str(tmp_path), CUDA_HOME="")
    assert done.returncode == 2 and "nvcc is neither on the PATH nor in $CUDA_HOME/bin" in done.stderr
