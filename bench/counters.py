"""What counts the instructions of the CPU kernels, for bench.instructions: emulators, which run a program of them."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .timing import BenchError, Row

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))  # which run the kernels by themselves too: cases and program are theirs
import cuda_host  # noqa: E402
import host_cases  # noqa: E402
import host_cases_signed  # noqa: E402, F401
import x86_emulator  # noqa: E402
from cuda_host import Case  # noqa: E402

CHUNK_BLOCKS = 256  # of sums, as csrc/cpu/ops.cpp has them

# The mangled names of the kernels' functions and of those within them; not of the program and of the C library.
_OURS = re.compile(rb"_Z+NK?2cg")


class NotCounted(Exception):
    """Why an instruction set cannot be counted."""


def _finished(emulator: str, status: int, error: bytes) -> None:
    if status == -signal.SIGILL:
        raise NotCounted(f"{emulator} does not know its instructions")
    if status:
        raise NotCounted(error.decode(errors="replace").strip() or f"{emulator} ended with status {status}")


def bochs(command: list[str], given: bytes) -> tuple[int, bytes]:
    """(instructions of the kernels' functions, the output) of a program for x86-64."""
    emulator = [sys.executable, x86_emulator.__file__, "--count", _OURS.pattern.decode()]
    done = subprocess.run([*emulator, *command], input=given, capture_output=True)
    _finished("bochscpu-python", done.returncode, done.stderr)
    return int(done.stderr.splitlines()[-1]), done.stdout


def qemu(command: list[str], given: bytes) -> tuple[int, bytes]:
    """The same of a program for AArch64. qemu lists the instructions of each stretch without a branch that it
    translates, and names the stretches that it runs."""
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as out:
        source.write(given)
        source.seek(0)
        command = ["qemu-aarch64-static", "-d", "in_asm,exec,nochain", *command]
        lengths: dict[int, int] = {}
        total, start, said = 0, None, []
        with subprocess.Popen(command, stdin=source, stdout=out, stderr=subprocess.PIPE) as process:
            for line in process.stderr:
                if line.startswith(b"Trace "):
                    _, state, name = re.split(rb"[\[\]]", line)
                    if _OURS.match(name.strip()):
                        total += lengths[int(state.split(b"/")[1], 16)]
                elif line.startswith(b"IN:"):
                    start = None
                elif line.startswith(b"0x"):
                    if start is None:
                        start = int(line[: line.index(b":")], 16)
                        lengths[start] = 0
                    lengths[start] += 1
                elif line.strip(b"-\n"):
                    said.append(line)
        _finished(command[0], process.returncode, b"".join(said))
        out.seek(0)
        return total, out.read()


@dataclass(frozen=True)
class Machine:
    """sets: the instruction sets that have kernels. layer_sets: those for layers on codes alone. tools: what must be
    there. settings: of the build."""

    sets: tuple[str, ...]
    layer_sets: tuple[str, ...]
    tools: tuple[str, ...]
    count: Callable[[list[str], bytes], tuple[int, bytes]]
    processors: tuple[str, ...] = ()  # that it runs on; none if on all
    settings: dict[str, str] = field(default_factory=dict)

    def why_not(self) -> str | None:
        if self.processors and platform.machine() not in self.processors:
            return f"this machine is {platform.machine()}"
        missing = [tool for tool in self.tools if _version(tool) is None]
        return f"no {' and no '.join(missing)} found" if missing else None

    def build(self, folder: Path, sources: Path = ROOT) -> Path:
        """The program, with the kernels of a tree of sources and the optimisation of a release."""
        try:
            if sources != ROOT:
                folder.mkdir(parents=True, exist_ok=True)
                sources = _with_kernels_of(sources, folder / "sources")
            cuda_host.configure(sources, folder / "build", "-O3 -DNDEBUG -w", **self.settings)
            return cuda_host.build(folder / "build", "cpu_host", "--parallel")
        except cuda_host.HostRunnerError as error:
            raise BenchError(f"the kernels could not be built:\n{error}") from error

    def versions(self) -> Row:
        return {name: _version(tool) for name, tool in zip(("compiler", "counter"), self.tools)}

    def executed(self, program: Path, isa: str, case: Case) -> int:
        """Of a case whose output is right; an AssertionError names what is not."""
        instructions, output = self.count([str(program), isa, str(CHUNK_BLOCKS)], case.encode())
        (result,) = cuda_host.outputs([case], output)
        wrong = host_cases.wrong_outputs(case, result)
        assert not wrong, ", ".join(wrong)
        return instructions


def _with_kernels_of(sources: Path, folder: Path) -> Path:
    """This tree with another's csrc/."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("CMakeLists.txt", "pyproject.toml", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "csrc").symlink_to(sources.resolve() / "csrc")
    return folder


MACHINES = {
    "x86_64": Machine(
        ("default", "avx2", "avx512"), ("avxvnni", "avx512vnni", "amx"), ("c++", "bochscpu-python", "cmake"), bochs,
        ("x86_64", "AMD64"), {"EXE_LINKER_FLAGS": "-static"},
    ),
    "aarch64": Machine(
        ("default", "neon"), ("neondot", "neoni8mm"), ("aarch64-linux-gnu-g++", "qemu-aarch64-static", "cmake"), qemu,
        settings={
            "SYSTEM_NAME": "Linux", "SYSTEM_PROCESSOR": "aarch64", "CXX_COMPILER": "aarch64-linux-gnu-g++",
            "EXE_LINKER_FLAGS": "-static",
        },
    ),
}  # fmt: skip


def _version(tool: str) -> str | None:
    """Of a command or of a Python package; None where there is none."""
    if shutil.which(tool):
        done = subprocess.run([tool, "--version"], capture_output=True, text=True)
        return (done.stdout or done.stderr).splitlines()[0]
    try:
        return f"{tool} {importlib.metadata.version(tool)}"
    except importlib.metadata.PackageNotFoundError:
        return None
