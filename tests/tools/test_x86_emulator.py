"""tests/x86_emulator.py: a processor with AVX-512, and as much of Linux as the kernels' program needs."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import signal
import subprocess
import sys

import pytest
import x86_emulator

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the compiler is not for x86-64"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no c++ found"),
    pytest.mark.skipif(importlib.util.find_spec("bochscpu") is None, reason="no bochscpu-python found"),
]

# The sum of 16 times each line's number, by AVX-512, and of as many products by its VNNI.
PROGRAM = r"""
#include <immintrin.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

__attribute__((target("avx512f,avx512vnni"))) int sum_of(int number) {
  const __m512i all = _mm512_set1_epi32(number);
  return _mm512_reduce_add_epi32(all) + _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(all, all, _mm512_set1_epi32(1)));
}

__attribute__((naked, noinline)) void hundred() { asm volatile(".rept 99\nnop\n.endr\nret"); }

int main(int argc, char** argv) {
  const char* const what = argc > 1 ? argv[1] : "";
  if (!std::strcmp(what, "trap")) asm volatile("ud2");
  if (!std::strcmp(what, "fault")) return *reinterpret_cast<volatile int*>(1L << 40);
  std::vector<std::vector<int>> kept;  // of all sizes: from the heap, and mapped
  for (int number; std::scanf("%d", &number) == 1;) {
    kept.emplace_back(number * 1000, number);
    hundred();
    std::printf("%d\n", sum_of(kept.back().back()));
  }
  std::fprintf(stderr, "%zu lines\n", kept.size());
  return std::atoi(what);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "program.cpp").write_text(PROGRAM)
    for name, flags in (("program", ["-static"]), ("dynamic", [])):
        subprocess.run(["c++", "-O1", *flags, "-o", folder / name, folder / "program.cpp"], check=True)
    return folder / "program"


def run(*arguments, given=""):
    command = [sys.executable, x86_emulator.__file__, *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, text=True)


def test_a_program_runs(program):
    numbers = (1, 20, 100, 120, 5)
    done = run(program, "7", given="\n".join(map(str, numbers)))
    assert (done.returncode, done.stderr) == (7, "5 lines\n")
    assert done.stdout.splitlines() == [str(16 * number * 3) for number in numbers]


@pytest.mark.parametrize("lines", [1, 3])
def test_instructions_of_functions_are_counted(program, lines):
    for pattern, count in (("_Z7hundredv", 100), ("no such function", 0)):
        done = run("--count", pattern, program, given="2\n" * lines)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (0, str(count * lines))


def test_what_a_program_cannot_do_is_an_error(program, tmp_path):
    assert run(program, "trap").returncode == -signal.SIGILL
    fault = run(program, "fault")
    assert fault.returncode == 1 and "exception 14" in fault.stderr and "0x10000000000" in fault.stderr
    dynamic = run(program.with_name("dynamic"))
    assert dynamic.returncode == 1 and "not statically linked" in dynamic.stderr
    missing = run(tmp_path / "missing")
    assert missing.returncode == 2 and "no file" in missing.stderr
