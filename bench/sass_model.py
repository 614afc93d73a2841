"""What a kernel's machine code says of its speed: the path that moves the data, and a model of one card.

Nothing here measures time. The code is read from nvdisasm's text; the model then takes the least of three bounds:
how fast the instructions issue, how fast memory answers, and how many bytes are under way while it does.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

WARP = 32
WIDE = 16  # bytes of the widest access that every architecture has


class SassError(Exception):
    """Why machine code could not be had, or read."""


# ------------------------------------------------------------------------------------- the instructions


@dataclass(frozen=True)
class Instruction:
    guard: str
    opcode: str
    operands: str
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def conditional(self) -> bool:
        """Whether what follows may run too: there is a guard, or an operand before the target of a branch."""
        return self.guard != "" or self.name == "BRA" and not self.operands.startswith("`")

    @property
    def access(self) -> str:
        """Either "load" or "store" in global memory, else nothing."""
        return _ACCESSES.get(self.name, "")

    @property
    def bytes(self) -> int:
        """What one thread moves by it."""
        for modifier in self.opcode.split(".")[1:]:
            if modifier in _WIDTHS:
                return _WIDTHS[modifier]
        return 4

    @property
    def called(self) -> bool:
        """Whether it calls a function. The call of a label is a jump."""
        return self.name == "CALL" and not self.targets

    @property
    def loaded(self) -> range:
        """The registers that a load fills."""
        first = int(re.findall(r"\bR(\d+)", self.operands)[0])
        return range(first, first + math.ceil(self.bytes / 4))

    @property
    def registers(self) -> set[int]:
        """The registers named. Of a vector operand that is the first one."""
        return {int(number) for number in re.findall(r"\bR(\d+)", self.operands)}


_BRANCHES = {"BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU"}
_JUMPS = _BRANCHES | {"CALL"}  # ptxas leaves a loop by the call of a label, which does not return
_ENDS = {"EXIT", "RET", "KILL", "BPT"} | _BRANCHES
_ACCESSES = {"LDG": "load", "LD": "load", "STG": "store", "ST": "store"}
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}

_SECTION = re.compile(r"\s*\.section\s+\.text\.([^\s,]+),")
_LABEL = re.compile(r"([.$\w]+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"\.L_\w+")


@dataclass
class Block:
    """Instructions that run one after the other, and the numbers of the blocks that may follow."""

    instructions: list[Instruction]
    next: list[int]


# ---------------------------------------------------------------------------------------- the control flow


@dataclass(frozen=True)
class BulkPath:
    """The instructions of one pass."""

    outer: tuple[Instruction, ...]
    inner: tuple[Instruction, ...]  # in loops within: one iteration of each
    instructions: tuple[Instruction, ...]  # both, in order
    loop: bool  # one iteration of a loop, or the kernel once

    def accesses(self, kind: str) -> list[int]:
        """The widths in bytes of the "load"s or "store"s outside of loops within. Of two ways under opposite guards
        only the one that moves more counts."""
        moved = Counter()
        for each in self.outer:
            if each.access:
                moved[each.guard] += each.bytes
        opposite = {guard: guard[1:] if guard.startswith("!") else f"!{guard}" for guard in moved if guard}
        skipped = {guard for guard, other in opposite.items() if moved[guard] < moved[other]}
        return [each.bytes for each in self.outer if each.access == kind and each.guard not in skipped]

    def wide_bytes(self, kind: str) -> int:
        """What they move in accesses of 128 bits."""
        return sum(width for width in self.accesses(kind) if width >= WIDE)

    @property
    def calls(self) -> int:
        """Calls of functions that were not inlined. Their instructions are not counted."""
        return sum(each.called for each in self.instructions)

    @property
    def mix(self) -> Counter[str]:
        return Counter(each.name for each in self.instructions)

    @cached_property
    def bytes_in_flight(self) -> int:
        """The most that one thread has under way: loads that it has not used yet, or stores since it last waited for a
        load. A loop may load for its next iteration."""
        most = stored = 0
        waiting: list[Instruction] = []
        for each in self.instructions * (2 if self.loop else 1):
            named = each.registers
            if arrived := [load for load in waiting if named & set(load.loaded)]:
                waiting = [load for load in waiting if load not in arrived]
                stored = 0
            if each.access == "load":
                waiting.append(each)
            elif each.access == "store":
                stored += each.bytes
            most = max(most, stored, sum(load.bytes for load in waiting))
        return most


class Function:
    """One kernel's control-flow graph."""

    def __init__(self, name: str, blocks: list[Block]) -> None:
        self.name = name
        self.blocks = blocks
        self._order = self._reverse_postorder()
        self._rank = {block: rank for rank, block in enumerate(self._order)}

    @cached_property
    def paths(self) -> list[BulkPath]:
        """The heaviest way through each loop, inner loops first, and at last from the kernel's entry to its end."""
        loops = sorted(self._loops().items(), key=lambda item: len(item[1]))
        found = []
        for head, body in loops:
            found.append(self._heaviest(head, body, set().union(*(other for _, other in loops if other < body)), True))
        everything = set().union(*(body for _, body in loops))
        return [*found, self._heaviest(self._order[0], set(self._order), everything, False)]

    def _reverse_postorder(self) -> list[int]:
        order, seen = [], {0}
        stack = [(0, iter(self.blocks[0].next))]
        while stack:
            block, rest = stack[-1]
            following = next((each for each in rest if each not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.blocks[following].next)))
        return order[::-1]

    def _loops(self) -> dict[int, set[int]]:
        """The natural loops, by the block that they return to."""
        before: dict[int, list[int]] = {block: [] for block in self._order}
        for block in self._order:
            for following in self.blocks[block].next:
                before[following].append(block)
        everything = set(self._order)
        dominators = {block: everything for block in self._order}
        dominators[self._order[0]] = {self._order[0]}
        changed = True
        while changed:
            changed = False
            for block in self._order[1:]:
                new = set.intersection(*(dominators[each] for each in before[block])) | {block}
                changed |= new != dominators[block]
                dominators[block] = new
        loops: dict[int, set[int]] = {}
        for block in self._order:
            for head in self.blocks[block].next:
                if head not in dominators[block]:
                    continue
                body, todo = loops.setdefault(head, {head}), [block]
                while todo:
                    each = todo.pop()
                    if each not in body:
                        body.add(each)
                        todo += before[each]
        return loops

    def _heaviest(self, head: int, body: set[int], within: set[int], is_loop: bool) -> BulkPath:
        """From `head` through `body` and back, or out of the kernel if it is no loop: the way that moves most, outside
        of loops within. Of equal ones that with the most in 128-bit accesses (the other is for a last, partial block),
        then with the fewest blocks of such loops, then with the fewest calls (both are for rare cases, where there is
        another way), then with the most instructions."""
        best: dict[int, tuple[tuple[int, int, int, int, int], int | None]] = {head: ((0, 0, 0, 0, 0), None)}
        finished = []
        for block in self._order[self._rank[head] :]:
            if block not in best or block not in body:
                continue
            (moved, wide, inner, calls, count), previous = best[block]
            code = self.blocks[block].instructions
            if block in within:
                inner -= 1
            else:
                moved += sum(each.bytes for each in code if each.access)
                wide += sum(each.bytes for each in code if each.access and each.bytes >= WIDE)
            calls -= sum(each.called for each in code)
            weight = (moved, wide, inner, calls, count + len(code))
            best[block] = weight, previous
            following = self.blocks[block].next
            if head in following if is_loop else not following:
                finished.append(block)
            for each in following:
                if self._rank[each] > self._rank[block] and (each not in best or best[each][0] < weight):
                    best[each] = weight, block
        path, step = [], max(finished, key=lambda block: best[block][0], default=None)
        while step is not None:
            path.append(step)
            step = best[step][1]
        path.reverse()
        outer, inner, everything = (
            tuple(each for block in path if block in some for each in self.blocks[block].instructions)
            for some in (body - within, within, body)
        )
        return BulkPath(outer, inner, everything, is_loop)


