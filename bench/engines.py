"""What bench.inference times: the converted network, and other engines on the same network."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import coarsegrad as cg
from coarsegrad.integer import WEIGHT_BITS

from .workloads import Layer, Network

PACKAGES = ("onnx", "onnxruntime", "openvino")

# How far an output may be from the expected one, as |difference| / |expected|. Of codes none may differ: one in 100,000
# is more than this.
_EXACT = 0.0
_FLOAT32 = 1e-5
_BFLOAT16 = 2e-2
# The inputs of MatMulNBits are rounded to 8 bits, block by block.
_NBITS = 2e-2


@dataclass(frozen=True)
class Subject:
    """A network and an input: what an engine is given, and what it is to compute."""

    network: Network
    x: Tensor
    threads: int

    @functools.cached_property
    def relu_output(self) -> Tensor:
        """Of the network with nn.ReLU, in float64."""
        return _in_float64(self.network.with_relu, self.x)

    @functools.cached_property
    def integer_output(self) -> Tensor:
        """Of the network with integer weights of 8 bits."""
        return _on_reference(self.network.converted(8), self.x)


@torch.no_grad()
def _in_float64(network: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(network).double()(x.double())


@torch.no_grad()
def _on_reference(network: nn.Module, x: Tensor) -> Tensor:
    with cg.use_backend("reference"):
        return network(x)


@dataclass(frozen=True)
class Prepared:
    """A job that was set up, what it is to return and within which tolerance, and the bytes of its weights."""

    run: Callable[[], Tensor]
    expected: Tensor
    tolerance: float
    weight_bytes: int

    @torch.no_grad()
    def error(self) -> float:
        """|difference| / |expected| of the output; 0 only if they are equal bit for bit."""
        got = self.run()
        if got.shape != self.expected.shape:
            return float("inf")
        if torch.equal(got, self.expected):
            return 0.0
        difference = (got.double() - self.expected.double()).norm() / self.expected.double().norm()
        return max(difference.item(), torch.finfo(torch.float64).tiny)  # 0 and -0 are equal, so this is rounding


@dataclass(frozen=True)
class Engine:
    """label: in tables. packages: what must be installed. why_not() -> why it is left out unless asked for by name.
    only_linear: it has no convolutions."""

    label: str
    prepare: Callable[[Subject], Prepared]
    packages: tuple[str, ...] = ()
    why_not: Callable[[], str | None] = lambda: None
    only_linear: bool = False

    def missing(self) -> list[str]:
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def suits(self, network: Network) -> bool:
        return not (self.only_linear and network.has_convolutions)


def versions() -> str:
    """Of the packages whose engines are timed, as installed, and of oneDNN."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if importlib.util.find_spec(name)]
    return ", ".join([f"oneDNN {_onednn_version()}", *found])


def _onednn_version() -> str:
    line = next((line for line in torch.__config__.show().splitlines() if "MKL-DNN" in line), "")
    return line.partition(" v")[2].partition(" ")[0] or "none"


def _tensor_bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


# ------------------------------------------------------------------------------------------ coarsegrad


def _converted(weight_bits: int, compiled: bool) -> Callable[[Subject], Prepared]:
    def prepare(subject: Subject) -> Prepared:
        network, x = subject.network.converted(weight_bits), subject.x
        forward = torch.compile(network, dynamic=False) if compiled else network
        return Prepared(lambda: forward(x), _on_reference(network, x), _EXACT, _tensor_bytes(network))

    return prepare


def _simulated(subject: Subject) -> Prepared:
    network, x = subject.network.simulated, subject.x
    return Prepared(lambda: network(x), subject.integer_output, _FLOAT32, _tensor_bytes(network))


# ----------------------------------------------------------------------------------------------- torch


