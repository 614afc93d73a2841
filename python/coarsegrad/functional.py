"""The public functions.

The kernels check a call. Only what the dispatcher would convert in silence is looked at before: checks in Python cost
as much as a small kernel. A call that was refused is looked at again, so that the error says it in the same words on
every backend.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

from . import _ops
from ._dtensor import is_dtensor, on_shards
from ._fused import qrelu_and_layer
from ._torch_internals import nested_like
from .packing import active_packing
from .reference import (
    CODE_WIDTH,
    DTYPES,
    check_alpha,
    check_arguments,
    check_bits,
    checked_values,
    lsq_scale,
    wide_dtype,
)
from .ste import ALPHA_GRADS, BUILT_IN, check_inplace, get_ste, one_of

_INT_OR_NONE = (int, type(None))

_qrelu = _ops.ops.qrelu.default
_qrelu_ = _ops.ops.qrelu_.default
_qrelu_own = _ops.ops.qrelu_own.default
_qrelu_own_ = _ops.ops.qrelu_own_.default
_qrelu_codes = _ops.ops.qrelu_codes.default
_dequantize = _ops.ops.dequantize.default
if _ops.native is not None:  # the same ops: torch.ops takes as long for the arguments as the kernel of a small tensor
    _native_qrelu, _native_qrelu_ = _ops.native.qrelu, _ops.native.qrelu_


_F = TypeVar("_F", bound=Callable[..., Tensor])


def _overridable(function: _F) -> _F:
    """The function, which first asks arguments and modes with a `__torch_function__`, as torch's own functions do: a
    proxy of torch.fx then records the call."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        asked = (*args, *kwargs.values())
        if has_torch_function(asked):
            return handle_torch_function(call, asked, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def check_alpha_scale(alpha_scale: float | str) -> None:
    if alpha_scale == "lsq":
        return
    if isinstance(alpha_scale, bool) or not isinstance(alpha_scale, (int, float)):
        raise TypeError(f"alpha_scale must be a number or 'lsq', got {alpha_scale!r}")
    if not -math.inf < alpha_scale < math.inf:
        raise ValueError(f"alpha_scale must be finite, or 'lsq', got {alpha_scale}")


def _scale(alpha_scale: float | str, x: Tensor, bits: int) -> float:
    """alpha_scale as a number."""
    check_alpha_scale(alpha_scale)
    if alpha_scale == "lsq":
        # Compiled for one n it would be compiled again for the next: the ops' kernels find it.
        return math.inf if torch.compiler.is_compiling() else lsq_scale(x, bits)
    return float(alpha_scale)


def _wrong_argument(x: Tensor, alpha: Tensor, bits: int, rounding: str, channel_dim: int | None) -> Exception | None:
    """What is wrong with the arguments of a call that failed, if they are what is wrong."""
    try:
        if isinstance(x, Tensor) and x.is_nested:
            x, channel_dim = x.contiguous().values(), _dim_of_values(x, channel_dim)
        check_arguments(x, alpha, bits, rounding, channel_dim)
        checked_values(alpha, wide_dtype(x.dtype))
    except (TypeError, ValueError) as error:
        return error
    except RuntimeError:  # under vmap alpha's values cannot be read
        return None
    return None


def _checked(
    x: Tensor,
    alpha: Tensor | float,
    bits: int,
    ste: str,
    rounding: str,
    alpha_grad: str,
    alpha_scale: float | str,
    channel_dim: int | None,
) -> tuple[Tensor, tuple]:
    """(alpha as a tensor, the ops' arguments after it), with what the ops do not check themselves checked."""
    if (
        not isinstance(alpha, Tensor)
        or type(bits) is not int
        or type(channel_dim) not in _INT_OR_NONE
        or type(alpha_scale) is not float
        or alpha_scale != 1.0
    ):
        if isinstance(x, Tensor) and x.is_nested:
            alpha, _ = check_arguments(x.contiguous().values(), alpha, bits, rounding, _dim_of_values(x, channel_dim))
        else:
            alpha, channel_dim = check_arguments(x, alpha, bits, rounding, channel_dim)
        alpha_scale = _scale(alpha_scale, x, bits)
    if alpha_grad not in ALPHA_GRADS:
        raise ValueError(one_of("alpha_grad", alpha_grad, ALPHA_GRADS))
    if ste not in BUILT_IN:
        get_ste(ste)
    return alpha, (bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)


def qrelu(
    x: Tensor,
    alpha: Tensor | float,
    bits: int = 4,
    *,
    ste: str = "clipped_relu",
    rounding: str = "ceil",
    alpha_grad: str = "three_valued",
    alpha_scale: float | str = 1.0,
    channel_dim: int | None = None,
    inplace: bool = False,
) -> Tensor:
    """The staircase ReLU with 2**bits levels, and its coarse gradients.

        y = alpha * clamp(ceil(x / alpha), 0, q),   q = 2**bits - 1          (rounding="ceil")
        dx = dy * g'(x / alpha),   dalpha = alpha_scale * sum(dy * A)

    Levels are L[k] = k * alpha rounded to x's dtype; y = L[c] for the code c = #{k in 1..q : x > T[k]}, exactly, on
    every backend. NaN gives NaN, and its gradient passes.

    x: float32, bfloat16, float16 or float64, any shape, any strides; a nested tensor, whose values are taken; or a
        DTensor, partial sums of it added up first.
    alpha: the height and width of a stair, finite and > 0: a number, or a tensor of shape [1], or [C] with
        C = x.size(channel_dim); of any floating dtype, on x's device. A bad value in a tensor is an error on a CPU,
        and makes the output NaN on a GPU, where finding it would cost a sync.
    bits: 1..8.
    ste: which g', a name in `stes()`: "identity", "relu", "clipped_relu", "log_tailed_relu", "reverse_exponential",
        "reverse_exponential_step" (g' at the code instead of at u: constant on a stair), or one of your
        own (`register_ste`).
    rounding: the thresholds T. "ceil": T[k] = L[k-1], so that every x > 0 gives at least alpha; "nearest": the middles
        between levels; "hwgq": as nearest, but T[1] = 0.
    alpha_grad: A, where alpha requires grad; 0 for x <= 0 and q for x > L[q]. Inside: "exact": c; "three_valued":
        2**(bits-1); "two_valued": 0. "chain": c - (x / alpha) * g'(x / alpha) everywhere.
    alpha_scale: a factor of dalpha; "lsq" is 1 / sqrt(n * q), n the elements of x per sample (x.size(0) samples).
    channel_dim: the dimension of x that has one alpha for each index; negative counts from the end.
    inplace: write y into x, which is not nested.

    Returns y, in x's dtype and memory format (contiguous or channels-last).

    Kept for the backward, in bits an element, where only x requires grad: identity 0, relu and clipped_relu 1,
    reverse_exponential_step the codes (bits rounded up to 1, 2, 4 or 8), the others x itself. Where alpha requires
    grad: "exact" the codes, and 1 for clipped_relu, or for relu under "nearest"; "two_valued" and "three_valued" 2,
    and the codes for reverse_exponential_step; "chain", x itself; and x itself for an STE that needs it. Nothing
    where no gradient is wanted. There is a second derivative where alpha is fixed and x is not kept, and no
    forward-mode one. `packed_activations` has what the next layer keeps of y kept as its codes.

    Raises TypeError or ValueError, which name the argument, what was got and what was wanted; ValueError for
    inplace=True where x would be kept. Nothing is computed or changed then.

    Sources: Yin et al. 2019, arXiv 1903.05662, and Long, Yin, Xin 2021, arXiv 2011.11256 (coarse gradients); Yin et
    al. 2018, arXiv 1808.05240 ("exact", "three_valued"); Choi et al. 2018, arXiv 1805.06085 ("two_valued"); Esser et
    al. 2020, arXiv 1902.08153 ("lsq", and "chain" with "nearest" and clipped_relu); Cai et al. 2017, arXiv 1702.00953
    ("hwgq").
    """
    if has_torch_function_variadic(x, alpha):  # as `_overridable` does
        return handle_torch_function(
            qrelu, (x, alpha), x, alpha, bits, ste=ste, rounding=rounding, alpha_grad=alpha_grad,
            alpha_scale=alpha_scale, channel_dim=channel_dim, inplace=inplace,
        )  # fmt: skip
    alpha, config = _checked(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)
    if ste not in BUILT_IN:
        plain, in_place = _qrelu_own, _qrelu_own_
    elif _ops.native is None or torch.compiler.is_compiling():
        plain, in_place = _qrelu, _qrelu_
    else:
        plain, in_place = _native_qrelu, _native_qrelu_
    op = in_place if inplace else plain
    packing = active_packing()
    try:
        if type(x) is not Tensor and is_dtensor(x):
            return _sharded_qrelu(x, alpha, *config, inplace)
        if packing is not None and not x.is_nested:
            return packing.qrelu(x, alpha, *config, inplace)
        return op(x, alpha, *config)
    except Exception:
        if wrong := _wrong_argument(x, alpha, bits, rounding, channel_dim):
            raise wrong from None
        raise


def _dim_of_values(x: Tensor, channel_dim: int | None) -> int | None:
    """The dimension of a nested tensor as one of its values, counted from the end."""
    if type(channel_dim) is not int:
        return channel_dim
    if x.layout is not torch.jagged:
        raise ValueError(f"channel_dim must be None for a nested tensor of layout {x.layout}, got {channel_dim}")
    same_size = [dim for dim in range(1, x.dim()) if isinstance(x.size(dim), int)]
    if not -x.dim() <= channel_dim < x.dim() or channel_dim % x.dim() not in same_size:
        raise ValueError(
            f"channel_dim must be a dimension of one size in all of a nested x, one of {same_size}, got {channel_dim}"
        )
    return channel_dim % x.dim() - x.dim()


def _nested_qrelu(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    x = x.contiguous()
    y = qrelu(
        x.values(), alpha, bits, ste=ste, rounding=rounding, alpha_grad=alpha_grad, alpha_scale=alpha_scale,
        channel_dim=_dim_of_values(x, channel_dim),
    )  # fmt: skip
    return nested_like(y, x)


def _nested_qrelu_(x, *args):
    raise NotImplementedError("qrelu with inplace=True takes no nested tensor; use inplace=False")


def _sharded_qrelu(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim, inplace):
    if inplace:
        check_inplace(ste, rounding, alpha_grad if alpha.requires_grad else None, x.requires_grad)
        if any(placement.is_partial() for placement in x.placements):
            raise NotImplementedError(
                f"qrelu with inplace=True takes no DTensor of partial sums, got {x.placements}; use inplace=False"
            )
    call = functools.partial(
        qrelu, bits=bits, ste=ste, rounding=rounding, alpha_grad=alpha_grad, alpha_scale=alpha_scale,
        channel_dim=channel_dim,
    )  # fmt: skip
    y = on_shards(call, x, alpha, channel_dim)
    return x.copy_(y) if inplace else y


def _as_it_is(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    """qrelu of an x whose output is not kept as codes."""
    return qrelu(
        x, alpha, bits, ste=ste, rounding=rounding, alpha_grad=alpha_grad, alpha_scale=alpha_scale,
        channel_dim=channel_dim,
    )  # fmt: skip


for _op in (_qrelu, _qrelu_own):
    _ops._library.impl(_op, _nested_qrelu, "CompositeImplicitAutogradNestedTensor")
for _op in (_qrelu_, _qrelu_own_):
    _ops._library.impl(_op, _nested_qrelu_, "CompositeImplicitAutogradNestedTensor")


@_overridable
def qrelu_linear(
    x: Tensor,
    alpha: Tensor | float,
    weight: Tensor,
    bias: Tensor | None = None,
    bits: int = 4,
    *,
    ste: str = "clipped_relu",
    rounding: str = "ceil",
    alpha_grad: str = "three_valued",
    alpha_scale: float | str = 1.0,
    channel_dim: int | None = None,
) -> Tensor:
    """A Linear on the output of a qrelu, out = qrelu(x) @ weight.T + bias, that keeps that output as its codes.

    x: [..., in_features], of at least one dimension.
    weight, bias: those of `torch.nn.functional.linear`, [out_features, in_features] and [out_features], in x's dtype,
        or of any that autocast converts.
    The other arguments, their ranges and the papers are those of `qrelu`.

    Returns out, [..., out_features]. It and all gradients are the same to the bit as from `qrelu` and then
    `torch.nn.functional.linear` (for x of one dimension, but for rounding).

    Kept for the backward: where the weight requires grad, the packed codes, and of what `qrelu` keeps that which the
    codes do not say (for relu under "ceil" and "hwgq" nothing); else what `qrelu` keeps. The same under torch.compile,
    where `packed_activations` does nothing. Of a nested x and of a DTensor y is kept. There is no second derivative;
    but under a transform of torch.func it is `qrelu` and the layer, one after the other, with what these keep, and
    their derivatives.

    Raises TypeError or ValueError for an argument of `qrelu`, and what F.linear raises.
    """
    alpha, config = _checked(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)
    try:
        if x.is_nested or is_dtensor(x):
            return F.linear(_as_it_is(x, alpha, *config), weight, bias)
        return qrelu_and_layer(x, alpha, weight, bias, config)
    except Exception:
        if wrong := _wrong_argument(x, alpha, bits, rounding, channel_dim):
            raise wrong from None
        raise


@_overridable
def qrelu_conv2d(
    x: Tensor,
    alpha: Tensor | float,
    weight: Tensor,
    bias: Tensor | None = None,
    bits: int = 4,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    ste: str = "clipped_relu",
    rounding: str = "ceil",
    alpha_grad: str = "three_valued",
    alpha_scale: float | str = 1.0,
    channel_dim: int | None = None,
) -> Tensor:
    """A Conv2d on the output of a qrelu, out = conv2d(qrelu(x), weight, bias), that keeps that output as its codes.

    x: [N, C, H, W], contiguous or channels-last.
    weight, bias, stride, padding, dilation, groups: those of `torch.nn.functional.conv2d`; padding as numbers.
    The other arguments, what is kept, and the equality of all gradients are those of `qrelu_linear`.

    Raises TypeError or ValueError for an argument of `qrelu`, ValueError for x that is not 4-d or a padding in words,
    and what F.conv2d raises.
    """
    alpha, config = _checked(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got shape {list(x.shape)}")
    pairs = {"stride": stride, "padding": padding, "dilation": dilation}
    for name, value in pairs.items():
        pairs[name] = (value, value) if isinstance(value, int) else value
        if isinstance(value, str) or len(pairs[name]) != 2:
            raise ValueError(f"{name} must be an int or two of them, got {value!r}")
    try:
        settings = (*map(tuple, pairs.values()), groups)
        if is_dtensor(x):
            return F.conv2d(_as_it_is(x, alpha, *config), weight, bias, *settings)
        return qrelu_and_layer(x, alpha, weight, bias, config, settings)
    except Exception:
        if wrong := _wrong_argument(x, alpha, bits, rounding, channel_dim):
            raise wrong from None
        raise


@_overridable
def qrelu_codes(
    x: Tensor, alpha: Tensor | float, bits: int = 4, *, rounding: str = "ceil", channel_dim: int | None = None
) -> Tensor:
    """The codes of `qrelu(x, alpha, bits)`, packed: c = #{k in 1..q : x > T[k]}; q for NaN.

    Arguments, their ranges and errors are those of `qrelu`.

    Returns a 1-d uint8 tensor of ceil(n * w / 8) bytes for n elements, w = 1, 2, 4, 4, 8, 8, 8, 8 for bits = 1..8.
    Element i sits in byte i*w // 8 at shift (i*w) % 8; elements are in the memory order of qrelu's output
    (channels-last where x is), and the last byte is padded with zeros. There is no gradient. `dequantize` is the way
    back.
    """
    alpha, channel_dim = check_arguments(x, alpha, bits, rounding, channel_dim)
    return _qrelu_codes(x, alpha, bits, rounding, channel_dim)


@_overridable
def dequantize(
    codes: Tensor,
    alpha: Tensor | float,
    bits: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    channel_dim: int | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """The output of `qrelu` from its packed codes, bit for bit: y = L[c] = round_to_dtype(c * alpha).

    codes: what `qrelu_codes` returned, 1-d uint8.
    alpha, bits, channel_dim: as they were there (the rounding does not matter here). There is no gradient.
    shape, dtype: those of x there.
    memory_format: that of qrelu's output there: torch.contiguous_format, channels_last or channels_last_3d.

    Returns a tensor of that shape, dtype and format. A NaN of x comes back as L[q], as its code is q.
    Raises TypeError or ValueError, which name the argument, what was got and what was wanted.
    """
    if not isinstance(codes, Tensor):
        raise TypeError(f"codes must be a Tensor, got {type(codes).__name__}")
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    if codes.dim() != 1:
        raise ValueError(f"codes must be 1-d, got shape {list(codes.shape)}")
    check_bits(bits)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if not isinstance(shape, Sequence) or not all(isinstance(n, (int, torch.SymInt)) and n >= 0 for n in shape):
        raise ValueError(f"shape must be a sequence of ints >= 0, got {shape!r}")
    count, width = math.prod(shape), CODE_WIDTH[bits]
    size = (count * width + 7) // 8
    if codes.numel() != size:
        raise ValueError(f"codes must have {size} bytes for {count} elements of {width} bits, got {codes.numel()}")
    dims = {torch.contiguous_format: len(shape), torch.channels_last: 4, torch.channels_last_3d: 5}
    if dims.get(memory_format) != len(shape):
        raise ValueError(
            "memory_format must be torch.contiguous_format, channels_last (4 dimensions) or channels_last_3d (5), "
            f"got {memory_format} for {len(shape)} dimensions"
        )
    alpha, channel_dim = check_alpha(alpha, channel_dim, shape, dtype, codes.device)
    return _dequantize(codes, alpha, bits, shape, dtype, channel_dim, memory_format)
