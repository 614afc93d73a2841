"""What calibrate and stats let one see: histograms of inputs, figures, and counts of training steps."""

from __future__ import annotations

import builtins
import contextlib
import copy
import sys

import pytest
import torch
from oracle import ROUNDINGS
from packing_cases import assert_same
from torch import nn

import coarsegrad as cg
from coarsegrad.quantization import live_stats

pytestmark = pytest.mark.usefixtures("one_thread")


def _layer(bits=2, **settings):
    return nn.Sequential(cg.QReLU(bits, **settings))


# ------------------------------------------------------------------------------------------------ histograms


# In 64ths of the top level, 64: at an end, inside, at the top, just above it, the last that is drawn, and beyond.
X = torch.tensor([-3.0, 0.0, 0.5, 1.0, 1.5, 64.0, 64.5, 128.0, 129.0, 1e9])


def _in(found):
    return {i: n for i, n in enumerate(found.counts) if n}, found.beyond


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_an_interval_has_its_upper_end_and_the_top_level_is_not_above_itself(bits, dtype):
    x = X.to(dtype) * ((2**bits - 1) / 64)
    model = _layer(bits, alpha=1.0)
    [found] = cg.stats(model, [x[:4], x[4:]])
    assert _in(found.inputs) == ({0: 2, 1: 1, 63: 1, 64: 1, 127: 1}, 2)
    assert sum(n for i, n in enumerate(found.inputs.counts) if i >= 64) + 2 == round(found.saturated * found.elements)


def test_a_top_level_that_is_rounded_is_not_above_itself():
    x = torch.full((4,), 3 * 0.3005).bfloat16()  # upwards
    model = _layer(alpha=0.3005)
    assert model[0](x).eq(x).all() and x[0].item() > 3 * 0.3005
    assert _in(cg.stats(model, [x])[0].inputs) == ({63: 4}, 0)


def test_channels_count_by_their_own_alpha_and_nan_saturates():
    model = _layer(num_channels=2, alpha=1.0)
    model[0].alpha.copy_(torch.tensor([1.0, 100.0]))
    x = torch.tensor([[3.0, 300.0], [1.5, 150.0], [torch.nan, 301.0]])
    assert _in(cg.stats(model, [x])[0].inputs) == ({63: 2, 31: 2, 64: 1}, 1)


def test_calibrate_counts_as_stats_does():
    """The same inputs, but for those in bins of the other histogram that an end cuts."""
    model, x = _layer(1, num_channels=3), torch.randn(5000, 3) * torch.tensor([1.0, 5.0, 0.1])
    found = cg.calibrate(model, [x], progress=False).layers[0].inputs
    [want] = cg.stats(model, [x], progress=False)
    assert sum(found.counts) + found.beyond == pytest.approx((x > 0).sum().item())
    differences = torch.tensor(found.counts) - torch.tensor(want.inputs.counts)
    assert differences.abs().max() < 3
    assert 50 < want.inputs.beyond == pytest.approx(found.beyond, abs=1)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_thresholds_and_levels_are_the_staircases(rounding):
    layer = cg.QReLU(3, alpha=1 / 7, rounding=rounding).double()
    found = cg.stats(nn.Sequential(layer), [torch.ones(1)])[0].inputs
    assert len(found.edges) == len(found.counts) + 1 and found.edges[64] == 1
    places = torch.tensor([at + by for at in found.thresholds for by in (-1e-6, 1e-6)], dtype=torch.float64)
    want = torch.tensor([0.0, *found.levels], dtype=torch.float64)
    assert torch.allclose(layer(places), torch.stack([want[:-1], want[1:]], 1).flatten(), atol=1e-6)


# ------------------------------------------------------------------------------------------------ figures


def _parts(figure):
    """The texts of the figure; the places of level dots of the first row; and lengths of bars by column."""
    inputs, *columns = figure.axes
    bars = {axes.get_xlabel(): [bar.get_width() for bar in axes.patches] for axes in columns}
    return [label.get_text() for label in inputs.get_yticklabels()], bars, [text.get_text() for text in inputs.texts]


