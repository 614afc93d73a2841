"""The Triton kernels, compiled ahead of time with the arguments that the ops launch them with."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch

from coarsegrad._types import (
    ALPHA_GRADS,
    BUILT_IN,
    CODE_WIDTH,
    MASK_WIDTH,
    ROUNDINGS,
    WEIGHT_BITS,
    AlphaGrad,
    MaskKind,
    Rounding,
    Ste,
)
from coarsegrad.ste import get_ste, saved

from .code import Data, SassError
from .compiler import CACHE, Binary, read
from .gate import DTYPES, Kernel, Report

AMD = ("gfx90a", "gfx942", "gfx1100")
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
# How alphas lie in a tensor, and a shape with its channel_dim; "by octet" and "in octets" are multiples of 8 elements.
_LAYOUTS = {
    "one": ((2**18,), None),
    "by octet": ((4, 64, 4096), 1),
    "by element": ((4, 64, 4095), 1),
    "innermost, in octets": ((64, 4096), 1),
    "innermost": ((64, 4095), 1),
}


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


# --------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class TritonKernel(Kernel):
    """`expression` names the function in a module of coarsegrad.triton. Pointers are to 16-byte boundaries. aligned:
    sizes are taken as multiples of 16 where they are some, as in a launch."""

    arguments: dict[str, object] = field(default_factory=dict)
    aligned: bool = False


def _launches(name: str, dtype: str, op: str, *of_op: object) -> list[TritonKernel]:
    """The kernels that an op on activations or weights launches; nothing runs."""
    from coarsegrad import triton
    from coarsegrad.triton import kernels, norm, norm_kernels, qrelu, signed, signed_kernels, weight_kernels, weights

    launchers = {kernels: qrelu, signed_kernels: signed, norm_kernels: norm, weight_kernels: weights}
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(_recorded(*pair)) for pair in launchers.items()]
        getattr(triton, op)(*of_op)
    return [_kernel(name, dtype, *launched) for launched in itertools.chain(*found)]


@contextlib.contextmanager
def _recorded(kernels: ModuleType, launcher: ModuleType) -> Iterator[list[tuple[str, dict[str, object]]]]:
    """The kernels of one module that another launches inside, with their arguments; nothing runs."""
    found: list[tuple[str, dict[str, object]]] = []

    class Recorder:
        def __init__(self, function: str) -> None:
            self.function = function

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            names = getattr(kernels, self.function).arg_names
            return lambda *args, **rest: found.append((self.function, dict(zip(names, args)) | rest))

    recorders = {each: Recorder(each) for each in vars(kernels) if each.endswith("_kernel")}
    with mock.patch.object(launcher, kernels.__name__.rpartition(".")[2], SimpleNamespace(**recorders)):
        yield found


def _kernel(name: str, dtype: str, function: str, arguments: dict[str, object]) -> TritonKernel:
    given = {each for each, value in arguments.items() if value is not None}
    if function == "sum_slices_kernel":
        data, wide = Data(4, 1, 0, 0), False
    elif function == "pack_kernel":
        data, wide = Data(1, 1, 0, arguments["WIDTH"]), False
    elif "weight_ptr" in given and function != "norm_qsigned_kernel":
        # Codes are searched for on small tiles, and take many instructions for what is read.
        data = Data(getattr(torch, dtype).itemsize, 1, 0, 0)
        wide = function != "search_kernel" and arguments["length"] % 16 == 0
    elif function in ("ternary_kernel", "scale_kernel"):
        data, wide = Data(8, 1, 0, 0), False
    else:
        reads = given & {"x_ptr", "dy_ptr"}
        # With alpha applied after the sum, dx does not depend on x.
        if function == "qrelu_backward_kernel" and arguments["ALPHAS"] != "one" and arguments["NEEDS"] == "nothing":
            reads.discard("x_ptr")
        width = MASK_WIDTH[MaskKind[arguments.get("MASK", "inside")]] if "mask_ptr" in given else 0
        width += arguments["CODE_WIDTH"] if "codes_ptr" in given else 0
        data = Data(getattr(torch, dtype).itemsize, len(reads), len(given & {"y_ptr", "dx_ptr"}), width)
        wide = arguments.get("OCTETS", True)
        wide = wide and arguments.get("group", 8) % 8 == 0
        if function == "hadamard_kernel":  # which may have float32 sums on one side
            wide = arguments["x_ptr"].dtype == arguments["y_ptr"].dtype
    aligned = function in ("qsigned_groups_kernel", "hadamard_kernel") or "weight_ptr" in given
    return TritonKernel(f"Triton {name}: {function}", dtype, function, data, wide=wide, arguments=arguments,
                        aligned=aligned)  # fmt: skip


def _tensors(dtype: str, layout: str) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """(x, alpha, channel_dim)."""
    shape, channel_dim = _LAYOUTS[layout]
    alpha = torch.ones(1 if channel_dim is None else shape[channel_dim])
    return torch.empty(shape, dtype=getattr(torch, dtype)), alpha, channel_dim


def _bits(x: torch.Tensor, width: int) -> torch.Tensor:
    return torch.empty((x.numel() * width + 7) // 8, dtype=torch.uint8)


def forward(name: str, dtype: str, mask: str, bits: int = 2, rounding: str = "ceil", codes: bool = False,
            layout: str = "one") -> list[TritonKernel]:  # fmt: skip
    x, alpha, channel_dim = _tensors(dtype, layout)
    return _launches(name, dtype, "qrelu_forward", x, alpha, bits, rounding, mask, codes, channel_dim)


def backward(name: str, dtype: str, ste: str, rule: str | None, bits: int = 2, rounding: str = "ceil",
             layout: str = "one") -> list[TritonKernel]:  # fmt: skip
    """The kernels for dx and, with a rule, for the gradient of alpha."""
    x, alpha, channel_dim = _tensors(dtype, layout)
    options = get_ste(ste).needs, Rounding[rounding], AlphaGrad[rule or "exact"]
    mask, saves_codes, _ = saved(*options, need_grad_x=True, need_grad_alpha=rule is not None)
    packed = _bits(x, MASK_WIDTH[mask]), _bits(x, CODE_WIDTH[bits] if saves_codes else 0)
    settings = bits, ste, rounding, rule or "exact", 1.0, channel_dim, True, rule is not None
    return _launches(name, dtype, "qrelu_backward", x, alpha, x, *packed, *settings)


def dequantize(name: str, dtype: str, bits: int = 2, layout: str = "one") -> list[TritonKernel]:
    y, alpha, channel_dim = _tensors(dtype, layout)
    like_y = y.shape, y.dtype, channel_dim, torch.contiguous_format
    return _launches(name, dtype, "dequantize", _bits(y, CODE_WIDTH[bits]), alpha, bits, *like_y)


def backward_from_slopes(name: str, dtype: str, bits: int = 2) -> list[TritonKernel]:
    x = _tensors(dtype, "one")[0]
    return _launches(name, dtype, "backward_from_slopes", x, _bits(x, CODE_WIDTH[bits]), torch.ones(2**bits), bits)


def signed_forward(name: str, dtype: str, mask: bool, bits: int = 4, codes: bool = False,
                   layout: str = "one") -> list[TritonKernel]:  # fmt: skip
    x, alpha, channel_dim = _tensors(dtype, layout)
    return _launches(name, dtype, "qsigned_forward", x, alpha, bits, None, mask, codes, channel_dim)


def signed_groups(name: str, dtype: str, group: int, bits: int = 4, codes: bool = False) -> list[TritonKernel]:
    """With dynamic alphas."""
    x = torch.empty(2**18 // group, group, dtype=getattr(torch, dtype))
    return _launches(name, dtype, "qsigned_forward", x, None, bits, group, False, codes, None)


def signed_dequantize(name: str, dtype: str, group: int, bits: int = 4) -> list[TritonKernel]:
    y = torch.empty(2**18 // group, group, dtype=getattr(torch, dtype))
    alpha, like_y = torch.empty(len(y), dtype=torch.bfloat16), (y.shape, y.dtype, None, torch.contiguous_format)
    return _launches(name, dtype, "qsigned_dequantize", _bits(y, CODE_WIDTH[bits]), alpha, bits, group, *like_y)


def hadamard(name: str, dtype: str, size: int) -> list[TritonKernel]:
    return _launches(name, dtype, "hadamard", torch.empty(2**18, dtype=getattr(torch, dtype)), size)


def norm(name: str, dtype: str, length: int, kind: str = "rms", group: int | None = None, rotation: int | None = None,
         bits: int | None = 4, output: bool = False, twice: bool = False) -> list[TritonKernel]:  # fmt: skip
    """A norm and its staircase; "layer" with a bias, "rms" with 1 + weight."""
    x = torch.empty(2**18 // length, length, dtype=getattr(torch, dtype))
    centred, weight = kind == "layer", x[0]
    staircase = (bits, group, rotation) if bits else (None, None, None)
    of_op = x, weight, weight if centred else None, 1e-5, centred, not centred, twice, *staircase, output or not bits
    return _launches(name, dtype, "norm_qsigned", *of_op, bool(bits))


def weight_scale(name: str, dtype: str, bits: int, length: int = 4096) -> list[TritonKernel]:
    return _launches(name, dtype, "weight_scale", torch.empty(64, length, dtype=getattr(torch, dtype)), bits, 0)


def layer(name: str, bits: int, weight_bits: int, output: str, channels: int | None = None) -> TritonKernel:
    """A layer on codes. output: "float", "affine" or "thresholds"; channels: of a 3 x 3 convolution's input, None for a
    Linear."""
    from coarsegrad.triton import layer_kernels, layers

    count = 512 if channels is None else 9 * channels
    codes = torch.empty((256, count) if channels is None else (2, channels, 16, 16), dtype=torch.uint8)
    weight = torch.empty(128, -(-count * weight_bits // 256) * 32, dtype=torch.uint8)
    arguments = [codes, weight, bits, weight_bits, torch.empty(128), torch.empty(128)]
    if output != "float":
        arguments += [torch.empty(128, 15, dtype=torch.int32) if output == "thresholds" else None, 15]
    if channels is not None:
        arguments += [[3, 3], [1, 1], [1, 1], [1, 1], 1]
    op = ("integer_linear" if channels is None else "integer_conv2d") + "_float" * (output == "float")
    with _recorded(layer_kernels, layers) as found:
        getattr(layers, op)(*arguments)
    ((function, given),) = found
    return TritonKernel(name, "uint8", function, Data(1, 1, 1, 0), wide=False, arguments=given, aligned=True)


def mlp(
    op: str, tile: int, bits: int = 4, dtype: str = "bfloat16", ste: str = "clipped_relu", squared: bool = False,
    factors: int = 1,
) -> TritonKernel:  # fmt: skip
    """A matrix product of qrelu_mlp, or of qrelu_gated_mlp with two factors, of sizes that are multiples of 16. tile: a
    number of triton/mlp.py's TILES."""
    from coarsegrad.triton import mlp as launcher

    rows, inputs, hidden, outputs = 4096, 1024, 4096, 1024
    numbers = getattr(torch, dtype)
    x, weight1, weight2, grad_out = (
        torch.empty(size, dtype=numbers)
        for size in ((rows, inputs), (hidden, inputs), (outputs, hidden), (rows, outputs))
    )
    bias1, bias2 = (torch.empty(size, dtype=numbers) for size in (hidden, outputs))
    alpha, nan_rows = torch.tensor([0.5]), torch.empty(rows)
    codes, mask = (torch.empty(rows * hidden * width // 8, dtype=torch.uint8) for width in (CODE_WIDTH[bits], 1))
    kind = MaskKind.nothing if ste == "relu" else MaskKind.inside
    read = [codes] * factors, [alpha] * factors
    given = {
        "linear_to_codes": (x, weight1, bias1, alpha, bits, Rounding.ceil, kind),
        "linear_from_codes": (read[0], nan_rows, read[1], bits, squared, weight2, bias2),
        "linear_from_codes_grad_input": (
            grad_out,
            weight2,
            [] if ste == "relu" else [mask] * factors,
            *read,
            bits,
            squared,
            Ste[ste],
            Rounding.ceil,
        ),
        "linear_from_codes_grad_weight": (grad_out, *read, bits, squared, hidden),
    }
    found: list[dict[str, object]] = []

    class Recorder:
        def __init__(self, kernel: object) -> None:
            self.fn = kernel.fn

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **rest: found.append(
                dict(zip(self.fn.arg_names, args)) | rest | {"name": self.fn.fn.__name__}
            )

    recorders = {name: Recorder(kernel) for name, kernel in launcher._KERNELS.items()}
    with mock.patch.object(launcher, "_KERNELS", recorders):
        getattr(launcher, op)(*given[op])
    ((arguments),) = found
    sizes = launcher._config(*launcher.TILES[tile])
    options = sizes.kwargs | {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages}
    name = arguments.pop("name")
    return TritonKernel(f"{op}, tile {tile}", dtype, name, Data(1, 1, 1, 0), wide=False,
                        arguments=arguments | options, aligned=True)  # fmt: skip


# --------------------------------------------------------------------------------------------- settings


def examples() -> list[TritonKernel]:
    """What the command reports."""
    return [
        *itertools.chain(*(forward("forward, mask", dtype, "inside") for dtype in DTYPES)),
        *forward("forward, mask, 8 bits", "bfloat16", "inside", 8),
        *forward("forward, state, codes", "bfloat16", "state", codes=True),
        *forward("forward, mask, channels", "bfloat16", "inside", layout="by octet"),
        *backward("backward, mask", "float32", "clipped_relu", None),
        *backward("backward, mask", "bfloat16", "clipped_relu", None),
        *backward("backward, state, dalpha", "bfloat16", "clipped_relu", "three_valued"),
        *backward("backward, state, dalpha, channels", "bfloat16", "clipped_relu", "three_valued", layout="by octet"),
        *backward("backward, x", "bfloat16", "reverse_exponential", None),
        *backward_from_slopes("backward, slopes", "bfloat16"),
        *dequantize("dequantize", "bfloat16"),
        *signed_forward("signed, mask, codes", "bfloat16", True, codes=True),
        *signed_groups("signed, groups of 32, codes", "float32", 32, codes=True),
        *signed_groups("signed, groups of 32, codes", "bfloat16", 32, codes=True),
        *signed_groups("signed, rows, codes", "bfloat16", 4096, 8, codes=True),
        *signed_groups("signed, long rows, codes", "bfloat16", 11008, 8, codes=True),
        *signed_dequantize("signed, dequantize, groups of 32", "bfloat16", 32),
        *hadamard("Hadamard, 64", "bfloat16", 64),
        *hadamard("Hadamard, 4096", "bfloat16", 4096),
        *itertools.chain(*(weight_scale(f"weight, {bits} bits", "bfloat16", bits) for bits in WEIGHT_BITS)),
    ]


def in_float64(archs: tuple[str, ...]) -> list[tuple[str, TritonKernel]]:
    """(architecture, kernel): those that divide, in the dtype that `covering` leaves out, the architectures in turn."""
    kernels = [
        *forward("forward", "float64", "inside", 8),
        *backward("backward", "float64", "log_tailed_relu", "chain"),
        *backward("backward, channels", "float64", "reverse_exponential", "chain", layout="innermost"),
        *signed_forward("signed", "float64", True, 8),
        *signed_groups("signed, groups", "float64", 32, 8),
        *itertools.chain(*(weight_scale(f"weight, {bits} bits", "float64", bits) for bits in WEIGHT_BITS)),
    ]
    return list(zip(itertools.cycle(archs), kernels))


def pairwise(**options: tuple) -> list[dict[str, object]]:
    """Few settings, each with one value of every option, in which any two values of two options meet."""
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
    """(architecture, kernel): of each op, any two options meet, the architecture among them."""
    bits, signed_bits = {"bits": (1, 2, 4, 8)}, {"bits": (2, 4, 8)}
    codes, layouts = {"codes": (False, True)}, {"layout": tuple(_LAYOUTS)}
    found = []
    for op, options in (
        (forward, {**bits, "rounding": ROUNDINGS, "mask": tuple(MaskKind.__members__), **codes, **layouts}),
        (backward, {**bits, "rounding": ROUNDINGS, "ste": BUILT_IN, "rule": (None, *ALPHA_GRADS), **layouts}),
        (dequantize, bits | layouts),
        (backward_from_slopes, bits),
        (signed_forward, {**signed_bits, "mask": (False, True), **codes, "layout": ("one", "by octet", "by element")}),
        (signed_groups, {**signed_bits, **codes, "group": (3, 32, 4096, 11008)}),
        (hadamard, {"size": (64, 4096, 2**14)}),
        (weight_scale, {"bits": WEIGHT_BITS, "length": (9, 100, 4096, 2**20)}),
    ):
        for setting in pairwise(arch=archs, dtype=tuple(DTYPES), **options):
            name = " ".join(map(str, setting.values()))
            arch = setting.pop("arch")
            found += [(arch, kernel) for kernel in op(name, **setting)]
    return found


def norms(archs: tuple[str, ...]) -> list[tuple[str, TritonKernel]]:
    """The same of norms, in all dtypes. Their rows are read again from a cache: no promise of registers is made."""
    options = {"length": (768, 4096), "kind": ("rms", "layer"), "bits": (None, 2, 8), "group": (None, 32)}
    switches = dict.fromkeys(("output", "twice"), (False, True))
    found = []
    for setting in pairwise(arch=archs, dtype=(*DTYPES, "float64"), rotation=(None, 32), **options, **switches):
        name = " ".join(map(str, setting.values()))
        arch = setting.pop("arch")
        found += [(arch, kernel) for kernel in norm(name, **setting)]
    return found


# ---------------------------------------------------------------------------------------------- compiling


def compiled(kernel: TritonKernel, arch: str, folder: Path = CACHE, **options: object):
    """The result of triton.compile for an architecture of NVIDIA or AMD. Triton caches what it compiles in `folder`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from coarsegrad.triton import kernels, layer_kernels, mlp_kernels, norm_kernels, signed_kernels, weight_kernels

    if triton.knobs.runtime.interpret:
        raise SassError("with TRITON_INTERPRET=1 Triton compiles nothing; unset it")
    modules = kernels, layer_kernels, mlp_kernels, signed_kernels, norm_kernels, weight_kernels
    function = next(getattr(each, kernel.expression) for each in modules if hasattr(each, kernel.expression))

    def type_of(name: str, value: object) -> str:
        if isinstance(value, torch.Tensor):
            return f"*{_TYPES[value.dtype]}"
        runtime = name.islower() and value is not None and value != 1  # a launch, too, makes a constant of 1
        return {int: "i32", float: "fp32"}[type(value)] if runtime else "constexpr"

    arguments = {name: kernel.arguments[name] for name in function.arg_names}
    types = {name: type_of(name, value) for name, value in arguments.items()}
    place = {name: (i,) for i, name in enumerate(arguments)}
    constants = {place[name]: value for name, value in arguments.items() if types[name] == "constexpr"}
    sizes = {name for name, of in types.items() if kernel.aligned and of == "i32" and arguments[name] % 16 == 0}
    aligned = {
        place[name]: [["tt.divisibility", 16]] for name, of in types.items() if of.startswith("*") or name in sizes
    }
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    else:
        target = GPUTarget("cuda", int(arch[3:]), 32)
    options = {name: value for name, value in kernel.arguments.items() if name not in arguments} | options
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder / "triton")
        return triton.compile(ASTSource(function, types, constants, aligned), target=target, options=options)


def in_ptx(kernel: TritonKernel, arch: str):
    """What `compiled` returns for NVIDIA, without machine code: `binaries` makes that of many at once."""
    from triton.backends.nvidia.compiler import CUDABackend

    with mock.patch.object(CUDABackend, "make_cubin", lambda *_: b""):
        return compiled(kernel, arch, CACHE / "ptx")


def reports(kernels: Iterable[TritonKernel], arch: str) -> list[Report]:
    pairs = [(kernel, in_ptx(kernel, arch)) for kernel in kernels]
    codes = binaries([made for _, made in pairs])
    return [Report(kernel, arch, code) for (kernel, _), code in zip(pairs, codes, strict=True)]


def binaries(made: Sequence) -> list[Binary]:
    """The machine code for NVIDIA of what `compiled` or `in_ptx` returned for one architecture.

    Triton assembles it as one module: reading one kernel takes the disassembler as long as reading hundreds.
    """
    from triton.compiler import make_backend

    if not made:
        return []
    by_hash = {each.hash: each for each in made}
    modules = [_Module(each.asm["ptx"], each.metadata.name, i) for i, each in enumerate(by_hash.values())]
    heads = dict.fromkeys(itertools.chain(*(module.head for module in modules)))
    text = "\n".join([*heads, *(module.kernel for module in modules)])
    target, fusions = made[0].metadata.target, {each.metadata.enable_fp_fusion for each in made}
    if len(fusions) > 1 or any(each.metadata.target != target for each in made):
        raise SassError("kernels that are read together must be of one architecture, with fp fusion or all without")
    backend = make_backend(target)
    options = backend.parse_options({"enable_fp_fusion": fusions.pop()})
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(suffix=".cubin", dir=CACHE) as file:
        file.write(backend.make_cubin(text, {}, options, target.arch))
        file.flush()
        found = read(Path(file.name))
    by_hash = {name: found[module.name] for name, module in zip(by_hash, modules, strict=True)}
    return [by_hash[each.hash] for each in made]


class _Module:
    """The PTX of a kernel without what is for debuggers: `head`, the lines before it, and `kernel`, itself, under the
    `name` that it has beside others."""

    def __init__(self, ptx: str, name: str, number: int) -> None:
        code = re.sub(r"(?m)^\s*\.loc\s.*\n", "", re.split(r"(?m)^\s*\.(?:file|section)\s", ptx)[0])
        head, entry, kernel = code.partition(".visible .entry ")
        self.head = [line for line in (line.partition("//")[0].strip() for line in head.splitlines()) if line]
        if any(not re.fullmatch(r"\.(?:version|target|address_size) .*|\.extern .*;", line) for line in self.head):
            raise SassError(f"{name} has more than a kernel in its PTX: {head}")
        self.name = f"{name}_{number}"
        self.kernel = re.sub(rf"\b{name}(?=\b|_param_)", self.name, entry + kernel)
