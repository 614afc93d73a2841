"""Linear, QReLU, Linear as one op: on a GPU by Triton's matrix products, which write and read codes; elsewhere by the
ops of each. What is saved is x and codes, never the activation or what it is of."""

from __future__ import annotations

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
# Linears.
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


def check_codes(codes: Tensor | None, bits: int, rows: int, hidden: int, device: torch.device) -> None:
    check_packed(codes, "codes", rows * hidden, CODE_WIDTH[bits], device)


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
    codes: Tensor, nan_rows: Tensor, alpha: Tensor, bits: int, squared: bool, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """F.linear(y, weight, bias), y = dequantize(codes) or its square; NaN in the rows of which nan_rows is."""
    y = _rebuilt(codes, alpha, bits, squared, nan_rows.numel(), weight.size(1), weight.dtype)
    out = F.linear(y, weight, bias)
    return torch.where(nan_rows.isnan()[:, None], nan_rows[:, None].to(out.dtype), out)


def linear_from_codes_grad_input(
    grad_out: Tensor, weight: Tensor, mask: Tensor | None, codes: Tensor | None, alpha: Tensor, bits: int,
    squared: bool, ste: int, rounding: int,
) -> Tensor:  # fmt: skip
    """grad_out @ weight, times 2 * dequantize(codes) if squared, through the gate of the STE. codes: given if squared,
    or if the gate is read from them."""
    grad_y = grad_out @ weight
    if squared:
        grad_y = grad_y * (2 * _rebuilt(codes, alpha, bits, False, *grad_y.shape, grad_y.dtype))
    settings, gate = Settings.of(bits, Ste(ste).name, rounding, AlphaGrad.three_valued, 1.0, None, True), None
    if gate_is_in_codes(mask, ste):
        settings, gate = settings.reading_codes(), codes
    return backward_from_saved(grad_y, None, None, mask, gate, settings, torch.contiguous_format)[0]


def gate_is_in_codes(mask: Tensor | None, ste: int) -> bool:
    return mask is None and ste != Ste.identity


def linear_from_codes_grad_weight(
    grad_out: Tensor, codes: Tensor, alpha: Tensor, bits: int, squared: bool, hidden: int
) -> Tensor:
    """grad_out.T @ y, y as in `linear_from_codes`."""
    return grad_out.t() @ _rebuilt(codes, alpha, bits, squared, grad_out.size(0), hidden, grad_out.dtype)


def _rebuilt(
    codes: Tensor, alpha: Tensor, bits: int, squared: bool, rows: int, hidden: int, dtype: torch.dtype
) -> Tensor:
    shape = (rows, hidden)
    y = _ops.ops.dequantize.default(codes, alpha, bits, shape, dtype, None, torch.contiguous_format)
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
def _(codes, nan_rows, alpha, bits, squared, weight, bias):
    return weight.new_empty(nan_rows.size(0), weight.size(0))


@_ops._fake("linear_from_codes_grad_input")
def _(grad_out, weight, *_):
    return grad_out.new_empty(grad_out.size(0), weight.size(1))


@_ops._fake("linear_from_codes_grad_weight")
def _(grad_out, codes, alpha, bits, squared, hidden):
    return grad_out.new_empty(grad_out.size(1), hidden)


# ------------------------------------------------------------------------------------------- qrelu_mlp


def _shaped(out: Tensor, x: Tensor) -> Tensor:
    """Rows of the output in the shape of x's. As of a Linear it is no view, on which FSDP2 warns."""
    return unsafe_view(out, [*x.shape[:-1], out.size(1)])


