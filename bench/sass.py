"""`python -m bench.sass`: the machine code of the CUDA and Triton kernels, and a model of its speed. Needs no GPU."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import sass_triton
from .sass_model import ARCHS, WIDE, Arch, Data, Function, Model, SassError, bulk_path, occupancy, parse
from .sass_page import document, tables

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "sass"

_DESCRIPTION = """
Compiles the CUDA and Triton kernels for each architecture, reads the machine code and tells
of each kernel what it takes (registers, spills, stack, shared memory), how the
loop that moves the data goes (128-bit loads and stores, instructions an element,
bytes in flight), and what share of the memory bandwidth a model gives it.
THIS IS A MODEL AND NO TIMING; no GPU is needed or used.
"""
_EPILOG = """
Needs nvcc and nvdisasm, on the PATH, in $CUDA_HOME/bin or, for nvdisasm, from
`pip install nvidia-cuda-nvdisasm` or triton. What is compiled is kept in
build/sass until the kernels change. The exit status is 1 when a promise is broken
(the last lines say which), 2 when nothing could be compiled.

Promised: no spills, no stack; all numbers in 128-bit accesses; for forward and
backward with a 1-bit mask the whole bandwidth on sm_80 and sm_90 and 90% of it on
sm_100.
"""

# ---------------------------------------------------------------------------------------- the tools


def _tool(name: str, package: str = "") -> Path:
    """The path of a program of the CUDA toolkit."""
    places = [os.path.join(home, "bin") for home in [os.environ.get("CUDA_HOME", "")] if home]
    places += os.environ.get("PATH", os.defpath).split(os.pathsep)
    for parent, folders in (("nvidia", ("*/bin",)), ("triton", ("backends/nvidia/bin",))):
        spec = importlib.util.find_spec(parent)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            places += [str(path) for folder in folders for path in sorted(Path(location).glob(folder))]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        mend = f" `pip install {package}` brings it." if package else ""
        raise SassError(f"{name} is neither on the PATH nor in $CUDA_HOME/bin.{mend}")
    return Path(found)


def toolchain() -> dict[str, Path]:
    """The programs needed, by name. Raises SassError for the first that is missing."""
    return {
        "nvcc": _tool("nvcc"),
        "nvdisasm": _tool("nvdisasm", "nvidia-cuda-nvdisasm"),
        "c++filt": _tool("c++filt"),
    }


def _run(*command: object, text: str | None = None) -> subprocess.CompletedProcess:
    done = subprocess.run([str(part) for part in command], input=text, capture_output=True, text=True)
    if done.returncode:
        raise SassError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done


# ------------------------------------------------------------------------------------- the machine code


@dataclass(frozen=True)
class Resources:
    """What ptxas gave a kernel; all but the registers in bytes."""

    registers: int
    stack: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Kernel:
    function: Function
    resources: Resources


_PROPERTIES = re.compile(
    r"Compiling entry function '(\S+)' for '\w+'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


def compile_kernels(source: Path, arch: str, folder: Path, flags: Iterable[str] = ()) -> dict[str, Kernel]:
    """The kernels of a .cu file, by their mangled names.

    `folder` keeps what was compiled, until the source, a header in a folder that `flags` names by -I, the compiler or
    a flag changes.
    """
    tools = toolchain()
    command = [tools["nvcc"], "-cubin", f"-arch={arch}", "-Xptxas", "-v", *flags]
    headers = [path for flag in flags if flag.startswith("-I") for path in sorted(Path(flag[2:]).rglob("*.*h"))]
    key = hashlib.sha256(_run(tools["nvcc"], "--version").stdout.encode())
    key.update(repr(command).encode())
    for path in [source, *headers]:
        key.update(path.read_bytes())
    kept = folder / f"{source.stem}-{arch}.json"
    cubin = kept.with_suffix(".cubin")
    facts = json.loads(kept.read_text()) if kept.exists() and cubin.exists() else {}
    if facts.get("key") != key.hexdigest():
        print(f"compiling {source.name} for {arch} ...", end=" ", flush=True, file=sys.stderr)
        start = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        kept.unlink(missing_ok=True)
        done = _run(*command, "-o", cubin, source)
        facts = {"key": key.hexdigest(), "ptxas": done.stdout + done.stderr}
        kept.write_text(json.dumps(facts))
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    functions = parse(_run(tools["nvdisasm"], "-c", cubin).stdout)
    kernels = {}
    for name, stack, stores, loads, registers, rest in _PROPERTIES.findall(facts["ptxas"]):
        shared = re.search(r"(\d+) bytes smem", rest)
        resources = Resources(int(registers), int(stack), int(stores) + int(loads), int(shared[1]) if shared else 0)
        kernels[name] = Kernel(functions[name], resources)
    if not kernels:
        raise SassError(f"ptxas told nothing of {source.name}:\n{facts['ptxas']}")
    return kernels


# ------------------------------------------------------------------------------------------ the kernels


@dataclass(frozen=True)
class Instance:
    """One kernel template with its arguments, and what it promises."""

    kernel: str
    dtype: str
    expression: str  # C++, within namespace cg::cuda
    threads: int  # of a block
    data: Data
    step: int  # elements of one thread that belong together
    wide: bool = True  # whether all numbers travel in 128-bit accesses
    shares: dict[str, float] = field(default_factory=dict)  # of the bandwidth, by architecture


FLAGS = ("-std=c++20", "-fmad=false", f"-I{ROOT / 'csrc'}")
_THREADS, _PACK_BYTES, _PACKS = 128, 16, 2
PREAMBLE = f"""\
#include "cuda/backward.cuh"
#include "cuda/dequantize.cuh"
#include "cuda/forward.cuh"
static_assert(cg::cuda::kThreads == {_THREADS} && cg::cuda::kUnroll == {_PACKS});
static_assert(sizeof(cg::cuda::Chunk) == {_PACK_BYTES});
"""
_DTYPES = {"float32": ("float", 4), "bfloat16": ("bf16", 2), "float16": ("f16", 2)}
_PROMISED = {"sm_80": 1.0, "sm_90": 1.0, "sm_100": 0.9}

# Name, kernel, numbers read, numbers written, bits kept, and what is special. Where a kernel decides at run time what
# it does, the bits are the most that it may move.
_FORWARD = "qrelu_forward_kernel<{{T}}, Rounding::{}, MaskKind::{}, {}>".format
_X_CHANNELS = "qrelu_backward_x_channels_kernel<{T}, ReverseExponential, kChunk<{T}>, false>"
_SAVED_CHANNELS = "qrelu_backward_saved_channels_kernel<{T}, true, 2, kChunk<{T}>>"
_KERNELS = (
    ("forward", _FORWARD("ceil", "nothing", "false"), 1, 1, 0, ""),
    ("forward, mask", _FORWARD("ceil", "inside", "false"), 1, 1, 1, "shares"),
    ("forward, state", _FORWARD("ceil", "state", "false"), 1, 1, 2, ""),
    ("forward, state, codes", _FORWARD("ceil", "state", "true"), 1, 1, 10, ""),
    ("forward, mask, nearest", _FORWARD("nearest", "inside", "false"), 1, 1, 1, ""),
    ("forward, mask, hwgq", _FORWARD("hwgq", "inside", "false"), 1, 1, 1, ""),
    ("forward, channels", "qrelu_forward_channels_kernel<{T}, Rounding::ceil, true>", 1, 1, 10, ""),
    ("forward, channels innermost", "qrelu_forward_channels_kernel<{T}, Rounding::ceil, false>", 1, 1, 10, ""),
    ("backward, mask", "qrelu_backward_mask_kernel<uint{bits}_t>", 1, 1, 1, "shares"),
    ("backward, state, dalpha", "qrelu_backward_saved_kernel<{T}, true, 2>", 1, 1, 2, ""),
    ("backward, codes, dalpha", "qrelu_backward_saved_kernel<{T}, false, 2>", 1, 1, 3, ""),
    ("backward, slopes", "times_slopes_kernel<{T}, 2>", 1, 1, 2, ""),
    ("backward, slopes, 8 bits", "times_slopes_kernel<{T}, 8>", 1, 1, 8, ""),
    ("backward, x", "qrelu_backward_x_kernel<{T}, ReverseExponential, AlphaLayout::one>", 2, 1, 0, ""),
    ("backward, x, log_tailed", "qrelu_backward_x_kernel<{T}, LogTailedRelu, AlphaLayout::one>", 2, 1, 0, ""),
    ("backward, x, channels", "qrelu_backward_x_kernel<{T}, ReverseExponential, AlphaLayout::by_chunk>", 2, 1, 0, ""),
    ("backward, x, dalpha, channels", _X_CHANNELS, 2, 1, 0, ""),
    ("backward, state, dalpha, channels", _SAVED_CHANNELS, 1, 1, 2, ""),
    ("dequantize", "dequantize_kernel<{T}, 2, AlphaLayout::one>", 0, 1, 2, ""),
    ("dequantize, channels", "dequantize_kernel<{T}, 2, AlphaLayout::by_chunk>", 0, 1, 2, ""),
    ("dequantize, channels innermost", "dequantize_kernel<{T}, 2, AlphaLayout::by_element>", 0, 1, 2, ""),
)

INSTANCES = [
    Instance(
        name,
        dtype,
        kernel.format(T=T, bits=8 * item),
        _THREADS,
        Data(item, reads, writes, bits),
        step=_PACKS * _PACK_BYTES // item,
        shares=_PROMISED if special == "shares" else {},
    )
    for name, kernel, reads, writes, bits, special in _KERNELS
    for dtype, (T, item) in _DTYPES.items()
]


def source_of(instances: Iterable[Instance], preamble: str) -> str:
    """A .cu file that instantiates them. Beside each goes an empty kernel `instance<number, &kernel>`, whose demangled
    name holds the kernel's own: so is a kernel found again."""
    lines = [preamble, "namespace cg::cuda {", "template <int number, auto* kernel> __global__ void instance() {}"]
    for number, each in enumerate(instances):
        lines.append(f"template __global__ void instance<{number}, &{each.expression}>();")
    return "\n".join([*lines, "}  // namespace cg::cuda", ""])


