"""The ops on a GPU, by the compiled kernels and by Triton's, against the reference on the CPU. `pytest -m gpu` runs
these and test_gpu_modules.py's alone.

What needs no GPU to be checked, as the comparisons themselves, runs on the CPU too: a test that nobody could run proves
nothing.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from gpu_backends import any_device, captured, gpu
from saved_for import saved_for

import coarsegrad as cg
from coarsegrad import _ops, reference
from coarsegrad._types import ALPHA_GRADS, BUILT_IN, ROUNDINGS, AlphaGrad, MaskKind, Rounding, Ste, wide_dtype
from coarsegrad.testing import hard_inputs, ulps_apart

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASKS = ("nothing", "positive", "inside", "state", "near")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def random(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same(got, want):
    """Equal to the bit, but that any NaN equals any NaN."""
    got = got.cpu()
    if not got.is_floating_point():
        return torch.equal(got, want)
    equal = torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)) and torch.equal(got.isnan(), want.isnan())
    return equal and torch.equal(got.signbit() & ~got.isnan(), want.signbit() & ~want.isnan())


def inputs(dtype):
    """(x, channel_dim): all that is hard in one row; sizes around a warp, a pack and a tile; slices that start beside a
    16-byte boundary; channels outermost, in the middle and innermost; channels-last; strides that are not dense."""
    yield torch.cat([hard_inputs(0.3, 4, rounding, dtype) for rounding in ROUNDINGS]), None
    for size in (0, 1, 31, 32, 33, 255, 4097, 100_003):
        yield random(size, dtype, size), None
    yield random(5001, dtype)[1:], None
    yield random((37, 80), dtype)[:, 3:].t(), 1
    yield random((7, 4097), dtype), 0
    yield random((3, 16, 5, 8), dtype), 1
    yield random((33, 264), dtype), -1
    yield random((2, 12, 7, 9), dtype).contiguous(memory_format=torch.channels_last), 1


@any_device
@by_dtype
def test_forward_and_codes(device, dtype):
    triton = device == "cuda" and cg.backends()[device].backend == "triton"
    for n, (x, channel_dim) in enumerate(inputs(dtype)):
        for bits, rounding in itertools.product((1, 2, 4, 8) if n == 0 else (1 + n % 8,), ROUNDINGS):
            channels = 1 if channel_dim is None else x.size(channel_dim)
            alpha = torch.linspace(0.3, 0.7, channels, dtype=torch.float32)
            on = x.to(device)
            outputs = list(itertools.product(MASKS, (False, True)))
            if triton:  # a compilation each; the last one's codes are compared below
                outputs = outputs[2 * ((n + bits) % 4) :][:2]
            for mask, codes in outputs:
                want = reference.qrelu_forward(x, alpha, bits, rounding, mask, codes, channel_dim)
                arguments = (alpha.to(device), bits, Rounding[rounding], MaskKind[mask], codes, channel_dim)
                got = _ops.ops.qrelu_forward(on, *arguments)
                assert all(map(same, got, want)), (x.shape, bits, rounding, mask, codes)
                assert got[0].stride() == want[0].stride()
                written = on.clone()
                got = _ops.ops.qrelu_forward_(written, *arguments)
                assert same(written, want[0]) and all(map(same, got, want[1:]))
            packed = cg.qrelu_codes(on, alpha.to(device), bits, rounding=rounding, channel_dim=channel_dim)
            assert same(packed, want[2])
            memory_format = torch.channels_last if x.dim() == 4 and not x.is_contiguous() else torch.contiguous_format
            settings = {"channel_dim": channel_dim, "memory_format": memory_format}
            rebuilt = cg.dequantize(packed, alpha.to(device), bits, x.shape, dtype, **settings)
            assert same(rebuilt, cg.dequantize(want[2], alpha, bits, x.shape, dtype, **settings))


@any_device
@by_dtype
def test_backward_from_slopes(device, dtype):
    for n, (x, channel_dim) in enumerate(inputs(dtype)):
        bits, ste = 1 + n % 8, "reverse_exponential_step"
        alpha = torch.linspace(0.3, 0.7, 1 if channel_dim is None else x.size(channel_dim))
        y, _, codes = reference.qrelu_forward(x, alpha, bits, "ceil", "nothing", True, channel_dim)
        memory_format = torch.channels_last if x.dim() == 4 and not y.is_contiguous() else torch.contiguous_format
        dy = random(x.shape, dtype, 1).contiguous(memory_format=memory_format)
        want = reference.qrelu_backward(
            dy, None, None, None, codes, bits, ste, "ceil", "exact", 1.0, None, True, False
        )[0]
        got = _ops.ops.qrelu_backward_from_codes(dy.to(device), codes.to(device), bits, ste)
        assert same(got, want), (x.shape, bits)


def backward_arguments(x, alpha, dy, bits, ste, rounding, alpha_grad, channel_dim):
    """Of the op, on the CPU; with alpha_grad=None only dx is asked for."""
    mask_kind, saves_codes, saves_x = saved_for(ste, rounding, alpha_grad)
    y, mask, codes = reference.qrelu_forward(x, alpha, bits, rounding, mask_kind, saves_codes, channel_dim)
    memory_format = torch.channels_last if x.dim() == 4 and not y.is_contiguous() else torch.contiguous_format
    tensors = (
        dy.contiguous(memory_format=memory_format),
        alpha if saves_x else None,
        x if saves_x else None,
        mask if mask_kind != MaskKind.nothing else None,
        codes if saves_codes else None,
    )
    rule = AlphaGrad[alpha_grad or "exact"]
    return (*tensors, bits, Ste[ste], Rounding[rounding], rule, 0.5, channel_dim, True, alpha_grad is not None)


def slope_ulps(ste, dtype):
    """How far dx may be from the reference's."""
    exact = ste not in ("log_tailed_relu", "reverse_exponential")
    return 0 if exact else 12 if dtype == torch.float64 else 6


