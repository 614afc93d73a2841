"""The rewriting of an exported graph: integer ops take the place of the layers that read codes.

Codes are uint8 in the layout of the float tensor. What replaces a node is put right before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .._ops import ops
from .._types import Rounding, wide_dtype
from .flow import CONVOLUTIONS, CONVOLUTIONS_1D, LAYERS, QRELUS, CodeFlow, normalize
from .layers import CannotConvert, IntegerLayer, Norm, Staircase, integer_layer
from .moves import MAX_POOLS, arguments, aten, each, first_input, is_identity, is_move, per_input, target
from .names import described, name_of, op_name, source, weight_name
from .pools import max_pool
from .report import Converted, ConvertReport, Stayed
from .sums import AVERAGES, average, weighted_sum
from .trained import TrainedCodes


class Rewriting:
    """One conversion of an exported module, in place."""

    def __init__(
        self,
        module: torch.fx.GraphModule,
        weight_bits: int | Mapping[str, int] | None,
        trained: Mapping[str, TrainedCodes],
    ) -> None:
        normalize(module.graph)
        self._module, self._graph = module, module.graph
        self._flow = CodeFlow(module)
        self._weight_bits, self._trained = weight_bits, trained
        self._code_nodes: dict[Node, Node] = {}  # node that carries codes -> the node of the codes themselves
        self.report = ConvertReport()

    def run(self) -> None:
        layers = [node for node in self._graph.nodes if node.target in LAYERS]
        self._check_names([name_of(node) for node in layers])
        for layer in layers:
            if layer.args[0] in self._flow.codes:
                self._convert(layer)
            else:
                read = source(layer.args[0])
                self._stays(layer, f"reads {described(read)}, {self._flow.why_not.get(read, 'not codes')}")
        self._finish()
        self._graph.lint()
        self._module.recompile()

    def _check_names(self, names: list[str]) -> None:
        if isinstance(self._weight_bits, Mapping) and (unknown := set(self._weight_bits) - set(names)):
            raise ValueError(f"weight_bits must name layers of {sorted(set(names))}, got {sorted(unknown, key=str)}")

    def _check_trained(self, layer: Node) -> None:
        name, codes, wanted = name_of(layer), self._trained_codes(layer), self._weight_bits
        asked = wanted.get(name) if isinstance(wanted, Mapping) else wanted
        if codes is not None and asked not in (None, codes.bits):
            raise ValueError(f"weight_bits must be {codes.bits} for {name}, as its QWeight has, or None, got {asked}")

    def _trained_codes(self, layer: Node) -> TrainedCodes | None:
        """What a layer's QWeight has, if the layer reads that very weight."""
        return self._trained.get(name_of(layer)) if weight_name(layer) is not None else None

    def _bits_of(self, layer: Node) -> int:
        if (codes := self._trained_codes(layer)) is not None:
            return codes.bits
        if isinstance(self._weight_bits, Mapping):
            return self._weight_bits.get(name_of(layer), 8)
        return 8 if self._weight_bits is None else self._weight_bits

    def _stays(self, node: Node, why: str) -> None:
        self.report.stayed.append(Stayed(name_of(node), described(node), why))

    # ---------------------------------------------------------------------------------------- layers

    def _convert(self, layer: Node) -> None:
        self._check_trained(layer)
        norm, between, qrelu = self._after(layer)
        try:
            integer = self._integer_layer(layer, norm, qrelu)
        except CannotConvert as why:
            self._stays(layer, str(why))
            return
        if qrelu is not None:
            with self._graph.inserting_before(qrelu):
                codes = self._emit(layer, integer, 2 ** arguments(qrelu)["bits"] - 1)
                for move in between:
                    codes = self._moved(move, {first_input(move): codes})
            self._code_nodes[qrelu] = codes
        else:
            last = norm or layer
            with self._graph.inserting_before(last):
                output = self._floats(self._emit(layer, integer, None), torch.float32, last)
            last.replace_all_uses_with(output)
        self._record(layer, norm, integer, qrelu is not None)

    def _after(self, layer: Node) -> tuple[Node | None, list[Node], Node | None]:
        """(BatchNorm, moves, QReLU): what follows the layer and reads nothing else, each if it can be folded."""
        node, norm, between = layer, None, []
        after = _only_user(node)
        if after is not None and after.target is aten.batch_norm.default and self._foldable(layer, after):
            node = norm = after
        while (after := _only_user(node)) is not None and _moves_one_tensor(after):
            between.append(after)
            node = after
        if after is None or after.target not in QRELUS or after not in self._flow.codes or after.args[0] is not node:
            return norm, [], None
        dim = arguments(after)["channel_dim"]
        if dim is not None and (between or dim % layer.meta["val"].dim() != _channel_dim(layer)):
            return norm, [], None
        return norm, between, after

    def _foldable(self, layer: Node, norm: Node) -> bool:
        """Whether it is a BatchNorm in evaluation, of constants, along the channels of the layer's output."""
        given = arguments(norm)
        optional = [given[name] for name in ("weight", "bias") if given[name] is not None]
        needed = [given["running_mean"], given["running_var"], *optional]
        constant = all(self._flow.constant(node) is not None for node in needed)
        return constant and not given["training"] and _channel_dim(layer) == 1

    def _integer_layer(self, layer: Node, norm: Node | None, qrelu: Node | None) -> IntegerLayer:
        given, x = arguments(layer), first_input(layer)
        weight, bias = self._flow.constant(given["weight"]), self._flow.constant(given["bias"])
        if weight is None or (bias is None and given["bias"] is not None):
            raise CannotConvert("its weight is not constant")
        if layer.target in CONVOLUTIONS and x.meta["val"].dim() != weight.dim():
            raise CannotConvert("its input has no batch dimension")
        step = self._flow.step(x)
        if isinstance(step, Tensor):
            step = _row_steps(layer, weight, step)
        codes = self._trained_codes(layer)
        chosen = None if codes is None else (_rows(layer, codes.integers).flatten(1).cpu(), codes.by_row())
        rows, levels, bits = _rows(layer, weight), self._flow.codes[x].levels, self._bits_of(layer)
        return integer_layer(rows, bias, step, levels, bits, self._norm(norm), self._staircase(qrelu), chosen)

    def _norm(self, norm: Node | None) -> Norm | None:
        if norm is None:
            return None
        given = arguments(norm)
        mean, var = (self._known(given[name]) for name in ("running_mean", "running_var"))
        weight, bias = (self._flow.constant(given[name]) for name in ("weight", "bias"))
        return Norm(mean, var, given["eps"], weight, bias)

    def _staircase(self, qrelu: Node | None) -> Staircase | None:
        if qrelu is None:
            return None
        given = arguments(qrelu)
        return Staircase(self._known(given["alpha"]), given["bits"], given["rounding"])

    def _known(self, node: Node) -> Tensor:
        """The value of what is known to be a constant."""
        value = self._flow.constant(node)
        assert value is not None
        return value

    # ----------------------------------------------------------------------------------------- nodes

    def _call(self, op: Callable[..., Any], *args: Any) -> Node:
        return self._graph.call_function(op, args)

    def _floats(self, node: Node, dtype: torch.dtype, like: Node) -> Node:
        """node, of dtype, as the nodes that stay expect it: in the dtype of `like`, and contiguous if that is."""
        wanted = like.meta["val"]
        if dtype != wanted.dtype:
            node = self._call(aten.to.dtype, node, wanted.dtype)
        if wanted.dim() in (3, 4) and wanted.is_contiguous():  # what comes from an integer_conv2d is in channels_last
            node = self._call(aten.contiguous.default, node)
        return node

    def _emit(self, layer: Node, integer: IntegerLayer, levels: int | None) -> Node:
        """The op of an integer layer; levels: of its output codes, None for floats."""
        weight, scale, offset, thresholds = self._stored(name_of(layer), integer)
        x = first_input(layer)
        codes, bits = self._code_node(x), self._flow.codes[x].bits
        staircase = () if levels is None else (thresholds, levels)
        window: tuple[list[int], ...] = ()
        name = "integer_linear"
        if layer.target in CONVOLUTIONS:
            name = "integer_conv2d"
            codes, window = self._window(layer, codes)
        op = getattr(ops, name if levels is not None else f"{name}_float").default
        made = self._call(op, codes, weight, bits, self._bits_of(layer), scale, offset, *staircase, *window)
        return self._call(aten.squeeze.dim, made, -2) if layer.target in CONVOLUTIONS_1D else made

    def _stored(self, name: str, integer: IntegerLayer) -> list[Node | None]:
        """The layer's tensors as buffers of the module of that name."""
        modules = dict(self._module.named_modules())
        owner, prefix = (modules[name], f"{name}.") if name and name in modules else (self._module, "")
        nodes: list[Node | None] = []
        for stem, tensor in vars(integer).items():
            if tensor is None:
                nodes.append(None)
                continue
            attribute, number = f"integer_{stem}", 1
            while hasattr(owner, attribute):  # a layer that is called twice
                attribute, number = f"integer_{stem}_{number}", number + 1
            owner.register_buffer(attribute, tensor)
            nodes.append(self._graph.get_attr(prefix + attribute))
        return nodes

    def _window(self, layer: Node, codes: Node) -> tuple[Node, tuple[list[int], ...]]:
        """(codes, the arguments of integer_conv2d after levels); padding that is not the same on both sides comes
        before it."""
        given = arguments(layer)
        kernel = list(self._known(given["weight"]).shape[2:])
        stride, dilation = (each(given[name], len(kernel)) for name in ("stride", "dilation"))
        before, behind = _padding(given["padding"], kernel, dilation)
        if before != behind:
            pad = [n for pair in zip(reversed(before), reversed(behind)) for n in pair]
            codes = self._call(aten.constant_pad_nd.default, codes, pad, 0)
            before = [0] * len(kernel)
        if len(kernel) == 1:
            codes = self._call(aten.unsqueeze.default, codes, -2)
            kernel, stride, before, dilation = [1, *kernel], [1, *stride], [0, *before], [1, *dilation]
        return codes, (kernel, stride, before, dilation, given["groups"])

    def _code_node(self, node: Node) -> Node:
        """The codes of a node that carries codes."""
        if node not in self._code_nodes:
            codes = {n: self._code_node(n) for n in node.all_input_nodes if n in self._flow.codes}
            with self._graph.inserting_before(node):
                if node.target in QRELUS:
                    made = self._quantized(node)
                elif is_move(node):
                    made = self._moved(node, codes)
                else:
                    made = self._added(node, [codes[n] for n in self._flow.terms(node)])
            self._code_nodes[node] = made
        return self._code_nodes[node]

    def _quantized(self, qrelu: Node) -> Node:
        given = arguments(qrelu)
        settings = (given["bits"], int(Rounding[given["rounding"]]), given["channel_dim"])
        return self._call(ops.integer_quantize.default, given["x"], given["alpha"], *settings)

    def _added(self, node: Node, terms: list[Node]) -> Node:
        """The average or sum of a node, of codes."""
        if node.target in AVERAGES:
            return average(node).sums(self._call, *terms)
        return weighted_sum(self._call, terms, self._flow.factors(node))

    def _moved(self, node: Node, codes: dict[Node, Node]) -> Node:
        """The move of a node, of codes."""
        if is_identity(node):
            return codes[first_input(node)]
        if node.target in MAX_POOLS:
            return max_pool(self._call, node, codes[first_input(node)])
        args: Any
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: codes.get(n, n))
        op = aten.reshape.default if node.target is aten.view.default else target(node)
        return self._graph.call_function(op, args, kwargs)

    # ---------------------------------------------------------------------------------------- finish

    def _finish(self) -> None:
        """From the end of the graph: remove what nothing uses, and turn codes into floats for the nodes that stay."""
        readers: list[Stayed] = []
        for node in reversed(list(self._graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users and not node.is_impure():
                self._graph.erase_node(node)
            elif node in self._code_nodes and (node.target in QRELUS or self._has_one_step(node)):
                why = f"reads codes of {name_of(node)} as floats"
                readers += [Stayed(name_of(user), described(user), why) for user in reversed(node.users)]
                self._dequantize(node)
            elif node.target in QRELUS and node in self._flow.codes:
                self._stays(node, "no layer reads it as codes")
        self.report.stayed += reversed(readers)

    def _has_one_step(self, node: Node) -> bool:
        return isinstance(self._flow.codes[node].step, Fraction)

    def _dequantize(self, node: Node) -> None:
        """Put step * code in the place of a node, as qrelu rounds it."""
        wanted = node.meta["val"]
        wide = wide_dtype(wanted.dtype)
        with self._graph.inserting_before(node):
            codes, factor = self._code_nodes[node], self._factor(node, wide)
            if wide == torch.float32 and isinstance(factor, float):
                levels = self._call(ops.integer_dequantize.default, codes, factor, wanted.is_contiguous())
            else:
                levels = self._call(aten.mul.Tensor, self._call(aten.to.dtype, codes, wide), factor)
            levels = self._floats(levels, wide, node)
        node.replace_all_uses_with(levels)
        self._graph.erase_node(node)

    def _factor(self, node: Node, wide: torch.dtype) -> Node | float:
        """The step of a node, as it multiplies codes; of a QReLU's channels it is a tensor."""
        step = self._flow.step(node)
        if isinstance(step, Fraction):
            return torch.tensor(float(step), dtype=torch.float64).to(wide).item()
        given = arguments(node)
        along = [1] * node.meta["val"].dim()
        along[given["channel_dim"]] = -1
        return self._call(aten.view.default, self._call(aten.to.dtype, given["alpha"], wide), along)

    def _record(self, layer: Node, norm: Node | None, integer: IntegerLayer, codes: bool) -> None:
        given, report = arguments(layer), self.report
        weight, bias = self._known(given["weight"]), self._flow.constant(given["bias"])
        what, output = f"{op_name(layer)} {list(weight.shape)}", "codes" if codes else "float"
        how = [f"with {name_of(norm)}"] if norm else []
        how += ["by thresholds"] if integer.thresholds is not None else []
        how += ["as trained"] if self._trained_codes(layer) is not None else []
        report.converted.append(Converted(name_of(layer), what, self._bits_of(layer), output, "; ".join(how)))
        report.device = integer.weight.device.type
        report.integer_bytes += sum(t.nbytes for t in vars(integer).values() if t is not None)
        report.float_bytes += sum(t.nbytes for t in (weight, bias) if t is not None)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _moves_one_tensor(node: Node) -> bool:
    return is_move(node) and isinstance(node.args[0], Node) and isinstance(node.meta["val"], Tensor)


def _channel_dim(layer: Node) -> int:
    return 1 if layer.target in CONVOLUTIONS else layer.meta["val"].dim() - 1


def _rows(layer: Node, weight: Tensor) -> Tensor:
    """weight in the order of the ops: [C, K], or [C, *window, C_in / groups]."""
    return weight.movedim(1, -1) if layer.target in CONVOLUTIONS else weight


def _row_steps(layer: Node, weight: Tensor, steps: Tensor) -> Tensor:
    """The input's step at each weight, in a shape that broadcasts against `_rows`."""
    step = per_input(steps, 1 if layer.target in CONVOLUTIONS else -1)
    if step is None:
        raise CannotConvert("the alpha of its input is not one for each input channel")
    if layer.target not in CONVOLUTIONS:
        return step
    groups = arguments(layer)["groups"]
    rows = step.view(groups, -1).repeat_interleave(weight.size(0) // groups, 0)
    return rows.view(weight.size(0), *[1] * (weight.dim() - 2), -1)


def _padding(padding: str | int | list[int], kernel: list[int], dilation: list[int]) -> tuple[list[int], list[int]]:
    """(before, behind) of each dimension."""
    if not isinstance(padding, str):
        return each(padding, len(kernel)), each(padding, len(kernel))
    total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation)]
    return [n // 2 for n in total], [n - n // 2 for n in total]
