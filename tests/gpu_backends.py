"""The devices that test_gpu.py and test_gpu_modules.py run on, and with it the backend that serves it there."""

from __future__ import annotations

import pytest
import torch

GPU_BACKENDS = ("native", "triton")
_marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
_on_gpu = [pytest.param(f"cuda-{backend}", marks=_marks) for backend in GPU_BACKENDS]

# For the fixture `device` of conftest.py.
gpu = pytest.mark.parametrize("device", _on_gpu, indirect=True)
any_device = pytest.mark.parametrize("device", ["cpu", *_on_gpu], indirect=True)


def captured(step):
    """(a CUDA graph of one call of `step`, what that returned, into which each replay writes)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs
