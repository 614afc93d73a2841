"""`quantize_(weight_bits=...)`: a `QWeight` on the weight of every Linear and convolution."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from .._types import DTYPES, WeightBits, WeightSteName
from ..blocks import is_transposed
from ..parametrization import QWeight, qweight_of
from .report import QuantizedWeight, QuantizeReport, Skipped

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class _Owner:
    """A module that has a parameter, and the parameter's name in it."""

    name: str
    module: nn.Module
    parameter: str


def quantize_weights(
    model: nn.Module,
    bits: WeightBits,
    ste: WeightSteName,
    wanted: Callable[[nn.Module, str], bool],
    report: QuantizeReport,
) -> None:
    """Put the QWeights on, and say so in the report. Raises ValueError; then undo what the report has."""
    skipped = len(report.skipped)
    owners = _owners(model)
    heads = _heads(model)
    found: dict[nn.Module, tuple[str, QWeight]] = {}
    for name, layer in model.named_modules():
        quantizer = _quantizer_for(layer, bits, ste)
        if quantizer is None or not wanted(layer, name):
            continue
        if why := _why_not(name, layer, layer in heads, owners):
            report.skipped.append(Skipped(name or "(model)", type(layer).__name__, why))
        else:
            found[layer] = name, quantizer
    if not found:
        reasons = "; ".join(f"{s.name} ({s.what}): {s.why}" for s in report.skipped[skipped:])
        raise ValueError(
            f"weight_bits: model has no Linear or Conv whose weight can be quantized. Skipped: {reasons or 'nothing'}"
        )
    for layer, (name, quantizer) in found.items():
        _check_others(name, layer, quantizer, owners, found)
    for layer, (name, quantizer) in found.items():
        put_on(layer, quantizer, report)
        report.weights.append(_quantized(name, layer, quantizer))


def _quantizer_for(layer: nn.Module, bits: WeightBits, ste: WeightSteName) -> QWeight | None:
    if isinstance(layer, (nn.Linear, *_CONVS)):
        return QWeight(bits, ste=ste)
    if isinstance(layer, _TRANSPOSED):
        return QWeight(bits, 1, groups=layer.groups, ste=ste)
    return QWeight(bits, 1, ste=ste) if is_transposed(layer) else None


def _owners(model: nn.Module) -> dict[int, list[_Owner]]:
    """The modules that have each parameter."""
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for parameter, value in module._parameters.items():
            owners[id(value)].append(_Owner(name, module, parameter))
    return owners


def _heads(model: nn.Module) -> set[object]:
    """The output embeddings of language models of transformers."""
    getters = [getattr(module, "get_output_embeddings", None) for module in model.modules()]
    return {getter() for getter in getters if callable(getter)}


def _why_not(name: str, layer: nn.Module, is_head: bool, owners: dict[int, list[_Owner]]) -> str:
    """Why a layer keeps its float weight; "" if it need not."""
    if (present := qweight_of(layer)) is not None:
        return f"its weight has {present.bits} bits already"
    if is_parametrized(layer):
        names: Any = layer.parametrizations
        raise ValueError(
            f"weight_bits: {name or 'model'} must have no parametrization, got one of its {', '.join(names)}: remove"
            " it, or leave the layer out by filter_fn"
        )
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter"
    if isinstance(weight, nn.UninitializedParameter):
        return "it is not initialized"
    if weight.dtype not in DTYPES or weight.layout is not torch.strided:
        return "its weight is not a dense tensor of floats"
    embedding = next((owner.name for owner in owners[id(weight)] if isinstance(owner.module, _EMBEDDINGS)), None)
    if embedding is not None:
        return f"its weight is that of the embedding {embedding} too"
    return "it is the output embedding of a language model" if is_head else ""


def _check_others(
    name: str,
    layer: nn.Module,
    quantizer: QWeight,
    owners: dict[int, list[_Owner]],
    found: dict[nn.Module, tuple[str, QWeight]],
) -> None:
    """A weight of several modules must be the same Q(w) in all of them."""
    for owner in owners[id(layer._parameters["weight"])]:
        _, other = found.get(owner.module, ("", None))
        same = other is not None and (other.channel_dim, other.groups) == (quantizer.channel_dim, quantizer.groups)
        if not same or owner.parameter != "weight":
            raise ValueError(
                f"weight_bits: the weight of {name} is {owner.name}.{owner.parameter} too, which is not quantized in"
                " the same way: leave both out by filter_fn, or neither, or untie them"
            )


def put_on(layer: Any, quantizer: QWeight, report: QuantizeReport) -> None:
    order, before = list(layer._parameters), report._classes.get(layer, (None, type(layer)))[1]
    register_parametrization(layer, "weight", quantizer)
    layer.parametrizations.train(layer.training)  # torch has new containers train
    report._classes[layer] = type(layer), before
    report._undo_steps.append(functools.partial(_take_off, layer, order))


def _take_off(layer: Any, order: list[str]) -> None:
    """What torch's remove_parametrizations does after the class was restored, but keeps the order of the parameters,
    and the class, which deep copies of the layer have too, as it is."""
    layer._parameters["weight"] = layer._modules.pop("parametrizations").weight.original
    for name in order:
        layer._parameters[name] = layer._parameters.pop(name)


def _quantized(name: str, layer: Any, quantizer: QWeight) -> QuantizedWeight:
    shape = tuple(layer.parametrizations.weight.original.shape)
    scales = quantizer.groups * shape[quantizer.channel_dim or 0]
    return QuantizedWeight(name or "(model)", type(layer).__bases__[0].__name__, shape, quantizer.bits, scales)
