"""bench.instructions and bench.bounds: what is counted, and what the counts say of measured times."""

from __future__ import annotations

import csv
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import bounds, counters, instructions, kernels, report
from bench.bounds import Bound
from bench.promises import PROMISES

# Ten instructions a byte in a kernel, and a hundred elsewhere. "trap" is no instruction at all.
PROGRAM = r"""
#include <cstdio>
#include <cstring>
#include <string>

#define TEN asm volatile("nop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop")

namespace cg {
namespace {
template <class T>
__attribute__((noinline)) void kernel(const T* from, long count) {
  const auto each = [](T) __attribute__((noinline)) { TEN; };
  for (long i = 0; i < count; ++i) each(from[i]);
}
}  // namespace
struct Argument {};
}  // namespace cg

__attribute__((noinline)) void elsewhere(cg::Argument*, long count) {
  for (long i = 0; i < count; ++i) { TEN; TEN; TEN; TEN; TEN; TEN; TEN; TEN; TEN; TEN; }
}

int main(int argc, char** argv) {
  std::string given(100000, '\0');
  given.resize(std::fread(given.data(), 1, given.size(), stdin));
  if (argc > 1 && !std::strcmp(argv[1], "trap")) {
#ifdef __aarch64__
    asm volatile(".inst 0");
#else
    asm volatile("ud2");
#endif
  }
  cg::kernel(given.data(), given.size());
  elsewhere(nullptr, given.size());
  std::fwrite(given.data(), 1, given.size(), stdout);
  return argc > 1;
}
"""


@pytest.fixture(params=list(instructions.MACHINES))
def machine(request):
    found = instructions.MACHINES[request.param]
    if why := found.why_not():
        pytest.skip(why)
    return found


@pytest.fixture
def program(machine, tmp_path):
    source = tmp_path / "program.cpp"
    source.write_text(PROGRAM)
    subprocess.run([machine.tools[0], "-O2", "-static", "-o", tmp_path / "program", source], check=True)
    return str(tmp_path / "program")


def test_instructions_of_kernels_are_counted(machine, program):
    totals = []
    for count in (1000, 3000):
        total, out = machine.count([program], b"x" * count)
        assert out == b"x" * count
        totals.append(total)
    assert 10 <= (totals[1] - totals[0]) / 2000 <= 20


def test_an_unknown_instruction_is_no_count(machine, program):
    with pytest.raises(instructions.NotCounted, match="does not know its instructions"):
        machine.count([program, "trap"], b"x")
    with pytest.raises(instructions.NotCounted, match="ended with status 1"):
        machine.count([program, "fails"], b"x")


def test_every_kernel_is_counted():
    made = [instructions.cases(dtype, instructions.COUNTS[0]) for dtype in (torch.bfloat16, torch.uint8)]
    assert (*made[0], *made[1]) == instructions.COUNTED
    assert set(kernels.KERNELS) - set(made[0]) == {"norm, signed, two ops, per group"}


@pytest.fixture
def machines(monkeypatch):
    """One that counts, but for one of its sets, and one that does not."""

    class Counts(instructions.Machine):
        def build(self, folder, sources):
            return Path("program" if sources == instructions.ROOT else "other program")

        def versions(self):
            return {"compiler": "g++ 12", "counter": "an emulator"}

    def per_element(machine, program, isa, kernel, dtype):
        if isa == "avx512":
            raise instructions.NotCounted("too new")
        return dtype.itemsize * (1.25 if program.name == "program" or kernel == "copy" else 1.0)

    machines = {
        "x86_64": Counts(("avx2", "avx512"), ("amx",), (), lambda *_: None),
        "aarch64": replace(instructions.MACHINES["aarch64"], tools=("no-such-compiler",)),
    }
    monkeypatch.setattr(instructions, "MACHINES", machines)
    monkeypatch.setattr(instructions, "per_element", per_element)
    return machines


