"""Blended coarse gradient descent: the formula, any optimizer, skipped steps, copies, and that it descends."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import coarsegrad as cg

BITS = (8, 4, 2, 1)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def quantized(bits=2, **keywords):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    cg.quantize_(model, 4, weight_bits=bits, **keywords)
    return model


def floats(model):
    return [m.original for m in model.modules() if isinstance(m, parametrize.ParametrizationList)]


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@torch.no_grad()
def blend_by_hand(model, bits, rho):
    for w in floats(model):
        w.copy_(torch.lerp(w, cg.qweight(w, bits), rho))


def test_the_formula_bit_for_bit():
    """Of numbers with few digits, so that nothing is rounded."""
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1, 0.5, -0.25, -0.25], [2, 2, -2, 0]]))
    cg.quantize_(layer, None, weight_bits=1)
    bias = layer.bias.detach().clone()
    optimizer = cg.blended(torch.optim.SGD(layer.parameters(), lr=0.5), layer, rho=0.25)
    (w,) = floats(layer)
    w.grad = torch.tensor([[0.5, 0, -1, 1], [0, 0, 1, 1]])
    layer.bias.grad = torch.ones(2)
    optimizer.step()
    q = torch.tensor([[0.5, 0.5, -0.5, -0.5], [1.5, 1.5, -1.5, 1.5]])
    want = 0.75 * torch.tensor([[1, 0.5, -0.25, -0.25], [2, 2, -2, 0]]) + 0.25 * q - 0.5 * w.grad
    assert torch.equal(w, want)
    assert torch.equal(layer.bias, bias - 0.5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizer_steps_from_the_blended_weight(kind, bits):
    model = quantized(bits)
    plain = copy.deepcopy(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    assert cg.blended(optimizer, model, rho=0.01) is optimizer
    by_hand = OPTIMIZERS[kind](plain.parameters())
    for step in range(5):
        for m in (model, plain):
            fill_gradients(m, step)
        blend_by_hand(plain, bits, 0.01)
        optimizer.step()
        by_hand.step()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


@pytest.mark.parametrize("bits", [2, 1])
def test_a_blend_leaves_the_quantized_weight(bits):
    """The projection of a point between w and its projection is that projection."""
    w = torch.randn(32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    q, codes = cg.qweight(w, bits), cg.weight_codes(w, bits)[0]
    for rho in (1e-5, 0.25):
        again = torch.lerp(w, q, rho)
        assert torch.equal(cg.weight_codes(again, bits)[0], codes)
        torch.testing.assert_close(cg.qweight(again, bits), q)


def test_no_blend_is_the_plain_step():
    models = [quantized(), quantized()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    cg.blended(optimizers[0], models[0], rho=0)
    for model, optimizer in zip(models, optimizers):
        fill_gradients(model, 0)
        optimizer.step()
    assert all(map(torch.equal, *(m.parameters() for m in models)))


def test_what_the_step_does_not_update_is_not_blended():
    model = quantized()
    first, second = floats(model)
    optimizer = cg.blended(torch.optim.SGD([second, model[0].bias], lr=0.1), model, rho=0.5)
    fill_gradients(model, 0)
    before = [w.detach().clone() for w in (first, second)]
    second.grad = None
    optimizer.step()
    assert torch.equal(first, before[0]) and torch.equal(second, before[1])
    second.grad = torch.zeros_like(second)
    optimizer.step()
    assert torch.equal(first, before[0]) and torch.equal(second, torch.lerp(before[1], cg.qweight(before[1], 2), 0.5))
    optimizer.add_param_group({"params": [first]})
    optimizer.step()
    assert not torch.equal(first, before[0])


def test_a_closure_sees_the_blended_weight():
    model, x = quantized(8), torch.randn(16, 8)
    optimizer = cg.blended(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3), model, rho=0.25)
    wanted = [torch.lerp(w, cg.qweight(w, 8), 0.25).detach() for w in floats(model)]
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append([w.detach().clone() for w in floats(model)])
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(seen) > 1 and all(map(torch.equal, seen[0], wanted))
    before = [w.detach().clone() for w in floats(model)]
    optimizer.step(closure=closure)
    assert not any(map(torch.equal, floats(model), before))


def test_layers_that_share_a_weight_blend_it_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    cg.quantize_(model, None, weight_bits=2)
    optimizer = cg.blended(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5)
    w = floats(model)[0]
    want = torch.lerp(w, cg.qweight(w, 2), 0.5).detach()
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert torch.equal(w, want)


@pytest.mark.parametrize("dim", [None, 1])
def test_scales_of_other_dimensions(dim):
    layer = nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", cg.QWeight(4, dim))
    optimizer = cg.blended(torch.optim.SGD(layer.parameters(), lr=0.1), layer, rho=0.5)
    w = floats(layer)[0]
    want = torch.lerp(w, cg.qweight(w, 4, channel_dim=dim), 0.5).detach()
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert torch.equal(w, want)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_blends_nothing(fused):
    model, x = quantized(), torch.randn(16, 8)
    optimizer = cg.blended(torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused), model, rho=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, moves in ((1.0, True), (math.inf, False), (1.0, True)):
        plain = copy.deepcopy(model)
        other = copy.deepcopy(optimizer.state_dict())
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if moves:
            by_hand = torch.optim.AdamW(plain.parameters(), lr=0.01, fused=fused)
            by_hand.load_state_dict(other)
            plain.zero_grad()
            plain(x).square().mean().backward()
            blend_by_hand(plain, 2, 0.25)
            by_hand.step()
        assert all(map(torch.equal, model.parameters(), plain.parameters()))


# --------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("order", [0, 1])
def test_copies_keep_it_and_the_bounds_of_alphas(order):
    model = quantized(learn_alpha=True)
    optimizer = torch.optim.SGD(cg.param_groups(model, 0.1), momentum=0.9)
    for add in [cg.blended, cg.keep_positive][:: 1 - 2 * order]:
        add(optimizer, model)
    for _ in range(2):  # a copy's copy too
        model, optimizer = copy.deepcopy((model, optimizer))
        alpha = model[1].alpha
        before, half = [w.detach().clone() for w in floats(model)], alpha.detach() / 2
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        alpha.grad.fill_(1e6)
        optimizer.step()
        assert torch.equal(alpha, half)
        for w, old in zip(floats(model), before):
            assert torch.equal(w, torch.lerp(old, cg.qweight(old, 2), 1e-5)) and not torch.equal(w, old)


def test_an_optimizer_alone_can_be_pickled():
    model = quantized()
    optimizer = cg.blended(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5)
    saved = io.BytesIO()
    torch.save(optimizer, saved)
    saved.seek(0)
    for other in (pickle.loads(pickle.dumps(optimizer)), torch.load(saved, weights_only=False)):
        copies = [p for group in other.param_groups for p in group["params"]]
        by_shape = {p.shape: p for p in copies}
        for p in copies:
            p.grad = torch.zeros_like(p)
        other.step()
        for w in floats(model):
            assert torch.equal(by_shape[w.shape], torch.lerp(w, cg.qweight(w, 2), 0.5))


def test_its_state_is_the_optimizers():
    model = quantized()
    optimizer = cg.blended(torch.optim.SGD(model.parameters(), lr=0.1), model)
    plain = torch.optim.SGD(quantized().parameters(), lr=0.1)
    assert optimizer.state_dict() == plain.state_dict()


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [-1e-5, 1.5, math.nan, math.inf, "0.1", True, None])
def test_bad_rho(bad):
    model = quantized()
    with pytest.raises((TypeError, ValueError), match="rho must be a number from 0 to 1, got"):
        cg.blended(torch.optim.SGD(model.parameters(), lr=0.1), model, bad)


def test_twice_and_swapped():
    model = nn.Sequential(nn.Linear(3, 3))
    cg.quantize_(model, bits=None, weight_bits=2)
    optimizer = cg.blended(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="optimizer must blend a weight once"):
        cg.blended(optimizer, model)
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got Sequential"):
        cg.blended(model, optimizer)
    with pytest.raises(TypeError, match="model must be an nn.Module, got list"):
        cg.blended(optimizer, [model])


def test_models_without_quantized_weights_and_other_optimizers():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="model must have a QWeight"):
        cg.blended(torch.optim.SGD(model.parameters(), lr=0.1), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer must hold a weight of model"):
        cg.blended(optimizer, quantized())
    both = quantized()
    parametrize.register_parametrization(both[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match="0.weight must have a QWeight as its only parametrization, got 2"):
        cg.blended(torch.optim.SGD(both.parameters(), lr=0.1), both)


# ------------------------------------------------------------------------------------------- descent


@pytest.mark.parametrize("rho", [0, 1e-5])
@pytest.mark.parametrize("bits", [2, 1])
def test_the_loss_does_not_grow_in_the_mean(bits, rho):
    """Of a student with quantized weights and activations that learns a teacher of its kind, at a small rate."""
    torch.manual_seed(bits)
    x = torch.randn(256, 16)
    models = [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)) for _ in range(2)]
    for model in models:
        cg.quantize_(model, 4, weight_bits=bits)
        cg.calibrate(model, [x], progress=False)
    teacher, student = models
    y = teacher(x).detach()
    optimizer = cg.blended(torch.optim.SGD(student.parameters(), lr=0.003), student, rho)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (student(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    means = torch.tensor(losses).view(5, 40).mean(1)
    assert (means[1:] < means[:-1]).all() and means[-1] < 0.9 * means[0], means
