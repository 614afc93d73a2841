"""What is known of a qrelu's output, and how the hooks find it: by the tensor's storage, or by its graph."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .._torch_internals import Hooks, metadata_of, raw_saved, saved_scalar, view_root
from .saved import Decoder, SavedTensor, SharedMask

_RECORD = "_coarsegrad_record"  # attribute of a storage; key in the metadata of a node
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0")


class SavedView:
    """A view of an output, saved as the output's codes. record: returns that output's record, None once it is freed."""

    def __init__(
        self,
        record: Callable[[], OutputRecord | None],
        decoder: Decoder,
        sources: tuple[SavedTensor, ...],
        size: torch.Size,
        stride: tuple[int, ...],
        offset: int,
    ) -> None:
        self.record, self.size, self.stride, self.offset = record, size, stride, offset
        self._decoder, self._sources = decoder, sources

    def same_as(self, other: object) -> bool:
        place = (self.size, self.stride, self.offset)
        return (
            isinstance(other, SavedView)
            and self._decoder is other._decoder
            and place == (other.size, other.stride, other.offset)
        )

    def load(self) -> Tensor:
        return self._decoder.view(self._sources, self.size, self.stride, self.offset)


class OutputRecord:
    """What is known of an output y. It lives as long as y's storage, so the codes of a y that nobody saves are freed.

    sources: what the decoder rebuilds y from: codes and alpha; of a gated product those of both factors.
    mask: that of the node that made y, if the codes can replace it.
    version: y's own; a y written to since is another tensor. None until y is published.
    y: a weak reference to y, once published.
    """

    def __init__(self, y: Tensor, sources: tuple[Tensor, ...], mask: SharedMask | None, decoder: Decoder) -> None:
        self.version: int | None = None
        self.y: Callable[[], Tensor | None] = lambda: None
        self._sources, self._mask, self._decoder = sources, mask, decoder
        self._dtype, self._offset, self._count = y.dtype, y.storage_offset(), y.numel()

    def attach_to(self, t: Tensor) -> None:
        """Let every view of t's storage find this record."""
        setattr(t.untyped_storage(), _RECORD, self)

    def publish(self, y: Tensor) -> None:
        """y is complete: the tensor that the caller of qrelu gets."""
        self.version, self.y = y._version, weakref.ref(y)
        if y.grad_fn is not None:
            metadata_of(y.grad_fn)[_RECORD] = weakref.ref(self)

    def squared(self, view: SavedView, z: Tensor) -> OutputRecord | None:
        """The record of z, the square of a view of this output. None unless the view is the whole output, with its
        elements in the order of z's."""
        whole = view.offset == 0 and view.size.numel() == self._count
        same_order = all(ours == theirs for size, ours, theirs in zip(view.size, view.stride, z.stride()) if size > 1)
        if not whole or not same_order or z.dtype != self._dtype:
            return None
        return self._made_into(z, torch.square)

    def converted(self, copy_of_y: Tensor) -> OutputRecord | None:
        """The record of a copy of y, or of a view of y, in another dtype. None if y was freed or written to, or if the
        elements lie in another order."""
        y = self.y()
        if y is None or y._version != self.version or y.device != copy_of_y.device:
            return None
        same_strides = (y.shape, y.stride()) == (copy_of_y.shape, copy_of_y.stride())
        if not same_strides and not (y.is_contiguous() and copy_of_y.is_contiguous()):
            return None
        return self._made_into(copy_of_y, functools.partial(Tensor.to, dtype=copy_of_y.dtype))

    def _made_into(self, t: Tensor, step: Callable[[Tensor], Tensor]) -> OutputRecord:
        record = OutputRecord(t, self._sources, self._mask, self._decoder.then(step, t.dtype))
        record.version = 0  # that of a new tensor
        return record

    def combined(self, other: OutputRecord, op: Callable[..., Tensor], z: Tensor) -> OutputRecord:
        """The record of z = op(y, the other's y), elementwise."""
        count = len(self._sources)
        own, others = self._decoder, other._decoder

        def rebuilt(*sources: Tensor) -> Tensor:
            return op(own.decode(sources[:count]), others.decode(sources[count:]))

        return OutputRecord(z, (*self._sources, *other._sources), None, Decoder(z, rebuilt))

    def is_of(self, t: Tensor) -> bool:
        """Whether t is all of y, as it was."""
        y = self.y()
        same = y is not None and t.data_ptr() == y.data_ptr() and (t.shape, t.stride()) == (y.shape, y.stride())
        return same and t._version == self.version

    def replacement_for(self, t: Tensor, outer_hooks: Hooks | None) -> SavedView | None:
        """What to save in place of t, which shares y's storage; None if t itself must be saved."""
        if t._version != self.version:  # never again: free the codes
            delattr(t.untyped_storage(), _RECORD)
            return None
        first = t.storage_offset() - self._offset
        last = first + sum((size - 1) * stride for size, stride in zip(t.size(), t.stride()))
        if first < 0 or last >= self._count or t.dtype != self._dtype or t.is_neg() or t.numel() == 0:
            return None
        # Saved again for each view: outer hooks, such as a checkpoint's, may return what they were given only once.
        if self._mask is not None and not self._mask.is_codes:
            self._mask.replace_by(SavedTensor(self._sources[0], outer_hooks))
        sources = tuple(SavedTensor(t, outer_hooks) for t in self._sources)
        # Outer hooks may have moved the codes elsewhere: a strong reference would keep the originals as well.
        record: Callable[[], OutputRecord | None] = weakref.ref(self) if outer_hooks else lambda: self
        return SavedView(record, self._decoder, sources, t.size(), t.stride(), int(first))


def attached_record(t: Tensor) -> OutputRecord | None:
    """The record on t's storage."""
    return getattr(t.untyped_storage(), _RECORD, None)


def record_of(t: Tensor) -> OutputRecord | None:
    """The record of the output that t is a view of. If the graph shows that t is an output's copy in another dtype, or
    its square, t's storage gets a record of its own."""
    record = attached_record(t)
    if record is not None:
        return record
    root = view_root(t)
    node = root.grad_fn
    if node is None:
        return None
    if node.name() == "ToCopyBackward0":
        record = _converted(node, root)
    elif node.name() == "PowBackward0" and saved_scalar(node, "exponent") == 2:
        record = _squared([raw_saved(node, "self")], root)
    elif node.name() == "MulBackward0":
        record = _squared([raw_saved(node, "self"), raw_saved(node, "other")], root)
    if record is not None:
        record.attach_to(t)
    return record


def _converted(node: Node, result: Tensor) -> OutputRecord | None:
    """The record of a copy in another dtype, as autocast makes of a float32 output, or of a view of one."""
    origin = node.next_functions[0][0]
    while origin is not None and _RECORD not in metadata_of(origin) and origin.name() in _VIEWS:
        origin = origin.next_functions[0][0]
    record = None if origin is None else metadata_of(origin).get(_RECORD, lambda: None)()
    return record and record.converted(result)


def _squared(factors: list[object], result: Tensor) -> OutputRecord | None:
    """The record of a product whose node saves these factors: of a square, if all are the same view of an output."""
    first = factors[0]
    if not isinstance(first, SavedView) or not all(map(first.same_as, factors)):
        return None
    record = first.record()
    return record and record.squared(first, result)
