"""A Linear, a QReLU and a Linear on a GPU, where Triton's matrix products write and read codes. What needs no GPU to be
checked runs on the CPU too, by the layers one after the other."""

from __future__ import annotations

import pytest
import torch
from gpu_backends import any_device, gpu
from saved_bytes import Kept
from torch import nn

import coarsegrad as cg
from coarsegrad._types import MaskKind, Rounding

ROWS, INPUTS, HIDDEN, OUTPUTS = 300, 520, 1096, 264
HALVES = (torch.bfloat16, torch.float16)


def far(got, want):
    """The relative difference in the 2-norm."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def chain(device, dtype, bits=4, **settings):
    torch.manual_seed(0)
    first, layer = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)
    model = cg.nn.QReLUMLP(first, cg.QReLU(bits, alpha=0.05, **settings), layer).to(device, dtype)
    return model, torch.randn(3, ROWS // 3, INPUTS).to(device, dtype).requires_grad_()


def gated(device, dtype, bits=4, **settings):
    torch.manual_seed(0)
    gate, up, down = (nn.Linear(*size) for size in ((INPUTS, HIDDEN), (INPUTS, HIDDEN), (HIDDEN, OUTPUTS)))
    first, second = (cg.QReLU(bits, alpha=alpha, **settings) for alpha in (0.05, 0.03))
    model = cg.nn.QReLUGatedMLP(gate, first, up, second, down).to(device, dtype)
    return model, torch.randn(3, ROWS // 3, INPUTS).to(device, dtype).requires_grad_()


def gradients(out, model, x):
    return torch.autograd.grad(out.float().square().sum(), [x, *model.parameters()])


@any_device
@pytest.mark.parametrize("ste, rounding", [("relu", "ceil"), ("clipped_relu", "nearest"), ("trust", "hwgq")])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_are_near_and_codes_alone_are_kept(device, dtype, squared, ste, rounding):
    model, x = chain(device, dtype, ste=ste, rounding=rounding, squared=squared)
    with Kept(x, *model.parameters(), model.activation.alpha) as kept:
        out = model(x)
    want = model.layer(model.activation(model.first(x)))
    assert kept.bytes == ROWS * HIDDEN * (4 + (ste != "relu")) // 8
    assert far(out, want) < 1e-2
    for got, right in zip(gradients(out, model, x), gradients(want, model, x), strict=True):
        assert far(got, right) < 2e-2  # a code next to a threshold is another one, by the order of a sum


@any_device
@pytest.mark.parametrize("ste, rounding", [("relu", "ceil"), ("clipped_relu", "nearest"), ("trust", "hwgq")])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gated_gradients_are_near_and_codes_alone_are_kept(device, dtype, ste, rounding):
    model, x = gated(device, dtype, ste=ste, rounding=rounding)
    with Kept(x, *model.parameters(), model.gate_activation.alpha, model.up_activation.alpha) as kept:
        out = model(x)
    factors = model.gate_activation(model.gate(x)), model.up_activation(model.up(x))
    want = model.down(cg.gated_product(*factors, "identity"))
    assert kept.bytes == 2 * ROWS * HIDDEN * (4 + (ste != "relu")) // 8
    assert far(out, want) < 1e-2
    for got, right in zip(gradients(out, model, x), gradients(want, model, x), strict=True):
        assert far(got, right) < 2e-2


@gpu
@pytest.mark.parametrize("bits", (1, 2, 4, 8))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_codes_are_those_of_the_kernels_own_h(device, dtype, bits):
    from coarsegrad.triton import mlp

    model, x = chain(device, dtype)
    x, first, alpha = x.detach().flatten(0, 1), model.first, model.activation.alpha
    h = x.new_empty(ROWS, HIDDEN)
    for rounding, mask in ((Rounding.ceil, MaskKind.inside), (Rounding.nearest, MaskKind.positive)):
        options = (bits, rounding.value, mask.value)
        made = mlp.linear_to_codes(x, first.weight.detach(), first.bias.detach(), alpha, *options, h)
        _, want_mask, want = torch.ops.coarsegrad.qrelu_forward(h, alpha, *options, True, None)
        assert torch.equal(made[0], want) and torch.equal(made[1], want_mask)
        assert far(h, nn.functional.linear(x.double(), first.weight.double(), first.bias.double())) < 4e-3


@gpu
@pytest.mark.parametrize("build", [chain, gated])
def test_two_runs_and_a_compiled_one_give_the_same_bits(device, build):
    model, x = build(device, torch.bfloat16)
    out = model(x)
    grads = gradients(out, model, x)
    for call in (model, torch.compile(model, fullgraph=True)):
        again = call(x)
        assert torch.equal(again, out)
        assert all(map(torch.equal, gradients(again, model, x), grads))


@any_device
@pytest.mark.parametrize("build", [chain, gated])
def test_nan_makes_its_row_nan(device, build):
    model, x = build(device, torch.bfloat16)
    x = x.detach()
    x[1, 7, 3] = torch.nan
    assert model(x).isnan().all(-1).nonzero().tolist() == [[1, 7]] and model(x).isnan().sum() == OUTPUTS
