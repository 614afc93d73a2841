"""Linear, QReLU, Linear as one op, also with a product of two QReLUs between the Linears: on a GPU by Triton's matrix
products, which write and read codes; elsewhere by the ops of each. What is saved is x and codes, never an activation or
what it is of."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _ops
from ._autograd import Settings, backward_from_saved, needs_grad, refuse_forward_mode
from ._checks import check_packed
from ._fused import _rows
from ._torch_internals import below_autograd, in_functorch_kernel, unsafe_view
from ._types import BUILT_IN, CODE_WIDTH, MASK_WIDTH, AlphaGrad, MaskKind, Rounding, Ste, packed_bytes, parse
from .ste import codes_give, ste_of

# The kernels per device, which these serve elsewhere. Rows are those of x, flattened; hidden: features between the
# Linears. y is what the last Linear reads: dequantize(codes), its square, or the product of two, each with its alpha.
KERNELS = (
    "linear_to_codes",
    "linear_from_codes",
    "linear_from_codes_grad_input",
    "linear_from_codes_grad_weight",
)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.size(1) != weight.size(1):
        raise ValueError(f"weight must be [hidden, {x.size(-1)}] for x {list(x.shape)}, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.size(0)}], got {list(bias.shape)}")


def check_codes(codes: Sequence[Tensor], bits: int, rows: int, hidden: int, device: torch.device) -> None:
    for each in codes:
        check_packed(each, "codes", rows * hidden, CODE_WIDTH[bits], device)


def linear_to_codes(
    x: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor, bits: int, rounding: int, mask: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, mask, nan_rows) of h = F.linear(x, weight, bias). A code cannot be NaN: nan_rows, [rows] in float32, is
    where h has one, and 0 elsewhere."""
    check_linear(x, weight, bias)
    h = F.linear(x, weight, bias)
    _, packed_mask, codes = _ops.ops.qrelu_forward.default(h, alpha, bits, rounding, mask, True, None)
    return codes, packed_mask, torch.where(h.isnan().any(1), torch.nan, 0.0).float()


