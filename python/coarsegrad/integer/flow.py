"""What an exported graph says of codes: which nodes carry them, and which layers read them."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from .._ops import ops
from .moves import arguments, aten, hinted, is_move, moved_alpha

QRELUS = {ops.qrelu.default, ops.qrelu_custom.default}
CONVOLUTIONS_1D = {aten.conv1d.default, aten.conv1d.padding}
CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding} | CONVOLUTIONS_1D
LAYERS = {aten.linear.default} | CONVOLUTIONS

_INPLACE = {ops.qrelu_.default: ops.qrelu.default, ops.qrelu_custom_.default: ops.qrelu_custom.default}
_FUSED = {ops.qrelu_linear.default: aten.linear.default, ops.qrelu_conv2d.default: aten.conv2d.default}


@dataclass(frozen=True)
class Codes:
    """The values of a node: alpha * code, the codes below 2**bits. alpha: float64, 0-d, or that of each element in the
    example inputs; a list of these if the value is a list."""

    bits: int
    alpha: Tensor | list[Tensor]


def normalize(graph: torch.fx.Graph) -> None:
    """Turn the fused forms of a QReLU into it and a layer, and in-place ones into it, where no later node sees it."""
    for node in list(graph.nodes):
        if node.target in _INPLACE and _is_last_use(node):
            node.target = _INPLACE[node.target]
        elif node.target in _FUSED:
            _split(graph, node)


def _is_last_use(node: Node) -> bool:
    x = node.args[0]
    later = node
    while (later := later.next).op != "root":
        if x in later.all_input_nodes:
            return False
    return x.op == "call_function" and not is_move(x)  # a view of another node, or an input, may be seen elsewhere


def _split(graph: torch.fx.Graph, node: Node) -> None:
    given = arguments(node)
    activation = ("x", "alpha", "bits", "ste", "rounding", "alpha_grad", "alpha_scale", "channel_dim")
    window = [given[name] for name in ("stride", "padding", "dilation", "groups") if name in given]
    with graph.inserting_before(node):
        y = graph.call_function(ops.qrelu.default, tuple(given[name] for name in activation))
        y.meta = {**node.meta, "val": given["x"].meta["val"]}
        layer = graph.call_function(_FUSED[node.target], (y, given["weight"], given["bias"], *window))
        layer.meta = dict(node.meta)
    node.replace_all_uses_with(layer)
    graph.erase_node(node)


class CodeFlow:
    """codes: what the nodes that carry codes hold. Constants are the nodes that no input of the model changes."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self._module = module
        self._constants: dict[Node, Tensor | None] = {}
        self.codes: dict[Node, Codes] = {}
        for node in module.graph.nodes:
            found = self._found(node)
            if found is not None:
                self.codes[node] = found

    def constant(self, node: Node | None) -> Tensor | None:
        """The value of a constant; None for other nodes."""
        if node is None:
            return None
        if node not in self._constants:
            self._constants[node] = self._evaluated(node)
        return self._constants[node]

    def _evaluated(self, node: Node) -> Tensor | None:
        if node.op == "get_attr":
            return operator.attrgetter(node.target)(self._module)
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op != "call_function" or random or any(self.constant(n) is None for n in node.all_input_nodes):
            return None
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.constant)
        with torch.no_grad():
            return node.target(*args, **kwargs)

    def _found(self, node: Node) -> Codes | None:
        if node.target in QRELUS:
            return self._of_qrelu(node)
        return self._of_move(node) if is_move(node) else None

    def _of_qrelu(self, node: Node) -> Codes | None:
        given = arguments(node)
        alpha, dim = self.constant(given["alpha"]), given["channel_dim"]
        if alpha is None:
            return None
        alpha = alpha.detach().double()
        if dim is None:
            return Codes(given["bits"], alpha[0])
        shape = _example_shape(node)
        along = [1] * len(shape)
        along[dim] = -1
        return Codes(given["bits"], alpha.view(along).expand(shape))

    def _of_move(self, node: Node) -> Codes | None:
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, list, tuple))]
        if not inputs or not all(n in self.codes for n in inputs):
            return None
        codes = [self.codes[n] for n in inputs]
        first = codes[0].alpha
        if all(isinstance(c.alpha, Tensor) and c.alpha.dim() == 0 and c.alpha == first for c in codes):
            alpha = first
        elif isinstance(first, list):
            alpha = first[node.args[1]] if node.target is operator.getitem else None
        else:
            alpha = moved_alpha(node, {n: self.codes[n].alpha.expand(_example_shape(n)) for n in inputs})
        if alpha is None:
            return None
        return Codes(max(c.bits for c in codes), list(alpha) if isinstance(alpha, tuple) else alpha)


def _example_shape(node: Node) -> list[int]:
    return [hinted(size) for size in node.meta["val"].shape]
