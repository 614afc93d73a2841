"""Codes that are averaged or added before a layer reads them, against rational arithmetic, and what stays float."""

from __future__ import annotations

import re

import integer_oracle
import pytest
import torch
import torch.nn.functional as F
from integer_oracle import averages
from torch import nn

import coarsegrad as cg
from coarsegrad.integer.weights import choose_weights


class Net(nn.Module):
    """mix takes the outputs of two QReLUs, [N, 3, 4, 6], to what a 1 x 1 convolution reads."""

    def __init__(self, mix, bits=2, alphas=(0.3, 0.3)):
        super().__init__()
        self.mix = mix
        self.first, self.second = (cg.QReLU(bits, alpha=alpha) for alpha in alphas)
        self.layer, self.last = nn.Conv2d(3, 5, 1), cg.QReLU(3, alpha=0.17, rounding="nearest")

    def forward(self, x):
        return self.last(self.layer(self.mix(self.first(x), self.second(-x))))


def wanted_codes(model, x, mix):
    """The codes of the last QReLU in rational arithmetic; mix as of the model, on arrays of rationals."""
    alphas = [act.alpha.item() for act in (model.first, model.second)]
    top = 2**model.first.bits - 1
    codes = [(y / alpha).ceil().clamp(0, top).long() for y, alpha in zip((x, -x), alphas)]
    y = mix(*(integer_oracle.values(c, alpha) for c, alpha in zip(codes, alphas)))
    integers, scale = choose_weights(model.layer.weight.detach().double().flatten(1), 8)
    acc = integers.numpy().astype(object) @ y.reshape(*y.shape[:2], -1)
    out = torch.empty(acc.shape, dtype=torch.long)
    for (n, c, i), value in zip(torch.cartesian_prod(*map(torch.arange, acc.shape)).tolist(), acc.flatten().tolist()):
        layer = (1, scale[c].item(), model.layer.bias[c].item(), None)
        out[n, c, i] = integer_oracle.real_code(value, *layer, model.last.alpha.item(), 3, "nearest")
    return out.view(*acc.shape[:2], *y.shape[2:])


def in_place(a, b):
    a += b
    return a


def pooled_1d(a, b):
    return F.avg_pool1d(a.flatten(2), 4, 2).unflatten(2, (1, -1))


MIXES = {  # name: (of the model, of rationals, alphas)
    "pool": (lambda a, b: F.avg_pool2d(a, 2), lambda a, b: averages(a, (2, 2)), (0.3, 0.3)),
    "padded": (
        lambda a, b: F.avg_pool2d(a, 3, 2, 1),
        lambda a, b: averages(a, (3, 3), (2, 2), 1),
        (0.3, 0.3),
    ),
    "divisor": (
        lambda a, b: F.avg_pool2d(a, (2, 3), padding=1, count_include_pad=False, divisor_override=5),
        lambda a, b: averages(a, (2, 3), None, 1, 5),
        (0.3, 0.3),
    ),
    "1d": (pooled_1d, lambda a, b: averages(a.reshape(*a.shape[:2], 1, -1), (1, 4), (1, 2)), (0.3, 0.3)),
    "adaptive": (lambda a, b: F.adaptive_avg_pool2d(a, (2, 3)), lambda a, b: averages(a, (2, 2)), (0.3, 0.3)),
    "global": (lambda a, b: F.adaptive_avg_pool2d(a, 1), lambda a, b: averages(a, (4, 6)), (0.3, 0.3)),
    "mean": (lambda a, b: a.mean((2, -1), keepdim=True), lambda a, b: averages(a, (4, 6)), (0.3, 0.3)),
    "mean of one": (lambda a, b: a.mean(2).unsqueeze(2), lambda a, b: averages(a, (4, 1)), (0.3, 0.3)),
    "sum": (lambda a, b: a.sum((2, 3), keepdim=True), lambda a, b: averages(a, (4, 6), divisor=1), (0.3, 0.3)),
    "pool twice": (
        lambda a, b: F.avg_pool2d(F.avg_pool2d(F.pad(a, (1, 1)), 2).flip(3), 2),
        lambda a, b: averages(averages(integer_oracle.np.pad(a, [(0, 0)] * 3 + [(1, 1)]), (2, 2))[..., ::-1], (2, 2)),
        (0.3, 0.3),
    ),
    "branches": (lambda a, b: a + b, lambda a, b: a + b, (0.3, 0.3)),
    "in place": (in_place, lambda a, b: a + b, (0.3, 0.3)),
    "a branch twice": (lambda a, b: a + a + b, lambda a, b: a + a + b, (0.3, 0.3)),
    "two to three": (lambda a, b: a + b, lambda a, b: a + b, (0.25, 0.375)),
    "a power of two": (lambda a, b: b + a, lambda a, b: b + a, (0.3, 2.4)),
    "its average": (
        lambda a, b: a + F.adaptive_avg_pool2d(a, (4, 1)),
        lambda a, b: a + averages(a, (1, 6)),
        (0.3, 0.3),
    ),
}


@pytest.mark.parametrize("name", MIXES)
def test_codes_are_those_of_rational_arithmetic(name):
    torch.manual_seed(len(name))
    of_model, of_rationals, alphas = MIXES[name]
    model = Net(of_model, 2, [torch.tensor([alpha]).item() for alpha in alphas]).eval()
    x = torch.randn(3, 3, 4, 6)
    with torch.no_grad():
        largest = model.layer(model.mix(model.first(x), model.second(-x))).max()
    model.last.alpha.fill_(largest / 6)
    converted = cg.convert(model, (x,))
    assert [(row.name, row.output) for row in converted.report.converted] == [("layer", "codes")]
    y = converted(x)
    codes = (y / model.last.alpha).round().long()
    assert torch.equal(codes, wanted_codes(model, x, of_rationals))
    assert len(codes.unique()) > 3
    assert y.size(3) == 1 or y.stride() == model(x).stride()
    assert torch.equal(converted(x[:1]), y[:1])


