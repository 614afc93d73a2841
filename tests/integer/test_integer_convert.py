"""`convert`: whole networks against the network with rounded weights in float64, and what it reports and refuses."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import coarsegrad as cg
from coarsegrad.backends import info
from coarsegrad.experiments.models import lenet5, resnet14
from coarsegrad.integer import ops as integer_ops
from coarsegrad.integer import round_weights

WEIGHT_BITS = (8, 4, 2, 1)


def settled(model, x):
    """In evaluation mode, with statistics of x and gains of both signs in every BatchNorm."""
    torch.manual_seed(len(list(model.modules())))
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
    model.train()
    with torch.no_grad():
        for _ in range(10):
            model(x)
    return model.eval()


def simulated(model, weight_bits, names):
    """The model in float64 with the layers of these names rounded to integers times a scale."""
    model = copy.deepcopy(model).double()
    for name in names:
        layer = model.get_submodule(name)
        layer.weight.data = round_weights(layer.weight, weight_bits)
    return model


def check(model, x, weight_bits=8, layers=None):
    """Converts the model, which starts with a QReLU, and compares with the simulated one; returns the converted one."""
    converted = cg.convert(model, (x,), weight_bits=weight_bits)
    names = [row.name for row in converted.report.converted]
    if layers is not None:
        assert [(row.name, row.output) for row in converted.report.converted] == layers
    with torch.no_grad():
        wanted = simulated(model, weight_bits, names)(x.double())
        got = converted(x)
    assert got.dtype == x.dtype and got.stride() == model(x).stride()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    return converted


def mlp():
    return nn.Sequential(
        cg.QReLU(4), nn.Linear(20, 33), nn.BatchNorm1d(33), cg.QReLU(3, rounding="nearest"), nn.Dropout(),
        nn.Linear(33, 17, bias=False), cg.QReLU(2, rounding="hwgq"), nn.Linear(17, 5),
    )  # fmt: skip


def depthwise():
    return nn.Sequential(
        cg.QReLU(4), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), cg.QReLU(4),
        nn.Conv2d(6, 10, 1), cg.QReLU(4), nn.Conv2d(10, 4, 3, stride=2, dilation=2, padding="valid", groups=2),
    )  # fmt: skip


@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
def test_mlp(weight_bits):
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))
    check(settled(mlp(), x), x, weight_bits, [("1", "codes"), ("5", "codes"), ("7", "float")])


@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
def test_lenet(weight_bits):
    torch.manual_seed(2)
    model = lenet5(lambda: cg.QReLU(4, rounding="nearest"))[2:]
    x = torch.randn(8, 20, 24, 24)
    check(settled(model, x), x, weight_bits, [("conv2", "codes"), ("fc1", "codes"), ("fc2", "float")])


def test_residual_network():
    torch.manual_seed(3)
    model = resnet14(lambda: cg.QReLU(4))[2:7]
    x = torch.randn(4, 16, 6, 6)
    converted = check(settled(model, x), x)
    assert [row.output for row in converted.report.converted][:2] == ["codes", "float"]
    assert ("3", "reads codes of 2 as floats") in [(row.name, row.why) for row in converted.report.stayed]


@pytest.mark.parametrize("weight_bits", (8, 1))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_depthwise_and_grouped(memory_format, weight_bits):
    torch.manual_seed(4)
    x = torch.randn(3, 6, 9, 8).contiguous(memory_format=memory_format)
    check(settled(depthwise(), x), x, weight_bits, [("1", "codes"), ("4", "codes"), ("6", "float")])


class Moves(nn.Module):
    """Codes go through everything that moves them."""

    def __init__(self):
        super().__init__()
        self.act, self.act2, self.act3 = cg.QReLU(3), cg.QReLU(3), cg.QReLU(3)
        self.conv, self.conv1d, self.same = nn.Conv2d(4, 8, 3), nn.Conv1d(8, 6, 3), nn.Conv2d(6, 4, 2, padding="same")
        self.linear = nn.Linear(16, 3)

    def forward(self, x):
        y = F.pad(self.act(x), (1, 1, 2, 0)).transpose(2, 3).flip(2)
        y = F.max_pool2d(self.conv(y), 2)  # a maximum before the staircase
        y = F.max_pool1d(self.act2(y).flatten(2), 2).contiguous()
        first, second = self.act3(self.conv1d(y)).chunk(2, dim=1)
        y = torch.cat([second, first], 1)[..., :8].reshape(-1, 6, 2, 4)
        y = F.relu(self.same(y)) + 1
        return self.linear(self.act(y).permute(0, 2, 3, 1)[:, :, :2].flatten(1))


def test_moves():
    torch.manual_seed(5)
    x = torch.randn(2, 4, 9, 12)
    check(Moves().eval(), x, 8, [("conv", "codes"), ("conv1d", "codes"), ("same", "float"), ("linear", "float")])


class PerChannel(nn.Module):
    """An alpha for each channel goes into the weights of the layer that reads it, also after flatten and cat."""

    def __init__(self):
        super().__init__()
        alpha = torch.tensor([0.2, 0.3, 0.5])
        self.act = cg.QReLU(4, alpha=alpha, num_channels=3)
        self.conv = nn.Conv2d(3, 3, 3, groups=3, padding=1)
        self.act2 = cg.QReLU(4, alpha=alpha.flip(0), num_channels=3)
        self.act3 = cg.QReLU(2, alpha=0.7)
        self.linear = nn.Linear(6 * 2 * 3, 4)

    def forward(self, x):
        y = self.act2(self.conv(self.act(x)))
        y = torch.cat([y, self.act3(x)], 1)
        return self.linear(F.max_pool2d(y, 2).flatten(1))


def test_alpha_per_channel():
    torch.manual_seed(6)
    x = torch.randn(5, 3, 4, 6)
    model = PerChannel().eval()
    converted = cg.convert(model, (x,))
    assert [(row.name, row.output) for row in converted.report.converted] == [("conv", "codes"), ("linear", "float")]
    expected = copy.deepcopy(model).double()
    of_conv = model.act.alpha.view(3, 1, 1, 1)
    of_linear = torch.cat([model.act2.alpha, model.act3.alpha.expand(3)]).repeat_interleave(6)
    for layer, alpha in ((expected.conv, of_conv), (expected.linear, of_linear)):
        layer.weight.data = round_weights(layer.weight.detach() * alpha.double(), 8) / alpha.double()
    with torch.no_grad():
        torch.testing.assert_close(converted(x).double(), expected(x.double()), rtol=1e-5, atol=1e-5)


def test_alpha_of_a_dimension_that_is_summed_over_stays_float():
    model = nn.Sequential(cg.QReLU(4, alpha=torch.rand(5) + 0.1, num_channels=5), nn.Linear(7, 3)).eval()
    report = cg.convert(model, (torch.randn(2, 5, 7),)).report
    assert report.converted == []
    assert report.stayed[0].why == "the alpha of its input is not one for each input channel"


class Reads(nn.Module):
    """Codes that floats read too, a layer that is called twice, and fused and in-place forms."""

    def __init__(self):
        super().__init__()
        self.act = cg.QReLU(4, inplace=True)
        self.twice = nn.Linear(6, 6)
        self.fused = cg.nn.QReLULinear(cg.QReLU(3), nn.Linear(6, 4))

    def forward(self, x):
        y = self.act(x * 2)
        z = self.twice(y)
        z = self.twice(self.act(z + 0.5)) + y
        return self.fused(z), y.mean(1)


def test_layers_called_twice_fused_and_in_place():
    torch.manual_seed(7)
    x = torch.randn(9, 6)
    model = Reads().eval()
    converted = cg.convert(model, (x,))
    names = [row.name for row in converted.report.converted]
    assert names == ["twice", "twice", "fused.layer"]
    with torch.no_grad():
        got, wanted = converted(x), simulated(model, 8, sorted(set(names)))(x.double())
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_original_is_unchanged_and_shares_nothing():
    x = torch.randn(4, 20)
    model = settled(mlp(), x)
    before, wanted = copy.deepcopy(model.state_dict()), model(x)
    converted = cg.convert(model, (x,))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values()) if isinstance(a, torch.Tensor)
    )
    assert torch.equal(model(x), wanted)
    ours = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not ours & {t.data_ptr() for t in (*converted.parameters(), *converted.buffers()) if t.numel()}
    assert not any(p.requires_grad for p in converted.parameters())


@pytest.fixture(scope="module")
def small():
    """(x, model, converted)"""
    torch.manual_seed(8)
    x = torch.randn(6, 2, 5, 5)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        cg.QReLU(4),
        nn.Conv2d(4, 6, 3),
        cg.QReLU(2),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    model = settled(model, x)
    return x, model, cg.convert(model, (x[:1],))


def test_any_batch_size(small):
    x, _, converted = small
    y = converted(x)
    for n in (0, 1, 5):
        assert torch.equal(converted(x[:n]), y[:n])


def test_other_sizes_are_refused(small):
    _, _, converted = small
    with pytest.raises(
        ValueError, match=r"input must have shape \[\*, 2, 5, 5\], as in example_inputs, got \[1, 2, 6, 5\]"
    ):
        converted(torch.zeros(1, 2, 6, 5))


def test_report(small):
    report = small[2].report
    assert str(report).splitlines()[2:5] == [
        "3              conv2d [6, 4, 3, 3]  8            codes",
        "6              linear [3, 6]        8            float",
        "",
    ]
    assert [(row.name, row.what, row.why) for row in report.stayed] == [
        ("0", "conv2d of Conv2d", "reads an input of the model, not codes")
    ]
    assert report.integer_bytes == 6 * 64 + 3 * 32 + 9 * 2 * 4
    assert report.float_bytes == 4 * (6 * 36 + 6 + 3 * 6 + 3)


def test_the_report_says_which_kernels_run(small, monkeypatch):
    report = small[2].report
    for kernels, words in (
        ("native", "On cpu they run on native kernels."),
        (None, "On cpu they run in plain torch: "),
    ):
        monkeypatch.setattr(integer_ops, "serving", {"cpu": kernels} if kernels else {})
        assert str(report).splitlines()[-1].startswith(words)
        assert (kernels or "plain torch") in next(row for row in info().splitlines() if "integer" in row)
    assert integer_ops.integer_kernels("meta") == "reference"


def test_the_first_conversion_without_compiled_kernels_warns(small, monkeypatch):
    x, model, _ = small
    monkeypatch.setattr(integer_ops._ops, "native_switched_off", False)
    monkeypatch.setattr(integer_ops, "_warned_devices", set())
    monkeypatch.setattr(integer_ops, "serving", {"cpu": "native"})

    def caught(net):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            cg.convert(net, (x,))
        return [str(w.message) for w in found if "integer layers" in str(w.message)]

    assert caught(model) == []
    monkeypatch.setattr(integer_ops, "serving", {})
    assert caught(nn.Sequential(*model[:3], nn.Flatten()).eval()) == []  # no integer layer
    (message,) = caught(model)
    assert message.startswith("on cpu integer layers run in plain torch, which is exact but slower than floats; ")
    assert caught(model) == []


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, as it copies the specification of a graph's inputs
def test_copies_and_files(small, tmp_path):
    x, model, converted = small
    y = converted(x)
    copied = copy.deepcopy(converted)
    assert torch.equal(copied(x), y) and str(copied.report) == str(converted.report)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), y) and str(loaded.report) == str(converted.report)
    other = cg.convert(settled(copy.deepcopy(model), x + 1), (x,))
    assert not torch.equal(other(x), y)
    other.load_state_dict(converted.state_dict())
    assert torch.equal(other(x), y)
    copied.train()
    assert torch.equal(copied(x), y)


class _Sum(nn.Module):
    """Of two branches, whose alphas are in the graph."""

    def __init__(self, bits=2, alphas=(0.75, 0.75), rounding="ceil"):
        super().__init__()
        torch.manual_seed(0)
        self.i, self.j, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.q, self.p = (cg.QReLU(bits, alpha=alpha, rounding=rounding) for alpha in alphas)

    def forward(self, x):
        return self.o(self.q(self.i(x)) + self.p(self.j(x)))


def test_a_state_of_other_integers_is_refused():
    x = torch.randn(4, 6)
    made = {
        name: cg.convert(_Sum(**settings).eval(), (x,), weight_bits=weight_bits)
        for name, settings, weight_bits in (
            ("as it is", {}, 8), ("alphas", {"alphas": (0.5, 1.0)}, 8), ("bits", {"bits": 4}, 8),
            ("rounding", {"rounding": "nearest"}, 8), ("weights", {}, 4),
        )
    }  # fmt: skip
    state = made.pop("as it is").state_dict()
    for name, other in made.items():
        with pytest.raises(RuntimeError, match="converted with other bits, roundings, weight_bits or alphas"):
            other.load_state_dict(state)
        assert other(x).isfinite().all(), name
    again = cg.convert(_Sum().eval(), (x,))
    again.load_state_dict(state)
    del state["input_shapes._extra_state"]  # as older files
    again.load_state_dict(state)


def test_a_model_that_is_wrapped_is_refused_and_one_without_integers_warns():
    model, x = _Sum().eval(), torch.randn(4, 6)
    for wrapped, inner in ((torch.compile(model), "_orig_mod"), (nn.DataParallel(model), "module")):
        with pytest.raises(ValueError, match=rf"got a \w+: pass model\.{inner}"):
            cg.convert(wrapped.eval(), (x,))
    with pytest.warns(UserWarning, match="no layer became integer"):
        converted = cg.convert(_Sum(alphas=(0.75, 0.7500001)).eval(), (x,))
    assert "give the summands alphas with a common unit" in str(converted.report)


def test_export_and_compile(small):
    x, _, converted = small
    y = converted(x)
    program = torch.export.export(converted, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert torch.equal(program.module()(x[:3]), y[:3])
    assert torch.equal(torch.compile(converted, backend="aot_eager", fullgraph=True)(x), y)


def test_weight_bits_by_name(small):
    x, model, _ = small
    report = cg.convert(model, (x,), weight_bits={"3": 4}).report
    assert [(row.name, row.weight_bits) for row in report.converted] == [("3", 4), ("6", 8)]


def test_packed_activations_do_not_matter(small):
    x, model, converted = small
    packed = copy.deepcopy(model)
    cg.pack_activations_(packed)
    assert torch.equal(cg.convert(packed, (x,))(x), converted(x))


def test_half_precision_models_keep_their_dtype():
    torch.manual_seed(9)
    x = torch.randn(6, 20)
    model = settled(mlp(), x).bfloat16()
    got = cg.convert(model, (x.bfloat16(),))(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, simulated(model, 8, ["1", "5", "7"])(x.bfloat16().double()).bfloat16())


def test_quantized_and_trained_by_others():
    """What `quantize_` made of a model is converted like a model that was written with QReLUs."""
    torch.manual_seed(10)
    x = torch.randn(4, 20)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    cg.quantize_(model, bits=4)
    report = cg.convert(model.eval(), (x,)).report
    assert [(row.name, row.output) for row in report.converted] == [("2", "codes"), ("4", "float")]


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_refusals(small):
    x, model, converted = small
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        cg.convert(F.relu, (x,))
    with pytest.raises(ValueError, match="but it is in training mode"):
        cg.convert(copy.deepcopy(model).train(), (x,))
    with pytest.raises(ValueError, match="but 1 is in training mode"):
        partly = copy.deepcopy(model)
        partly[1].train()
        cg.convert(partly, (x,))
    with pytest.raises(ValueError, match="model must have a QReLU that runs on example_inputs"):
        cg.convert(nn.Linear(5, 3).eval(), (x,))
    with pytest.raises(ValueError, match="model is converted already"):
        cg.convert(converted, (x,))
    with pytest.raises(ValueError, match="model is converted already"):
        cg.convert(nn.Sequential(copy.deepcopy(converted), cg.QReLU(4)).eval(), (x,))
    with pytest.raises(ValueError, match="model cannot be exported by torch.export: "):
        cg.convert(nn.Sequential(cg.QReLU(4), Branches()).eval(), (x,))


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    (
        (lambda x: x, TypeError, "example_inputs must be a tuple of arguments, got Tensor"),
        (lambda x: [x], TypeError, "example_inputs must be a tuple of arguments, got list"),
        (lambda x: (x[:0],), ValueError, "example_inputs must hold at least one example, got an empty tensor"),
        (lambda x: (x.to("meta"),), ValueError, "example_inputs must hold values, got a tensor on the meta device"),
        (lambda x: (), ValueError, "model must run on example_inputs: TypeError: .*missing"),
        (lambda x: (x, x), ValueError, "model must run on example_inputs: TypeError: "),
        (lambda x: (x[:, :1],), ValueError, "model must run on example_inputs: RuntimeError: .*channels"),
        (lambda x: (x.double(),), ValueError, "model must run on example_inputs: RuntimeError: "),
    ),
)
def test_wrong_example_inputs(small, inputs, error, words):
    x, model, _ = small
    with pytest.raises(error, match=words):
        cg.convert(model, inputs(x))


@pytest.mark.parametrize(
    ("weight_bits", "words"),
    (
        (3, "weight_bits must be one of 8, 4, 2, 1, got 3"),
        ("8", "weight_bits must be one of 8, 4, 2, 1, got '8'"),
        (True, "weight_bits must be one of 8, 4, 2, 1, got True"),
        ([8], r"weight_bits must be one of 8, 4, 2, 1, got \[8\]"),
        ({"3": 16}, "weight_bits must be one of 8, 4, 2, 1, got 16"),
        ({"4": 4}, r"weight_bits must name layers of \['0', '3', '6'\], got \['4'\]"),
        ({3: 4, "x": 8}, r"weight_bits must name layers of \['0', '3', '6'\], got \[3, 'x'\]"),
    ),
    ids=repr,
)
def test_wrong_weight_bits(small, weight_bits, words):
    x, model, _ = small
    with pytest.raises(ValueError, match=words):
        cg.convert(model, (x,), weight_bits=weight_bits)


def test_wrong_alphas_and_devices(small):
    x, model, _ = small
    for value in (float("nan"), float("inf"), 0.0, -1.0):
        broken = copy.deepcopy(model)
        broken[2].alpha.fill_(value)
        with pytest.raises(ValueError, match="model must run on example_inputs: .* alpha must be finite and > 0"):
            cg.convert(broken, (x,))
    with pytest.raises(ValueError, match="model must hold values, but 0.weight is on the meta device"):
        cg.convert(copy.deepcopy(model).to("meta"), (x,))
    broken = copy.deepcopy(model)
    broken[4].to("meta")
    with pytest.raises(ValueError, match="model must hold values, but 4.alpha is on the meta device"):
        cg.convert(broken, (x,))

    class Elsewhere(nn.Sequential):
        def forward(self, x):
            return self[6](cg.qrelu(self[0](x).flatten(1)[:, :6], torch.ones(1, device="meta"), 4))

    with pytest.raises(ValueError, match="model must run on example_inputs: .* alpha must be on the device of x, cpu"):
        cg.convert(Elsewhere(*copy.deepcopy(model)).eval(), (x,))


def test_layers_that_cannot_be_converted_are_named():
    model = nn.Sequential(
        cg.QReLU(4), nn.ConvTranspose2d(2, 3, 3), cg.QReLU(4), nn.GELU(), nn.Conv2d(3, 2, 1), cg.QReLU(4),
        nn.Conv2d(2, 2, 1),
    ).eval()  # fmt: skip
    model[6].weight.data[0] = float("nan")
    report = cg.convert(model, (torch.randn(2, 2, 6, 6),)).report
    assert report.converted == []
    assert {row.name: row.why for row in report.stayed} == {
        "0": "no layer reads it as codes",
        "2": "no layer reads it as codes",
        "4": "reads gelu of GELU, not codes",
        "5": "no layer reads it as codes",
        "6": "its parameters are not all finite",
    }
