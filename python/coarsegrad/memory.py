"""The memory meter: bytes that a forward saves for backward, by module."""

from __future__ import annotations

import os
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ._text import format_table
from ._torch_internals import components, saved_tensor_hooks, storage_id, tree_leaves, tree_map
from .packing import packed_activations, packing_of

_OUTSIDE = "(outside of modules)"


def _kib(count: int) -> str:
    return f"{count / 1024:,.1f} KiB"


def _shape_and_dtype(t: object) -> object:
    return (tuple(t.shape), t.dtype) if isinstance(t, Tensor) else None


@dataclass(frozen=True)
class SavedStorage:
    """A storage held for backward: the first module to save it, the shape and dtype saved there, its size in bytes."""

    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


@dataclass(frozen=True)
class SavedMemory:
    """What `saved_memory` measured. Prints as a table.

    storages: each storage once, in the order of the forward.
    unseen: the modules that ran under other saved-tensor hooks, which hide what is saved there.
    """

    storages: tuple[SavedStorage, ...]
    unseen: tuple[str, ...]
    _forms: tuple[object, ...]

    @property
    def total(self) -> int:
        """Bytes of all storages."""
        return sum(storage.bytes for storage in self.storages)

    @property
    def by_module(self) -> dict[str, int]:
        """Bytes per module; a storage counts for the first module that saves it."""
        sums: Counter[str] = Counter()
        for storage in self.storages:
            sums[storage.module] += storage.bytes
        return dict(sums)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            (s.module, f"{str(s.dtype).removeprefix('torch.')} {list(s.shape)}", f"{s.bytes:,}") for s in self.storages
        ]
        rows.append(("total", _kib(self.total), f"{self.total:,}"))
        lines = [format_table(("saved by", "what", "bytes"), rows)]
        if self.unseen:
            lines.append(f"Not measured, because other saved-tensor hooks were active: {', '.join(self.unseen)}.")
        return "\n".join(lines)

    __repr__ = __str__

    def compare(self, after: SavedMemory) -> MemoryComparison:
        """Compare with a second measurement, of the same computation on the same inputs.

        Raises TypeError if `after` is not a measurement. Raises ValueError if the two do not show what was saved: their
        inputs or outputs differ in number, shape or dtype, a module was not measured, or this measurement is zero.
        """
        if not isinstance(after, SavedMemory):
            raise TypeError(f"after must be what saved_memory returned, got {type(after).__name__}")
        for name, report in (("before", self), ("after", after)):
            if report.unseen:
                raise ValueError(
                    f"{name} did not measure what {', '.join(report.unseen)} save, so the two cannot be compared"
                )
        if not self.total:
            raise ValueError("before saves nothing for backward, so there is nothing to compare")
        if self._forms != after._forms:
            raise ValueError(
                "before and after must have inputs and outputs of the same shapes and dtypes,"
                f" got {list(self._forms)} and {list(after._forms)}"
            )
        return MemoryComparison(self, after)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write an image with a bar per module, in the format of path's suffix. Needs matplotlib."""
        _bars({"saved for backward": self}, path)


@dataclass(frozen=True)
class MemoryComparison:
    """Two measurements of the same computation. Prints as a table; `ratio` is bytes after / bytes before."""

    before: SavedMemory
    after: SavedMemory

    @property
    def ratio(self) -> float:
        return self.after.total / self.before.total

    def __str__(self) -> str:
        before, after = self.before.by_module, self.after.by_module
        rows: list[tuple[str, ...]] = [
            (name, f"{before.get(name, 0):,}", f"{after.get(name, 0):,}") for name in {**before, **after}
        ]
        rows.append(("total", f"{self.before.total:,}", f"{self.after.total:,}"))
        return format_table(("saved by", "bytes before", "bytes after"), rows) + f"\nratio {self.ratio:.3f}"

    __repr__ = __str__

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write an image with two bars per module, in the format of path's suffix. Needs matplotlib."""
        _bars({"before": self.before, "after": self.after}, path)


class _Handle:
    """What autograd holds in place of a tensor, for as long as it needs the tensor."""

    def __init__(self, t: Tensor, module: str) -> None:
        self.tensor, self.module = t.detach(), module