def find(instances: list[Instance], kernels: dict[str, Kernel]) -> list[Kernel]:
    """The kernel of each instance."""
    names = _run(_tool("c++filt"), text="\n".join(kernels)).stdout.splitlines()
    by_name = dict(zip(names, kernels.values(), strict=True))
    # A template is named with its parameters' types there, any other function without.
    by_name |= {name.partition("(")[0]: kernel for name, kernel in by_name.items()}
    found = {}
    for name in names:
        if match := re.fullmatch(r"void cg::cuda::instance<(\d+), &\(?(.*?)\)?>\(\)", name):
            found[int(match[1])] = by_name[match[2]]
    return [found[number] for number in range(len(instances))]


@dataclass(frozen=True)
class Report:
    """An instance on an architecture."""

    instance: Instance
    kernel: Kernel
    model: Model

    @classmethod
    def of(cls, instance: Instance, kernel: Kernel, arch: Arch) -> Report:
        used = kernel.resources
        path = bulk_path(kernel.function, instance.data)
        warps = occupancy(arch, instance.threads, used.registers, used.shared)
        return cls(instance, kernel, Model(arch, path, instance.data, instance.step, warps))

    def row(self) -> dict[str, object]:
        path, model, used = self.model.path, self.model, self.kernel.resources
        loads, stores = path.accesses("load"), path.accesses("store")
        return {
            "arch": model.arch.name,
            "card": model.arch.card,
            "kernel": self.instance.kernel,
            "dtype": self.instance.dtype,
            "registers": used.registers,
            "spill_bytes": used.spills,
            "stack_bytes": used.stack,
            "shared_bytes": used.shared,
            "loop": path.loop,
            "loads": len(loads),
            "wide_loads": sum(width >= WIDE for width in loads),
            "stores": len(stores),
            "wide_stores": sum(width >= WIDE for width in stores),
            "all_wide": model.all_wide,
            "instructions": model.instructions,
            "elements": model.elements,
            "instructions_per_element": model.instructions_per_element,
            "inner_instructions": len(path.inner),
            "calls": path.calls,
            "thread_bytes_in_flight": path.bytes_in_flight,
            "multiprocessor_bytes_in_flight": model.bytes_in_flight,
            "occupancy": model.occupancy,
            "share": model.share,
            "bound": model.bound,
            "share_with_alu": model.share_with_alu,
        }

    def broken(self) -> Iterator[str]:
        """The promises that do not hold."""
        used, path, model = self.kernel.resources, self.model.path, self.model
        if used.spills or used.stack:
            yield f"{used.spills} bytes spilled and {used.stack} bytes of stack, promised none"
        if self.instance.wide and not model.all_wide:
            yield (
                f"loads of {path.accesses('load')} and stores of {path.accesses('store')} bytes for {model.elements} "
                "elements, promised 128-bit ones for all numbers"
            )
        if path.calls:
            yield f"{path.calls} calls on the bulk path, promised none"
        if path.inner:
            yield f"{len(path.inner)} instructions in loops within the bulk path, promised none"
        promised = self.instance.shares.get(model.arch.name, 0)
        if model.share < promised:
            yield (
                f"{model.share:.0%} of the bandwidth by the model, promised {promised:.0%}: bound by {model.bound}, "
                f"{model.instructions_per_element:.1f} instructions an element"
            )


