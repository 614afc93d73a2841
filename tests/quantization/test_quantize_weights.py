"""quantize_(weight_bits=...): report, undo, shared weights and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantized_layers import mlp, original, put_on
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import coarsegrad as cg

# ------------------------------------------------------------------------------------------- quantize_


def test_bits_of_activations_and_weights():
    model = mlp()
    report = cg.quantize_(model, bits=4, weight_bits=2)
    assert [(w.name, w.what, w.shape, w.bits, w.scales) for w in report.weights] == [
        ("0", "Linear", (16, 8), 2, 16),
        ("2", "Linear", (16, 16), 2, 16),
        ("4", "Linear", (4, 16), 2, 4),
    ]
    assert len(report.replaced) == 2 and "2 replaced, 0 not replaced, 3 weights quantized" in str(report)
    assert ["2", "Linear", "[16,", "16]", "2", "16"] in [line.split() for line in str(report).splitlines()]


def test_weights_alone():
    model = mlp()
    report = cg.quantize_(model, None, weight_bits=2)
    assert isinstance(model[1], nn.ReLU) and not report.replaced and "Only the source" not in str(report)
    no_relu = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    assert len(cg.quantize_(no_relu, weight_bits=8).weights) == 1


@pytest.mark.parametrize("training", [True, False])
def test_it_keeps_the_mode(training):
    model = mlp().train(training)
    cg.quantize_(model, None, weight_bits=2)
    assert {module.training for module in model.modules()} == {training}


def test_a_filter_and_several_calls():
    model = mlp()
    cg.quantize_(model, None, weight_bits=8, filter_fn=lambda layer, name: name in ("0", "4"))
    report = cg.quantize_(model, None, weight_bits=1)
    assert [w.name for w in report.weights] == ["2"]
    assert [(s.name, s.why) for s in report.skipped] == [(n, "its weight has 8 bits already") for n in ("0", "4")]
    assert [model[i].parametrizations.weight[0].bits for i in (0, 2, 4)] == [8, 1, 8]
    with pytest.raises(ValueError, match=r"weight_bits: model has no .*Skipped: 0 \(ParametrizedLinear\): its weight"):
        cg.quantize_(model, None, weight_bits=4)


def test_undo_restores_parameters_as_trained():
    class Block(nn.Linear):
        def forward(self, x):
            return F.relu(super().forward(x))

    model = nn.Sequential(Block(8, 8), nn.Conv1d(4, 4, 3), Block(6, 6, bias=False))
    names, parameters = zip(*model.named_parameters())
    report = cg.quantize_(model, 4, weight_bits=2)
    assert len(report.replaced) == 2 and len(report.weights) == 3
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1)
    want = [parameter.detach().clone() for parameter in parameters]
    report.undo()
    assert [n for n, _ in model.named_parameters()] == list(names)
    assert all(map(torch.equal, model.parameters(), want))
    assert all(now is before for now, before in zip(model.parameters(), parameters))
    assert [type(layer) for layer in model] == [Block, nn.Conv1d, Block]
    assert not any("parametrizations" in name for name, _ in model.named_modules())
    cg.quantize_(model, 4, weight_bits=2)


def test_undo_after_somebody_else_changed_a_layer():
    model = mlp()
    report = cg.quantize_(model, None, weight_bits=2)
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    with pytest.raises(RuntimeError, match="ParametrizedLinear has more parametrizations than its QWeight"):
        report.undo()
    parametrize.remove_parametrizations(model[0], "bias")
    parametrize.remove_parametrizations(model[4], "weight")
    with pytest.raises(RuntimeError, match="another class, Linear"):
        report.undo()
    assert parametrize.is_parametrized(model[0], "weight")


def test_an_error_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="weight_bits: 2 must have no parametrization, got one of its weight"):
        cg.quantize_(model, 4, weight_bits=2)
    assert type(model[0]) is nn.Linear and type(model[1]) is nn.ReLU
    cg.quantize_(model, 4, weight_bits=2, filter_fn=lambda layer, name: name != "2")
    assert not isinstance(model[2].parametrizations.weight[0], cg.QWeight)


def test_weights_are_rotated_before_they_are_quantized():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    weights = [layer.weight.detach().clone() for layer in model]
    report = cg.quantize_(model, inputs={"bits": 8, "rotation": 64}, weight_bits=4)
    for layer, weight in zip(model, weights):
        assert torch.equal(layer.weight, cg.qweight(cg.hadamard(weight, 64), 4))
    report.undo()
    for layer, weight in zip(model, weights):
        torch.testing.assert_close(layer.weight.detach(), weight)


def test_rotations_of_quantized_layers_rotate_the_float_weight():
    model = nn.Sequential(nn.Linear(64, 64))
    weight = model[0].weight.detach().clone()
    first = cg.quantize_(model, None, weight_bits=4)
    second = cg.quantize_(model, inputs={"bits": 8, "rotation": 64})
    assert torch.equal(original(model[0]), cg.hadamard(weight, 64))
    first.undo()
    second.undo()
    torch.testing.assert_close(model[0].weight.detach(), weight)
    layer = put_on(nn.Linear(64, 4), 4)
    weight = original(layer).detach().clone()
    cg.rotate_weight_(layer, 64)
    assert torch.equal(original(layer), cg.hadamard(weight, 64))
    with pytest.raises(ValueError, match="layer must have a weight that is a parameter"):
        cg.rotate_weight_(parametrizations.weight_norm(nn.Linear(64, 4)), 64)


# ------------------------------------------------------------------------------------------ shared weights


class Tied(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.other, self.hidden, self.head = other, nn.Linear(8, 8), nn.Linear(8, 16)
        self.head.weight = other.weight

    def forward(self, x):
        return self.head(self.hidden(self.other(x)))


def test_a_weight_shared_with_an_embedding_stays_float():
    model = Tied(nn.Embedding(16, 8))
    report = cg.quantize_(model, None, weight_bits=2)
    assert [w.name for w in report.weights] == ["hidden"]
    assert [(s.name, s.why) for s in report.skipped] == [("head", "its weight is that of the embedding other too")]
    assert model.head.weight is model.other.weight


def test_layers_that_share_a_weight_share_its_quantized_value():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    model, x = nn.Sequential(first, second), torch.randn(3, 6)
    w = first.weight
    report = cg.quantize_(model, None, weight_bits=2)
    assert original(first) is original(second) is w
    assert torch.equal(first.weight, second.weight) and torch.equal(first.weight, cg.qweight(w, 2))
    model(x).sum().backward()
    assert sum(1 for _ in model.parameters()) == 3 and w.grad is not None
    report.undo()
    assert first.weight is second.weight is w


def test_a_weight_that_one_of_its_modules_would_have_in_floats_is_an_error():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    with pytest.raises(ValueError, match="weight_bits: the weight of 0 is 1.weight too, .* filter_fn"):
        cg.quantize_(model, None, weight_bits=2, filter_fn=lambda layer, name: name == "0")
    transposed = nn.ConvTranspose1d(6, 6, 1)
    conv = nn.Conv1d(6, 6, 1)
    transposed.weight = conv.weight
    with pytest.raises(ValueError, match="weight_bits: the weight of 0 is 1.weight too"):
        cg.quantize_(nn.Sequential(conv, transposed), None, weight_bits=2)
    norm = nn.LayerNorm(6, elementwise_affine=False)
    norm.extra = first.weight
    with pytest.raises(ValueError, match="weight_bits: the weight of 0 is 1.extra too"):
        cg.quantize_(nn.Sequential(first, norm), None, weight_bits=2)
    assert type(first) is nn.Linear


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [3, 0, "4", True, 16, 2.0])
def test_bad_bits(bad):
    model = mlp()
    with pytest.raises((TypeError, ValueError), match=r"weight_bits must be one of 8, 4, 2, 1, got"):
        cg.quantize_(model, 4, weight_bits=bad)
    assert isinstance(model[1], nn.ReLU)
    with pytest.raises((TypeError, ValueError), match="^bits must be"):
        cg.QWeight(bad)


def test_bad_arguments():
    with pytest.raises(TypeError, match="channel_dim must be an int or None, got '0'"):
        cg.QWeight(2, "0")
    with pytest.raises(ValueError, match="groups must be an int >= 1, got 0"):
        cg.QWeight(2, 1, groups=0)
    with pytest.raises(ValueError, match="groups must be 1 unless channel_dim is 1, got 2 and channel_dim=0"):
        cg.QWeight(2, groups=2)
    with pytest.raises(ValueError, match="unknown ste 'relu', must be one of 'identity', 'clipped', 'trust'"):
        cg.QWeight(2, ste="relu")
    with pytest.raises(ValueError, match="unknown weight_ste 'relu', must be one of 'identity', 'clipped', 'trust'"):
        cg.quantize_(mlp(), weight_bits=2, weight_ste="relu")
    with pytest.raises(TypeError, match="weight_ste needs weight_bits, got 'trust' without"):
        cg.quantize_(mlp(), weight_ste="trust")
    with pytest.raises(ValueError, match="channel_dim must be a dimension"):
        put_on(nn.Linear(4, 4), 2, channel_dim=2)
    with pytest.raises(TypeError, match="bits must be 1..8 with arguments for QReLUs, got None"):
        cg.quantize_(mlp(), None, weight_bits=2, learn_alpha=True)
    with pytest.raises(ValueError, match="bits, weight_bits, inputs, gates, attention or norms must be given"):
        cg.quantize_(mlp(), None)


def test_what_has_no_weight_to_quantize_is_listed():
    old = nn.Linear(4, 4)
    torch.nn.utils.weight_norm(old)
    whole = nn.Linear(4, 4)
    whole.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    model = nn.Sequential(nn.LazyLinear(4), old, whole, nn.Linear(4, 4))
    report = cg.quantize_(model, None, weight_bits=2)
    assert [w.name for w in report.weights] == ["3"]
    assert [(s.name, s.why) for s in report.skipped] == [
        ("0", "it is not initialized"),
        ("1", "its weight is not a parameter"),
        ("2", "its weight is not a dense tensor of floats"),
    ]


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    report = cg.quantize_(model, None, weight_bits=4)
    assert {(w.what, w.scales) for w in report.weights} == {("Conv1D", 48), ("Conv1D", 16), ("Conv1D", 64)}
    assert [(s.name, s.why) for s in report.skipped] == [
        ("lm_head", "its weight is that of the embedding transformer.wte too")
    ]
    layer = model.transformer.h[0].attn.c_attn
    assert torch.equal(layer.weight, cg.qweight(original(layer), 4, channel_dim=1))
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    settings = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**settings, num_attention_heads=2, tie_word_embeddings=False)
    )
    report = cg.quantize_(llama, None, weight_bits=2)
    assert len(report.weights) == 7
    assert [(s.name, s.why) for s in report.skipped] == [("lm_head", "it is the output embedding of a language model")]