def test_rows(machines, tmp_path, capsys):
    out = tmp_path / "instructions.csv"
    instructions.main(["--only", "copy", "forward, 2 bits", "--out", str(out), "--ghz", "2", "--per-cycle", "5"])
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["instruction_set"], row["dtype"], row["kernel"], row["instructions_per_element"]) for row in rows]
    assert found[:4] == [
        ("avx2", dtype, kernel, count)
        for dtype, count in (("float32", "5"), ("bfloat16", "2.5"))
        for kernel in ("copy", "forward, 2 bits")
    ]
    why = "no no-such-compiler found"
    assert [row["not_counted"] for row in rows] == [*[""] * 4, "too new", why, why]
    shown = capsys.readouterr().out
    assert "x86_64   avx512      not counted: too new" in shown and f"aarch64  neon        not counted: {why}" in shown
    assert "5    0.500 ns" in shown  # 5 at 5 in a cycle of half a nanosecond
    counts = bounds.rows_in(out)
    assert bounds.count_table(counts).splitlines()[-1] == "| forward, 2 bits | 5.00 | 2.50 |"
    assert bounds.layer_table(counts) == ""
    assert bounds.not_counted(counts).startswith(
        "Not counted: x86_64 avx512 (too new); aarch64 default, neon (no no-such"
    )


def test_layers_on_codes_have_more_sets_and_a_table_of_products(machines, tmp_path, capsys):
    out = tmp_path / "instructions.csv"
    instructions.main(["--only", "copy", "linear, 64 rows, 4 bits", "--dtypes", "float32", "--out", str(out)])
    counts = bounds.rows_in(out)
    assert [(row["instruction_set"], row["dtype"], row["kernel"]) for row in counts if row["kernel"]] == [
        ("avx2", "float32", "copy"), ("avx2", "uint8", "linear, 64 rows, 4 bits"),
        ("amx", "uint8", "linear, 64 rows, 4 bits"),
    ]  # fmt: skip
    assert "linear" not in bounds.count_table(counts)
    assert bounds.layer_table(counts).splitlines() == [
        "| layer | x86_64 avx2 | x86_64 amx |", "| --- | --- | --- |", "| linear, 64 rows, 4 bits | 1250 | 1250 |"
    ]  # fmt: skip
    assert "aarch64  neoni8mm    not counted" in capsys.readouterr().out


def test_what_is_not_counted_again_stays(machines, tmp_path, monkeypatch):
    """A set's counts stay where it cannot be counted; what was said of it goes once it is."""

    def counted(*options):
        instructions.main([*options, "--dtypes", "float32", "--out", str(out)])
        return {(row["instruction_set"], row["kernel"]): row for row in bounds.rows_in(out)}

    out = tmp_path / "instructions.csv"
    first = counted("--only", "copy", "forward, 2 bits")
    assert first["avx512", ""]["not_counted"] == "too new" and first["neon", ""]["not_counted"]
    monkeypatch.setattr(instructions, "per_element", lambda *_: 7.0)
    second = counted("--machines", "x86_64", "--only", "copy")
    assert second["avx2", "copy"]["instructions_per_element"] == second["avx512", "copy"][
        "instructions_per_element"
    ] == "7"  # fmt: skip
    assert second["avx2", "forward, 2 bits"] == first["avx2", "forward, 2 bits"]
    assert [key[0] for key in second] == ["avx2", "avx2", "avx512", "default", "neon"]  # as the machines have them
    assert second["neon", ""] == first["neon", ""] and ("avx512", "") not in second
    monkeypatch.setitem(instructions.MACHINES, "aarch64", machines["x86_64"])
    monkeypatch.setitem(instructions.MACHINES, "x86_64", replace(machines["x86_64"], tools=("no-such-compiler",)))
    third = counted("--machines", "x86_64", "aarch64", "--only", "copy")
    assert third["avx2", "copy"]["instructions_per_element"] == "7" and ("avx2", "") not in third


def test_nothing_counted_is_nothing_written(machines, tmp_path):
    out = tmp_path / "instructions.csv"
    with pytest.raises(SystemExit, match="nothing was counted"):
        instructions.main(["--machines", "aarch64", "--out", str(out)])
    assert not out.exists()


