"""The backends that every property is tested on."""

from __future__ import annotations

import pytest
import torch

from coarsegrad import _ops
from coarsegrad.testing import backend_ids, serving

IDS = backend_ids() if _ops.native is not None else [*backend_ids(), "native"]


def _serve(request):
    """One backend serves, on one thread: as quick on a busy machine. test_determinism.py is about more.

    torch.empty is filled with NaN, or the largest integer: an element that no kernel wrote stands out.
    """
    if request.param == "native":
        pytest.skip(f"native library not in use: {_ops.native_why_not}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with serving(request.param):
        yield request.param
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


# Every backend and instruction set, for what the kernels compute; the reference and the best instruction set,
# for what is the same code whatever the kernel.
backend = pytest.fixture(_serve, scope="module", params=IDS, name="backend")
reference_or_native = pytest.fixture(_serve, scope="module", params=IDS[:2], name="reference_or_native")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"backends tested: {', '.join(backend_ids())}")
    if _ops.native is None:
        terminalreporter.write_line(f"native backend skipped: {_ops.native_why_not}")
