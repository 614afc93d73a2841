"""Two Linears with a staircase between them, and gated ones with the product of two: x and codes alone are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ._dtensor import is_dtensor
from ._mlp import keeps_codes_alone, mlp
from ._types import AlphaGradName, AlphaScale, RoundingName, SteName
from .functional import _checked, _wrong_argument, overridable, qrelu, qrelu_linear
from .gated import gated_product
from .packing import packed_activations, square


@overridable
def qrelu_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    alpha: Tensor | float,
    weight2: Tensor,
    bias2: Tensor | None = None,
    bits: int = 4,
    *,
    ste: SteName = "clipped_relu",
    rounding: RoundingName = "ceil",
    alpha_grad: AlphaGradName = "three_valued",
    alpha_scale: AlphaScale = 1.0,
    channel_dim: int | None = None,
    squared: bool = False,
) -> Tensor:
    """A Linear, qrelu and a Linear: out = qrelu(h) @ weight2.T + bias2, h = x @ weight1.T + bias1, of which x and codes
    are kept.

    x: [..., in_features], with at least one dimension.
    weight1, bias1: [hidden, in_features] and [hidden], in x's dtype or a dtype that autocast converts.
    weight2, bias2: [out_features, hidden] and [out_features].
    squared: whether the second Linear reads the square of qrelu(h), which its codes give too.
    The other arguments and the papers are those of `qrelu`; alpha is that of h.

    Returns out, [..., out_features]. h is rounded to its dtype before it is compared with the thresholds, so that the
    codes are those of `qrelu(h)`. NaN in a row of h makes NaN of its row of out.

    On a GPU, in float16 and bfloat16 and with hidden a multiple of 8, Triton's matrix products write and read the
    codes: neither h nor qrelu(h) nor the latter's gradient exists in memory. Sums are in float32, in another order than
    the BLAS library's. Elsewhere the layers run one after the other, with their bits, but for the rounding of sums
    where x or a weight is not contiguous. The backward reads codes, of which NaN has the top one: what it multiplies by
    is a number there, and a gradient may be one where that of the layers is NaN.

    Saved for backward: x, if weight1 requires grad; the packed codes (1, 2, 4, 4, 8, 8, 8, 8 bits an element of h for
    bits 1..8), if weight2 does or for a square; and one bit an element of h for the gate, unless the codes imply it
    (they do for relu under "ceil" and "hwgq"). With an alpha that requires grad or is one of several, with an STE whose
    gradient is more than a gate (any but relu, clipped_relu, identity and trust), and for a nested x or a DTensor, the
    layers run one after the other, the second as in `qrelu_linear`, and what they save is kept. There is no second
    derivative.

    Raises TypeError or ValueError with the argument's name, what was got and what was wanted.
    """
    options: dict[str, Any] = {
        "ste": ste, "rounding": rounding, "alpha_grad": alpha_grad, "alpha_scale": alpha_scale,
        "channel_dim": channel_dim,
    }  # fmt: skip
    linears = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    out = _as_one(x, linears, {"alpha": alpha}, bits, squared, **options)
    if out is not None:
        return out
    h = F.linear(x, weight1, bias1)
    if not squared:
        return qrelu_linear(h, alpha, weight2, bias2, bits, **options)
    with packed_activations():
        return F.linear(square(qrelu(h, alpha, bits, **options)), weight2, bias2)


@overridable
def qrelu_gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_alpha: Tensor | float,
    up_alpha: Tensor | float,
    bits: int = 4,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    ste: SteName = "clipped_relu",
    rounding: RoundingName = "ceil",
    alpha_grad: AlphaGradName = "three_valued",
    alpha_scale: AlphaScale = 1.0,
    channel_dim: int | None = None,
) -> Tensor:
    """The gated MLP of a transformer with two staircases, out = (qrelu(gate) * qrelu(up)) @ down_weight.T + down_bias,
    of which x and codes are kept.

        gate = x @ gate_weight.T + gate_bias,   up = x @ up_weight.T + up_bias

    x: [..., in_features], with at least one dimension.
    gate_weight, gate_bias, up_weight, up_bias: [hidden, in_features] and [hidden], in x's dtype or a dtype that
        autocast converts.
    down_weight, down_bias: [out_features, hidden] and [out_features].
    gate_alpha, up_alpha: the alphas of gate and up, as in `qrelu`. The other arguments are those of both staircases.

    Returns out, [..., out_features], as `qrelu_mlp` does: the product is rounded to x's dtype, as that of
    `gated_product(qrelu(gate), qrelu(up), "identity")`. On a GPU neither gate nor up nor the product nor its gradient
    exists in memory. Under autocast the gradient of x is summed in autocast's dtype.

    Saved for backward: x, if gate_weight or up_weight requires grad; the packed codes of gate and up; and one bit an
    element of each for its gate, unless the codes imply it. Where `qrelu_mlp` runs its layers one after the other,
    these do, and keep what `packed_activations` lets them. There is no second derivative.

    Raises TypeError or ValueError with the argument's name, what was got and what was wanted.

    Source: Song et al. 2024, arXiv 2406.05955 (the product of two ReLUs, dReLU).
    """
    options: dict[str, Any] = {
        "ste": ste, "rounding": rounding, "alpha_grad": alpha_grad, "alpha_scale": alpha_scale,
        "channel_dim": channel_dim,
    }  # fmt: skip
    linears = {
        "gate_weight": gate_weight, "gate_bias": gate_bias, "up_weight": up_weight, "up_bias": up_bias,
        "down_weight": down_weight, "down_bias": down_bias,
    }  # fmt: skip
    out = _as_one(x, linears, {"gate_alpha": gate_alpha, "up_alpha": up_alpha}, bits, **options)
    if out is not None:
        return out
    with packed_activations():
        gate = qrelu(F.linear(x, gate_weight, gate_bias), gate_alpha, bits, **options)
        up = qrelu(F.linear(x, up_weight, up_bias), up_alpha, bits, **options)
        return F.linear(product_of(gate, up), down_weight, down_bias)


def product_of(gate: Tensor, up: Tensor) -> Tensor:
    """Of two activations, saved as their codes unless they are nested or sharded."""
    if gate.is_nested or is_dtensor(gate):
        return gate * up
    return gated_product(gate, up, "identity")


def _as_one(
    x: Tensor,
    linears: Mapping[str, Tensor | None],
    alphas: Mapping[str, Tensor | float],
    bits: int,
    squared: bool = False,
    *,
    ste: SteName,
    rounding: RoundingName,
    alpha_grad: AlphaGradName,
    alpha_scale: AlphaScale,
    channel_dim: int | None,
) -> Tensor | None:
    """None where the layers have to run one after the other."""
    if not isinstance(x, Tensor) or x.is_nested or is_dtensor(x) or channel_dim is not None:
        return None
    steps = {}
    for name, alpha in alphas.items():
        try:
            steps[name] = _checked(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim)[0]
        except (TypeError, ValueError) as error:
            raise _named(error, name) from None
    if not keeps_codes_alone(ste, *steps.values()):
        return None
    try:
        return mlp(x, linears, list(steps.values()), bits, ste, rounding, squared)
    except Exception:
        for name, step in steps.items():
            if wrong := _wrong_argument(x, step, bits, rounding, channel_dim):
                raise _named(wrong, name) from None
        raise


def _named(error: Exception, name: str) -> Exception:
    """An error of alpha, by the name that the argument has here."""
    return type(error)(re.sub("^alpha ", f"{name} ", str(error)))
