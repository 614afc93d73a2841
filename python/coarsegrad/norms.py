"""A norm and the signed staircase after it in one pass, with the norm's gradient taken from few saved bits.

    n = (x - m) * r                 m: the mean of a row, 0 for RMSNorm;  r: 1 / sqrt(mean((x - m)**2) + eps)
    y = Q(n * weight + bias)

    dn = dy * weight
    dx = r * (dn - mean(dn) - n * mean(dn * n))                    without mean(dn) for RMSNorm
    dweight = sum(dy * n),  dbias = sum(dy)

"exact" saves x and computes n from it. "coarse" takes n at the output, n = (y - bias) / weight, so that y's codes and
one number per row are all that is saved: a coarse gradient in the sense of arXiv 1903.05662, as the derivative of Q is
replaced by 1, and the Jacobian of the norm evaluated at the rounded n.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _ops
from ._autograd import needs_grad
from ._checks import check_norm, check_option
from ._torch_internals import functorch_active
from ._types import wide_dtype
from .packing import active_packing, packs_graph, record_codes
from .signed import QSigned

_hadamard = _ops.ops.hadamard.default  # below the checks, which torch.compile refuses in a backward

NormKind: TypeAlias = Literal["rms", "layer"]
NormGradient: TypeAlias = Literal["exact", "coarse"]


class Formula(NamedTuple):
    """What a norm computes; see `norm_staircase`."""

    kind: NormKind
    eps: float
    shifted: bool = False
    rounds_twice: bool = False

    @property
    def centred(self) -> bool:
        return self.kind == "layer"


class Pass(NamedTuple):
    """What one pass over x made: the results of the op `norm_qsigned`."""

    output: Tensor
    y: Tensor
    codes: Tensor
    alpha: Tensor
    mean: Tensor
    inverse: Tensor


def norm_staircase(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: NormKind,
    gradient: NormGradient,
    staircase: QSigned,
    shifted: bool = False,
    rounds_twice: bool = False,
) -> Tensor:
    """A norm and the staircase of its output, in one pass over x, with the derivative of both.

        y = Q((x - m) * r * weight + bias),  m = mean(x), 0 for "rms";  r = 1 / sqrt(mean((x - m)**2) + eps)

    x: the norm's input, [..., n], of any floating dtype and strides; the norm is over the last dimension.
    weight, bias: [n], of any floating dtype, or None.
    eps: a number, added to the mean of the squares.
    kind: "rms" (as nn.RMSNorm) or "layer" (as nn.LayerNorm).
    gradient: "exact": that of the norm. "coarse": the norm's Jacobian at the output of the staircase.
    staircase: a `QSigned` with a dynamic alpha.
    shifted: multiply by 1 + weight, as Gemma does.
    rounds_twice: round to x's dtype before the product with weight too, as Llama does; else once, at the end.

    Returns y, in x's dtype, contiguous. It is the staircase of the norm that docs/spec.md specifies to the bit, the
    same on every backend; the order of sums, and so the last bit, may not be that of a module of torch.

    Saved for backward: "exact": x and two numbers per row (one for "rms"). "coarse": the codes of y, 16 / group bits
    per element, and a number per row. Inside `packed_activations` the layers that read y share its codes. There is no
    second and no forward-mode derivative, and no support for transforms of torch.func.

    Raises TypeError or ValueError with the argument's name, what was got and what was wanted.

    Sources: Zhang and Sennrich 2019, arXiv 1910.07467 (RMSNorm); Ba et al. 2016, arXiv 1607.06450 (LayerNorm).
    """
    check_option("kind", kind, get_args(NormKind))
    check_option("gradient", gradient, get_args(NormGradient))
    if not isinstance(staircase, QSigned) or staircase.alpha is not None:
        raise ValueError(f"staircase must be a QSigned with a dynamic alpha, got {staircase!r}")
    check_norm(x, weight, bias, staircase.bits, staircase.group, staircase.rotation, False)
    formula = Formula(kind, float(eps), bool(shifted), bool(rounds_twice))
    return staircased(x, weight, bias, formula, gradient, staircase)


def staircased(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    formula: Formula,
    gradient: NormGradient,
    staircase: QSigned,
    made: Pass | None = None,
) -> Tensor:
    """`norm_staircase` of checked arguments. made: the pass that was made with them, for this use alone."""
    _refuse_transforms()
    keeps = keeps_codes(x, weight, bias, gradient)
    if made is None and not torch.compiler.is_compiling():
        made = one_pass(x, weight, bias, formula, staircase, codes=keeps)
    function = _FromX if gradient == "exact" else _Coarse
    y = function.apply(x, weight, bias, formula, staircase, keeps, made)
    if made is not None:
        record_codes(y, made.codes, made.alpha, staircase.bits, staircase.group or x.size(-1))
    return y


def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, formula: Formula, made: Pass | None = None) -> Tensor:
    """The norm's own output, which saves x and what "exact" saves with it. made: a pass that has it."""
    _refuse_transforms()
    if made is None and not torch.compiler.is_compiling():
        made = one_pass(x, weight, bias, formula, output=True)
    return _FromX.apply(x, weight, bias, formula, None, False, made)


