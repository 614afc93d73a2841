"""The memory meter: what a forward keeps for its backward, by module, in bytes."""

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
from torch.utils._pytree import tree_leaves, tree_map

from .packed import packed_activations, packing_of
from .ste import format_table

_OUTSIDE = "(outside of modules)"


def _kib(count: int) -> str:
    return f"{count / 1024:,.1f} KiB"


def _form(t: object) -> object:
    return (tuple(t.shape), t.dtype) if isinstance(t, Tensor) else None


@dataclass(frozen=True)
class SavedStorage:
    """One storage that is kept: by which module first, the shape and dtype of what it keeps of it, and its bytes."""

    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


@dataclass(frozen=True)
class SavedMemory:
    """What `saved_memory` measured. Prints as a table.

    storages: what is kept, each storage once, in the order of the forward.
    unseen: the modules that ran under saved-tensor hooks of others, which hide what is kept there.
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
        """Bytes by the module that keeps them first."""
        sums: Counter[str] = Counter()
        for storage in self.storages:
            sums[storage.module] += storage.bytes
        return dict(sums)

    def __str__(self) -> str:
        rows = [
            (s.module, f"{str(s.dtype).removeprefix('torch.')} {list(s.shape)}", f"{s.bytes:,}") for s in self.storages
        ]
        rows.append(("in all", _kib(self.total), f"{self.total:,}"))
        lines = [format_table(("kept by", "what", "bytes"), rows)]
        if self.unseen:
            lines.append(f"Not seen, as other saved-tensor hooks were in use there: {', '.join(self.unseen)}.")
        return "\n".join(lines)

    __repr__ = __str__

    def compare(self, after: SavedMemory) -> MemoryComparison:
        """This beside another measurement, of what should do the same on the same inputs.

        Raises TypeError if `after` is no measurement; ValueError where a saving would be claimed that was not measured:
        the inputs or outputs of the two differ in number, shape or dtype, a module was not seen, or this keeps nothing.
        """
        if not isinstance(after, SavedMemory):
            raise TypeError(f"after must be what saved_memory returned, got {type(after).__name__}")
        for name, report in (("before", self), ("after", after)):
            if report.unseen:
                raise ValueError(
                    f"{name} did not see what {', '.join(report.unseen)} keep: no saving can be told from it"
                )
        if not self.total:
            raise ValueError("before keeps nothing: there is nothing to save")
        if self._forms != after._forms:
            raise ValueError(
                "before and after must have inputs and outputs of the same shapes and dtypes,"
                f" got {list(self._forms)} and {list(after._forms)}"
            )
        return MemoryComparison(self, after)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """A bar for each module, as an image; the suffix of path says which kind. Needs matplotlib."""
        _bars({"kept for the backward": self}, path)


@dataclass(frozen=True)
class MemoryComparison:
    """Two measurements of the same work. Prints as a table; `ratio` is what is kept after, by what was before."""

    before: SavedMemory
    after: SavedMemory

    @property
    def ratio(self) -> float:
        return self.after.total / self.before.total

    def __str__(self) -> str:
        before, after = self.before.by_module, self.after.by_module
        rows = [(name, f"{before.get(name, 0):,}", f"{after.get(name, 0):,}") for name in {**before, **after}]
        rows.append(("in all", f"{self.before.total:,}", f"{self.after.total:,}"))
        return format_table(("kept by", "bytes before", "bytes after"), rows) + f"\n{self.ratio:.3f} of before"

    __repr__ = __str__

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Two bars for each module, as an image; the suffix of path says which kind. Needs matplotlib."""
        _bars({"before": self.before, "after": self.after}, path)


class _Handle:
    """What autograd holds in place of a tensor; while it does, the tensor is kept."""

    def __init__(self, t: Tensor, module: str) -> None:
        self.tensor, self.module = t.detach(), module


