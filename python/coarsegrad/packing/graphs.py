"""Packing in the graphs of torch.compile: the backward rebuilds y from its codes.

AOTAutograd traces forward and backward into one graph and cuts it in two; what crosses the cut is saved. A pass before
the cut gives every node of the backward that reads the output y of a `qrelu_packed`, or a view, copy or square of it, a
y rebuilt from the codes. So the codes cross the cut, and y does not.
"""

from __future__ import annotations

import operator
import threading
import warnings
from typing import Any, cast

import torch
from torch import Tensor, fx

from .. import _ops
from .._autograd import Settings, qrelu_with_derivative, qrelu_with_derivative_
from .._torch_internals import (
    OpOverload,
    install_joint_graph_pass,
    is_recomputed,
    is_tangent,
    keep_in_backward,
    suggest_memory_format,
)
from .._types import CODE_WIDTH, MASK_WIDTH, MaskKind, packed_bytes
from ..ste import codes_give

_aten = torch.ops.aten
_BACKWARDS = (_ops.ops.qrelu_backward.default, _ops.ops.qrelu_backward_custom.default)

# Besides views, what y is followed through: ops of y alone that give the same bits when they run again.
_EXACT = {
    _aten.mul.Tensor,
    _aten.mul.Scalar,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten._unsafe_view.default,
    torch.ops.prims.convert_element_type.default,
}


class _OpenBlocks(threading.local):
    """How many blocks this thread has opened. Dynamo guards on it: inside a block it compiles another graph."""

    def __init__(self) -> None:
        self.count = 0  # not as a default of the class: the guards of torch 2.13 miss a value that hides it


open_blocks = _OpenBlocks()


def packs_graph() -> bool:
    """Whether the qrelu that is being compiled is inside a block."""
    return open_blocks.count > 0 and not torch.compiler.is_exporting()


class _Output:
    """The output y of a `qrelu_forward_packed` in a joint graph. position: of each node of the graph; backward: the
    nodes that depend on a tangent."""

    def __init__(self, forward: fx.Node, position: dict[fx.Node, int], backward: set[fx.Node]) -> None:
        self._forward, self._position, self._backward = forward, position, backward
        parts: dict[Any, Any] = {user.args[1]: user for user in forward.users if user.target is operator.getitem}
        self._y: Any = parts.get(0)  # a node, or None, as the others
        self._mask, self._codes = parts.get(1), parts.get(2)
        self._rebuilt: dict[fx.Node, fx.Node] = {}

    def pack(self) -> None:
        """Let the backward read y from its codes."""
        self._forward.target = _ops.ops.qrelu_forward.default
        readers = self._readers() if self._can_be_rebuilt() else []
        if not readers:
            return
        self._replace_saved(codes=True)
        if self._codes is None:
            with self._graph.inserting_after(self._forward):
                self._codes = self._new(operator.getitem, (self._forward, 2), self._forward.meta["val"][2])
        for reader, argument in sorted(readers, key=lambda pair: self._position[pair[0]]):
            reader.replace_input_with(argument, self._rebuild(argument, reader))
        self._drop_mask()

    @property
    def _arguments(self) -> tuple[Any, ...]:
        return self._forward.args

    @property
    def _graph(self) -> fx.Graph:
        return self._forward.graph

    def _new(self, target, args: tuple, val: object) -> fx.Node:
        node = self._graph.call_function(target, args)
        node.meta["val"] = val
        return node

    # ------------------------------------------------------------------------------------ who reads y

    def _can_be_rebuilt(self) -> bool:
        """Not a y that is not dense, nor one that a checkpoint computes again in any case."""
        if self._y is None or is_recomputed(self._forward):
            return False
        y = self._y.meta["val"]
        return y.is_contiguous(memory_format=suggest_memory_format(y))

    def _readers(self) -> list[tuple[fx.Node, fx.Node]]:
        """(node, argument): the nodes of the backward with an argument that is y or made from it."""
        found, made = [], [self._y]
        for source in made:
            for user in source.users:
                if user in self._backward:
                    found.append((user, source))
                elif _source(user) is source:
                    made.append(user)
        return found

    # ------------------------------------------------------------------------------------ what it reads instead

    def _rebuild(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """The node, y or made from it, again, from the codes: before its first reader."""
        if node not in self._rebuilt:
            if node is self._y:
                with self._graph.inserting_before(reader):
                    again = self._dequantized()
            else:
                source = cast(fx.Node, _source(node))
                again = rebuilt = self._rebuild(source, reader)
                if node.target is not _aten.copy.default:
                    with self._graph.inserting_before(reader):
                        again = self._graph.node_copy(node, lambda n: rebuilt if n is source else n)
            keep_in_backward(again)
            self._rebuilt[node] = again
        return self._rebuilt[node]

    def _dequantized(self) -> fx.Node:
        y = self._y.meta["val"]
        _, alpha, bits, *_, channel_dim = self._arguments
        shape = [
            size if isinstance(size, int) else self._new(_aten.sym_size.int, (self._y, dim), size)
            for dim, size in enumerate(y.shape)
        ]
        output = (bits, shape, y.dtype, channel_dim, suggest_memory_format(y))
        return self._new(_ops.ops.dequantize.default, (self._codes, alpha, *output), torch.empty_like(y))

    # ------------------------------------------------------------------------------------ what is saved with it

    def _drop_mask(self) -> None:
        """Let qrelu's own backward read the codes, if they determine the mask."""
        rounding, kind = self._arguments[3:5]
        users = list(self._mask.users) if self._mask is not None else []
        if not users or not codes_give(kind, rounding) or any(user.target not in _BACKWARDS for user in users):
            return
        for node in users:
            tensors, settings = (*node.args[:3], None, self._codes), cast(Any, node.args[5:])
            node.args = (*tensors, *Settings(*settings).reading_codes())
            grad_x, grad_alpha = node.meta["val"]
            node.meta["val"] = (grad_x, grad_alpha.new_empty(1))  # unused, but computed
        self._replace_saved(mask=MaskKind.nothing)

    def _replace_saved(self, mask: MaskKind | None = None, codes: bool = False) -> None:
        """Have the forward return a mask of another kind, or the codes."""
        args, vals = list(self._arguments), list(self._forward.meta["val"])
        count = vals[0].numel()
        if mask is not None:
            args[4], vals[1] = mask.value, vals[1].new_empty(packed_bytes(count, MASK_WIDTH[mask]))
        if codes:
            args[5], vals[2] = True, vals[2].new_empty(packed_bytes(count, CODE_WIDTH[args[2]]))
        self._forward.args, self._forward.meta["val"] = tuple(args), tuple(vals)
        for part, val in zip((self._mask, self._codes), vals[1:]):
            if part is not None:
                part.meta["val"] = val


def _source(node: fx.Node) -> fx.Node | None:
    """The node that this one is a view, a part, a copy, a multiple or the square of; None if it is something else."""
    if node.target is operator.getitem:
        return cast(fx.Node, node.args[0])
    if not isinstance(node.target, OpOverload):
        return None
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, list, tuple))]
    if node.target is _aten.copy.default:  # an in-place qrelu writes its output over x
        x, y = (n.meta["val"] for n in tensors)
        alike = (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())
        return tensors[1] if alike else None
    exact = node.target.is_view or node.target in _EXACT
    exact |= node.target is _aten.pow.Tensor_Scalar and node.args[1] in (1, 2)  # 1: of a square's derivative
    return tensors[0] if exact and len(tensors) == 1 else None


