"""The ATen ops that move codes without arithmetic. They do the same to codes and values: code 0 is 0."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten
Call = Callable[..., Node]  # puts a call of an op into a graph: call(op, *args)

# By the dimensions of a window.
MAX_POOLS = {aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3}
# In a float tensor of codes these change nothing; of codes themselves they are left out.
_IDENTITIES = {
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.to.dtype,
    aten._to_copy.default,
}
_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_REARRANGEMENTS = {
    aten.cat.default,
    aten.channel_shuffle.default,
    aten.chunk.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.flip.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.narrow.default,
    aten.permute.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.repeat.default,
    aten.reshape.default,
    aten.roll.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.stack.default,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
    operator.getitem,
}


def target(node: Node) -> Any:
    """What a node calls or gets; torch gives it a type that nothing can be done with."""
    return node.target


def first_input(node: Node) -> Node:
    """The first argument, of nodes that have a node there."""
    x = node.args[0]
    assert isinstance(x, Node)
    return x


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call of an op by name, defaults included."""
    schema = target(node)._schema.arguments
    given = {argument.name: argument.default_value for argument in schema}
    return given | dict(zip([argument.name for argument in schema], node.args)) | node.kwargs


def is_identity(node: Node) -> bool:
    return node.target in _IDENTITIES


def is_move(node: Node) -> bool:
    """Whether the node moves codes without arithmetic, if all tensors that it is given are codes."""
    if node.op != "call_function":
        return False
    if node.target in _PADS:
        given = arguments(node)
        return given.get("mode", "constant") == "constant" and not given["value"]
    if node.target in (aten.dropout.default, aten.feature_dropout.default):
        return not arguments(node)["train"]
    if node.target in (aten.to.dtype, aten._to_copy.default):
        return node.meta["val"].is_floating_point()
    if node.target in MAX_POOLS:
        return all(isinstance(size, int) for size in node.meta["val"].shape[-MAX_POOLS[target(node)] :])
    return node.target in _REARRANGEMENTS | _IDENTITIES


def each(value: int | list[int], dims: int) -> list[int]:
    """One number for each dimension, from what torch takes for that."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def hinted(value: Any) -> Any:
    """A node of a size as the size in the example inputs."""
    if isinstance(value, Node):
        value = value.meta["val"]
    return value.node.hint if isinstance(value, torch.SymInt) else value


def moved_steps(node: Node, steps: dict[Node, Tensor]) -> Tensor | list[Tensor] | None:
    """The step of each element after a move, from those before it; None if a maximum compares different ones.

    A step of 0 is that of padding, whose code is 0 whatever the step.
    """

    def run(of: dict[Node, Tensor]) -> Any:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: of.get(n, hinted(n)))
        return target(node)(*args, **kwargs)

    if is_identity(node):
        return steps[first_input(node)]
    high = run(steps)
    if node.target in MAX_POOLS:
        low = -run({n: torch.where(step > 0, -step, -torch.inf) for n, step in steps.items()})
        if not bool(((high == low) | (high == 0)).all()):
            return None
    return high


def per_input(step: Tensor, dim: int) -> Tensor | None:
    """The step of each index of a dimension; None if it is not one number for each."""
    rows = step.movedim(dim, -1).flatten(0, -2)
    high, low = rows.amax(0), torch.where(rows > 0, rows, torch.inf).amin(0)
    return high if bool(((high == low) | (high == 0)).all()) else None