@any_device
@by_dtype
@pytest.mark.parametrize("ste", BUILT_IN)
def test_backward(device, dtype, ste):
    for n, (x, channel_dim) in enumerate(inputs(dtype)):
        bits, rounding = 1 + n % 8, ROUNDINGS[n % 3]
        alpha = torch.linspace(0.3, 0.7, 1 if channel_dim is None else x.size(channel_dim))
        x = torch.where(x.abs() < 1e30, x, 1.0).to(dtype)
        dy = random(x.shape, dtype, 1)
        for alpha_grad in (None, *ALPHA_GRADS):
            arguments = backward_arguments(x, alpha, dy, bits, ste, rounding, alpha_grad, channel_dim)
            want = reference.qrelu_backward(*arguments)
            on = [each.to(device) if isinstance(each, torch.Tensor) else each for each in arguments]
            got = _ops.ops.qrelu_backward(*on)
            case = (x.shape, bits, rounding, alpha_grad)
            apart = ulps_apart(got[0].cpu(), want[0])
            assert (apart <= slope_ulps(ste, dtype)).all(), case
            most = 2**bits + (x.double().abs().max() / 0.3 if x.numel() else 0)
            bound = dy.double().abs().sum() * most * (1e-14 if dtype == torch.float64 else 1e-6)
            assert ((got[1].cpu().double() - want[1].double()).abs() <= bound + 1e-300).all(), case
            again = _ops.ops.qrelu_backward(*on)
            assert torch.equal(got[1], again[1]), "the sums have a fixed order"


def alphas_near_subnormals(dtype):
    """With 0.3 and 2e4 subnormal x have quotients that are subnormal and 0; the others, around the smallest normal
    number, make subnormal levels."""
    tiny = torch.finfo(dtype).smallest_normal
    return 0.3, 2e4, *(factor * tiny for factor in (torch.finfo(dtype).eps, 0.75, 1, 1.5, 200))


@any_device
@by_dtype
def test_nothing_is_flushed(device, dtype):
    """Where subnormals decide: every threshold, the smallest x, and gradients that are exact."""
    for alpha, (bits, rounding) in itertools.product(
        alphas_near_subnormals(dtype), zip((1, 2, 3, 8, 4), (*ROUNDINGS, "ceil", "nearest"))
    ):
        alpha = torch.tensor([alpha], dtype=wide_dtype(dtype))
        x = hard_inputs(alpha.item(), bits, rounding, dtype)
        arguments = (bits, Rounding[rounding], MaskKind.state, True, None)
        want = reference.qrelu_forward(x, alpha, *arguments)
        case = alpha.item(), bits, rounding
        assert all(map(same, _ops.ops.qrelu_forward(x.to(device), alpha.to(device), *arguments), want)), case
        x = torch.where(x.abs() <= 2 * 2**bits * alpha, x, 0)
        for ste in BUILT_IN:
            # Sums of codes are exact in any order.
            backward = backward_arguments(x, alpha, torch.ones_like(x), bits, ste, rounding, "exact", None)
            want = reference.qrelu_backward(*backward)
            on = [each.to(device) if isinstance(each, torch.Tensor) else each for each in backward]
            got = [each.cpu() for each in _ops.ops.qrelu_backward(*on)]
            assert (ulps_apart(got[0], want[0]) <= slope_ulps(ste, dtype)).all(), (case, ste)
            assert torch.equal(got[1], want[1]), (case, ste)