def test_a_wrong_output_is_no_count():
    def zeros(command, given):
        return 1, bytes(4 * instructions.COUNTS[0])

    with pytest.raises(instructions.BenchError, match="'copy': y differs from the reference"):
        machine = replace(instructions.MACHINES["x86_64"], count=zeros)
        instructions.per_element(machine, Path("program"), "avx2", "copy", torch.float32)


def test_another_checkout_is_counted_too(machines, tmp_path, capsys):
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    command = ["--only", "copy", "forward, 2 bits", "--dtypes", "float32", "--against", str(tmp_path)]
    instructions.main(command)
    shown = capsys.readouterr().out
    assert [line.split()[-3:] for line in shown.splitlines() if " float32 " in line] == [
        ["5", "5", "1.000"], ["5", "4", "1.250"]
    ]  # fmt: skip
    assert "avx512      not counted: too new" in shown and "aarch64  neon        not counted: no no-such" in shown
    assert shown.endswith(
        f"Over 2% more instructions than in {tmp_path}:\n  x86_64, avx2, float32, forward, 2 bits: 1.250\n"
    )
    instructions.main([*command[:2], *command[3:]])
    assert capsys.readouterr().out.endswith(f"Nothing takes over 2% more instructions than in {tmp_path}.\n")
    with pytest.raises(SystemExit, match="nothing was counted"):
        instructions.main([*command, "--machines", "aarch64"])


def test_the_kernels_of_another_checkout_are_built_in_this_program(tmp_path):
    other = tmp_path / "other"
    (other / "csrc").mkdir(parents=True)
    for _ in range(2):  # what an earlier run left is replaced
        made = counters._with_kernels_of(other, tmp_path / "sources")
        assert (made / "csrc").resolve() == other / "csrc"
        assert (made / "CMakeLists.txt").resolve() == instructions.ROOT / "CMakeLists.txt"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ghz", "0"],
        ["--per-cycle", "many"],
        ["--only", "nothing"],
        ["--against", "nowhere"],
        ["--against", str(instructions.ROOT), "--out", "counts.csv"],
    ],
)
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        instructions.main(arguments)
    assert arguments[-1] in capsys.readouterr().err


def test_help_helps(capsys):
    with pytest.raises(SystemExit, match="0"):
        instructions.main(["--help"])
    assert "pip install bochscpu-python" in capsys.readouterr().out


@pytest.mark.parametrize(
    "copy, measured, limit",
    # 14 instructions take 1 ns at least.
    [(2.0, 2.4, "memory"), (2.0, 2.6, "both"), (0.9, 1.2, "arithmetic"), (0.9, 1.1, "memory"), (2.0, 6.1, "neither")],
)
def test_limits(copy, measured, limit):
    bound = Bound(14, copy * 1e-9, measured * 1e-9)
    assert bound.arithmetic == pytest.approx(1e-9)
    assert bound.limit() == limit


def test_every_missed_promise_has_a_limit():
    """On the page of the committed results."""
    results = report.load(report.RESULTS)
    missed = [promise for promise in PROMISES if promise.verdict(results).startswith("missed")]
    rows = bounds.promise_table(results).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {promise.claim}" for promise in missed]
    assert not any("|  |" in row for row in rows), rows


def test_counts_of_another_instruction_set_say_nothing_of_what_was_measured():
    results = report.load(report.RESULTS)
    here = {**results["kernels"][0], "backend": "native (avx1024)"}
    assert bounds.instructions_of(results["instructions"], here, "forward, 2 bits") is None
    here["backend"] = "native (avx512)"
    assert bounds.instructions_of(results["instructions"], here, "forward, 2 bits") < 1.5
    assert bounds.times_of(results["kernels"], "x86_64", "avx512", "float32", "forward, 2 bits") is None
    assert bounds.times_of(results["kernels"], "x86_64", "avx2", "float32", "copy") is not None


def test_tools_are_named():
    machine = replace(instructions.MACHINES["aarch64"], tools=("cmake", "no-such-tool"))
    if shutil.which("cmake"):
        assert machine.why_not() == "no no-such-tool found"
    assert replace(machine, processors=("z80",)).why_not().startswith("this machine is ")
