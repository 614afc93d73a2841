"""calibrate and stats on many kinds of models and batches: repeated and fused layers, parametrized alphas, devices."""

from __future__ import annotations

import collections
import copy
import dataclasses
import math
import warnings

import accelerate
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import coarsegrad as cg


def _data(count: int = 20_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(3))


def _layer(**keywords) -> nn.Sequential:
    return nn.Sequential(cg.QReLU(2, **keywords))


class Repeats(nn.Module):
    """One QReLU for three layers, whose outputs are of the given scales."""

    def __init__(self, *scales: float) -> None:
        super().__init__()
        self.scales, self.act = scales, cg.QReLU(4)

    def forward(self, x):
        for scale in self.scales:
            x = self.act(scale * x)
        return x


class TestCallsInAForward:
    def test_ranges_that_differ_are_named(self):
        x = _data()
        with pytest.warns(
            UserWarning, match=r"act runs 3 times in a forward, with ranges that differ by a factor of 10\.0"
        ):
            report = cg.calibrate(Repeats(1.0, 5.0, 2.0), x.split(4000))
        [layer] = report.layers
        assert layer.calls == 3 and layer.spread == pytest.approx(10, rel=1e-6)
        assert "3      10" in str(report) and "calls" in str(report)

    @pytest.mark.parametrize("forward", [None, lambda model, x: [model(x) for _ in range(3)],
                                         lambda model, x: model.forward(x)])  # fmt: skip
    def test_forwards_are_told_apart(self, forward):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = cg.calibrate(Repeats(1.0, 1.5), [_data()] * 3, forward=forward)
        assert report.layers[0].calls == 2 and report.layers[0].spread == pytest.approx(1.5)
        once = cg.calibrate(Repeats(1.0), [_data()])
        assert once.layers[0].calls == 1 and once.layers[0].spread == 1 and "calls" not in str(once)

    def test_calls_that_only_some_forwards_have(self):
        class Loop(nn.Module):
            def __init__(self):
                super().__init__()
                self.act = cg.QReLU(4)

            def forward(self, x):
                for _ in range(len(x)):
                    y = self.act(x)
                return y if len(x) < 4 else self(x[:3])  # it calls itself too

        batches = [torch.ones(2), torch.ones(4), torch.ones(1)]
        assert cg.calibrate(Loop(), batches).layers[0].calls == 7

    def test_an_error_leaves_no_hook(self):
        model = Repeats(1.0)
        with pytest.raises(ValueError, match="NaN"):
            cg.calibrate(model, [torch.tensor([math.nan])])
        assert not model._forward_hooks and not model._forward_pre_hooks and not model._forward_hooks_always_called


class Exp(nn.Module):
    def forward(self, x):
        return x.exp()

    def right_inverse(self, y):
        return y.log()


class TestAlphasOfEveryKind:
    @pytest.mark.parametrize("learn", [False, True])
    @pytest.mark.parametrize("channel_dim", [None, -1])
    def test_a_parametrized_alpha_is_what_the_report_says(self, channel_dim, learn):
        x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
        plain, model = _layer(learn_alpha=learn), _layer(learn_alpha=learn)
        nn.utils.parametrize.register_parametrization(model[0], "alpha", Exp())
        cg.calibrate(plain, [x], channel_dim=channel_dim)
        [layer] = cg.calibrate(model, [x], channel_dim=channel_dim).layers
        assert torch.equal(layer.alpha, model[0].alpha)
        torch.testing.assert_close(layer.alpha, plain[0].alpha.detach())

    def test_a_shape_that_an_optimizer_has_state_of_is_refused(self):
        model, x = _layer(learn_alpha=True), torch.randn(50, 5)
        optimizer = torch.optim.Adam(model.parameters())
        model(x).sum().backward()
        optimizer.step()
        before = model[0].alpha.detach().clone()
        with pytest.raises(ValueError, match="give 0 5 alphas instead of 1, but an optimizer has state"):
            cg.calibrate(model, [x], channel_dim=1)
        assert torch.equal(model[0].alpha, before) and model[0].channel_dim is None
        cg.calibrate(model, [x])  # the shape stays

    def test_an_optimizer_without_state_trains_the_new_shape(self):
        model, x = _layer(learn_alpha=True), torch.randn(50, 5)
        optimizer = torch.optim.Adam(model.parameters())
        cg.calibrate(model, [x], channel_dim=1)
        before = model[0].alpha.detach().clone()
        model(x).sum().backward()
        optimizer.step()
        assert model[0].alpha.shape == (5,) and (model[0].alpha != before).all()


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    label: str = "label"


class Movable:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, device):
        return Movable(self.x.to(device))


