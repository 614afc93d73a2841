"""Running a model with watchers in place of its QReLUs, for `calibrate` and `stats`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .._torch_internals import FakeTensor
from ..blocks import has_staircases
from ..nn import QReLU
from .running import on_device_of, run


def warn_about_unreached(function: str, names: list[str], stacklevel: int) -> None:
    if names:
        warnings.warn(f"{function}: no batch reached {', '.join(names)}", stacklevel=stacklevel + 1)


def qrelus_of(model: nn.Module) -> dict[str, QReLU]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = {name or "(model)": module for name, module in model.named_modules() if isinstance(module, QReLU)}
    if not layers and not has_staircases(model):  # whose alphas are dynamic
        raise ValueError("model has no QReLU; quantize_ inserts them")
    for name, layer in layers.items():
        _check_values("alpha", name, layer.alpha)
    return layers


def _check_values(what: str, name: str, t: Tensor) -> None:
    if t.is_meta or isinstance(t, FakeTensor):
        where = "made in FakeTensorMode" if isinstance(t, FakeTensor) else "on the meta device (or offloaded)"
        raise ValueError(f"{what} of {name} has no values: it is {where}")


def run_batches(model: nn.Module, batches: Iterable, forward: Callable | None, progress: bool, title: str) -> None:
    count = 0
    for batch in tqdm(batches, desc=title, unit="batch", leave=False, disable=None if progress else True):
        (forward or run)(model, on_device_of(model, batch))
        count += 1
    if not count:
        raise ValueError("batches is empty")


@contextmanager
def watched(model: nn.Module, layers: dict[str, QReLU], watchers: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator:
    """In the block, each layer's watcher computes in its place, in evaluation mode and without gradients."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with replaced(layers, watchers), torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def replaced(layers: dict[str, QReLU], watchers: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator:
    """In the block, each layer's watcher computes in its place. Blocks may be left in any order."""
    watching = [_Watched(name, layer, watchers[name]) for name, layer in layers.items()]
    for each in watching:
        vars(each.layer)["forward"] = each
    try:
        yield
    finally:
        for each in watching:
            each.end()


class _Watched:
    """The forward of a layer in a block of `replaced`."""

    def __init__(self, name: str, layer: QReLU, watcher: Callable[[Tensor], Tensor]) -> None:
        self.layer, self._name, self._watcher = layer, name, watcher
        self._before: Callable[[Tensor], Tensor] | None = vars(layer).get("forward")
        self._ended = False

    def __call__(self, x: Tensor) -> Tensor:
        if self._ended:  # but not the block around it that was entered later
            return (self._before or type(self.layer).forward.__get__(self.layer))(x)
        _check_values("the input", self._name, x)
        if x.is_nested:
            raise ValueError(f"the input of {self._name} is a nested tensor; give padded batches")
        return self._watcher(x)

    def end(self) -> None:
        self._ended = True
        forward = vars(self.layer).pop("forward", None)
        while isinstance(forward, _Watched) and forward._ended:
            forward = forward._before
        if forward is not None:
            vars(self.layer)["forward"] = forward
