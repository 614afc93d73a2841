"""The ops: schemas, shapes and default kernels; and the native library, which registers faster kernels.

Each op's default kernel is the reference. Loading the native library `coarsegrad._C` registers faster kernels for its
devices, and the derivative of qrelu. Without the library, and for a custom STE, the derivative is in `_autograd.py`.

The ops that users' graphs contain (qrelu, qrelu_linear, ...) take options by name. The ops that these call take the
numbers of `_types.py`, and a custom STE by name.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import check_arguments, check_hadamard, check_norm, check_signed, check_weight
from ._torch_internals import suggest_memory_format, tag_compile_caches
from ._types import CODE_WIDTH, MASK_WIDTH, MaskKind, Rounding, packed_bytes, parse, wide_dtype
from .ste import GPrime, get_ste, real_numbers

# alpha_scale is a number, or infinity for "lsq" while the sizes of x are unknown.
_QRELU = "int bits, str ste, str rounding, str alpha_grad, float alpha_scale, int? channel_dim"
_RULE = "int rounding, int alpha_grad, float alpha_scale, int? channel_dim, bool need_grad_x, bool need_grad_alpha"
# The output of a qrelu, to be rebuilt from its codes.
_OUTPUT = "int bits, SymInt[] shape, ScalarType dtype, int? channel_dim, MemoryFormat memory_format"
# alpha: None if it is dynamic, one for each `group` elements of the last dimension (None: all of it).
_QSIGNED = "int bits, SymInt? group, str ste, str alpha_grad, float alpha_scale, int? channel_dim"
# A norm over the last dimension, n * weight + bias; centred: a LayerNorm; shifted: weight is 1 + weight; rounds_twice:
# n is rounded to x's dtype too. Then a signed staircase with dynamic alphas, unless bits is None.
_NORM_QSIGNED = (
    "Tensor x, Tensor? weight, Tensor? bias, float eps, bool centred, bool shifted, bool rounds_twice, int? bits,"
    " SymInt? group, SymInt? rotation, bool output, bool codes"
)
_CONV = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"

_INTEGER_LAYER = "Tensor codes, Tensor weight, int bits, int weight_bits, Tensor scale, Tensor offset"
_STAIRCASE = "Tensor? thresholds, int levels"
_WINDOW = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups"

_SCHEMAS = (
    f"qrelu(Tensor x, Tensor alpha, {_QRELU}) -> Tensor",
    f"qrelu_(Tensor(a!) x, Tensor alpha, {_QRELU}) -> Tensor(a!)",
    # For an STE that is not compiled into the native library.
    f"qrelu_custom(Tensor x, Tensor alpha, {_QRELU}) -> Tensor",
    f"qrelu_custom_(Tensor(a!) x, Tensor alpha, {_QRELU}) -> Tensor(a!)",
    # Inside `packed_activations`, in the graphs of torch.compile: packing/graphs.py.
    f"qrelu_packed(Tensor x, Tensor alpha, {_QRELU}) -> Tensor",
    f"qrelu_packed_(Tensor(a!) x, Tensor alpha, {_QRELU}) -> Tensor(a!)",
    # A Linear or Conv2d on the output of a qrelu, which is first converted to dtype.
    f"qrelu_linear(Tensor x, Tensor alpha, Tensor weight, Tensor? bias, {_QRELU}, ScalarType dtype) -> Tensor",
    f"qrelu_conv2d(Tensor x, Tensor alpha, Tensor weight, Tensor? bias, {_QRELU}, ScalarType dtype, {_CONV}) -> Tensor",
    # mask: the kind of bits to return; codes: whether to return them.
    "qrelu_forward(Tensor x, Tensor alpha, int bits, int rounding, int mask, bool codes, int? channel_dim)"
    " -> (Tensor y, Tensor mask, Tensor codes)",
    "qrelu_forward_packed(Tensor x, Tensor alpha, int bits, int rounding, int mask, bool codes, int? channel_dim)"
    " -> (Tensor y, Tensor mask, Tensor codes)",
    "qrelu_forward_(Tensor(a!) x, Tensor alpha, int bits, int rounding, int mask, bool codes, int? channel_dim)"
    " -> (Tensor mask, Tensor codes)",
    # grad_y is dense, in y's memory format. need_grad_*: what required grad in the forward, which decided what was
    # saved. alpha is given if x is.
    "qrelu_backward(Tensor grad_y, Tensor? alpha, Tensor? x, Tensor? mask, Tensor? codes, int bits, int ste,"
    f" {_RULE}) -> (Tensor grad_x, Tensor grad_alpha)",
    # A custom STE with a Triton form runs on Triton if Triton is available, whichever backend has qrelu_backward.
    "qrelu_backward_custom(Tensor grad_y, Tensor? alpha, Tensor? x, Tensor? mask, Tensor? codes, int bits, str ste,"
    f" {_RULE}) -> (Tensor grad_x, Tensor grad_alpha)",
    # grad_x of an STE that needs only the codes: grad_y * slopes[c], slopes: [2**bits].
    "backward_from_slopes(Tensor grad_y, Tensor codes, Tensor slopes, int bits) -> Tensor",
    # The same with the slopes of an STE. Opaque on purpose: the table is built once, and never by a compiler's exp.
    "qrelu_backward_from_codes(Tensor grad_y, Tensor codes, int bits, str ste) -> Tensor",
    "qrelu_codes(Tensor x, Tensor alpha, int bits, int rounding, int? channel_dim) -> Tensor",
    f"dequantize(Tensor codes, Tensor alpha, {_OUTPUT}) -> Tensor",
    # The signed staircase: _signed.py.
    f"qsigned(Tensor x, Tensor? alpha, {_QSIGNED}) -> Tensor",
    f"qsigned_packed(Tensor x, Tensor? alpha, {_QSIGNED}) -> Tensor",
    # Returns dynamic alphas, bfloat16 of shape [..., n / group]; [0] if alpha is given.
    "qsigned_forward(Tensor x, Tensor? alpha, int bits, SymInt? group, bool mask, bool codes, int? channel_dim)"
    " -> (Tensor y, Tensor alpha, Tensor mask, Tensor codes)",
    "qsigned_forward_packed(Tensor x, Tensor? alpha, int bits, SymInt? group, bool mask, bool codes, int? channel_dim)"
    " -> (Tensor y, Tensor alpha, Tensor mask, Tensor codes)",
    "qsigned_backward(Tensor grad_y, Tensor? alpha, Tensor? x, Tensor? mask, Tensor? codes, int bits, bool clipped,"
    " int alpha_grad, float alpha_scale, int? channel_dim, bool need_grad_x, bool need_grad_alpha)"
    " -> (Tensor grad_x, Tensor grad_alpha)",
    # group: None if alpha is not dynamic.
    "qsigned_dequantize(Tensor codes, Tensor alpha, int bits, SymInt? group, SymInt[] shape, ScalarType dtype,"
    " int? channel_dim, MemoryFormat memory_format) -> Tensor",
    # A norm and the staircase of its output: norms.py. output: whether to return the norm's own output. mean: [0]
    # unless centred; inverse: 1 / the deviation; both wide, [..., 1].
    f"norm_qsigned({_NORM_QSIGNED}) -> (Tensor output, Tensor y, Tensor codes, Tensor alpha, Tensor mean,"
    " Tensor inverse)",
    f"norm_qsigned_packed({_NORM_QSIGNED}) -> (Tensor output, Tensor y, Tensor codes, Tensor alpha, Tensor mean,"
    " Tensor inverse)",
    # Weights of few bits: _weights.py.
    "weight_scale(Tensor weight, int bits, int? channel_dim) -> Tensor",
    "weight_codes(Tensor weight, int bits, int? channel_dim) -> (Tensor codes, Tensor scale)",
    'qweight(Tensor weight, int bits, int? channel_dim, str ste="identity") -> Tensor',
    # limit: the largest magnitude with a gradient, one for each scale.
    "qweight_forward(Tensor weight, int bits, int? channel_dim, str ste) -> (Tensor y, Tensor limit)",
    # act(gate) * up: gated.py.
    "gated_product(Tensor gate, Tensor up, str activation) -> Tensor",
    "gated_product_backward(Tensor grad_out, Tensor gate, Tensor up, str activation)"
    " -> (Tensor grad_gate, Tensor grad_up)",
    # Blocks of `size` elements of the last dimension, rotated by Hadamard's matrix over sqrt(size): its own inverse.
    "hadamard(Tensor x, SymInt size) -> Tensor",
    # The backward of a Linear or Conv2d whose input y is saved as codes; an unwanted grad is [0]. Opaque on purpose: a
    # compiler must not rebuild y in the forward, and save it.
    f"linear_backward_from_codes(Tensor grad_out, Tensor weight, Tensor? codes, Tensor alpha, {_OUTPUT},"
    " bool[3] output_mask) -> (Tensor grad_y, Tensor grad_weight, Tensor grad_bias)",
    f"conv2d_backward_from_codes(Tensor grad_out, Tensor weight, Tensor? codes, Tensor alpha, {_OUTPUT},"
    f" bool[3] output_mask, {_CONV}) -> (Tensor grad_y, Tensor grad_weight, Tensor grad_bias)",
    # A Linear, a qrelu or the product of two, and a Linear, of which codes are kept: _mlp.py. nan_rows: NaN in the rows
    # of h that have one, which no code tells; masks, or else codes: what gates are read from.
    "qrelu_mlp(Tensor x, Tensor weight1, Tensor? bias1, Tensor alpha, Tensor weight2, Tensor? bias2, int bits, str ste,"
    " str rounding, bool squared, Tensor? up_weight=None, Tensor? up_bias=None, Tensor? up_alpha=None) -> Tensor",
    "linear_to_codes(Tensor x, Tensor weight, Tensor? bias, Tensor alpha, int bits, int rounding, int mask)"
    " -> (Tensor codes, Tensor mask, Tensor nan_rows)",
    "linear_from_codes(Tensor[] codes, Tensor nan_rows, Tensor[] alphas, int bits, bool squared, Tensor weight,"
    " Tensor? bias) -> Tensor",
    "linear_from_codes_grad_input(Tensor grad_out, Tensor weight, Tensor[] masks, Tensor[] codes, Tensor[] alphas,"
    " int bits, bool squared, int ste, int rounding) -> Tensor[]",
    "linear_from_codes_grad_weight(Tensor grad_out, Tensor[] codes, Tensor[] alphas, int bits, bool squared,"
    " SymInt hidden) -> Tensor",
    # Layers on codes: integer/ops.py.
    "integer_quantize(Tensor x, Tensor alpha, int bits, int rounding, int? channel_dim) -> Tensor",
    # step * codes in float32; contiguous, or in the memory format of codes.
    "integer_dequantize(Tensor codes, float step, bool contiguous) -> Tensor",
    f"integer_linear({_INTEGER_LAYER}, {_STAIRCASE}) -> Tensor",
    f"integer_linear_float({_INTEGER_LAYER}) -> Tensor",
    f"integer_conv2d({_INTEGER_LAYER}, {_STAIRCASE}, {_WINDOW}) -> Tensor",
    f"integer_conv2d_float({_INTEGER_LAYER}, {_WINDOW}) -> Tensor",
)

_library = torch.library.Library("coarsegrad", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)
ops = torch.ops.coarsegrad

# The ops with a kernel per device, and the function of a backend's module that is the kernel. All other ops call these.
KERNELS = {
    "qrelu_forward": "qrelu_forward",
    "qrelu_forward_": "qrelu_forward_",
    "qrelu_backward": "qrelu_backward",
    "qrelu_backward_custom": "qrelu_backward",
    "backward_from_slopes": "backward_from_slopes",
    "qrelu_codes": "qrelu_codes",
    "dequantize": "dequantize",
    "qsigned_forward": "qsigned_forward",
    "qsigned_dequantize": "qsigned_dequantize",
    "hadamard": "hadamard",
    "norm_qsigned": "norm_qsigned",
    "weight_scale": "weight_scale",
}

# ---------------------------------------------------------------------------------------------- shapes


def _fake(name: str):
    return torch.library.register_fake(f"coarsegrad::{name}", lib=_library)


def _new_saved(x: Tensor, bits: int, mask: int, codes: bool) -> tuple[Tensor, Tensor]:
    widths = MASK_WIDTH[parse("mask", mask, MaskKind)], CODE_WIDTH[bits] if codes else 0
    mask_bits, packed_codes = (x.new_empty(packed_bytes(x.numel(), width), dtype=torch.uint8) for width in widths)
    return mask_bits, packed_codes


def _new_y(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


@_fake("qrelu")
@_fake("qrelu_custom")
@_fake("qrelu_packed")
def _(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    _teach_inductor()
    parse("rounding", rounding, Rounding)
    check_arguments(x, alpha, bits, channel_dim)
    return _new_y(x)


@_fake("qrelu_")
@_fake("qrelu_custom_")
@_fake("qrelu_packed_")
def _(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    _teach_inductor()
    parse("rounding", rounding, Rounding)
    check_arguments(x, alpha, bits, channel_dim)
    return x


@functools.cache
def _compiled_form() -> str:
    """A digest of what decides how these ops are compiled."""
    folder = Path(__file__).parent
    files = (folder / "_inductor.py", folder / "_inductor_gates.py", folder / "packing" / "graphs.py")
    text = repr(_SCHEMAS).encode() + b"".join(file.read_bytes() for file in files)
    return f"coarsegrad-{hashlib.sha256(text).hexdigest()[:16]}"


def _teach_inductor() -> None:
    """Register the lowering of qrelu_forward once Inductor is in use: its import is slow."""
    if "torch._dynamo" in sys.modules:  # before a key is made
        tag_compile_caches(_compiled_form())
    if "torch._inductor.lowering" in sys.modules:
        importlib.import_module(f"{__package__}._inductor")
        importlib.import_module(f"{__package__}._inductor_gates").install()


@_fake("qrelu_forward")
@_fake("qrelu_forward_packed")
def _(x, alpha, bits, rounding, mask, codes, channel_dim):
    _teach_inductor()
    parse("rounding", rounding, Rounding)
    check_arguments(x, alpha, bits, channel_dim)
    return _new_y(x), *_new_saved(x, bits, mask, codes)


@_fake("qrelu_forward_")
def _(x, alpha, bits, rounding, mask, codes, channel_dim):
    parse("rounding", rounding, Rounding)
    check_arguments(x, alpha, bits, channel_dim)
    return _new_saved(x, bits, mask, codes)


@_fake("qrelu_backward")
@_fake("qrelu_backward_custom")
def _(
    grad_y,
    alpha,
    x,
    mask,
    codes,
    bits,
    ste,
    rounding,
    alpha_grad,
    alpha_scale,
    channel_dim,
    need_grad_x,
    need_grad_alpha,
):
    channels = 1 if channel_dim is None else grad_y.size(channel_dim)
    return (
        torch.empty_like(grad_y) if need_grad_x else grad_y.new_empty(0),
        grad_y.new_empty(channels if need_grad_alpha else 0, dtype=wide_dtype(grad_y.dtype)),
    )


@_fake("backward_from_slopes")
@_fake("qrelu_backward_from_codes")
def _(grad_y, codes, *_):
    return torch.empty_like(grad_y, memory_format=suggest_memory_format(grad_y))


@_fake("qrelu_codes")
def _(x, alpha, bits, rounding, channel_dim):
    parse("rounding", rounding, Rounding)
    check_arguments(x, alpha, bits, channel_dim)
    return x.new_empty(packed_bytes(x.numel(), CODE_WIDTH[bits]), dtype=torch.uint8)


@_fake("dequantize")
def _(codes, alpha, bits, shape, dtype, channel_dim, memory_format):
    return torch.empty(shape, dtype=dtype, device=codes.device, memory_format=memory_format)


@_fake("qsigned")
@_fake("qsigned_packed")
def _(x, alpha, bits, group, ste, alpha_grad, alpha_scale, channel_dim):
    _teach_inductor()
    check_signed(x, alpha, bits, group, channel_dim)
    return _new_signed(x, alpha)


@_fake("qsigned_forward")
@_fake("qsigned_forward_packed")
def _(x, alpha, bits, group, mask, codes, channel_dim):
    _, group, _ = check_signed(x, alpha, bits, group, channel_dim)
    groups = [0] if group is None else [*x.shape[:-1], x.size(-1) // group]
    return (
        _new_signed(x, alpha),
        x.new_empty(groups, dtype=torch.bfloat16),
        x.new_empty(packed_bytes(x.numel(), mask), dtype=torch.uint8),
        x.new_empty(packed_bytes(x.numel(), CODE_WIDTH[bits] if codes else 0), dtype=torch.uint8),
    )


def _new_signed(x: Tensor, alpha: Tensor | None) -> Tensor:
    """Groups are those of the memory: their y is contiguous."""
    return _new_y(x) if alpha is not None else torch.empty_like(x, memory_format=torch.contiguous_format)


@_fake("qsigned_backward")
def _(grad_y, alpha, x, mask, codes, bits, clipped, alpha_grad, alpha_scale, channel_dim, need_grad_x, need_grad_alpha):
    channels = 1 if channel_dim is None else grad_y.size(channel_dim)
    return (
        torch.empty_like(grad_y) if need_grad_x else grad_y.new_empty(0),
        grad_y.new_empty(channels if need_grad_alpha else 0, dtype=wide_dtype(grad_y.dtype)),
    )


@_fake("qsigned_dequantize")
def _(codes, alpha, bits, group, shape, dtype, channel_dim, memory_format):
    return torch.empty(shape, dtype=dtype, device=codes.device, memory_format=memory_format)


@_fake("hadamard")
def _(x, size):
    check_hadamard(x, size)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_fake("norm_qsigned")
@_fake("norm_qsigned_packed")
def _(x, weight, bias, eps, centred, shifted, rounds_twice, bits, group, rotation, output, codes):
    _teach_inductor()
    group = check_norm(x, weight, bias, bits, group, rotation, output)
    wide, rows = wide_dtype(x.dtype), list(x.shape[:-1])
    dense, none = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(0)
    return (
        dense if output else none,
        torch.empty_like(dense) if bits is not None else x.new_empty(0),
        x.new_empty(0 if bits is None or not codes else packed_bytes(x.numel(), CODE_WIDTH[bits]), dtype=torch.uint8),
        x.new_empty([0] if bits is None else [*rows, x.size(-1) // group], dtype=torch.bfloat16),
        x.new_empty([*rows, 1] if centred else [0], dtype=wide),
        x.new_empty([*rows, 1], dtype=wide),
    )


@_fake("weight_scale")
def _(weight, bits, channel_dim):
    channel_dim = check_weight(weight, bits, channel_dim)
    return weight.new_empty(() if channel_dim is None else weight.size(channel_dim), dtype=wide_dtype(weight.dtype))


@_fake("weight_codes")
def _(weight, bits, channel_dim):
    scale = ops.weight_scale.default(weight, bits, channel_dim)
    return torch.empty_like(weight, dtype=torch.int8, memory_format=suggest_memory_format(weight)), scale


@_fake("qweight")
def _(weight, bits, channel_dim, ste="identity"):
    check_weight(weight, bits, channel_dim)
    return _new_y(weight)


@_fake("qweight_forward")
def _(weight, bits, channel_dim, ste):
    return _new_y(weight), ops.weight_scale.default(weight, bits, channel_dim)


# ------------------------------------------------------------------------------------- default kernels

_warned_devices: set[str] = set()


def reference_kernel(op: str, why_not_triton: Callable[[], str | None] = lambda: None):
    """The reference's kernel. The first call on a device warns, and says why no faster backend serves it."""
    kernel = getattr(reference, KERNELS[op])

    def call(*args):
        result = kernel(*args)
        device = args[0].device.type
        if not native_switched_off and device not in _warned_devices:
            _warned_devices.add(device)
            why_not = f"its native library: {why_not_native(device) or f'has no kernel of {op}'}"
            if triton := why_not_triton():
                why_not += f"; Triton: {triton}"
            warnings.warn(
                f"on {device} coarsegrad runs on its plain-torch reference, which is slow; {why_not}."
                " See `python -m coarsegrad info`.",
                stacklevel=3,
            )
        return result

    return call


