"""Packing in the graphs of torch.compile: the backward rebuilds y from its codes.

AOTAutograd traces forward and backward into one graph and cuts it in two; what crosses the cut is saved. A pass before
the cut gives every node of the backward that reads the output y of a `qrelu_packed` or `qsigned_packed`, or a view,
copy or square of it, a y rebuilt from the codes. So the codes cross the cut, and y does not.
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
from .._signed import qsigned_with_derivative
from .._torch_internals import (
    OpOverload,
    below_autograd,
    install_joint_graph_pass,
    is_recomputed,
    is_tangent,
    keep_in_backward,
    suggest_memory_format,
)
from .._types import CODE_WIDTH, MaskKind, packed_bytes
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


class _Count:
    def __init__(self) -> None:
        self.count = 0


class _OpenBlocks(threading.local):
    """How many blocks this thread has opened. Dynamo guards on it: inside a block it compiles another graph."""

    def __init__(self) -> None:
        # In an object: what compiled code sets on a thread-local itself is lost, in torch 2.13. And not as a default of
        # the class: its guards miss a value that hides one.
        self.here = _Count()


open_blocks = _OpenBlocks()


def packs_graph() -> bool:
    """Whether the qrelu that is being compiled is inside a block."""
    return open_blocks.here.count > 0 and not torch.compiler.is_exporting()


class _Output:
    """The output y of a forward op in a joint graph."""

    unpacked: OpOverload  # the op that takes the place of the `_packed` one
    _Y = 0  # the positions of y and of the codes in its result
    _CODES: int
    _ASKED = 5  # the position of the argument that asks for codes

    def __init__(self, forward: fx.Node) -> None:
        self._forward = forward
        self._parts: dict[Any, Any] = {user.args[1]: user for user in forward.users if user.target is operator.getitem}
        self.y: Any = self._parts.get(self._Y)  # a node, or None
        forward.target = self.unpacked

    def can_be_rebuilt(self) -> bool:
        """Not a y that is not dense, nor one that a checkpoint computes again in any case."""
        if self.y is None or is_recomputed(self._forward):
            return False
        y = self.y.meta["val"]
        return y.is_contiguous(memory_format=suggest_memory_format(y))

    def rebuild(self, reader: fx.Node) -> fx.Node:
        """y from its codes, before the reader."""
        self._return_codes()
        with self._graph.inserting_before(reader):
            return self._dequantized()

    def drop_mask(self) -> None:
        """Save no mask that the codes determine."""

    @property
    def _arguments(self) -> tuple[Any, ...]:
        return self._forward.args

    @property
    def _graph(self) -> fx.Graph:
        return self._forward.graph

    def _part(self, index: int) -> fx.Node:
        """A part of the op's result."""
        if index not in self._parts:
            with self._graph.inserting_after(self._forward):
                part = self._new(operator.getitem, (self._forward, index), self._forward.meta["val"][index])
            self._parts[index] = part
        return self._parts[index]

    def _new(self, target, args: tuple, val: object) -> fx.Node:
        node = self._graph.call_function(target, args)
        node.meta["val"] = val
        return node

    def _dequantized(self) -> fx.Node:
        """y, as a new node."""
        raise NotImplementedError

    def _shape(self) -> list:
        """That of y, for an op's argument."""
        return [
            size if isinstance(size, int) else self._new(_aten.sym_size.int, (self.y, dim), size)
            for dim, size in enumerate(self.y.meta["val"].shape)
        ]

    @property
    def _bits(self) -> int:
        return self._arguments[2]

    def _return_codes(self) -> None:
        """Have the forward op return the codes."""
        args, vals = list(self._arguments), list(self._forward.meta["val"])
        size = packed_bytes(vals[self._Y].numel(), CODE_WIDTH[self._bits])
        args[self._ASKED], vals[self._CODES] = True, vals[self._CODES].new_empty(size)
        self._set(args, vals)

    def _set(self, args: list, vals: list) -> None:
        self._forward.args, self._forward.meta["val"] = tuple(args), tuple(vals)
        for index, part in self._parts.items():
            part.meta["val"] = vals[index]