class _Meter:
    """Hooks that see what is kept, and in which module."""

    def __init__(self) -> None:
        self.handles: list[weakref.ref[_Handle]] = []
        self.unseen: dict[str, None] = {}
        self.names: dict[nn.Module, str] = {}
        self.not_counted: list[torch.UntypedStorage] = []
        self._running: list[nn.Module] = []

    def pack(self, t: Tensor) -> _Handle:
        handle = _Handle(t, self.names[self._running[-1]] if self._running else _OUTSIDE)
        if t.is_leaf and t.requires_grad:
            self._leave_out(t)
        self.handles.append(weakref.ref(handle))
        return handle

    @staticmethod
    def unpack(handle: _Handle) -> Tensor:
        return handle.tensor

    def _leave_out(self, *tensors: Tensor) -> None:
        self.not_counted += [t.untyped_storage() for t in tensors if t.layout is torch.strided]

    def enter(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        if module not in self.names:
            name = type(module).__name__
            self.names |= {m: path or name for path, m in module.named_modules() if m not in self.names}
            self._leave_out(*module.parameters(), *module.buffers())
        self._running.append(module)
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        packing = packing_of(hooks)
        if torch.is_grad_enabled() and (packing.below if packing else hooks)[0] != self.pack:
            self.unseen[self.names[module]] = None

    def leave(self, module: nn.Module, args: tuple, output: object) -> None:
        if not torch.compiler.is_compiling() and self._running and self._running[-1] is module:
            self._running.pop()

    def storages(self) -> tuple[SavedStorage, ...]:
        found: dict[int, SavedStorage] = {}
        left_out = {storage._cdata for storage in self.not_counted}
        for handle in filter(None, (ref() for ref in self.handles)):
            t = handle.tensor
            parts = (t,) if t.layout is torch.strided else (t._indices(), t._values())
            for part in parts:
                storage = part.untyped_storage()
                if storage._cdata not in left_out and storage.nbytes():
                    saved = SavedStorage(handle.module, tuple(part.shape), part.dtype, storage.nbytes())
                    found.setdefault(storage._cdata, saved)
        return tuple(found.values())


def saved_memory(fn_or_model: Callable[..., object], *inputs: object) -> SavedMemory:
    """Run `fn_or_model(*inputs)` forward and report what it keeps for the backward.

    fn_or_model: a module or a function; it must return (in any nesting of tuples, lists and dicts) at least one tensor
        from which a backward can start. It runs once, as a training step would run it: buffers such as BatchNorm's
        change, gradients do not.
    inputs: whatever it takes.

    Counted are the bytes of the storages that autograd holds on to while the graph is there, each once and whole,
    under the first module that keeps it. Parameters and buffers of the modules that run, leaves that require grad, and
    the tensors in `inputs` are not counted: they are there anyway. What `packed_activations` keeps are the codes,
    masks and copies of alpha themselves; a block that is open around the call holds in it too. A module compiled by
    torch.compile is reported as one. It does not see what a custom autograd.Function puts on its ctx without
    save_for_backward, nor the inside of other saved-tensor hooks; modules that run in such are listed as unseen.

    Returns a `SavedMemory`: `total`, `by_module`, `storages`, a table in print, `compare(other)`, `plot(path)`.

    Raises ValueError if no output requires grad (as under torch.no_grad): nothing was measured then.
    """
    meter = _Meter()
    meter._leave_out(*(t for t in tree_leaves(inputs) if isinstance(t, Tensor)))
    packed = packing_of(torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None
    block = packed_activations if packed else nullcontext
    handles = (
        register_module_forward_pre_hook(meter.enter),
        register_module_forward_hook(meter.leave, always_call=True),
    )
    try:
        with warnings.catch_warnings(), saved_tensors_hooks(meter.pack, meter.unpack), block():
            # A compiled module then fires them twice, of which the one is enough.
            warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
            outputs = fn_or_model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    forms = tuple(map(_form, (*tree_leaves(inputs), *tree_leaves(outputs))))
    # Only what the graph holds is kept for the backward: let go of the outputs themselves.
    outputs = tree_map(lambda t: t.grad_fn if isinstance(t, Tensor) else t, outputs)
    if not any(isinstance(leaf, torch.autograd.graph.Node) for leaf in tree_leaves(outputs)):
        raise ValueError("fn_or_model must return a tensor that requires grad; nothing was kept, nothing measured")
    return SavedMemory(meter.storages(), tuple(meter.unseen), forms)


def _bars(reports: dict[str, SavedMemory], path: str | os.PathLike[str]) -> None:
    from matplotlib.figure import Figure

    modules = list(dict.fromkeys(name for report in reports.values() for name in report.by_module))
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(modules) * len(reports)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(reports)
    for number, (label, report) in enumerate(reports.items()):
        kept = report.by_module
        places = [i + (number - (len(reports) - 1) / 2) * height for i in range(len(modules))]
        lengths = [kept.get(name, 0) / 2**10 for name in modules]
        axes.barh(places, lengths, height, label=f"{label}: {_kib(report.total)}")
    axes.set_yticks(range(len(modules)), modules)
    axes.invert_yaxis()
    axes.set_xlabel("KiB kept for the backward")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
