"""Compiled training in which a qrelu's bits for backward cost nothing: the op's gradient, nothing saved, no call."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import re
from unittest import mock

import pytest
import torch
from torch import nn

import coarsegrad as cg
from coarsegrad import _inductor_gates

graph = pytest.importorskip("torch._inductor.graph")
C = 8


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every graph is compiled; what the C++ compiler makes of the same source may come from a cache."""
    import torch._functorch.config  # which nothing has imported yet where this file runs alone

    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


class Block(nn.Module):
    """Convolution, BatchNorm and activation, twice, with a sum: what ResNets are made of."""

    def __init__(self, activation):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.conv2, self.norm2 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.act1, self.act2, self.head = activation(), activation(), nn.Linear(C, 10)

    def forward(self, x):
        x = self.act1(self.norm1(self.conv1(x)))
        return self.head(self.act2(self.norm2(self.conv2(x)) + x).mean((2, 3)))


def step(function, *inputs, graphs=2):
    """(the output, what was saved for backward, the code of both graphs). graphs: how many are compiled here."""
    saved, code = {}, []

    def pack(t):
        saved[t.untyped_storage()._cdata] = t
        return t

    with mock.patch.object(graph.GraphLowering, "save_output_code", code.append):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = function(*inputs)
        y.square().sum().backward()
    assert len(code) == graphs
    return y, list(saved.values()), "".join(code)


def written(model, *inputs):
    """The code of both graphs. The C++ in it is not compiled: nothing is computed, and that takes most of the time."""
    from torch._inductor.async_compile import AsyncCompile

    torch._dynamo.reset()
    with mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None):
        *_, code = step(torch.compile(model, fullgraph=True), *inputs)
    torch._dynamo.reset()
    return code


def blocks(activation, dtype=torch.float32):
    torch.manual_seed(0)
    model = Block(activation).to(dtype)
    return model, copy.deepcopy(model), torch.randn(16, 3, 8, 8, dtype=dtype)


def calls(code):
    return code.count("coarsegrad.qrelu")


