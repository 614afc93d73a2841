"""The disassembly of a kernel as a control-flow graph, and the path through it that moves the data."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

WIDE = 16  # bytes of a 128-bit access


class SassError(Exception):
    """Machine code that cannot be compiled or read."""


# ------------------------------------------------------------------------------------------ instructions

_BRANCHES = {"BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU"}
_JUMPS = _BRANCHES | {"CALL"}  # ptxas leaves a loop by calling a label, which does not return
_ENDS = {"EXIT", "RET", "KILL", "BPT"} | _BRANCHES
_ACCESSES = {"LDG": "load", "LD": "load", "STG": "store", "ST": "store"}
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}

_SECTION = re.compile(r"\s*\.section\s+\.text\.([^\s,]+),")
_LABEL = re.compile(r"([.$\w]+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"\.L_\w+")


@dataclass(frozen=True)
class Instruction:
    guard: str
    opcode: str
    operands: str
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def conditional(self) -> bool:
        """Whether a branch may fall through: it has a guard, or a predicate operand before its target."""
        return self.guard != "" or self.name == "BRA" and not self.operands.startswith("`")

    @property
    def access(self) -> str:
        """Whether it is a "load" or a "store" in global memory; empty for neither."""
        return _ACCESSES.get(self.name, "")

    @property
    def bytes(self) -> int:
        """The width of the access of one thread."""
        return next((_WIDTHS[each] for each in self.opcode.split(".")[1:] if each in _WIDTHS), 4)

    @property
    def called(self) -> bool:
        """Whether it calls a function; a call of a label is a jump."""
        return self.name == "CALL" and not self.targets


class Block(NamedTuple):
    """A basic block and the numbers of its successors."""

    instructions: list[Instruction]
    next: list[int]


# ------------------------------------------------------------------------------------------ control flow


@dataclass(frozen=True)
class Path:
    """One iteration of a loop, or one pass from a kernel's entry to its exit."""

    outer: tuple[Instruction, ...]  # outside of nested loops
    inner: tuple[Instruction, ...]  # one iteration of each nested loop
    loop: bool

    def accesses(self, kind: str) -> list[int]:
        """The widths in bytes of the "load"s or "store"s in `outer`. Of two ways under opposite guards, only the one
        that moves more counts."""
        moved = Counter()
        for each in self.outer:
            if each.access:
                moved[each.guard] += each.bytes
        opposite = {guard: guard[1:] if guard.startswith("!") else f"!{guard}" for guard in moved if guard}
        skipped = {guard for guard, other in opposite.items() if moved[guard] < moved[other]}
        return [each.bytes for each in self.outer if each.access == kind and each.guard not in skipped]

    def wide_bytes(self, kind: str) -> int:
        """The bytes moved by 128-bit accesses."""
        return sum(width for width in self.accesses(kind) if width >= WIDE)

    @property
    def instructions(self) -> int:
        return len(self.outer) + len(self.inner)

    @property
    def calls(self) -> int:
        """Calls of functions that were not inlined."""
        return sum(each.called for each in self.outer + self.inner)


