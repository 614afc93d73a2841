"""What Inductor saves of a qrelu in training, where its bits would cost more time than memory.

The bits for backward, x > 0 or 0 < x <= L[q], are packed eight to a byte, which no pointwise code does, so a qrelu that
saves them is a call. Between a BatchNorm and a convolution that costs a pass over x, and the kernels around it their
fusion. But there the backward reads BatchNorm's input anyway, and x is a few pointwise operations away from it. So
before a joint graph of forward and backward is cut, each such qrelu saves nothing and its backward becomes

    dx = 0 if x <= 0 or x > L[q] else dy

in pointwise code, which has x from what is saved in any case: forward and backward fuse, and nothing is kept.

On a CPU, in float32 and float64: there Inductor's code rounds every operation, so that x in the backward is the x of
the forward, to the bit. Elsewhere it may contract a product and a sum in one kernel and not in the other.

Imported by the op's fake kernel once Inductor has been imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from ._autograd import Settings
from ._torch_internals import OpOverload, is_tangent, keep_in_backward
from ._types import INDUCTOR_BITS, MaskKind, Ste

_aten = torch.ops.aten
_FORWARD = torch.ops.coarsegrad.qrelu_forward.default
_BACKWARD = torch.ops.coarsegrad.qrelu_backward.default
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
        for node in graph.find_nodes(op="call_function", target=_BACKWARD):
            if (forward := _gated(node)) is not None:
                made = _made_of_saved(forward.args[0], backward)
                if made is not None:
                    _fuse(forward, node, made)

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


def _gated(node: fx.Node) -> fx.Node | None:
    """The forward of a backward that reads only a mask, if that mask is read by nothing else."""
    _, _, x, mask, codes, *rest = node.args
    settings = Settings(*rest)  # type: ignore[arg-type]
    if mask is None or x is not None or codes is not None or settings.need_grad_alpha or settings.ste not in _GATED:
        return None
    forward: Any = mask.args[0]  # type: ignore[union-attr]
    if getattr(forward, "target", None) is not _FORWARD or len(mask.users) > 1:  # type: ignore[union-attr]
        return None
    if any(user.args[1] != 0 for user in node.users):
        return None
    x, _, bits, _, kind, saves_codes, _ = forward.args
    value = x.meta["val"]
    known = value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64)
    fits = kind == _GATED[Ste(settings.ste)] and not saves_codes and bits <= INDUCTOR_BITS
    return forward if known and fits else None


def _made_of_saved(x: Any, backward: set[fx.Node]) -> set[fx.Node] | None:
    """The operations that x is made by from what the backward reads anyway; None if there are others."""
    elements = x.meta["val"].numel()
    made: set[fx.Node] = set()
    waiting = [x]
    while waiting:
        node = waiting.pop()
        if not backward.isdisjoint(node.users) or _is_small(node, elements):
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


def _fuse(forward: fx.Node, backward: fx.Node, made: set[fx.Node]) -> None:
    x, alpha, bits, _, kind, _, channel_dim = forward.args
    grad_y: Any = backward.args[0]
    graph, value = forward.graph, x.meta["val"]  # type: ignore[union-attr]

    def new(target: OpOverload, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        keep_in_backward(node)
        node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
        return node

    with graph.inserting_before(backward):
        again: dict[fx.Node, fx.Node] = {}

        def source(node: fx.Node) -> fx.Node:
            # By another name: what is computed twice from one node becomes one before the cut, and may be saved.
            if node not in again:
                again[node] = new(_aten.alias.default, node)
            return again[node]

        for node in list(graph.nodes):
            if node in made:
                again[node] = graph.node_copy(node, source)
                keep_in_backward(again[node])
        x = again.get(x, x)  # type: ignore[arg-type]
        closed = new(_aten.le.Scalar, x, 0)
        if kind == MaskKind.inside:
            wide = alpha
            if alpha.meta["val"].dtype != value.dtype:
                wide = new(torch.ops.prims.convert_element_type.default, alpha, value.dtype)
            top = new(_aten.mul.Tensor, wide, 2**bits - 1)
            if channel_dim is not None:
                shape = [1] * value.dim()
                shape[channel_dim] = -1
                top = new(_aten.view.default, top, shape)
            closed = new(_aten.bitwise_or.Tensor, closed, new(_aten.gt.Tensor, x, top))
        grad_x = new(_aten.where.ScalarSelf, closed, 0, grad_y)
    for part in list(backward.users):
        part.replace_all_uses_with(grad_x)
        graph.erase_node(part)
    mask = backward.args[3]
    graph.erase_node(backward)
    graph.erase_node(mask)
    forward.update_arg(4, MaskKind.nothing.value)
    y, bits_of_x, codes = forward.meta["val"]
    forward.meta["val"] = (y, bits_of_x.new_empty(0), codes)


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