@pytest.mark.parametrize("bits, size", ((1, 15), (4, 4), (8, 1)))
def test_sums_up_to_255(bits, size):
    """Every code is the largest."""
    model = nn.Sequential(cg.QReLU(bits, alpha=0.5), nn.AvgPool2d(size), nn.Flatten(), nn.Linear(2, 3)).eval()
    x = torch.full((2, 2, size, size), 1e9)
    converted = cg.convert(model, (x,))
    assert [row.name for row in converted.report.converted] == ["3"]
    # Weights are rounded to 127ths of the largest of their channel, each by half of one at most.
    weight = model[-1].weight
    bound = (2**bits - 1) * 0.5 * weight.size(1) * weight.abs().amax(1) / (2 * 127)
    assert ((converted(x) - model(x)).abs() <= bound * 1.0001).all()


def test_steps_of_channels_go_into_the_weights():
    torch.manual_seed(1)
    alpha = torch.tensor([0.2, 0.3, 0.5])
    model = nn.Sequential(cg.QReLU(3, alpha=alpha, num_channels=3), nn.AvgPool2d(3, 1, 1), nn.Conv2d(3, 4, 2)).eval()
    x = torch.randn(2, 3, 5, 6)
    converted = cg.convert(model, (x,))
    assert [row.name for row in converted.report.converted] == ["2"]
    torch.testing.assert_close(converted(x), model(x), rtol=0.03, atol=0.03)
    twice = nn.Sequential(model[0], model[1], cg.QReLU(3), nn.Conv2d(3, 4, 2)).eval()
    assert [row.name for row in cg.convert(twice, (x,)).report.converted] == ["3"]


def test_floats_that_read_a_sum_get_its_codes_by_its_step():
    class Both(Net):
        def forward(self, x):
            y = self.mix(self.first(x), self.second(-x))
            return self.layer(y), y.sigmoid()

    model = Both(lambda a, b: F.avg_pool2d(a, 3, 1)).eval()
    x = torch.randn(2, 3, 4, 6)
    converted = cg.convert(model, (x,))
    assert ("sigmoid", "reads codes of  as floats") in [(r.what.split()[0], r.why) for r in converted.report.stayed]
    torch.testing.assert_close(converted(x)[1], model(x)[1], rtol=1e-6, atol=0)
    assert sum(node.target is torch.ops.aten.avg_pool2d.default for node in converted.graph.nodes) == 1


STAYS = {  # what a layer reads, and why that is floats
    "sums above 255": (
        lambda a, b: a.mean((2, 3), keepdim=True),
        "mean of Net, whose sums of codes reach 360, above 255",
    ),
    "windows cut off": (lambda a, b: F.avg_pool2d(a, 3, ceil_mode=True), "whose windows are not all of one size"),
    "padding not counted": (
        lambda a, b: F.avg_pool2d(a, 3, padding=1, count_include_pad=False),
        "whose windows are not all of one size",
    ),
    "adaptive windows": (lambda a, b: F.adaptive_avg_pool2d(a, 3), "whose windows are not all of one size"),
    "steps apart": (lambda a, b: a + b, r"add of Net, whose sums of codes reach \d{8,}, above 255"),
    "the batch": (lambda a, b: a.mean(0, keepdim=True), "averages over a dimension that has no fixed size"),
    "a float": (lambda a, b: a + b.sin(), "reads add of Net, not codes"),
    "a multiple": (lambda a, b: torch.add(a, b, alpha=0.5), "reads add of Net, not codes"),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_float_and_why(name):
    mix, why = STAYS[name]
    model = Net(mix, 4, (0.3, 0.31)).eval()
    x = torch.randn(3, 3, 4, 6)
    converted = cg.convert(model, (x,))
    report = converted.report
    assert report.converted == []
    (row,) = [row for row in report.stayed if row.name == "layer"]
    assert re.search(why, row.why), row.why
    assert torch.equal(converted(x), model(x))


def test_a_sum_of_channels_of_different_steps_stays_float():
    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (
                cg.QReLU(2, alpha=torch.tensor(alpha), num_channels=2) for alpha in ([0.2, 0.3], [0.2, 0.4])
            )
            self.same, self.layer = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, x):
            a, b = self.first(x), self.second(x)
            return self.layer(a + b) + self.same(a + self.first(-x)) + self.layer(a.sum(1, keepdim=True).expand(-1, 2))

    report = cg.convert(Channels().eval(), (torch.randn(4, 2),)).report
    assert [row.name for row in report.converted] == ["same"]
    assert [row.why for row in report.stayed if row.name == "layer"] == [
        "reads add of Channels, whose terms have different steps in one channel",
        "reads sum of Channels, whose windows hold codes of different steps",
    ]


def test_what_is_overwritten_later_is_no_code():
    class Overwrites(Net):
        def forward(self, x):
            y = self.first(x)
            view = y.flatten(2)
            y += 1.0
            return self.layer(view.unflatten(2, (4, 6)))

    model, x = Overwrites(None).eval(), torch.randn(2, 3, 4, 6)
    converted = cg.convert(model, (x,))
    assert converted.report.converted == []
    assert torch.equal(converted(x), model(x))