def parse(disassembly: str) -> dict[str, Function]:
    """The functions in the text of `nvdisasm -c`, by their mangled names."""
    functions = {}
    sections = re.split(r"(?m)^(?=\s*\.section\s)", disassembly)
    for section in sections:
        if match := _SECTION.match(section):
            functions[match[1]] = Function(match[1], _blocks(match[1], section))
    if not functions:
        raise SassError("the disassembly has no code sections")
    return functions


def _blocks(function: str, section: str) -> list[Block]:
    labels: dict[str, int] = {}
    code: list[list[Instruction]] = [[]]
    for line in section.splitlines():
        if match := _LABEL.match(line):
            if code[-1]:
                code.append([])
            labels[match[1]] = len(code) - 1
        elif match := _INSTRUCTION.match(line):
            guard, opcode, operands = match.groups()
            targets = tuple(_TARGET.findall(operands)) if opcode.partition(".")[0] in _JUMPS else ()
            code[-1].append(Instruction("" if guard in (None, "PT", "UPT") else guard, opcode, operands, targets))
            if targets or code[-1][-1].name in _ENDS:
                code.append([])
    blocks = []
    for number, instructions in enumerate(code):
        following = []
        last = instructions[-1] if instructions else None
        if last is not None:
            if last.name in _BRANCHES and not last.targets:
                raise SassError(f"{function}: no target is known for `{last.opcode} {last.operands}`")
            following += [labels[target] for target in last.targets]
        if (last is None or last.name not in _ENDS or last.conditional) and number + 1 < len(code):
            following.append(number + 1)
        blocks.append(Block(instructions, following))
    if not code[0]:
        raise SassError(f"{function}: no instructions were understood")
    return blocks


