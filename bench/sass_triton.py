"""The Triton kernels, compiled ahead of time: the rows of `bench.sass`, and settings that cover all options."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .sass_model import Data, SassError

_ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}
_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
AMD = ("gfx90a", "gfx942", "gfx1100")


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def version() -> str:
    import triton

    return f"Triton {triton.__version__}"


@dataclass(frozen=True)
class TritonKernel:
    """A kernel with its arguments. wide: whether all numbers travel in 128-bit accesses."""

    name: str
    dtype: str
    function: str
    pointers: dict[str, str]
    constants: dict[str, object]
    data: Data
    wide: bool = True


def _forward(name: str, dtype: str, mask: str, bits: int = 2, rounding: str = "ceil", codes: bool = False,
             alphas: str = "one") -> TritonKernel:  # fmt: skip
    from coarsegrad.reference import CODE_WIDTH, MASK_WIDTH

    pointers = {"x_ptr": dtype, "alpha_ptr": "fp32", "y_ptr": dtype}
    pointers |= {"mask_ptr": "u8"} if mask != "nothing" else {}
    pointers |= {"codes_ptr": "u8"} if codes else {}
    constants = {"BITS": bits, "CODE_WIDTH": CODE_WIDTH[bits], "ROUNDING": rounding, "MASK": mask, "ALPHAS": alphas}
    data = Data(_ITEM[dtype], 1, 1, MASK_WIDTH[mask] + (CODE_WIDTH[bits] if codes else 0))
    return TritonKernel(name, dtype, "qrelu_forward_kernel", pointers, constants, data)


def _backward(name: str, dtype: str, ste: str, rule: str | None, bits: int = 2, rounding: str = "ceil",
              alphas: str = "one", channel_sums: dict[str, object] | None = None) -> TritonKernel:  # fmt: skip
    """channel_sums: the tile of the kernel that does them, instead of the one for dx."""
    from coarsegrad.reference import CODE_WIDTH, MASK_WIDTH
    from coarsegrad.ste import get_ste, kept

    mask, codes, keeps_x = kept(ste, rounding, rule, True)
    pointers = {"dy_ptr": dtype}
    pointers |= {"x_ptr": dtype, "alpha_ptr": "fp32"} if keeps_x else {}
    pointers |= {"mask_ptr": "u8"} if mask != "nothing" else {}
    pointers |= {"codes_ptr": "u8"} if codes else {}
    constants = {
        "BITS": bits, "CODE_WIDTH": CODE_WIDTH[bits], "GPRIME": ste, "NEEDS": get_ste(ste).needs,
        "ROUNDING": rounding, "MASK": mask, "RULE": rule,
    }  # fmt: skip
    kept_bits = MASK_WIDTH[mask] + (CODE_WIDTH[bits] if codes else 0)
    reads_x = keeps_x and (channel_sums or alphas == "one" or get_ste(ste).needs != "nothing")
    data = Data(_ITEM[dtype], 2 if reads_x else 1, 0 if channel_sums else 1, kept_bits)
    if channel_sums:
        pointers |= {"partial_ptr": "fp32"}
        constants |= channel_sums
        return TritonKernel(
            name, dtype, "grad_alpha_channels_kernel", pointers, constants, data, wide=constants["OCTETS"]
        )
    pointers |= {"dx_ptr": dtype} | ({"partial_ptr": "fp32"} if rule and alphas == "one" else {})
    return TritonKernel(name, dtype, "qrelu_backward_kernel", pointers, constants | {"ALPHAS": alphas}, data)


def _tile(dtype: str, innermost: bool, octets: bool) -> dict[str, object]:
    from coarsegrad.triton.qrelu import sum_channels

    inner = 1 if innermost else 4096 if octets else 4095
    return sum_channels(64 * inner * 64, 64 if octets else 63, inner, _ITEM[dtype])[1]


def _times_slopes(name: str, dtype: str, bits: int = 2) -> TritonKernel:
    from coarsegrad.reference import CODE_WIDTH

    pointers = {"dy_ptr": dtype, "codes_ptr": "u8", "slopes_ptr": "fp32", "dx_ptr": dtype}
    constants = {"BITS": bits, "CODE_WIDTH": CODE_WIDTH[bits]}
    data = Data(_ITEM[dtype], 1, 1, CODE_WIDTH[bits])
    return TritonKernel(name, dtype, "times_slopes_kernel", pointers, constants, data)


def _dequantize(name: str, dtype: str, bits: int = 2, alphas: str = "one") -> TritonKernel:
    from coarsegrad.reference import CODE_WIDTH

    pointers = {"codes_ptr": "u8", "alpha_ptr": "fp32", "y_ptr": dtype}
    constants = {"CODE_WIDTH": CODE_WIDTH[bits], "ALPHAS": alphas}
    data = Data(_ITEM[dtype], 0, 1, CODE_WIDTH[bits])
    return TritonKernel(name, dtype, "dequantize_kernel", pointers, constants, data)


def rows() -> list[TritonKernel]:
    """Those of the table."""
    state = ("clipped_relu", "three_valued")
    return [
        *(_forward("forward, mask", dtype, "inside") for dtype in _ITEM),
        _forward("forward, mask, 8 bits", "bf16", "inside", 8),
        _forward("forward, state, codes", "bf16", "state", codes=True),
        _forward("forward, mask, channels", "bf16", "inside", alphas="by octet"),
        *(_backward("backward, mask", dtype, "clipped_relu", None) for dtype in ("fp32", "bf16")),
        _backward("backward, state, dalpha", "bf16", *state),
        _times_slopes("backward, slopes", "bf16"),
        _backward("backward, x", "bf16", "reverse_exponential", None),
        _backward("dalpha, channels", "bf16", *state, channel_sums=_tile("bf16", False, True)),
        _backward("dalpha, innermost", "bf16", *state, channel_sums=_tile("bf16", True, True)),
        _dequantize("dequantize", "bf16"),
    ]


def pairwise(**options: tuple) -> list[dict[str, object]]:
    """Few settings, of one value of each option, in which every two values of two options are together once."""
    names = sorted(options, key=lambda name: -len(options[name]))
    missing = dict.fromkeys(
        frozenset([(a, u), (b, v)])
        for a, b in itertools.combinations(names, 2)
        for u, v in itertools.product(options[a], options[b])
    )
    found = []
    while missing:
        setting = dict(next(iter(missing)))
        for name in names:
            if name not in setting:
                fresh = {
                    value: sum(frozenset([(name, value), item]) in missing for item in setting.items())
                    for value in options[name]
                }
                setting[name] = max(fresh, key=fresh.get)
        for pair in itertools.combinations(setting.items(), 2):
            missing.pop(frozenset(pair), None)
        found.append({name: setting[name] for name in options})
    return found


def covering(archs: tuple[str, ...]) -> list[tuple[str, TritonKernel]]:
    """(architecture, kernel): of each kernel, every two options together once, the architecture among them."""
    from coarsegrad.reference import MASK_WIDTH
    from coarsegrad.ste import ALPHA_GRADS, BUILT_IN, ROUNDINGS

    both = {"arch": archs, "dtype": tuple(_ITEM), "bits": (1, 2, 4, 8)}
    alphas = {"alphas": ("one", "by octet", "by element")}
    stes = {"rounding": ROUNDINGS, "ste": BUILT_IN}
    found = []

    def add(make, **options: tuple) -> None:
        for setting in pairwise(**both, **options):
            name = " ".join(str(value) for value in setting.values())
            arch = setting.pop("arch")
            found.append((arch, make(f"{make.__name__[1:]} {name}", **setting)))

    def _channel_sums(name: str, dtype: str, innermost: bool, octets: bool, **setting) -> TritonKernel:
        return _backward(name, dtype, channel_sums=_tile(dtype, innermost, octets), **setting)

    add(_forward, rounding=ROUNDINGS, mask=tuple(MASK_WIDTH), codes=(False, True), **alphas)
    add(_backward, rule=(None, *ALPHA_GRADS), **stes, **alphas)
    add(_channel_sums, rule=ALPHA_GRADS, innermost=(False, True), octets=(False, True), **stes)
    add(_dequantize, **alphas)
    add(_times_slopes)
    sums = TritonKernel("sum slices", "fp32", "sum_slices_kernel", {"partial_ptr": "fp32", "sums_ptr": "fp32"},
                        {"ROWS": 32, "COLUMNS": 32}, Data(4, 1, 0, 0), wide=False)  # fmt: skip
    return found + [(arch, sums) for arch in archs]


def instance_fields(kernel: TritonKernel) -> dict[str, object]:
    """The fields of a bench.sass.Instance."""
    return {
        "kernel": f"Triton {kernel.name}",
        "dtype": _NAMES[kernel.dtype],
        "expression": kernel.function,
        "threads": 128,
        "data": kernel.data,
        "step": 1,
        "wide": kernel.wide,
    }


def compiled(kernel: TritonKernel, arch: str, folder: Path, **options: object):
    """What triton.compile gives, for an architecture of CUDA or AMD. Triton keeps what it compiled in `folder`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from coarsegrad.triton import kernels, qrelu
    from coarsegrad.triton import ste as mirror

    if triton.knobs.runtime.interpret:
        raise SassError("with TRITON_INTERPRET=1 Triton compiles nothing; unset it")
    function = getattr(kernels, kernel.function)
    constants = {"BLOCK": qrelu.BLOCK[_ITEM[kernel.dtype]]} | kernel.constants
    if "GPRIME" in constants:
        constants |= {
            "GPRIME": mirror.STES[constants["GPRIME"]],
            "RULE": mirror.ALPHA_GRADS.get(constants["RULE"]),
        }
    counts = {"count", "outer", "slices"}
    if constants.get("ALPHAS") == "one":
        constants |= {"channels": 1, "inner": 1}
    else:
        counts |= {"channels", "inner"}
    if constants.get("INNERMOST"):
        constants |= {"inner": 1}
        counts -= {"inner"}

    def type_of(name: str) -> str:
        if name in kernel.pointers:
            return f"*{kernel.pointers[name]}"
        return "i32" if name in counts else "fp32" if name == "scale" else "constexpr"

    # Pointers are on 16-byte boundaries, counts anything.
    types = {name: type_of(name) for name in function.arg_names}
    place = {name: (i,) for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        types,
        {place[name]: constants.get(name) for name in function.arg_names if types[name] == "constexpr"},
        {place[name]: [["tt.divisibility", 16]] for name in kernel.pointers},
    )
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    else:
        target = GPUTarget("cuda", int(arch[3:]), 32)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder / "triton")
        return triton.compile(source, target=target, options=dict(qrelu.OPTIONS) | options)


def cubin(kernel: TritonKernel, arch: str, folder: Path, cuobjdump: Path) -> tuple[Path, dict[str, int]]:
    """The path of the machine code for an architecture of CUDA, and what cuobjdump says that it takes."""
    made = compiled(kernel, arch, folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"triton-{made.hash[:16]}.cubin"
    path.write_bytes(made.asm["cubin"])
    done = subprocess.run([cuobjdump, "-res-usage", path], capture_output=True, text=True)
    used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", done.stdout + done.stderr)}
    if "REG" not in used:
        raise SassError(f"cuobjdump told nothing of {kernel.name}, {kernel.dtype}:\n{done.stdout}{done.stderr}")
    return path, used