class Function:
    """The control-flow graph of a kernel."""

    def __init__(self, name: str, blocks: list[Block]) -> None:
        self.name = name
        self.blocks = blocks
        self._order, self._back_edges = self._depth_first()
        self._rank = {block: rank for rank, block in enumerate(self._order)}

    @property
    def opcodes(self) -> set[str]:
        return {each.name for block in self.blocks for each in block.instructions}

    def paths(self) -> list[Path]:
        """The heaviest path through each loop, and last the heaviest one from entry to exit."""
        loops = self._loops()
        found = [
            self._heaviest(head, body, set().union(*(other for other in loops.values() if other < body)), True)
            for head, body in loops.items()
        ]
        return [*found, self._heaviest(self._order[0], set(self._order), set().union(*loops.values()), False)]

    def _depth_first(self) -> tuple[list[int], list[tuple[int, int]]]:
        """The blocks in reverse postorder, and the edges (from, to) that close a loop."""
        order, back, seen = [], [], {0}
        stack = {0: iter(self.blocks[0].next)}
        while stack:
            block, successors = next(reversed(stack.items()))
            for each in successors:
                if each in stack:
                    back.append((block, each))
                elif each not in seen:
                    seen.add(each)
                    stack[each] = iter(self.blocks[each].next)
                    break
            else:
                order.append(block)
                del stack[block]
        return order[::-1], back

    def _loops(self) -> dict[int, set[int]]:
        """The blocks of each natural loop, by its head."""
        predecessors: dict[int, list[int]] = {block: [] for block in self._order}
        for block in self._order:
            for each in self.blocks[block].next:
                predecessors[each].append(block)
        loops: dict[int, set[int]] = {}
        for end, head in self._back_edges:
            body, todo = loops.setdefault(head, {head}), [end]
            while todo:
                each = todo.pop()
                if each not in body:
                    body.add(each)
                    todo += predecessors[each]
        return loops

    def _heaviest(self, head: int, body: set[int], nested: set[int], loop: bool) -> Path:
        """From `head` through `body` and back, or to the exit: the path that moves the most bytes outside of nested
        loops. Ties are broken by bytes in 128-bit accesses (the other is for a partial block), by fewer blocks in
        nested loops and fewer calls (both serve rare cases), and by more instructions."""
        best: dict[int, tuple[tuple[int, ...], int | None]] = {head: ((0, 0, 0, 0, 0), None)}
        finished = []
        for block in self._order[self._rank[head] :]:
            if block not in best or block not in body:
                continue
            weight = tuple(map(sum, zip(best[block][0], self._weight(block, block in nested))))
            best[block] = weight, best[block][1]
            successors = self.blocks[block].next
            if head in successors if loop else not successors:
                finished.append(block)
            for each in successors:
                if self._rank[each] > self._rank[block] and (each not in best or best[each][0] < weight):
                    best[each] = weight, block
        path, step = [], max(finished, key=lambda block: best[block][0], default=None)
        while step is not None:
            path.append(step)
            step = best[step][1]
        outer, inner = (
            tuple(
                each for block in path[::-1] if (block in nested) is inside for each in self.blocks[block].instructions
            )
            for inside in (False, True)
        )
        return Path(outer, inner, loop)

    def _weight(self, block: int, nested: bool) -> tuple[int, ...]:
        code = self.blocks[block].instructions
        moved = [each.bytes for each in code if each.access and not nested]
        wide = sum(width for width in moved if width >= WIDE)
        return sum(moved), wide, -nested, -sum(each.called for each in code), len(code)


def parse(disassembly: str) -> dict[str, Function]:
    """The functions in the output of `nvdisasm -c`, by mangled name."""
    functions = {}
    for section in re.split(r"(?m)^(?=\s*\.section\s)", disassembly):
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
    if not code[0]:
        raise SassError(f"{function}: no instructions were recognised")
    return [Block(each, _successors(function, number, code, labels)) for number, each in enumerate(code)]


def _successors(function: str, number: int, code: list[list[Instruction]], labels: dict[str, int]) -> list[int]:
    last = code[number][-1] if code[number] else None
    if last is not None and last.name in _BRANCHES and not last.targets:
        raise SassError(f"{function}: the target of `{last.opcode} {last.operands}` is unknown")
    following = [labels[target] for target in last.targets] if last else []
    if (last is None or last.name not in _ENDS or last.conditional) and number + 1 < len(code):
        following.append(number + 1)
    return following


# --------------------------------------------------------------------------------------------- the bulk path


class Data(NamedTuple):
    """What a kernel moves: an element is `reads` + `writes` numbers of `item` bytes and `saved_bits` bits."""

    item: int
    reads: int
    writes: int
    saved_bits: int


def bulk_path(function: Function, data: Data) -> Path:
    """The path that moves the data.

    A kernel that decides at run time what it does may have a loop for each case. Of the loops with 128-bit accesses in
    the proportion of `data` (if there are none, of any with 128-bit accesses), it is the one with the most instructions
    for what it moves. Without such a loop it is the path from entry to exit, if that has 128-bit accesses, else the
    loop that moves the most.
    """

    def wide(path: Path) -> tuple[int, int]:
        return path.wide_bytes("load"), path.wide_bytes("store")

    *loops, whole = function.paths()
    if some := [path for path in loops if any(wide(path))]:
        right = [path for path in some if wide(path)[0] * data.writes == wide(path)[1] * data.reads]
        return max(right or some, key=lambda path: path.instructions / sum(wide(path)))
    moving = [path for path in loops if path.accesses("load") or path.accesses("store")]
    if any(wide(whole)) or not moving:
        return whole
    return max(moving, key=lambda path: sum(path.accesses("load") + path.accesses("store")))
