"""Chains of Linears that `qrelu_mlp` and `qrelu_gated_mlp` compute as one op, and the same layer by layer."""

from __future__ import annotations

import torch
from torch import nn

import coarsegrad as cg

HIDDEN = 40
SIZES = (24, HIDDEN, 8)  # inputs, hidden, outputs
GATES = ("identity", "relu", "clipped_relu", "trust")  # STEs of which a bit is kept, or less


def chain(bits=2, dtype=torch.float32, bias=True, sizes=SIZES, **settings):
    torch.manual_seed(0)
    inputs, hidden, outputs = sizes
    first, layer = nn.Linear(inputs, hidden, bias, dtype=dtype), nn.Linear(hidden, outputs, bias, dtype=dtype)
    return cg.nn.QReLUMLP(first, cg.QReLU(bits, **{"alpha": 0.2, **settings}).to(dtype), layer)


def gated(bits=2, dtype=torch.float32, bias=True, sizes=SIZES, other=None, alpha=0.2, **settings):
    """other: the settings of the second staircase, if they are not those of the first."""
    torch.manual_seed(0)
    inputs, hidden, outputs = sizes
    gate, up, down = (nn.Linear(*s, bias, dtype=dtype) for s in (2 * [(inputs, hidden)] + [(hidden, outputs)]))
    both = {"bits": bits, **settings}, {"bits": bits, **settings} if other is None else other
    first, second = (cg.QReLU(alpha=a, **own).to(dtype) for a, own in zip((alpha, 1.5 * alpha), both))
    return cg.nn.QReLUGatedMLP(gate, first, up, second, down)


def apart(model, x):
    if isinstance(model, cg.nn.QReLUMLP):
        return model.layer(model.activation(model.first(x)))
    factors = model.gate_activation(model.gate(x)), model.up_activation(model.up(x))
    return model.down(cg.gated_product(*factors, "identity"))


def alphas(model):
    return [module.alpha for module in model.modules() if isinstance(module, cg.QReLU)]


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(out, x, model):
    leaves = [t for t in (x, *model.parameters()) if t.requires_grad]
    return torch.autograd.grad(out.float().square().sum(), leaves)


def assert_same(model, x, call=None):
    out, want = (model if call is None else call)(x), apart(model, x)
    assert torch.equal(out, want)
    for got, right in zip(gradients(out, x, model), gradients(want, x, model), strict=True):
        assert torch.equal(got, right)
