"""calibrate and stats: alphas from data, and what the layers make of data."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import coarsegrad as cg
from coarsegrad.quantization import METHODS
from coarsegrad.ste import ROUNDINGS


def _data(kind: str, count: int = 20_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(count, generator=generator)
    return {"gaussian": z, "heavy": z * z.abs().pow(1.5), "shifted": z * 0.1 + 5, "tiny": z * 1e-6}[kind]


def _error(x: torch.Tensor, alpha: float, layer: cg.QReLU) -> float:
    """The squared error that calibrate makes small, from the values themselves."""
    layer.alpha.fill_(alpha)
    target = x.clamp(0, layer.limit)
    return (layer(x.clone()) - (target.square() if layer.squared else target)).double().square().sum().item()


def _layer(bits=2, **keywords) -> nn.Sequential:
    return nn.Sequential(cg.QReLU(bits, **keywords))


class TestMeanSquaredError:
    @pytest.mark.parametrize("squared", [False, True])
    @pytest.mark.parametrize("rounding", ROUNDINGS)
    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    @pytest.mark.parametrize("kind", ["gaussian", "heavy", "shifted", "tiny"])
    def test_no_alpha_is_better_by_more_than_two_percent(self, kind, bits, rounding, squared):
        x, model = _data(kind), _layer(bits, rounding=rounding, squared=squared)
        report = cg.calibrate(model, x.split(6000))
        found = model[0].alpha.item()
        error = _error(x, found, model[0])
        for factor in 2 ** torch.linspace(-4, 4, 97):
            assert error <= 1.02 * _error(x, found * factor.item(), model[0])
        power = x.clamp(min=0).double().pow(4 if squared else 2).sum().item()
        # The histogram's own estimate, of inputs that it knows to 1.6%.
        assert report.layers[0].snr == pytest.approx(10 * math.log10(power / error), abs=0.5)

    @pytest.mark.parametrize("rounding", ROUNDINGS)
    @pytest.mark.parametrize("bits", [1, 2, 3, 4])
    def test_on_gaussian_inputs_it_is_the_half_gaussian_optimum(self, bits, rounding):
        model = _layer(bits, rounding=rounding)
        cg.calibrate(model, [_data("gaussian", 1_000_000)])
        wanted = cg.nn.half_gaussian_alpha(bits, rounding)
        assert model[0].alpha.item() == pytest.approx(wanted, rel=0.02)

    def test_relu6_is_what_is_fitted_where_it_was_one(self):
        x, model = 20 * _data("gaussian").abs(), nn.Sequential(nn.ReLU6(), nn.ReLU())
        cg.quantize_(model, bits=4)
        cg.calibrate(model, [x])
        assert 15 * model[0].alpha.item() == pytest.approx(6, rel=0.1)


class TestOtherMethods:
    @pytest.mark.parametrize("percentile", [50, 99, 100])
    def test_percentile(self, percentile):
        x, model = _data("heavy"), _layer(3)
        cg.calibrate(model, [x], "percentile", percentile=percentile)
        wanted = torch.quantile(x[x > 0], percentile / 100).item()
        assert 7 * model[0].alpha.item() == pytest.approx(wanted, rel=0.02)

    def test_half_gaussian(self):
        x, model = 3 * _data("gaussian"), _layer(2)
        cg.calibrate(model, [x], "half_gaussian")
        deviation = x[x > 0].square().mean().sqrt().item()
        assert model[0].alpha.item() == pytest.approx(deviation * cg.nn.half_gaussian_alpha(2), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
class TestPerChannel:
    @pytest.mark.parametrize(("shape", "dim"), [((4, 3, 5, 6), 1), ((40, 7, 3), -1), ((3, 200), 0)])
    def test_each_channel_has_the_alpha_that_it_has_alone(self, method, shape, dim):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        scales = torch.tensor([0.01, 1.0, 50.0])
        x = x * scales.view([-1 if i == dim % x.dim() else 1 for i in range(x.dim())])
        model = _layer()
        cg.calibrate(model, [x], method, channel_dim=dim)
        assert model[0].channel_dim == dim and model(x).shape == x.shape
        for channel, alpha in zip(x.unbind(dim), model[0].alpha):
            alone = _layer()
            cg.calibrate(alone, [channel], method)
            assert alone[0].alpha.item() == alpha.item()

    def test_layers_that_have_channels_keep_them(self, method):
        model = _layer(num_channels=3, channel_dim=-1)
        cg.calibrate(model, [torch.randn(100, 3) * torch.tensor([1.0, 10.0, 100.0])], method)
        assert model[0].alpha.shape == (3,) and model[0].alpha[2] > 5 * model[0].alpha[1] > 25 * model[0].alpha[0]


class Net(nn.Module):
    """Norm, dropout and a checkpoint: what must not move or count twice."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.norm, self.lin, self.out = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.first, self.second, self.dropout = nn.ReLU(), nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.checkpointed = checkpointed

    def half(self, x):
        return self.second(self.lin(self.first(self.norm(x))))

    def forward(self, x):
        h = checkpoint(self.half, x, use_reentrant=False) if self.checkpointed else self.half(x)
        return self.out(self.dropout(h))


