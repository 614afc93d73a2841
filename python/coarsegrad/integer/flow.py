"""What an exported graph says of codes: which nodes carry them, and which layers read them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .._checks import checked_values
from .._ops import ops
from .layers import CannotConvert
from .moves import arguments, aten, first_input, hinted, is_move, moved_steps, target
from .sums import ADDITIONS, AVERAGES, MOST, average, averaged_step, common_step

QRELUS = {ops.qrelu.default, ops.qrelu_custom.default}
CONVOLUTIONS_1D = {aten.conv1d.default, aten.conv1d.padding}
CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding} | CONVOLUTIONS_1D
LAYERS = {aten.linear.default} | CONVOLUTIONS

_INPLACE = {
    ops.qrelu_.default: ops.qrelu.default,
    ops.qrelu_custom_.default: ops.qrelu_custom.default,
    aten.add_.Tensor: aten.add.Tensor,
}
_FUSED = {ops.qrelu_linear.default: aten.linear.default, ops.qrelu_conv2d.default: aten.conv2d.default}


@dataclass(frozen=True)
class Codes:
    """The values of a node: step * code, the codes at most levels. step: one number; or float64, that of each element
    in the example inputs, a list of these if the value is a list."""

    levels: int
    step: Fraction | Tensor | list[Tensor]

    @property
    def bits(self) -> int:
        return self.levels.bit_length()


def normalize(graph: torch.fx.Graph) -> None:
    """Turn the fused forms of a QReLU into it and a layer; and in-place QReLUs and sums into ones that are not, where
    no later node sees it."""
    for node in list(graph.nodes):
        if node.target in _INPLACE and _is_last_use(node):
            node.target = _INPLACE[target(node)]
        elif node.target in _FUSED:
            _split(graph, node)
        elif node.target == ops.qrelu_mlp.default:
            _split_mlp(graph, node)


def _is_last_use(node: Node) -> bool:
    """Whether nothing but the node and what comes from it can see that it overwrites its input."""
    x = first_input(node)
    if x.op != "call_function" or _may_be_view(x) or any(_may_be_view(user) for user in x.users if user is not node):
        return False
    later = node
    while (later := later.next).op != "root":
        if x in later.all_input_nodes:
            return False
    return True


def _may_be_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return is_move(node) or (schema is not None and any(a.alias_info is not None for a in schema.arguments))


def _split(graph: torch.fx.Graph, node: Node) -> None:
    given = arguments(node)
    activation = ("x", "alpha", "bits", "ste", "rounding", "alpha_grad", "alpha_scale", "channel_dim")
    window = [given[name] for name in ("stride", "padding", "dilation", "groups") if name in given]
    with graph.inserting_before(node):
        y = graph.call_function(ops.qrelu.default, tuple(given[name] for name in activation))
        y.meta = {**node.meta, "val": given["x"].meta["val"]}
        layer = graph.call_function(_FUSED[target(node)], (y, given["weight"], given["bias"], *window))
        layer.meta = dict(node.meta)
    node.replace_all_uses_with(layer)
    graph.erase_node(node)


def _split_mlp(graph: torch.fx.Graph, node: Node) -> None:
    """The layers and qrelus instead of all in one op."""
    x, weight1, bias1, alpha, weight2, bias2, bits, ste, rounding, squared, *up = arguments(node).values()
    branches = [(weight1, bias1, alpha)] + ([tuple(up)] if any(up) else [])
    factors, made = [], []
    with graph.inserting_before(node):
        with node.meta["val"].fake_mode:
            h_value = aten.linear.default(*(t and t.meta["val"] for t in (x, weight1, bias1)))
        for weight, bias, own_alpha in branches:
            h = graph.call_function(aten.linear.default, (x, weight, bias))
            y = graph.call_function(ops.qrelu.default, (h, own_alpha, bits, ste, rounding, "three_valued", 1.0, None))
            factors.append(y)
            made += [h, y]
        if squared or len(factors) > 1:
            y = graph.call_function(aten.mul.Tensor, (factors[0], factors[-1]))
            made.append(y)
        for each in made:
            each.meta = {**node.meta, "val": h_value}
        layer = graph.call_function(aten.linear.default, (y, weight2, bias2))
        layer.meta = dict(node.meta)
    node.replace_all_uses_with(layer)
    graph.erase_node(node)


class CodeFlow:
    """codes: what the nodes that carry codes hold. why_not: of what adds codes and carries none, the reason. Constants
    are the nodes that no input of the model changes."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self._module = module
        self._constants: dict[Node, Tensor | None] = {}
        self.codes: dict[Node, Codes] = {}
        self.why_not: dict[Node, str] = {}
        overwritten = _overwritten(module.graph)
        for node in module.graph.nodes:
            found = None if node in overwritten else self._found(node)
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
            return operator.attrgetter(target(node))(self._module)
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op != "call_function" or random or any(self.constant(n) is None for n in node.all_input_nodes):
            return None
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.constant)
        with torch.no_grad():
            return target(node)(*args, **kwargs)

    def _found(self, node: Node) -> Codes | None:
        if node.target in QRELUS:
            return self._of_qrelu(node)
        if is_move(node):
            return self._of_move(node)
        if node.target in AVERAGES | ADDITIONS:
            return self._of_sum(node)
        return None

    def _of_qrelu(self, node: Node) -> Codes | None:
        given = arguments(node)
        alpha, dim, levels = self.constant(given["alpha"]), given["channel_dim"], 2 ** given["bits"] - 1
        if alpha is None:
            return None
        alpha = checked_values(alpha.cpu(), torch.float64)
        if dim is None:
            return Codes(levels, Fraction(alpha.item()))
        shape = _example_shape(node)
        along = [1] * len(shape)
        along[dim] = -1
        return Codes(levels, alpha.view(along).expand(shape))

    def _of_move(self, node: Node) -> Codes | None:
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, list, tuple))]
        if not inputs or not all(n in self.codes for n in inputs):
            return None
        codes = [self.codes[n] for n in inputs]
        step: Fraction | Tensor | Sequence[Tensor] | None
        first = codes[0].step
        if all(isinstance(c.step, Fraction) and c.step == first for c in codes):
            step = first
        elif isinstance(first, list):
            index: Any = node.args[1]
            step = first[index] if node.target is operator.getitem else None
        else:
            step = moved_steps(node, {n: _of_each_element(self.step(n), _example_shape(n)) for n in inputs})
        if step is None:
            return None
        return Codes(max(c.levels for c in codes), list(step) if isinstance(step, (tuple, list)) else step)

    def step(self, node: Node) -> Fraction | Tensor:
        """The step of a node whose value is a tensor."""
        step = self.codes[node].step
        assert not isinstance(step, list)
        return step

    def terms(self, node: Node) -> list[Node]:
        """The inputs of an average or a sum, if all are codes; else none."""
        inputs = [
            n for n in node.args[: 2 if node.target in ADDITIONS else 1] if isinstance(n, Node) and n in self.codes
        ]
        plain = node.target in AVERAGES or (len(inputs) == 2 and arguments(node)["alpha"] == 1)
        return inputs if plain else []

    def factors(self, node: Node) -> Sequence[int]:
        """What a sum of two branches multiplies their codes by."""
        first, second = self.terms(node)
        return common_step(self.step(first), self.step(second))[1]

    def _of_sum(self, node: Node) -> Codes | None:
        terms = self.terms(node)
        if not terms:
            return None
        try:
            if node.target in AVERAGES:
                over = average(node)
                step, levels = averaged_step(over, self.step(terms[0])), over.count * self.codes[terms[0]].levels
            else:
                step, factors = common_step(self.step(terms[0]), self.step(terms[1]))
                levels = sum(factor * self.codes[n].levels for factor, n in zip(factors, terms))
            if levels > MOST:
                raise CannotConvert(
                    f"whose sums of codes reach {levels}, above {MOST}: give the summands alphas with a common unit"
                )
        except CannotConvert as why:
            self.why_not[node] = str(why)
            return None
        return Codes(levels, step)


def _overwritten(graph: torch.fx.Graph) -> set[Node]:
    """The nodes whose values a later node overwrites in place, and those that they may be views of."""
    found: set[Node] = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for argument in schema.arguments if schema is not None else ():
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = arguments(node)[argument.name]
                while isinstance(written, Node) and written not in found:
                    found.add(written)
                    written = written.args[0] if _may_be_view(written) else None
    return found


def _of_each_element(step: Fraction | Tensor, shape: list[int]) -> Tensor:
    return step.expand(shape) if isinstance(step, Tensor) else torch.full(shape, float(step), dtype=torch.float64)


def _example_shape(node: Node) -> list[int]:
    return [hinted(size) for size in node.meta["val"].shape]
