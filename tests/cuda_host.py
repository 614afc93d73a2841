"""Runs the CUDA kernels' own source on the CPU, through the programs that tests/cpp/cuda_host*.cpp make."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch
from paths import ROOT
from torch import Tensor

# In the order of the enumerators in csrc/math and of the operations in tests/cpp/cuda_host_cases.h.
OPS = ("forward", "backward", "dequantize", "backward_from_slopes", "signed_forward", "signed_dequantize", "hadamard",
       "weight_scale", "norm", "copy", "linear", "conv", "depthwise")  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROUNDINGS = ("ceil", "nearest", "hwgq")
MASKS = ("nothing", "positive", "inside", "state", "near")
STES = ("identity", "relu", "clipped_relu", "log_tailed_relu", "reverse_exponential", "trust")
ALPHA_GRADS = ("exact", "three_valued", "two_valued", "chain")
BUFFERS = ("alpha", "x", "y", "mask", "codes", "grad_y", "grad_x", "grad_alpha", "slopes", "group_alphas",
           "weight", "bias", "out", "mean", "inverse")  # fmt: skip
# Of a norm.
FLAGS = ("shifted", "rounds_twice", "wide_parameters")

# For the sanitizers of addresses and of undefined behaviour. What is undefined traps, and a debugger shows the line:
# with messages it takes half as long again to compile.
SANITIZED = "-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fsanitize-undefined-trap-on-error"

_NULL, _READ, _WRITE, _READ_WRITE = range(4)


@dataclass
class Case:
    """One call of an op. `inputs` are read, `outputs` are written: a dense tensor of the output's size and dtype for
    each; an input that is an output too is written in place. `offset`: elements by which all the pointers are off a
    16-byte boundary (bytes for what is packed)."""

    op: str
    dtype: torch.dtype
    bits: int
    count: int
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    channels: int = 1
    inner: int = 1
    rounding: str = "ceil"
    mask: str = "nothing"
    ste: str = "identity"
    alpha_grad: str = "exact"
    scale: float = 1.0
    group: int = 0  # of dynamic alphas; the size of a Hadamard block; the bits of a layer's weights
    rotation: int = 0
    flags: tuple[str, ...] = ()  # of FLAGS
    offset: int = 0
    seed: int = 0
    expected: dict[str, Tensor] = field(default_factory=dict)

    def encode(self) -> bytes:
        header = (
            OPS.index(self.op),
            self.seed,
            DTYPES.index(self.dtype),
            ROUNDINGS.index(self.rounding),
            self.bits,
            self.count,
            self.channels,
            self.inner,
            MASKS.index(self.mask),
            STES.index(self.ste),
            ALPHA_GRADS.index(self.alpha_grad),
            "x" in self.outputs,
            self.group,
            self.rotation,
            sum(1 << FLAGS.index(flag) for flag in self.flags),
        )
        parts = [struct.pack("15qd", *header, self.scale)]
        for name in BUFFERS:
            given, wanted = self.inputs.get(name), self.outputs.get(name)
            tensor = wanted if given is None else given
            if tensor is None:
                parts.append(struct.pack("3q", _NULL, 0, 0))
                continue
            mode = _READ_WRITE if wanted is not None and given is not None else _WRITE if given is None else _READ
            parts.append(struct.pack("3q", mode, tensor.nbytes, self.offset * tensor.element_size()))
            if mode != _WRITE:
                parts.append(_bytes_of(tensor))
        return b"".join(parts)


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


class HostRunnerError(Exception):
    """What the program said when it stopped."""


def run(program: Path | tuple, cases: list[Case]) -> list[dict[str, Tensor]]:
    """The outputs of each case, by a program or a command."""
    command = program if isinstance(program, tuple) else (program,)
    done = subprocess.run(command, input=b"".join(case.encode() for case in cases), capture_output=True, timeout=600)
    if done.returncode:
        raise HostRunnerError(done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}")
    return outputs(cases, done.stdout)


def outputs(cases: list[Case], written: bytes) -> list[dict[str, Tensor]]:
    """Those of each case, from what the program wrote."""
    results, at = [], 0
    for case in cases:
        result = {}
        for name in BUFFERS:
            if name in case.outputs:
                like = case.outputs[name]
                raw = bytearray(written[at : at + like.nbytes])
                at += like.nbytes
                result[name] = torch.frombuffer(raw, dtype=like.dtype) if raw else torch.empty(0, dtype=like.dtype)
        results.append(result)
    assert at == len(written)
    return results


def why_not() -> str | None:
    """Why the programs cannot be built on this machine, or None."""
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    return f"no {' and no '.join(missing)} found" if missing else None


def configure(source: Path, build: Path, flags: str, **more: str) -> None:
    """Prepares a build of the programs from a tree of sources, with more flags for the compiler and more settings."""
    # They need no Python and no torch; without them the rest of the description is not looked at.
    settings = {"CMAKE_BUILD_TYPE": "None", "CMAKE_CXX_FLAGS": flags, "CMAKE_DISABLE_FIND_PACKAGE_Python": "ON"}
    settings |= {f"CMAKE_{name}": value for name, value in more.items()}
    _check(["cmake", "-S", source, "-B", build, *(f"-D{name}={value}" for name, value in settings.items())])


def build(build: Path, program: str, *options: str) -> Path:
    """The program, made anew where its sources have changed."""
    _check(["cmake", "--build", build, "--target", program, *options])
    return build / program


def build_once(folder: Path, program: str, flags: str) -> Path:
    """A program of this tree's sources that is never made anew: a precompiled header would be read once."""
    configure(ROOT, folder, flags, DISABLE_PRECOMPILE_HEADERS="ON")
    return build(folder, program)


def _check(command: list) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise HostRunnerError(done.stdout)