@pytest.mark.parametrize("ste, rounding", [("clipped_relu", "nearest"), ("relu", "hwgq")])
def test_a_resnet_saves_nothing_for_its_activations(monkeypatch, ste, rounding):
    """In float64, where no rounding of the normalisation moves an element over a threshold."""
    model, eager, x = blocks(lambda: cg.QReLU(2, alpha=0.5, ste=ste, rounding=rounding), torch.float64)
    y, saved, code = step(torch.compile(model, fullgraph=True), x)
    assert calls(code) == 0
    # The outputs of the convolutions and of the first activation, as its reader needs it.
    assert sum(t.numel() == 16 * C * 64 for t in saved) == 3
    assert not any(t.dtype in (torch.bool, torch.uint8) for t in saved)
    wanted = eager(x)
    wanted.square().sum().backward()
    torch.testing.assert_close(y, wanted)
    for (name, p), q in zip(model.named_parameters(), eager.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    monkeypatch.setattr(_inductor_gates, "_gated", lambda node: None)
    assert calls(written(model, x)) >= 4


def test_packed_it_saves_codes_and_the_gradients_are_those_without():
    """Also with two threads, over which Inductor splits sums by how it fuses; and where a sum reads another's codes."""
    model, packed, x = blocks(lambda: cg.QReLU(2, alpha=0.5, ste="clipped_relu", rounding="nearest"))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        y, saved, code = step(torch.compile(model, fullgraph=True), x)
        assert calls(code) == 0
        torch._dynamo.reset()
        with cg.packed_activations():
            same, saved_packed, code = step(torch.compile(packed, fullgraph=True), x)
    finally:
        torch.set_num_threads(threads)
    assert "coarsegrad.qrelu_codes" in code and "coarsegrad.qrelu_forward" not in code
    assert "coarsegrad.qrelu_backward" not in code
    elements = 16 * C * 64
    assert sum(t.numel() == elements for t in saved) == 3 and sum(t.numel() == elements for t in saved_packed) == 2
    assert [t.numel() for t in saved_packed if t.dtype == torch.uint8] == [elements * 2 // 8]
    assert torch.equal(y, same)
    for (name, p), q in zip(model.named_parameters(), packed.parameters()):
        assert torch.equal(p.grad, q.grad), name


def test_packed_levels_come_back_to_the_bit(dtype=torch.float32):
    """Of alphas so small that the middle between two levels is one of them, too."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.cat([edges(dtype, torch.tensor([step]), 2) for step in (least, 0.3)] * 8)
    x = x.nan_to_num(0.0).reshape(-1, 1).expand(-1, 4).contiguous()

    def function(x, other, weight, alpha, factor):
        y = cg.qrelu(x - other, alpha, 2, ste="clipped_relu", rounding="nearest")
        return (y @ weight).sum() * factor + torch.cos(other).sum() + torch.sin(x).sum()

    results, codes = {}, []
    for block in (contextlib.nullcontext, cg.packed_activations):
        torch._dynamo.reset()
        run = torch.compile(function, fullgraph=True)
        for alpha in (least, 0.3):
            constants = torch.tensor([alpha]), torch.tensor(min(1 / alpha, 2.0**100))
            of = x.clone().requires_grad_(), torch.zeros_like(x).requires_grad_()
            weight = torch.eye(4, dtype=dtype).requires_grad_()
            with block():
                _, _, code = step(run, *of, weight, *constants, graphs=2 if alpha == least else 0)
            results.setdefault(alpha, []).append(weight.grad)
            codes.append(code)
    plain, _, packed, _ = codes
    assert "coarsegrad.qrelu_codes" in packed and "coarsegrad.dequantize" in packed and calls(plain) == 0
    for some in results.values():
        assert torch.equal(*some) and some[0].isfinite().all() and some[0].count_nonzero()


def edges(dtype, alpha, bits):
    """Both ends of what passes, with their neighbours, and what is special."""
    infinity = torch.tensor(float("inf"), dtype=dtype)
    numbers = torch.cat([torch.zeros(1, dtype=dtype), alpha.to(dtype).flatten() * (2**bits - 1)])
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, -1e-45], dtype=dtype)
    return torch.cat([numbers, numbers.nextafter(infinity), numbers.nextafter(-infinity), special])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_that_of_the_op_at_both_ends(dtype):
    """x is a difference of tensors that the backward reads for something else, so that it is found again."""
    bits = (1, 2, 4) if dtype == torch.float32 else (2,)
    settings = list(itertools.product(("relu", "clipped_relu"), bits, (None, 1, -2)))
    alphas = [torch.tensor([0.3] if dim is None else [0.3, 0.1, 1e-3]) for _, _, dim in settings]

    def inputs():
        for (_, bits, _), alpha in zip(settings, alphas):
            some = edges(dtype, alpha, bits)
            x = some.expand(2, 3, -1).clone().requires_grad_()
            yield x, torch.zeros_like(x).requires_grad_()

    def function(pairs):
        total = 0
        for (ste, bits, dim), alpha, (x, other) in zip(settings, alphas, pairs):
            y = cg.qrelu(x - other, alpha, bits, ste=ste, rounding="nearest", channel_dim=dim)
            total = total + (y * torch.cos(x) * torch.cos(other)).nan_to_num(0.0, 0.0, 0.0).sum()
        return total

    compiled, eager = list(inputs()), list(inputs())
    _, saved, code = step(torch.compile(function, fullgraph=True), compiled)
    assert calls(code) == 0 and not any(t.dtype == torch.uint8 for t in saved)
    function(eager).square().sum().backward()
    for setting, (_, got), (_, want) in zip(settings, compiled, eager):
        closed = got.grad == 0
        assert torch.equal(closed, want.grad == 0), setting
        assert closed.any() and not closed.all()


def test_the_backward_stores_no_more_than_that_of_relu():
    """Inductor counts alpha as one more tensor that is read, and may store the gradient because of it."""
    stored = []
    for activation in nn.ReLU(), cg.QReLU(2, alpha=0.5):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C, affine=False), activation, nn.MaxPool2d(2)
        code = written(nn.Sequential(*layers), torch.randn(16, 3, 8, 8))
        assert calls(code) == 0
        shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
        stored.append(sum(math.prod(map(int, shape.strip(", ").split(", "))) >= 16 * C * 64 for shape in shapes))
    assert stored[0] == stored[1] > 1


def small(norm=True, **settings):
    torch.manual_seed(0)
    activation = cg.QReLU(**{"bits": 2, "alpha": 0.5, "ste": "clipped_relu", **settings})
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64) if norm else nn.Identity(), activation, nn.Linear(64, 4))


KEPT = {
    "its input is not saved by what made it": {"norm": False},
    "more levels than Inductor gets": {"bits": 5},
    "a learned alpha": {"learn_alpha": True},
    "a slope that needs x": {"ste": "reverse_exponential"},
}


@pytest.mark.parametrize("why", KEPT)
def test_what_stays_a_call(why):
    assert "coarsegrad.qrelu_backward" in written(small(**KEPT[why]), torch.randn(256, 64))


def test_bfloat16_stays_a_call():
    code = written(small().bfloat16(), torch.randn(256, 64, dtype=torch.bfloat16))
    assert "coarsegrad.qrelu_backward" in code


def test_a_pass_of_the_users_own_still_runs():
    seen = []
    with torch._inductor.config.patch(joint_custom_post_pass=lambda graph: seen.append(graph)):
        code = written(small(), torch.randn(256, 64))
    assert seen and calls(code) == 0


def test_any_batch_size():
    model = small()
    called = copy.deepcopy(model)
    run = torch.compile(model, fullgraph=True, dynamic=True)
    for size, graphs in ((4, 2), (6, 0)):
        x = torch.randn(size, 64)
        y, saved, code = step(run, x, graphs=graphs)
        assert calls(code) == 0 and not any(t.dtype in (torch.bool, torch.uint8) for t in saved)
        called(x).square().sum().backward()
    for p, q in zip(model.parameters(), called.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)
