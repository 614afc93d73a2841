"""The public functions.

The kernels check their arguments. Only what the dispatcher would silently convert is checked first, as checks in Python
cost as much as a small kernel. A call that failed is checked again, so that the error is the same on every backend.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

from . import _ops
from ._checks import (
    check_alpha,
    check_alpha_scale,
    check_arguments,
    check_bits,
    check_option,
    check_signed_alpha,
    checked_values,
)
from ._dtensor import is_dtensor, on_shards
from ._fused import qrelu_and_layer
from ._torch_internals import nested_like
from ._types import (
    ALPHA_GRADS,
    BUILT_IN,
    CODE_WIDTH,
    DTYPES,
    ROUNDINGS,
    AlphaGradName,
    AlphaScale,
    RoundingName,
    SteName,
    packed_bytes,
    wide_dtype,
)
from .packing import active_packing, packs_graph
from .reference import lsq_scale
from .ste import check_inplace, get_ste

# The arguments of the ops after alpha.
_Options: TypeAlias = tuple[int, SteName, RoundingName, AlphaGradName, float, int | None]
_INT_OR_NONE = (int, type(None))

_qrelu = _ops.ops.qrelu.default
_qrelu_ = _ops.ops.qrelu_.default
_qrelu_custom = _ops.ops.qrelu_custom.default
_qrelu_custom_ = _ops.ops.qrelu_custom_.default
_qrelu_packed = _ops.ops.qrelu_packed.default
_qrelu_packed_ = _ops.ops.qrelu_packed_.default
_qrelu_codes = _ops.ops.qrelu_codes.default
_dequantize = _ops.ops.dequantize.default
_qsigned_dequantize = _ops.ops.qsigned_dequantize.default
if _ops.native is not None:  # the same ops; torch.ops parses arguments for as long as the kernel of a small tensor runs
    _native_qrelu, _native_qrelu_ = _ops.native.qrelu, _ops.native.qrelu_


_P = ParamSpec("_P")


def overridable(function: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Make a function honour `__torch_function__` of arguments and modes, like torch's own functions. A torch.fx proxy
    then records the call."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        asked = (*args, *kwargs.values())
        if has_torch_function(asked):
            return handle_torch_function(call, asked, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def _scale(alpha_scale: AlphaScale, x: Tensor, bits: int) -> float:
    """alpha_scale as a number."""
    check_alpha_scale(alpha_scale)
    if alpha_scale == "lsq":
        # As a number it would force a recompilation for every n. The kernels compute it instead.
        return math.inf if torch.compiler.is_compiling() else lsq_scale(x, bits)
    return float(alpha_scale)


def _wrong_argument(x: Tensor, alpha: Tensor, bits: int, rounding: str, channel_dim: int | None) -> Exception | None:
    """The error in the arguments of a failed call, or None if the arguments are right."""
    try:
        if isinstance(x, Tensor) and x.is_nested:
            x, channel_dim = x.contiguous().values(), _dim_of_values(x, channel_dim)
        check_option("rounding", rounding, ROUNDINGS)
        check_arguments(x, alpha, bits, channel_dim)
        checked_values(alpha, wide_dtype(x.dtype))
    except (TypeError, ValueError) as error:
        return error
    except RuntimeError:  # vmap hides alpha's values
        return None
    return None


def _checked(
    x: Tensor,
    alpha: Tensor | float,
    bits: int,
    ste: SteName,
    rounding: RoundingName,
    alpha_grad: AlphaGradName,
    alpha_scale: AlphaScale,
    channel_dim: int | None,
) -> tuple[Tensor, _Options]:
    """(alpha as a tensor, the ops' arguments after it), after the checks that the ops do not do themselves."""
    if (
        not isinstance(alpha, Tensor)
        or type(bits) is not int
        or type(channel_dim) not in _INT_OR_NONE
        or type(alpha_scale) is not float
        or alpha_scale != 1.0
    ):
        check_option("rounding", rounding, ROUNDINGS)
        if isinstance(x, Tensor) and x.is_nested:
            alpha, _ = check_arguments(x.contiguous().values(), alpha, bits, _dim_of_values(x, channel_dim))
        else:
            alpha, channel_dim = check_arguments(x, alpha, bits, channel_dim)
        alpha_scale = _scale(alpha_scale, x, bits)
    if alpha_grad not in ALPHA_GRADS:
        check_option("alpha_grad", alpha_grad, ALPHA_GRADS)
    if ste not in BUILT_IN:
        get_ste(ste)
    return alpha, (bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)


def qrelu(
    x: Tensor,
    alpha: Tensor | float,
    bits: int = 4,
    *,
    ste: SteName = "clipped_relu",
    rounding: RoundingName = "ceil",
    alpha_grad: AlphaGradName = "three_valued",
    alpha_scale: AlphaScale = 1.0,
    channel_dim: int | None = None,
    inplace: bool = False,
) -> Tensor:
    """The staircase ReLU with 2**bits levels and its coarse gradients.

        y = alpha * clamp(ceil(x / alpha), 0, q),   q = 2**bits - 1          (rounding="ceil")
        dx = dy * g'(x / alpha),   dalpha = alpha_scale * sum(dy * A)

    The levels are L[k] = k * alpha rounded to x's dtype. The output is y = L[c] for the code
    c = #{k in 1..q : x > T[k]}, bit for bit on every backend. NaN gives NaN, and its gradient passes.

    x: float32, bfloat16, float16 or float64, of any shape and strides. Also a nested tensor, or a DTensor, whose
        partial sums are added up first.
    alpha: the height and width of a stair, finite and > 0: a number, or a tensor of shape [1], or [C] with
        C = x.size(channel_dim), of any floating dtype, on x's device. An illegal value in a tensor is an error on a
        CPU. On a GPU, where reading it would cost a sync, and in code that Inductor fuses, it makes the output NaN.
    bits: 1..8.
    ste: the coarse gradient g', a name in `stes()`: "identity", "relu", "clipped_relu", "log_tailed_relu",
        "reverse_exponential", "trust", "reverse_exponential_step" (g' at the code instead of u: constant on each
        stair), "dsq" and "stable_qat" (torch operations, or Triton), or a custom STE (`register_ste`).
    rounding: the thresholds T. "ceil": T[k] = L[k-1], so that every x > 0 gives at least alpha. "nearest": the
        midpoints between levels. "hwgq": as "nearest", but T[1] = 0.
    alpha_grad: the factor A if alpha requires grad. It is 0 for x <= 0 and q for x > L[q]; in between, "exact" is c,
        "three_valued" 2**(bits-1) and "two_valued" 0. "chain" is c - (x / alpha) * g'(x / alpha) everywhere.
    alpha_scale: a factor of dalpha. "lsq" is 1 / sqrt(n * q) for n elements of x per sample (x.size(0) samples).
    channel_dim: the dimension of x with per-channel alphas. Negative values count from the end.
    inplace: write y into x, which must not be nested.

    Returns y, in x's dtype and memory format (contiguous or channels-last).

    Saved for backward, in bits per element, if only x requires grad: 0 for identity; 1 for relu, clipped_relu and
    trust; the codes for reverse_exponential_step (bits rounded up to 1, 2, 4 or 8); x itself for the others. If alpha
    requires grad: for "exact" the codes, plus 1 for clipped_relu, trust and, under "nearest", relu; for "two_valued"
    and "three_valued" 2, plus the codes for reverse_exponential_step, but x itself for trust; for "chain", and for an
    STE that needs x, x itself. Nothing is saved if no gradient is needed. There is a second derivative if alpha is
    fixed and x is not saved, and no forward-mode derivative. Inside `packed_activations` the next layer saves y as its
    codes.

    Raises TypeError or ValueError with the argument's name, what was got and what was wanted; ValueError for
    inplace=True if x would be saved. Nothing is computed or changed in that case.

    Sources: Yin et al. 2019, arXiv 1903.05662, and Long, Yin, Xin 2021, arXiv 2011.11256 (coarse gradients); Yin et
    al. 2018, arXiv 1808.05240 ("exact", "three_valued"); Choi et al. 2018, arXiv 1805.06085 ("two_valued"); Esser et
    al. 2020, arXiv 1902.08153 ("lsq", and "chain" with "nearest" and clipped_relu); Cai et al. 2017, arXiv 1702.00953
    ("hwgq"); Panferov et al. 2025, arXiv 2502.05003 (trust); Gong et al. 2019,
    arXiv 1908.05033 (dsq); Chen et al. 2026, arXiv 2601.19320 (stable_qat).
    """
    if has_torch_function_variadic(x, alpha):  # as `overridable` does
        return handle_torch_function(
            qrelu, (x, alpha), x, alpha, bits, ste=ste, rounding=rounding, alpha_grad=alpha_grad,
            alpha_scale=alpha_scale, channel_dim=channel_dim, inplace=inplace,
        )  # fmt: skip
    alpha, options = _checked(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)
    compiling = torch.compiler.is_compiling()
    if compiling and packs_graph():
        plain, in_place = _qrelu_packed, _qrelu_packed_
    elif ste not in BUILT_IN:
        plain, in_place = _qrelu_custom, _qrelu_custom_
    elif compiling or _ops.native is None:
        plain, in_place = _qrelu, _qrelu_
    else:
        plain, in_place = _native_qrelu, _native_qrelu_
    op = in_place if inplace else plain
    packing = active_packing()
    try:
        if type(x) is not Tensor and is_dtensor(x):
            return _sharded_qrelu(x, alpha, *options, inplace)
        if packing is not None and not x.is_nested:
            return packing.qrelu(x, alpha, *options, inplace)
        return op(x, alpha, *options)
    except Exception:
        if wrong := _wrong_argument(x, alpha, bits, rounding, channel_dim):
            raise wrong from None
        raise


def _dim_of_values(x: Tensor, channel_dim: int | None) -> int | None:
    """A dimension of a nested tensor as a dimension of its values, counted from the end."""
    if type(channel_dim) is not int:
        return channel_dim
    if x.layout is not torch.jagged:
        raise ValueError(f"channel_dim must be None for a nested tensor of layout {x.layout}, got {channel_dim}")
    same_size = [dim for dim in range(1, x.dim()) if isinstance(x.size(dim), int)]
    if not -x.dim() <= channel_dim < x.dim() or channel_dim % x.dim() not in same_size:
        raise ValueError(
            f"channel_dim must be a dimension of a nested x with a uniform size, one of {same_size}, got {channel_dim}"
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
        check_inplace(ste, rounding, alpha_grad, x.requires_grad, alpha.requires_grad)
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


def _plain_qrelu(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim):
    """qrelu without a fused layer."""
    return qrelu(
        x, alpha, bits, ste=ste, rounding=rounding, alpha_grad=alpha_grad, alpha_scale=alpha_scale,
        channel_dim=channel_dim,
    )  # fmt: skip


for _op in (_qrelu, _qrelu_custom, _qrelu_packed):
    _ops._library.impl(_op, _nested_qrelu, "CompositeImplicitAutogradNestedTensor")
for _op in (_qrelu_, _qrelu_custom_, _qrelu_packed_):
    _ops._library.impl(_op, _nested_qrelu_, "CompositeImplicitAutogradNestedTensor")


@overridable
def qrelu_linear(
    x: Tensor,
    alpha: Tensor | float,
    weight: Tensor,
    bias: Tensor | None = None,
    bits: int = 4,
    *,
    ste: SteName = "clipped_relu",
    rounding: RoundingName = "ceil",
    alpha_grad: AlphaGradName = "three_valued",
    alpha_scale: AlphaScale = 1.0,
    channel_dim: int | None = None,
) -> Tensor:
    """qrelu and a Linear, out = qrelu(x) @ weight.T + bias, with the activation saved as its codes.

    x: [..., in_features], with at least one dimension.
    weight, bias: as in `torch.nn.functional.linear`, [out_features, in_features] and [out_features], in x's dtype or a
        dtype that autocast converts.
    The other arguments and the papers are those of `qrelu`.

    Returns out, [..., out_features]. The output and all gradients are bit for bit those of `qrelu` followed by
    `torch.nn.functional.linear` (up to rounding for x of one dimension).

    Saved for backward: if the weight requires grad, the packed codes, plus what `qrelu` saves unless the codes imply it
    (they do for relu under "ceil" and "hwgq"); otherwise what `qrelu` saves. For a nested x or a DTensor, y is saved.
    There is no second derivative. Under a transform of torch.func the call is `qrelu` followed by the layer, with what
    these save and their derivatives.

    Raises TypeError or ValueError for an argument of `qrelu`, and what F.linear raises.
    """
    alpha, options = _checked(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)
    try:
        if x.is_nested or is_dtensor(x):
            return F.linear(_plain_qrelu(x, alpha, *options), weight, bias)
        return qrelu_and_layer(x, alpha, weight, bias, options)
    except Exception:
        if wrong := _wrong_argument(x, alpha, bits, rounding, channel_dim):
            raise wrong from None
        raise


@overridable
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
    ste: SteName = "clipped_relu",
    rounding: RoundingName = "ceil",
    alpha_grad: AlphaGradName = "three_valued",
    alpha_scale: AlphaScale = 1.0,
    channel_dim: int | None = None,
) -> Tensor:
    """qrelu and a Conv2d, out = conv2d(qrelu(x), weight, bias), with the activation saved as its codes.

    x: [N, C, H, W], contiguous or channels-last.
    weight, bias, stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`, with numeric padding.
    The other arguments, what is saved for backward, and the guarantees are those of `qrelu_linear`.

    Raises TypeError or ValueError for an argument of `qrelu`, ValueError for an x that is not 4-d or a padding given as
    a string, and what F.conv2d raises.
    """
    alpha, options = _checked(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got shape {list(x.shape)}")
    pairs: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    for name, value in pairs.items():
        pairs[name] = (value, value) if isinstance(value, int) else value
        if isinstance(value, str) or len(pairs[name]) != 2:
            raise ValueError(f"{name} must be an int or two of them, got {value!r}")
    try:
        conv: tuple[Any, ...] = (*map(tuple, pairs.values()), groups)
        if is_dtensor(x):
            return F.conv2d(_plain_qrelu(x, alpha, *options), weight, bias, *conv)
        return qrelu_and_layer(x, alpha, weight, bias, options, conv)
    except Exception:
        if wrong := _wrong_argument(x, alpha, bits, rounding, channel_dim):
            raise wrong from None
        raise


@overridable
def qrelu_codes(
    x: Tensor, alpha: Tensor | float, bits: int = 4, *, rounding: RoundingName = "ceil", channel_dim: int | None = None
) -> Tensor:
    """The packed codes of `qrelu(x, alpha, bits)`: c = #{k in 1..q : x > T[k]}, and q for NaN.

    Arguments and errors are those of `qrelu`.

    Returns a 1-d uint8 tensor of ceil(n * w / 8) bytes for n elements, with w = 1, 2, 4, 4, 8, 8, 8, 8 for bits = 1..8.
    Element i is in byte i*w // 8 at shift (i*w) % 8. Elements are in the memory order of qrelu's output (channels-last
    if x is), and the last byte is zero-padded. There is no gradient. `dequantize` is the inverse.
    """
    check_option("rounding", rounding, ROUNDINGS)
    alpha, channel_dim = check_arguments(x, alpha, bits, channel_dim)
    return _qrelu_codes(x, alpha, bits, ROUNDINGS.index(rounding), channel_dim)


@overridable
def dequantize(
    codes: Tensor,
    alpha: Tensor | float,
    bits: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    signed: bool = False,
    channel_dim: int | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Rebuild the output of `qrelu` from its packed codes, bit for bit: y = L[c] = round_to_dtype(c * alpha).

    codes: the result of `qrelu_codes`, or of `qsigned_codes`, 1-d uint8.
    alpha, bits, channel_dim: as passed to `qrelu_codes`. The rounding does not matter. alpha of `qsigned_codes` is the
        one that it returned.
    signed: whether the codes are of `qsigned`, y = round_to_dtype((c - p) * alpha).
    shape, dtype: those of x.
    memory_format: that of qrelu's output: torch.contiguous_format, channels_last or channels_last_3d.

    Returns a tensor with this shape, dtype and format. A NaN in x comes back as L[q], as its code is q; if
    signed, as 0, or NaN with a dynamic alpha. There is no gradient.

    Raises TypeError or ValueError with the argument's name, what was got and what was wanted.
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
    size = packed_bytes(count, width)
    if codes.numel() != size:
        raise ValueError(f"codes must have {size} bytes for {count} elements of {width} bits, got {codes.numel()}")
    dims = {torch.contiguous_format: len(shape), torch.channels_last: 4, torch.channels_last_3d: 5}
    if dims.get(memory_format) != len(shape):
        raise ValueError(
            "memory_format must be torch.contiguous_format, channels_last (4 dimensions) or channels_last_3d (5), "
            f"got {memory_format} for {len(shape)} dimensions"
        )
    if signed:
        alpha, group, channel_dim = check_signed_alpha(alpha, channel_dim, shape, dtype, codes.device)
        return _qsigned_dequantize(codes, alpha, bits, group, shape, dtype, channel_dim, memory_format)
    alpha, channel_dim = check_alpha(alpha, channel_dim, shape, dtype, codes.device)
    return _dequantize(codes, alpha, bits, shape, dtype, channel_dim, memory_format)