def keeps_codes(x: Tensor, weight: Tensor | None, bias: Tensor | None, gradient: NormGradient) -> bool:
    """Whether the codes of the staircase have a reader."""
    return active_packing() is not None or (gradient == "coarse" and any(needs_grad(x, weight, bias)))


@torch.no_grad()
def one_pass(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    formula: Formula,
    staircase: QSigned | None = None,
    *,
    output: bool = False,
    codes: bool = False,
) -> Pass:
    """The norm, and its staircase unless None, without derivative. output: whether to return the norm's own output."""
    packs = torch.compiler.is_compiling() and staircase is not None and packs_graph()
    op: Any = _ops.ops.norm_qsigned_packed if packs else _ops.ops.norm_qsigned
    settings: tuple = (None, None, None)
    if staircase is not None:
        settings = staircase.bits, staircase.group or x.size(-1), staircase.rotation
    norm = (formula.eps, formula.centred, formula.shifted, formula.rounds_twice)
    return Pass(*op.default(x, weight, bias, *norm, *settings, output, codes))


def _refuse_transforms() -> None:
    if not torch.compiler.is_compiling() and functorch_active():
        raise NotImplementedError(
            "norm_staircase does not support transforms of torch.func such as grad and vmap; use a norm and qsigned"
        )


def _factors(weight: Tensor, shifted: bool, dtype: torch.dtype) -> Tensor:
    """What n is multiplied by, wide."""
    return weight.to(dtype) + 1 if shifted else weight.to(dtype)


def _gradients(grad_y: Tensor, n: Tensor, inverse: Tensor, factors: Tensor | None, centred: bool, needs) -> tuple:
    """(dx, dweight, dbias) from dy, n, 1 / the deviation and what n is multiplied by, all wide. needs: of x, weight and
    bias."""
    need_x, need_weight, need_bias = needs
    rows = tuple(range(grad_y.dim() - 1))
    grad_x = grad_weight = grad_bias = None
    if need_x:
        grad_n = grad_y if factors is None else grad_y * factors
        inner = grad_n - n * (grad_n * n).mean(-1, keepdim=True)
        grad_x = inverse * (inner - grad_n.mean(-1, keepdim=True) if centred else inner)
    if need_weight:
        grad_weight = (grad_y * n).sum(rows)
    if need_bias:
        grad_bias = grad_y.sum(rows)
    return grad_x, grad_weight, grad_bias


class _Norm(torch.autograd.Function):
    """n is what the subclasses find it by; the rest is the same.

    made is None in graphs of torch.compile, which have the op inside this node.
    """

    @staticmethod
    def _start(ctx, x, weight, bias, formula, staircase) -> None:
        ctx.formula, ctx.rotation, ctx.dtype = formula, None if staircase is None else staircase.rotation, x.dtype
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, weight, bias))

    @staticmethod
    def _backward(ctx, grad_y, n, inverse, factors):
        if ctx.rotation is not None:
            grad_y = _hadamard(grad_y, ctx.rotation)
        grads = _gradients(grad_y.to(n.dtype), n, inverse, factors, ctx.formula.centred, ctx.needs_input_grad[:3])
        return *(None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes)), None, None, None, None


class _FromX(_Norm):
    """Saves x. Without a staircase it is the norm's own output."""

    @staticmethod
    def forward(ctx, x, weight, bias, formula, staircase, codes, made):
        if made is None:
            made = one_pass(x, weight, bias, formula, staircase, output=staircase is None, codes=codes)
        _Norm._start(ctx, x, weight, bias, formula, staircase)
        ctx.save_for_backward(x, made.mean if formula.centred else None, made.inverse, weight)
        return made.output if staircase is None else made.y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, mean, inverse, weight = ctx.saved_tensors
        wide = x.to(inverse.dtype)
        n = (wide if mean is None else wide - mean) * inverse
        factors = None if weight is None else _factors(weight, ctx.formula.shifted, n.dtype)
        return _Norm._backward(ctx, grad_y, n, inverse, factors)


class _Coarse(_Norm):
    @staticmethod
    def forward(ctx, x, weight, bias, formula, staircase, codes, made):
        made = one_pass(x, weight, bias, formula, staircase, codes=codes) if made is None else made
        _Norm._start(ctx, x, weight, bias, formula, staircase)
        ctx.settings, ctx.shape = (staircase.bits, staircase.group or x.size(-1)), x.shape
        ctx.save_for_backward(made.codes, made.alpha, made.inverse, weight, bias)
        return made.y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        codes, alpha, inverse, weight, bias = ctx.saved_tensors
        output = (*ctx.settings, ctx.shape, ctx.dtype, None, torch.contiguous_format)
        n = _ops.ops.qsigned_dequantize.default(codes, alpha, *output).to(wide_dtype(ctx.dtype))
        if ctx.rotation is not None:
            n = _hadamard(n, ctx.rotation)
        if bias is not None:
            n = n - bias.to(n.dtype)
        factors = None if weight is None else _factors(weight, ctx.formula.shifted, n.dtype)
        if factors is not None:  # a channel of factor 0 does not reach y
            n = torch.where(factors == 0, 0.0, n / factors)
        return _Norm._backward(ctx, grad_y, n, inverse, factors)
