"""The networks of the experiments, with the activation as an argument."""

from __future__ import annotations

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


def quantized_lenet5(
    float_model: nn.Module, bits: int, ste: str, rounding: str, learn_alpha: str | None
) -> nn.Module:
    """LeNet-5 with QReLU, from the weights and BatchNorm statistics of one with nn.ReLU, on the same device.

    `learn_alpha` is the rule of alpha's gradient, or None for an alpha fixed at the half-Gaussian optimum.
    """
    learn = {} if learn_alpha is None else {"learn_alpha": True, "alpha_grad": learn_alpha}
    model = lenet5(lambda: QReLU(bits, ste=ste, rounding=rounding, **learn))
    alphas = {name: value for name, value in model.state_dict().items() if name.endswith(".alpha")}
    model.load_state_dict({**float_model.state_dict(), **alphas})
    return model.to(next(float_model.parameters()).device)
