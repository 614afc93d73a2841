"""Inductor's code for an NVIDIA GPU, without one: a fake device is described to it, and its kernels come as source."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._inductor.scheduler
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter
from triton.runtime.interpreter import _convert_float

import coarsegrad._inductor  # the lowering  # noqa: F401

_PROPERTIES = SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, name="fake", total_memory=2**36, warp_size=32
)
_HINTS = DeviceProperties(
    type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, warp_size=32,
)  # fmt: skip
_REPLACED = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.get_device_capability": lambda *_: (9, 0),
    "torch.cuda.get_device_properties": lambda *_: _PROPERTIES,
    "torch._inductor.scheduler.has_triton": lambda *_: True,
    "torch.utils._triton.triton_hash_with_backend": lambda *_: "",
}


def source(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> str:
    """The Python module that Inductor makes of a function of tensors, for inputs like these on a GPU."""
    with contextlib.ExitStack() as stack:
        for name, stand_in in _REPLACED.items():
            stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", staticmethod(lambda device: _HINTS)))
        fake = FakeTensorMode()
        with fake:
            on_gpu = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in inputs]
            traced = make_fx(function, select_decomp_table())(*on_gpu)
        graph = GraphLowering(traced, example_inputs=on_gpu)
        with V.set_debug_handler(DebugContext()), V.set_graph_handler(graph), V.set_fake_mode(fake):
            graph.run(*on_gpu)
            code: Any = graph.codegen()[0]
        return code.value


_KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''.*?\)\n", re.DOTALL)


def kernels(code: str, folder: Path) -> dict[str, Any]:
    """name -> the kernel, as a function of Triton, in the order of the module."""
    found = {}
    for name, text in _KERNEL.findall(code):
        text = text.replace("triton_helpers.set_driver_to_gpu()", "")
        text = re.sub(r"@triton_heuristics.*?(?=@triton\.jit)", "", text, flags=re.DOTALL)
        found[name] = getattr(_imported(text, folder / f"{name}.py"), name)
    return found


def _imported(text: str, path: Path) -> ModuleType:
    path.write_text(text)
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ptx(kernel: Any, pointers: dict[str, str], arch: int, folder: Path) -> str:
    """Of a kernel of one dimension. pointers: the types of its tensors."""
    types = {**pointers, "xnumel": "i32", "XBLOCK": "constexpr"}
    made = ASTSource(kernel, types, {(len(pointers) + 1,): 1024})
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        return triton.compile(made, target=GPUTarget("cuda", arch, 32)).asm["ptx"]


def interpreted(function: Callable[..., tuple[Tensor, ...]], folder: Path, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The function's results by Inductor's code for a GPU, on tensors of the CPU, in Triton's interpreter."""
    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"
    code = source(function, *inputs)
    made = kernels(code, folder)
    code = _KERNEL.sub(lambda found: f"_kernels['{found[1]}']\n", code)
    code = code.replace("torch._C._dynamo.guards._empty_strided_cuda", "torch._C._dynamo.guards._empty_strided_cpu")
    code = code.replace("from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "")
    code = code.replace("with torch.cuda._DeviceGuard(0):", "if True:").replace("torch.cuda.set_device(0)", "")
    namespace: dict[str, Any] = {
        "_kernels": {name: _Launcher(kernel) for name, kernel in made.items()}, "get_raw_stream": lambda device: 0,
        "__name__": "compiled",
    }  # fmt: skip
    exec(code, namespace)
    with mock.patch.object(interpreter, "_convert_float", _converted):
        return namespace["call"](list(inputs))


def _converted(data: np.ndarray, source: Any, target: Any, rounding: object) -> np.ndarray:
    """The interpreter's conversion, but of bfloat16 by torch: it truncates to it, and loses subnormals from it."""
    data = np.ascontiguousarray(data)
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(data).bfloat16().view(torch.uint16).numpy()
    if (source, target) == (tl.bfloat16, tl.float32):
        return torch.from_numpy(data).view(torch.bfloat16).float().numpy()
    return _convert_float(data, source, target, rounding)


class _Launcher:
    """What Inductor's module calls, which gives the number of elements last."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def run(self, *arguments: Any, stream: int) -> None:
        block = 2**14
        self._kernel[(-(-arguments[-1] // block),)](*arguments, XBLOCK=block)
