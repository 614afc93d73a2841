"""Kernels to machine code: nvcc for CUDA, and the programs that read what comes out."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .code import Function, SassError, parse

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "sass"
FLAGS = ("-std=c++20", "-fmad=false", f"-I{ROOT / 'csrc'}")


def tool(name: str) -> Path:
    """The path of a program of the CUDA toolkit. Raises SassError if it is missing."""
    places = [os.path.join(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    places += os.environ.get("PATH", os.defpath).split(os.pathsep)
    if spec := importlib.util.find_spec("triton"):
        places += [str(Path(folder, "backends/nvidia/bin")) for folder in spec.submodule_search_locations]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise SassError(f"{name} is neither on the PATH nor in $CUDA_HOME/bin nor in an installed triton")
    return Path(found)


def run(*command: object, text: str | None = None) -> str:
    done = subprocess.run([str(part) for part in command], input=text, capture_output=True, text=True)
    if done.returncode:
        raise SassError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


class Binary(NamedTuple):
    """The code of a kernel, and per thread its registers and bytes of stack. Spills are part of the stack."""

    function: Function
    registers: int
    stack: int


def read(cubin: Path) -> dict[str, Binary]:
    """The kernels in a cubin, by mangled name."""
    functions = parse(run(tool("nvdisasm"), "-c", cubin))
    usage = run(tool("cuobjdump"), "-res-usage", cubin)
    used = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if not used:
        raise SassError(f"cuobjdump reports no kernel in {cubin}:\n{usage}")
    return {
        name: Binary(functions[name], int(registers), int(stack) + int(local)) for name, registers, stack, local in used
    }


def compile_cuda(source: Path, arch: str, folder: Path, flags: Iterable[str] = FLAGS) -> Path:
    """The cubin of a .cu file, with its PTX beside it (".ptx"). Both stay in `folder`, and are compiled again when the
    source, a header below a folder given by -I, the compiler or a flag changes."""
    nvcc = tool("nvcc")
    command = [nvcc, "-ptx", f"-arch={arch}", *flags]
    headers = [path for flag in flags if flag.startswith("-I") for path in sorted(Path(flag[2:]).rglob("*.*h"))]
    key = hashlib.sha256((run(nvcc, "--version") + repr(command)).encode())
    for path in [source, *headers]:
        key.update(path.read_bytes())
    cubin = folder / f"{source.stem}-{arch}-{key.hexdigest()[:16]}.cubin"
    if not cubin.exists():
        print(f"compiling {source.name} for {arch} ...", end=" ", flush=True, file=sys.stderr)
        start = time.monotonic()
        for stale in folder.glob(f"{source.stem}-{arch}-*"):
            stale.unlink()
        ptx = cubin.with_suffix(".ptx")
        run(*command, "-o", ptx, source)
        run(nvcc, "-cubin", f"-arch={arch}", "-o", cubin, ptx)
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return cubin


def source_of(expressions: Iterable[str], preamble: str) -> str:
    """A .cu file that instantiates the templates. Next to each stands an empty kernel `instance<number, &kernel>`,
    whose demangled name contains that of the kernel: `instances` finds it by that."""
    lines = [preamble, "namespace cg::cuda {", "template <int number, auto* kernel> __global__ void instance() {}"]
    lines += [f"template __global__ void instance<{number}, &{each}>();" for number, each in enumerate(expressions)]
    return "\n".join([*lines, "}  // namespace cg::cuda", ""])


def instances(cubin: Path) -> list[Binary]:
    """The kernels of a file from `source_of`, in its order."""
    binaries = read(cubin)
    names = run(tool("c++filt"), text="\n".join(binaries)).splitlines()
    by_name = dict(zip(names, binaries.values(), strict=True))
    # `instance` names a template with its parameters' types and any other function without them.
    by_name |= {name.partition("(")[0]: binary for name, binary in by_name.items()}
    matches = [re.fullmatch(r"void cg::cuda::instance<(\d+), &\(?(.*?)\)?>\(\)", name) for name in names]
    found = {int(match[1]): by_name[match[2]] for match in matches if match}
    return [found[number] for number in range(len(found))]
