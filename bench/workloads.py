"""The networks that bench.inference runs, in the forms that its engines take.

Every network takes float32 numbers that are levels already, as the layer before it would hand on, and gives float32.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import coarsegrad as cg
from coarsegrad.experiments.models import lenet5
from coarsegrad.integer.weights import choose_weights

BITS = 4
_INTEGER_BITS = 8  # of the weights that other engines get
_LAYERS = (nn.Linear, nn.Conv2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

# -------------------------------------------------------------------------------------------- the list


@dataclass(frozen=True)
class Workload:
    """build() -> a Sequential that begins with the QReLU whose levels are its input. shape: of one input."""

    label: str
    build: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    batches: tuple[int, ...]


def _activation(bits: int = BITS, alpha: float | None = None) -> cg.QReLU:
    """Rounded to the nearest level, as the other engines do."""
    return cg.QReLU(bits, rounding="nearest", alpha=alpha)


def _perceptron(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(_activation(), nn.Linear(width, hidden), _activation(), nn.Linear(hidden, width))


def _convolutions(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [_activation()]
    for _ in range(4):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), _activation()]
    return nn.Sequential(*layers)


def _lenet() -> nn.Sequential:
    """LeNet-5 on images of 7 bits, whose pixels are codes as they are. With 8 the sums of two products overflow the 16
    bits of onnxruntime's AVX2 kernels."""
    return nn.Sequential(_activation(7, 1 / 127), *lenet5(_activation))


_ROWS, _IMAGES = (1, 16, 128, 1024), (1, 8)
WORKLOADS = {
    "mlp": Workload("MLP 2048-4096-2048", lambda: _perceptron(2048, 4096), (2048,), _ROWS),
    "ffn": Workload("FFN 768-3072-768", lambda: _perceptron(768, 3072), (768,), _ROWS),
    "conv56": Workload("four convolutions 64@56", lambda: _convolutions(64), (64, 56, 56), _IMAGES),
    "conv14": Workload("four convolutions 256@14", lambda: _convolutions(256), (256, 14, 14), _IMAGES),
    "lenet": Workload("LeNet-5", _lenet, (1, 28, 28), (64,)),
}

# --------------------------------------------------------------------------------- a network's forms


@dataclass(frozen=True)
class Layer:
    """A Linear or Conv2d on codes: module(alpha * codes) = alpha * scale * (integers by codes) + bias.

    integers: int8 in the shape of module.weight. scale, bias: float32 [C]. alpha: of its input. follower: the QReLU
    that comes next, None at the end.
    """

    module: nn.Linear | nn.Conv2d
    integers: Tensor
    scale: Tensor
    bias: Tensor
    alpha: float
    follower: cg.QReLU | None


Step = Layer | cg.QReLU | nn.MaxPool2d | nn.Flatten


class Network:
    """A workload's network in evaluation mode, from a fixed seed, and what is made of it, each once.

    Its weights are what integers of 8 bits represent, its biases what engines with biases of 32 bits do. No sum that a
    QReLU reads lies close to a threshold, so the codes do not depend on how an engine rounds floats.
    """

    def __init__(self, workload: Workload) -> None:
        torch.manual_seed(0)
        self._shape = workload.shape
        self._converted: dict[int, torch.fx.GraphModule] = {}
        self.simulated = workload.build().eval()
        _initialize(self.simulated)

    def input(self, batch: int) -> Tensor:
        """Levels of the first QReLU, float32 [batch, ...]."""
        x = torch.randn(batch, *self._shape, generator=torch.Generator().manual_seed(1))
        return self.simulated[0](x).detach()

    def converted(self, weight_bits: int) -> torch.fx.GraphModule:
        if weight_bits not in self._converted:
            self._converted[weight_bits] = cg.convert(self.simulated, (self.input(2),), weight_bits=weight_bits)
        return self._converted[weight_bits]

    @functools.cached_property
    def folded(self) -> nn.Sequential:
        """`simulated` with every BatchNorm folded into the layer before it."""
        modules: list[nn.Module] = []
        for module in self.simulated:
            if isinstance(module, _NORMS):
                modules[-1] = _folded(modules[-1], module)
            else:
                modules.append(module)
        return nn.Sequential(*modules).eval()

    @functools.cached_property
    def with_relu(self) -> nn.Sequential:
        """`folded` with nn.ReLU for every QReLU but the first: the input is not negative."""
        modules = (nn.ReLU() if isinstance(m, cg.QReLU) else copy.deepcopy(m) for m in self.folded[1:])
        return nn.Sequential(*modules).eval()

    @functools.cached_property
    def steps(self) -> list[Step]:
        """What `folded` does one after the other; a Layer includes the QReLU behind it."""
        return list(_steps(self.folded))

    @property
    def has_convolutions(self) -> bool:
        return any(isinstance(module, nn.Conv2d) for module in self.simulated)


