"""Instructions that an AArch64 CPU runs for each element: `python tests/arm_instructions.py` prints a table.
An emulator counts them: they are no times.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import cuda_host
import host_cases
import torch
from paths import ROOT

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (6400, 12800)  # their difference leaves out what is done once, as the tables of a search


def _build(folder: Path) -> str:
    settings = {"SYSTEM_NAME": "Linux", "SYSTEM_PROCESSOR": "aarch64", "CXX_COMPILER": COMPILER}
    cuda_host.configure(ROOT, folder, "-O3 -w", **settings, EXE_LINKER_FLAGS="-static")
    return str(cuda_host.build(folder, "cpu_host"))


def _instructions(program: str, isa: str, case: cuda_host.Case) -> int:
    """Of the project's functions in a run with one case: the emulator goes an instruction at a time, and says of each
    in which function it is."""
    command = [EMULATOR, "-singlestep", "-d", "exec,nochain", program, isa]
    with tempfile.TemporaryFile() as given:
        given.write(case.encode())
        given.seek(0)
        with subprocess.Popen(command, stdin=given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            return sum(line.startswith(b"Trace ") and b"2cg" in line for line in process.stderr)


def _case(name: str, dtype: torch.dtype, bits: int, count: int) -> cuda_host.Case:
    alpha, x = host_cases.alpha_tensor([0.3], dtype), torch.linspace(-1, 3, count).to(dtype)
    if name == "forward":
        return host_cases.forward_case(x, alpha, bits, "ceil", "inside", False)
    return host_cases.backward_case(x, x, alpha, bits, name, "ceil", None)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = _build(Path(folder))
        print("| kernel | bits | dtype | default | neon |\n|---|---|---|---|---|")
        for name, bits in (("forward", 2), ("forward", 4), ("forward", 8), ("clipped_relu", 2), ("log_tailed_relu", 2)):
            for dtype in DTYPES:
                each = []
                for isa in ("default", "neon"):
                    few, many = (_instructions(program, isa, _case(name, dtype, bits, count)) for count in COUNTS)
                    each.append((many - few) / (COUNTS[1] - COUNTS[0]))
                kind = name if name == "forward" else f"backward, `{name}`"
                print(
                    f"| {kind} | {bits} | {str(dtype).removeprefix('torch.')} | {each[0]:.1f} | {each[1]:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
