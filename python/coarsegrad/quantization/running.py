"""Running a user's model: with its arguments, on its device, and without side effects."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from .._torch_internals import SUPPORTED_NODES, tree_flatten, tree_unflatten
from ..nn import QReLU


def run(model: nn.Module, inputs: object) -> object:
    """model(inputs), where inputs is a tuple or list of arguments, a mapping of keywords, or a single argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _to_device(batch: object, device: torch.device) -> object:
    """batch with its tensors on the device. A container that has no `to` and is not a pytree is copied."""
    if hasattr(batch, "to") and not isinstance(batch, type):
        return batch.to(device)
    if isinstance(batch, Mapping) and type(batch) not in SUPPORTED_NODES:
        return {key: _to_device(value, device) for key, value in batch.items()}
    if is_dataclass(batch) and not isinstance(batch, type) and type(batch) not in SUPPORTED_NODES:
        copied = copy.copy(batch)
        for field in fields(batch):
            object.__setattr__(copied, field.name, _to_device(getattr(batch, field.name), device))
        return copied
    leaves, spec = tree_flatten(batch)
    if spec.is_leaf():
        return batch
    return tree_unflatten([_to_device(leaf, device) for leaf in leaves], spec)


def on_device_of(model: nn.Module, batch: object) -> object:
    """batch with its tensors on the model's device. accelerate's hooks move tensors themselves, and the parameters of
    an offloaded model are on meta."""
    if hasattr(model, "_hf_hook"):
        return batch
    return _to_device(batch, next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu")))


def float_activation(layer: QReLU, x: Tensor) -> Tensor:
    """The activation that the layer approximates; without calling relu, which would be recorded."""
    y = x.clamp_(0, layer.limit) if layer.inplace else x.clamp(0, layer.limit)
    return y.square() if layer.squared else y


@contextmanager
def without_side_effects(model: nn.Module, training: bool) -> Iterator[None]:
    """A block for a forward; afterwards modes, buffers and the random state are as before."""
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
