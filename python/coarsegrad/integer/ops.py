"""The integer ops: shapes and default kernels, the reference's. Codes are uint8, one per byte.

A Conv2d's output is in channels_last. A layer's weight is what `pack_weights` made of its rows [C, K]; of a Conv2d a
row is [kh, kw, C_in / groups]. `bits` bounds the codes, which are below 2**bits, and the weights of 8 bits are
-127..127. No sum of |codes * w| reaches 2**31. scale and offset are [C] in float32. thresholds, int32 [C, levels],
never decrease along a row; where they are given, scale and offset are not read.
"""

from __future__ import annotations

import warnings

import torch

from .. import _ops
from .._checks import check_arguments
from .._torch_internals import has_kernel, suggest_memory_format
from .._types import Rounding, parse
from . import reference
from .checks import check_codes, check_conv2d, check_linear

ops = _ops.ops
KERNELS = {
    name: getattr(reference, name)
    for name in (
        "integer_quantize", "integer_dequantize",
        "integer_linear", "integer_linear_float", "integer_conv2d", "integer_conv2d_float",
    )
}  # fmt: skip

_library = torch.library.Library("coarsegrad", "FRAGMENT")
for _name, _kernel in KERNELS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


def _fake(name: str):
    return torch.library.register_fake(f"coarsegrad::{name}", lib=_library)


@_fake("integer_quantize")
def _(x, alpha, bits, rounding, channel_dim):
    parse("rounding", rounding, Rounding)
    check_arguments(x, alpha, bits, channel_dim)
    return torch.empty_like(x, dtype=torch.uint8, memory_format=suggest_memory_format(x))


@_fake("integer_dequantize")
def _(codes, step, contiguous):
    check_codes(codes)
    memory_format = torch.contiguous_format if contiguous else suggest_memory_format(codes)
    return torch.empty_like(codes, dtype=torch.float32, memory_format=memory_format)


@_fake("integer_linear")
def _(codes, *args):
    return codes.new_empty(check_linear(codes, *args))


@_fake("integer_linear_float")
def _(codes, *args):
    return codes.new_empty(check_linear(codes, *args), dtype=torch.float32)


def _new_images(codes, shape, dtype):
    return torch.empty(shape, dtype=dtype, device=codes.device, memory_format=torch.channels_last)


@_fake("integer_conv2d")
def _(codes, weight, bits, weight_bits, scale, offset, thresholds, levels, *window):
    shape = check_conv2d(codes, weight, bits, weight_bits, scale, offset, window, thresholds, levels)
    return _new_images(codes, shape, torch.uint8)


@_fake("integer_conv2d_float")
def _(codes, weight, bits, weight_bits, scale, offset, *window):
    return _new_images(codes, check_conv2d(codes, weight, bits, weight_bits, scale, offset, window), torch.float32)


# ---------------------------------------------------------------------------------------------- who runs them

# Device type -> the backend with compiled kernels for these ops; others are added as they are registered.
serving = {device: "native" for device in ("cpu", "cuda") if all(has_kernel(name, device) for name in KERNELS)}
_warned_devices: set[str] = set()


def integer_kernels(device: str) -> str:
    """The backend that runs the ops of integer layers on a device type, outside `use_backend`: "native", "triton", or
    "reference", which is plain torch."""
    return serving.get(device, "reference")


def warn_if_slow(device: str) -> None:
    """The first time that integer layers are to run on the reference of a device type, a warning that says why."""
    if integer_kernels(device) != "reference" or _ops.native_switched_off or device in _warned_devices:
        return
    _warned_devices.add(device)
    why_not = _ops.why_not_native(device) or "has no kernels for them"
    warnings.warn(
        f"on {device} integer layers run in plain torch, which is exact but slower than floats; coarsegrad's native"
        f" library: {why_not}. See `python -m coarsegrad info`.",
        stacklevel=3,
    )
