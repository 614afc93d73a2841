"""A torch graph in which modules of a form take the place of coarsegrad's ops.

Their constants, such as the integers of a weight, are computed here, before torch traces the graph: in the trace no
tensor has values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from .._torch_internals import without_tracer
from .._types import Rounding, top_level, wide_dtype
from ..integer import CodeFlow, arguments, normalize
from .forms import Form, Staircase
from .nodes import Window
from .numbers import layer_numbers
from .pooling import put_pools_in

_aten, _ops = torch.ops.aten, torch.ops.coarsegrad
_PREFIX = "coarsegrad."
_WITH_BIAS = (_aten.batch_norm.default, _aten.linear.default, _aten.conv1d.default, _aten.conv2d.default)
_ON_CODES = (_aten.sum.dim_IntList, _aten.mul.Tensor, _aten.add.Tensor)


class Lowering:
    """Of one graph, which it takes over. Raises ValueError for what the form cannot say."""

    def __init__(self, module: torch.fx.GraphModule, form: Form) -> None:
        self._module, self._graph, self._form = module, module.graph, form
        normalize(self._graph)
        self._known = CodeFlow(module)
        self._count = 0

    def run(self) -> torch.fx.GraphModule:
        for node in list(self._graph.nodes):
            if node.op == "call_module" or node.target is _aten._assert_tensor_metadata.default:
                # Checks of the inputs' sizes, which an ONNX graph states, and of the dtype of codes.
                self._graph.erase_node(node)
            elif node.op == "call_function" and node.users:
                self._lower(node)
        put_pools_in(self._graph, self._call)
        self._graph.eliminate_dead_code()
        self._module.delete_all_unused_submodules()
        self._graph.lint()
        return torch.fx.GraphModule(self._module, without_tracer(self._graph)).eval()

    # ----------------------------------------------------------------------------------------- nodes

    def _lower(self, node: Node) -> None:
        name = str(node.target).removeprefix(_PREFIX).partition(".")[0]
        value = node.meta.get("val")
        if node.target is _aten.avg_pool2d.default and arguments(node)["divisor_override"]:
            self._put(node, _SumPool(arguments(node)), arguments(node)["self"])
        elif not str(node.target).startswith(_PREFIX):
            if isinstance(value, Tensor) and value.dtype == torch.uint8:
                self._lower_sum(node)
        else:
            self._lower_op(node, name)

    def _lower_op(self, node: Node, name: str) -> None:
        if (value := self._known.constant(node)) is not None:
            with self._graph.inserting_before(node):
                self._replace(node, self._new_constant(value))
            return
        if name not in _LOWERED:
            raise ValueError(f"model has coarsegrad.{name}, which no form of ONNX export has")
        _LOWERED[name](self, node, arguments(node))

    def _lower_sum(self, node: Node) -> None:
        """Sums of codes, of which torch has bytes: in the form's dtype, and as float32 while they are added."""
        dtype = self._form.code_dtype
        if node.target is _aten.to.dtype and self._is_pool(node.args[0]):
            with self._graph.inserting_before(node):
                whole = self._graph.call_function(_aten.round.default, (node.args[0],))
            node.args = (whole, dtype)
        elif node.target in _ON_CODES and dtype == torch.uint8:
            with self._graph.inserting_before(node):
                args = tuple(
                    self._graph.call_function(_aten.to.dtype, (n, torch.float32)) if isinstance(n, Node) else n
                    for n in node.args
                )
            node.args, node.kwargs = args, {}
            with self._graph.inserting_after(node):
                back = self._graph.call_function(_aten.to.dtype, (node, dtype))
            back.meta = dict(node.meta)
            node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
        elif node.target is _aten.sum.dim_IntList:
            node.kwargs = {}

    def _is_pool(self, node: Any) -> bool:
        if node.target is _aten.squeeze.dim:  # of one dimension
            node = node.args[0]
        return node.op == "call_module" and isinstance(self._module.get_submodule(node.target), _SumPool)

    def _call(self, module: nn.Module, *inputs: Node) -> Node:
        name = self._name("part")
        self._module.add_module(name, module)
        return self._graph.call_module(name, inputs)

    def _name(self, stem: str) -> str:
        self._count += 1
        return f"export_{stem}_{self._count}"

    def _replace(self, node: Node, made: Node) -> None:
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        self._graph.erase_node(node)

    def _put(self, node: Node, module: nn.Module, *inputs: Node) -> None:
        """The parts of a sequence are nodes of their own."""
        with self._graph.inserting_before(node):
            for part in _parts(module):
                made = self._call(part, *inputs)
                made.meta, inputs = dict(node.meta), (made,)
        self._replace(node, made)

    def _constant(self, node: Node, what: str) -> Tensor:
        value = self._known.constant(node)
        if value is None:
            raise ValueError(f"{what} must be a constant of the model, but {node.name} is computed from its inputs")
        return value.detach()

    # ------------------------------------------------------------------------------------------- ops

    def _staircase(self, given: dict[str, Any], top: int, zero: int, rounding: str) -> Staircase:
        x = given["x"].meta["val"]
        alpha = self._constant(given["alpha"], "alpha").to(wide_dtype(x.dtype))
        dim = given["channel_dim"]
        dim = None if dim is None else dim % x.dim()
        staircase = Staircase(alpha, top, zero, rounding, dim, x.dim(), x.dtype)
        shift = self._form.shift(staircase)
        if shift is not None and x.dtype == torch.float32 and self._moves_bias(given["x"], shift, dim):
            return replace(staircase, rounding="nearest")
        return staircase

    def _moves_bias(self, node: Node, shift: Tensor, channel_dim: int | None) -> bool:
        """Whether node is a layer that only the staircase reads, along whose channels shift is; it then adds shift."""
        if len(node.users) > 1 or node.target not in _WITH_BIAS:
            return False
        given, dims = arguments(node), node.meta["val"].dim()
        channels = dims - 1 if node.target is _aten.linear.default else 1
        bias, weight = (self._known.constant(given[name]) for name in ("bias", "weight"))
        if channel_dim not in (None, channels) or (bias is None and given["bias"] is not None):
            return False
        count = node.meta["val"].shape[channels]
        bias = shift.expand(count) if bias is None else bias.detach() + shift
        with self._graph.inserting_before(node):
            named = {"bias": self._new_constant(bias)}
            if node.target is _aten.batch_norm.default and weight is None and given["weight"] is None:
                named["weight"] = self._new_constant(torch.ones(count))
        schema = [argument.name for argument in node.target._schema.arguments]
        node.args, node.kwargs = tuple(named.get(name, given[name]) for name in schema), {}
        return True

    def _new_constant(self, value: Tensor) -> Node:
        self._module.register_buffer(name := self._name("constant"), value.detach().clone())
        return self._graph.get_attr(name)

    def qrelu(self, node: Node, given: dict[str, Any]) -> None:
        staircase = self._staircase(given, 2 ** given["bits"] - 1, 0, given["rounding"])
        self._put(node, self._form.levels(staircase), given["x"])

    def qsigned(self, node: Node, given: dict[str, Any]) -> None:
        if given["alpha"] is None:
            raise ValueError(
                "model has a signed staircase with dynamic alphas, one for each group of its input, which no form of"
                " ONNX export has: give it an alpha"
            )
        p = top_level(given["bits"])
        self._put(node, self._form.levels(self._staircase(given, 2 * p, p, "nearest")), given["x"])

    def gated_product(self, node: Node, given: dict[str, Any]) -> None:
        self._put(node, _Gated(given["activation"]), given["gate"], given["up"])

    def integer_quantize(self, node: Node, given: dict[str, Any]) -> None:
        rounding = Rounding(given["rounding"]).name
        staircase = self._staircase(given, 2 ** given["bits"] - 1, 0, rounding)
        self._put(node, self._form.codes(staircase), given["x"])

    def integer_dequantize(self, node: Node, given: dict[str, Any]) -> None:
        self._put(node, self._form.steps(given["step"]), given["codes"])

    def integer_layer(self, node: Node, given: dict[str, Any]) -> None:
        weight, scale, offset = (self._constant(given[name], name) for name in ("weight", "scale", "offset"))
        thresholds = given.get("thresholds")
        if thresholds is not None:
            thresholds = self._constant(thresholds, "thresholds")
        codes, window, count = given["codes"], None, given["codes"].meta["val"].shape[-1]
        if "kernel_size" in given:
            window = Window(*(given[name] for name in ("kernel_size", "stride", "padding", "dilation", "groups")))
            count = codes.meta["val"].shape[1] // window.groups * window.kernel[0] * window.kernel[1]
        bits, levels = (given["bits"], given["weight_bits"]), given.get("levels")
        numbers = layer_numbers(weight, count, *bits, scale, offset, thresholds, levels)
        self._put(node, self._form.layer(numbers, window), codes)