class _QReLUOutput(_Output):
    unpacked = _ops.ops.qrelu_forward.default
    _CODES = 2

    def _dequantized(self) -> fx.Node:
        y = self.y.meta["val"]
        _, alpha, bits, *_, channel_dim = self._arguments
        output = (bits, self._shape(), y.dtype, channel_dim, suggest_memory_format(y))
        return self._new(_ops.ops.dequantize.default, (self._part(2), alpha, *output), torch.empty_like(y))

    def drop_mask(self) -> None:
        """Let qrelu's own backward read the codes."""
        rounding, kind = self._arguments[3:5]
        mask = self._parts.get(1)
        users = list(mask.users) if mask is not None else []
        if not users or not codes_give(kind, rounding) or any(user.target not in _BACKWARDS for user in users):
            return
        for node in users:
            tensors, settings = (*node.args[:3], None, self._part(2)), cast(Any, node.args[5:])
            node.args = (*tensors, *Settings(*settings).reading_codes())
            grad_x, grad_alpha = node.meta["val"]
            node.meta["val"] = (grad_x, grad_alpha.new_empty(1))  # unused, but computed
        args, vals = list(self._arguments), list(self._forward.meta["val"])
        args[4], vals[1] = MaskKind.nothing.value, vals[1].new_empty(0)
        self._set(args, vals)


class _QSignedOutput(_Output):
    unpacked = _ops.ops.qsigned_forward.default
    _CODES = 3

    def _dequantized(self) -> fx.Node:
        y = self.y.meta["val"]
        _, alpha, bits, group, *_, channel_dim = self._arguments
        memory_format = torch.contiguous_format if alpha is None else suggest_memory_format(y)
        output = (bits, group, self._shape(), y.dtype, channel_dim, memory_format)
        alpha = self._part(1) if alpha is None else alpha
        return self._new(_ops.ops.qsigned_dequantize.default, (self._part(3), alpha, *output), torch.empty_like(y))


class _NormOutput(_Output):
    unpacked = _ops.ops.norm_qsigned.default
    _Y, _CODES, _ASKED = 1, 2, 11

    @property
    def _bits(self) -> int:
        return self._arguments[7]

    def _dequantized(self) -> fx.Node:
        y, group = self.y.meta["val"], self._arguments[8]
        output = (self._bits, group, self._shape(), y.dtype, None, torch.contiguous_format)
        codes = self._part(self._CODES), self._part(3)
        return self._new(_ops.ops.qsigned_dequantize.default, (*codes, *output), torch.empty_like(y))


# The ops in a traced graph, and what becomes of their outputs.
_OUTPUTS: dict[OpOverload, type[_Output]] = {
    _ops.ops.qrelu_forward_packed.default: _QReLUOutput,
    _ops.ops.qsigned_forward_packed.default: _QSignedOutput,
    _ops.ops.norm_qsigned_packed.default: _NormOutput,
}