# ---------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Arch:
    """Limits of an architecture (CUDA C++ Programming Guide, compute capabilities) and one card of it."""

    name: str
    card: str
    multiprocessors: int
    ghz: float
    terabytes_per_second: float
    warps: int = 64
    blocks: int = 32
    shared_bytes: int = 228 * 1024

    @property
    def bytes_per_clock(self) -> float:
        """Of memory, for one multiprocessor."""
        return self.terabytes_per_second * 1e3 / self.ghz / self.multiprocessors


ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_80", "A100", 108, 1.41, 1.56, shared_bytes=164 * 1024),
        Arch("sm_90", "H100", 132, 1.755, 3.35),
        Arch("sm_100", "B200", 148, 1.85, 8.0),
        Arch("sm_120", "RTX 5090", 170, 2.41, 1.79, warps=48, blocks=24, shared_bytes=100 * 1024),
    )
}

REGISTERS = 65536  # of a multiprocessor; a warp takes them in steps of 256
BLOCK_SHARED_BYTES = 1024  # what the system takes of shared memory for each block
LATENCY = 700  # clocks until memory answers
ISSUED = 4  # warp instructions a clock
ALU_LANES = 64  # lanes a clock for integers, logic, comparisons, selects, minima
SLOW_LANES = 16  # lanes a clock for the functions, conversions, shuffles and counts of bits

_SLOW = {
    "MUFU", "F2F", "F2FP", "F2I", "F2IP", "FRND", "I2F", "I2FP", "I2I", "I2IP", "SHFL", "POPC", "FLO", "BREV",
}  # fmt: skip
_ALU = {
    "BMSK", "FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "HMNMX2", "HSET2", "HSETP2", "IABS", "IADD",
    "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF", "VIADD",
    "VIADDMNMX", "VIMNMX", "VIMNMX3",
}  # fmt: skip


def occupancy(arch: Arch, threads: int, registers: int, shared_bytes: int) -> float:
    """Share of the warps that a multiprocessor can hold."""
    warps = math.ceil(threads / WARP)
    blocks = min(
        arch.blocks,
        arch.warps // warps,
        REGISTERS // (math.ceil(registers * WARP / 256) * 256) // warps,
        arch.shared_bytes // (shared_bytes + BLOCK_SHARED_BYTES),
    )
    return blocks * warps / arch.warps


@dataclass(frozen=True)
class Data:
    """What a kernel has to move: an element is read and written as so many numbers of `item` bytes, and `kept_bits`
    besides."""

    item: int
    reads: int
    writes: int
    kept_bits: int

    @property
    def bytes_per_element(self) -> float:
        return (self.reads + self.writes) * self.item + self.kept_bits / 8


