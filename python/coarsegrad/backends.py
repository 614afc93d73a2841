"""Backends: which one serves which device and why, `use_backend`, and the text of `coarsegrad info`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import platform
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from . import _mlp, _ops, integer, reference
from ._host import slow_reasons, usable_cores
from ._text import format_table, one_of
from ._torch_internals import dispatch_key, unregister
from ._types import INDUCTOR_BITS


@dataclass(frozen=True)
class _Backend:
    """A backend.

    why_not: of a device type, why the backend cannot serve it, or None if it can.
    detail: of a device type, a note for the table.
    kernels: returns a module with the functions named in _ops.KERNELS; None if loading registered the kernels.
    on_request: of a device type, whether the backend serves it only in `use_backend`.
    """

    name: str
    why_not: Callable[[str], str | None]
    detail: Callable[[str], str]
    kernels: Callable[[], Any] | None
    on_request: Callable[[str], bool] = lambda device: False


def _native_detail(device: str) -> str:
    return _ops.native.isa() if device == "cpu" else f"compiled for {', '.join(_ops.build_facts['cuda_archs'])}"


_TRITON_DEVICES = ("cuda", "xpu")


_no_triton = None if importlib.util.find_spec("triton") else "not installed (pip install triton)"


@functools.cache
def _load_triton() -> ModuleType | None:
    """coarsegrad.triton, imported on first use as importing triton is slow. None if unavailable; see _no_triton."""
    global _no_triton
    if _no_triton is None:
        try:
            return importlib.import_module(f"{__package__}.triton")
        except ImportError as error:
            _no_triton = f"its import failed: {error}"
    return None


def _triton_why_not(device: str) -> str | None:
    if _no_triton is not None:
        return _no_triton
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "runs on GPUs; a CPU needs its interpreter, with TRITON_INTERPRET=1 in the environment"
    return None if device in _TRITON_DEVICES else f"has no kernels for {device}"


def _triton_detail(device: str) -> str:
    return "its interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled on first call"


# In order of preference.
_BACKENDS = {
    backend.name: backend
    for backend in (
        _Backend("native", _ops.why_not_native, _native_detail, None),
        _Backend("triton", _triton_why_not, _triton_detail, _load_triton, lambda device: device == "cpu"),
        _Backend("reference", lambda device: None, lambda device: "plain torch", lambda: reference),
    )
}

# Names of the open `use_backend` blocks, outermost first, and the kernels that the innermost one registered.
_open_blocks: list[str] = []
_override: torch.library.Library | None = None


@dataclass(frozen=True)
class Serving:
    """The backend that serves a device type, a note on it, and why each of the others does not."""

    backend: str
    detail: str
    why_not: dict[str, str]


class BackendTable(dict):
    """Maps device types to `Serving`. Prints as a table."""

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
    requested = [name for name in _open_blocks[-1:] if name in able]
    serving = (requested or [name for name in able if not _BACKENDS[name].on_request(device)])[0]

    def passed_over(name: str) -> str:
        if not requested and _BACKENDS[name].on_request(device):
            return f"only in use_backend({name!r})"
        return f"use_backend({serving!r})" if requested else f"{serving} comes first"

    why_not = {
        name: backend.why_not(device) or passed_over(name) for name, backend in _BACKENDS.items() if name != serving
    }
    return Serving(serving, _BACKENDS[serving].detail(device), why_not)


def backends() -> BackendTable:
    """The backend that serves each device type of this machine, and why the others do not. Prints as a table."""
    return BackendTable({device: _serving(device) for device in _device_types()})


def _register_kernels() -> None:
    """Make the innermost open block's backend serve the devices that it can."""
    global _override
    if _override is not None:
        unregister(_override)
        _override = None
    backend = _BACKENDS[_open_blocks[-1]] if _open_blocks else None
    if backend is None or backend.kernels is None:
        return
    kernels = {op: getattr(backend.kernels(), name) for op, name in _ops.KERNELS.items()}
    for op, on_reference in integer.KERNELS.items():
        kernels[op] = on_reference if backend.name == "reference" else getattr(backend.kernels(), op)
    for op in _mlp.KERNELS:
        kernels[op] = getattr(_mlp if backend.name == "reference" else backend.kernels(), op)
    _override = torch.library.Library("coarsegrad", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")  # intended
        for device in _device_types():
            if backend.why_not(device) is None:
                key = dispatch_key(device)
                for op, kernel in kernels.items():
                    _override.impl(op, kernel, key, allow_override=True)


@contextlib.contextmanager
def _block(name: str) -> Iterator[None]:
    _open_blocks.append(name)
    _register_kernels()
    try:
        yield
    finally:
        _open_blocks.pop()
        _register_kernels()


def use_backend(name: str) -> AbstractContextManager[None]:
    """Make one backend serve every device that it can, process-wide: `with use_backend("reference"):`.

    name: "native" (compiled), "triton" or "reference" (plain torch).

    Blocks nest, and the innermost one counts. All backends give the same codes and outputs, bit for bit.

    Raises ValueError for an unknown backend, RuntimeError if it serves no device here. Both list the usable ones.
    """
    if name == "triton":
        _load_triton()  # an import error shows now
    reasons = {backend: [_BACKENDS[backend].why_not(device) for device in _device_types()] for backend in _BACKENDS}
    usable = ", ".join(repr(backend) for backend, why_not in reasons.items() if None in why_not)
    if name not in _BACKENDS:
        raise ValueError(f"{one_of('backend', name, _BACKENDS)}; usable here: {usable}")
    if None not in reasons[name]:
        raise RuntimeError(f"backend {name!r} is not usable here: {reasons[name][0]}; usable here: {usable}")
    return _block(name)


# The ops that the native library has no kernel of for a GPU, though it may serve that.
_NEVER_NATIVE = ("qrelu_backward_custom",)


def _triton_kernel(op: str):
    """Triton's kernel, imported on first call; the reference's if Triton is unavailable."""
    on_reference = _ops.reference_kernel(op, lambda: _no_triton)

    def call(*args):
        triton = _load_triton()
        return on_reference(*args) if triton is None else getattr(triton, _ops.KERNELS[op])(*args)

    return call


def _triton_layer_kernel(op: str):
    """The same for an op of integer layers."""

    def call(*args):
        triton = _load_triton()
        if triton is not None:
            return getattr(triton, op)(*args)
        device = args[0].device.type
        integer.serving.pop(device, None)
        integer.warn_if_slow(device)
        return integer.KERNELS[op](*args)

    return call


def _triton_mlp_kernel(op: str):
    """The same for an op of a chain of layers. Without Triton the ops of each layer serve it, as on a CPU."""

    def call(*args):
        return getattr(_load_triton() or _mlp, op)(*args)

    return call


_triton_library = torch.library.Library("coarsegrad", "IMPL")
for _device in _TRITON_DEVICES:
    for _op in _mlp.KERNELS:
        _triton_library.impl(_op, _triton_mlp_kernel(_op), dispatch_key(_device))
    for _op in _ops.KERNELS:
        if _ops.why_not_native(_device) is not None or _op in _NEVER_NATIVE:
            _triton_library.impl(_op, _triton_kernel(_op), dispatch_key(_device))
    if _device not in integer.serving:
        for _op in integer.KERNELS:
            _triton_library.impl(_op, _triton_layer_kernel(_op), dispatch_key(_device))
        if _no_triton is None:
            integer.serving[_device] = "triton"


def _slow_reasons() -> list[str]:
    """Known reasons why CPU kernels are slower than they could be, and remedies."""
    reasons = []
    if _ops.native is None:
        reasons.append("no native library: plain torch serves the CPU, many times slower")
    elif _ops.native.isa() != "avx512":
        here = _ops.native.isa()
        reasons.append(f"no AVX-512, but {here}: 3 or more bits and gradients with an exponential are slower")
    return reasons + slow_reasons()


def _integer_kernels(device: str) -> str:
    kernels = integer.integer_kernels(device)
    if kernels == "reference":
        return "plain torch, slower than floats"
    isa = f", instruction set {_ops.native.integer_isa()}" if (kernels, device) == ("native", "cpu") else ""
    return f"{kernels} kernels{isa}"


def _norm_kernels(device: str) -> str:
    if _ops.why_not_native(device) is None:
        return "native kernels"
    return "a Triton kernel" if device in _TRITON_DEVICES and _load_triton() is not None else "plain torch"


def info() -> str:
    """Versions, the native library, threads, the backend of each device, and what is slow here, as text."""
    from . import __version__

    lines = [
        ("coarsegrad", __version__),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} ({platform.machine()}, {platform.system()})"),
        ("threads", f"{torch.get_num_threads()}, usable cores {usable_cores()}"),
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
    lines += [("integer layers", f"on {device}: {_integer_kernels(device)}") for device in _device_types()]
    lines += [("norms in one pass", f"on {device}: {_norm_kernels(device)}") for device in _device_types()]
    lines.append(("torch.compile", f"fused by Inductor up to {INDUCTOR_BITS} bits if nothing is saved, else a call"))
    lines.append(("  training", "on cpu its gate is fused too, and nothing saved, between layers that keep its input"))
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines) + f"\n\n{backends()!r}"
    if reasons := _slow_reasons():
        text += "\n\nslower than it could be on the CPU\n" + "\n".join(
            textwrap.fill(reason, 100, initial_indent="- ", subsequent_indent="  ") for reason in reasons
        )
    return text
