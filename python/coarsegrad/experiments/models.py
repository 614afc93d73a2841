"""The networks of the experiments, with the activation as an argument."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from ..nn import QReLU


def lenet5(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """LeNet-5 for images `[N, 1, 28, 28]` and 10 classes; `activation()` makes each of its three activations.

    BatchNorm without affine precedes every activation, so that their inputs are close to unit Gaussians, for
    which one fixed alpha is the best (Yin et al., ICLR 2019, arXiv 1903.05662).
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


def quantized(
    float_model: nn.Module,
    bits: int,
    ste: str = "clipped_relu",
    rounding: str = "ceil",
    learn_alpha: str | None = None,
    per_channel: bool = False,
) -> nn.Module:
    """A copy of a trained network with QReLU in the place of each nn.ReLU.

    `learn_alpha` is the rule of alpha's gradient, or None for an alpha fixed at the half-Gaussian optimum.
    `per_channel`: one alpha for each channel of the BatchNorm before the activation, else one for each activation.
    """
    learn = {} if learn_alpha is None else {"learn_alpha": True, "alpha_grad": learn_alpha}
    model = copy.deepcopy(float_model)
    device = next(model.parameters()).device
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
                channels = child.num_features
            elif isinstance(child, nn.ReLU):
                num_channels = channels if per_channel else None
                activation = QReLU(bits, ste=ste, rounding=rounding, num_channels=num_channels, **learn)
                setattr(parent, name, activation.to(device))
    return model