Pair = collections.namedtuple("Pair", "x label")


class TestDevices:
    @pytest.mark.parametrize("function", [cg.calibrate, cg.stats])
    @pytest.mark.parametrize("batch", [
        {"x": torch.ones(2)}, collections.UserDict(x=torch.ones(2)), [{"x": torch.ones(2)}], Batch(torch.ones(2)),
        [Batch(torch.ones(2)), 1], Pair(torch.ones(2), None), Movable(torch.ones(2)),
        [collections.UserDict(x=torch.ones(2))],
    ], ids=lambda batch: type(batch).__name__)  # fmt: skip
    def test_tensors_of_any_batch_go_to_the_model(self, function, batch):
        model, seen = _layer(), []
        model.register_parameter("weight", nn.Parameter(torch.ones(1, device="meta")))

        def forward(model, batch):
            inner = batch[0] if isinstance(batch, list) else batch
            assert type(batch) in (dict, list, Batch, Pair, Movable)
            seen.append(inner["x"] if isinstance(inner, dict) else inner.x)

        with pytest.warns(UserWarning, match=f"{function.__name__}: no batch reached 0"):
            function(model, [batch], forward=forward)
        assert seen[0].device.type == "meta"

    @pytest.mark.parametrize("function", [cg.calibrate, cg.stats])
    def test_default_device_is_not_where_the_counts_are(self, function):
        x, model = _data(100), _layer()
        with torch.device("meta"):
            found = function(model, [x], progress=False)
        wanted = function(_layer() if function is cg.calibrate else model, [x], progress=False)
        if function is cg.stats:
            assert found == wanted
        else:
            assert torch.equal(found.layers[0].alpha, wanted.layers[0].alpha)

    @pytest.mark.parametrize("function", [cg.calibrate, cg.stats])
    def test_inputs_without_values_are_refused(self, function):
        with pytest.raises(ValueError, match="alpha of 0 has no values: it is on the meta device"):
            function(_layer().to("meta"), [torch.ones(2)])
        with pytest.raises(ValueError, match="the input of 0 has no values: it is on the meta device"):
            function(_layer(), [torch.ones(2)], forward=lambda model, x: model(x.to("meta")))
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
        with pytest.raises(ValueError, match="the input of 0 is a nested tensor; give padded batches"):
            function(_layer(), [nested])
        with FakeTensorMode(), pytest.raises(ValueError, match="alpha of 0 has no values.*FakeTensorMode"):
            function(_layer(), [torch.ones(2)])


class TestFusedModules:
    def test_a_model_whose_weights_are_offloaded(self):
        fused, plain = self._models()
        x = torch.randn(50, 6)
        wanted = cg.calibrate(plain, [x]).layers[0].alpha
        accelerate.cpu_offload(fused, execution_device=torch.device("cpu"))
        assert fused[1].layer.weight.is_meta
        assert torch.equal(cg.calibrate(fused, [x]).layers[0].alpha, wanted)
        assert cg.stats(fused, [x])[0].elements == 300 and torch.equal(fused(x), plain(x))

    @staticmethod
    def _models():
        torch.manual_seed(0)
        first, second = nn.Linear(6, 6), nn.Linear(6, 4)
        fused = nn.Sequential(first, cg.nn.QReLULinear(cg.QReLU(2), second))
        return fused, nn.Sequential(copy.deepcopy(first), cg.QReLU(2), copy.deepcopy(second))

    def test_the_activation_inside_is_seen(self):
        x = torch.randn(50, 6)
        (fused, plain), results = self._models(), []
        for model in (fused, plain):
            [calibrated] = cg.calibrate(model, [x]).layers
            [counted] = cg.stats(model, [x])
            results.append((calibrated.alpha.item(), calibrated.snr, counted.codes, counted.elements))
        assert results[0] == results[1] and results[0][3] == 300
        assert torch.equal(fused(x), plain(x))

    def test_convolutions_too(self):
        model = cg.nn.QReLUConv2d(cg.QReLU(2), nn.Conv2d(3, 4, 3))
        x = torch.randn(2, 3, 5, 5)
        assert cg.calibrate(model, [x]).layers[0].reached and cg.stats(model, [x])[0].elements == x.numel()

    @pytest.mark.parametrize("part", ["activation", "layer"])
    def test_a_forward_set_on_a_part_runs(self, part):
        fused, _ = self._models()
        inner, calls = getattr(fused[1], part), []
        forward = inner.forward
        inner.forward = lambda x: calls.append(x) or forward(x)
        x = torch.randn(5, 6)
        y = fused(x)
        del inner.forward
        assert len(calls) == 1 and torch.equal(y, fused(x))
