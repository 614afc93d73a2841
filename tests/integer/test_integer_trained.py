"""`convert` of layers with a QWeight: their own codes and scales, and the predictions of the trained network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import coarsegrad as cg
from coarsegrad.integer.weights import unpack_weights

BITS = (8, 4, 2, 1)


def network(bits, shape=(2, 6, 6)):
    """A network with trained statistics, whose every layer but the first reads codes."""
    torch.manual_seed(bits)
    model = nn.Sequential(
        nn.Conv2d(shape[0], 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 2, groups=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    nn.init.normal_(model[8].weight)  # gains of both signs
    x = torch.randn(256, *shape)
    cg.quantize_(model, 4, weight_bits=bits)
    cg.calibrate(model, [x], progress=False)
    with torch.no_grad():
        model(x)
    return model.eval(), x


def in_float64(model):
    """The same network with its weights s * k of no rounding."""
    twin = copy.deepcopy(model).double()
    for layer, given in zip(twin.modules(), model.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            held = layer.parametrizations.weight
            codes, scale = cg.weight_codes(given.parametrizations.weight.original, held[0].bits)
            weight = codes * scale.double().view(-1, *[1] * (codes.dim() - 1))
            held[0], held.original = nn.Identity(), nn.Parameter(weight)
    return twin


@pytest.mark.parametrize("bits", BITS)
def test_the_codes_and_scales_are_those_of_the_parametrization(bits):
    model, x = network(bits)
    converted = cg.convert(model, (x,))
    assert [(row.name, row.weight_bits) for row in converted.report.converted] == [
        ("4", bits),
        ("7", bits),
        ("10", bits),
    ]
    assert all("as trained" in row.how for row in converted.report.converted)
    layer = model[10]
    codes, scale = cg.weight_codes(layer.parametrizations.weight.original, bits)
    assert torch.equal(unpack_weights(converted.get_buffer("10.integer_weight"), bits, 32), codes.short())
    step = scale.double() * model[9].alpha.double()
    assert torch.equal(converted.get_buffer("10.integer_scale"), step.float())
    assert torch.equal(converted.get_parameter("0.parametrizations.weight.original"), model[0].weight)


@pytest.mark.parametrize("bits", BITS)
def test_predictions_are_those_of_the_trained_network(bits):
    """Of the network in real numbers always; of the one in float32 but where two outputs tie up to its rounding."""
    model, x = network(bits)
    converted = cg.convert(model, (x,))
    with torch.no_grad():
        got, exact, simulated = converted(x).double(), in_float64(model)(x.double()), model(x)
    close = (got - exact).abs().amax(1) <= 1e-5 * exact.abs().max()
    assert close.float().mean() > 0.99  # the first layer is in floats: a code of it may move
    assert torch.equal(got.argmax(1)[close], exact.argmax(1)[close])
    top = simulated.topk(2).values
    ties = top[:, 0] - top[:, 1] <= 1e-5 * simulated.abs().max()
    same = got.argmax(1) == simulated.argmax(1)
    assert (same | ties | ~close).all() and same.float().mean() > 0.99


def test_one_bit_is_a_thirty_second_of_the_float_weight():
    model = nn.Sequential(cg.QReLU(4), nn.Linear(512, 64, bias=False)).eval()
    cg.quantize_(model, None, weight_bits=1)
    converted = cg.convert(model, (torch.randn(2, 512),))
    assert converted.get_buffer("1.integer_weight").nbytes * 32 == 512 * 64 * 4


def test_weights_of_several_bits_shared_and_float():
    model = nn.Sequential(cg.QReLU(4), *(nn.Linear(8, 8) for _ in range(4)))
    for i in (2, 3, 4):
        model.insert(2 * i - 2, cg.QReLU(4))
    assert [type(layer).__name__ for layer in model] == ["QReLU", "Linear"] * 4
    model[5].weight = model[3].weight
    model.eval()
    cg.quantize_(model, None, weight_bits=1, filter_fn=lambda layer, name: name == "1")
    cg.quantize_(model, None, weight_bits=4, filter_fn=lambda layer, name: name != "7")
    x = torch.randn(64, 8)
    converted = cg.convert(model, (x,))
    assert [(row.name, row.weight_bits) for row in converted.report.converted] == [
        ("1", 1), ("3", 4), ("5", 4), ("7", 8),
    ]  # fmt: skip
    assert torch.equal(converted.get_buffer("3.integer_weight"), converted.get_buffer("5.integer_weight"))
    assert parametrize.is_parametrized(model[1], "weight") and model(x).requires_grad


def test_bits_that_are_given_must_agree():
    model, x = network(2)
    for agree in (None, 2, {"4": 2}, {}):
        bits = [row.weight_bits for row in cg.convert(model, (x,), weight_bits=agree).report.converted]
        assert bits == [2, 2, 2]
    for other in (8, {"4": 1}):
        with pytest.raises(ValueError, match="weight_bits must be 2 for 4, as its QWeight has, or None, got"):
            cg.convert(model, (x,), weight_bits=other)


@pytest.mark.parametrize(
    ("channel_dim", "alphas", "why"),
    [
        (1, 1, "its QWeight has no scale for each output channel"),
        (0, 8, "its input has several steps, which the codes of its QWeight cannot take in"),
    ],
)
def test_scales_that_integers_cannot_have_stay_float(channel_dim, alphas, why):
    act = cg.QReLU(4) if alphas == 1 else cg.QReLU(4, alpha=torch.rand(8) + 0.1, num_channels=8)
    model = nn.Sequential(act, nn.Linear(8, 4)).eval()
    parametrize.register_parametrization(model[1], "weight", cg.QWeight(4, channel_dim))
    x = torch.randn(16, 8)
    converted = cg.convert(model, (x,))
    assert [(row.name, row.why) for row in converted.report.stayed][0] == ("1", why)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x))


def test_one_scale_for_a_whole_weight():
    model = nn.Sequential(cg.QReLU(4), nn.Linear(8, 4)).eval()
    parametrize.register_parametrization(model[1], "weight", cg.QWeight(2, None))
    converted = cg.convert(model, (torch.randn(16, 8),))
    assert len(converted.get_buffer("1.integer_scale").unique()) == 1


def test_a_weight_that_is_computed_from_the_quantized_one_is_rounded_anew():
    class Scaled(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight * torch.arange(1, 9), self.bias)

    model, x = nn.Sequential(cg.QReLU(4), Scaled(8, 4)).eval(), torch.randn(16, 8)
    cg.quantize_(model, None, weight_bits=1)
    converted = cg.convert(model, (x,), weight_bits=8)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=0.02, atol=0.02)


def test_the_model_is_not_changed():
    model, x = network(4)
    before = copy.deepcopy(model.state_dict())
    want = model(x)
    cg.convert(model, (x,))
    assert torch.equal(model(x), want) and model[4].parametrizations.weight[0].bits == 4
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items() if isinstance(t, torch.Tensor))
