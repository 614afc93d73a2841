"""Running a model with watchers in place of its QReLUs, for `calibrate` and `stats`."""

from __future__ import annotations

import functools
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
    """In the block, each layer's watcher computes in its place."""
    before = {layer: vars(layer).get("forward") for layer in layers.values()}
    for name, layer in layers.items():
        vars(layer)["forward"] = functools.partial(_watch, name, watchers[name])
    try:
        yield
    finally:
        for layer, forward in before.items():
            vars(layer).pop("forward")
            if forward is not None:
                vars(layer)["forward"] = forward


def _watch(name: str, watcher: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    _check_values("the input", name, x)
    if x.is_nested:
        raise ValueError(f"the input of {name} is a nested tensor; give padded batches")
    return watcher(x)
