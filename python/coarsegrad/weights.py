"""Weights of 8, 4, 2 and 1 bits, with the scale of least squared error: functions."""

from __future__ import annotations

from torch import Tensor

from . import _ops, _weights  # noqa: F401 (the kernels)
from ._checks import check_option, check_weight
from ._types import WEIGHT_STES, WeightBits, WeightSteName
from .functional import overridable

_weight_scale = _ops.ops.weight_scale.default
_weight_codes = _ops.ops.weight_codes.default
_qweight = _ops.ops.qweight.default


@overridable
def weight_scale(weight: Tensor, bits: WeightBits, *, channel_dim: int | None = 0) -> Tensor:
    """The scale s with which quantized weights s * k are nearest to the weights.

        minimize sum((w - s * k)**2) over s and integers k: |k| <= p = 2**(bits - 1) - 1, or k = -1 or 1 for one bit

    One bit: s = mean |w|. Two bits: the best of all s. Four and eight bits: the best of a grid of s, each improved to
    <|w|, |k|> / <k, k> of its codes k.

    weight: float32, bfloat16, float16 or float64, of any shape and strides, with at most 2**25 elements for each scale.
    bits: 8, 4, 2 or 1.
    channel_dim: the dimension with a scale per index: 0 for the output channels of a Linear or convolution, 1 for those
        of a transposed convolution. Negative values count from the end. None: one scale for the whole tensor.

    Returns s, float32, or float64 for float64, of shape [weight.size(channel_dim)], or [] for one scale: the same bits
    on every backend. It is 0 for weights that all are 0, or for none, and NaN if a weight is not finite. There is no
    gradient.

    Raises TypeError or ValueError with the argument's name, what was got and what was wanted.

    Sources: Rastegari et al. 2016, arXiv 1603.05279 (one bit); Yin, Zhang, Qi and Xin 2016, arXiv 1612.06052 (two);
    Yin et al. 2018, arXiv 1808.05240 (more).
    """
    check_weight(weight, bits, channel_dim)
    return _weight_scale(weight, bits, channel_dim)


@overridable
def weight_codes(weight: Tensor, bits: WeightBits, *, channel_dim: int | None = 0) -> tuple[Tensor, Tensor]:
    """The integers of a quantized weight, and their scale: `qweight` is scale * codes, rounded to weight's dtype.

    Arguments and errors are those of `weight_scale`.

    Returns (codes, scale). codes: int8 of weight's shape and memory format, -p to p with p = 2**(bits - 1) - 1, or -1
    and 1 for one bit. scale: that of `weight_scale`. Where it is NaN, codes of more than one bit are 0. There is no
    gradient.
    """
    check_weight(weight, bits, channel_dim)
    return _weight_codes(weight, bits, channel_dim)


@overridable
def qweight(
    weight: Tensor, bits: WeightBits, *, channel_dim: int | None = 0, ste: WeightSteName = "identity"
) -> Tensor:
    """Weights of few bits: the nearest of the levels s * k, with the scale s of `weight_scale`.

        y = s * k,  k = clamp(round(w / s), -p, p),  p = 2**(bits - 1) - 1;  one bit: k = 1 if w >= 0, else -1
        dw = dy * g'(w)

    Levels and thresholds are those of `qsigned` with alpha = s, bit for bit.

    ste: the coarse gradient g'. "identity": 1. "clipped": 1 where |w| is at most the top level s * p (one bit: s), else
        0. "trust": 1 where |w| is at most that and half the distance of two levels, |w - y| <= s / 2 (one bit: s), else
        0. With the last two a weight outside is moved by no gradient. s counts as a constant.

    The other arguments and errors are those of `weight_scale`.

    Returns y, in weight's dtype and memory format. Where the scale is NaN, so is y, and gradients pass.

    Saved for backward: nothing for "identity", whose gradient is the identity of any order; else weight itself and a
    number for each scale. There is no forward-mode derivative.

    Sources: Bengio et al. 2013, arXiv 1308.3432 ("identity"); Esser et al. 2020, arXiv 1902.08153, and Liu et al. 2025,
    arXiv 2502.02631 ("clipped"); Panferov et al. 2025, arXiv 2502.05003 ("trust"); and those of `weight_scale`.
    """
    check_weight(weight, bits, channel_dim)
    check_option("ste", ste, WEIGHT_STES)
    return _qweight(weight, bits, channel_dim, ste)