class _QReLUMLP(torch.autograd.Function):
    """needs: whether x, weight1, bias1, weight2 and bias2 require grad."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, alpha, weight2, bias2, settings, squared, needs):
        need_h = any(needs[:3])
        kind = settings._replace(need_grad_x=need_h).saved().mask
        # The codes are kept for the weight's gradient, or they replace the mask.
        reads_codes = need_h and codes_give(kind, settings.rounding)
        if reads_codes:
            kind = MaskKind.nothing.value
        rows, bits = _rows(x), settings.bits
        codes, mask, nan_rows = _ops.ops.linear_to_codes.default(
            rows, weight1, bias1, alpha, bits, settings.rounding, kind
        )
        out = _ops.ops.linear_from_codes.default(codes, nan_rows, alpha, bits, squared, weight2, bias2)
        ctx.settings, ctx.squared, ctx.needs, ctx.shape, ctx.hidden = settings, squared, needs, x.shape, weight1.size(0)
        ctx.reads_codes = need_h and (reads_codes or squared)
        ctx.save_for_backward(
            x if needs[1] else None,
            weight1 if needs[0] else None,
            weight2 if need_h else None,
            alpha,
            codes if needs[3] or ctx.reads_codes else None,
            mask if kind != MaskKind.nothing else None,
        )
        return _shaped(out, x)

    @staticmethod
    def backward(ctx, grad_out):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "qrelu_mlp has no second derivative; use qrelu and the layers one after the other"
            )
        x, weight1, weight2, alpha, codes, mask = ctx.saved_tensors
        settings = ctx.settings
        need_x, need_weight1, need_bias1, need_weight2, need_bias2 = ctx.needs
        rows = _rows(grad_out)
        grad_x = grad_weight1 = grad_bias1 = grad_weight2 = grad_bias2 = None
        if need_x or need_weight1 or need_bias1:
            grad_h = _ops.ops.linear_from_codes_grad_input.default(
                rows,
                weight2,
                mask,
                codes if ctx.reads_codes else None,
                alpha,
                settings.bits,
                ctx.squared,
                settings.ste,
                settings.rounding,
            )
            if need_x:
                grad_x = (grad_h @ weight1).view(ctx.shape)
            if need_weight1:
                grad_weight1 = grad_h.t() @ _rows(x)
            if need_bias1:
                grad_bias1 = grad_h.sum(0)
        if need_weight2:
            grad_weight2 = _ops.ops.linear_from_codes_grad_weight.default(
                rows, codes, alpha, settings.bits, ctx.squared, ctx.hidden
            )
        if need_bias2:
            grad_bias2 = rows.sum(0)
        return grad_x, grad_weight1, grad_bias1, None, grad_weight2, grad_bias2, None, None, None


def _one_after_the_other(x, weight1, bias1, alpha, weight2, bias2, bits, ste, rounding, squared):
    h = F.linear(x, weight1, bias1)
    y = _ops.ops.qrelu.default(h, alpha, bits, ste, rounding, "three_valued", 1.0, None)
    return F.linear(y.square() if squared else y, weight2, bias2)


def _without_grad(x, weight1, bias1, alpha, weight2, bias2, bits, ste, rounding, squared):
    if x.device.type == "cpu":  # where codes would only be packed to be unpacked
        return _one_after_the_other(x, weight1, bias1, alpha, weight2, bias2, bits, ste, rounding, squared)
    rounding = parse("rounding", rounding, Rounding).value
    codes, _, nan_rows = _ops.ops.linear_to_codes.default(
        _rows(x), weight1, bias1, alpha, bits, rounding, MaskKind.nothing.value
    )
    out = _ops.ops.linear_from_codes.default(codes, nan_rows, alpha, bits, squared, weight2, bias2)
    return _shaped(out, x)


def _autograd_kernel(x, weight1, bias1, alpha, weight2, bias2, bits, ste, rounding, squared):
    tensors = (x, weight1, bias1, alpha, weight2, bias2)
    if in_functorch_kernel():  # which promises nothing about saved tensors
        return _one_after_the_other(*tensors, bits, ste, rounding, squared)
    refuse_forward_mode(*tensors, op="qrelu_mlp")
    needs = needs_grad(x, weight1, bias1, weight2, bias2)
    if not any(needs):
        with below_autograd():
            return _without_grad(*tensors, bits, ste, rounding, squared)
    settings = Settings.of(bits, ste, rounding, AlphaGrad.three_valued.value, 1.0, None)
    return _QReLUMLP.apply(*tensors, settings, squared, needs)


_ops._library.impl("qrelu_mlp", _without_grad, "CompositeExplicitAutograd")
_ops._library.impl("qrelu_mlp", _autograd_kernel, "Autograd")
_ops._fake("qrelu_mlp")(_without_grad)
_ops._library.impl("qrelu_mlp", _one_after_the_other, "FuncTorchBatched")


def keeps_codes_alone(ste: str, alpha: Tensor) -> bool:
    """Whether codes and a bit are all that the gradients of a chain need: a gate that is open or closed, and a fixed
    alpha."""
    gates = ("nothing", "positive", "inside", "near")
    return ste in BUILT_IN and ste_of(ste).needs in gates and not alpha.requires_grad


def mlp(x, weight1, bias1, alpha, weight2, bias2, bits, ste, rounding, squared) -> Tensor:
    """qrelu_mlp in the dtype of autocast, if it is on."""
    tensors = [x, weight1, bias1, weight2, bias2]
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    for name, t in zip(("weight1", "bias1", "weight2", "bias2"), tensors[1:]):
        if t is not None and t.dtype != tensors[0].dtype:
            raise TypeError(f"{name} must be {tensors[0].dtype}, as x, got {t.dtype}")
    x, weight1, bias1, weight2, bias2 = tensors
    return _ops.ops.qrelu_mlp.default(x, weight1, bias1, alpha, weight2, bias2, bits, ste, rounding, squared)
