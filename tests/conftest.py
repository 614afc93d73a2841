"""The backends that every property is tested on."""

from __future__ import annotations

import contextlib
import ctypes

import pytest
import torch

import coarsegrad as cg
from coarsegrad import _ops
from coarsegrad.backends import _BACKENDS
from coarsegrad.testing import backend_ids, serving

IDS = backend_ids() if _ops.native is not None else [*backend_ids(), "native"]


def _fill_new_memory(on):
    """Has malloc set every bit of what it hands out; in the C library that is mallopt's M_PERTURB, where it has one."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-6, 0x100 if on else 0)


def _serve(request):
    """One backend serves, on one thread: as quick on a busy machine. test_determinism.py is about more.

    New memory is filled with ones, NaN in every float dtype, so that an element that no kernel wrote stands out.
    """
    if request.param == "native":
        pytest.skip(f"native library not in use: {_ops.native_why_not}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _fill_new_memory(True)
    with serving(request.param):
        yield request.param
    _fill_new_memory(False)
    torch.set_num_threads(threads)


# Every backend and instruction set, for what the kernels compute; the reference and the best instruction set,
# for what is the same code whatever the kernel.
backend = pytest.fixture(_serve, scope="module", params=IDS, name="backend")
reference_or_native = pytest.fixture(
    _serve, scope="module", params=list(dict.fromkeys([*IDS[:2], *IDS[-1:]])) if "triton" in IDS else IDS[:2],
    name="reference_or_native",
)  # fmt: skip


@pytest.fixture
def device(request):
    """The device "cpu" or "cuda"; "cuda-native" and the like let that backend serve it."""
    device, _, backend = request.param.partition("-")
    with contextlib.ExitStack() as stack:
        if backend:
            if (why := _BACKENDS[backend].why_not(device)) is not None:
                pytest.skip(f"{backend} does not serve {device}: {why}")
            stack.enter_context(cg.use_backend(backend))
        yield device


# Files of one long test each: first, so that no process is left with one when all else is done.
_FIRST = ("test_triton.py", "test_cuda_host.py", "test_sass.py")
_ONE_BY_ONE = "test_cuda_mutants.py"


def pytest_collection_modifyitems(config, items):
    """For `-n auto --dist loadgroup --no-loadscope-reorder`: a file goes to one process, as its fixtures cost
    something. The mutants, of which each is a compilation, go one by one to whichever has time, at the end."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.path.name != _ONE_BY_ONE:
                item.add_marker(pytest.mark.xdist_group(item.path.name))
        items.sort(key=lambda item: (item.path.name not in _FIRST, item.path.name == _ONE_BY_ONE))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"backends tested: {', '.join(backend_ids())}")
    if _ops.native is None:
        terminalreporter.write_line(f"native backend skipped: {_ops.native_why_not}")
