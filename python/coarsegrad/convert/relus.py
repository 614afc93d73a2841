"""What counts as a relu: functions, modules, and calls of torch functions that compute one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What stands for nn.ReLU beside the function of its name in torch.nn.functional.
RELUS = (F.relu, torch.relu, torch.relu_, F.relu_, torch.Tensor.relu, torch.Tensor.relu_)


def instead(site: Callable, called: object) -> Callable:
    """The site where what is called is an activation, else that."""
    return site if is_activation(called) else called  # type: ignore[return-value]


def is_activation(called: object) -> bool:
    """Whether it is nn.ReLU, one of its functions, or a partial of one."""
    if isinstance(called, functools.partial):
        called = called.func
    if isinstance(called, nn.Module):
        return type(called).forward in (nn.ReLU.forward, nn.ReLU6.forward)
    called = getattr(called, "__func__", called)
    return called in RELUS or getattr(called, "__name__", "") in ("relu", "relu_") and hasattr(called, "__self__")


@dataclass(frozen=True)
class Relu:
    """A call that computes max(x, 0), or min(max(x, 0), limit).

    argument: which of its arguments x is: a position, a keyword, or "." where it is a method of x.
    """

    name: str
    x: Tensor
    argument: int | str
    inplace: bool
    limit: float = float("inf")

    @property
    def is_named_so(self) -> bool:
        return self.name.startswith("relu")


def as_relu(function: Callable, args: tuple, kwargs: Mapping[str, object]) -> Relu | None:
    """The call of a torch function as a relu, if it is one of a floating-point tensor."""
    name = getattr(function, "__name__", "").removeprefix("aten::").removesuffix(".default").lstrip("_")
    known = _KNOWN.get(name.removesuffix("_"))
    if known is None:
        return None
    try:
        of = known(*args, **{word: value for word, value in kwargs.items() if word in known.__kwdefaults__})
    except TypeError:  # a form of it that is none
        return None
    if of is None or not isinstance(x := of[0], Tensor) or not x.is_floating_point():
        return None
    position = next((i for i, argument in enumerate(args) if argument is x), None)
    argument = position if position is not None else next(word for word, value in kwargs.items() if value is x)
    if argument == 0 and function is getattr(torch.Tensor, name, None):
        argument = "."
    inplace = name.endswith("_") or any(flag is True for flag in (*args, kwargs.get("inplace")))
    return Relu(name, x, argument, inplace, *of[1:])


def _zero(value: object) -> bool:
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
    # Of a tensor of one dimension it is lengths, scores or a loss more often than an activation.
    return (x,) if _zero(low if low is not None else min) and isinstance(x, Tensor) and x.dim() > 1 else None


def _maximum(x=None, y=None, *, input=None, other=None):
    x, y = (x if x is not None else input), (y if y is not None else other)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        for one, beside in ((x, y), (y, x)):
            if one.dim() > 1 and _zero(beside):
                return (one,)
    return None


def _hardtanh(x=None, low=-1.0, high=1.0, inplace=False, *, input=None, min_val=None, max_val=None):
    low, high = (low if min_val is None else min_val), (high if max_val is None else max_val)
    return (x if x is not None else input, float(high)) if _zero(low) else None


def _threshold(x=None, threshold=None, value=None, inplace=False, *, input=None):
    return (x if x is not None else input,) if _zero(threshold) and _zero(value) else None


def _leaky_relu(x=None, slope=0.01, inplace=False, *, input=None, negative_slope=None):
    return (x if x is not None else input,) if _zero(slope if negative_slope is None else negative_slope) else None


_KNOWN = {
    "relu": _relu, "relu6": _relu6, "clamp": _clamp, "clip": _clamp, "clamp_min": _clamp, "maximum": _maximum,
    "max": _maximum, "hardtanh": _hardtanh, "threshold": _threshold, "leaky_relu": _leaky_relu,
}  # fmt: skip
