"""`QWeight`: low-bit weights as a parametrization of torch, and how the rest of the package finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ._dtensor import is_dtensor
from ._types import WeightBits, WeightSteName
from .packing import record_source
from .weights import qweight, weight_codes

_codes: Any = weight_codes  # which `overridable` types as returning one tensor


class QWeight(nn.Module):
    """A weight of few bits, as a parametrization: the layer computes with Q(w), the parameter stays the float w.

        Q(w) = s * k,   k in -p..p,   p = 2**(bits - 1) - 1;   one bit: k in -1, 1
        dw = dQ * g'(w)

    `torch.nn.utils.parametrize.register_parametrization(layer, "weight", QWeight(2))` puts it on a layer, as
    `quantize_(model, weight_bits=2)` does on all. Each output channel has the scale s of least squared error, found
    anew whenever the layer reads its weight (`coarsegrad.qweight`).

    bits: 8, 4, 2 (-s, 0, s) or 1 (-s, s).
    channel_dim: the dimension of the weight with a scale for each index: 0 for nn.Linear and nn.Conv, 1 for
        nn.ConvTranspose. None: one scale for all of it.
    groups: those of an nn.ConvTranspose, whose weight [C_in, C_out / groups, ...] then has C_out scales: channel_dim
        must be 1.
    ste: the coarse gradient g': "identity" is 1; "clipped" and "trust" are 0 for a weight above the top level, or above
        it by half the distance of two levels (`coarsegrad.qweight`).

    All else is torch's: the parameter stays the same object, so that optimizers keep it, and is called
    `parametrizations.weight.original` in the state_dict; assigning to `layer.weight` sets it; `remove_parametrizations`
    leaves Q(w), or w with leave_parametrized=False; deep copies work, and pickling the whole layer is an error. Layers
    that share a weight may each have a QWeight. It has no parameters and no state.

    Saved for backward: nothing but w. The layer that multiplies by Q(w) saves it, which is no parameter: as many bytes
    as w, from the forward to the backward. Inside `packed_activations` it saves w instead, which is there anyway, and
    the backward finds Q(w) again; compiled graphs do not.

    Raises TypeError or ValueError with the argument's name, what was got and what was wanted.

    Source: Yin et al. 2018, arXiv 1808.05240 (training with projected weights; see `coarsegrad.blended`).
    """

    def __init__(
        self, bits: WeightBits, channel_dim: int | None = 0, *, groups: int = 1, ste: WeightSteName = "identity"
    ) -> None:
        super().__init__()
        if channel_dim is not None and type(channel_dim) is not int:
            raise TypeError(f"channel_dim must be an int or None, got {channel_dim!r}")
        if type(groups) is not int or groups < 1:
            raise ValueError(f"groups must be an int >= 1, got {groups!r}")
        if groups > 1 and channel_dim != 1:
            raise ValueError(f"groups must be 1 unless channel_dim is 1, got {groups} and channel_dim={channel_dim}")
        qweight(torch.zeros(1, 1), bits, ste=ste)  # raises for a wrong one
        self.bits = bits
        self.channel_dim = channel_dim
        self.groups = groups
        self.ste: WeightSteName = ste

    def forward(self, weight: Tensor) -> Tensor:
        quantized = self._quantized(weight)
        record_source(self._quantized, weight, quantized)
        return quantized

    def _quantized(self, weight: Tensor) -> Tensor:
        if self.groups == 1:
            return qweight(weight, self.bits, channel_dim=self.channel_dim, ste=self.ste)
        return self._by_group(weight, lambda rows: qweight(rows, self.bits, ste=self.ste))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(int8 codes in weight's shape, scales) of a weight: `coarsegrad.weight_codes`."""
        if self.groups == 1:
            return _codes(weight, self.bits, channel_dim=self.channel_dim)
        scales: list[Tensor] = []

        def codes(rows: Tensor) -> Tensor:
            made, scale = _codes(rows, self.bits)
            scales.append(scale)
            return made

        return self._by_group(weight, codes), scales[0]

    def _by_group(self, weight: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """call of the weight as [C_out, C_in / groups, ...]; the result as the weight is."""
        rows = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return call(rows.flatten(0, 1)).view(rows.shape).transpose(1, 2).reshape(weight.shape)

    def extra_repr(self) -> str:
        words = [f"bits={self.bits}"]
        words += [f"channel_dim={self.channel_dim}"] if self.channel_dim != 0 else []
        words += [f"groups={self.groups}"] if self.groups != 1 else []
        words += [f"ste={self.ste!r}"] if self.ste != "identity" else []
        return ", ".join(words)


def qweight_of(layer: Any) -> QWeight | None:
    """The QWeight of a layer's weight, if that is its only parametrization."""
    found: Any = layer.parametrizations.weight if is_parametrized(layer, "weight") else ()
    return found[0] if len(found) == 1 and isinstance(found[0], QWeight) else None


def parametrized_since(layer: Any) -> bool:
    """Whether a layer with a QWeight has other parametrizations too."""
    found = layer.parametrizations if is_parametrized(layer) else {}
    quantized = any(isinstance(part, QWeight) for parts in found.values() for part in parts)
    return quantized and (len(found) > 1 or qweight_of(layer) is None)


def float_weight(layer: Any) -> Tensor | None:
    """The parameter of a layer's weight; None if it has none, or another parametrization than QWeight."""
    if qweight_of(layer) is not None:
        return layer.parametrizations.weight.original
    return layer._parameters.get("weight")


def quantized_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, QWeight]]:
    """(name, parameter, its QWeight) of a model; a parameter that layers share, as often.

    Raises ValueError for one with a QWeight among other parametrizations: what Q rounds is then no parameter.
    """
    for name, found in model.named_modules():
        if isinstance(found, ParametrizationList) and any(isinstance(part, QWeight) for part in found):
            name = name.replace("parametrizations.", "")
            if len(found) > 1:
                raise ValueError(f"{name} must have a QWeight as its only parametrization, got {len(found)} of them")
            part: Any = found[0]
            yield name, found.original, part


def quantized_shard(weight: Any, quantizer: QWeight) -> Tensor:
    """Q(weight); of a DTensor this process's part of it."""
    if not is_dtensor(weight):
        return quantizer(weight)
    dim = None if quantizer.channel_dim is None else quantizer.channel_dim % weight.dim()
    whole_channels = all(p.is_replicate() or dim is not None and p.is_shard(dim) for p in weight.placements)
    if whole_channels and quantizer.groups == 1:
        return quantizer(weight.to_local())
    from torch.distributed.tensor import distribute_tensor

    whole = quantizer(weight.full_tensor())
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
