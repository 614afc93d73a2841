"""The statistics of a layer's inputs that `calibrate` collects, over all processes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest

import torch
import torch.distributed
from torch import Tensor, nn

from ..nn import QReLU
from .histogram import Histogram
from .running import float_activation


class ForwardCounter:
    """Counts forwards of a model, so that a layer can distinguish its first call in a forward from its second."""

    def __init__(self) -> None:
        self.number = 0
        self._depth = 0

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        hooks = ExitStack()
        hooks.callback(model.register_forward_pre_hook(self._enter).remove)
        hooks.callback(model.register_forward_hook(self._leave, always_call=True).remove)
        with hooks:
            yield

    def _enter(self, *_) -> None:
        self.number += self._depth == 0  # a model may call itself
        self._depth += 1

    def _leave(self, *_) -> None:
        self._depth -= 1

    def counting(self, forward: Callable | None) -> Callable | None:
        """A user's `forward`, counted here because it may call a method instead of the model."""
        if forward is None:
            return None

        def counted(model: nn.Module, batch: object) -> object:
            self.number += 1
            return forward(model, batch)

        return counted


class InputCounter:
    """Computes in place of one layer and counts its inputs: a histogram per alpha, and the power per call."""

    def __init__(self, name: str, layer: QReLU, channel_dim: int | None, forwards: ForwardCounter) -> None:
        self.layer, self._name = layer, name
        self._channel_dim = layer.channel_dim if channel_dim is None else channel_dim
        self._forwards, self._forward, self._call = forwards, 0, 0
        self.histogram: Histogram | None = None
        self.rows = self.elements = 0
        self.dtype: torch.dtype | None = None
        self.calls: list[Tensor] = []  # of the first, second, ... call in a forward: [sum of squares, count] over x > 0

    def __call__(self, x: Tensor) -> Tensor:
        limited = x.clamp(max=self.layer.limit)
        if not (limited < math.inf).all():
            raise ValueError(f"the input of {self._name} is NaN or +inf")
        dim = self._channel_dim
        if dim is not None and not -x.dim() <= dim < x.dim():
            raise ValueError(f"channel_dim is {dim}, but the input of {self._name} has shape {list(x.shape)}")
        rows = limited.reshape(1, -1) if dim is None else limited.movedim(dim, 0).flatten(1)
        if self.histogram is None:
            self.rows, self.dtype = rows.size(0), x.dtype
            self.histogram = Histogram(self.rows, x.device)
        elif self.rows != rows.size(0):
            raise ValueError(f"the input of {self._name} had {self.rows} channels before, now it has {rows.size(0)}")
        self.histogram.add(rows)
        self.dtype = torch.promote_types(self.dtype or x.dtype, x.dtype)
        self.elements += x.numel()
        self._count_call(limited.clamp_(min=0))
        return float_activation(self.layer, x)

    def _count_call(self, positive: Tensor) -> None:
        if self._forward != self._forwards.number:
            self._forward, self._call = self._forwards.number, 0
        power = torch.linalg.vector_norm(positive, dtype=torch.float64).square()
        found = torch.stack([power, positive.count_nonzero().double()])
        if self._call == len(self.calls):
            self.calls.append(found)
        else:
            self.calls[self._call] += found
        self._call += 1

    @property
    def spread(self) -> float:
        ranges = [math.sqrt(power / count) for power, count in (call.tolist() for call in self.calls) if count]
        return max(ranges) / min(ranges) if ranges else math.nan


def all_reduce(counted: list[InputCounter]) -> None:
    """Replace every layer's counts by their sums over all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    mine = [(count.rows, count.dtype, count.elements, [call.cpu() for call in count.calls]) for count in counted]
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    for count, found in zip(counted, zip(*everyone)):
        reached = [counts for counts in found if counts[0]]  # of the processes whose batches reached the layer
        if not reached:
            continue
        rows, dtypes, elements, calls = zip(*reached)
        count.rows, count.elements = max(rows), sum(elements)
        count.dtype = functools.reduce(torch.promote_types, dtypes)
        zero = torch.zeros(2, dtype=torch.float64)
        count.calls = [sum(same, zero) for same in zip_longest(*calls, fillvalue=zero)]
        count.histogram = count.histogram or Histogram(count.rows, count.layer.alpha.device)
        count.histogram.merge(_all_reduce_tensor)


def _all_reduce_tensor(t: Tensor, how: str) -> None:
    torch.distributed.all_reduce(t, getattr(torch.distributed.ReduceOp, how.upper()))
