"""The backends that every property is tested on."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
import torch

import coarsegrad as cg
from coarsegrad import _ops
from coarsegrad.backends import _BACKENDS
from coarsegrad.testing import backend_ids, integer_backend_ids, serving

# torch caches compiled code under a key that ignores what the ops in it are: a cache for each state of the package.
_SOURCES = b"".join(path.read_bytes() for path in sorted(Path(cg.__file__).parent.rglob("*.py")))
_STATE = hashlib.sha256(_SOURCES).hexdigest()[:16]
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/coarsegrad_{os.getuid()}_{_STATE}")
# Else it starts processes in advance, which import torch and then compile little.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# A new process imports the coarsegrad that is tested here, whichever its Python has installed.
_IMPORTED_FROM = os.path.dirname(os.path.dirname(cg.__file__))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_IMPORTED_FROM, os.environ.get("PYTHONPATH")]))

IDS = backend_ids() if _ops.native is not None else [*backend_ids(), "native"]


@pytest.fixture(scope="session", autouse=True)
def _a_gpus_arithmetic():
    """In Triton's interpreter, whoever calls it."""
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
            import gpu_arithmetic

            stack.enter_context(gpu_arithmetic.installed())
        yield


def _fill_new_memory(on):
    """Makes malloc set every bit of the memory that it returns, by mallopt's M_PERTURB if the C library has it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-6, 0x100 if on else 0)


def _serve(request):
    """One backend runs, on one thread, which is as fast on a busy machine; test_determinism.py uses more.

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


# Every backend and instruction set, for what the kernels compute; the reference and the best instruction set, for code
# that is the same whatever the kernel.
backend = pytest.fixture(_serve, scope="module", params=IDS, name="backend")
reference_or_native = pytest.fixture(
    _serve, scope="module", params=list(dict.fromkeys([*IDS[:2], *IDS[-1:]])) if "triton" in IDS else IDS[:2],
    name="reference_or_native",
)  # fmt: skip
# The same for the kernels of layers on codes.
INTEGER_IDS = integer_backend_ids() if _ops.native is not None else [*integer_backend_ids(), "native"]
integer_backend = pytest.fixture(_serve, scope="module", params=INTEGER_IDS, name="integer_backend")


@pytest.fixture
def device(request):
    """The device "cpu" or "cuda"; a suffix, as in "cuda-native", selects a backend."""
    device, _, backend = request.param.partition("-")
    with contextlib.ExitStack() as stack:
        if backend:
            if (why := _BACKENDS[backend].why_not(device)) is not None:
                pytest.skip(f"{backend} does not serve {device}: {why}")
            stack.enter_context(cg.use_backend(backend))
        yield device


# Files with long tests: first, so that none is left for one process when all else is done.
_FIRST = (
    "test_triton.py", "test_sass.py", "test_cuda_host.py", "test_cuda_host_signed.py", "test_cuda_host_weights.py",
    "test_cuda_host_norm.py",
)  # fmt: skip
# Files whose cases are long, which are dealt out one by one, last. What stands before a colon in a case's name keeps
# cases together.
_ONE_BY_ONE = ("test_cuda_mutants.py", "test_ops.py", "test_theory.py")
# What --fast leaves out: files that compile, run an interpreter, start new processes, or train networks.
_SLOW = (
    *_FIRST, "test_arm.py", "test_cuda_mutants.py", "test_backends.py", "test_bench_against.py",
    "test_bench_instructions.py", "test_bench_memory.py", "test_bench_times.py", "test_bench_training.py",
    "test_blocks.py", "test_cifar.py", "test_distributed.py", "test_distributed_weights.py",
    "test_dtensor.py", "test_experiments.py", "test_finetune.py", "test_finetune_torchrun.py", "test_graphs.py",
    "test_headers.py", "test_hugging_face.py", "test_hugging_face_errors.py", "test_inductor.py",
    "test_inductor_gates.py", "test_install.py", "test_integer_convert.py", "test_integer_trained.py",
    "test_export_onnx.py", "test_host.py", "test_hosts.py", "test_notebook.py", "test_ops.py",
    "test_packing_compiled.py", "test_release.py", "test_rounding.py", "test_stats_callback.py", "test_table.py",
    "test_theory.py", "test_torchao.py", "test_torchtitan.py", "test_zoo.py",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--fast", action="store_true", help="one backend for each property, and no file that takes minutes"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The random numbers of a test do not depend on which tests ran before it in its process."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


def pytest_ignore_collect(collection_path, config):
    return True if config.getoption("--fast") and collection_path.name in _SLOW else None


def _is_fast(item):
    params = getattr(item, "callspec", None) and item.callspec.params or {}
    names = ("backend", "reference_or_native", "integer_backend")
    return {params[name] for name in names if name in params} <= {IDS[1], INTEGER_IDS[1]}


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fast"):
        config.hook.pytest_deselected(items=[item for item in items if not _is_fast(item)])
        items[:] = filter(_is_fast, items)
    if config.pluginmanager.hasplugin("xdist"):
        items.sort(key=lambda item: (item.path.name not in _FIRST, item.path.name in _ONE_BY_ONE))


def pytest_configure(config):
    """With -n, each process and what it starts has its share of the cores: threads that wait for each other's core take
    many times as long."""
    processes = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if processes is not None:
        share = max(1, torch.get_num_threads() // int(processes))
        torch.set_num_threads(share)
        os.environ["OMP_NUM_THREADS"] = str(share)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With -n: a file runs in one process because of its fixtures, but for those in _ONE_BY_ONE."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path, _, case = nodeid.partition("::")
            if path.rpartition("/")[2] not in _ONE_BY_ONE:
                return path
            together, colon, _ = case.partition("[")[2].partition(": ")
            return f"{path}: {together}" if colon else nodeid

    config.option.loadscopereorder = False  # in the order above
    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"backends tested: {', '.join(backend_ids())}")
    if _ops.native is None:
        terminalreporter.write_line(f"native backend skipped: {_ops.native_why_not}")


@pytest.fixture
def measured_here(monkeypatch):
    """Benchmarks measure in this process, whose output is captured; the number of threads is restored."""
    from bench import sweep

    monkeypatch.setattr(sweep, "in_new_process", lambda allocator, function, *arguments: function(*arguments))
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """As quick for small networks, and leaves the other cores to other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
