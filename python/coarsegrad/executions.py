"""Which relus run in a forward, and by which calls: seen from outside, whoever calls them."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from types import CodeType, FrameType, FunctionType

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import SUPPORTED_NODES, tree_flatten, tree_leaves, tree_unflatten

from .nn import QReLU
from .rewriting import origin, original
from .sources import AT

_TORCH = os.path.dirname(torch.__file__) + os.sep
_CAN_LOCATE = sys.version_info >= (3, 11)  # before it a frame knows its line, not its call


def run(model: nn.Module, inputs: object) -> object:
    """model(inputs): a tuple or list of arguments, a mapping of keywords, or the one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _moved(batch: object, device: torch.device) -> object:
    """batch with its tensors on the device; of a container that has no `to` and is no pytree, a copy with them."""
    if hasattr(batch, "to") and not isinstance(batch, type):
        return batch.to(device)
    if isinstance(batch, Mapping) and type(batch) not in SUPPORTED_NODES:
        return {key: _moved(value, device) for key, value in batch.items()}
    if is_dataclass(batch) and not isinstance(batch, type) and type(batch) not in SUPPORTED_NODES:
        copied = copy.copy(batch)
        for field in fields(batch):
            object.__setattr__(copied, field.name, _moved(getattr(batch, field.name), device))
        return copied
    leaves, spec = tree_flatten(batch)
    if spec.is_leaf():
        return batch
    return tree_unflatten([_moved(leaf, device) for leaf in leaves], spec)


def moved_to(model: nn.Module, batch: object) -> object:
    """batch with its tensors on the model's device. accelerate's hooks move them themselves, and the parameters of an
    offloaded model are on meta."""
    if hasattr(model, "_hf_hook"):
        return batch
    return _moved(batch, next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu")))


def float_activation(layer: QReLU, x: Tensor) -> Tensor:
    """What the layer stands for; not by relu, which is watched."""
    y = x.clamp_(0, layer.limit) if layer.inplace else x.clamp(0, layer.limit)
    return y.square() if layer.squared else y


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


# ------------------------------------------------------------------------------------------ frames


@dataclass(frozen=True)
class Step:
    """A frame on the way to a call.

    position: where in the file it is: line, column, last line, last column; columns None where that is not known.
    module: its first argument, where that is a module. torch: whether its code is torch's.
    key: its variables by which the sites of a keyed function are chosen.
    """

    code: CodeType
    position: tuple[int, int | None, int, int | None]
    module: nn.Module | None
    torch: bool
    scope: dict[str, object] = field(repr=False)
    key: dict[str, object]


def steps_from(frame: FrameType | None) -> list[Step]:
    """The frames from the innermost outwards, up to that of `run`."""
    found = []
    while frame is not None and frame.f_code is not run.__code__:
        code, first = frame.f_code, None
        variables = frame.f_locals if code.co_flags & inspect.CO_OPTIMIZED else {}
        if code.co_argcount:
            first = variables.get(code.co_varnames[0])
        key = {name: value for name, value in variables.items() if name == AT or name.startswith("_turn_")}
        inside = code.co_filename.startswith(_TORCH)
        module = first if isinstance(first, nn.Module) else None
        found.append(Step(code, _position(frame), module, inside, frame.f_globals, key))
        frame = frame.f_back
    return found


@functools.lru_cache(maxsize=4096)
def _positions(code: CodeType) -> list[tuple[int, int, int, int]]:
    return [(line, column, last, last_column) for line, last, column, last_column in code.co_positions()]


def _position(frame: FrameType) -> tuple[int, int | None, int, int | None]:
    if _CAN_LOCATE:
        return _positions(frame.f_code)[frame.f_lasti // 2]
    return frame.f_lineno, None, frame.f_lineno, None


def locate(steps: list[Step], i: int) -> tuple[str, int] | None:
    """(the function of step i as an Edit names it, the step that is called as that function: i itself, or further out
    where step i is a lambda or a function within that one)."""
    step = steps[i]
    if (where := origin(step.code)) is not None:
        return where, i
    if step.module is not None:
        cls = original(type(step.module))[0]
        for base in cls.__mro__:
            for name, value in vars(base).items():
                if _code_of(value) is step.code:
                    is_own = inspect.getattr_static(cls, name) is value
                    return (name if is_own else f"{base.__module__}:{base.__qualname__}.{name}"), i
    where = _global_function(step.code, step.scope)
    if where is not None:
        return where, i
    for j in range(i + 1, len(steps)):
        if _is_within(step.code, steps[j].code):
            return locate(steps, j)
    return None


def _code_of(value: object) -> CodeType | None:
    value = getattr(value, "__func__", value)
    if not callable(value) or not hasattr(value, "__dict__"):
        return None
    try:
        value = inspect.unwrap(value)
    except ValueError:
        return None
    return value.__code__ if isinstance(value, FunctionType) else None


def _global_function(code: CodeType, scope: dict[str, object]) -> str | None:
    """The name of the function of that code, "module:name"."""
    module = scope.get("__name__")
    path = getattr(code, "co_qualname", code.co_name)
    if module in sys.modules and "<" not in path:
        value: object = sys.modules[module]
        for part in path.split("."):
            value = inspect.getattr_static(value, part, None)
        if _code_of(value) is code:
            return f"{module}:{path}"
    return None


def _is_within(code: CodeType, outer: CodeType) -> bool:
    return any(isinstance(c, CodeType) and (c is code or _is_within(code, c)) for c in outer.co_consts)


# ---------------------------------------------------------------------------------------- recording


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


@contextmanager
def undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """A block for a forward that leaves nothing behind: modes, buffers and random numbers are as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.device.type != "meta"]
    devices = {t.device.index or 0 for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    model.train(training)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
