"""quantize_: what wraps a forward, torch's own transformer layers, traced graphs, and copies of all of these."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_surgery import _as_float, qrelus
from torch import nn

import coarsegrad as cg


def halves(cls):
    """A class decorator that wraps forward, as transformers does for its experts."""
    forward = cls.forward

    @functools.wraps(forward)
    def wrapper(self, *args, scale=0.5):
        return scale * forward(self, *args)

    wrapper.calls = "attributes of the wrapper stay"
    cls.forward = wrapper
    return cls


@halves
@halves
class WrappedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return F.relu(self.linear(x))


class NoGradPart(WrappedTwice):
    @torch.no_grad()
    def part(self, x, *, shift: float = 0.5):
        """Documented."""
        return F.relu(x - shift)

    def forward(self, x):
        return self.part(x) + F.relu(self.linear(x))


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("cls", [WrappedTwice, NoGradPart])
def test_what_wraps_a_method_stays_around_it(cls, inputs):
    model, x = cls(), torch.randn(5, 4)
    want = model(x)
    report = cg.quantize_(model, 8, alpha=2**-6, example_inputs=x if inputs else None)
    got = model(x)
    assert not report.skipped and not torch.equal(got, want) and (got - want).abs().max() < 2**-4
    assert torch.equal(_as_float(copy.deepcopy(model))(x), want)
    for method in {"forward", "part"} & vars(cls).keys():
        made, before = getattr(type(model), method), getattr(cls, method)
        assert made is not before and vars(made).keys() == vars(before).keys() and made.__doc__ == before.__doc__
    assert torch.equal(model(x, scale=0.25), got / 2) if cls is WrappedTwice else True
    report.undo()
    assert torch.equal(model(x), want)


def test_experts_of_transformers_keep_their_grouped_products(monkeypatch):
    transformers = pytest.importorskip("transformers")
    from transformers.integrations import moe

    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=32, hidden_act="relu",
        experts_implementation="grouped_mm",
    )  # fmt: skip
    torch.manual_seed(0)
    model, batch = transformers.MixtralForCausalLM(config).eval(), {"input_ids": torch.randint(0, 64, (2, 8))}
    calls = []
    grouped = moe._grouped_linear
    monkeypatch.setattr(moe, "_grouped_linear", lambda *a, **k: calls.append(0) or grouped(*a, **k))
    with torch.no_grad():
        want = model(**batch).logits
        float_calls = len(calls)
        assert float_calls == 2
        cg.quantize_(model, 8, example_inputs=batch)
        calls.clear()
        model(**batch)
        assert len(calls) == float_calls
        torch.testing.assert_close(_as_float(model)(**batch).logits, want)


def encoder(activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation=activation)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("activation", ["relu", F.relu, torch.relu, nn.ReLU()], ids=["word", "F", "torch", "module"])
class TestTorchsEncoder:
    """In evaluation torch has a kernel of the whole layer, with a relu inside, and nested tensors for padding."""

    x = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(6) > 3).expand(4, 6)

    def test_no_float_kernel_runs(self, activation, inputs):
        model = encoder(activation).eval()
        report = cg.quantize_(model, 1, alpha=0.25, example_inputs=self.x if inputs else None)
        assert len(report.replaced) == 2 and not report.skipped
        levels = []
        for block in model.layers:
            block.linear2.register_forward_pre_hook(lambda _, args: levels.append(args[0].unique().tolist()))
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            levels.clear()
            with mode():
                model(self.x)
            assert levels == [[0.0, 0.25]] * 2

    def test_padding(self, activation, inputs):
        model = encoder(activation).eval()
        with torch.no_grad():
            want = model(self.x, src_key_padding_mask=self.mask)
        report = cg.quantize_(model, 8, example_inputs=self.x if inputs else None)
        cg.calibrate(model, [self.x], progress=False)
        cg.stats(model, [self.x], forward=lambda m, x: m(x, src_key_padding_mask=self.mask), progress=False)
        with torch.no_grad():
            got = model(self.x, src_key_padding_mask=self.mask)
        kept = ~self.mask
        assert 0 < (got - want)[kept].norm() < 0.05 * want[kept].norm()
        report.undo()
        with torch.no_grad():
            assert torch.equal(model(self.x, src_key_padding_mask=self.mask), want)


DECODERS = {
    "layer": lambda: nn.TransformerDecoderLayer(32, 4, 64, batch_first=True),
    "decoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2),
    "transformer": lambda: nn.Transformer(32, 4, 1, 1, 64, batch_first=True),
}


@pytest.mark.parametrize("name", DECODERS)
def test_copies_of_torchs_layers_have_the_qrelus(name):
    """Their __setstate__ puts F.relu where it finds no activation among the attributes."""
    model, x = DECODERS[name]().eval(), torch.randn(2, 5, 32)
    before = [type(m) for m in model.modules()]
    report = cg.quantize_(model, 2)
    want = model(x, x)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.optim.swa_utils.AveragedModel(model).module]
    for twin in twins:
        assert torch.equal(twin(x, x), want) and len(qrelus(twin)) == len(report.replaced)
        assert not any(callable(v) for m in twin.modules() for a, v in vars(m).items() if a == "activation")
    report.undo()
    assert [type(m) for m in model.modules()] == before


class Traced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return self.act(F.relu(self.linear(x), inplace=True).relu() - torch.relu(input=x))


def test_a_traced_graph_has_the_qrelus_and_so_have_its_copies():
    model, x = torch.fx.symbolic_trace(Traced()), torch.randn(3, 4)
    float_output, nodes = model(x), list(model.graph.nodes)
    report = cg.quantize_(model, 2)
    assert len(report.replaced) == 4 and not report.skipped
    want = model(x)
    twin = copy.deepcopy(model)
    twin.recompile()
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), twin):
        assert torch.equal(other(x), want)
    torch.testing.assert_close(_as_float(copy.deepcopy(model))(x), float_output)
    assert not cg.quantize_(model, 3).replaced
    report.undo()
    assert torch.equal(model(x), float_output) and list(model.graph.nodes) == nodes


class Capped(nn.Module):
    def forward(self, x):
        return F.relu(x).clamp(max=1.5)


class DropsOut(nn.Module):
    def forward(self, x):
        return F.dropout(F.relu(x), 0.5, self.training)


class Half(nn.Module):
    def forward(self, x):
        one, other = x.chunk(2, -1)
        return torch.cat([F.relu(one), other], -1)


class ByDimension(nn.Module):
    def forward(self, x):
        return F.relu(x) if x.dim() == 1 else x.tanh()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cls", [Capped, DropsOut, Half, ByDimension])
def test_a_module_is_replaced_whole_only_where_its_source_is_a_relu(cls, training):
    model, x = nn.Sequential(nn.Linear(4, 4), cls()).train(training), torch.randn(9, 4)
    copied = copy.deepcopy(model)
    report = cg.quantize_(model, 4)
    assert [r.name for r in report.replaced] == ["1.qrelu"]
    for mode in (False, True):
        outputs = []
        for network in (copied, _as_float(model)):
            torch.manual_seed(1)
            outputs.append(network.train(mode)(x))
        assert torch.equal(*outputs)


def test_accelerates_hooks_are_not_lost():
    accelerate = pytest.importorskip("accelerate")

    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), WrappedTwice()), torch.randn(3, 4)
    want = model(x)
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    with pytest.raises(ValueError, match="1 .ReLU.: its forward was replaced on this instance; convert before that"):
        cg.quantize_(model)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("kind, found", [(nn.SiLU, "SiLU"), (nn.GELU, "GELU")])
def test_a_network_of_another_activation_is_told_what_replace_would_do(kind, found):
    with pytest.raises(ValueError, match=rf"It has {found}: replace=\(torch.nn.{found},\).*has to be trained with it"):
        cg.quantize_(nn.Sequential(nn.Linear(2, 2), kind()))