def _steps(folded: nn.Sequential) -> Iterator[Step]:
    current = folded[0]
    yield current
    for module, following in zip(folded[1:], [*folded[2:], None]):
        if isinstance(module, _LAYERS):
            follower = following if isinstance(following, cg.QReLU) else None
            integers, scale = choose_weights(module.weight.detach().double().flatten(1), _INTEGER_BITS)
            integers = integers.to(torch.int8).view(module.weight.shape)
            yield Layer(module, integers, scale, module.bias.detach(), current.alpha.item(), follower)
        elif isinstance(module, cg.QReLU):
            current = module
        else:
            yield module


def _factor(norm: nn.Module | None) -> Tensor | float:
    """What a BatchNorm multiplies by, float64 [C]; 1 for None."""
    if norm is None:
        return 1.0
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    return factor * norm.weight.double() if norm.affine else factor


def _shift(norm: nn.Module | None) -> Tensor | float:
    """What a BatchNorm adds after that, float64 [C]; 0 for None."""
    if norm is None:
        return 0.0
    shift = -norm.running_mean.double() * _factor(norm)
    return shift + norm.bias.double() if norm.affine else shift


@torch.no_grad()
def _folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """torch.nn.utils.fusion.fuse_linear_bn_eval refuses a BatchNorm without affine parameters."""
    layer, factor = copy.deepcopy(layer), _factor(norm)
    layer.weight.copy_(layer.weight * factor.view(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias.copy_(layer.bias * factor + _shift(norm))
    return layer


# ------------------------------------------------------------------------------------ weights at random


def _initialize(network: nn.Sequential) -> None:
    modules = list(network)
    for norm in (module for module in modules if isinstance(module, _NORMS)):
        _initialize_norm(norm)
    alpha = 1.0  # of a layer's input
    for at, module in enumerate(modules):
        if isinstance(module, cg.QReLU):
            alpha = module.alpha.item()
        elif isinstance(module, _LAYERS):
            behind = [*modules[at + 1 : at + 3], None, None]
            norm = behind.pop(0) if isinstance(behind[0], _NORMS) else None
            next_alpha = behind[0].alpha.item() if isinstance(behind[0], cg.QReLU) else None
            _initialize_layer(module, norm, alpha, next_alpha)


@torch.no_grad()
def _initialize_norm(norm: nn.Module) -> None:
    norm.running_mean.normal_(0, 0.1)
    norm.running_var.uniform_(0.7, 1.4)
    if norm.affine:
        norm.weight.uniform_(0.7, 1.4)
        norm.bias.normal_(0, 0.1)


@torch.no_grad()
def _initialize_layer(layer: nn.Module, norm: nn.Module | None, alpha: float, next_alpha: float | None) -> None:
    """Weights whose sums are about unit Gaussian, and a small bias.

    A sum reaches the next QReLU as n * step * next_alpha, with n an integer, and its thresholds are
    (k - 1/2) * next_alpha. With 1 / step odd no n lies on one: the nearest are half a step away.
    """
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    integers, scale = choose_weights(layer.weight.double().flatten(1), _INTEGER_BITS)
    scale = scale.double()
    factor, shift = _factor(norm), _shift(norm)
    if next_alpha is not None:
        unit = alpha * factor / next_alpha  # step = scale * unit
        scale = 1 / ((1 / (2 * scale * unit)).floor() * 2 + 1) / unit
    layer.weight.copy_((integers * scale[:, None]).view_as(layer.weight))
    unit = alpha * scale * factor  # of what the folded bias is a multiple
    bias = torch.randn(len(scale), dtype=torch.float64) * 0.1
    layer.bias.copy_(((bias / unit).round() * unit - shift) / factor)