def bulk_path(function: Function, data: Data) -> BulkPath:
    """The pass that moves the data.

    A kernel that decides at run time what it does may have a loop for each case. Of those with 128-bit accesses, as
    many for reading and for writing as `data` has it (if there is none, of any with such accesses), it is the one with
    the most instructions for what it moves. Without such loops it is the way from entry to end, if that has 128-bit
    accesses; else the loop that moves most, if one moves anything.
    """

    def wide(path: BulkPath) -> tuple[int, int]:
        return path.wide_bytes("load"), path.wide_bytes("store")

    *loops, whole = function.paths
    if some := [path for path in loops if any(wide(path))]:
        right = [path for path in some if wide(path)[0] * data.writes == wide(path)[1] * data.reads]
        return max(right or some, key=lambda path: len(path.instructions) / sum(wide(path)))
    moving = [path for path in loops if path.accesses("load") or path.accesses("store")]
    if any(wide(whole)) or not moving:
        return whole
    return max(moving, key=lambda path: sum(path.accesses("load") + path.accesses("store")))


@dataclass(frozen=True)
class Model:
    """A bulk path on a card. Every share is of the card's memory bandwidth. Clocks are those that one pass of one
    warp takes of a multiprocessor's time.

    step: elements of one thread that belong together; a pass handles some steps.
    """

    arch: Arch
    path: BulkPath
    data: Data
    step: int
    occupancy: float

    @cached_property
    def elements(self) -> int:
        """That one thread handles in one pass, by the bytes moved."""
        path, data = self.path, self.data
        loads, stores = path.wide_bytes("load"), path.wide_bytes("store")
        if loads or stores:
            kinds = [(got, count * data.item) for got, count in ((loads, data.reads), (stores, data.writes)) if count]
            least, elements = (choose(got / item for got, item in kinds) for choose in (min, max))
            # What is moved besides in one of them may be kept bits.
            if all(got - least * item <= least * data.kept_bits / 8 for got, item in kinds):
                elements = least
        else:
            widths = [width for width in path.accesses("load") + path.accesses("store") if width >= data.item]
            elements = sum(widths) / ((data.reads + data.writes) * data.item)
        steps = int(elements / self.step)
        if not steps:
            raise SassError(
                f"a pass of {elements:g} elements, fewer than a step of {self.step}: loads of {path.accesses('load')} "
                f"and stores of {path.accesses('store')} bytes for {data}"
            )
        return steps * self.step

    @property
    def all_wide(self) -> bool:
        """Whether all numbers travel in 128-bit accesses; kept bits and parameters need not."""
        numbers = self.elements * self.data.item
        return (
            self.path.wide_bytes("load") >= numbers * self.data.reads
            and self.path.wide_bytes("store") >= numbers * self.data.writes
        )

    @property
    def instructions(self) -> int:
        """Of one pass."""
        return len(self.path.instructions)

    @property
    def instructions_per_element(self) -> float:
        return self.instructions / self.elements

    @property
    def bytes_in_flight(self) -> int:
        """Of one multiprocessor."""
        return int(self.path.bytes_in_flight * self.occupancy * self.arch.warps * WARP)

    @property
    def memory_clocks(self) -> float:
        return WARP * self.elements * self.data.bytes_per_element / self.arch.bytes_per_clock

    @property
    def issue_clocks(self) -> float:
        return self.instructions / ISSUED

    @property
    def slow_clocks(self) -> float:
        return self._count(_SLOW) * WARP / SLOW_LANES

    @property
    def alu_clocks(self) -> float:
        return self._count(_ALU) * WARP / ALU_LANES

    @property
    def bounds(self) -> dict[str, float]:
        """The share that each bound would allow alone; more than 1 where it is no bound."""
        return {
            "issue": self.memory_clocks / self.issue_clocks,
            "slow units": self.memory_clocks / self.slow_clocks if self.slow_clocks else math.inf,
            "latency": self.bytes_in_flight / (LATENCY * self.arch.bytes_per_clock),
        }

    @property
    def share(self) -> float:
        return min(1.0, *self.bounds.values())

    @property
    def bound(self) -> str:
        name, share = min(self.bounds.items(), key=lambda item: item[1])
        return name if share < 1 else "memory"

    @property
    def share_with_alu(self) -> float:
        """The same with one more bound: 64 lanes a clock for integers, logic, comparisons and selects."""
        return min(self.share, self.memory_clocks / self.alu_clocks if self.alu_clocks else 1.0)

    def _count(self, names: set[str]) -> int:
        return sum(each.name in names for each in self.path.instructions)