def pack_joint_graph(module: fx.GraphModule, *_: object) -> fx.GraphModule:
    """The pass: packs the output of each `qrelu_forward_packed`, which becomes a `qrelu_forward`."""
    forwards = module.graph.find_nodes(op="call_function", target=_ops.ops.qrelu_forward_packed.default)
    if forwards:
        position: dict[fx.Node, int] = {}
        backward: set[fx.Node] = set()
        for node in module.graph.nodes:
            if node.op == "output":  # of both, forward and backward
                continue
            position[node] = len(position)
            if is_tangent(node) or not backward.isdisjoint(node.all_input_nodes):
                backward.add(node)
        for forward in forwards:
            _Output(forward, position, backward).pack()
        module.recompile()
    return module


# ------------------------------------------------------------------------------------------------ the ops

_warned = False


def _autograd(kernel):
    def call(*args):
        install_joint_graph_pass(pack_joint_graph)  # before the graph that this call is traced into is complete
        return kernel(*args, forward=_ops.ops.qrelu_forward_packed.default)

    return call


def _unpacked(*args):
    """The kernel of `qrelu_forward_packed`, which runs only if the pass has not replaced the op."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "packed_activations has no effect in a graph that was compiled without AOTAutograd's joint_custom_pass, as"
            ' with backend="eager": the outputs of qrelu in it are saved whole.',
            stacklevel=2,
        )
    return _ops.ops.qrelu_forward.default(*args)


_ops._library.impl("qrelu_packed", _autograd(qrelu_with_derivative), "Autograd")
_ops._library.impl("qrelu_packed_", _autograd(qrelu_with_derivative_), "Autograd")
_ops._library.impl("qrelu_forward_packed", _unpacked, "CompositeExplicitAutograd")
_ops._library.impl("qrelu_forward_packed", torch.library.fallthrough_kernel, "Autograd")
