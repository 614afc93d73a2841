"""The Triton kernels, compiled ahead of time, as one more source of machine code for `bench.sass`."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

from .sass_model import Data, SassError

_ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}
_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def version() -> str:
    import triton

    return f"Triton {triton.__version__}"


def _forward(dtype: str, mask: str, bits: int = 2, codes: bool = False, alphas: str = "one"):
    pointers = {"x_ptr": dtype, "alpha_ptr": "fp32", "y_ptr": dtype, "mask_ptr": "u8"}
    width = {1: 1, 2: 2, 4: 4, 8: 8}[bits]
    constants = {"BITS": bits, "CODE_WIDTH": width, "ROUNDING": "ceil", "MASK": mask, "ALPHAS": alphas}
    kept = (2 if mask == "state" else 1) + (width if codes else 0)
    return "qrelu_forward_kernel", pointers | ({"codes_ptr": "u8"} if codes else {}), constants, (1, 1, kept)


def _backward(dtype: str, ste: str, rule: str | None, mask: str, kept: str, bits: int):
    """kept: the pointer to what is kept, beside the mask: "mask_ptr", "codes_ptr" or "x_ptr"."""
    pointers = {"dy_ptr": dtype, "dx_ptr": dtype, kept: "u8"}
    if kept == "x_ptr":
        pointers |= {"x_ptr": dtype, "alpha_ptr": "fp32"}
    if rule:
        pointers["partial_ptr"] = "fp32"
    constants = {"BITS": 2, "CODE_WIDTH": 2, "GPRIME": ste, "ROUNDING": "ceil", "MASK": mask, "RULE": rule,
                 "ALPHAS": "one"}  # fmt: skip
    return "qrelu_backward_kernel", pointers, constants, (2 if kept == "x_ptr" else 1, 1, bits)


def _channel_sums(dtype: str):
    _, pointers, constants, _ = _backward(dtype, "clipped_relu", "three_valued", "state", "mask_ptr", 2)
    del pointers["dx_ptr"], constants["ALPHAS"]
    constants |= {"INNERMOST": False, "OCTETS": True, "ROWS": 1, "COLUMNS": 2048}
    return "grad_alpha_channels_kernel", pointers, constants, (1, 0, 2)


def _dequantize(dtype: str):
    constants = {"CODE_WIDTH": 2, "ALPHAS": "one"}
    return "dequantize_kernel", {"codes_ptr": "u8", "alpha_ptr": "fp32", "y_ptr": dtype}, constants, (0, 1, 2)


_KERNELS = [
    ("forward, mask", dtype, _forward(dtype, "inside")) for dtype in _ITEM
] + [
    ("forward, mask, 8 bits", "bf16", _forward("bf16", "inside", 8)),
    ("forward, state, codes", "bf16", _forward("bf16", "state", 2, codes=True)),
    ("forward, mask, channels", "bf16", _forward("bf16", "inside", alphas="by octet")),
] + [
    ("backward, mask", dtype, _backward(dtype, "clipped_relu", None, "inside", "mask_ptr", 1))
    for dtype in ("fp32", "bf16")
] + [
    ("backward, state, dalpha", "bf16", _backward("bf16", "clipped_relu", "three_valued", "state", "mask_ptr", 2)),
    ("backward, x", "bf16", _backward("bf16", "reverse_exponential", None, "nothing", "x_ptr", 0)),
    ("dalpha, channels", "bf16", _channel_sums("bf16")),
    ("dequantize", "bf16", _dequantize("bf16")),
]  # fmt: skip


def instances() -> list[dict[str, object]]:
    """The fields of a bench.sass.Instance of each."""
    return [
        {
            "kernel": f"Triton {name}",
            "dtype": _NAMES[dtype],
            "expression": str(number),
            "threads": 128,
            "data": Data(_ITEM[dtype], *data),
            "step": 1,
            "wide": name != "dalpha, channels",
            "stack": 8 if name == "backward, x" else 0,  # the rare case of a division is a call
        }
        for number, (name, dtype, (_, _, _, data)) in enumerate(_KERNELS)
    ]


def compile_kernel(number: int, arch: str, folder: Path, cuobjdump: Path) -> tuple[Path, dict[str, int]]:
    """The cubin of a kernel, and what cuobjdump says that it takes. Triton keeps what it compiled in `folder`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from coarsegrad.ste import get_ste
    from coarsegrad.triton import kernels, qrelu
    from coarsegrad.triton import ste as mirror

    if triton.knobs.runtime.interpret:
        raise SassError("with TRITON_INTERPRET=1 Triton compiles nothing; unset it")
    name, dtype, (function, pointers, constants, _) = _KERNELS[number]
    kernel = getattr(kernels, function)
    constants = {"channels": 1, "inner": 1, "BLOCK": qrelu.BLOCK[_ITEM[dtype]]} | constants
    if "GPRIME" in constants:
        constants |= {
            "NEEDS": get_ste(constants["GPRIME"]).needs,
            "GPRIME": mirror.STES[constants["GPRIME"]],
            "RULE": mirror.ALPHA_GRADS.get(constants["RULE"]),
        }
    counts = {"count", "outer"}
    if constants.get("ALPHAS", "one") != "one" or "INNERMOST" in constants:
        counts |= {"channels", "inner"}
    # Pointers are on 16-byte boundaries, counts anything.
    types = {each: f"*{pointers[each]}" if each in pointers else "i32" if each in counts else "constexpr"
             for each in kernel.arg_names}  # fmt: skip
    place = {each: (i,) for i, each in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        types,
        {place[each]: constants.get(each) for each in kernel.arg_names if types[each] == "constexpr"},
        {place[each]: [["tt.divisibility", 16]] for each in pointers},
    )
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder / "triton")
        compiled = triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=dict(qrelu.OPTIONS))
    folder.mkdir(parents=True, exist_ok=True)
    cubin = folder / f"triton-{number}-{arch}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    done = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True)
    used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", done.stdout + done.stderr)}
    if "REG" not in used:
        raise SassError(f"cuobjdump told nothing of {name}, {dtype}:\n{done.stdout}{done.stderr}")
    return cubin, used
