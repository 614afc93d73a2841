"""Runs a program for x86-64 on an emulated Tiger Lake, which has AVX-512 and its VNNI, whatever this machine has.

    python x86_emulator.py [--count PATTERN] PROGRAM [ARGUMENT ...]

The processor is Bochs's (package bochscpu-python). Of Linux there is what a statically linked program of one thread
needs that reads its input, computes and writes its output; every other system call fails as an unknown one does. The
exit status is the program's; an unknown instruction ends this by SIGILL. With --count the standard error ends with the
number of instructions executed in functions whose mangled names match the pattern.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import ctypes
import errno
import mmap
import re
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

PAGE = mmap.PAGESIZE
MEMORY = 1 << 30  # as one entry of a page table maps; taken from this machine where it is touched
MAPPED = 1 << 29  # where what the program maps begins; its heap ends there
SYSTEM_CALLS, TABLES, STACK = 0x1000, 0x2000, 0x3F0000  # below the program, which a linker puts at 4 MiB
INVALID_OPCODE = 6


class Linux:
    """A process: its memory, and the system calls."""

    def __init__(self, given: bytes) -> None:
        self.memory = mmap.mmap(-1, MEMORY)
        self.given, self.read_so_far, self.output = given, 0, bytearray()
        self.heap = self.thread = 0
        self.mapped = MAPPED
        self.status: int | None = None

    def load(self, elf: bytes, arguments: list[bytes]) -> tuple[int, int]:
        """Where execution begins, and the stack."""
        if elf[:5] != b"\x7fELF\x02" or elf[16:20] != b"\2\0\x3e\0":  # of 64 bits, executable, x86-64
            raise SystemExit("x86_emulator: the program is not for x86-64, or not statically linked")
        entry, headers = struct.unpack_from("<QQ", elf, 24)
        size, count = struct.unpack_from("<HH", elf, 54)
        in_memory = 0
        for i in range(count):
            kind, _, offset, address, _, filled, length, _ = struct.unpack_from("<IIQQQQQQ", elf, headers + i * size)
            if kind == 1:  # PT_LOAD
                self.memory[address : address + filled] = elf[offset : offset + filled]
                self.heap = max(self.heap, _page_after(address + length))
                if offset <= headers < offset + filled:
                    in_memory = address + headers - offset
        stack = STACK

        def push(data: bytes) -> int:
            nonlocal stack
            stack -= len(data)
            self.memory[stack : stack + len(data)] = data
            return stack

        addresses = [push(argument + b"\0") for argument in arguments]
        # AT_PHDR, AT_PHENT, AT_PHNUM, AT_PAGESZ, AT_ENTRY, AT_RANDOM
        facts = {3: in_memory, 4: size, 5: count, 6: PAGE, 9: entry, 25: push(b"sixteen of these")}
        words = [len(addresses), *addresses, 0, 0, *(word for fact in facts.items() for word in fact), 0, 0]
        stack = (stack - 8 * len(words)) & -16
        self.memory[stack : stack + 8 * len(words)] = struct.pack(f"<{len(words)}Q", *words)
        return entry, stack

    def call(self, number: int, *arguments: int) -> int:
        known = CALLS.get(number)
        return known(self, *arguments) if known else -errno.ENOSYS

    def read(self, _: int, to: int, length: int) -> int:
        data = self.given[self.read_so_far : self.read_so_far + length]
        self.memory[to : to + len(data)] = data
        self.read_so_far += len(data)
        return len(data)

    def write(self, file: int, start: int, length: int) -> int:
        data = self.memory[start : start + length]
        if file == 2:
            sys.stderr.buffer.write(data)
        else:
            self.output += data
        return length

    def writev(self, file: int, vectors: int, count: int) -> int:
        parts = (struct.unpack_from("<QQ", self.memory, vectors + 16 * i) for i in range(count))
        return sum(self.write(file, start, length) for start, length in parts)

    def fstat(self, _: int, to: int, __: int) -> int:
        struct.pack_into("<24xI116x", self.memory, to, 0o010600)  # a pipe
        return 0

    def fstatat(self, file: int, _: int, to: int) -> int:
        return self.fstat(file, to, 0)

    def brk(self, end: int, *_: int) -> int:
        self.heap = end if self.heap <= end < MAPPED else self.heap
        return self.heap

    def mmap(self, _: int, length: int, __: int) -> int:
        if self.mapped + length > MEMORY:
            return -errno.ENOMEM
        start, self.mapped = self.mapped, self.mapped + _page_after(length)
        return start

    def arch_prctl(self, code: int, address: int, _: int) -> int:
        if code != 0x1002:  # ARCH_SET_FS
            return -errno.EINVAL
        self.thread = address
        return 0

    def exit(self, status: int, *_: int) -> int:
        self.status = status & 0xFF
        return 0


def _nothing(*_: int) -> int:
    return 0


CALLS: dict[int, Callable[..., int]] = {
    0: Linux.read, 1: Linux.write, 5: Linux.fstat, 9: Linux.mmap, 10: _nothing, 11: _nothing,  # mprotect, munmap
    12: Linux.brk, 20: Linux.writev, 158: Linux.arch_prctl, 231: Linux.exit, 262: Linux.fstatat,
}  # fmt: skip


def _page_after(address: int) -> int:
    return -(-address // PAGE) * PAGE


class Functions:
    """The functions of a program whose names match."""

    def __init__(self, elf: bytes, pattern: str) -> None:
        (sections,) = struct.unpack_from("<Q", elf, 40)
        size, count = struct.unpack_from("<HH", elf, 58)
        headers = [struct.unpack_from("<IIQQQQIIQQ", elf, sections + i * size) for i in range(count)]
        wanted, found = re.compile(pattern.encode()), []
        for kind, start, length, link in ((h[1], h[4], h[5], h[6]) for h in headers):
            names = headers[link][4]
            for at in range(start, start + length, 24) if kind == 2 else ():  # SHT_SYMTAB
                name, info, _, _, address, extent = struct.unpack_from("<IBBHQQ", elf, at)
                if info & 15 == 2 and wanted.match(elf, names + name):  # STT_FUNC
                    found.append((address, address + extent))
        self._starts, self._ends = zip(*sorted(found)) if found else ((), ())

    def __contains__(self, address: int) -> bool:
        at = bisect.bisect_right(self._starts, address) - 1
        return at >= 0 and address < self._ends[at]


def run(program: Path, arguments: list[str], given: bytes, pattern: str | None) -> int:
    import bochscpu
    import bochscpu.memory

    process = Linux(given)
    elf = program.read_bytes()
    entry, stack = process.load(elf, [str(program).encode(), *map(str.encode, arguments)])
    # One page of 1 GiB, where addresses are those of the memory. A system call returns at once: it is run in between.
    struct.pack_into("<Q", process.memory, TABLES, (TABLES + PAGE) | 7)
    struct.pack_into("<Q", process.memory, TABLES + PAGE, 0x87)
    process.memory[SYSTEM_CALLS : SYSTEM_CALLS + 2] = b"\xff\xe1"  # jmp rcx

    session = bochscpu.Session()
    start = ctypes.addressof(ctypes.c_char.from_buffer(process.memory))

    def touched(address: int) -> None:
        address &= -PAGE
        bochscpu.memory.page_insert(address, start + address)

    session.missing_page_handler = touched
    state = bochscpu.State()
    state.cr0, state.cr3, state.efer = 0x80050033, TABLES, 0x501
    state.cr4, state.xcr0 = 0x40620, 0xE7  # pages of 64-bit code, and the registers of AVX-512
    state.star, state.lstar = 8 << 32, SYSTEM_CALLS
    state.rflags, state.mxcsr, state.mxcsr_mask, state.fpcw = 2, 0x1F80, 0xFFFF, 0x37F
    state.rip, state.rsp = entry, stack
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        segment = bochscpu.Segment()
        segment.base, segment.limit, segment.present = 0, 0xFFFFFFFF, True
        segment.selector, segment.attr = (8, 0xA09B) if name == "cs" else (16, 0xC093)
        setattr(state, name, segment)
    session.cpu.state = state

    hook, failure = bochscpu.Hook(), []

    def system_call(session: bochscpu.Session, *_: object) -> None:
        cpu = session.cpu
        cpu.rax = process.call(cpu.rax, cpu.rdi, cpu.rsi, cpu.rdx) % 2**64
        if process.thread != cpu.fs.base:
            segment = cpu.fs
            segment.base = process.thread
            cpu.fs = segment
        if process.status is not None:
            session.stop()

    def exception(session: bochscpu.Session, _: int, vector: int, code: int) -> None:
        failure.append((int(vector), f"exception {int(vector)} at {session.cpu.rip:#x}, {session.cpu.cr2:#x}"))
        session.stop()

    hook.far_branch, hook.exception = system_call, exception
    executed: collections.Counter[int] = collections.Counter()
    if pattern is not None:
        # Each where the next one is: a call counts, and a return does not. Before an instruction, Bochs also calls for
        # those with which it ends a stretch of code.
        def after(session: bochscpu.Session, *_: object) -> None:
            executed[session.cpu.rip] += 1

        hook.after_execution = after
    session.run([hook])
    sys.stdout.buffer.write(process.output)
    sys.stdout.flush()
    if failure:
        vector, text = failure[0]
        sys.stderr.write(f"x86_emulator: {text}\n")
        sys.stderr.flush()
        if vector == INVALID_OPCODE:
            signal.signal(signal.SIGILL, signal.SIG_DFL)
            signal.raise_signal(signal.SIGILL)
        return 1
    if pattern is not None and process.status == 0:
        counted = Functions(elf, pattern)
        sys.stderr.write(f"{sum(count for address, count in executed.items() if address in counted)}\n")
    assert process.status is not None
    return process.status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", metavar="PATTERN", help="a regular expression")
    parser.add_argument("program", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if not args.program.is_file():
        parser.error(f"no file {str(args.program)!r}")
    sys.exit(run(args.program, args.arguments, sys.stdin.buffer.read(), args.count))