# ------------------------------------------------------------------------------------------ the command


def _bulk_paths(reports: list[Report]) -> Iterator[str]:
    for report in reports:
        path = report.model.path
        yield f"\n{report.instance.kernel} {report.instance.dtype}, {report.model.arch.name}"
        yield "  " + ", ".join(f"{name} {count}" for name, count in path.mix.most_common())
        for each in path.instructions:
            yield f"    {'@' + each.guard if each.guard else '':>5} {each.opcode} {each.operands}"


def triton_report(kernel: sass_triton.TritonKernel, arch: str) -> Report:
    """The kernel as Triton compiles it. It has no spills without a stack, where they would be."""
    cubin, used = sass_triton.cubin(kernel, arch, CACHE, _tool("cuobjdump"))
    (function,) = parse(_run(_tool("nvdisasm"), "-c", cubin).stdout).values()
    resources = Resources(used["REG"], used["STACK"], used["LOCAL"], used["SHARED"])
    instance = Instance(**sass_triton.instance_fields(kernel))
    return Report.of(instance, Kernel(function, resources), ARCHS[arch])


@functools.cache
def _reports(arch: str, only: str) -> list[Report]:
    CACHE.mkdir(parents=True, exist_ok=True)
    source = CACHE / "kernels.cu"
    source.write_text(source_of(INSTANCES, PREAMBLE))
    # All are compiled, whatever is chosen, so that the choice does not make the kept code stale.
    kernels = find(INSTANCES, compile_kernels(source, arch, CACHE, FLAGS))
    pairs = zip(INSTANCES, kernels, strict=True)
    found = [Report.of(*pair, ARCHS[arch]) for pair in pairs if _chosen(pair[0].kernel, pair[0].dtype, only)]
    for each in sass_triton.rows() if sass_triton.installed() else ():
        fields = sass_triton.instance_fields(each)
        if _chosen(fields["kernel"], fields["dtype"], only):
            found.append(triton_report(each, arch))
    return found


