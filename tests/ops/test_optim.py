"""Learned alphas in an optimizer: their group, their sign, their gradient's scale."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import coarsegrad as cg


def _model(**keywords) -> nn.Sequential:
    torch.manual_seed(0)
    keywords = {"learn_alpha": True} | keywords
    return nn.Sequential(nn.Linear(4, 4), cg.QReLU(2, **keywords), nn.Linear(4, 4), cg.QReLU(2, **keywords))


class Exp(nn.Module):
    """A parametrization by the logarithm."""

    def forward(self, log):
        return log.exp()

    def right_inverse(self, value):
        return value.log()


def _parametrized(**keywords) -> nn.Sequential:
    model = _model(**keywords)
    for layer in (model[1], model[3]):
        parametrize.register_parametrization(layer, "alpha", Exp())
    return model


class TestParamGroups:
    def test_alphas_are_apart_without_decay(self):
        model = _model()
        model[2].bias.requires_grad_(False)
        others, alphas = cg.param_groups(model, 1e-3, 0.1, alpha_lr=1e-4)
        assert (others["lr"], others["weight_decay"]) == (1e-3, 0.1)
        assert (alphas["lr"], alphas["weight_decay"]) == (1e-4, 0.0)
        assert [id(p) for p in alphas["params"]] == [id(model[1].alpha), id(model[3].alpha)]
        assert [id(p) for p in others["params"]] == [id(p) for p in (model[0].weight, model[0].bias, model[2].weight)]

    def test_a_decay_does_not_move_them(self):
        model = _model()
        optimizer = torch.optim.AdamW(cg.param_groups(model, 0.1, 0.5))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        before = [p.clone() for p in model.parameters()]
        optimizer.step()
        moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before)]
        assert moved == [True, True, False, True, True, False]

    def test_one_group_without_learned_alphas_and_each_alpha_once(self):
        assert len(cg.param_groups(_model(learn_alpha=False), 0.1)) == 1
        layer = cg.QReLU(learn_alpha=True)
        groups = cg.param_groups(nn.Sequential(layer, nn.Sequential(layer)), 0.1)
        assert [len(group["params"]) for group in groups] == [0, 1]
        assert groups[1]["lr"] == 0.1

    def test_what_a_parametrized_alpha_is_computed_from_is_with_the_alphas(self):
        model = _parametrized()
        others, alphas = cg.param_groups(model, 0.1, 0.5)
        originals = [layer.parametrizations.alpha.original for layer in (model[1], model[3])]
        assert list(map(id, alphas["params"])) == list(map(id, originals))
        assert len(others["params"]) == 4
        assert len(cg.param_groups(_parametrized(learn_alpha=False), 0.1)) == 1

    def test_the_logarithm_of_alpha_learns(self):
        """Without a bound alpha stays positive; its steps are relative."""
        model, x = _parametrized(alpha=0.25, alpha_scale="lsq"), torch.randn(64, 4)
        optimizer = torch.optim.SGD(cg.param_groups(model, 0.1, alpha_lr=1.0))
        target, losses = x.relu() + 1, []
        before = model[1].alpha.item()
        for _ in range(30):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            gradient = model[1].parametrizations.alpha.original.grad
            assert gradient.isfinite().all() and gradient != 0
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0] and model[1].alpha.item() not in (before, 0.0)


class TestKeepPositive:
    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
    def test_a_step_at_most_halves(self, kind):
        model = _model(num_channels=4)
        optimizer = kind(cg.param_groups(model, 10.0))
        assert cg.keep_positive(optimizer, model) is optimizer
        for _ in range(20):
            before = model[1].alpha.detach().clone()
            model[1].alpha.grad = torch.tensor([1.0, -1.0, 1e-6, 0.0])
            optimizer.step()
            after = model[1].alpha.detach()
            assert (after > 0).all() and (after >= before / 2).all()
        assert after[0] == pytest.approx(cg.nn.half_gaussian_alpha(2) * 2.0**-20) and after[1] > 100
        model(torch.randn(3, 4)).sum().backward()

    def test_without_it_alpha_gets_negative(self):
        model = _model()
        optimizer = torch.optim.SGD(cg.param_groups(model, 10.0))
        model[1].alpha.grad = torch.ones(1)
        optimizer.step()
        for packed in (False, True):
            with pytest.raises(ValueError, match="alpha must be finite and > 0 .*keep_positive"):
                with cg.packed_activations() if packed else torch.no_grad():
                    model(torch.randn(3, 4))
        fixed = cg.QReLU(2)
        fixed.alpha.fill_(-1)
        with pytest.raises(ValueError, match="got -1.0$"):
            fixed(torch.randn(3))

    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
    @pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
    def test_copies_keep_it(self, kind, how):
        model = _model()
        optimizer = cg.keep_positive(kind(cg.param_groups(model, 1e3)), model)
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        for _ in range(2):  # a copy's copy too
            model, optimizer = how((model, optimizer))
            before = [model[i].alpha.item() for i in (1, 3)]
            for alpha in (model[1].alpha, model[3].alpha):
                alpha.grad = torch.full_like(alpha, 1e6)
            optimizer.step()
            optimizer.step()
            assert [model[i].alpha.item() for i in (1, 3)] == [alpha / 4 for alpha in before]

    def test_an_optimizer_copied_alone_bounds_its_own(self):
        model = _model()
        optimizer = cg.keep_positive(torch.optim.SGD(cg.param_groups(model, 1e3)), model)
        twin = copy.deepcopy(optimizer)
        mine, before = twin.param_groups[1]["params"][0], model[1].alpha.item()
        mine.grad = torch.ones(1)
        twin.step()
        assert mine.item() == before / 2 and model[1].alpha.item() == before

    def test_it_goes_on_after_load_state_dict_and_swap_tensors(self):
        model = _model()
        optimizer = cg.keep_positive(torch.optim.SGD(cg.param_groups(model, 1e3), momentum=0.9), model)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        torch.utils.swap_tensors(model[1].alpha, nn.Parameter(torch.tensor([8.0])))
        model[1].alpha.grad = torch.ones(1)
        optimizer.step()
        assert model[1].alpha.item() == 4

    def test_a_parametrized_alpha_is_bounded(self):
        model = _parametrized(num_channels=4)
        optimizer = cg.keep_positive(torch.optim.SGD(cg.param_groups(model, 1.0)), model)
        original = model[1].parametrizations.alpha.original
        before = model[1].alpha.detach().clone()
        original.grad = torch.tensor([1e6, -0.5, 0.0, 0.25])
        optimizer.step()
        factors = torch.tensor([0.5, math.exp(0.5), 1, math.exp(-0.25)])
        torch.testing.assert_close(model[1].alpha.detach(), before * factors)
        original.grad = torch.tensor([0.25, 0.0, 0.0, 0.0])
        log = original.detach().clone()
        optimizer.step()
        assert torch.equal(original.detach(), log - original.grad), "nothing is written where nothing is bounded"
        model(torch.randn(3, 4)).sum().backward()


class TestScale:
    def test_lsq_does_not_depend_on_the_batch_size(self):
        """Of a mean loss, whose gradient at an element is 1 / batch: alpha's is the same for any number of copies."""
        x, gradients = torch.randn(4, 4), []
        for copies in (1, 8):
            model = _model(alpha_scale="lsq")
            model(x.repeat(copies, 1)).sum(1).mean().backward()
            gradients.append(model[1].alpha.grad.clone())
        torch.testing.assert_close(*gradients)

    def test_it_is_the_factor_that_it_says(self):
        x, gradients = torch.randn(6, 4), {}
        for scale in (1.0, 0.25, "lsq"):
            model = _model(alpha_scale=scale)
            model(x).sum().backward()
            gradients[scale] = model[1].alpha.grad.clone()
        torch.testing.assert_close(gradients[0.25], gradients[1.0] / 4)
        torch.testing.assert_close(gradients["lsq"], gradients[1.0] / math.sqrt(4 * 3))
        assert "alpha_scale='lsq'" in repr(model)

    @pytest.mark.parametrize(("bad", "error"), [("all", TypeError), (math.nan, ValueError), (True, TypeError)])
    def test_bad_scales(self, bad, error):
        with pytest.raises(error, match="alpha_scale"):
            cg.QReLU(alpha_scale=bad)


def test_a_learned_alpha_of_a_signed_staircase():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), cg.QSigned(4, alpha=0.5, learn_alpha=True), cg.QSigned(4))
    groups = cg.param_groups(model, 0.1, 0.01, alpha_lr=10.0)
    assert [len(group["params"]) for group in groups] == [2, 1] and groups[1]["weight_decay"] == 0
    optimizer = cg.keep_positive(torch.optim.SGD(groups), model)
    model[1].alpha.grad = torch.tensor([1.0])
    optimizer.step()
    assert model[1].alpha.item() == 0.25
