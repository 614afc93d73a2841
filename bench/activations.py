"""The activations that bench.peers times: QReLU, nn.ReLU, the staircase in plain torch, and other libraries'."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import coarsegrad as cg

# With alpha a power of two, x / alpha and x * (1 / alpha) are exact, so the forms in plain torch, which do not compare
# x with the levels, are bit-exact. QReLU's kernel runs the same code for any alpha.
BITS, ALPHA = 2, 0.5
_TOP_CODE = 2**BITS - 1
TOP = _TOP_CODE * ALPHA

Activation = Callable[[Tensor], Tensor]


def _static(function: Callable) -> Callable:
    """Compiled for one shape with a constant alpha, which favours torch.compile."""
    return torch.compile(function, fullgraph=True, dynamic=False)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return ALPHA * torch.clamp(torch.ceil(x / ALPHA), 0, _TOP_CODE)

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        return torch.where((x > 0) & (x <= TOP), grad_y, 0)


def _staircase(x: Tensor) -> Tensor:
    return torch.clamp(torch.ceil(x * (1 / ALPHA)), 0, _TOP_CODE) * ALPHA


def _compiled() -> Activation:
    """The fastest form in torch.compile: the two passes compiled separately, each one vectorised loop; x is saved.

    torch.utils.checkpoint inside one compiled function is equivalent, slower on small tensors and no faster on large
    ones.
    """
    staircase = _static(_staircase)
    gate = _static(lambda x, grad_y: torch.where((x > 0) & (x <= TOP), grad_y, 0))

    class Compiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return staircase(x)

        @staticmethod
        def backward(ctx, grad_y):
            return gate(*ctx.saved_tensors, grad_y)

    return lambda x: Compiled.apply(x) if torch.is_grad_enabled() else staircase(x)


def _idiomatic() -> Activation:
    """The usual idiom: a detached difference, compiled as one function.

    The partitioner saves the gate as a bool tensor: smaller than x, but its loops are many times slower.
    """

    def activation(x: Tensor) -> Tensor:
        clipped = torch.relu(x).clamp(max=TOP)
        return clipped + (_staircase(x) - clipped).detach()

    return _static(activation)


def _fake_quantize() -> Activation:
    """Eager: compiled it is slower on CPUs, like _Learnable and torchao's. Starting at 0, it includes the relu."""
    return lambda x: torch.fake_quantize_per_tensor_affine(x, ALPHA, 0, 0, _TOP_CODE)


class _Learnable(nn.Module):
    """torch's own with a learned step: LSQ's gradient without its scale. scale and zero must have x's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.zero = nn.Parameter(torch.tensor([ALPHA])), nn.Buffer(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.scale.to(x.dtype), self.zero.to(x.dtype)
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, 0, _TOP_CODE, 1.0)


def _brevitas() -> Activation:
    """With a constant step, which is faster than a learned one, and without JIT, which is slower here."""
    from brevitas.nn import QuantReLU

    return QuantReLU(bit_width=BITS, max_val=TOP, scaling_impl_type="const", return_quant_tensor=False)


def _torchao() -> Activation:
    """The function behind its fake quantizers, whose modules for activations recompute a step for each token."""
    from torchao.quantization.quant_primitives import _fake_quantize_affine

    def make(device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.tensor(ALPHA, device=device), torch.tensor(0, dtype=torch.int32, device=device)

    step: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def activation(x: Tensor) -> Tensor:
        scale, zero = step.get(x.device) or step.setdefault(x.device, make(x.device))
        return _fake_quantize_affine(x, (x.numel(),), scale, zero, torch.int32, 0, _TOP_CODE)

    return activation


@dataclass(frozen=True)
class Implementation:
    """make(): a new activation.

    output: "staircase": equal to QReLU's bit for bit; "nearest": the same levels, rounded to the nearest; "relu".
    package: the package that it requires.
    """

    label: str
    make: Callable[[], Activation]
    output: str = "staircase"
    inplace: bool = False
    package: str | None = None

    @property
    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def activation(self, x: Tensor) -> Activation:
        """A new one for tensors like x."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within the peers
            made = self.make()
        return made.to(x.device) if isinstance(made, nn.Module) else made


IMPLEMENTATIONS = {
    "relu": Implementation("nn.ReLU", nn.ReLU, "relu"),
    "relu_inplace": Implementation("nn.ReLU in place", lambda: nn.ReLU(inplace=True), "relu", inplace=True),
    "qrelu": Implementation("QReLU", lambda: cg.QReLU(BITS, alpha=ALPHA)),
    "qrelu_inplace": Implementation("QReLU in place", lambda: cg.QReLU(BITS, alpha=ALPHA, inplace=True), inplace=True),
    "qrelu_learned": Implementation("QReLU, learned", lambda: cg.QReLU(BITS, alpha=ALPHA, learn_alpha=True)),
    "compile": Implementation("torch.compile", _compiled),
    "idiomatic": Implementation("compiled idiom", _idiomatic),
    "eager": Implementation("eager", lambda: _Eager.apply),
    "fake_quantize": Implementation("fake_quantize", _fake_quantize, "nearest"),
    "learnable": Implementation("fq learnable", _Learnable, "nearest"),
    "brevitas": Implementation("brevitas", _brevitas, "nearest", package="brevitas"),
    "torchao": Implementation("torchao", _torchao, "nearest", package="torchao"),
}
