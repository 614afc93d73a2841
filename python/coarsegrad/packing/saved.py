"""What autograd holds in place of a tensor: objects with `load()`, which returns the tensor or its codes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch_internals import Hooks


class SavedTensor:
    """A tensor saved as it is. Outer hooks, if any, may store it elsewhere. Otherwise this holds it and checks its
    version, because torch checks no versions under saved-tensor hooks."""

    def __init__(self, t: Tensor, outer_hooks: Hooks | None) -> None:
        self._load: Callable[[Any], Tensor] | None = None
        self._saved: Any
        if outer_hooks is None:
            # Detached: t may be an output of the node that saves it, and would keep that node alive in turn.
            self._saved, self._version = t.detach(), t._version
        else:
            save, self._load = outer_hooks
            self._saved = save(t)

    def load(self) -> Tensor:
        if self._load is not None:
            return self._load(self._saved)
        t = self._saved
        if t._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a"
                f" {t.dtype} tensor of shape {list(t.shape)} is at version {t._version}, expected {self._version}"
            )
        return t


class SharedMask:
    """The mask that a coarse gradient needs, until the codes, which contain the same information, are saved as well.

    is_codes: whether the codes have replaced the mask; `load` then returns the codes.
    """

    def __init__(self, mask: SavedTensor) -> None:
        self.is_codes = False
        self._saved = mask

    def replace_by(self, codes: SavedTensor) -> None:
        self.is_codes, self._saved = True, codes

    def load(self) -> Tensor:
        return self._saved.load()


class Decoder:
    """Rebuilds y, or an elementwise function of y, from its codes. Views that are alive at the same time share one
    storage."""

    def __init__(self, y: Tensor, op: Callable[..., Tensor], *arguments: object) -> None:
        """y is op(*sources, *arguments)."""
        self.dtype, self._device = y.dtype, y.device
        self._op, self._arguments = op, arguments
        self._steps: tuple[Callable[[Tensor], Tensor], ...] = ()
        self._storage: weakref.ref[torch.UntypedStorage] | None = None

    def then(self, step: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Decoder:
        """A decoder that also applies an elementwise step, whose result has the given dtype."""
        other = copy.copy(self)
        other.dtype, other._steps, other._storage = dtype, (*self._steps, step), None
        return other

    def decode(self, sources: tuple[Tensor, ...]) -> Tensor:
        y = self._op(*sources, *self._arguments)
        for step in self._steps:
            y = step(y)
        return y

    def view(self, sources: tuple[SavedTensor, ...], size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        storage = None if self._storage is None else self._storage()
        if storage is None:
            storage = self.decode(tuple(source.load() for source in sources)).untyped_storage()
            self._storage = weakref.ref(storage)
        return torch.empty(0, dtype=self.dtype, device=self._device).set_(storage, offset, size, stride)
