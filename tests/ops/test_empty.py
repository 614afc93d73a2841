"""Tensors of no elements: every op and function, forward and backward."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import coarsegrad as cg
from coarsegrad.packing import square
from coarsegrad.ste import ALPHA_GRADS, ROUNDINGS

SHAPES = [(0,), (0, 8), (4, 0), (2, 0, 3, 3), (0, 2, 3, 3, 3)]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_qrelu(reference_or_native, shape, learned, packing):
    for ste, rounding, rule, inplace in itertools.product(cg.stes(), ROUNDINGS, ALPHA_GRADS, (False, True)):
        if inplace and oracle.saves_x(ste, rule if learned else None):
            continue
        leaf, alpha = torch.empty(shape, requires_grad=True), torch.tensor([0.3], requires_grad=learned)
        with cg.packed_activations() if packing else torch.enable_grad():
            x = leaf * 1
            y = cg.qrelu(x, alpha, 2, ste=ste, rounding=rounding, alpha_grad=rule, alpha_scale="lsq", inplace=inplace)
            z = square(y)
            (z * 2).sum().backward()
        assert y.shape == shape and leaf.grad.shape == shape
        assert not learned or torch.equal(alpha.grad, torch.zeros(1))


@pytest.mark.parametrize("shape, channels", [((0, 8), 8), ((2, 0, 3), 0), ((0, 3, 2, 2), 3), ((2, 3, 0, 2), 3)])
def test_channels(reference_or_native, shape, channels):
    for rule in ALPHA_GRADS:
        x, alpha = torch.empty(shape, requires_grad=True), torch.ones(channels, requires_grad=True)
        cg.qrelu(x, alpha, 4, channel_dim=1, alpha_grad=rule).sum().backward()
        assert torch.equal(alpha.grad, torch.zeros(channels)) and x.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_codes_and_back(reference_or_native, dtype):
    for shape, bits in itertools.product(SHAPES, range(1, 9)):
        codes = cg.qrelu_codes(torch.empty(shape, dtype=dtype), 0.3, bits)
        assert codes.shape == (0,) and codes.dtype == torch.uint8
        y = cg.dequantize(codes, 0.3, bits, shape, dtype)
        assert y.shape == shape and y.dtype == dtype


def gradients(y, *inputs):
    return torch.autograd.grad(y.sum(), inputs)


@pytest.mark.parametrize("ste", ["relu", "log_tailed_relu", "reverse_exponential_step"])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0,), (4, 0)])
def test_the_fused_linear(reference_or_native, shape, ste):
    x, alpha = torch.empty(shape, requires_grad=True), torch.tensor([0.3], requires_grad=True)
    out_features = 0 if shape == (4, 0) else 5
    weight, bias = (torch.randn(out_features, *rest, requires_grad=True) for rest in (shape[-1:], ()))
    y = cg.qrelu_linear(x, alpha, weight, bias, ste=ste)
    want = F.linear(cg.qrelu(x, alpha, ste=ste), weight, bias)
    assert torch.equal(y, want)
    assert all(map(torch.equal, gradients(y, x, alpha, weight, bias), gradients(want, x, alpha, weight, bias)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_fused_conv2d(reference_or_native, memory_format):
    x = torch.empty(0, 3, 5, 5).contiguous(memory_format=memory_format).requires_grad_()
    alpha, weight = torch.tensor([0.3], requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    y = cg.qrelu_conv2d(x, alpha, weight)
    want = F.conv2d(cg.qrelu(x, alpha), weight)
    assert torch.equal(y, want)
    assert all(map(torch.equal, gradients(y, x, alpha, weight), gradients(want, x, alpha, weight)))


def test_under_vmap_and_compile():
    x, alpha = torch.empty(3, 0), torch.tensor([0.3])
    assert torch.vmap(lambda row: cg.qrelu(row, alpha, 2))(x).shape == (3, 0)
    compiled = torch.compile(lambda x: cg.qrelu(x, alpha, 2), backend="aot_eager", fullgraph=True)
    leaf = torch.empty(0, 4, requires_grad=True)
    compiled(leaf).sum().backward()
    assert leaf.grad.shape == (0, 4)


def test_the_meter():
    net = nn.Sequential(nn.Linear(8, 8), cg.QReLU(2, ste="relu"), nn.Linear(8, 4))
    cg.pack_activations_(net)
    assert "total" in repr(cg.saved_memory(net, torch.empty(0, 8, requires_grad=True)))
