"""The signed staircase, for tensors of both signs, such as inputs of a transformer's layers: functions and module."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import _ops
from ._alphas import initial_alpha, keep_wide
from ._checks import check_alpha_scale, check_group, check_hadamard, check_option, check_signed, checked_values
from ._dtensor import is_dtensor, is_sharded, on_shards
from ._torch_internals import nested_like
from ._types import (
    SIGNED_ALPHA_GRADS,
    SIGNED_STES,
    AlphaScale,
    SignedAlphaGradName,
    SignedSteName,
    wide_dtype,
)
from .functional import overridable
from .packing import active_packing, packs_graph
from .parametrization import float_weight
from .reference import signed_scale

_qsigned = _ops.ops.qsigned.default
_qsigned_packed = _ops.ops.qsigned_packed.default


def _scale(alpha_scale: AlphaScale, x: Tensor, bits: int) -> float:
    """alpha_scale as a number."""
    check_alpha_scale(alpha_scale)
    if alpha_scale == "lsq":  # in compiled code infinity, as a number would force a recompilation for every size
        return math.inf if torch.compiler.is_compiling() else signed_scale(math.inf, x, bits)
    return float(alpha_scale)


@overridable
def qsigned(
    x: Tensor,
    alpha: Tensor | float | None,
    bits: int = 8,
    *,
    group: int | None = None,
    ste: SignedSteName = "clipped",
    alpha_grad: SignedAlphaGradName = "exact",
    alpha_scale: AlphaScale = 1.0,
    channel_dim: int | None = None,
) -> Tensor:
    """The signed staircase: 2**bits - 1 levels, symmetric around 0, for tensors of both signs.

        y = alpha * k,  k = clamp(round(x / alpha), -p, p),   p = 2**(bits - 1) - 1
        dx = dy * g'(x / alpha),   dalpha = alpha_scale * sum(dy * A)

    The levels are L[k] = k * alpha rounded to x's dtype, the thresholds their midpoints, and the code is
    c = #{k : x > T[k]} = k + p, bit for bit on every backend. NaN gives NaN, and its gradient passes.

    x: float32, bfloat16, float16 or float64, of any shape and strides. Also a nested tensor, or a DTensor, whose last
        dimension must not be sharded if alpha is dynamic.
    alpha: the width and height of a stair, as in `qrelu`; or None for a dynamic one: max|x| / p of each group, rounded
        up to bfloat16, so that nothing saturates. An infinity or NaN makes all outputs of its group NaN; a group of
        zeros stays zeros.
    bits: 2..8.
    group: how many consecutive elements of the last dimension share a dynamic alpha; it must divide that dimension.
        None: all of it, a row.
    ste: the coarse gradient g'. "clipped": 1 where L[-p] <= x <= L[p], else 0. "identity": 1. The same if alpha is
        dynamic.
    alpha_grad: the factor A if alpha requires grad. "exact": k, which is -p below and p above. "chain":
        k - (x / alpha) * g'(x / alpha).
    alpha_scale: a factor of dalpha. "lsq" is 1 / sqrt(n * p) for n elements of x per sample (x.size(0) samples).
    channel_dim: the dimension of x with per-channel alphas. Negative values count from the end.

    Returns y, in x's dtype; in x's memory format, or contiguous if alpha is dynamic.

    Saved for backward, in bits per element: nothing for identity and for a dynamic alpha, which counts as a constant; 1
    for clipped. If alpha requires grad: for "exact" the codes (bits rounded up to 2, 4 or 8) as well, for "chain" x
    alone. There is a second derivative unless alpha requires grad, and no forward-mode derivative. Inside
    `packed_activations` the next layer saves y as its codes, and a dynamic alpha takes 16 / group bits per element.

    Raises TypeError or ValueError with the argument's name, what was got and what was wanted.

    Sources: Bengio et al. 2013, arXiv 1308.3432 (straight-through gradients); Esser et al. 2020, arXiv 1902.08153
    ("lsq", and "chain" with "clipped"); Yin et al. 2018, arXiv 1808.05240 ("exact").
    """
    if isinstance(x, Tensor) and x.is_nested:
        x = x.contiguous()
        y = qsigned(
            x.values(), alpha, bits, group=group, ste=ste, alpha_grad=alpha_grad, alpha_scale=alpha_scale,
            channel_dim=_no_channels(channel_dim),
        )  # fmt: skip
        return nested_like(y, x)
    alpha, group, channel_dim = check_signed(x, alpha, bits, group, channel_dim)
    check_option("ste", ste, SIGNED_STES)
    check_option("alpha_grad", alpha_grad, SIGNED_ALPHA_GRADS)
    scale = _scale(alpha_scale, x, bits)  # of all of a DTensor
    if is_dtensor(x):
        settings = {"ste": ste, "alpha_grad": alpha_grad, "alpha_scale": scale, "channel_dim": channel_dim}
        return _sharded(x, alpha, bits, group, settings)
    options = (bits, group if alpha is None else None, ste, alpha_grad, scale, channel_dim)
    if torch.compiler.is_compiling() and packs_graph():
        return _qsigned_packed(x, alpha, *options)
    packing = active_packing()
    return _qsigned(x, alpha, *options) if packing is None else packing.qsigned(x, alpha, *options)


def _no_channels(channel_dim: int | None) -> None:
    if channel_dim is not None:
        raise ValueError(f"channel_dim must be None for a nested x, got {channel_dim!r}")


def _sharded(x, alpha, bits, group, settings):
    if alpha is not None:
        call = functools.partial(qsigned, bits=bits, **settings)
        return on_shards(call, x, alpha, settings["channel_dim"])
    if any(is_sharded(p, x.dim() - 1) for p in x.placements):
        raise NotImplementedError(
            f"qsigned with a dynamic alpha needs whole rows, got a DTensor placed as {x.placements}"
        )
    unused = torch.ones(1, device=x.device)  # on_shards distributes an alpha
    return on_shards(lambda local, _: qsigned(local, None, bits, group=group, **settings), x.contiguous(), unused, None)


@overridable
def qsigned_codes(
    x: Tensor,
    alpha: Tensor | float | None,
    bits: int = 8,
    *,
    group: int | None = None,
    channel_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The packed codes of `qsigned(x, alpha, bits)`, and its alphas.

    Arguments and errors are those of `qsigned`.

    Returns (codes, alpha). codes: 1-d uint8, c = k + p, packed as `qrelu_codes` describes. alpha: the given one, as a
    tensor, or the dynamic ones, bfloat16 of shape [..., n / group] for a last dimension of n. There is no gradient.
    `dequantize(..., signed=True)` is the inverse.
    """
    given, size, channel_dim = check_signed(x, alpha, bits, group, channel_dim)
    group = size if given is None else None
    _, dynamic, _, codes = _ops.ops.qsigned_forward.default(x, given, bits, group, False, True, channel_dim)
    return codes, dynamic if given is None else given