class _JointGraph:
    """A graph of forward and backward, in which the backward reads outputs from their codes."""

    def __init__(self, graph: fx.Graph, forwards: list[fx.Node]) -> None:
        outputs = [_OUTPUTS[cast(OpOverload, node.target)](node) for node in forwards]
        self._outputs = {output.y: output for output in outputs if output.can_be_rebuilt()}
        self._nodes = [node for node in graph.nodes if node.op != "output"]  # the output is of both
        self._backward: set[fx.Node] = set()
        # The outputs, and what is made from them in the forward, each with what it is made from.
        self._made: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node in self._nodes:
            if is_tangent(node) or not self._backward.isdisjoint(node.all_input_nodes):
                self._backward.add(node)
            elif node in self._outputs:
                self._made[node] = ()
            elif (sources := _sources(node)) and all(source in self._made for source in sources):
                self._made[node] = sources
        self._rebuilt: dict[fx.Node, fx.Node] = {}

    def pack(self) -> None:
        for reader in self._nodes:
            if reader in self._backward:
                for argument in reader.all_input_nodes:
                    if argument in self._made:
                        reader.replace_input_with(argument, self._rebuild(argument, reader))
        for y, output in self._outputs.items():
            if y in self._rebuilt:
                output.drop_mask()

    def _rebuild(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """An output, or what is made from some, again, from the codes: before its first reader."""
        if node not in self._rebuilt:
            if node in self._outputs:
                again = self._outputs[node].rebuild(reader)
            else:
                sources = {source: self._rebuild(source, reader) for source in self._made[node]}
                if node.target is _aten.copy.default:
                    (again,) = sources.values()
                else:
                    with node.graph.inserting_before(reader):
                        again = node.graph.node_copy(node, lambda n: sources.get(n, n))
            keep_in_backward(again)
            self._rebuilt[node] = again
        return self._rebuilt[node]


def _sources(node: fx.Node) -> tuple[fx.Node, ...]:
    """The node that this one is a view, a part, a copy, a multiple or the square of, or the two that it is the gated
    product of; () if it is something else."""
    if node.target is operator.getitem:
        return (cast(fx.Node, node.args[0]),)
    if not isinstance(node.target, OpOverload):
        return ()
    tensors = tuple(n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, list, tuple)))
    if node.target is _aten.copy.default:  # an in-place qrelu writes its output over x
        x, y = (n.meta["val"] for n in tensors)
        alike = (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())
        return tensors[1:] if alike else ()
    if node.target is _ops.ops.gated_product.default:
        return tensors
    exact = node.target.is_view or node.target in _EXACT
    exact |= node.target is _aten.pow.Tensor_Scalar and node.args[1] in (1, 2)  # 1: of a square's derivative
    return tensors if exact and len(tensors) == 1 else ()


def pack_joint_graph(module: fx.GraphModule, *_: object) -> fx.GraphModule:
    """The pass: packs the output of each op in `_OUTPUTS`, which becomes the one without `_packed`."""
    forwards = [node for op in _OUTPUTS for node in module.graph.find_nodes(op="call_function", target=op)]
    if forwards:
        _JointGraph(module.graph, forwards).pack()
        module.recompile()
    return module


# ------------------------------------------------------------------------------------------------ the ops

_warned = False


def _autograd(kernel, forward: OpOverload):
    """kernel, whose graph contains `forward`."""

    def call(*args):
        install_joint_graph_pass(pack_joint_graph)  # before the graph that this call is traced into is complete
        return kernel(*args, forward=forward)

    return call


def _unpacked(op: OpOverload):
    """The kernel of an op in `_OUTPUTS`, which runs only if the pass has not replaced it."""

    def call(*args):
        global _warned
        if not _warned:
            _warned = True
            warnings.warn(
                "packed_activations has no effect in a graph that was compiled without AOTAutograd's joint_custom_pass,"
                ' as with backend="eager": the outputs of qrelu and qsigned in it are saved whole.',
                stacklevel=2,
            )
        return op(*args)

    return call


for _op, _derivative, _forward in (
    ("qrelu_packed", qrelu_with_derivative, _ops.ops.qrelu_forward_packed.default),
    ("qrelu_packed_", qrelu_with_derivative_, _ops.ops.qrelu_forward_packed.default),
    ("qsigned_packed", qsigned_with_derivative, _ops.ops.qsigned_forward_packed.default),
):
    _ops._library.impl(_op, _autograd(_derivative, _forward), "Autograd")
for _overload, _output in _OUTPUTS.items():
    _name = _overload.name().removesuffix(".default")
    _ops._library.impl(_name, _unpacked(_output.unpacked), "CompositeExplicitAutograd")


def _norm_qsigned_packed(*args):
    install_joint_graph_pass(pack_joint_graph)
    with below_autograd():
        return _ops.ops.norm_qsigned_packed.default(*args)


for _op, _kernel in (
    ("qrelu_forward_packed", torch.library.fallthrough_kernel),
    ("qsigned_forward_packed", torch.library.fallthrough_kernel),
    ("norm_qsigned_packed", _norm_qsigned_packed),  # which no kernel above calls
):
    _ops._library.impl(_op, _kernel, "Autograd")
