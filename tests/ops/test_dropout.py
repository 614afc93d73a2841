"""`QReLU(dropout=p)` by itself: what it computes and keeps, at infinities and on nothing, and in graphs of it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import coarsegrad as cg

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
SETTINGS = {
    "plain": {},
    "relu": {"ste": "relu"},
    "learned": {"learn_alpha": True, "alpha_grad": "exact"},
    "x kept": {"ste": "reverse_exponential", "learn_alpha": True, "alpha_grad": "chain"},
    "squared": {"squared": True},
    "inplace": {"inplace": True},
    "channels": {"num_channels": 16, "learn_alpha": True},
}


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


def network(settings, p=0.25):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), cg.QReLU(2, dropout=p, **settings), nn.Linear(16, 4))


def results(run, parameters):
    """The output and all gradients, by name."""
    parameters, x = dict(parameters), X.clone().requires_grad_()
    torch.manual_seed(1)
    y = run(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *parameters.values()])
    return {"y": y.detach(), "x": gradients[0], **dict(zip(parameters, gradients[1:]))}


def same(got, want):
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_infinities_are_selected(reference_or_native, dtype):
    """The bits of a dropout after the activation, for a p whose quotients are exact."""
    x = torch.tensor([-math.inf, math.inf, -1.0, 0.0, 0.3, 1.0, 50.0, 1e-7]).repeat(32).to(dtype)
    torch.manual_seed(0)
    got = cg.QReLU(2, dropout=0.5)(x)
    torch.manual_seed(0)
    want = F.dropout(cg.QReLU(2)(x), 0.5)
    assert torch.equal(got, want) and not got.isnan().any()
    assert not got.signbit().any(), "no -0.0"
    assert 0 < (want[1::8] == 0).sum() < 32


@pytest.mark.parametrize("layout", ["transposed", "channels last", "every other"])
def test_any_layout(layout):
    x = torch.randn(4, 6, 5, 8, generator=torch.Generator().manual_seed(0))
    x = {
        "transposed": lambda: x.transpose(0, 3),
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "every other": lambda: x[..., ::2],
    }[layout]()
    torch.manual_seed(0)
    got = cg.QReLU(2, dropout=0.5)(x)
    torch.manual_seed(0)
    want = F.dropout(cg.QReLU(2)(x), 0.5)
    assert torch.equal(got, want)


def test_nan_is_nan_where_it_is_not_dropped():
    torch.manual_seed(0)
    y = cg.QReLU(2, dropout=0.5)(torch.full((1000,), math.nan))
    torch.manual_seed(0)
    assert torch.equal(y.isnan(), F.dropout(torch.ones(1000), 0.5) != 0) and (y[~y.isnan()] == 0).all()


def test_an_infinite_input_has_the_gradient_of_its_code():
    x = torch.tensor([-math.inf, math.inf]).repeat(500).requires_grad_()
    torch.manual_seed(0)
    y = cg.QReLU(2, ste="relu", dropout=0.5)(x)
    y.sum().backward()
    assert torch.equal(x.grad, 2.0 * (y > 0))


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_gradients_are_those_of_a_dropout_after_it(settings, p):
    mine = network(settings, p)
    apart = nn.Sequential(mine[0], copy.deepcopy(mine[1]), nn.Dropout(p), mine[2])
    apart[1].dropout = 0.0
    got, want = results(mine, mine.named_parameters()), results(apart, apart.named_parameters())
    for mine_now, apart_now in zip(got.values(), want.values()):
        if p == 0.5 and not settings.get("squared"):
            assert torch.equal(mine_now, apart_now)
        else:
            torch.testing.assert_close(mine_now, apart_now, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_for_it():
    x = torch.randn(1000, requires_grad=True)
    for ste, bits in (("relu", 1), ("clipped_relu", 1)):
        layer = cg.QReLU(2, ste=ste, dropout=0.25)
        assert cg.saved_memory(lambda: layer(x).sum()).total == 1000 * bits // 8


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0), (0, 3, 2, 2)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ste", ["relu", "clipped_relu", "log_tailed_relu", "reverse_exponential_step"])
def test_no_elements(reference_or_native, ste, packed, shape):
    """What an expert that gets no token does, with every option."""
    for options in (
        {}, {"dropout": 0.1}, {"squared": True}, {"dropout": 0.1, "squared": True}, {"learn_alpha": True},
        {"learn_alpha": True, "alpha_scale": "lsq", "dropout": 0.1}, {"learn_alpha": True, "alpha_grad": "exact"},
        {"learn_alpha": True, "alpha_grad": "chain"},
        {"learn_alpha": True, "num_channels": shape[-1], "channel_dim": -1, "dropout": 0.1} if shape[-1] else {},
        {"inplace": True, "dropout": 0.1} if ste in ("relu", "clipped_relu") else {},
    ):  # fmt: skip
        layer, x = cg.QReLU(2, ste=ste, **options), torch.empty(shape).requires_grad_()
        with cg.packed_activations() if packed else torch.enable_grad():
            y = layer(x * 1)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
        if options.get("learn_alpha"):
            assert torch.equal(layer.alpha.grad, torch.zeros_like(layer.alpha))


def test_no_rows_for_the_fused_layers():
    for p in (0.0, 0.1):
        for fused, shape, out in (
            (cg.nn.QReLULinear(cg.QReLU(2, dropout=p), nn.Linear(8, 4)), (0, 8), (0, 4)),
            (cg.nn.QReLUConv2d(cg.QReLU(2, dropout=p), nn.Conv2d(8, 4, 3)), (0, 8, 5, 5), (0, 4, 3, 3)),
        ):
            x = torch.empty(shape).requires_grad_()
            y = fused(x)
            y.sum().backward()
            assert y.shape == out and x.grad.shape == shape


# ----------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_trains(settings, strict):
    mine = network(settings)
    want = results(mine, mine.named_parameters())
    program = torch.export.export(mine, (X,), strict=strict).module()
    assert same(results(program, program.named_parameters()), want)


def test_compiled_it_is_the_same(settings):
    mine = network(settings)
    want = results(mine, mine.named_parameters())
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    assert same(results(compiled, mine.named_parameters()), want)


def test_a_symbolic_trace_is_the_same_and_follows_alpha(settings):
    mine = network(settings)
    traced = torch.fx.symbolic_trace(mine)
    for alpha in (0.5, 0.1):
        mine[1].alpha.data.fill_(alpha)
        assert same(results(traced, mine.named_parameters()), results(mine, mine.named_parameters()))
