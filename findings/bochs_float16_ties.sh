#!/usr/bin/env bash
# bochscpu-python 0.2.0, whose processor is that of Bochs 2.7: VCVTPS2PH rounds to the nearest float16, ties to even. Guess
# before the run: it does under emulation too, as Bochs's floats are those of a library of IEEE 754.
# Seen (x86-64): numbers between two float16s are rounded right, but one halfway between two goes away from zero, also where
# the even one is below: 2501 becomes 2502, and half the ties of all float16s are wrong, subnormal ones included. Kernels
# in float16 that are tested without the processor differ in a bit from the same kernels on it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet bochscpu-python==0.2.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import ctypes
import mmap
import struct

import bochscpu
import bochscpu.memory
import numpy

# Eight at a time: vmovups ymm0, [rsi]; vcvtps2ph xmm0, ymm0, 0; vmovups [rdi], xmm0; add rsi, 32; add rdi, 16;
# dec rcx; jnz; hlt
CODE = bytes.fromhex("c5fc1006 c4e37d1dc000 c5f81107 4883c620 4883c710 48ffc9 75e5 f4")
MEMORY = mmap.mmap(-1, 1 << 21)
TABLES, PROGRAM, INPUT, OUTPUT = 0x2000, 0x4000, 0x10000, 0x100000


def to_float16(numbers):
    """By the emulated processor."""
    data = numpy.resize(numbers, -(-len(numbers) // 8) * 8).astype("<f4")
    MEMORY[PROGRAM : PROGRAM + len(CODE)] = CODE
    MEMORY[INPUT : INPUT + data.nbytes] = data.tobytes()
    # One page of 1 GiB.
    struct.pack_into("<Q", MEMORY, TABLES, (TABLES + 0x1000) | 7)
    struct.pack_into("<Q", MEMORY, TABLES + 0x1000, 0x87)
    session = bochscpu.Session()
    start = ctypes.addressof(ctypes.c_char.from_buffer(MEMORY))
    session.missing_page_handler = lambda at: bochscpu.memory.page_insert(at & -4096, start + (at & -4096))
    state = bochscpu.State()
    state.cr0, state.cr3, state.efer, state.cr4, state.xcr0 = 0x80050033, TABLES, 0x501, 0x40620, 7
    state.rflags, state.mxcsr, state.mxcsr_mask = 2, 0x1F80, 0xFFFF
    state.rip, state.rsi, state.rdi, state.rcx = PROGRAM, INPUT, OUTPUT, len(data) // 8
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        segment = bochscpu.Segment()
        segment.base, segment.limit, segment.present = 0, 0xFFFFFFFF, True
        segment.selector, segment.attr = (8, 0xA09B) if name == "cs" else (16, 0xC093)
        setattr(state, name, segment)
    session.cpu.state = state
    hook = bochscpu.Hook()
    hook.hlt = lambda session, _: session.stop()
    session.run([hook])
    return numpy.frombuffer(bytes(MEMORY[OUTPUT : OUTPUT + 2 * len(data)]), "<u2")[: len(numbers)]


lower = numpy.arange(0x7BFF, dtype=numpy.uint16)  # all positive ones but the largest
below, above = (each.view(numpy.float16).astype(numpy.float64) for each in (lower, lower + numpy.uint16(1)))
ties = ((below + above) / 2).astype(numpy.float32)
assert ((below + above) / 2 == ties).all()
zero, infinity = numpy.float32(0), numpy.float32(numpy.inf)
for name, numbers in (("below a tie", numpy.nextafter(ties, zero)), ("above a tie", numpy.nextafter(ties, infinity))):
    wrong = (to_float16(numbers) != numbers.astype(numpy.float16).view(numpy.uint16)).sum()
    print(f"{name}: {wrong} of {len(numbers)} differ from numpy's")
    assert wrong == 0
found, right = to_float16(ties), ties.astype(numpy.float16).view(numpy.uint16)
print(f"a tie: {(found != right).sum()} of {len(ties)} differ from numpy's")
print("2501 becomes", to_float16(numpy.float32([2501])).view(numpy.float16)[0])
assert (right == lower + lower % 2).all()
assert (found == lower + 1).all()
PY
