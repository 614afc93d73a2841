"""`quantize_` of torchao with our configuration is our `quantize_` and `convert`, to the bit. With torchao 0.18.0."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from packing_cases import assert_same
from torch import nn

import coarsegrad as cg

torchao = pytest.importorskip("torchao.quantization", reason="torchao is of the extra peers")
from block_models import llama  # noqa: E402
from transformer_models import built, gradients  # noqa: E402

from coarsegrad.integrations.torchao import StaircaseConfig, whole_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Relus(nn.Module):
    """As modules, and a call in a method."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def two(seed=0):
    torch.manual_seed(seed)
    model = Relus()
    return model, copy.deepcopy(model)


def relus(module, name):
    return isinstance(module, nn.ReLU)


def test_prepare_and_convert_the_whole_model():
    model, want = two()
    prepare = StaircaseConfig(bits=2, learn_alpha=True, weight_bits=4)
    torchao.quantize_(model, prepare, filter_fn=whole_model)
    cg.quantize_(want, bits=2, learn_alpha=True, weight_bits=4)
    for each in (model, want):
        cg.calibrate(each, [X], progress=False)
        each(X).square().sum().backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in want.named_parameters()})
    assert len(prepare.reports[0].replaced) == 2 and torch.equal(model(X), want(X))

    model.eval(), want.eval()
    step = StaircaseConfig(step="convert", example_inputs=(X,))
    torchao.quantize_(model, step, filter_fn=whole_model)
    integers = cg.convert(want, (X,))
    assert torch.equal(model(X), integers(X)) and len(model.report.converted) == 2
    assert model.state_dict().keys() == integers.state_dict().keys()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(X), integers(X))


def test_undo():
    model, want = two()
    config = StaircaseConfig(bits=2)
    torchao.quantize_(model, config, filter_fn=whole_model)
    config.reports[0].undo()
    assert torch.equal(model(X), want(X))

    alone = StaircaseConfig(bits=2)
    torchao.quantize_(model, alone, filter_fn=relus)
    assert type(model.first[1]) is cg.QReLU
    alone.reports[0].undo()
    assert type(model.first[1]) is nn.ReLU and torch.equal(model(X), want(X))


def test_a_transformer():
    model, batch = built(llama)
    want = copy.deepcopy(model)
    arguments = {"bits": None, "inputs": 4, "gates": 8, "attention": 8, "norms": "coarse"}
    torchao.quantize_(model, StaircaseConfig(**arguments), filter_fn=whole_model)
    cg.quantize_(want, **arguments)
    assert_same(gradients(model, batch), gradients(want, batch))


def test_parts_of_a_model():
    """A block, by name and by filter; activations one by one; and layers, for their weights."""
    model, want = two()
    torchao.quantize_(model, torchao.FqnToConfig({"first": StaircaseConfig(bits=3)}), filter_fn=None)
    cg.quantize_(want.first, bits=3)
    assert torch.equal(model(X), want(X))
    model.first.eval()
    step = StaircaseConfig(step="convert", example_inputs=(X,), weight_bits=4)
    torchao.quantize_(model, step, filter_fn=lambda module, name: name == "first")
    want.first = cg.convert(want.first.eval(), (X,), weight_bits=4)
    assert torch.equal(model(X), want(X))

    model, want = two()
    torchao.quantize_(model, StaircaseConfig(bits=3), filter_fn=relus)
    cg.quantize_(want.first, bits=3)
    assert torch.equal(model(X), want(X))

    model, want = two()
    torchao.quantize_(model, StaircaseConfig(bits=None, weight_bits=2))
    cg.quantize_(want, bits=None, weight_bits=2)
    assert torch.equal(model(X), want(X))


def test_mistakes():
    with pytest.raises(ValueError, match="unknown step 'train', must be one of 'prepare', 'convert'"):
        StaircaseConfig(step="train")
    with pytest.raises(ValueError, match="bits must be an int in 1..8, got 9"):
        StaircaseConfig(bits=9)
    with pytest.raises(TypeError, match="arguments of step 'convert' must be those of convert: missing .*example_in"):
        StaircaseConfig(step="convert")
    with pytest.raises(TypeError, match="must be those of convert: got an unexpected keyword argument 'bits'"):
        StaircaseConfig(step="convert", bits=2, example_inputs=(X,))
    with pytest.raises(ValueError, match="filter_fn must select modules with activations inside .*got a Linear: pass"):
        torchao.quantize_(two()[0], StaircaseConfig(bits=2))
    assert repr(StaircaseConfig(bits=2)) == "StaircaseConfig(step='prepare', bits=2)"