@any_device
def test_the_code_of_a_layer_sees_subnormals(device):
    """An affine output that is a subnormal below 0, 0, and a subnormal above."""
    codes, weight = torch.arange(3, dtype=torch.uint8)[:, None], torch.ones(1, 32, dtype=torch.uint8)
    arguments = (codes, weight, 2, 8, torch.tensor([1e-40]), torch.tensor([-1e-40]), None, 3)
    on = [each.to(device) if isinstance(each, torch.Tensor) else each for each in arguments]
    assert _ops.ops.integer_linear(*on).flatten().tolist() == [0, 0, 1]


@gpu
def test_a_bad_alpha_makes_nan_and_waits_for_nothing(device):
    x = torch.randn(1000, device=device)
    torch.cuda.synchronize()
    for bad in (0.0, -1.0, math.nan, math.inf):
        alpha = torch.full((1,), bad, device=device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = cg.qrelu(x, alpha, 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert y.isnan().all()


def train_step(x, layer, dy):
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, layer.alpha], dy)


@gpu
def test_training_waits_for_nothing(device):
    layer = cg.QReLU(2, learn_alpha=True).to(device)
    x, dy = torch.randn(3000, device=device, requires_grad=True), torch.randn(3000, device=device)
    train_step(x, layer, dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(x, layer, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_the_current_stream_is_used(device):
    """The input is written late on a stream of its own; whoever ran on another one would read what was there before."""
    stream, x, alpha = torch.cuda.Stream(), torch.zeros(1 << 22, device=device), torch.tensor([0.5], device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.fill_(0.75)
        y = cg.qrelu(x, alpha, 2)
    stream.synchronize()
    assert (y == 1.0).all()


@gpu
def test_capture_in_a_graph(device):
    layer = cg.QReLU(2, alpha=0.4, learn_alpha=True).to(device)
    x, dy = torch.randn(5000, device=device, requires_grad=True), torch.randn(5000, device=device)
    graph, outputs = captured(lambda: train_step(x, layer, dy))
    with torch.no_grad():
        x.copy_(torch.randn(5000, device=device))
        layer.alpha.fill_(0.3)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, outputs, train_step(x, layer, dy)))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensor_is_used(device):
    x = torch.randn(1000, device="cuda:1")
    assert torch.cuda.current_device() == 0
    y = cg.qrelu(x, torch.tensor([0.5], device="cuda:1"), 2)
    assert y.device == x.device and same(y, cg.qrelu(x.cpu(), 0.5, 2))


@gpu
def test_more_elements_than_32_bits_count(device):
    count = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 3 * 2 * count:
        pytest.skip("needs 13 GB of free GPU memory")
    x = torch.zeros(count, dtype=torch.bfloat16, device=device)
    x[-4099:] = random(4099, torch.bfloat16).to(device)
    alpha, options = torch.tensor([0.5], device=device), (2, Rounding.ceil, MaskKind.inside, False, None)
    y, mask, _ = _ops.ops.qrelu_forward(x, alpha, *options)
    want, want_mask, _ = reference.qrelu_forward(x[-4099:].cpu(), alpha.cpu(), *options)
    assert same(y[-4099:], want) and same(mask[2**31 // 8 :], want_mask)
    assert not y[:-4099].any()


@any_device
def test_compile(device):
    layer = cg.QReLU(2, learn_alpha=True).to(device)
    x = random((9, 33), torch.float32).to(device).requires_grad_()
    dy = torch.ones_like(x)
    compiled = torch.compile(layer, fullgraph=True)
    for got, want in zip(train_step(x, compiled, dy), train_step(x, layer, dy), strict=True):
        assert torch.equal(got, want)


@any_device
def test_opcheck(device):
    x = random((4, 6), torch.float32).to(device).requires_grad_()
    alpha = torch.tensor([0.5], device=device)
    args = (x, alpha, 2, "clipped_relu", "ceil", "three_valued", 1.0, None)
    torch.library.opcheck(_ops.ops.qrelu.default, args)


@any_device
def test_autocast(device):
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), cg.QReLU(2), torch.nn.Linear(16, 4)).to(device)
    with torch.autocast(device, torch.bfloat16):
        y = net(torch.randn(5, 8, device=device))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad is not None for p in net.parameters())