def _chosen(kernel: str, dtype: str, only: str) -> bool:
    return fnmatch.fnmatch(f"{kernel} {dtype}", only)


def reports(archs: Iterable[str] = ARCHS, only: str = "*") -> list[Report]:
    """Compiles the instances, one architecture after the other, and models each on its card: those whose "kernel dtype"
    matches the shell pattern `only`; Triton's come last, if it is installed. A process does it once."""
    return [report for arch in archs for report in _reports(arch, only)]


def compiler() -> str:
    """The compilers' names and versions."""
    text = _run(_tool("nvcc"), "--version").stdout
    version = re.search(r"V([\d.]+)", text)
    nvcc = f"nvcc {version[1]}" if version else text.strip().splitlines()[-1]
    return f"{nvcc} and {sass_triton.version()}" if sass_triton.installed() else nvcc


def broken_promises(reports: Iterable[Report]) -> list[str]:
    """A line for each."""
    return [
        f"{each.instance.kernel}, {each.instance.dtype}, {each.model.arch.name}: {line}"
        for each in reports
        for line in each.broken()
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sass",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--arch",
        nargs="+",
        choices=ARCHS,
        default=list(ARCHS),
        metavar="ARCH",
        help=f"some of {', '.join(ARCHS)} (default: all)",
    )
    add(
        "--only",
        metavar="PATTERN",
        default="*",
        help="kernels whose name and dtype match, as 'forward*' or '*bfloat16' (default: all)",
    )
    add("--json", action="store_true", help="JSON instead of tables: one object for each kernel and architecture")
    add("--show", action="store_true", help="the instructions of each bulk path too, and how many there are of each")
    add("--write", type=Path, metavar="FILE", help="write the tables there, as docs/sass.md")
    return parser


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if args.write and (args.only != "*" or len(args.arch) < len(ARCHS)):
        parser.error("--write is for all kernels and architectures: leave out --only and --arch")
    names = [(each.kernel, each.dtype) for each in INSTANCES]
    if sass_triton.installed():
        fields = map(sass_triton.instance_fields, sass_triton.rows())
        names += [(each["kernel"], each["dtype"]) for each in fields]
    if not any(_chosen(*each, args.only) for each in names):
        raise SystemExit(
            f"bench.sass: no kernel matches {args.only!r}; there are "
            + ", ".join(dict.fromkeys(kernel for kernel, _ in names))
        )
    try:
        found = reports(args.arch, args.only)
        if args.json:
            print(json.dumps([each.row() for each in found], indent=1))
        else:
            print("A model, and no timing. --help says what it takes into account.\n")
            print("\n".join(tables(found)))
        if args.show:
            print("\n".join(_bulk_paths(found)))
        if args.write:
            args.write.write_text(document(found, compiler()))
            print(f"Written: {args.write}", file=sys.stderr)
    except (SassError, OSError) as error:
        print(f"bench.sass: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    broken = broken_promises(found)
    print("\n".join(f"BROKEN  {line}" for line in broken) or "All promises hold.", file=sys.stderr)
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
