"""The form "qonnx": nodes of the package qonnx, which FINN and hls4ml read.

    codes = MultiThreshold(x, T')                                       #{k : x >= T'[k]}, T' the next number after T
    layer = MultiThreshold(Conv or MatMul of codes and Quant(weight), first sums)

All tensors are float32, and exact: T' decides each code as the staircase does. NaN has code 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .forms import Form, Staircase
from .levels import Affine, Sums, edges
from .nodes import Constants, Window, node
from .numbers import LayerNumbers

_DOMAIN = "qonnx.custom_op.general"
# Of a tensor with channels, by its rank and their dimension.
_LAYOUTS: dict[tuple[int, int | None], str] = {
    (2, 1): "NC",
    (3, 1): "NCW",
    (3, 2): "NWC",
    (4, 1): "NCHW",
    (4, 3): "NHWC",
}


class _Count(Constants):
    """x -> #{k : x >= table[k]}."""

    def __init__(self, table: Tensor, channel_dim: int | None, rank: int) -> None:
        super().__init__(table=table)
        self.attributes = {"out_dtype": f"UINT{table.size(1).bit_length()}"}
        if table.size(0) > 1:
            layout = _LAYOUTS.get((rank, channel_dim))
            if layout is None:
                raise ValueError(
                    f"form 'qonnx' has no thresholds for each index of dimension {channel_dim} of {rank}: form must be"
                    " 'qdq' or 'levels'"
                )
            self.attributes["data_layout"] = layout

    def forward(self, x: Tensor) -> Tensor:
        values = x.to(torch.float32)
        if x.dim() < 2:  # it wants a dimension of channels
            values = values.reshape(1, -1)
        codes = node(f"{_DOMAIN}::MultiThreshold", values, self.table, like=values, **self.attributes)
        return codes if x.dim() > 1 else codes.reshape(x.shape)


class _Sums(Sums):
    """With the width of the weights said by a Quant, or a BipolarQuant if they are -1 and 1."""

    def __init__(self, numbers: LayerNumbers, window: Window | None) -> None:
        super().__init__(numbers, window)
        low, high = int(numbers.integers.min()), int(numbers.integers.max())
        self.bits = 1 if numbers.weight_bits == 1 else max((-low - 1).bit_length(), high.bit_length()) + 1
        for name, value in (("one", 1.0), ("nothing", 0.0), ("width", float(self.bits))):
            self.register_buffer(name, torch.tensor(value))

    def integer_weight(self) -> Tensor:
        if self.bits == 1:
            return node(f"{_DOMAIN}::BipolarQuant", self.weight, self.one, like=self.weight)
        inputs = self.weight, self.one, self.nothing, self.width
        return node(f"{_DOMAIN}::Quant", *inputs, like=self.weight, signed=1, narrow=0, rounding_mode="ROUND")


class Qonnx(Form):
    def codes(self, staircase: Staircase) -> nn.Module:
        if staircase.dtype == torch.float64:
            raise ValueError("a staircase reads float64, which form 'qonnx' does not have: form must be 'levels'")
        table = edges(staircase).float()
        above = torch.nextafter(table, torch.full_like(table, torch.inf))
        return _Count(above, staircase.channel_dim, staircase.rank)

    def levels(self, staircase: Staircase) -> nn.Module:
        return nn.Sequential(self.codes(staircase), staircase.scaled(staircase.zero))

    def layer(self, numbers: LayerNumbers, window: Window | None) -> nn.Module:
        sums, images = _Sums(numbers, window), window is not None
        if numbers.first is None:
            return nn.Sequential(sums, Affine(numbers, images))
        return nn.Sequential(sums, _Rows(numbers.first.float(), images))


class _Rows(nn.Module):
    """The thresholds of each channel of a layer's sums, which come in any rank."""

    def __init__(self, table: Tensor, images: bool) -> None:
        super().__init__()
        self.count = _Count(table, 1, 4 if images else 2)
        self.images = images

    def forward(self, sums: Tensor) -> Tensor:
        if self.images or sums.dim() == 2:
            return self.count(sums)
        return self.count(sums.reshape(-1, sums.size(-1))).reshape(sums.shape)
