"""What counts as a relu: functions, modules, and calls of torch functions that compute max(x, 0)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The functions that nn.ReLU stands for.
RELUS = (F.relu, torch.relu, torch.relu_, F.relu_, torch.Tensor.relu, torch.Tensor.relu_)


def qrelu_if_relu(qrelu: nn.Module, callee: Callable) -> Callable:
    """The QReLU if the callee is a relu, else the callee."""
    return qrelu if _is_relu(callee) else callee


def _is_relu(callee: Any) -> bool:
    """Whether the callee is nn.ReLU, one of its functions, or a partial of one."""
    if isinstance(callee, functools.partial):
        callee = callee.func
    if isinstance(callee, nn.Module):
        return type(callee).forward in (nn.ReLU.forward, nn.ReLU6.forward)
    callee = getattr(callee, "__func__", callee)
    return callee in RELUS or getattr(callee, "__name__", "") in ("relu", "relu_") and hasattr(callee, "__self__")


@dataclass(frozen=True)
class Relu:
    """A call that computes max(x, 0), or min(max(x, 0), limit).

    argument: where x is passed: a position, a keyword, or "." if a method of x is called.
    """

    name: str
    x: Tensor
    argument: int | str
    inplace: bool
    limit: float = float("inf")

    @property
    def has_relu_name(self) -> bool:
        return self.name.startswith("relu")


def as_relu(function: Callable, args: tuple, kwargs: Mapping[str, object]) -> Relu | None:
    """The relu that a call of a torch function computes; None unless it is one, of a floating-point tensor."""
    name = getattr(function, "__name__", "").removeprefix("aten::").removesuffix(".default").lstrip("_")
    known = _KNOWN.get(name.removesuffix("_"))
    if known is None:
        return None
    try:
        found = known(*args, **{word: value for word, value in kwargs.items() if word in known.__kwdefaults__})
    except TypeError:  # an overload that is not a relu
        return None
    if found is None or not isinstance(x := found[0], Tensor) or not x.is_floating_point():
        return None
    position = next((i for i, argument in enumerate(args) if argument is x), None)
    argument: int | str = next(word for word, value in kwargs.items() if value is x) if position is None else position
    if argument == 0 and function is getattr(torch.Tensor, name, None):
        argument = "."
    inplace = name.endswith("_") or any(flag is True for flag in (*args, kwargs.get("inplace")))
    return Relu(name, x, argument, inplace, *found[1:])


def _is_zero(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.device.type == "cpu" and value.numel() == 1 and not value.requires_grad and value.item() == 0
    return isinstance(value, (int, float)) and value == 0


def _relu(x=None, inplace=False, *, input=None, self=None):
    return (next(t for t in (x, input, self) if t is not None),)


def _relu6(x=None, inplace=False, *, input=None):
    return (x if x is not None else input), 6.0


def _clamp(x=None, low=None, high=None, *, input=None, self=None, min=None, max=None):
    x = next((t for t in (x, input, self) if t is not None), None)
    if (low if low is not None else min) is None or high is not None or max is not None:
        return None
    # A 1-d tensor holds lengths, scores or losses more often than activations.
    return (x,) if _is_zero(low if low is not None else min) and isinstance(x, Tensor) and x.dim() > 1 else None


def _maximum(x=None, y=None, *, input=None, other=None):
    x, y = (x if x is not None else input), (y if y is not None else other)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        for activation, bound in ((x, y), (y, x)):
            if activation.dim() > 1 and _is_zero(bound):
                return (activation,)
    return None


def _hardtanh(x=None, low=-1.0, high=1.0, inplace=False, *, input=None, min_val=None, max_val=None):
    low, high = (low if min_val is None else min_val), (high if max_val is None else max_val)
    return (x if x is not None else input, float(high)) if _is_zero(low) else None


def _threshold(x=None, threshold=None, value=None, inplace=False, *, input=None):
    return (x if x is not None else input,) if _is_zero(threshold) and _is_zero(value) else None


def _leaky_relu(x=None, slope=0.01, inplace=False, *, input=None, negative_slope=None):
    return (x if x is not None else input,) if _is_zero(slope if negative_slope is None else negative_slope) else None


# Name of a torch function -> (x, or x and the limit) of a call with these arguments; None if the call is not a relu.
_KNOWN: dict[str, Any] = {
    "relu": _relu, "relu6": _relu6, "clamp": _clamp, "clip": _clamp, "clamp_min": _clamp, "maximum": _maximum,
    "max": _maximum, "hardtanh": _hardtanh, "threshold": _threshold, "leaky_relu": _leaky_relu,
}  # fmt: skip
