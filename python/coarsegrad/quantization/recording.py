"""Which relus run in a forward, and where, whatever calls them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch_internals import tree_leaves
from .frames import TORCH, Frame, stack_from
from .relus import Relu, as_relu


@dataclass
class Execution:
    """A relu that ran, and the stack it was called from, innermost frame first."""

    relu: Relu
    stack: list[Frame]


class ReluRecorder(TorchFunctionMode):
    """Records each relu that runs in the block. A relu by another name, such as clamp(min=0), counts only if its input
    depends on the model's weights, provided they require grad: otherwise it bounds positions, sizes or the like."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.executions: list[Execution] = []
        self._trained = any(p.requires_grad for p in model.parameters())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        relu = as_relu(function, args, kwargs)
        if relu is not None and (relu.has_relu_name or relu.x.requires_grad or not self._trained):
            self.executions.append(Execution(relu, stack_from(sys._getframe(1))))
        return function(*args, **kwargs)


class ProductMarker(TorchFunctionMode):
    """Marks products of activations with activations, such as attention scores, also when scaled."""

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


class ReluLocations(TorchFunctionMode):
    """Collects where relus are called in the block, as file:line of the caller outside of torch."""

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
