"""Max pooling of codes, as maxima of slices.

torch's max_pool2d finds indices as well, several times slower, and refuses uint8 in channels_last from 12 x 12 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from torch.fx import Node

from .moves import MAX_POOLS, Call, arguments, aten, each, first_input, target


@dataclass(frozen=True)
class _Windows:
    """Of one dimension, counted from the end."""

    dim: int
    size: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def behind(self) -> int:
        """The padding behind that the last window reaches."""
        reach = (self.outputs - 1) * self.stride + (self.kernel - 1) * self.dilation + 1
        return max(0, reach - self.padding - self.size)

    def maximum(self, call: Call, codes: Node) -> Node:
        """At each place of the window a slice has what is there in every window."""
        span = (self.outputs - 1) * self.stride + 1
        starts = range(0, self.kernel * self.dilation, self.dilation)
        slices = [call(aten.slice.Tensor, codes, self.dim, start, start + span, self.stride) for start in starts]
        return reduce(lambda a, b: call(aten.maximum.default, a, b), slices)


def max_pool(call: Call, node: Node, codes: Node) -> Node:
    """One of MAX_POOLS, of codes: padded by code 0, which exceeds none."""
    windows = _windows(node)
    pads = [n for of in reversed(windows) for n in (of.padding, of.behind)]
    if any(pads):
        codes = call(aten.constant_pad_nd.default, codes, pads, 0)
    for of in windows:
        codes = of.maximum(call, codes)
    return codes


def _windows(node: Node) -> list[_Windows]:
    given, rank = arguments(node), MAX_POOLS[target(node)]
    kernel = each(given["kernel_size"], rank)
    stride = each(given["stride"], rank) if given["stride"] else kernel
    padding, dilation = each(given["padding"], rank), each(given["dilation"], rank)
    sizes, outputs = (n.meta["val"].shape[-rank:] for n in (first_input(node), node))
    dims = range(-rank, 0)
    return [_Windows(*numbers) for numbers in zip(dims, sizes, outputs, kernel, stride, padding, dilation)]