def linear_from_codes(
    codes: Sequence[Tensor], nan_rows: Tensor, alphas: Sequence[Tensor], bits: int, squared: bool, weight: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """F.linear(y, weight, bias); NaN in the rows of which nan_rows is."""
    y = _rebuilt(codes, alphas, bits, squared, nan_rows.numel(), weight.size(1), weight.dtype)
    out = F.linear(y, weight, bias)
    return torch.where(nan_rows.isnan()[:, None], nan_rows[:, None].to(out.dtype), out)


def linear_from_codes_grad_input(
    grad_out: Tensor, weight: Tensor, masks: Sequence[Tensor], codes: Sequence[Tensor], alphas: Sequence[Tensor],
    bits: int, squared: bool, ste: int, rounding: int,
) -> list[Tensor]:  # fmt: skip
    """The gradients of what the codes are of: grad_out @ weight, times the other factor of a product, or
    2 * dequantize(codes) for a square, through the gate of the STE. masks, or else codes: what gates are read from.
    codes: given if they are read."""
    grad_y = grad_out @ weight
    grads = [grad_y for _ in alphas]
    if squared or len(alphas) > 1:
        levels = [_rebuilt([c], [alpha], bits, False, *grad_y.shape, grad_y.dtype) for c, alpha in zip(codes, alphas)]
        grads = [grad_y * (2 * levels[0])] if squared else [grad_y * other for other in reversed(levels)]
    settings = Settings.of(bits, Ste(ste).name, rounding, AlphaGrad.three_valued, 1.0, None, True)
    gates: Sequence[Tensor | None] = [None] * len(grads)
    if gates_are_in_codes(masks, ste):
        settings, gates = settings.reading_codes(), codes
    return [
        backward_from_saved(grad, None, None, mask, gate, settings, torch.contiguous_format)[0]
        for grad, mask, gate in zip(grads, masks or [None] * len(grads), gates)
    ]


def gates_are_in_codes(masks: Sequence[Tensor], ste: int) -> bool:
    return not masks and ste != Ste.identity


def linear_from_codes_grad_weight(
    grad_out: Tensor, codes: Sequence[Tensor], alphas: Sequence[Tensor], bits: int, squared: bool, hidden: int
) -> Tensor:
    """grad_out.T @ y."""
    return grad_out.t() @ _rebuilt(codes, alphas, bits, squared, grad_out.size(0), hidden, grad_out.dtype)


def _rebuilt(
    codes: Sequence[Tensor], alphas: Sequence[Tensor], bits: int, squared: bool, rows: int, hidden: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y"""
    shape = (rows, hidden)
    y = functools.reduce(torch.mul, (
        _ops.ops.dequantize.default(each, alpha, bits, shape, dtype, None, torch.contiguous_format)
        for each, alpha in zip(codes, alphas)
    ))  # fmt: skip
    return y.square() if squared else y


for _name in KERNELS:
    _ops._library.impl(_name, globals()[_name], "CompositeExplicitAutograd")


@_ops._fake("linear_to_codes")
def _(x, weight, bias, alpha, bits, rounding, mask):
    check_linear(x, weight, bias)
    count, widths = x.size(0) * weight.size(0), (CODE_WIDTH[bits], MASK_WIDTH[MaskKind(mask)])
    codes, packed_mask = (x.new_empty(packed_bytes(count, width), dtype=torch.uint8) for width in widths)
    return codes, packed_mask, x.new_empty(x.size(0), dtype=torch.float32)


@_ops._fake("linear_from_codes")
def _(codes, nan_rows, alphas, bits, squared, weight, bias):
    return weight.new_empty(nan_rows.size(0), weight.size(0))


@_ops._fake("linear_from_codes_grad_input")
def _(grad_out, weight, masks, codes, alphas, *_):
    return [grad_out.new_empty(grad_out.size(0), weight.size(1)) for _ in alphas]


@_ops._fake("linear_from_codes_grad_weight")
def _(grad_out, codes, alphas, bits, squared, hidden):
    return grad_out.new_empty(grad_out.size(1), hidden)


# ------------------------------------------------------------------------------------------- qrelu_mlp

# A branch is a Linear and the alpha of the QReLU behind it: (weight, bias, alpha). With two of them the last Linear
# reads the product of both QReLUs.
_Branch = tuple[Tensor, Tensor | None, Tensor]


def _shaped(out: Tensor, x: Tensor) -> Tensor:
    """Rows of the output in the shape of x's. As of a Linear it is no view, on which FSDP2 warns."""
    return unsafe_view(out, [*x.shape[:-1], out.size(1)])


def _encoded(x: Tensor, branches: Sequence[_Branch], bits: int, rounding: int, kind: int) -> tuple:
    """(codes, masks, nan_rows) of rows x by all branches."""
    codes, masks, nan_rows = zip(*(
        _ops.ops.linear_to_codes.default(x, *branch, bits, rounding, kind) for branch in branches
    ))  # fmt: skip
    return codes, masks, functools.reduce(torch.add, nan_rows)


class _QReLUMLP(torch.autograd.Function):
    """needs: whether x, weight and bias, the last Linear's, and the weights and biases of the branches require grad."""

    @staticmethod
    def forward(ctx, x, weight, bias, settings, squared, needs, *flat):
        branches = [flat[i : i + 3] for i in range(0, len(flat), 3)]
        need_x, need_weight, need_bias, *need_branches = needs
        need_h = need_x or any(need_branches)
        kind = settings._replace(need_grad_x=need_h).saved().mask
        # The codes are kept for the gradients of the weight and of a product, or they replace the mask.
        in_codes = need_h and codes_give(kind, settings.rounding)
        if in_codes:
            kind = MaskKind.nothing.value
        alphas = [alpha for *_, alpha in branches]
        codes, masks, nan_rows = _encoded(_rows(x), branches, settings.bits, settings.rounding, kind)
        out = _ops.ops.linear_from_codes.default(codes, nan_rows, alphas, settings.bits, squared, weight, bias)
        ctx.settings, ctx.squared, ctx.needs, ctx.shape, ctx.hidden = settings, squared, needs, x.shape, weight.size(1)
        ctx.reads_codes = need_h and (in_codes or squared or len(branches) > 1)
        ctx.has_masks = kind != MaskKind.nothing
        ctx.save_for_backward(
            x if any(need_branches[::2]) else None,
            weight if need_h else None,
            *(branch[0] if need_x else None for branch in branches),
            *alphas,
            *(codes if need_weight or ctx.reads_codes else ()),
            *(masks if ctx.has_masks else ()),
        )
        return _shaped(out, x)

    @staticmethod
    def backward(ctx, grad_out):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "qrelu_mlp and qrelu_gated_mlp have no second derivative; use qrelu and the layers one after the other"
            )
        need_x, need_weight, need_bias, *need_branches = ctx.needs
        count = len(need_branches) // 2
        x, weight, *saved = ctx.saved_tensors
        weights, alphas, *packed = (saved[i : i + count] for i in range(0, len(saved), count))
        masks = packed.pop() if ctx.has_masks else []
        codes = packed.pop() if packed else []
        settings, rows = ctx.settings, _rows(grad_out)
        grad_x = grad_weight = grad_bias = None
        grad_branches: list[Tensor | None] = [None] * (3 * count)
        if need_x or any(need_branches):
            grads = _ops.ops.linear_from_codes_grad_input.default(
                rows,
                weight,
                masks,
                codes if ctx.reads_codes else [],
                alphas,
                settings.bits,
                ctx.squared,
                settings.ste,
                settings.rounding,
            )
            if need_x:
                grad_x = functools.reduce(torch.add, map(torch.mm, grads, weights)).view(ctx.shape)
            for i, grad_h in enumerate(grads):
                if need_branches[2 * i]:
                    grad_branches[3 * i] = grad_h.t() @ _rows(x)
                if need_branches[2 * i + 1]:
                    grad_branches[3 * i + 1] = grad_h.sum(0)
        if need_weight:
            grad_weight = _ops.ops.linear_from_codes_grad_weight.default(
                rows, codes, alphas, settings.bits, ctx.squared, ctx.hidden
            )
        if need_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None, *grad_branches


def _one_after_the_other(x, weight1, bias1, alpha, weight2, bias2, bits, ste, rounding, squared, *up):
    y = functools.reduce(torch.mul, (
        _ops.ops.qrelu.default(F.linear(x, w, b), each, bits, ste, rounding, "three_valued", 1.0, None)
        for w, b, each in _branches(weight1, bias1, alpha, *up)
    ))  # fmt: skip
    return F.linear(y.square() if squared else y, weight2, bias2)


def _branches(weight, bias, alpha, up_weight=None, up_bias=None, up_alpha=None) -> list[_Branch]:
    return [(weight, bias, alpha)] + ([] if up_weight is None else [(up_weight, up_bias, up_alpha)])


def _without_grad(x, weight1, bias1, alpha, weight2, bias2, bits, ste, rounding, squared, *up):
    if x.device.type == "cpu":  # where codes would only be packed to be unpacked
        return _one_after_the_other(x, weight1, bias1, alpha, weight2, bias2, bits, ste, rounding, squared, *up)
    branches = _branches(weight1, bias1, alpha, *up)
    alphas = [each for *_, each in branches]
    rounding = parse("rounding", rounding, Rounding).value
    codes, _, nan_rows = _encoded(_rows(x), branches, bits, rounding, MaskKind.nothing.value)
    return _shaped(_ops.ops.linear_from_codes.default(codes, nan_rows, alphas, bits, squared, weight2, bias2), x)


def _autograd_kernel(x, weight1, bias1, alpha, weight2, bias2, bits, ste, rounding, squared, *up):
    given = (x, weight1, bias1, alpha, weight2, bias2, bits, ste, rounding, squared, *up)
    if in_functorch_kernel():  # which promises nothing about saved tensors
        return _one_after_the_other(*given)
    flat = [t for branch in _branches(weight1, bias1, alpha, *up) for t in branch]
    refuse_forward_mode(x, weight2, bias2, *flat, op="qrelu_mlp" if len(flat) == 3 else "qrelu_gated_mlp")
    needs = needs_grad(x, weight2, bias2, *(t for i in range(0, len(flat), 3) for t in flat[i : i + 2]))
    if not any(needs):
        with below_autograd():
            return _without_grad(*given)
    settings = Settings.of(bits, ste, rounding, AlphaGrad.three_valued.value, 1.0, None)
    return _QReLUMLP.apply(x, weight2, bias2, settings, squared, needs, *flat)


_ops._library.impl("qrelu_mlp", _without_grad, "CompositeExplicitAutograd")
_ops._library.impl("qrelu_mlp", _autograd_kernel, "Autograd")
_ops._fake("qrelu_mlp")(_without_grad)
_ops._library.impl("qrelu_mlp", _one_after_the_other, "FuncTorchBatched")


def keeps_codes_alone(ste: str, *alphas: Tensor) -> bool:
    """Whether codes and a bit are all that the gradients of a chain need: a gate that is open or closed, and a fixed
    alpha."""
    gates = ("nothing", "positive", "inside", "near")
    return ste in BUILT_IN and ste_of(ste).needs in gates and not any(alpha.requires_grad for alpha in alphas)


def mlp(
    x: Tensor, linears: Mapping[str, Tensor | None], alphas: Sequence[Tensor], bits: int, ste: str, rounding: str,
    squared: bool = False,
) -> Tensor:  # fmt: skip
    """qrelu_mlp in the dtype of autocast, if it is on. linears: weights and biases by their names, in turns; those of
    the last Linear are last."""
    if not torch.jit.is_tracing():  # in which sizes are tensors
        _check_shapes(x, linears)
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        linears = {name: t if t is None or t.dtype == torch.float64 else t.to(dtype) for name, t in linears.items()}
        x = x.to(dtype)
    for name, t in linears.items():
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype}, as x, got {t.dtype}")
    weight1, bias1, *up, weight2, bias2 = linears.values()
    return _ops.ops.qrelu_mlp.default(
        x, weight1, bias1, alphas[0], weight2, bias2, bits, ste, rounding, squared, *up, *alphas[1:]
    )


def _check_shapes(x: Tensor, linears: Mapping[str, Tensor | None]) -> None:
    """Of codes only bytes are known, which may be as many for other shapes."""
    names = list(linears)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got none")
    inputs, hidden, wanted = x.size(-1), None, "hidden"
    for weight_name, bias_name in zip(names[::2], names[1::2]):
        weight, bias = linears[weight_name], linears[bias_name]
        for name, t in ((weight_name, weight), (bias_name, bias)):
            if not isinstance(t, Tensor) and (t is not None or name == weight_name):
                raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
        if weight_name == names[-2]:
            inputs, hidden, wanted = hidden, None, "out_features"
        if weight.dim() != 2 or weight.size(1) != inputs or (hidden is not None and weight.size(0) != hidden):
            wanted = wanted if hidden is None else str(hidden)
            raise ValueError(f"{weight_name} must be [{wanted}, {inputs}], got {list(weight.shape)}")
        hidden = weight.size(0)
        if bias is not None and (bias.dim() != 1 or bias.size(0) != hidden):
            raise ValueError(f"{bias_name} must be [{hidden}], got {list(bias.shape)}")
