"""The scale of quantized weights on a GPU against the reference on the CPU: see test_gpu.py."""

from __future__ import annotations

import pytest
import torch
from gpu_backends import any_device, captured, gpu
from test_cuda_host_weights import every_case
from test_gpu import by_dtype, same

import coarsegrad as cg
from coarsegrad import _ops, reference
from coarsegrad._types import WEIGHT_BITS


@any_device
@by_dtype
def test_scales(device, dtype):
    for case in every_case(dtype):
        rows = case.inputs["x"].view(case.channels, -1) if case.count else torch.empty(case.channels, 0, dtype=dtype)
        got = _ops.ops.weight_scale(rows.to(device), case.bits, 0)
        assert same(got, reference.weight_scale(rows, case.bits, 0)), (tuple(rows.shape), case.bits)


def views(x):
    last = x.contiguous(memory_format=torch.channels_last)
    yield from (x, last, x.transpose(0, 1), x[::2], x[..., 1:], x.flip(0).mT, x[:, :1].expand(x.shape), x[:0])


@any_device
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_layouts(device, bits):
    x = torch.randn(6, 4, 3, 5)
    for on_cpu, view in zip(views(x), views(x.to(device))):
        for channel_dim in (0, 1, -1, None):
            want = reference.weight_scale(on_cpu, bits, channel_dim)
            assert same(_ops.ops.weight_scale(view, bits, channel_dim), want)
    if device != "cpu":
        large = torch.randn(2**21 + 3)
        assert same(_ops.ops.weight_scale(large.to(device), bits, None), reference.weight_scale(large, bits, None))


@gpu
def test_nothing_waits(device):
    weight = torch.randn(64, 300, device=device)
    for bits in WEIGHT_BITS:
        cg.qweight(weight, bits)  # brings a table to the GPU
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [cg.qweight(weight, bits) for bits in WEIGHT_BITS]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(same(y, cg.qweight(weight.cpu(), bits)) for y, bits in zip(found, WEIGHT_BITS))


@gpu
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_capture_in_a_graph(device, bits):
    weight = torch.randn(64, 300, device=device)
    graph, outputs = captured(lambda: cg.qweight(weight, bits))
    weight.copy_(torch.randn(64, 300))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(outputs, cg.qweight(weight, bits))