def _net(**keywords) -> Net:
    torch.manual_seed(0)
    model = Net(**keywords)
    cg.quantize_(model, bits=4, learn_alpha=True)
    return model


def _alphas(model: nn.Module) -> list[float]:
    return [a for m in model.modules() if isinstance(m, cg.QReLU) for a in m.alpha.tolist()]


class TestThePass:
    batches = torch.randn(6, 16, 8, generator=torch.Generator().manual_seed(2)).unbind()

    def test_only_alphas_change(self):
        model = _net().train()
        model.norm.eval()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        modes = {name: m.training for name, m in model.named_modules()}
        parameters = {name: p for name, p in model.named_parameters()}
        cg.calibrate(model, self.batches)
        changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
        assert changed == ["first.alpha", "second.alpha"]
        assert {name: m.training for name, m in model.named_modules()} == modes
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert all("forward" not in vars(m) for m in model.modules())
        assert all(p.grad is None for p in model.parameters())

    def test_layers_see_the_float_model(self):
        """The second layer's alpha is that of what the first float layer, not the first QReLU, hands on."""
        model = _net().eval()
        cg.calibrate(model, self.batches)
        with torch.no_grad():
            inputs = torch.cat([model.lin(F.relu(model.norm(batch))) for batch in self.batches])
        alone = _layer(4, rounding="nearest")
        cg.calibrate(alone, [inputs])
        assert alone[0].alpha.item() == pytest.approx(model.second.alpha.item(), rel=1e-6)

    def test_any_order_and_split_gives_the_same(self):
        results = []
        for batches in (self.batches, self.batches[::-1], [torch.cat(self.batches)], torch.cat(self.batches).split(7)):
            model = _net()
            cg.calibrate(model, iter(batches))
            results.append(_alphas(model))
        assert all(result == results[0] for result in results)

    def test_checkpointing_does_not_count_twice_and_training_moves_nothing(self):
        plain, checkpointed = _net(), _net(checkpointed=True)
        for model in (plain, checkpointed):
            cg.calibrate(model, self.batches)
        assert _alphas(plain) == _alphas(checkpointed)
        before = _alphas(checkpointed)
        checkpointed.train()(self.batches[0]).sum().backward()
        assert _alphas(checkpointed) == before

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype):
        x = _data("gaussian").to(dtype)
        model = _layer()
        cg.calibrate(model, [x])
        assert model[0].alpha.dtype == torch.float32
        assert model[0].alpha.item() == pytest.approx(cg.nn.half_gaussian_alpha(2), rel=0.03)

    def test_batches_may_be_tensors_arguments_keywords_or_anything(self):
        x = self.batches[0]
        results = []
        pairs = (x, "label"), lambda model, batch: model(batch[0])
        for batch, forward in ((x, None), ((x,), None), ([x], None), ({"x": x}, None), pairs):
            model = _net()
            cg.calibrate(model, [batch], forward=forward)
            results.append(_alphas(model))
        assert all(result == results[0] for result in results)

    def test_memory_of_the_histogram_does_not_grow(self):
        from coarsegrad.quantization.histogram import Histogram

        histogram, sizes = Histogram(1, torch.device("cpu")), set()
        for scale in (1e-30, 1e-3, 1.0, 1e30):
            histogram.add(scale * _data("gaussian")[None])
            sizes.add(histogram.nbytes)
        assert sizes == {96 * 1024}
        assert histogram.rows(1, torch.float32)[0].count == 4 * (_data("gaussian") > 0).sum()

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30),
           st.integers(1, 8), st.sampled_from(ROUNDINGS), st.sampled_from(METHODS))  # fmt: skip
    def test_any_finite_numbers_give_a_good_alpha(self, values, bits, rounding, method):
        model = _layer(bits, rounding=rounding)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            [layer] = cg.calibrate(model, [torch.tensor(values)], method).layers
        alpha = model[0].alpha.item()
        assert 0 < alpha < math.inf and torch.equal(layer.alpha, model[0].alpha)
        assert 0 <= layer.zero <= 1 + 1e-9 and -1e-9 <= layer.saturated <= 1 + 1e-9
        assert not model(torch.tensor(values)).isnan().any()