for _name in KERNELS:
    # A custom STE is expected to run on the reference: no warning.
    _quiet = _name == "qrelu_backward_custom"
    _kernel = getattr(reference, KERNELS[_name]) if _quiet else reference_kernel(_name)
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
_library.impl("qsigned_backward", reference.qsigned_backward, "CompositeExplicitAutograd")


@functools.lru_cache(maxsize=256)
def _slopes(gprime: GPrime, bits: int, wide: torch.dtype, device: torch.device) -> Tensor:
    """g' at each code, computed on the CPU so that every device has the same bits."""
    with real_numbers():
        slopes = gprime(torch.arange(2**bits, dtype=wide), 2**bits - 1)
    return slopes.detach().contiguous().to(device)


def _qrelu_backward_from_codes(grad_y, codes, bits, ste):
    slopes = _slopes(get_ste(ste).gprime, bits, wide_dtype(grad_y.dtype), grad_y.device)
    return ops.backward_from_slopes.default(grad_y, codes, slopes, bits)


_library.impl("qrelu_backward_from_codes", _qrelu_backward_from_codes, "CompositeExplicitAutograd")


_NO_MASK = MaskKind.nothing.value


def _qrelu_without_grad(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    rounding = parse("rounding", rounding, Rounding).value
    return ops.qrelu_forward.default(x, alpha, bits, rounding, _NO_MASK, False, channel_dim)[0]


def _qrelu_without_grad_(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    rounding = parse("rounding", rounding, Rounding).value
    ops.qrelu_forward_.default(x, alpha, bits, rounding, _NO_MASK, False, channel_dim)
    return x


for _name in ("qrelu", "qrelu_custom", "qrelu_packed"):
    _library.impl(_name, _qrelu_without_grad, "CompositeExplicitAutograd")
    _library.impl(f"{_name}_", _qrelu_without_grad_, "CompositeExplicitAutograd")

# ---------------------------------------------------------------------------------- the native library


def _public(version: str) -> str:
    """A version without its local label: a library without CUDA kernels fits both +cpu and +cu builds of a torch."""
    return version.split("+")[0]


def _misfit(built_for: str) -> str | None:
    """How the native library's build differs from this torch, or None. Loading a misfit could crash the process."""
    if _public(built_for) != _public(torch.__version__):
        return f"built for torch {built_for}, but this is torch {torch.__version__}"
    cuda = build_facts.get("cuda_version")
    if cuda is not None and cuda.split(".")[0] != (torch.version.cuda or "none").split(".")[0]:
        return f"built for a torch with CUDA {cuda}, but this is torch {torch.__version__}, CUDA: {torch.version.cuda}"
    return None


def _build_facts() -> dict[str, Any]:
    """What the build recorded about the native library; empty if there was no build."""
    try:
        facts = vars(importlib.import_module(f"{__package__}._build"))
    except ModuleNotFoundError:
        return {}
    return {name.lower(): value for name, value in facts.items() if name.isupper()}


def _load_native() -> tuple[Any, str | None]:
    """(coarsegrad._C, None), or (None, why not). Loading registers its kernels. COARSEGRAD_NATIVE=1 raises instead."""
    mode = os.environ.get("COARSEGRAD_NATIVE", "auto")
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"COARSEGRAD_NATIVE must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return None, "switched off by COARSEGRAD_NATIVE=0"
    built_for = build_facts.get("torch_version")
    if built_for is None:
        why_not = f"not built: {build_facts['reason']}" if build_facts else "not built"
    elif misfit := _misfit(built_for):
        why_not = (
            f"{misfit}; install the wheel whose version ends in +torch{_public(torch.__version__)}, or rebuild in the"
            " folder of coarsegrad's sources: pip install --force-reinstall --no-deps . (with -e before the dot for an"
            " editable install)"
        )
    else:
        try:
            return importlib.import_module(f"{__package__}._C"), None
        except ImportError as error:
            why_not = f"its import failed: {error}"
    if mode == "1":
        raise ImportError(f"COARSEGRAD_NATIVE=1, but coarsegrad's native library cannot be used: {why_not}")
    if built_for is not None:
        _warned_devices.add("cpu")
        warnings.warn(f"coarsegrad's native library cannot be used: {why_not}", stacklevel=2)
    return None, why_not


build_facts = _build_facts()
native, native_why_not = _load_native()


def why_not_native(device: str) -> str | None:
    """Why the native library does not serve a device type, or None if it does."""
    if native is None:
        return native_why_not
    if device == "cuda" and "without_cuda" in build_facts:
        return f"built without CUDA kernels: {build_facts['without_cuda']}"
    return None if device in ("cpu", "cuda") else f"has no kernels for {device}"


native_switched_off = os.environ.get("COARSEGRAD_NATIVE") == "0"
