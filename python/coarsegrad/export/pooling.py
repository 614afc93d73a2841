"""Max pooling of codes, which `convert` spells as maxima of slices, as one MaxPool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..integer import arguments
from .nodes import Constants
from .nodes import node as onnx_node

_aten = torch.ops.aten


class _Windows(NamedTuple):
    """Of one dimension, counted from the end, of the codes of a node."""

    source: Node
    dim: int
    size: int
    stride: int
    dilation: int


class Cap(Constants):
    """codes -> Min(codes, high)."""

    def __init__(self, high: Tensor) -> None:
        super().__init__(high=high)

    def forward(self, codes: Tensor) -> Tensor:
        return onnx_node("Min", codes, self.high, like=codes)


class Pool(nn.Module):
    """codes [N, C, H, W] -> their maxima."""

    def __init__(self, kernel: list[int], stride: list[int], dilation: list[int]) -> None:
        super().__init__()
        self.kernel, self.stride, self.dilation = kernel, stride, dilation

    def forward(self, codes: Tensor) -> Tensor:
        sizes = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(codes.shape[2:], self.kernel, self.stride, self.dilation)
        ]
        attributes = {"kernel_shape": self.kernel, "strides": self.stride, "dilations": self.dilation}
        return onnx_node("MaxPool", codes, like=codes, shape=[*codes.shape[:2], *sizes], **attributes)


def put_pools_in(graph: torch.fx.Graph, call: Callable[[nn.Module, Node], Node]) -> None:
    """call(module, node): puts a module's call on a node into the graph."""
    for node in reversed(list(graph.nodes)):
        windows = _windows(node) if node.users else None
        if windows is None or windows.source.meta["val"].dim() != 4 or windows.dim not in (-1, -2):
            continue
        below = _windows(windows.source)
        both = [windows] if below is None or below.dim != -3 - windows.dim else [windows, below]
        given = {one.dim: one for one in both}
        pool = Pool(*([getattr(given[dim], name) if dim in given else 1 for dim in (-2, -1)]
                      for name in ("size", "stride", "dilation")))  # fmt: skip
        with graph.inserting_before(node):
            made = call(pool, both[-1].source)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.eliminate_dead_code()
        _cap_later(graph, made)


def _cap_later(graph: torch.fx.Graph, pool: Node) -> None:
    """A maximum of capped codes is the capped maximum, and there are fewer of them."""
    cap = pool.all_input_nodes[0]
    module: Any = graph.owning_module
    if cap.op != "call_module" or not isinstance(module.get_submodule(str(cap.target)), Cap) or len(cap.users) > 1:
        return
    pool.replace_input_with(cap, cap.all_input_nodes[0])
    with graph.inserting_after(pool):
        capped = graph.call_module(str(cap.target), (pool,))
    capped.meta = dict(pool.meta)
    pool.replace_all_uses_with(capped, delete_user_cb=lambda user: user is not capped)
    graph.erase_node(cap)


def _windows(node: Any) -> _Windows | None:
    """What a chain of maxima of slices of one node takes the maximum of; None for other nodes."""
    slices: list[dict[str, Any]] = []
    while node.target is _aten.maximum.default:
        node, last = node.args
        slices.append(_slice(last))
    slices.append(_slice(node))
    slices.reverse()
    if len(slices) < 2 or not all(slices):
        return None
    first, starts = slices[0], [given["start"] for given in slices]
    dilation, span = starts[1] - starts[0], first["end"] - first["start"]
    same = all(
        (given["self"], given["dim"], given["step"], given["end"] - given["start"], given["start"])
        == (first["self"], first["dim"], first["step"], span, dilation * place)
        for place, given in enumerate(slices)
    )
    size = first["self"].meta["val"].shape[first["dim"]]
    # A MaxPool has as many windows as there is room for.
    whole = (
        isinstance(size, int)
        and (span - 1) // first["step"] == (size - dilation * (len(slices) - 1) - 1) // first["step"]
    )
    if not same or dilation < 1 or not whole:
        return None
    rank = first["self"].meta["val"].dim()
    return _Windows(first["self"], first["dim"] % rank - rank, len(slices), first["step"], dilation)


def _slice(node: Any) -> dict[str, Any]:
    """The arguments of a slice; empty for another node, or one without plain numbers."""
    if not isinstance(node, Node) or node.target is not _aten.slice.Tensor:
        return {}
    given = arguments(node)
    return given if all(type(given[name]) is int for name in ("dim", "start", "end", "step")) else {}
