"""The form "qdq": the nodes that runtimes fuse to kernels on integers.

    codes = Min(QuantizeLinear(x + shift, alpha), q)                    uint8
    layer = Conv or Gemm of DequantizeLinear(codes, 1), DequantizeLinear(int8 weight), DequantizeLinear(int32 bias)

QuantizeLinear rounds half to even, and a staircase's stairs are closed on the right: `ceil` is `nearest` of
x + alpha / 2. The two differ where x is on a threshold. A layer's output is in units of the next alpha, and its shift
is in the bias. NaN has code 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .forms import Form, Staircase
from .nodes import Constants, Window, along, node
from .numbers import LayerNumbers
from .pooling import Cap


class _Codes(Constants):
    """x -> codes, from low on. hwgq: where x > 0 the code is at least 1."""

    def __init__(
        self, alpha: Tensor, shift: Tensor | None, axis: int | None, zero: int = 0, hwgq: bool = False
    ) -> None:
        dtype = torch.int8 if zero else torch.uint8
        low = torch.tensor(-zero, dtype=dtype) if zero else None
        zeros = torch.zeros_like(alpha, dtype=dtype)
        super().__init__(alpha=alpha, zeros=zeros, shift=shift, low=low)
        self.axis, self.hwgq = axis, hwgq

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        moved = x if self.shift is None else x + self.shift
        attributes = {} if self.axis is None else {"axis": self.axis}
        codes = node("QuantizeLinear", moved, self.alpha, self.zeros, like=moved, dtype=self.zeros.dtype, **attributes)
        if self.hwgq:
            codes = node("Max", codes, (x > 0).to(torch.uint8), like=codes)
        return codes if self.low is None else node("Max", codes, self.low, like=codes)


def _capped(codes: _Codes, top: int) -> nn.Sequential:
    """The codes up to top, of which a byte that is unsigned has 255 anyway."""
    return nn.Sequential(codes, *([Cap(torch.tensor(top, dtype=codes.zeros.dtype))] if top < 255 else []))


class _Layer(Constants):
    """codes -> (scale * (codes @ weight + bias)) in float32."""

    def __init__(self, numbers: LayerNumbers, window: Window | None, shift: float) -> None:
        weight, scale, bias = numbers.with_bias(shift)
        super().__init__(
            weight=weight if window is None else window.filters(weight),
            scale=scale,
            bias=bias,
            one=torch.tensor(1.0),
            code_zero=torch.tensor(0, dtype=torch.uint8),
            weight_zeros=torch.zeros_like(scale, dtype=torch.int8),  # without these onnxruntime fuses no Gemm
            bias_zeros=torch.zeros_like(scale, dtype=torch.int32),
        )
        self.window = window

    def forward(self, codes: Tensor) -> Tensor:
        if self.window is not None:
            shape = self.window.output_shape(codes, self.bias.size(0))
            return self._node("Conv", codes, shape, **self.window.attributes())
        rows = codes if codes.dim() == 2 else codes.reshape(-1, codes.size(-1))
        out = self._node("Gemm", rows, [rows.size(0), self.bias.size(0)], transB=1)
        return out if codes.dim() == 2 else out.reshape(*codes.shape[:-1], self.bias.size(0))

    def _node(self, op: str, codes: Tensor, shape: list, **attributes) -> Tensor:
        def real(t: Tensor, scale: Tensor, zeros: Tensor, **axis: int) -> Tensor:
            return node("DequantizeLinear", t, scale, zeros, like=t, dtype=torch.float32, **axis)

        inputs = (
            real(codes, self.one, self.code_zero),
            real(self.weight, self.scale, self.weight_zeros, axis=0),
            real(self.bias, self.scale, self.bias_zeros, axis=0),
        )
        return node(op, *inputs, dtype=torch.float32, shape=shape, **attributes)


class Qdq(Form):
    code_dtype = torch.uint8

    def shift(self, staircase: Staircase) -> Tensor | None:
        return staircase.alpha.float() / 2 if staircase.rounding == "ceil" else None

    def codes(self, staircase: Staircase) -> nn.Module:
        if staircase.dtype == torch.float64:
            raise ValueError("a staircase reads float64, which QuantizeLinear does not: form must be 'levels'")
        alpha, shift, dim = staircase.alpha.float(), self.shift(staircase), staircase.channel_dim
        if shift is not None:
            shift = along(shift, dim, staircase.rank)
        alpha = alpha.reshape(()) if dim is None else alpha
        codes = _Codes(alpha, shift, dim, staircase.zero, staircase.rounding == "hwgq")
        return _capped(codes, staircase.top - staircase.zero)

    def levels(self, staircase: Staircase) -> nn.Module:
        return nn.Sequential(self.codes(staircase), staircase.scaled(0))

    def layer(self, numbers: LayerNumbers, window: Window | None) -> nn.Module:
        if numbers.first is None:
            return _Layer(numbers, window, 0.0)
        codes = _Codes(torch.tensor(1.0), None, None, hwgq=numbers.stairs_shift())
        return nn.Sequential(_Layer(numbers, window, 0.5), _capped(codes, numbers.first.size(1)))
