"""Which backend serves which device, and why not another; a switch between them; the text of `coarsegrad info`."""

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
from pathlib import Path
from types import ModuleType

import torch

from . import _ops, integer, reference
from ._torch_internals import dispatch_key, unregister
from .ste import format_table, one_of


@dataclass(frozen=True)
class _Backend:
    """why_not(device type): why it cannot serve it, or None if it can. detail(device type): what there is to say of it.

    kernels(): a module with the functions that _ops.KERNELS names; None: its kernels were registered as it was loaded.
    asked(device type): whether it serves it only where `use_backend` asks for it.
    """

    name: str
    why_not: Callable[[str], str | None]
    detail: Callable[[str], str]
    kernels: Callable[[], ModuleType] | None
    asked: Callable[[str], bool] = lambda device: False


def _native_detail(device: str) -> str:
    return _ops.native.isa() if device == "cpu" else f"compiled for {', '.join(_ops.build_facts['cuda_archs'])}"


_TRITON_DEVICES = ("cuda", "xpu")


_no_triton = None if importlib.util.find_spec("triton") else "not installed (pip install triton)"


@functools.cache
def _load_triton() -> ModuleType | None:
    """coarsegrad.triton; None if it cannot be had, and _no_triton says why. Importing triton takes long: not before it
    is wanted."""
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
        return "runs on GPUs; on a CPU only its interpreter does, with TRITON_INTERPRET=1 in the environment"
    return None if device in _TRITON_DEVICES else f"has no kernels for {device}"


def _triton_detail(device: str) -> str:
    return "its interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled at the first call"


# In order of preference.
_BACKENDS = {
    backend.name: backend
    for backend in (
        _Backend("native", _ops.why_not_native, _native_detail, None),
        _Backend("triton", _triton_why_not, _triton_detail, _load_triton, lambda device: device == "cpu"),
        _Backend("reference", lambda device: None, lambda device: "plain torch", lambda: reference),
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
    serving = (asked or [name for name in able if not _BACKENDS[name].asked(device)])[0]

    def passed_over(name: str) -> str:
        if not asked and _BACKENDS[name].asked(device):
            return f"only where use_backend({name!r}) asks for it"
        return f"use_backend({serving!r})" if asked else f"{serving} comes first"

    why_not = {
        name: backend.why_not(device) or passed_over(name) for name, backend in _BACKENDS.items() if name != serving
    }
    return Serving(serving, _BACKENDS[serving].detail(device), why_not)


def backends() -> BackendTable:
    """For each device type of this machine, the backend that serves it and why the others do not. Prints as a table."""
    return BackendTable({device: _serving(device) for device in _device_types()})


def _put_in_kernels() -> None:
    """Make the innermost open block's backend serve the devices it can serve."""
    global _override
    if _override is not None:
        unregister(_override)
        _override = None
    backend = _BACKENDS[_open_blocks[-1]] if _open_blocks else None
    if backend is None or backend.kernels is None:
        return
    kernels = {op: getattr(backend.kernels(), name) for op, name in _ops.KERNELS.items()}
    if backend.name == "reference":
        kernels |= integer.KERNELS
    _override = torch.library.Library("coarsegrad", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")  # that is what it is for
        for device in _device_types():
            if backend.why_not(device) is None:
                key = dispatch_key(device)
                for op, kernel in kernels.items():
                    _override.impl(op, kernel, key, allow_override=True)


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

    name: "native" (compiled), "triton" or "reference" (plain torch). Blocks nest; the innermost one counts. All
    backends give the same codes and outputs, bit for bit.

    Raises ValueError if there is no such backend, RuntimeError if it serves no device here; both list the ones that do.
    """
    if name == "triton":
        _load_triton()  # whether it can be imported shows now
    reasons = {backend: [_BACKENDS[backend].why_not(device) for device in _device_types()] for backend in _BACKENDS}
    usable = ", ".join(repr(backend) for backend, why_not in reasons.items() if None in why_not)
    if name not in _BACKENDS:
        raise ValueError(f"{one_of('backend', name, _BACKENDS)}; usable here: {usable}")
    if None not in reasons[name]:
        raise RuntimeError(f"backend {name!r} is not usable here: {reasons[name][0]}; usable here: {usable}")
    return _block(name)


def _triton_kernel(op: str):
    """Triton's kernel, imported at the first call; the reference's where there is no Triton."""
    on_reference = _ops.reference_kernel(op, lambda: _no_triton)

    def call(*args):
        triton = _load_triton()
        return on_reference(*args) if triton is None else getattr(triton, _ops.KERNELS[op])(*args)

    return call


_triton_library = torch.library.Library("coarsegrad", "IMPL")
for _device in _TRITON_DEVICES:
    for _op in _ops.KERNELS:
        if _ops.why_not_native(_device) is not None or _op == "qrelu_backward_own":
            _triton_library.impl(_op, _triton_kernel(_op), dispatch_key(_device))


def preloaded_malloc() -> str | None:
    """tcmalloc and the like, where one serves this process in place of the C library's malloc."""
    libraries = Path("/proc/self/maps")
    loaded = libraries.read_text() if libraries.exists() else ""
    return next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if f"lib{name}" in loaded), None)


# What MALLOC_MMAP_THRESHOLD_ is at most by itself: blocks as large always go back to the system as they are freed.
_GLIBC_GIVES_BACK = 32 * 2**20


def _slow_reasons() -> list[str]:
    """Why kernels on the CPU are slower than they could be, as far as it is known, and what to do."""
    reasons = []
    if _ops.native is None:
        reasons.append("no native library: plain torch serves the CPU, many times slower")
    elif _ops.native.isa() != "avx512":
        here = _ops.native.isa()
        reasons.append(f"no AVX-512, but {here}: 3 bits and more, and gradients with an exponential, are slower")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.get_num_threads() == 1 < cores:
        reasons.append(f"1 thread on {cores} cores: torch.set_num_threads or OMP_NUM_THREADS gives more")
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    keeps = threshold.isdecimal() and int(threshold) > _GLIBC_GIVES_BACK
    if platform.libc_ver()[0] == "glibc" and not keeps and preloaded_malloc() is None:
        reasons.append(
            "glibc's malloc gives blocks above 32 MiB back, and each fresh output pays for its pages again:"
            " inplace=True, a preloaded tcmalloc, or"
            " MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592"
        )
    return reasons


def info() -> str:
    """Versions, the state of the native library, threads, which backend serves which device, and what is slow here."""
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
    text = "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines) + f"\n\n{backends()!r}"
    if reasons := _slow_reasons():
        text += "\n\nslower than it could be on the CPU\n" + "\n".join(
            textwrap.fill(reason, 100, initial_indent="- ", subsequent_indent="  ") for reason in reasons
        )
    return text