class TestReport:
    def test_shares_are_those_of_the_data(self):
        x, model = _data("gaussian"), _layer(2, rounding="nearest")
        [layer] = cg.calibrate(model, [x]).layers
        alpha = model[0].alpha.item()
        assert layer.zero == pytest.approx((x <= alpha / 2).double().mean().item(), abs=0.01)
        assert layer.saturated == pytest.approx((x > 3 * alpha).sum().item() / (x > 0).sum().item(), abs=0.01)
        assert layer.reached and layer.before.item() == pytest.approx(cg.nn.half_gaussian_alpha(2, "nearest"))

    def test_dead_saturated_and_unreached_layers_are_named(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.dead, self.full, self.unused = (cg.QReLU(4) for _ in range(3))

            def forward(self, x):
                return self.full(x) + self.dead(-x.abs())

        model = Odd()
        before = model.dead.alpha.clone()
        with pytest.warns(UserWarning) as caught:
            report = cg.calibrate(model, [_data("shifted")], "percentile", percentile=1)
        said = [str(w.message) for w in caught]
        assert any("no positive input in dead" in text for text in said)
        assert any("positive inputs saturate in full" in text for text in said)
        assert any("no batch reached unused" in text for text in said)
        assert torch.equal(model.dead.alpha, before) and torch.equal(model.unused.alpha, before)
        assert "not reached" in str(report)

    def test_relus_that_remain_are_named_by_line(self):
        def outside(x):
            return F.relu(x)

        class Calls(nn.Module):
            def __init__(self):
                super().__init__()
                self.act = nn.ReLU()

            def forward(self, x):
                return outside(self.act(x))

        model = Calls()
        cg.quantize_(model)
        line = outside.__code__.co_firstlineno + 1
        with pytest.warns(UserWarning, match=rf"other than QReLUs are called at .*test_calibrate.py:{line}"):
            report = cg.calibrate(model, [torch.randn(10)])
        assert len(report.remaining) == 1

    def test_no_warning_without_a_reason(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cg.calibrate(_net(), TestThePass.batches)


class TestBadInput:
    def test_errors_leave_alphas_and_modes(self):
        model = _net().train()
        before = _alphas(model)
        good = TestThePass.batches[0]
        for batches in ([good, good * math.nan], [good, good[:, :5]], []):
            with pytest.raises((ValueError, RuntimeError)):
                cg.calibrate(model, batches)
            assert _alphas(model) == before and model.training
            assert all("forward" not in vars(m) for m in model.modules())

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_what_has_no_error_is_named(self, bad):
        with pytest.raises(ValueError, match=r"the input of 0 is NaN or \+inf"):
            cg.calibrate(_layer(), [torch.tensor([1.0, bad])])

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"method": "best"}, ValueError, "method"),
            ({"percentile": 0}, ValueError, "percentile"),
            ({"percentile": 101}, ValueError, "percentile"),
            ({"channel_dim": 1.0}, TypeError, "channel_dim"),
            ({"channel_dim": 3}, ValueError, r"channel_dim is 3, but the input of 0 has shape \[2, 8\]"),
        ],
    )
    def test_wrong_arguments(self, arguments, error, match):
        with pytest.raises(error, match=match):
            cg.calibrate(_layer(), [torch.ones(2, 8)], **arguments)

    def test_channels_that_change_or_do_not_fit(self):
        with pytest.raises(ValueError, match="the input of 0 had 8 channels before, now it has 7"):
            cg.calibrate(_layer(), [torch.ones(2, 8), torch.ones(2, 7)], channel_dim=1)
        with pytest.raises(ValueError, match="the input of 0 has 8 channels, its alpha 3"):
            cg.calibrate(_layer(num_channels=3), [torch.ones(2, 8)])

    @pytest.mark.parametrize("function", [cg.calibrate, cg.stats])
    def test_no_model_and_no_layer(self, function):
        with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
            function("model", [])
        with pytest.raises(ValueError, match="has no QReLU"):
            function(nn.Linear(2, 2), [])
        with pytest.raises(ValueError, match="batches is empty"):
            function(_layer(), [])


class TestStats:
    @pytest.mark.parametrize("rounding", ROUNDINGS)
    @pytest.mark.parametrize("bits", range(1, 9))
    def test_counts_are_those_of_the_outputs(self, bits, rounding):
        x, model = _data("gaussian", 4099), _layer(bits, rounding=rounding)
        layer, parts = model[0], x.split(1001)
        [found] = cg.stats(model, parts)
        codes = (layer(x) / layer.alpha).round().long()
        assert found.codes == tuple(codes.bincount(minlength=2**bits).tolist())
        assert found.elements == 4099 and found.zero == (codes == 0).sum().item() / 4099
        assert found.saturated == (x > (2**bits - 1) * layer.alpha).sum().item() / 4099

    @pytest.mark.parametrize("layer", [{"squared": True}, {"inplace": True}, {"num_channels": 5}, {"dropout": 0.5}])
    def test_outputs_are_those_of_ever(self, layer):
        model = nn.Sequential(nn.Linear(5, 5), cg.QReLU(2, **layer), nn.Linear(5, 5)).train()
        outputs = []
        x = torch.randn(7, 5)
        cg.stats(model, [x], forward=lambda m, batch: outputs.append(m(batch)))
        assert torch.equal(outputs[0], model.eval()(x))

    def test_prints_a_histogram(self):
        report = cg.stats(_layer(8), [_data("gaussian")])
        text = str(report)
        assert "20,000" in text and "█" in text and len(report) == 1
        assert "0 " in str(cg.stats(_layer(1), [-torch.ones(3)]))
