"""Which backend serves which device, and why not another; a switch between them; the text of `coarsegrad info`."""

from __future__ import annotations

import contextlib
import os
import platform
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType

import torch

from . import _ops, reference
from .ste import format_table, one_of


@dataclass(frozen=True)
class _Backend:
    """why_not(device type): why it cannot serve it, or None if it can. detail(device type): what there is to say of it.

    kernels: a module with a function for each of _ops.KERNELS; None: its kernels were registered as it was loaded.
    """

    name: str
    why_not: Callable[[str], str | None]
    detail: Callable[[str], str]
    kernels: ModuleType | None


def _native_why_not(device: str) -> str | None:
    if _ops.native is None:
        return _ops.native_why_not
    if device == "cuda" and "without_cuda" in _ops.build_facts:
        return f"built without CUDA kernels: {_ops.build_facts['without_cuda']}"
    return None if device in ("cpu", "cuda") else f"has no kernels for {device}"


def _native_detail(device: str) -> str:
    return _ops.native.isa() if device == "cpu" else f"compiled for {', '.join(_ops.build_facts['cuda_archs'])}"


# In order of preference.
_BACKENDS = {
    backend.name: backend
    for backend in (
        _Backend("native", _native_why_not, _native_detail, None),
        _Backend("reference", lambda device: None, lambda device: "plain torch", reference),
    )
}

# The names in the `use_backend` blocks that are open, outermost first; the kernels that the innermost one put in.
_open_blocks: list[str] = []
_override: torch.library.Library | None = None


@dataclass(frozen=True)
class Serving:
    """The backend that serves a device type, a word on it, and why each of the others does not."""

    backend: str
    detail: str
    why_not: dict[str, str]


class BackendTable(dict):
    """device type -> Serving, printed as a table."""

    def __repr__(self) -> str:
        rows = []
        for device, serving in self.items():
            reasons = [f"{name}: {why}" for name, why in serving.why_not.items()]
            lines = [line for reason in reasons for line in textwrap.wrap(reason, 72)]
            rows.append((device, f"{serving.backend} ({serving.detail})", lines[0]))
            rows += [("", "", line) for line in lines[1:]]
        return format_table(("device", "served by", "why not another"), rows)


def _device_types() -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _serving(device: str) -> Serving:
    able = [name for name, backend in _BACKENDS.items() if backend.why_not(device) is None]
    asked = [name for name in _open_blocks[-1:] if name in able]
    serving = (asked or able)[0]
    why_not = {
        name: backend.why_not(device) or (f"use_backend({serving!r})" if asked else f"{serving} comes first")
        for name, backend in _BACKENDS.items()
        if name != serving
    }
    return Serving(serving, _BACKENDS[serving].detail(device), why_not)


def backends() -> BackendTable:
    """For each device type of this machine, the backend that serves it and why the others do not. Prints as a table."""
    return BackendTable({device: _serving(device) for device in _device_types()})


def _put_in_kernels() -> None:
    """Make the innermost open block's backend serve the devices it can serve."""
    global _override
    if _override is not None:
        _override._destroy()
        _override = None
    backend = _BACKENDS[_open_blocks[-1]] if _open_blocks else None
    if backend is None or backend.kernels is None:
        return
    _override = torch.library.Library("coarsegrad", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")  # that is what it is for
        for device in _device_types():
            if backend.why_not(device) is None:
                key = torch._C._dispatch_key_for_device(device)
                for name in _ops.KERNELS:
                    _override.impl(name, getattr(backend.kernels, name), key, allow_override=True)


@contextlib.contextmanager
def _block(name: str) -> Iterator[None]:
    _open_blocks.append(name)
    _put_in_kernels()
    try:
        yield
    finally:
        _open_blocks.pop()
        _put_in_kernels()


def use_backend(name: str) -> AbstractContextManager[None]:
    """`with use_backend("reference"):` lets one backend serve every device that it can, in the whole process.

    name: "native" (compiled) or "reference" (plain torch). Blocks nest; the innermost one counts. All backends give
    the same codes and outputs, bit for bit.

    Raises ValueError if there is no such backend, RuntimeError if it serves no device here; both list the ones that do.
    """
    reasons = {backend: [_BACKENDS[backend].why_not(device) for device in _device_types()] for backend in _BACKENDS}
    usable = ", ".join(repr(backend) for backend, why_not in reasons.items() if None in why_not)
    if name not in _BACKENDS:
        raise ValueError(f"{one_of('backend', name, _BACKENDS)}; usable here: {usable}")
    if None not in reasons[name]:
        raise RuntimeError(f"backend {name!r} is not usable here: {reasons[name][0]}; usable here: {usable}")
    return _block(name)


def info() -> str:
    """Versions, the state of the native library, threads, and which backend serves which device."""
    from . import __version__

    lines = [
        ("coarsegrad", __version__),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} ({platform.machine()}, {platform.system()})"),
        ("threads", str(torch.get_num_threads())),
        ("COARSEGRAD_NATIVE", os.environ.get("COARSEGRAD_NATIVE", "auto (not set)")),
    ]
    if _ops.native is None:
        lines.append(("native library", f"not in use: {_ops.native_why_not}"))
    else:
        usable = ", ".join(_ops.native.isas())
        lines.append(("native library", f"in use, instruction set {_ops.native.isa()} (usable here: {usable})"))
    if _ops.build_facts.get("torch_version") is not None:
        for fact, value in _ops.build_facts.items():
            text = ", ".join(value) if isinstance(value, list) else str(value)
            lines.append((f"  built: {fact.replace('_', ' ')}", text))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines) + f"\n\n{backends()!r}"
