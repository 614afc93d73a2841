"""Learned alphas in an optimizer: their group, their sign, their gradient's scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import coarsegrad as cg


def _model(**keywords) -> nn.Sequential:
    torch.manual_seed(0)
    keywords = {"learn_alpha": True} | keywords
    return nn.Sequential(nn.Linear(4, 4), cg.QReLU(2, **keywords), nn.Linear(4, 4), cg.QReLU(2, **keywords))


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
        with pytest.raises(ValueError, match="alpha"):
            model(torch.randn(3, 4))


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
