"""The ops: their schemas, shapes and default kernels; and the native library, which adds kernels to them.

Every op has a default kernel, the reference. The native library `coarsegrad._C` registers faster ones for its devices
and the derivative of qrelu as it is loaded; without it, and for an STE of the user's, that is in `_autograd.py`.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from . import reference
from ._torch_internals import suggest_memory_format
from .ste import GPrime, get_ste, real_numbers

_SCHEMAS = (
    # alpha_scale: a number, or infinity for "lsq" where the sizes of x are not known yet.
    "qrelu(Tensor x, Tensor alpha, int bits, str ste, str rounding, str alpha_grad, float alpha_scale,"
    " int? channel_dim) -> Tensor",
    "qrelu_(Tensor(a!) x, Tensor alpha, int bits, str ste, str rounding, str alpha_grad, float alpha_scale,"
    " int? channel_dim) -> Tensor(a!)",
    # The same for an STE of the user's, which the native library does not know.
    "qrelu_own(Tensor x, Tensor alpha, int bits, str ste, str rounding, str alpha_grad, float alpha_scale,"
    " int? channel_dim) -> Tensor",
    "qrelu_own_(Tensor(a!) x, Tensor alpha, int bits, str ste, str rounding, str alpha_grad, float alpha_scale,"
    " int? channel_dim) -> Tensor(a!)",
    # mask: the kind of bits to return: "nothing", "positive", "inside" or "state"; codes: whether to return them.
    "qrelu_forward(Tensor x, Tensor alpha, int bits, str rounding, str mask, bool codes, int? channel_dim)"
    " -> (Tensor y, Tensor mask, Tensor codes)",
    "qrelu_forward_(Tensor(a!) x, Tensor alpha, int bits, str rounding, str mask, bool codes, int? channel_dim)"
    " -> (Tensor mask, Tensor codes)",
    # grad_y is dense, in y's memory format. need_grad_*: what required grad in the forward, and so what was kept.
    # alpha is given where x is.
    "qrelu_backward(Tensor grad_y, Tensor? alpha, Tensor? x, Tensor? mask, Tensor? codes, int bits, str ste,"
    " str rounding, str alpha_grad, float alpha_scale, int? channel_dim, bool need_grad_x, bool need_grad_alpha)"
    " -> (Tensor grad_x, Tensor grad_alpha)",
    # The same for an STE of the user's. One that has a Triton form runs there where Triton can, whoever has
    # qrelu_backward.
    "qrelu_backward_own(Tensor grad_y, Tensor? alpha, Tensor? x, Tensor? mask, Tensor? codes, int bits, str ste,"
    " str rounding, str alpha_grad, float alpha_scale, int? channel_dim, bool need_grad_x, bool need_grad_alpha)"
    " -> (Tensor grad_x, Tensor grad_alpha)",
    # grad_x of an STE that needs the codes alone, built in or the user's: grad_y * slopes[c], slopes: [2**bits].
    "times_slopes(Tensor grad_y, Tensor codes, Tensor slopes, int bits) -> Tensor",
    # The same with the slopes of an STE. Opaque on purpose: the table is made once, and never by a compiler's exp.
    "times_slopes_of(Tensor grad_y, Tensor codes, int bits, str ste) -> Tensor",
    "qrelu_codes(Tensor x, Tensor alpha, int bits, str rounding, int? channel_dim) -> Tensor",
    "dequantize(Tensor codes, Tensor alpha, int bits, SymInt[] shape, ScalarType dtype, int? channel_dim,"
    " MemoryFormat memory_format) -> Tensor",
    # A Linear or Conv2d on the output of a qrelu, which is converted to dtype first.
    "qrelu_linear(Tensor x, Tensor alpha, Tensor weight, Tensor? bias, int bits, str ste, str rounding, str alpha_grad,"
    " float alpha_scale, int? channel_dim, ScalarType dtype) -> Tensor",
    "qrelu_conv2d(Tensor x, Tensor alpha, Tensor weight, Tensor? bias, int bits, str ste, str rounding, str alpha_grad,"
    " float alpha_scale, int? channel_dim, ScalarType dtype, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation,"
    " SymInt groups) -> Tensor",
    # The backward of a Linear or Conv2d whose input y is kept as codes; grads not wanted are [0]. shape, dtype and
    # memory_format are y's. Opaque on purpose: a compiler must not rebuild y in the forward, and keep it.
    "linear_backward_from_codes(Tensor grad_out, Tensor weight, Tensor? codes, Tensor alpha, int bits, SymInt[] shape,"
    " ScalarType dtype, int? channel_dim, MemoryFormat memory_format, bool[3] output_mask)"
    " -> (Tensor grad_y, Tensor grad_weight, Tensor grad_bias)",
    "conv2d_backward_from_codes(Tensor grad_out, Tensor weight, Tensor? codes, Tensor alpha, int bits, SymInt[] shape,"
    " ScalarType dtype, int? channel_dim, MemoryFormat memory_format, bool[3] output_mask, SymInt[2] stride,"
    " SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> (Tensor grad_y, Tensor grad_weight, Tensor grad_bias)",
)

_library = torch.library.Library("coarsegrad", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)
ops = torch.ops.coarsegrad

# The ops with a kernel for each device, and the function of a backend's module that is the kernel; qrelu and qrelu_ are
# made of them.
KERNELS = {
    "qrelu_forward": "qrelu_forward",
    "qrelu_forward_": "qrelu_forward_",
    "qrelu_backward": "qrelu_backward",
    "qrelu_backward_own": "qrelu_backward",
    "times_slopes": "times_slopes",
    "qrelu_codes": "qrelu_codes",
    "dequantize": "dequantize",
}

# ---------------------------------------------------------------------------------------------- shapes


def _fake(name: str):
    return torch.library.register_fake(f"coarsegrad::{name}", lib=_library)


def _packed_size(count: int, width: int) -> int:
    return (count * width + 7) // 8


def _new_kept(x: Tensor, bits: int, mask: str, codes: bool) -> tuple[Tensor, Tensor]:
    sizes = (
        _packed_size(x.numel(), reference.MASK_WIDTH[mask]),
        _packed_size(x.numel(), reference.CODE_WIDTH[bits]) if codes else 0,
    )
    return tuple(x.new_empty(size, dtype=torch.uint8) for size in sizes)


def _new_y(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


@_fake("qrelu")
@_fake("qrelu_own")
def _(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    reference.check_arguments(x, alpha, bits, rounding, channel_dim)
    return _new_y(x)


@_fake("qrelu_")
@_fake("qrelu_own_")
def _(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    reference.check_arguments(x, alpha, bits, rounding, channel_dim)
    return x


@_fake("qrelu_forward")
def _(x, alpha, bits, rounding, mask, codes, channel_dim):
    reference.check_arguments(x, alpha, bits, rounding, channel_dim)
    return _new_y(x), *_new_kept(x, bits, mask, codes)


@_fake("qrelu_forward_")
def _(x, alpha, bits, rounding, mask, codes, channel_dim):
    reference.check_arguments(x, alpha, bits, rounding, channel_dim)
    return _new_kept(x, bits, mask, codes)


@_fake("qrelu_backward")
@_fake("qrelu_backward_own")
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
        grad_y.new_empty(channels if need_grad_alpha else 0, dtype=reference.wide_dtype(grad_y.dtype)),
    )


@_fake("times_slopes")
@_fake("times_slopes_of")
def _(grad_y, codes, *_):
    return torch.empty_like(grad_y, memory_format=suggest_memory_format(grad_y))


@_fake("qrelu_codes")
def _(x, alpha, bits, rounding, channel_dim):
    reference.check_arguments(x, alpha, bits, rounding, channel_dim)
    return x.new_empty(_packed_size(x.numel(), reference.CODE_WIDTH[bits]), dtype=torch.uint8)


@_fake("dequantize")
def _(codes, alpha, bits, shape, dtype, channel_dim, memory_format):
    return torch.empty(shape, dtype=dtype, device=codes.device, memory_format=memory_format)


# ------------------------------------------------------------------------------------- default kernels

_warned_devices = set()


def reference_kernel(op: str, why_not_triton: Callable[[], str | None] = lambda: None):
    """The reference's kernel, with a warning at the first call on a device: why it is not a faster backend's."""
    kernel = getattr(reference, KERNELS[op])

    def call(*args):
        result = kernel(*args)
        device = args[0].device.type
        if not native_switched_off and device not in _warned_devices:
            _warned_devices.add(device)
            why_not = f"its native library: {why_not_native(device)}"
            if triton := why_not_triton():
                why_not += f"; Triton: {triton}"
            warnings.warn(
                f"on {device} coarsegrad runs on its plain-torch reference, which is slow; {why_not}."
                " `python -m coarsegrad info` says more.",
                stacklevel=3,
            )
        return result

    return call


for _name in KERNELS:
    # An STE of the user's runs on the reference by its own nature: nothing to warn of.
    _kernel = reference.qrelu_backward if _name == "qrelu_backward_own" else reference_kernel(_name)
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


@functools.lru_cache(maxsize=256)
def _slopes(gprime: GPrime, bits: int, wide: torch.dtype, device: torch.device) -> Tensor:
    """g' at each code. Computed on the CPU, so that every device has the same bits."""
    with real_numbers():
        slopes = gprime(torch.arange(2**bits, dtype=wide), 2**bits - 1)
    return slopes.detach().contiguous().to(device)


