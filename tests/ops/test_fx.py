"""torch.fx and other overrides: a call is recorded as one node, and reaches who has a `__torch_function__`."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

import coarsegrad as cg


class Calls(nn.Module):
    """One of the public functions, as a module."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.alpha = nn.Parameter(torch.tensor([0.3]))
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return self.call(self, x)


def fused(squared):
    torch.manual_seed(0)
    return cg.nn.QReLULinear(cg.QReLU(2, squared=squared), nn.Linear(8, 4))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
MODULES = {
    "QReLU": lambda: cg.QReLU(2),
    "learned": lambda: cg.QReLU(2, learn_alpha=True),
    "lsq": lambda: cg.QReLU(2, learn_alpha=True, alpha_scale="lsq"),
    "squared": lambda: cg.QReLU(2, squared=True),
    "channels": lambda: cg.QReLU(2, num_channels=8),
    "QReLULinear": lambda: fused(False),
    "QReLULinear, squared": lambda: fused(True),
    "QReLUConv2d": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), cg.nn.QReLUConv2d(cg.QReLU(2), nn.Conv2d(2, 3, 1))
    ),
    "qrelu, number": lambda: Calls(lambda self, x: cg.qrelu(x, 0.3, 2)),
    "qrelu, words": lambda: Calls(
        lambda self, x: cg.qrelu(x, alpha=self.alpha, bits=2, ste="relu", rounding="nearest", alpha_scale="lsq")
    ),
    "qrelu, fixed x": lambda: Calls(lambda self, x: cg.qrelu(torch.ones(8), self.alpha) * x),
    "qrelu_linear": lambda: Calls(lambda self, x: cg.qrelu_linear(x, self.alpha, self.weight)),
    "codes and back": lambda: Calls(
        lambda self, x: cg.dequantize(cg.qrelu_codes(x, 0.3, 2), alpha=0.3, bits=2, shape=(5, 8), dtype=torch.float32)
    ),
}


def run(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.sum(), [x, *parameters], allow_unused=True) if y.requires_grad else ()
    return y, [g for g in grads if g is not None]


@pytest.mark.parametrize("name", MODULES)
def test_symbolic_trace(reference_or_native, name):
    torch.manual_seed(0)
    model = nn.Sequential(MODULES[name]())
    traced = fx.symbolic_trace(model)
    (y, grads), (want, wanted) = run(traced, X), run(model, X)
    assert torch.equal(y, want) and len(grads) == len(wanted) and all(map(torch.equal, grads, wanted))
    ours = [n.target.__name__ for n in traced.graph.nodes if getattr(n.target, "__module__", "") == cg.qrelu.__module__]
    assert ours == {
        "QReLULinear": ["qrelu_linear"],
        "QReLUConv2d": ["qrelu_conv2d"],
        "qrelu_linear": ["qrelu_linear"],
        "codes and back": ["qrelu_codes", "dequantize"],
    }.get(name, ["qrelu"])
    again = pickle.loads(pickle.dumps(traced))
    assert torch.equal(again(X), want)


@pytest.mark.parametrize("learn_alpha", [False, True])
def test_the_graph_has_alpha_itself(learn_alpha):
    model = nn.Sequential(cg.QReLU(2, learn_alpha=learn_alpha))
    traced = fx.symbolic_trace(model)
    with torch.no_grad():
        model[0].alpha.fill_(0.1)
    assert torch.equal(traced(X), cg.qrelu(X, 0.1, 2))


def test_inside_of_a_packing():
    with cg.packed_activations():
        traced = fx.symbolic_trace(nn.Sequential(cg.QReLU(2, alpha=0.3, squared=True)))
    assert torch.equal(traced(X), cg.qrelu(X, 0.3, 2).square())


class Named(torch.Tensor):
    pass


def test_a_subclass_stays_one():
    y = cg.qrelu(X.as_subclass(Named), 0.3, 2)
    assert type(y) is Named and torch.equal(y.as_subclass(torch.Tensor), cg.qrelu(X, 0.3, 2))
    assert type(cg.qrelu_linear(X.as_subclass(Named), 0.3, torch.randn(4, 8))) is Named


def test_a_function_mode_sees_the_call():
    class See(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen = []
    with See():
        y = cg.qrelu(X, 0.3, 2, rounding="nearest")
        codes = cg.qrelu_codes(X, 0.3, 2, rounding="nearest")
    assert seen == [cg.qrelu, cg.qrelu_codes]
    assert torch.equal(y, cg.dequantize(codes, 0.3, 2, X.shape, X.dtype))
