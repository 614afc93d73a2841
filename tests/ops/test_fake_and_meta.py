"""Tensors without values: the meta device, FakeTensorMode, and a default device that is not where the data are."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import coarsegrad as cg
from coarsegrad.testing import hard_inputs


def soft_tail(u, q):
    return torch.where(u <= 0, torch.zeros(()), 1 / (1 + u / torch.tensor(float(q), dtype=u.dtype)).to(u.dtype))


def qrelu(x, ste, alpha_grad, **settings):
    return cg.qrelu(x, torch.full((1,), 0.3, requires_grad=True), 2, ste=ste, alpha_grad=alpha_grad, **settings)


def packed(x, squared):
    net = nn.Sequential(nn.Linear(8, 8), cg.QReLU(2, ste="relu", squared=squared), nn.Linear(8, 8))
    cg.pack_activations_(net)
    return net(x)


def quantized(x):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    cg.quantize_(net, 4)
    return net(x)


def images(x):
    return x.flatten()[:36].view(1, 4, 3, 3)


CALLS = {
    **{
        f"{ste} {alpha_grad}": lambda x, ste=ste, alpha_grad=alpha_grad: qrelu(x, ste, alpha_grad)
        for ste in cg.stes()
        for alpha_grad in ("exact", "three_valued", "chain")
    },
    "number": lambda x: cg.qrelu(x, 0.3, 2),
    "channels": lambda x: cg.qrelu(x, torch.full((8,), 0.3), 2, channel_dim=1, alpha_scale="lsq"),
    "in place": lambda x: qrelu(x * 1, "relu", "exact", inplace=True),
    "codes": lambda x: x + cg.dequantize(cg.qrelu_codes(x, 0.3, 2), 0.3, 2, x.shape, x.dtype),
    "linear": lambda x: cg.qrelu_linear(x, 0.3, torch.randn(5, 8, requires_grad=True)),
    "linear, own": lambda x: cg.qrelu_linear(x, 0.3, torch.randn(5, 8), ste="reverse_exponential_step"),
    "conv2d": lambda x: cg.qrelu_conv2d(images(x), 0.3, torch.randn(2, 4, 3, 3, requires_grad=True)),
    "packed": lambda x: packed(x, False),
    "packed, squared": lambda x: packed(x, True),
    "QReLULinear": lambda x: cg.nn.QReLULinear(cg.QReLU(2, learn_alpha=True), nn.Linear(8, 4))(x),
    "QReLUConv2d": lambda x: cg.nn.QReLUConv2d(cg.QReLU(2), nn.Conv2d(4, 2, 3))(images(x)),
    "quantize_": quantized,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("where", ["meta", "fake"])
def test_a_step_has_the_shapes_of_one_with_values(where, call):
    shapes = []
    for mode in (torch.device("meta") if where == "meta" else FakeTensorMode(), contextlib.nullcontext()):
        with mode:
            x = torch.randn(6, 8, requires_grad=True)
            y = CALLS[call](x)
            y.sum().backward()
            shapes.append([(t.shape, t.stride(), t.dtype) for t in (y, x.grad)])
            if not isinstance(mode, contextlib.nullcontext):
                assert all(t.is_meta if where == "meta" else isinstance(t, FakeTensor) for t in (y, x.grad))
    assert shapes[0] == shapes[1]


def test_autocast_beside_meta():
    """What autocast says of the CPU is not said of meta, which has none."""
    with torch.autocast("cpu", torch.bfloat16):
        y = cg.qrelu_linear(torch.empty(6, 8, device="meta"), 0.3, torch.empty(5, 8, device="meta"))
    assert y.dtype == torch.float32 and y.is_meta


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_what_the_package_computes_for_itself_has_values(mode):
    want = [cg.check_ste(ste, bits) for ste in cg.stes() for bits in (1, 4)]
    points = hard_inputs(0.3, 2, "nearest", torch.float32)
    x = torch.linspace(-1, 2, 30, device="cpu").requires_grad_()
    with mode():
        assert [cg.check_ste(ste, bits) for ste in cg.stes() for bits in (1, 4)] == want
        again = hard_inputs(0.3, 2, "nearest", torch.float32)
        handles = [cg.register_ste("mine", soft_tail), cg.register_ste("mine_step", soft_tail, needs="codes")]
        with pytest.raises(ValueError, match="needs='positive' is too little for gprime of ste 'wrong'"):
            cg.register_ste("wrong", soft_tail, needs="positive")
    assert torch.equal(again.nan_to_num(), points.nan_to_num())
    try:
        assert cg.stes()["mine"].in_class
        (grad,) = torch.autograd.grad(cg.qrelu(x, 0.3, 2, ste="mine_step").sum(), x)
        codes = (cg.qrelu(x, 0.3, 2) / 0.3).round()
        torch.testing.assert_close(grad, soft_tail(codes, 3).detach())
    finally:
        for handle in handles:
            handle.close()


def test_a_default_device_that_is_not_that_of_the_data(reference_or_native):
    """Whatever a call makes beside its output is made where x is, or on the CPU."""
    torch.manual_seed(0)
    x, alpha = torch.randn(6, 8, requires_grad=True), torch.full((1,), 0.3, requires_grad=True)
    weight, kernel = torch.randn(5, 8, requires_grad=True), torch.randn(2, 4, 3, 3, requires_grad=True)
    channels = torch.full((8,), 0.3)
    net = nn.Sequential(nn.Linear(8, 8), cg.QReLU(2, ste="relu", squared=True, learn_alpha=True), nn.Linear(8, 8))
    cg.pack_activations_(net)

    def outputs():
        for ste in cg.stes():
            yield from (cg.qrelu(x, alpha, 2, ste=ste, alpha_grad=rule) for rule in ("exact", "two_valued", "chain"))
            yield cg.qrelu_linear(x, 0.3, weight, ste=ste)
        yield cg.qrelu(x, 0.3, 2, rounding="hwgq")
        yield cg.qrelu(x, channels, 2, channel_dim=1, alpha_scale="lsq")
        yield x + cg.dequantize(cg.qrelu_codes(x, 0.3, 2), 0.3, 2, x.shape, x.dtype)
        yield cg.qrelu_conv2d(images(x), alpha, kernel)
        yield net(x)
        cg.saved_memory(net, x)

    found = []
    for default in ("cpu", "meta"):
        torch.set_default_device(default)
        try:
            ys = list(outputs())
            found.append((*ys, *torch.autograd.grad([y.sum() for y in ys], [x, alpha, weight, kernel])))
        finally:
            torch.set_default_device(None)
    assert all(map(torch.equal, *found))