def test_figures_show_what_the_reports_have(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the figures")
    model = nn.Sequential(cg.QReLU(2, alpha=1.0), nn.Linear(4, 4), cg.QReLU(8), cg.QReLU(2))
    x = torch.tensor([[-1.0, 1.0, 4.0, 9.0]])
    report = cg.stats(model, [x])
    figure = report.plot(tmp_path / "stats.png")
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG") and figure._repr_png_().startswith(b"\x89PNG")
    names, bars, texts = _parts(figure)
    assert names == [f"{s.name}\nalpha {s.alpha.item():.4g}" for s in report]
    assert bars == {"zero": [s.zero for s in report], "saturated": [s.saturated for s in report]}
    assert texts[0] == "33.3% beyond"
    chosen = report.plot(layers=["3", "0"])
    assert [name.split("\n")[0] for name in _parts(chosen)[0]] == ["3", "0"]

    report = cg.calibrate(model, [x.expand(3, 4)], progress=False)
    _, bars, _ = _parts(report.plot())
    assert bars["SNR (dB)"] == [s.snr for s in report.layers] and bars["zero"] == [s.zero for s in report.layers]


def test_figures_of_layers_without_inputs_and_of_many():
    pytest.importorskip("matplotlib", reason="matplotlib draws the figures")
    model = nn.ModuleDict({"a": cg.QReLU(2), "unused": cg.QReLU(2), "negative": cg.QReLU(2)})
    with pytest.warns(UserWarning):
        report = cg.stats(model, [torch.ones(4)], forward=lambda m, x: (m["a"](x), m["negative"](-x)))
        calibrated = cg.calibrate(model, [torch.ones(4)], forward=lambda m, x: (m["a"](x), m["negative"](-x)))
    for figure, count in ((report.plot(), 2), (calibrated.plot(), 2)):
        names, bars, texts = _parts(figure)
        assert len(names) == 3 and texts == ["no input reached it", "no positive input"]
        assert len(bars["zero"]) == count
    priced = nn.ModuleDict({"a$x$": cg.QReLU(2)})
    figure = cg.stats(priced, [torch.ones(4)], forward=lambda m, x: m["a$x$"](x)).plot()
    assert not any(label.get_parse_math() for label in figure.axes[0].get_yticklabels())
    many = cg.stats(nn.Sequential(*(cg.QReLU(4) for _ in range(60))), [torch.randn(8)])
    figure = many.plot()
    assert 14 < figure.get_size_inches()[1] < 20 and _parts(figure)[0] == [str(i) for i in range(60)]


def test_mistakes_in_figures(monkeypatch):
    report = cg.stats(_layer(), [torch.ones(2)])
    with pytest.raises(TypeError, match=r"layers must be names of layers, such as \['0'\], got the str '0'"):
        report.plot(layers="0")
    with pytest.raises(TypeError, match=r"layers must be names of layers, such as \['0'\], got the int 0"):
        report.plot(layers=0)
    with pytest.raises(ValueError, match="layers must be of 0, got 1"):
        report.plot(layers=["1"])
    imports = builtins.__import__
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imports(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"plot needs matplotlib: pip install .*coarsegrad\[experiments\]"):
        report.plot()


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("layer", [{"learn_alpha": True, "ste": "clipped_relu"}, {"dropout": 0.5}, {"inplace": True}])
def test_counting_a_step_changes_nothing_of_it(layer):
    plain = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), cg.QReLU(2, **{"ste": "relu", **layer}), nn.Linear(5, 5))
    counted, x = copy.deepcopy(plain), torch.randn(64, 5)
    torch.manual_seed(0)
    plain(x).square().sum().backward()
    torch.manual_seed(0)
    with live_stats(counted) as live:
        counted(x).square().sum().backward()
    assert counted.training and "forward" not in vars(counted[2])
    assert_same({n: p.grad for n, p in counted.named_parameters()}, {n: p.grad for n, p in plain.named_parameters()})
    assert_same(counted.state_dict(), plain.state_dict())
    [found] = live.report()
    inputs = nn.Sequential(plain[0], nn.BatchNorm1d(5))(x)
    assert found.elements == 320 and found.zero == (plain[2].eval()(inputs.clone()) == 0).sum().item() / 320
    assert list(live.report().scalars()) == ["zero/2", "saturated/2", "alpha/2"]


def test_blocks_in_blocks_count_and_run_the_forward_that_was_there():
    model, x = _layer(), torch.rand(3, 4)
    layer = model[0]
    layer.forward = forward = lambda x: cg.QReLU.forward(layer, 2 * x)
    with live_stats(model) as outer:
        with live_stats(model) as inner:
            y = model(x)
        assert torch.equal(y, model(x))
    assert [live.report()[0].elements for live in (outer, inner)] == [24, 12]
    assert vars(layer)["forward"] is forward and torch.equal(y, forward(x))


def test_blocks_left_in_any_order():
    model, x = _layer(), torch.rand(3, 4)
    first, second, third = (contextlib.ExitStack() for _ in range(3))
    lives = [stack.enter_context(live_stats(model)) for stack in (first, second, third)]
    y = model(x)
    for stack in (second, first):
        stack.close()
        assert torch.equal(model(x), y)
    third.close()
    assert [live.report()[0].elements for live in lives] == [24, 12, 36]
    assert torch.equal(model(x), y) and "forward" not in vars(model[0])


def test_scalars_are_numbers_of_what_had_inputs():
    model = nn.ModuleDict({"a": cg.QReLU(2, num_channels=2, alpha=1.0), "unused": cg.QReLU(2)})
    model["a"].alpha.copy_(torch.tensor([1.0, 2.0]))
    with live_stats(model) as live:
        model["a"](torch.tensor([[-1.0, 6.5], [4.0, 1.5]]))
    with pytest.warns(UserWarning, match="live_stats: no batch reached unused"):
        scalars = live.report().scalars()
    assert scalars == {"zero/a": 0.25, "saturated/a": 0.5, "alpha/a": 1.5}
    assert all(type(value) is float for value in scalars.values())
    with pytest.raises(ValueError, match="has no QReLU"), live_stats(nn.Linear(2, 2)):
        pass
