"""What is promised of the machine code of each kernel, and the check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath

from .code import WIDE, Data, Path, SassError, bulk_path
from .compiler import CACHE, Binary, compile_cuda, instances, source_of

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Kernel:
    """A kernel template with its arguments, the data it moves, and what is promised of its code besides no stack."""

    name: str
    dtype: str
    expression: str  # in C++, within namespace cg::cuda
    data: Data
    step: int = 1  # elements of one thread that belong together
    wide: bool = True  # all numbers travel in 128-bit accesses
    instructions: float = math.inf  # upper bound for an element of the bulk path
    registers: int = 255  # upper bound
    opcodes: tuple[str, ...] = ()  # what the code must contain, such as tensor-core instructions


THREADS, CHUNK_BYTES, UNROLL = 128, 16, 2
PREAMBLE = f"""\
#include "cuda/backward.cuh"
#include "cuda/dequantize.cuh"
#include "cuda/forward.cuh"
#include "cuda/hadamard.cuh"
#include "cuda/norm.cuh"
#include "cuda/signed.cuh"
#include "cuda/weights.cuh"
static_assert(cg::cuda::kThreads == {THREADS} && cg::cuda::kUnroll == {UNROLL});
static_assert(sizeof(cg::cuda::Chunk) == {CHUNK_BYTES});
"""
DTYPES = {"float32": ("float", 4), "bfloat16": ("bf16", 2), "float16": ("f16", 2)}

_FORWARD = "qrelu_forward_kernel<{{T}}, Rounding::{}, MaskKind::{}, {}>".format
_X = "qrelu_backward_x_kernel<{{T}}, {}, AlphaLayout::{}>".format
_X_CHANNELS = "qrelu_backward_x_channels_kernel<{T}, ReverseExponential, kChunk<{T}>, false>"
_SIGNED = "qsigned_forward_kernel<{{T}}, AlphaLayout::{}>".format
_SIGNED_BACK = "qsigned_dequantize_kernel<{{T}}, {}, AlphaLayout::{}>".format
_SAVED_CHANNELS = "qrelu_backward_saved_channels_kernel<{T}, true, 2, kChunk<{T}>>"
# Name, template, numbers read and written, bits saved (the most, if the kernel decides at run time), and the upper
# bounds on instructions and registers. Instructions are a tenth above the most that nvcc 13.0 takes over dtypes and
# architectures; up to 20, a kernel on 16-bit numbers is not bound by issue. Registers vary with what else the compiler
# sees; with 64 of them, 16 bytes in flight per thread cover the latency of memory.
KERNELS = tuple(
    Kernel(
        name,
        dtype,
        template.format(T=T, bits=8 * item),
        Data(item, reads, writes, bits),
        step=UNROLL * CHUNK_BYTES // item,
        instructions=instructions,
        registers=registers,
    )
    for name, template, reads, writes, bits, instructions, registers in (
        ("forward", _FORWARD("ceil", "nothing", "false"), 1, 1, 0, 14, 64),
        ("forward, mask", _FORWARD("ceil", "inside", "false"), 1, 1, 1, 20, 64),
        ("forward, state", _FORWARD("ceil", "state", "false"), 1, 1, 2, 23, 64),
        ("forward, state, codes", _FORWARD("ceil", "state", "true"), 1, 1, 10, 30, 64),
        ("forward, mask, nearest", _FORWARD("nearest", "inside", "false"), 1, 1, 1, 24, 64),
        ("forward, mask, hwgq", _FORWARD("hwgq", "inside", "false"), 1, 1, 1, 27, 64),
        ("forward, channels", "qrelu_forward_channels_kernel<{T}, Rounding::ceil, true>", 1, 1, 10, 60, 64),
        ("forward, channels innermost", "qrelu_forward_channels_kernel<{T}, Rounding::ceil, false>", 1, 1, 10, 100, 64),
        ("backward, mask", "qrelu_backward_mask_kernel<uint{bits}_t>", 1, 1, 1, 7.6, 64),
        ("backward, state, dalpha", "qrelu_backward_saved_kernel<{T}, true, 2>", 1, 1, 2, 22, 64),
        ("backward, codes, dalpha", "qrelu_backward_saved_kernel<{T}, false, 2>", 1, 1, 3, 19, 64),
        ("backward, slopes", "backward_from_slopes_kernel<{T}, 2>", 1, 1, 2, 10, 64),
        ("backward, slopes, 8 bits", "backward_from_slopes_kernel<{T}, 8>", 1, 1, 8, 10, 64),
        ("backward, x", _X("ReverseExponential", "one"), 2, 1, 0, 77, 80),
        ("backward, x, log_tailed", _X("LogTailedRelu", "one"), 2, 1, 0, 66, 80),
        ("backward, x, channels", _X("ReverseExponential", "by_chunk"), 2, 1, 0, 53, 64),
        ("backward, x, dalpha, channels", _X_CHANNELS, 2, 1, 0, 76, 96),
        ("backward, state, dalpha, channels", _SAVED_CHANNELS, 1, 1, 2, 30, 64),
        ("dequantize", "dequantize_kernel<{T}, 2, AlphaLayout::one>", 0, 1, 2, 6.2, 64),
        ("dequantize, channels", "dequantize_kernel<{T}, 2, AlphaLayout::by_chunk>", 0, 1, 2, 14, 64),
        ("dequantize, channels innermost", "dequantize_kernel<{T}, 2, AlphaLayout::by_element>", 0, 1, 2, 43, 64),
        ("signed forward", _SIGNED("one"), 1, 1, 9, 39, 64),
        ("signed forward, channels", _SIGNED("by_chunk"), 1, 1, 9, 58, 64),
        ("signed forward, channels innermost", _SIGNED("by_element"), 1, 1, 9, 98, 96),
        ("signed forward, groups", "qsigned_groups_kernel<{T}>", 1, 1, 8, 62, 64),
        ("signed forward, rows", "qsigned_rows_kernel<{T}>", 1, 1, 8, 35, 64),
        ("signed dequantize", _SIGNED_BACK("float", "one"), 0, 1, 8, 9.3, 64),
        ("signed dequantize, channels", _SIGNED_BACK("float", "by_chunk"), 0, 1, 8, 16, 64),
        ("signed dequantize, groups", _SIGNED_BACK("bf16", "by_chunk"), 0, 1, 8, 15, 64),
        ("hadamard", "hadamard_kernel<{T}>", 1, 1, 0, 23, 64),
    )
    for dtype, (T, item) in DTYPES.items()
)  # fmt: skip
# Of the scale of weights: what they find is small, and computing it takes longer than reading weights.
WEIGHT_KERNELS = (
    *(
        Kernel(f"weight {name}", dtype, f"weight_{name}_kernel<{T}>", Data(item, 1, 0, 0), wide=False, registers=64)
        for name in ("largest", "search", "sums", "magnitudes", "scale")
        for dtype, (T, item) in {**DTYPES, "float64": ("double", 8)}.items()
    ),
    Kernel("weight ternary", "int32", "weight_ternary_kernel", Data(4, 1, 0, 0), wide=False, registers=64),
)
# Of norms: each does what it is asked for at run time, on a path of its own.
NORM_KERNELS = (
    *(
        Kernel(f"norm, {rows} rows", dtype, f"norm_kernel<{T}, kChunk<{T}>, {held}>", Data(item, 1, 1, 0), registers=72)
        for rows, held in (("short", "true"), ("long", "false"))
        for dtype, (T, item) in DTYPES.items()
    ),
    *(
        Kernel("norm, one by one", dtype, f"norm_kernel<{T}, 1, false>", Data(item, 1, 1, 0), wide=False, registers=72)
        for dtype, (T, item) in {**DTYPES, "float64": ("double", 8)}.items()
    ),
)


@dataclass(frozen=True)
class Report:
    """A kernel, compiled for an architecture."""

    kernel: Kernel
    arch: str
    binary: Binary

    @cached_property
    def path(self) -> Path:
        return bulk_path(self.binary.function, self.kernel.data)

    @cached_property
    def elements(self) -> int:
        """The elements of one pass of a thread, from the bytes that it moves."""
        data, path = self.kernel.data, self.path
        narrowest = WIDE if path.wide_bytes("load") or path.wide_bytes("store") else data.item
        kinds = [(kind, count * data.item) for kind, count in (("load", data.reads), ("store", data.writes)) if count]
        moved = [(sum(width for width in path.accesses(kind) if width >= narrowest), item) for kind, item in kinds]
        least, most = (choose(got / item for got, item in moved) for choose in (min, max))
        # What one kind moves more may be saved bits.
        surplus_is_saved = all(got - least * item <= least * data.saved_bits / 8 for got, item in moved)
        elements = least if narrowest == WIDE and surplus_is_saved else most
        if elements < self.kernel.step:
            raise SassError(
                f"{self.kernel.name}: a pass of {elements:g} elements, fewer than the {self.kernel.step} of a step:"
                f" loads of {path.accesses('load')} and stores of {path.accesses('store')} bytes for {data}"
            )
        return int(elements / self.kernel.step) * self.kernel.step

    @property
    def all_wide(self) -> bool:
        """Whether all numbers travel in 128-bit accesses; saved bits and parameters need not."""
        numbers = self.elements * self.kernel.data.item
        return (
            self.path.wide_bytes("load") >= numbers * self.kernel.data.reads
            and self.path.wide_bytes("store") >= numbers * self.kernel.data.writes
        )

    @property
    def instructions(self) -> float:
        """Of an element on the bulk path, with its share of addresses and the branch back."""
        return self.path.instructions / self.elements

    def row(self) -> tuple[str, ...]:
        wide = [
            f"{sum(width >= WIDE for width in widths)}/{len(widths)}"
            for widths in map(self.path.accesses, ("load", "store"))
        ]
        binary = self.binary
        numbers = (f"{binary.registers}", f"{binary.stack}", *wide, f"{self.instructions:.1f}")
        return self.arch, self.kernel.name, self.kernel.dtype, *numbers

    def broken(self) -> Iterator[str]:
        """The promises that do not hold."""
        kernel, path = self.kernel, self.path
        if self.binary.stack:
            yield f"{self.binary.stack} bytes of stack (spills or local arrays), promised none"
        if self.binary.registers > kernel.registers:
            yield f"{self.binary.registers} registers, promised at most {kernel.registers}"
        if missing := set(kernel.opcodes) - self.binary.function.opcodes:
            yield f"no {', '.join(sorted(missing))} instruction"
        if kernel.wide and not self.all_wide:
            yield (
                f"loads of {path.accesses('load')} and stores of {path.accesses('store')} bytes for {self.elements}"
                " elements, promised 128-bit ones for all numbers"
            )
        if path.calls:
            yield f"{path.calls} calls on the bulk path, promised none"
        if path.inner:
            yield f"{len(path.inner)} instructions in loops nested in the bulk path, promised none"
        if self.instructions > kernel.instructions:
            yield f"{self.instructions:.1f} instructions an element, promised at most {kernel.instructions:g}"


HEADER = ("arch", "kernel", "dtype", "registers", "stack", "wide loads", "wide stores", "instructions/element")


def cuda_cubin(arch: str, kernels: Sequence[Kernel] = KERNELS) -> FilePath:
    CACHE.mkdir(parents=True, exist_ok=True)
    source = CACHE / f"kernels-{len(kernels)}.cu"
    source.write_text(source_of([kernel.expression for kernel in kernels], PREAMBLE))
    return compile_cuda(source, arch, CACHE)


def cuda_reports(arch: str, kernels: Sequence[Kernel] = KERNELS) -> list[Report]:
    binaries = instances(cuda_cubin(arch, kernels))
    return [Report(kernel, arch, binary) for kernel, binary in zip(kernels, binaries, strict=True)]
