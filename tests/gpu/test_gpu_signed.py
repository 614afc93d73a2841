"""The signed staircase and the Hadamard rotation on a GPU against the reference on the CPU: see test_gpu.py."""

from __future__ import annotations

import itertools

import torch
from gpu_backends import any_device, captured, gpu
from host_cases_signed import hard_inputs, make_group
from test_gpu import by_dtype, inputs, random, same

import coarsegrad as cg
from coarsegrad import _ops, reference

# (shape, group): a few of every way that a CUDA kernel shares groups, and strides that are not dense.
GROUPS = (
    *(((0, 64), 32), ((5, 7), 1), ((7, 9), 3), ((3, 1001), 1001), ((9, 32), 8), ((3, 96), 32), ((700, 64), 64)),
    *(((41, 128), 128), ((33, 256), 256), ((2, 96), 96), ((3, 3000), 1000), ((2, 4, 20_008), 20_008)),
)


def format_of(x, y):
    dense = x.dim() != 4 or y.is_contiguous()
    return torch.contiguous_format if dense else torch.channels_last


def check_forward(x, alpha, bits, group, channel_dim, device):
    """And the way back from the codes, aligned or not."""
    dynamic = alpha is None
    for mask, codes in ((not dynamic, True), (False, False)):
        want = reference.qsigned_forward(x, alpha, bits, group, mask, codes, channel_dim)
        on = None if dynamic else alpha.to(device)
        got = _ops.ops.qsigned_forward(x.to(device), on, bits, group, mask, codes, channel_dim)
        case = tuple(x.shape), x.dtype, bits, group, channel_dim, mask
        assert all(map(same, got, want)), case
        assert got[0].stride() == want[0].stride(), case
        if codes:
            settings = (bits, group, list(x.shape), x.dtype, channel_dim, format_of(x, want[0]))
            rebuilt = reference.qsigned_dequantize(want[3], want[1] if dynamic else alpha, *settings)
            assert same(_ops.ops.qsigned_dequantize(got[3], got[1] if dynamic else on, *settings), rebuilt), case


@any_device
@by_dtype
def test_given_alphas(device, dtype):
    for n, (x, channel_dim) in enumerate([(hard_inputs(0.3, 8, dtype), None), *inputs(dtype)]):
        channels = 1 if channel_dim is None else x.size(channel_dim)
        for bits in (2, 3, 8) if n < 2 else (2 + n % 7,):
            check_forward(x, torch.linspace(0.3, 0.7, channels), bits, None, channel_dim, device)


@any_device
@by_dtype
def test_subnormals_and_irregular_alphas(device, dtype):
    finite = torch.finfo(dtype)
    for scale, bits in itertools.product((finite.smallest_normal * finite.eps, finite.smallest_normal / 2), (2, 4, 8)):
        alpha = torch.tensor([scale], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        check_forward(hard_inputs(scale, bits, dtype), alpha, bits, None, None, device)
    alpha = torch.tensor([finite.max / 2], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    check_forward(hard_inputs(alpha.item(), 3, dtype), alpha, 3, None, None, device)


@any_device
@by_dtype
def test_dynamic_alphas(device, dtype):
    for n, (shape, group) in enumerate(GROUPS):
        bits = 2 + n % 7
        count = torch.Size(shape).numel()
        made = [make_group(dtype, bits, group, n + i) for i in range(count // group)]
        x = torch.cat(made).view(shape) if made else torch.empty(shape, dtype=dtype)
        check_forward(x, None, bits, group, None, device)
        beside = torch.cat([torch.ones(1, dtype=dtype), x.flatten()]).to(device)[1:].view(shape)
        got = _ops.ops.qsigned_forward(beside, None, bits, group, False, True, None)
        assert all(map(same, got, reference.qsigned_forward(x, None, bits, group, False, True, None))), shape
    check_forward(random((37, 80), dtype).t(), None, 4, 37, None, device)


@any_device
@by_dtype
def test_hadamard(device, dtype):
    for size in (1, 2, 8, 64, 128, 256, 1024):
        x = random((33, 3 * size), dtype, size) * 30
        assert same(_ops.ops.hadamard(x.to(device), size), reference.hadamard(x, size)), size
        x = random((3 * size, 33), dtype, size).t()
        assert same(_ops.ops.hadamard(x.to(device), size), reference.hadamard(x, size)), size
        beside = random((3 * size + 1,), dtype, size)[1:]
        assert same(_ops.ops.hadamard(beside.to(device), size), reference.hadamard(beside, size)), size


@gpu
def test_nothing_waits(device):
    x, alpha = torch.randn(100, 128, device=device), torch.tensor([0.0], device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bad = cg.qsigned(x, alpha, 4)
        codes, alphas = cg.qsigned_codes(cg.hadamard(x, 128), None, 4, group=32)
        y = cg.dequantize(codes, alphas, 4, x.shape, x.dtype, signed=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bad.isnan().all() and not y.isnan().any()


@gpu
def test_capture_in_a_graph(device):
    x = torch.randn(100, 128, device=device)

    def step():
        return cg.qsigned(cg.hadamard(x, 128), None, 4, group=32)

    graph, outputs = captured(step)
    x.copy_(torch.randn(100, 128))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(outputs, step())
