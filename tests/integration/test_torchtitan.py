"""A model that torchtitan builds from a converted config is the float model after `quantize_`, to the bit."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from packing_cases import assert_same
from torch import nn

import coarsegrad as cg

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------------------------------------ a stand-in


class Configurable:
    """As in torchtitan: what is made from its Config by `build`."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[type | None] = None

        def build(self, **kwargs):
            return self._owner(config=dataclasses.replace(self), **kwargs)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "Config" in vars(cls):
            assert "__slots__" in vars(cls.Config) and all(f.kw_only for f in dataclasses.fields(cls.Config))
            cls.Config._owner = cls


class ModelConfigConverter(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass


class Module(nn.Module, Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass


class Linear(nn.Linear, Module):
    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        in_features: int
        out_features: int

    def __init__(self, config):
        super().__init__(config.in_features, config.out_features)


class Norm(nn.RMSNorm, Module):
    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        size: int

    def __init__(self, config):
        super().__init__(config.size)


class Model(Module):
    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        norm: Norm.Config
        first: Linear.Config
        last: Linear.Config

    def __init__(self, config):
        super().__init__()
        self.norm, self.first, self.last = config.norm.build(), config.first.build(), config.last.build()

    def forward(self, x):
        return self.last(nn.functional.silu(self.first(self.norm(x))))


def config():
    sizes = {"first": (16, 24), "last": (24, 4)}
    layers = {name: Linear.Config(in_features=i, out_features=o) for name, (i, o) in sizes.items()}
    return Model.Config(norm=Norm.Config(size=16), **layers)


@pytest.fixture
def converter(monkeypatch):
    """StaircaseConverter on top of the stand-in, and of no other torchtitan."""
    stand_in = types.ModuleType("torchtitan.protocols.model")
    stand_in.ModelConfigConverter = ModelConfigConverter
    for name in ("torchtitan", "torchtitan.protocols"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.delitem(sys.modules, "coarsegrad.integrations.torchtitan", raising=False)
    yield importlib.import_module("coarsegrad.integrations.torchtitan").StaircaseConverter
    sys.modules.pop("coarsegrad.integrations.torchtitan")


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("pack", [False, True])
def test_built_on_meta_it_is_the_float_model_after_quantize(converter, pack):
    model_config = config()
    # torchtitan replaces configs, and sets fields of them, before it builds the model
    converted = dataclasses.replace(
        converter.Config(inputs={"bits": 4, "group": 8}, norms="coarse", pack=pack).build().convert(model_config)
    )
    with torch.device("meta"):
        model = converted.build()
    want, x = model_config.build(), torch.randn(5, 16)
    assert isinstance(model, Model) and all(isinstance(module, Module) for module in model.modules())
    assert isinstance(converted, Model.Config) and type(converted).__qualname__ == "Model.Config"
    model.to_empty(device="cpu")
    model.load_state_dict(want.state_dict())
    float_output = want(x)
    cg.quantize_(want, bits=None, inputs={"bits": 4, "group": 8}, norms="coarse")
    assert_same(gradients(model, x), gradients(want, x))
    saved = cg.saved_memory(model, x).total
    assert saved < cg.saved_memory(want, x).total if pack else saved == cg.saved_memory(want, x).total
    assert torch.equal(model_config.build()(x).isfinite(), float_output.isfinite())
    assert cg.saved_memory(model_config.build(), x).total > saved  # the given config is not changed


def test_mistakes(converter):
    with pytest.raises(ValueError, match="bits"):
        converter.Config(inputs=9).build()
    with pytest.raises(ValueError, match="norms"):
        converter.Config(norms="fine").build()
    made = converter.Config().build()
    with pytest.raises(TypeError, match="model_config must be of a model without staircases, got one that is conv"):
        made.convert(made.convert(config()))


# ------------------------------------------------------------------------------------------------ torchtitan

REAL = """
import torch
from torchtitan.models.llama3 import model_registry
import coarsegrad as cg
from coarsegrad.integrations.torchtitan import StaircaseConverter

torch.set_num_threads(1)
converters = [StaircaseConverter.Config(inputs=4, norms="coarse")]
models = []
for spec in (model_registry("debugmodel", converters=converters), model_registry("debugmodel")):
    with torch.device("meta"):
        model = spec.model.build()
    model.verify_module_protocol()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_states()
    models.append(model)
model, want = models
report = cg.quantize_(want, bits=None, inputs=4, norms="coarse")
assert model.state_dict().keys() == want.state_dict().keys()
ids = torch.randint(2048, (1, 32))
positions = torch.arange(32)[None]


class Attention(torch.nn.Module):
    def forward(self, q, k, v, **kwargs):  # [batch, length, heads, size]; torchtitan's own has no backward on a CPU
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2)


outputs = []
for each in models:
    for layer in each.layers.values():
        layer.attention.inner_attention = Attention()
    output = each(ids, positions)
    output.square().mean().backward()
    outputs.append(output)
assert torch.equal(*outputs)
for (name, p), q in zip(model.named_parameters(), want.parameters()):
    assert torch.equal(p.grad, q.grad), name
print("same", len(report.staircases))
"""


def test_torchtitan_itself():
    """0.3.0, in a process of its own: it has more dependencies than this package, and logs by hooks of its own."""
    if importlib.util.find_spec("torchtitan") is None:
        pytest.skip("torchtitan is not installed")
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(REAL)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("same ")
