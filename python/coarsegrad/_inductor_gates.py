"""What Inductor saves of a qrelu in training, where its bits would cost more time than memory.

The bits for backward, x > 0 or 0 < x <= L[q], are packed eight to a byte, and so are codes, which no pointwise code
does: a qrelu that saves them is a call. Between a BatchNorm and a convolution that costs a pass over x, and the kernels
around it their fusion. But there the backward reads BatchNorm's input anyway, and x is a few pointwise operations away
from it. So before a joint graph of forward and backward is cut, each such qrelu saves nothing and its backward becomes

    dx = 0 if x <= 0 or x > L[q] else dy

in pointwise code, which has x from what is saved in any case: forward and backward fuse, and nothing is kept. Inside
`packed_activations` the codes that the layer after it saves are found from y, by another call; the code around them is
the same as without, and so are the gradients, whose sums Inductor orders by how it fuses.

On a CPU, in float32 and float64: there Inductor's code rounds every operation, so that x in the backward is the x of
the forward, to the bit. Elsewhere it may contract a product and a sum in one kernel and not in the other.

Imported by the op's fake kernel once Inductor has been imported.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from ._autograd import Settings
from ._inductor import where_beside_alpha
from ._torch_internals import is_tangent, keep_in_backward
from ._types import INDUCTOR_BITS, MaskKind, Rounding, Ste

_aten = torch.ops.aten
_FORWARD = torch.ops.coarsegrad.qrelu_forward.default
_BACKWARD = torch.ops.coarsegrad.qrelu_backward.default
_CODES = torch.ops.coarsegrad.qrelu_codes.default
_DEQUANTIZE = torch.ops.coarsegrad.dequantize.default
_GATED = {Ste.relu: MaskKind.positive, Ste.clipped_relu: MaskKind.inside}

# What x may be made by, one element from one element of each tensor: cheap, and rounded alike wherever it runs.
_POINTWISE = {
    _aten.add.Tensor,
    _aten.sub.Tensor,
    _aten.mul.Tensor,
    _aten.div.Tensor,
    _aten.neg.default,
    _aten.expand.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dims,
    _aten.view.default,
    _aten.reshape.default,
    _aten.permute.default,
}
_LONGEST = 16  # operations
_SMALL = 64  # what has so many times fewer elements than x costs nothing to save


class _Gates(CustomGraphPass):
    def __call__(self, graph: fx.Graph) -> None:
        backward = _backward_of(graph)
        rebuilt = {}  # the y of a forward whose codes are saved: its y in the backward
        for node in graph.find_nodes(op="call_function", target=_DEQUANTIZE):
            if (forward := _forward_of(node.args[0])) is not None and (y := _part(forward, 0)) is not None:
                rebuilt[y] = node
        for node in graph.find_nodes(op="call_function", target=_BACKWARD):
            if (forward := _gated(node)) is not None:
                made = _made_of_saved(forward.args[0], backward, rebuilt)
                if made is not None:
                    _fuse(forward, node, made, rebuilt)

    def uuid(self) -> Any:
        return get_hash_for_files((str(Path(__file__)),))


def _backward_of(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that no output of the forward, and no tensor that it writes to, is made from."""
    given: set[fx.Node] = set()  # made from the gradients that the backward is given
    for node in graph.nodes:
        if is_tangent(node) or node.op != "output" and not given.isdisjoint(node.all_input_nodes):
            given.add(node)
    forward: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output":
            forward.update(made for made in node.all_input_nodes if made not in given)
        elif node in forward or node.is_impure() and node not in given:
            forward.update([node, *node.all_input_nodes])
    return {node for node in graph.nodes if node not in forward}


def _forward_of(part: Any) -> fx.Node | None:
    """The qrelu whose mask or codes this is."""
    of: Any = part.args[0] if isinstance(part, fx.Node) and part.target is operator.getitem else None
    return of if getattr(of, "target", None) is _FORWARD else None


def _part(node: fx.Node, index: int) -> fx.Node | None:
    return next((user for user in node.users if user.args[1] == index), None)


def _gated(node: fx.Node) -> fx.Node | None:
    """The forward of a backward that reads only its mask or codes, and of which only dx is used."""
    _, _, x, mask, codes, *rest = node.args
    settings = Settings(*rest)  # type: ignore[arg-type]
    if x is not None or (mask is None) == (codes is None) or settings.ste not in _GATED:
        return None
    forward = _forward_of(codes if mask is None else mask)
    if forward is None or any(user.args[1] != 0 for user in node.users):
        return None
    mask = _part(forward, 1)
    if mask is not None and any(user is not node for user in mask.users):
        return None
    value, bits = forward.args[0].meta["val"], forward.args[2]  # type: ignore[union-attr]
    known = value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64)
    return forward if known and bits <= INDUCTOR_BITS else None  # type: ignore[operator]


def _made_of_saved(x: Any, backward: set[fx.Node], rebuilt: Mapping[fx.Node, fx.Node]) -> set[fx.Node] | None:
    """The operations that x is made by from what the backward has anyway; None if there are others."""
    elements = x.meta["val"].numel()
    made: set[fx.Node] = set()
    waiting = [x]
    while waiting:
        node = waiting.pop()
        if not backward.isdisjoint(node.users) or node in rebuilt or _is_small(node, elements):
            continue
        if node.target not in _POINTWISE or len(made) == _LONGEST:
            return None
        made.add(node)
        waiting += node.all_input_nodes
    return made


