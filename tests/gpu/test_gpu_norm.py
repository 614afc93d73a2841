"""A norm and its staircase on a GPU against the reference on the CPU: see test_gpu.py."""

from __future__ import annotations

import pytest
import torch
from gpu_backends import any_device, captured, gpu
from test_cuda_host_norm import on_thresholds, ordinary, special
from test_gpu import by_dtype, same

import coarsegrad as cg
from coarsegrad import _ops, reference


def check(arguments, device):
    on_device = [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]
    got, want = _ops.ops.norm_qsigned(*on_device), reference.norm_qsigned(*arguments)
    described = tuple(arguments.x.shape), arguments.x.dtype, arguments[3:]
    assert all(map(same, got, want)), described
    assert [t.shape for t in got] == [t.shape for t in want], described


@any_device
@by_dtype
@pytest.mark.parametrize("make", (ordinary, special, on_thresholds))
def test_against_the_reference(device, dtype, make):
    made = list(make(dtype))
    if device == "cuda" and cg.backends()[device].backend == "triton":  # a compilation each
        made = made[::5]
    for arguments in made:
        check(arguments, device)


@any_device
@by_dtype
def test_layouts(device, dtype):
    """Leading dimensions; strides that are not dense; slices that start beside a 16-byte boundary."""
    first = next(iter(ordinary(dtype, ((1, 64, 32, 8),))))._replace(output=True, codes=True)
    whole = torch.cat([first.x.flatten() * i for i in range(1, 50)])
    for x in (whole.view(7, 7, 64), whole.view(49, 64)[::2], whole[:3072].view(64, 48).t()[:, :64], whole[1:65]):
        check(first._replace(x=x, weight=whole[5:69], bias=whole[:128:2]), device)


@gpu
def test_nothing_waits(device):
    x, weight = torch.randn(100, 256, device=device), torch.ones(256, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        staircase = cg.QSigned(4, group=64)
        y = cg.norm_staircase(x, weight, eps=1e-6, kind="rms", gradient="coarse", staircase=staircase)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not y.isnan().any()


@gpu
def test_capture_in_a_graph(device):
    x = torch.randn(100, 256, device=device)

    def step():
        return _ops.ops.norm_qsigned(x, None, None, 1e-6, True, False, False, 4, 64, 64, False, True)[1]

    graph, outputs = captured(step)
    x.copy_(torch.randn(100, 256))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(outputs, step())
