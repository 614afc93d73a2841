"""The networks of the experiments, with the activation as an argument."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .._types import RoundingName
from ..nn import QReLU, half_gaussian_alpha
from ..quantization import quantize_


def lenet5(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """LeNet-5 for images `[N, 1, 28, 28]` and 10 classes; `activation()` creates each of its three activations.

    BatchNorm without affine parameters precedes every activation, so that the inputs are close to unit Gaussian and one
    fixed alpha is best (Yin et al., ICLR 2019, arXiv 1903.05662).
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            norm1=nn.BatchNorm2d(20, affine=False),
            act1=activation(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            norm2=nn.BatchNorm2d(50, affine=False),
            act2=activation(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            norm3=nn.BatchNorm1d(500, affine=False),
            act3=activation(),
            fc2=nn.Linear(500, 10),
        )
    )


def vgg11(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """VGG-11 for images `[N, 3, 32, 32]` and 10 classes: eight convolutions and one linear layer.

    As in `lenet5`, BatchNorm without affine parameters precedes every activation. Simonyan and Zisserman, arXiv
    1409.1556.
    """
    layers, channels = [], 3
    for widths in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for width in widths:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width, affine=False),
                activation(),
            ]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def resnet20(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """ResNet-20 for images `[N, 3, 32, 32]` and 10 classes, with pre-activation blocks (norm, activation, convolution).

    BatchNorm without affine parameters precedes every activation. He, Zhang, Ren and Sun, arXiv 1603.05027.
    """
    blocks, channels = [], 16
    for width in (16, 32, 64):
        for number in range(3):
            blocks.append(_Block(channels, width, 2 if number == 0 and width != 16 else 1, activation))
            channels = width
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        *blocks,
        nn.BatchNorm2d(64, affine=False),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class _Block(nn.Module):
    """x + conv2(act2(norm2(conv1(act1(norm1(x)))))); to another shape, x is strided and padded with zero channels."""

    def __init__(self, channels: int, width: int, stride: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels, affine=False)
        self.act1 = activation()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width, affine=False)
        self.act2 = activation()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.act2(self.norm2(self.conv1(self.act1(self.norm1(x))))))
        stride = self.conv1.stride[0]
        return y + F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, y.size(1) - x.size(1)))


def resnet14(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """ResNet-14 for images `[N, 1, 28, 28]` and 10 classes, with ResNet-18's blocks: convolution, BatchNorm,
    activation, with the last activation after the sum. He, Zhang, Ren and Sun, arXiv 1512.03385.
    """
    stem = [nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), activation()]
    return _sums(stem, (16, 32, 64), 10, activation)


def resnet18(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """ResNet-18 for images `[N, 3, 224, 224]` and 1,000 classes. He, Zhang, Ren and Sun, arXiv 1512.03385."""
    stem = [
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), activation(),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]  # fmt: skip
    return _sums(stem, (64, 128, 256, 512), 1000, activation)


def _sums(
    stem: list[nn.Module], widths: tuple[int, ...], classes: int, activation: Callable[[], nn.Module]
) -> nn.Sequential:
    """The stem, two blocks of each width, which halve the image except for the first width, and a Linear."""
    blocks, channels = [], widths[0]
    for width in widths:
        for number in range(2):
            blocks.append(_SumBlock(channels, width, 2 if number == 0 and width != widths[0] else 1, activation))
            channels = width
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class _SumBlock(nn.Module):
    """act2(norm2(conv2(act1(norm1(conv1(x))))) + x); if the shape changes, x passes a convolution and BatchNorm."""

    def __init__(self, channels: int, width: int, stride: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.act2 = activation()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x))))) + self.shortcut(x))


def quantized(
    float_model: nn.Module,
    bits: int,
    ste: str = "clipped_relu",
    rounding: RoundingName = "ceil",
    learn_alpha: str | None = None,
    per_channel: bool = False,
    range_bits: int | None = None,
    weight_bits: Literal[8, 4, 2, 1] | None = None,
) -> nn.Module:
    """A copy of a trained network with a QReLU in place of each nn.ReLU.

    `ste` is one name for all activations, or one per activation in order, such as "relu+clipped_relu+clipped_relu".
    `learn_alpha` is the rule of alpha's gradient; None keeps alpha fixed at the half-Gaussian optimum.
    `per_channel`: one alpha per channel of the BatchNorm before the activation, instead of one per activation.
    `range_bits`: choose alpha so that the top level is that of the optimum at this number of bits instead of `bits`.
    `weight_bits`: of the weights of all layers; None keeps them float.
    """
    learn: dict[str, Any] = {} if learn_alpha is None else {"learn_alpha": True, "alpha_grad": learn_alpha}
    alpha = None
    if range_bits is not None:
        alpha = half_gaussian_alpha(range_bits, rounding) * (2**range_bits - 1) / (2**bits - 1)
    count = sum(isinstance(module, nn.ReLU) for module in float_model.modules())
    stes = ste.split("+") if "+" in ste else [ste] * count
    if len(stes) != count:
        raise ValueError(f"ste names {len(stes)} estimators, wanted one or {count}: {ste!r}")
    remaining = iter(stes)
    model = copy.deepcopy(float_model)
    device = next(model.parameters()).device
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
                channels = child.num_features
            elif isinstance(child, nn.ReLU):
                num_channels = channels if per_channel else None
                activation = QReLU(
                    bits, alpha=alpha, ste=next(remaining), rounding=rounding, num_channels=num_channels, **learn
                )
                setattr(parent, name, activation.to(device))
    if weight_bits is not None:
        quantize_(model, bits=None, weight_bits=weight_bits)
    return model
