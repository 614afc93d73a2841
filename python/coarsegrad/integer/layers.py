"""An integer layer: the numbers of a Linear or convolution that reads codes, with the BatchNorm and the staircase after
it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from .exact import Channel, edges, exact_affine, first_above
from .weights import choose_weights, pack_weights

_TOO_LARGE = "its scales do not fit into float32"


class CannotConvert(Exception):
    """Why a layer stays float."""


@dataclass(frozen=True)
class Norm:
    """A BatchNorm in evaluation: (x - mean) / sqrt(var + eps) * weight + bias; weight and bias may be None."""

    mean: Tensor
    var: Tensor
    eps: float
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Staircase:
    """The next QReLU. alpha: [1], or [C] for one of each output channel."""

    alpha: Tensor
    bits: int
    rounding: str


@dataclass(frozen=True)
class IntegerLayer:
    """What the op reads: packed weight, and scale and offset, float32 [C]; thresholds, int32 [C, levels], or None."""

    weight: Tensor
    scale: Tensor
    offset: Tensor
    thresholds: Tensor | None

    def to(self, device: torch.device) -> IntegerLayer:
        moved = None if self.thresholds is None else self.thresholds.to(device)
        return IntegerLayer(self.weight.to(device), self.scale.to(device), self.offset.to(device), moved)


def integer_layer(
    weight: Tensor,
    bias: Tensor | None,
    step: Fraction | Tensor,
    levels: int,
    weight_bits: int,
    norm: Norm | None = None,
    staircase: Staircase | None = None,
    trained: tuple[Tensor, Tensor] | None = None,
) -> IntegerLayer:
    """The integer form of one layer. Raises CannotConvert.

    weight: [C, ...], a row in the order in which the op reads codes. The input is step * code, with codes of at most
    levels. step: one number; or one of each weight, in a shape that broadcasts against weight, and then the weights are
    multiplied by it before rounding. trained: the integers, as flat rows, and their scales, instead of rounding.
    """
    tensors = [weight, bias, *([norm.mean, norm.var, norm.weight, norm.bias] if norm else [])]
    if not all(bool(t.isfinite().all()) for t in tensors if t is not None):
        raise CannotConvert("its parameters are not all finite")
    rows = weight.detach().double().cpu()
    if isinstance(step, Tensor):
        if trained is not None:
            raise CannotConvert("its input has several steps, which the codes of its QWeight cannot take in")
        rows, step = rows * step.cpu(), Fraction(1)
    rows, sign = rows.flatten(1), _signs(norm, rows.size(0))
    integers, scales = choose_weights(rows, weight_bits) if trained is None else trained
    numbers = _numbers(integers * sign, scales, step, levels, bias, norm, staircase)
    if numbers[2] is not None and weight_bits == 2 and bool((integers * sign == 2).any()):
        # Thresholds are for sums that v rises with, and 2 bits hold no opposite of -2.
        ternary, ternary_scales = choose_weights(rows, weight_bits, symmetric=True)
        integers, scales = torch.where(sign < 0, ternary, integers), torch.where(sign[:, 0] < 0, ternary_scales, scales)
        numbers = _numbers(integers * sign, scales, step, levels, bias, norm, staircase)
    scale, offset, thresholds = numbers
    if thresholds is None:
        scale = scale * sign[:, 0]
    else:
        integers = integers * sign
    return IntegerLayer(pack_weights(integers, weight_bits), scale, offset, thresholds).to(weight.device)


def _signs(norm: Norm | None, channels: int) -> Tensor:
    """-1 where v falls as the sum of codes times weights rises, else 1; int64 [C, 1]."""
    if norm is None or norm.weight is None:
        return torch.ones(channels, 1, dtype=torch.int64)
    return torch.where(norm.weight.cpu() < 0, -1, 1)[:, None]


def _numbers(
    integers: Tensor,
    scale: Tensor,
    step: Fraction,
    levels: int,
    bias: Tensor | None,
    norm: Norm | None,
    staircase: Staircase | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(scale, offset, thresholds) of sums that v rises with."""
    if not bool(scale.isfinite().all()):
        raise CannotConvert(_TOO_LARGE)
    low, high = -levels * (-integers).clamp(min=0).sum(1), levels * integers.clamp(min=0).sum(1)
    if bool((high - low >= 2**31 - 1).any()):
        raise CannotConvert("its sums may exceed 32 bits")
    channels = list(_channels(step, scale, bias, norm, low, high))
    return _float_output(channels) if staircase is None else _codes_output(channels, staircase, low, high)