def _memory_format(network: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Images channels last, in which oneDNN's convolutions of floats are fastest."""
    if x.dim() != 4:
        return network, x
    return network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


def _float32(subject: Subject) -> Prepared:
    network, x = _memory_format(subject.network.with_relu, subject.x)
    return Prepared(lambda: network(x), subject.relu_output, _FLOAT32, _tensor_bytes(network))


def _bfloat16(subject: Subject) -> Prepared:
    network, x = _memory_format(copy.deepcopy(subject.network.with_relu).bfloat16(), subject.x.bfloat16())
    return Prepared(lambda: network(x), subject.relu_output, _BFLOAT16, _tensor_bytes(network))


def _compiled(subject: Subject) -> Prepared:
    """With its weights frozen, so that Inductor may lay them out for its kernels."""
    network, x = _memory_format(subject.network.with_relu, subject.x)
    with torch._inductor.config.patch(freezing=True):
        forward = torch.compile(network, dynamic=False)
        forward(x)
    return Prepared(lambda: forward(x), subject.relu_output, _FLOAT32, _tensor_bytes(network))


def _no_bfloat16() -> str | None:
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return "this CPU has no bfloat16 products, and torch's stand-in is several times slower than float32"


# ---------------------------------------------------------------------------------------------- oneDNN


def _onednn(subject: Subject) -> Prepared:
    """qlinear_pointwise and qconv2d_pointwise one after the other: u8 codes, s8 weights packed by oneDNN, each QReLU
    as a clamp in the product's epilogue."""
    calls, weight_bytes, last = [], 0, None
    for step in subject.network.steps:
        if isinstance(step, cg.QReLU):
            calls.append(_quantize_call(step.alpha.item()))
        elif isinstance(step, Layer):
            calls.append(_onednn_call(step, subject.x.size(0)))
            weight_bytes += sum(t.nbytes for t in (step.integers, step.scale, step.bias))
            last = step.follower
        elif isinstance(step, nn.MaxPool2d):
            calls.append(functools.partial(_max_pool, size=step.kernel_size))
        else:
            calls.append(lambda x: x.flatten(1))
    if last is not None:
        calls.append(lambda codes, alpha=last.alpha.item(): codes * alpha)

    def run() -> Tensor:
        x = subject.x
        for call in calls:
            x = call(x)
        return x

    return Prepared(run, subject.integer_output, _FLOAT32, weight_bytes)


def _max_pool(codes: Tensor, size: int) -> Tensor:
    """torch.max_pool2d finds indices too, six times slower, and refuses bytes channels last from 12 x 12 on."""
    for dim in (2, 3):
        codes = functools.reduce(torch.maximum, (codes[_every(size, dim, at)] for at in range(size)))
    return codes


def _every(size: int, dim: int, at: int) -> tuple[slice, ...]:
    return (slice(None),) * dim + (slice(at, None, size),)


def _quantize_call(alpha: float) -> Callable[[Tensor], Tensor]:
    """Of levels, which need no clamp."""
    return lambda x: (x * (1 / alpha)).round_().to(torch.uint8)


def _onednn_call(layer: Layer, batch: int) -> Callable[[Tensor], Tensor]:
    ops, module, zeros = torch.ops.onednn, layer.module, torch.zeros(len(layer.scale), dtype=torch.int64)
    if layer.follower is None:
        epilogue = 1.0, 0, torch.float32, "none", [], ""
    else:
        step = layer.follower.alpha.item()
        epilogue = step, 0, torch.uint8, "hardtanh", [0.0, (2**layer.follower.bits - 1) * step], ""
    if isinstance(module, nn.Linear):
        packed = ops.qlinear_prepack(layer.integers, [batch, module.in_features])
        return lambda codes: ops.qlinear_pointwise(
            codes, layer.alpha, 0, packed, layer.scale, zeros, layer.bias, *epilogue
        )
    window = list(module.stride), list(module.padding), list(module.dilation), module.groups
    packed = ops.qconv_prepack(layer.integers, layer.scale, layer.alpha, 0, *window, None)
    return lambda codes: ops.qconv2d_pointwise(
        codes, layer.alpha, 0, packed, layer.scale, zeros, layer.bias, *window, *epilogue
    )


# ------------------------------------------------------------------------------- onnxruntime, OpenVINO


def onnxruntime_session(model: bytes | str, threads: int) -> Any:
    """model: its bytes, or the path of its file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def openvino_request(model: bytes | str, threads: int) -> Any:
    """model: its bytes, or the path of its file."""
    import openvino

    core = openvino.Core()
    # Without the last, float layers are computed in bfloat16 where the CPU has it.
    settings = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    return core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()


def _onnxruntime_run(model: bytes, subject: Subject) -> Callable[[], Tensor]:
    session = onnxruntime_session(model, subject.threads)
    inputs = {"x": subject.x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _openvino_run(model: bytes, subject: Subject) -> Callable[[], Tensor]:
    request = openvino_request(model, subject.threads)
    inputs = {0: subject.x.numpy()}
    return lambda: torch.from_numpy(request.infer(inputs, share_inputs=True, share_outputs=True)[0])


def _integer_onnx(run: Callable[[bytes, Subject], Callable[[], Tensor]]) -> Callable[[Subject], Prepared]:
    def prepare(subject: Subject) -> Prepared:
        from .onnx_graphs import integer_model, weight_bytes

        model = integer_model(subject.network, subject.x, subject.integer_output.shape)
        job = run(model.SerializeToString(), subject)
        return Prepared(job, subject.integer_output, _FLOAT32, weight_bytes(model))

    return prepare


def _nbits(bits: int) -> Callable[[Subject], Prepared]:
    def prepare(subject: Subject) -> Prepared:
        from .onnx_graphs import nbits_model, weight_bytes

        model, rounded = nbits_model(subject.network.with_relu, subject.x, subject.relu_output.shape, bits)
        job = _onnxruntime_run(model.SerializeToString(), subject)
        return Prepared(job, _in_float64(rounded, subject.x), _NBITS, weight_bytes(model))

    return prepare


# ------------------------------------------------------------------------------------------- the table

_ORT, _OPENVINO = ("onnx", "onnxruntime"), ("onnx", "openvino")


def ours(weight_bits: int, compiled: bool = False) -> str:
    """The name of a converted network."""
    return f"w{weight_bits}a4" + (" compiled" if compiled else "")


OURS = {
    ours(bits, compiled): Engine(f"W{bits}A4" + (", compiled" if compiled else ""), _converted(bits, compiled))
    for bits in WEIGHT_BITS
    for compiled in (False, True)
}
PEERS = {
    "qrelu": Engine("QReLU in floats", _simulated),
    "float32": Engine("torch float32", _float32),
    "bfloat16": Engine("torch bfloat16", _bfloat16, why_not=_no_bfloat16),
    "compile": Engine("torch.compile float32", _compiled),
    "onednn": Engine("oneDNN int8", _onednn),
    "onnxruntime": Engine("onnxruntime int8", _integer_onnx(_onnxruntime_run), _ORT),
    "openvino": Engine("OpenVINO int8", _integer_onnx(_openvino_run), _OPENVINO),
    "nbits4": Engine("MatMulNBits, 4 bits", _nbits(4), _ORT, only_linear=True),
    "nbits2": Engine("MatMulNBits, 2 bits", _nbits(2), _ORT, only_linear=True),
}
ENGINES = OURS | PEERS
