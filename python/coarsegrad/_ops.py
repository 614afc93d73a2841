"""The ops: their schemas, shapes, default kernels and derivative; and the native library, which adds kernels to them.

Every op has a default kernel, the reference. The native library `coarsegrad._C` registers faster ones for its devices
and the derivative of qrelu as it is loaded; without it the derivative is the autograd.Function below.
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
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad

from . import reference
from .ste import ALPHA_GRADS, BUILT_IN, GPrime, check_inplace, get_ste, kept

_SCHEMAS = (
    "qrelu(Tensor x, Tensor alpha, int bits, str ste, str rounding, str alpha_grad, float alpha_scale,"
    " int? channel_dim) -> Tensor",
    "qrelu_(Tensor(a!) x, Tensor alpha, int bits, str ste, str rounding, str alpha_grad, float alpha_scale,"
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
    # The same for an STE of the user's that has a Triton form: that runs where Triton can, whoever has qrelu_backward.
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
def _(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    reference.check_arguments(x, alpha, bits, rounding, channel_dim)
    return _new_y(x)


@_fake("qrelu_")
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
    return gprime(torch.arange(2**bits, dtype=wide, device="cpu"), 2**bits - 1).detach().contiguous().to(device)


def _times_slopes_of(grad_y, codes, bits, ste):
    slopes = _slopes(get_ste(ste).gprime, bits, reference.wide_dtype(grad_y.dtype), grad_y.device)
    return ops.times_slopes.default(grad_y, codes, slopes, bits)


_library.impl("times_slopes_of", _times_slopes_of, "CompositeExplicitAutograd")


def _qrelu_without_grad(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    return ops.qrelu_forward.default(x, alpha, bits, rounding, "nothing", False, channel_dim)[0]


def _qrelu_without_grad_(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    ops.qrelu_forward_.default(x, alpha, bits, rounding, "nothing", False, channel_dim)
    return x


_library.impl("qrelu", _qrelu_without_grad, "CompositeExplicitAutograd")
_library.impl("qrelu_", _qrelu_without_grad_, "CompositeExplicitAutograd")

# ------------------------------------------------------------------------------------------ derivative


def _refuse_forward_mode(*tensors: Tensor) -> None:
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError("qrelu has no forward-mode derivative (jvp); use reverse mode (backward)")


def qrelu_autograd(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    """qrelu with its derivative."""
    get_ste(ste)
    reference.check_word("alpha_grad", alpha_grad, ALPHA_GRADS)
    _refuse_forward_mode(x, alpha)
    if torch.is_grad_enabled() and (x.requires_grad or alpha.requires_grad):
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "torch.func transforms do not support the Python derivative of qrelu, which serves where the native"
                " library is not in use and for an STE of your own; use torch.autograd"
            )
        required_grad = (x.requires_grad, alpha.requires_grad)
        config = (bits, ste, rounding, alpha_grad, alpha_scale, channel_dim, *required_grad)
        return _QReLU.apply(x, alpha, config)
    return _qrelu_without_grad(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)


def qrelu_autograd_(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    """qrelu_ with its derivative. Where there is one, torch's copy_ writes: it knows what must not be written to."""
    if torch.is_grad_enabled() and (x.requires_grad or alpha.requires_grad):
        check_inplace(ste, rounding, alpha_grad if alpha.requires_grad else None, x.requires_grad)
        return x.copy_(qrelu_autograd(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim))
    _refuse_forward_mode(x, alpha)
    return _qrelu_without_grad_(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)


class _QReLU(torch.autograd.Function):
    """config: bits, ste, rounding, alpha_grad, alpha_scale, channel_dim, and whether x and alpha required grad."""

    @staticmethod
    def forward(ctx, x, alpha, config):
        bits, ste, rounding, alpha_grad, _, channel_dim, need_grad_x, need_grad_alpha = config
        mask, codes, keep_x = kept(ste, rounding, alpha_grad if need_grad_alpha else None, need_grad_x)
        y, kept_mask, kept_codes = ops.qrelu_forward.default(x, alpha, bits, rounding, mask, codes, channel_dim)
        ctx.config, ctx.memory_format = config, suggest_memory_format(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            alpha if keep_x else None,
            x if keep_x else None,
            kept_mask if mask != "nothing" else None,
            kept_codes if codes else None,
        )
        return y

    @staticmethod
    def backward(ctx, grad_y):
        if grad_y is None:
            return None, None, None
        return *backward_from_kept(grad_y, *ctx.saved_tensors, ctx.config, ctx.memory_format), None


def by_codes(config: tuple) -> tuple:
    """The config with which qrelu_backward reads the gate from the codes alone: that of "exact". The sum for alpha that
    comes with it is of no use."""
    return (*config[:3], "exact", 1.0, None, True, True)


