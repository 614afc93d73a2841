"""ONNX nodes in torch's graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn


def node(
    op: str, *inputs: Tensor | None, like: Tensor | None = None, dtype: Any = None, shape: Any = None, **attributes
):
    """The output of an ONNX op, such as "Min" or "domain::Op": of the shape and dtype of `like` where not given."""
    if like is not None:
        shape = like.shape if shape is None else shape
        dtype = like.dtype if dtype is None else dtype
    name = op if "::" in op else f"::{op}"
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape)


class Constants(nn.Module):
    """A part of a graph with constants of its own; a module, so that they are its buffers."""

    def __init__(self, **constants: Tensor | None) -> None:
        super().__init__()
        for name, value in constants.items():
            self.register_buffer(name, value)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Scaled(Constants):
    """codes -> (codes - zero) * alpha in alpha's dtype, rounded to dtype. alpha: to broadcast.

    Not a DequantizeLinear: from that before a layer, and a QuantizeLinear behind it, onnxruntime concludes that it may
    round the layer's float weights to 8 bits, with one scale for all.
    """

    def __init__(self, alpha: Tensor, dtype: torch.dtype, zero: int = 0) -> None:
        super().__init__(alpha=alpha)
        self.dtype, self.zero = dtype, zero

    def forward(self, codes: Tensor) -> Tensor:
        wide = codes.to(self.alpha.dtype)
        if self.zero:
            wide = wide - self.zero
        return (wide * self.alpha).to(self.dtype)


class Window(nn.Module):
    """Where a convolution looks."""

    def __init__(
        self, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = list(kernel), list(stride), list(padding)
        self.dilation, self.groups = list(dilation), groups

    def filters(self, rows: Tensor) -> Tensor:
        """Rows [C, kh * kw * C_in / groups], in the order of an integer layer, as [C, C_in / groups, kh, kw]."""
        return rows.view(rows.size(0), *self.kernel, -1).permute(0, 3, 1, 2).contiguous()

    def output_shape(self, codes: Tensor, channels: int) -> list:
        sizes = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(codes.shape[2:], self.kernel, self.stride, self.padding, self.dilation)
        ]
        return [codes.size(0), channels, *sizes]

    def attributes(self) -> dict[str, Any]:
        return {
            "kernel_shape": self.kernel,
            "strides": self.stride,
            "pads": self.padding * 2,
            "dilations": self.dilation,
            "group": self.groups,
        }


def along(values: Tensor, channel_dim: int | None, rank: int) -> Tensor:
    """values, [1] or [C], to broadcast against a tensor of that rank."""
    if channel_dim is None:
        return values.reshape(())
    shape = [1] * rank
    shape[channel_dim] = -1
    return values.reshape(shape)