def _channels(
    step: Fraction, scale: Tensor, bias: Tensor | None, norm: Norm | None, low: Tensor, high: Tensor
) -> Iterable[Channel]:
    """Of v = (step * scale * acc + bias - mean) / sqrt(var + eps) * gain + shift, with |gain| where the sign is in the
    weights."""
    count = scale.numel()
    mean, gain, var, shift = _zeros(count), [Fraction(1)] * count, [Fraction(1)] * count, _zeros(count)
    if norm is not None:
        mean, var = _fractions(norm.mean), [value + Fraction(norm.eps) for value in _fractions(norm.var)]
        gain = gain if norm.weight is None else _fractions(norm.weight)
        shift = shift if norm.bias is None else _fractions(norm.bias)
        if min(var, default=1) <= 0:
            raise CannotConvert("the BatchNorm after it has a variance <= 0")
    biases = _zeros(count) if bias is None else _fractions(bias)
    for n, (s, b) in enumerate(zip(_fractions(scale), biases)):
        yield Channel(step * s * abs(gain[n]), gain[n] * (b - mean[n]), var[n], shift[n], int(low[n]), int(high[n]))


def _fractions(t: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in t.detach().double().tolist()]


def _zeros(count: int) -> list[Fraction]:
    return [Fraction(0)] * count


def _float_output(channels: list[Channel]) -> tuple[Tensor, Tensor, None]:
    scale, offset = (
        torch.tensor([channel.affine() for channel in channels], dtype=torch.float64)
        .reshape(len(channels), 2)
        .float()
        .unbind(1)
    )
    if not bool(scale.isfinite().all() and offset.isfinite().all()):
        raise CannotConvert(_TOO_LARGE)
    return scale.contiguous(), offset.contiguous(), None


def _codes_output(
    channels: list[Channel], staircase: Staircase, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(scale, offset, None) if these give each code exactly, else with the thresholds that do."""
    bits, rounding = staircase.bits, staircase.rounding
    alphas = _fractions(staircase.alpha.expand(len(channels)))
    steps = edges(bits, rounding)
    thresholds = torch.tensor(
        [first_above(channel, alpha, steps) for channel, alpha in zip(channels, alphas)], dtype=torch.int64
    ).reshape(len(channels), len(steps))
    scale, offset = _in_stairs(channels, alphas, thresholds, high, 0.0 if rounding == "ceil" else 0.5)
    exact = None if rounding == "hwgq" and bits > 1 else exact_affine(scale, offset, thresholds, low, high)
    if exact is not None:
        return exact[0], exact[1], None
    return scale, offset, thresholds.to(torch.int32)


def _in_stairs(
    channels: list[Channel], alphas: list[Fraction], thresholds: Tensor, high: Tensor, shift: float
) -> tuple[Tensor, Tensor]:
    """(scale, offset) of v / alpha - shift; of a constant channel 0 and its code."""
    pairs = []
    for channel, alpha, row, top in zip(channels, alphas, thresholds.tolist(), high.tolist()):
        if channel.slope == 0:
            pairs.append((0.0, float(sum(threshold <= top for threshold in row))))
            continue
        root = channel.root() * alpha
        pairs.append((float(channel.slope / root), float(channel.shift / root + channel.bias / alpha) - shift))
    scale, offset = torch.tensor(pairs, dtype=torch.float64).reshape(len(pairs), 2).float().unbind(1)
    return scale.contiguous(), offset.contiguous()