@overridable
def hadamard(x: Tensor, size: int = 64) -> Tensor:
    """x rotated by Hadamard's matrix: y = x H / sqrt(size) for each block of `size` elements of the last dimension.

    It spreads an outlier over its block, so that a signed staircase of few bits loses less of the others. It is its own
    inverse, and its own derivative; nothing is saved.

    x: float32, bfloat16, float16 or float64, of any shape and strides.
    size: a power of two that divides x.size(-1). H is in Sylvester's order.

    Returns y, in x's dtype and shape, contiguous. Sums are in float32, or float64 for float64, in the order of the fast
    Walsh-Hadamard transform, and rounded once: the same bits on every backend.

    Raises TypeError or ValueError with the argument's name, what was got and what was wanted.
    """
    check_hadamard(x, size)
    return _ops.ops.hadamard.default(x, size)


class QSigned(torch.nn.Module):
    """The signed staircase as a module: y = alpha * clamp(round(x / alpha), -p, p), p = 2**(bits - 1) - 1.

    Forward, gradients, what is saved for backward, and the papers are those of `coarsegrad.qsigned`.

    bits: 2..8.
    alpha: None (default) for a dynamic one, max|x| / p of each group. Or a number, or a tensor of shape [1], or
        [num_channels] if that is given.
    group: how many consecutive elements of the last dimension share a dynamic alpha. None: all of it.
    rotation: the size of a Hadamard rotation before the staircase (`coarsegrad.hadamard`), such as 64 or 128, or None.
        The layer that follows needs rotated weights: `coarsegrad.rotate_weight_`.
    ste: "clipped" or "identity".
    learn_alpha: make alpha, which must be given, a Parameter instead of a buffer.
    alpha_grad: "exact" or "chain".
    alpha_scale: a factor of alpha's gradient: a number, or "lsq".
    num_channels, channel_dim: per-channel alphas, and their dimension.

    alpha is float32, even after `.half()`, `.bfloat16()` and the like. With a dynamic alpha the state_dict is empty.

    Raises TypeError or ValueError for an illegal argument.
    """

    alpha: Tensor | None

    def __init__(
        self,
        bits: int = 8,
        *,
        alpha: float | Tensor | None = None,
        group: int | None = None,
        rotation: int | None = None,
        ste: SignedSteName = "clipped",
        learn_alpha: bool = False,
        alpha_grad: SignedAlphaGradName = "exact",
        alpha_scale: AlphaScale = 1.0,
        num_channels: int | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        if num_channels is not None and (type(num_channels) is not int or num_channels < 1):
            raise ValueError(f"num_channels must be None or an int >= 1, got {num_channels!r}")
        if alpha is None and (learn_alpha or num_channels is not None):
            raise ValueError("alpha must be given if it is learned or per channel, got None, which is dynamic")
        if rotation is not None:
            check_hadamard(torch.empty(rotation if type(rotation) is int and rotation > 0 else 1), rotation)
        self.bits = bits
        self.group = group
        self.rotation = rotation
        self.ste = ste
        self.alpha_grad = alpha_grad
        self.alpha_scale = alpha_scale
        self.channel_dim = None if num_channels is None else channel_dim
        made = None if alpha is None else initial_alpha(alpha, num_channels or 1)
        size = group if type(group) is int and group > 0 else 1
        probe = torch.zeros(size if num_channels is None else num_channels)
        qsigned(probe, made, bits, **{**self.settings(), "channel_dim": None if num_channels is None else 0})
        if learn_alpha:
            self.alpha = torch.nn.Parameter(made)
        else:
            self.register_buffer("alpha", made)

    def forward(self, x: Tensor) -> Tensor:
        if self.rotation is not None:
            x = hadamard(x, self.rotation)
        return qsigned(x, self.alpha, self.bits, **self.settings())

    def settings(self) -> dict:
        """The keyword arguments for `coarsegrad.qsigned`."""
        return {
            "group": self.group,
            "ste": self.ste,
            "alpha_grad": self.alpha_grad,
            "alpha_scale": self.alpha_scale,
            "channel_dim": self.channel_dim,
        }

    def _apply(self, fn, recurse=True):
        """Like nn.Module's, but alpha stays at least float32."""
        return super()._apply(lambda t: keep_wide(fn(t), t), recurse)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors) -> None:
        alpha = state.get(f"{prefix}alpha")
        if isinstance(alpha, Tensor) and type(alpha) is Tensor and alpha.device.type != "meta":
            try:
                checked_values(alpha.cpu(), wide_dtype(alpha.dtype))
            except ValueError as error:
                errors.append(f"{prefix}alpha: {error}")
                return
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        words = [f"bits={self.bits}"]
        words += [f"group={self.group}"] if self.group is not None else []
        words += [f"rotation={self.rotation}"] if self.rotation is not None else []
        if self.alpha is not None:
            given = f"num_channels={self.alpha.numel()}, channel_dim={self.channel_dim}"
            words += [given if self.channel_dim is not None else f"alpha={self.alpha.item():.6g}", f"ste={self.ste!r}"]
            words += ["learn_alpha=True"] if isinstance(self.alpha, torch.nn.Parameter) else []
        return ", ".join(words)


@torch.no_grad()
def rotate_weight_(layer: torch.nn.Linear, size: int) -> None:
    """Rotate the weight of a Linear whose input is rotated: y = (x H) (W H)^T = x W^T, up to rounding.

    layer: an nn.Linear; its weight, under a `QWeight` the float one, is changed in place. Calling it twice restores the
        weight, up to rounding.
    size: that of the rotation (`hadamard`); it must divide in_features.

    Raises TypeError or ValueError with the argument's name, what was got and what was wanted.
    """
    if not isinstance(layer, torch.nn.Linear):
        raise TypeError(f"layer must be an nn.Linear, got {type(layer).__name__}")
    check_group("size", size, layer.in_features)
    weight = float_weight(layer)
    if weight is None:
        raise ValueError("layer must have a weight that is a parameter, got one that is computed")
    weight.copy_(hadamard(weight, size))
