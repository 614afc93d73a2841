"""Which relus run in a forward, and on what: seen from outside, whoever calls them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch_internals import tree_leaves
from .frames import TORCH, Step, steps_from
from .relus import Relu, as_relu


@dataclass
class Execution:
    """A relu that ran: by which calls, innermost first, behind which module with parameters of its own."""

    relu: Relu
    steps: list[Step]


class Recorder(TorchFunctionMode):
    """Notes each relu that runs in the block; a bound by another name, as clamp(min=0), only where its input depends on
    the model's weights, if those require grad: else it is of positions, sizes or weights of an interpolation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.executions: list[Execution] = []
        self._trained = any(p.requires_grad for p in model.parameters())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        relu = as_relu(function, args, kwargs)
        if relu is not None and (relu.is_named_so or relu.x.requires_grad or not self._trained):
            self.executions.append(Execution(relu, steps_from(sys._getframe(1))))
        return function(*args, **kwargs)


class Products(TorchFunctionMode):
    """Marks products of activations with activations, as attention's scores are, also scaled."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "").strip("_")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        of_weights = any(isinstance(of, nn.Parameter) for t in tensors for of in (t, t._base))
        if name in _PRODUCTS and not of_weights:
            y._coarsegrad_product = True
        elif name in _SCALINGS and any(map(is_product, tensors)):
            y._coarsegrad_product = True
        return y


_PRODUCTS = ("matmul", "rmatmul", "bmm", "baddbmm", "einsum")
_SCALINGS = ("mul", "rmul", "div", "truediv", "true_divide", "to", "float")


def is_product(t: Tensor) -> bool:
    return getattr(t, "_coarsegrad_product", False)


class RelusCalled(TorchFunctionMode):
    """Notes where a relu is called in the block, as file:line outside of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("relu", "relu_", "relu6", "relu6_"):
            frame = sys._getframe(1)
            while frame.f_back and frame.f_code.co_filename.startswith(TORCH):
                frame = frame.f_back
            self.places.add(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return function(*args, **(kwargs or {}))
