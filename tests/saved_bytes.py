"""What a forward keeps, counted apart from the package: what hooks around it handed out and is still alive."""

from __future__ import annotations

import weakref

import torch


class _Handle:
    def __init__(self, tensor):
        self.tensor = tensor


class Kept:
    """Counts while its block runs; `bytes` afterwards: of each storage once, those of the tensors given not."""

    def __init__(self, *not_counted):
        self._not_counted = {t.untyped_storage()._cdata for t in not_counted}
        self._handles = weakref.WeakSet()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda handle: handle.tensor)

    def _pack(self, tensor):
        handle = _Handle(tensor.detach())
        self._handles.add(handle)
        return handle

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self._hooks.__exit__(*exception)

    @property
    def bytes(self):
        storages = {h.tensor.untyped_storage()._cdata: h.tensor.untyped_storage() for h in self._handles}
        return sum(s.nbytes() for address, s in storages.items() if address not in self._not_counted)