def backward_from_kept(
    grad_y: Tensor,
    alpha: Tensor | None,
    x: Tensor | None,
    mask: Tensor | None,
    codes: Tensor | None,
    config: tuple,
    memory_format: torch.memory_format,
) -> tuple[Tensor | None, Tensor | None]:
    """(grad_x, grad_alpha), None for the one not needed, by the op, with its own derivative; config is _QReLU's."""
    ste, need_grad_x, need_grad_alpha = config[1], *config[-2:]
    if ste == "identity" and not need_grad_alpha:
        return grad_y, None
    grad_y = grad_y.contiguous(memory_format=memory_format)
    if ste in BUILT_IN:
        grad_x, grad_alpha = ops.qrelu_backward.default(grad_y, alpha, x, mask, codes, *config)
    else:  # an STE of the user, which the op does not know on every backend
        grad_x, grad_alpha = _backward_autograd(memory_format, grad_y, alpha, x, mask, codes, *config)
    return grad_x if need_grad_x else None, grad_alpha if need_grad_alpha else None


def _backward_autograd(memory_format, grad_y, alpha, x, mask, codes, *config):
    """qrelu_backward with its own derivative."""
    tensors = (grad_y, alpha, x, mask, codes)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _QReLUBackward.apply(memory_format, *tensors, config)
    if config[1] in BUILT_IN:
        with torch._C._AutoDispatchBelowAutograd():
            return ops.qrelu_backward.default(*tensors, *config)
    ste = get_ste(config[1])
    if ste.needs == "codes" and x is None:
        return _backward_by_slopes(grad_y, mask, codes, *config)
    if ste.triton is None:
        return reference.qrelu_backward(*tensors, *config, memory_format=memory_format)
    return ops.qrelu_backward_own.default(*tensors, *config)


def _backward_by_slopes(grad_y, mask, codes, bits, ste, *rest):
    """qrelu_backward of an STE that needs the codes: its slope of each, and alpha's sums, which no STE is part of."""
    *rule, need_grad_x, need_grad_alpha = rest
    grad_x, grad_alpha = grad_y.new_empty(0), grad_y.new_empty(0, dtype=reference.wide_dtype(grad_y.dtype))
    if need_grad_x:
        grad_x = ops.times_slopes_of.default(grad_y, codes, bits, ste)
    if need_grad_alpha:
        arguments = (grad_y, None, None, mask, codes, bits, "identity", *rule)
        grad_alpha = ops.qrelu_backward.default(*arguments, False, True)[1]
    return grad_x, grad_alpha


class _QReLUBackward(torch.autograd.Function):
    """qrelu_backward as a function of grad_y: linear, hence its own derivative, where alpha is fixed and x not kept."""

    @staticmethod
    def forward(ctx, memory_format, grad_y, alpha, x, mask, codes, config):
        grad_x, grad_alpha = _backward_autograd(memory_format, grad_y, alpha, x, mask, codes, *config)
        ctx.memory_format, ctx.config = memory_format, config
        ctx.linear = x is None and not config[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask, codes)
        if ctx.linear:
            ctx.mark_non_differentiable(grad_alpha)
        return grad_x, grad_alpha

    @staticmethod
    def backward(ctx, grad_grad_x, grad_grad_alpha):
        if not ctx.linear:
            raise NotImplementedError(
                "qrelu has a second derivative only where alpha is fixed and the backward does not need x; here "
                f"ste={ctx.config[1]!r}, alpha_grad={ctx.config[3]!r}, alpha learned: {ctx.config[-1]}"
            )
        if grad_grad_x is None:
            return (None,) * 7
        mask, codes = ctx.saved_tensors
        grad_grad_x = grad_grad_x.contiguous(memory_format=ctx.memory_format)
        grad_grad_y, _ = _backward_autograd(ctx.memory_format, grad_grad_x, None, None, mask, codes, *ctx.config)
        return None, grad_grad_y, *(None,) * 5


for _name in set(KERNELS) - {"qrelu_backward"} | {"times_slopes_of"}:
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _bump_version(keyset, x, *args):
    """What torch does for an in-place op of its own: whoever kept x for a backward must notice the write."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        kept_state = ops.qrelu_forward_.default.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, x, *args)
    torch.autograd.graph.increment_version(x)
    return kept_state


_library.impl("qrelu_forward_", _bump_version, "ADInplaceOrView", with_keyset=True)

# ------------------------------------------------------------------------------------------------ vmap


def _vmap(op):
    def call(info, in_dims, x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
        x_dim, alpha_dim = in_dims[:2]
        if alpha_dim is not None:
            raise NotImplementedError(
                "vmap over alpha is not supported by qrelu; use one alpha per channel (channel_dim)"
            )
        x = x.movedim(x_dim, 0)
        if channel_dim is not None and channel_dim >= 0:
            channel_dim += 1
        return op(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim), 0

    return call


torch.library.register_vmap("coarsegrad::qrelu", _vmap(ops.qrelu.default), lib=_library)
torch.library.register_vmap("coarsegrad::qrelu_", _vmap(ops.qrelu_.default), lib=_library)

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

if native is None:
    _library.impl("qrelu", qrelu_autograd, "Autograd")
    _library.impl("qrelu_", qrelu_autograd_, "Autograd")
    _library.impl("qrelu_backward", lambda *args: _backward_autograd(suggest_memory_format(args[0]), *args), "Autograd")