def _times_slopes_of(grad_y, codes, bits, ste):
    slopes = _slopes(get_ste(ste).gprime, bits, reference.wide_dtype(grad_y.dtype), grad_y.device)
    return ops.times_slopes.default(grad_y, codes, slopes, bits)


_library.impl("times_slopes_of", _times_slopes_of, "CompositeExplicitAutograd")


def _qrelu_without_grad(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    return ops.qrelu_forward.default(x, alpha, bits, rounding, "nothing", False, channel_dim)[0]


def _qrelu_without_grad_(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    ops.qrelu_forward_.default(x, alpha, bits, rounding, "nothing", False, channel_dim)
    return x


for _name in ("qrelu", "qrelu_own"):
    _library.impl(_name, _qrelu_without_grad, "CompositeExplicitAutograd")
    _library.impl(f"{_name}_", _qrelu_without_grad_, "CompositeExplicitAutograd")

# ---------------------------------------------------------------------------------- the native library


def _public(version: str) -> str:
    """A version without its local label: a library without CUDA kernels fits the +cpu and +cu builds of one torch."""
    return version.split("+")[0]


def _misfit(built_for: str) -> str | None:
    """What the native library was built for and does not find here. Loading it then could crash the process."""
    if _public(built_for) != _public(torch.__version__):
        return f"built for torch {built_for}, but this is torch {torch.__version__}"
    cuda = build_facts.get("cuda_version")
    if cuda is not None and cuda.split(".")[0] != (torch.version.cuda or "none").split(".")[0]:
        return f"built for a torch with CUDA {cuda}, but this is torch {torch.__version__}, CUDA: {torch.version.cuda}"
    return None


def _build_facts() -> dict[str, object]:
    """What the build wrote down about the native library; empty where there was none."""
    try:
        facts = vars(importlib.import_module(f"{__package__}._build"))
    except ModuleNotFoundError:
        return {}
    return {name.lower(): value for name, value in facts.items() if name.isupper()}


def _load_native() -> tuple[ModuleType | None, str | None]:
    """(coarsegrad._C, None), or (None, why not); loading it registers its kernels. An ImportError under "1"."""
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
            f"{misfit}; rebuild it in the folder of coarsegrad's sources: pip install --force-reinstall --no-deps ."
            " (with -e before the dot for an editable install)"
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
    """Why the native library does not serve a device type; None if it does."""
    if native is None:
        return native_why_not
    if device == "cuda" and "without_cuda" in build_facts:
        return f"built without CUDA kernels: {build_facts['without_cuda']}"
    return None if device in ("cpu", "cuda") else f"has no kernels for {device}"


native_switched_off = os.environ.get("COARSEGRAD_NATIVE") == "0"
