"""coarsegrad's ops for a plain `torch.onnx.export`, which shows a translation no tensor's value."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from .._ops import ops
from .._types import Rounding, top_level
from .packages import check_packages


def onnx_translations() -> dict[Callable, Callable]:
    """The staircases of models with float weights, in the form "qdq" of `export_onnx`, for torch's own exporter:

        torch.onnx.export(model, inputs, path, dynamo=True, custom_translation_table=coarsegrad.onnx_translations())

    A signed staircase needs an alpha that is not dynamic. coarsegrad's other ops, such as those of a converted model,
    need values that torch does not show here: `export_onnx` has them.

    Raises ImportError if the packages onnx and onnxscript are not installed.
    """
    check_packages()
    return {
        ops.qrelu.default: _qrelu,
        ops.qrelu_forward.default: _qrelu_forward,
        ops.qsigned_forward.default: _qsigned_forward,
    }


# torch reads these functions' signatures, and calls them with ONNX values. QuantizeLinear reads float32 in every opset.
# Cast and Mul are in the place of a DequantizeLinear for the reason that nodes.py gives.


def _qrelu_forward(
    x: Any,
    alpha: Any,
    bits: int,
    rounding: int,
    mask: int,
    codes: bool,
    channel_dim: int | None = None,
) -> Sequence[Any]:
    op, onnx = importlib.import_module("onnxscript").opset18, importlib.import_module("onnx")
    floats, alpha = op.Cast(x, to=onnx.TensorProto.FLOAT), op.Cast(alpha, to=onnx.TensorProto.FLOAT)
    alpha, wide, axis = _alphas(op, x, alpha, channel_dim)
    moved = op.Add(floats, op.Mul(wide, 0.5)) if rounding == Rounding.ceil else floats
    zeros = op.Cast(op.Sub(alpha, alpha), to=onnx.TensorProto.UINT8)
    numbers = op.QuantizeLinear(moved, alpha, zeros, **axis)
    if rounding == Rounding.hwgq:
        numbers = op.Max(numbers, op.Cast(op.Greater(floats, 0.0), to=onnx.TensorProto.UINT8))
    numbers = op.Min(numbers, op.Cast(2**bits - 1, to=onnx.TensorProto.UINT8))
    y = op.CastLike(op.Mul(op.Cast(numbers, to=onnx.TensorProto.FLOAT), wide), x)
    return y, *_nothing(op, onnx, 2)


def _qrelu(
    x: Any,
    alpha: Any,
    bits: int,
    ste: str,
    rounding: str,
    alpha_grad: str,
    alpha_scale: float,
    channel_dim: int | None = None,
) -> Any:
    """In the ops that are a staircase and a layer, which torch takes apart so far."""
    return _qrelu_forward(x, alpha, bits, Rounding[rounding], 0, False, channel_dim)[0]


def _qsigned_forward(
    x: Any,
    alpha: Any,
    bits: int,
    group: int | None,
    mask: bool,
    codes: bool,
    channel_dim: int | None = None,
) -> Sequence[Any]:
    if alpha is None:
        raise ValueError("a signed staircase with dynamic alphas has no ONNX form: give it an alpha")
    op, onnx = importlib.import_module("onnxscript").opset18, importlib.import_module("onnx")
    alpha, wide, axis = _alphas(op, x, op.Cast(alpha, to=onnx.TensorProto.FLOAT), channel_dim)
    zeros = op.Cast(op.Sub(alpha, alpha), to=onnx.TensorProto.INT8)
    numbers = op.QuantizeLinear(op.Cast(x, to=onnx.TensorProto.FLOAT), alpha, zeros, **axis)
    p = top_level(bits)
    for clip, end in ((op.Max, -p), (op.Min, p)):
        numbers = clip(numbers, op.Cast(end, to=onnx.TensorProto.INT8))
    y = op.CastLike(op.Mul(op.Cast(numbers, to=onnx.TensorProto.FLOAT), wide), x)
    return y, *_nothing(op, onnx, 3)


def _alphas(op: Any, x: Any, alpha: Any, channel_dim: int | None) -> tuple[Any, Any, dict[str, int]]:
    """(alpha as QuantizeLinear takes it, as it broadcasts, the axis)."""
    if channel_dim is None:
        scalar = op.Squeeze(alpha)
        return scalar, scalar, {}
    rank = len(x.shape)
    shape = [1] * rank
    shape[channel_dim] = -1
    return alpha, op.Reshape(alpha, shape), {"axis": channel_dim % rank}


def _nothing(op: Any, onnx: Any, count: int) -> list[Any]:
    """In the place of what is saved for backward."""
    return [
        op.Constant(value=onnx.helper.make_tensor("nothing", onnx.TensorProto.UINT8, [0], [])) for _ in range(count)
    ]
