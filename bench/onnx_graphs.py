"""The networks of bench.inference as ONNX models, for onnxruntime and OpenVINO; needs the package onnx."""

from __future__ import annotations

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

import coarsegrad as cg

from .workloads import Layer, Network

# The newest opset that both engines have kernels for, and the format that goes with it.
_OPSET, _IR_VERSION = 17, 10
_BLOCK = 32  # weights that share a scale in MatMulNBits
_INT8_PRODUCTS = 4  # MatMulNBits' accuracy_level: the fastest


class _Graph:
    """Nodes and constants in the order in which they are added; every value has a name of its own."""

    def __init__(self) -> None:
        self.nodes: list = []
        self.constants: dict[str, np.ndarray] = {}

    def constant(self, value: Tensor | np.ndarray | np.generic) -> str:
        name = f"constant{len(self.constants)}"
        self.constants[name] = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        return name

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def model(self, x: Tensor, result: str, shape: torch.Size) -> ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
            [helper.make_tensor_value_info(result, TensorProto.FLOAT, list(shape))],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        domains = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=domains, ir_version=_IR_VERSION)


def weight_bytes(model: ModelProto) -> int:
    return sum(numpy_helper.to_array(constant).nbytes for constant in model.graph.initializer)


def integer_model(network: Network, x: Tensor, shape: torch.Size) -> ModelProto:
    """QuantizeLinear, Min and DequantizeLinear for each QReLU, in the spelling that both engines turn into integer
    kernels: codes and weights of 8 bits, a scale for each output channel, biases of 32 bits. shape: of the output.

    The zero points of weights and biases are the default, but onnxruntime leaves a Gemm in floats without them.
    """
    graph = _Graph()
    zero = graph.constant(np.uint8(0))

    def quantized(value: str, activation: cg.QReLU) -> str:
        codes = graph.add("QuantizeLinear", value, graph.constant(np.float32(activation.alpha.item())), zero)
        top = 2**activation.bits - 1
        return codes if top == 255 else graph.add("Min", codes, graph.constant(np.uint8(top)))

    def levels(codes: str, alpha: float) -> str:
        return graph.add("DequantizeLinear", codes, graph.constant(np.float32(alpha)), zero)

    def constant_levels(integers: Tensor, scale: Tensor) -> str:
        operands = (graph.constant(value) for value in (integers, scale, torch.zeros(len(scale), dtype=integers.dtype)))
        return graph.add("DequantizeLinear", *operands, axis=0)

    value, alpha = "x", None  # alpha: of the codes in value; None if it holds floats
    for step in network.steps:
        if isinstance(step, cg.QReLU):
            value, alpha = quantized(value, step), step.alpha.item()
        elif isinstance(step, Layer):
            bias_scale = step.scale * step.alpha
            bias = (step.bias.double() / bias_scale.double()).round().to(torch.int32)
            weight = constant_levels(step.integers, step.scale)
            operands = levels(value, step.alpha), weight, constant_levels(bias, bias_scale)
            value, alpha = _layer(graph, step.module, operands), None
            if step.follower is not None:
                value, alpha = quantized(value, step.follower), step.follower.alpha.item()
        elif isinstance(step, nn.MaxPool2d):
            size = [step.kernel_size] * 2
            value = graph.add("MaxPool", value, kernel_shape=size, strides=size)
        else:
            value = graph.add("Flatten", value)
    return graph.model(x, value if alpha is None else levels(value, alpha), shape)


def _layer(graph: _Graph, module: nn.Linear | nn.Conv2d, operands: tuple[str, str, str]) -> str:
    if isinstance(module, nn.Linear):
        return graph.add("Gemm", *operands, transB=1)
    padding = list(module.padding) * 2
    return graph.add("Conv", *operands, kernel_shape=module.kernel_size, strides=module.stride, pads=padding)


def nbits_model(with_relu: nn.Sequential, x: Tensor, shape: torch.Size, bits: int) -> tuple[ModelProto, nn.Sequential]:
    """(MatMulNBits for each Linear, the network with the weights that it stands for)."""
    graph, rounded, value = _Graph(), [], "x"
    for module in with_relu:
        if isinstance(module, nn.ReLU):
            rounded.append(module)
            value = graph.add("Relu", value)
            continue
        packed, scales, weight = _blocks(module.weight.detach(), bits)
        value = graph.add(
            "MatMulNBits", value, graph.constant(packed), graph.constant(scales), "", "", graph.constant(module.bias),
            domain="com.microsoft", K=module.in_features, N=module.out_features, bits=bits, block_size=_BLOCK,
            accuracy_level=_INT8_PRODUCTS,
        )  # fmt: skip
        rounded.append(nn.Linear(module.in_features, module.out_features))
        rounded[-1].load_state_dict({"weight": weight, "bias": module.bias})
    return graph.model(x, value, shape), nn.Sequential(*rounded)


def _blocks(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(packed [N, blocks, bytes], scales [N, blocks], the weights that they stand for [N, K]). The integers are
    -2**(bits - 1) and up, stored without a sign, the first in the lowest bits."""
    blocks = weight.view(weight.size(0), -1, _BLOCK)
    low = -(2 ** (bits - 1))
    scales = blocks.abs().amax(-1, keepdim=True) / -low
    integers = (blocks / scales).round().clamp(low, -low - 1)
    fields = (integers - low).to(torch.uint8).view(*blocks.shape[:2], -1, 8 // bits)
    packed = (fields << torch.arange(0, 8, bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return packed, scales.squeeze(-1), (integers * scales).view_as(weight)