def _is_small(node: fx.Node, elements: Any) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(value.numel(), int):
        return False
    return not isinstance(elements, int) or value.numel() * _SMALL <= elements


def _new(graph: fx.Graph, target: Callable[..., Any], *args: Any) -> fx.Node:
    node, values = graph.call_function(target, args), [_value(a) for a in args]
    node.meta["val"] = target(*values)
    node.meta["eager_input_vals"] = tuple(values), {}
    return node


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _fuse(forward: fx.Node, backward: fx.Node, made: set[fx.Node], rebuilt: dict[fx.Node, fx.Node]) -> None:
    x, alpha, bits, *_, channel_dim = forward.args
    gate, grad_y = _GATED[Ste(backward.args[6])], backward.args[0]
    graph, value = forward.graph, x.meta["val"]  # type: ignore[union-attr]

    def new(target: Callable[..., Any], *args: Any) -> fx.Node:
        node = _new(graph, target, *args)
        keep_in_backward(node)
        return node

    with graph.inserting_before(backward):
        again: dict[fx.Node, fx.Node] = {}

        def source(node: fx.Node) -> fx.Node:
            if node not in again and node in rebuilt:
                again[node] = rebuilt[node] = _moved_before(backward, rebuilt[node])
            elif node not in again:
                # By another name: what is computed twice from one node becomes one before the cut, and may be saved.
                again[node] = new(_aten.alias.default, node)
            return again[node]

        for node in list(graph.nodes):
            if node in made:
                again[node] = graph.node_copy(node, source)
                keep_in_backward(again[node])
        x = source(x)  # type: ignore[arg-type]
        closed, where = new(_aten.le.Scalar, x, 0), _aten.where.ScalarSelf
        if gate == MaskKind.inside:
            wide = alpha
            if alpha.meta["val"].dtype != value.dtype:  # type: ignore[union-attr]
                wide = new(torch.ops.prims.convert_element_type.default, alpha, value.dtype)
            top = new(_aten.mul.Tensor, wide, 2**bits - 1)  # type: ignore[operator]
            if channel_dim is not None:
                shape = [1] * value.dim()
                shape[channel_dim] = -1  # type: ignore[index]
                top = new(_aten.view.default, top, shape)
            closed, where = new(_aten.bitwise_or.Tensor, closed, new(_aten.gt.Tensor, x, top)), where_beside_alpha
        grad_x = new(where, closed, 0, grad_y)
    for part in list(backward.users):
        part.replace_all_uses_with(grad_x)
        graph.erase_node(part)
    graph.erase_node(backward)
    _save_nothing(forward)


def _moved_before(place: fx.Node, node: fx.Node) -> fx.Node:
    """The node, with what it is made from, where it is not later than the place."""
    if node < place:
        return node
    moved = place.graph.node_copy(node, lambda source: _moved_before(place, source))
    node.replace_all_uses_with(moved)
    place.graph.erase_node(node)
    return moved


def _save_nothing(forward: fx.Node) -> None:
    """Codes that others read are those of y. By the thresholds of "ceil", which are levels: a level has its own code
    there, or that of a level equal to it."""
    mask, codes, y = (_part(forward, index) for index in (1, 2, 0))
    _, alpha, bits, *_, channel_dim = forward.args
    graph = forward.graph
    if codes is not None and codes.users:
        with graph.inserting_after(y):
            of_y = _new(graph, _CODES, y, alpha, bits, Rounding.ceil.value, channel_dim)
        codes.replace_all_uses_with(of_y)
    for part in (mask, codes):
        if part is not None:
            graph.erase_node(part)
    forward.args = (*forward.args[:4], MaskKind.nothing.value, False, channel_dim)
    y_value, mask_value, _ = forward.meta["val"]
    forward.meta["val"] = (y_value, mask_value.new_empty(0), mask_value.new_empty(0))


class _Both(CustomGraphPass):
    """A pass that is there already, and then ours."""

    def __init__(self, first: Any) -> None:
        self._first = first

    def __call__(self, graph: fx.Graph) -> None:
        self._first(graph)
        _GATES(graph)

    def uuid(self) -> Any:
        uuid = self._first.uuid() if isinstance(self._first, CustomGraphPass) else None
        return None if uuid is None else (uuid, _GATES.uuid())


_GATES = _Gates()


def install() -> None:
    """Have Inductor run the pass on joint graphs, after the user's own."""
    installed = getattr(config, "joint_custom_post_pass", _GATES)  # if this torch has no such option, there is none
    if isinstance(installed, (_Gates, _Both)) or isinstance(installed, (list, tuple)) and _GATES in installed:
        return
    if isinstance(installed, (list, tuple)):
        config.joint_custom_post_pass = [*installed, _GATES]  # type: ignore[assignment]
    else:
        config.joint_custom_post_pass = _GATES if installed is None else _Both(installed)