class _Meter:
    """Hooks that see what is saved, and by which module."""

    def __init__(self) -> None:
        self.handles: list[weakref.ref[_Handle]] = []
        self.unseen: dict[str, None] = {}
        self.names: dict[nn.Module, str] = {}
        self._excluded: dict[int, torch.UntypedStorage] = {}  # held, so that no other storage gets the same id
        self._running: list[nn.Module] = []

    def save(self, t: Tensor) -> _Handle:
        handle = _Handle(t, self.names[self._running[-1]] if self._running else _OUTSIDE)
        if t.is_leaf and t.requires_grad:
            self.exclude(t)
        self.handles.append(weakref.ref(handle))
        return handle

    @staticmethod
    def load(handle: _Handle) -> Tensor:
        return handle.tensor

    def exclude(self, *tensors: Tensor) -> None:
        self._excluded |= {storage_id(t): t.untyped_storage() for t in tensors if t.layout is torch.strided}

    def enter(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        if module not in self.names:
            name = type(module).__name__
            self.names |= {m: path or name for path, m in module.named_modules() if m not in self.names}
            self.exclude(*module.parameters(), *module.buffers())
        self._running.append(module)
        hooks = saved_tensor_hooks()
        if (packing := packing_of(hooks)) is not None:
            hooks = packing.outer_hooks
        if torch.is_grad_enabled() and (hooks is None or hooks[0] != self.save):
            self.unseen[self.names[module]] = None

    def leave(self, module: nn.Module, args: tuple, output: object) -> None:
        if not torch.compiler.is_compiling() and self._running and self._running[-1] is module:
            self._running.pop()

    def storages(self) -> tuple[SavedStorage, ...]:
        found: dict[int, SavedStorage] = {}
        for handle in filter(None, (ref() for ref in self.handles)):
            for part in components(handle.tensor):
                number, size = storage_id(part), part.untyped_storage().nbytes()
                if number not in self._excluded and size:
                    found.setdefault(number, SavedStorage(handle.module, tuple(part.shape), part.dtype, size))
        return tuple(found.values())


def saved_memory(fn_or_model: Callable[..., object], *inputs: object) -> SavedMemory:
    """Run `fn_or_model(*inputs)` forward and report what it saves for backward.

    fn_or_model: a module or a function. It must return, in any nesting of tuples, lists and dicts, at least one tensor
        that requires grad. It runs once, as in a training step: buffers such as BatchNorm's change, gradients do not.
    inputs: its arguments.

    Counts the bytes of the storages that autograd holds as long as the graph exists: each once, in full, for the first
    module that saves it. Parameters and buffers of the modules that run, leaves that require grad, and the tensors in
    `inputs` are not counted, because they exist anyway. Under `packed_activations` the codes, masks and copies of alpha
    are counted; a block open around the call applies inside it too. A module compiled by torch.compile counts as one.
    Not visible: tensors that a custom autograd.Function puts on its ctx without save_for_backward, and what is saved
    under other saved-tensor hooks; modules that run under such hooks are listed as unseen.

    Returns a `SavedMemory`: `total`, `by_module`, `storages`, `compare(other)`, `plot(path)`; prints as a table.

    Raises ValueError if no output requires grad, for example under torch.no_grad.
    """
    meter = _Meter()
    meter.exclude(*(t for t in tree_leaves(inputs) if isinstance(t, Tensor)))
    packed = packing_of(saved_tensor_hooks()) is not None
    block = packed_activations if packed else nullcontext
    handles = (
        register_module_forward_pre_hook(meter.enter),
        register_module_forward_hook(meter.leave, always_call=True),
    )
    try:
        with warnings.catch_warnings(), saved_tensors_hooks(meter.save, meter.load), block():
            # A compiled module fires global hooks twice; once is enough.
            warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
            outputs = fn_or_model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    forms = tuple(map(_shape_and_dtype, (*tree_leaves(inputs), *tree_leaves(outputs))))
    if all(getattr(leaf, "grad_fn", None) is None for leaf in tree_leaves(outputs)):
        raise ValueError("fn_or_model must return a tensor that requires grad; none of its outputs does")
    # Only what the graph holds is saved for backward: release the outputs themselves.
    outputs = tree_map(lambda t: t.grad_fn if isinstance(t, Tensor) else t, outputs)
    return SavedMemory(meter.storages(), tuple(meter.unseen), forms)


def _bars(reports: dict[str, SavedMemory], path: str | os.PathLike[str]) -> None:
    from matplotlib.figure import Figure

    modules = list(dict.fromkeys(name for report in reports.values() for name in report.by_module))
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(modules) * len(reports)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(reports)
    for number, (label, report) in enumerate(reports.items()):
        sizes = report.by_module
        places = [i + (number - (len(reports) - 1) / 2) * height for i in range(len(modules))]
        lengths = [sizes.get(name, 0) / 2**10 for name in modules]
        axes.barh(places, lengths, height, label=f"{label}: {_kib(report.total)}")
    axes.set_yticks(range(len(modules)), modules)
    axes.invert_yaxis()
    axes.set_xlabel("KiB saved for backward")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