def _parts(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.Sequential):
        return [part for child in module for part in _parts(child)]
    return [module]


class _SumPool(nn.Module):
    """avg_pool2d with a divisor, which torch's translation to ONNX leaves out."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        kernel = given["kernel_size"]
        kernel = list(kernel) * (2 // len(kernel))
        self.window = kernel, given["stride"], given["padding"], given["ceil_mode"], True
        self.factor = kernel[0] * kernel[1] / given["divisor_override"]

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, *self.window) * self.factor


class _Gated(nn.Module):
    """act(gate) * up, in torch's ops."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.activation == "gelu_tanh":
            return F.gelu(gate, approximate="tanh") * up
        return (gate if self.activation == "identity" else getattr(F, self.activation)(gate)) * up


_LOWERED: dict[str, Callable[[Lowering, Node, dict[str, Any]], None]] = {
    **dict.fromkeys(("qrelu", "qrelu_custom", "qrelu_packed"), Lowering.qrelu),
    **dict.fromkeys(("qsigned", "qsigned_packed"), Lowering.qsigned),
    "gated_product": Lowering.gated_product,
    "integer_quantize": Lowering.integer_quantize,
    "integer_dequantize": Lowering.integer_dequantize,
    **dict.fromkeys(
        ("integer_linear", "integer_linear_float", "integer_conv2d", "integer_conv2d_float"), Lowering.integer_layer
    ),
}
