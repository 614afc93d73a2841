"""quantize_: what it leaves and why, and what it refuses; the model is then as it was."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from test_surgery import Child, Functional, qrelus
from torch import nn

import coarsegrad as cg

shadowed = torch.relu


class TestWhatIsSkipped:
    def _reasons(self, *modules):
        model = nn.Sequential(*modules, nn.ReLU())
        report = cg.quantize_(model)
        assert len(report.replaced) == 1
        return [(s.name, s.why) for s in report.skipped]

    def test_hooks(self):
        hooked = nn.ReLU()
        hooked.register_forward_hook(lambda *args: None)
        assert self._reasons(hooked) == [("0", "it has hooks, which would be lost")]

    def test_scripted(self):
        [(name, why)] = self._reasons(torch.jit.script(nn.Linear(2, 2)))
        assert name == "0" and "scripted" in why

    def test_super(self):
        report = cg.quantize_(Child())
        assert [r.was.split()[0] for r in report.replaced] == ["relu"]
        assert [(s.name, s.why) for s in report.skipped] == [("forward", "that of Base is called through super()")]

    def test_handed_on(self):
        class HandsOn(nn.Module):
            def forward(self, x):
                return self.run(F.relu, x)

            def run(self, function, x):
                return function(x)

        [(name, why)] = self._reasons(HandsOn())
        assert name == "0.forward" and why == "F.relu is passed on, not called"

    def test_arguments_that_cannot_be_told(self):
        class Starred(nn.Module):
            def forward(self, *x):
                return F.relu(*x)

        class Flag(nn.Module):
            def forward(self, x, inplace=False):
                return F.relu(x, inplace=inplace)

        assert all("unknown" in why for _, why in self._reasons(Starred(), Flag()))

    def test_no_plain_method(self):
        class Static(nn.Module):
            @staticmethod
            def act(x):
                return F.relu(x)

            def forward(self, x):
                return self.act(x)

        assert self._reasons(Static()) == [("0.act", "is a staticmethod")]

    def test_a_wrapper_that_cannot_be_made_anew(self):
        class Wrapped(nn.Module):
            @functools.lru_cache
            def forward(self, x):
                return F.relu(x) + 1

        [(name, why)] = self._reasons(Wrapped())
        assert name == "0.forward" and "wrapped" in why and "cannot be rebuilt" in why

    def test_a_forward_that_was_replaced_on_the_instance(self):
        class Plain(nn.Module):
            def forward(self, x):
                return F.relu(x) + 1

        one, other = Plain(), nn.ReLU()
        for module in (one, other):
            module.forward = functools.partial(type(module).forward, module)
        whys = dict(self._reasons(one, other))
        assert set(whys) == {"0.forward", "1"} and all("replaced on this instance" in why for why in whys.values())

    def test_a_relu_inside_of_torchs_kernel(self):
        assert self._reasons(nn.RNN(2, 2, nonlinearity="relu")) == [("0", "its relu is inside a torch kernel")]

    def test_no_source(self):
        namespace = {"nn": nn, "F": F}
        exec("class Made(nn.Module):\n    def forward(self, x):\n        return F.relu(x)\n", namespace)
        assert self._reasons(namespace["Made"]()) == [("0.forward", "its source cannot be read")]

    def test_a_class_that_cannot_be_made_anew(self):
        class Guarded(nn.Module):
            def __init_subclass__(cls):
                raise TypeError("final")

            def forward(self, x):
                return F.relu(x) + 1

        [(name, why)] = self._reasons(Guarded())
        assert name == "0.forward" and "final" in why

    def test_a_name_that_is_assigned_is_not_torchs(self):
        class Assigns(nn.Module):
            def forward(self, x):
                shadowed = torch.tanh
                return shadowed(x)

        assert self._reasons(Assigns()) == []

    def test_a_subclass_with_its_own_forward(self):
        class Leaky(nn.ReLU):
            def forward(self, x):
                return F.leaky_relu(x)

        model = nn.Sequential(Leaky(), nn.ReLU())
        report = cg.quantize_(model)
        assert [r.name for r in report.replaced] == ["1"]


class TestBadInput:
    def test_nothing_to_replace(self):
        hooked = nn.ReLU()
        hooked.register_forward_hook(lambda *args: None)
        with pytest.raises(ValueError, match=r"no ReLU, ReLU6 and no call.*0 \(ReLU\): it has hooks"):
            cg.quantize_(nn.Sequential(hooked))
        with pytest.raises(ValueError, match="Skipped: nothing"):
            cg.quantize_(nn.Linear(2, 2))

    @pytest.mark.parametrize("model", [nn.ReLU(), cg.QReLU()])
    def test_an_activation_itself(self, model):
        with pytest.raises(TypeError, match="model must contain activations"):
            cg.quantize_(model)

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"bits": 9}, ValueError, "bits"),
            ({"ste": "no"}, ValueError, "ste"),
            ({"nonsense": 1}, TypeError, "^nonsense is no argument of quantize_"),
            ({"alpha_scale": "all"}, TypeError, "alpha_scale"),
            ({"inplace": True}, TypeError, "inplace cannot be set for all"),
            ({"squared": True}, TypeError, "squared cannot"),
            ({"num_channels": 3}, TypeError, "num_channels cannot.*calibrate"),
            ({"channel_dim": -1}, TypeError, "channel_dim cannot.*calibrate"),
            ({"replace": nn.ReLU}, TypeError, "replace must be a tuple"),
            ({"replace": (nn.Module,)}, TypeError, "replace must be a tuple"),
            ({"filter_fn": 1}, TypeError, "filter_fn"),
        ],
    )
    def test_wrong_arguments_change_nothing(self, arguments, error, match):
        model = nn.Sequential(nn.ReLU())
        with pytest.raises(error, match=match):
            cg.quantize_(model, **arguments)
        assert type(model[0]) is nn.ReLU

    def test_no_module(self):
        with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
            cg.quantize_(F.relu)

    def test_a_failing_filter_leaves_the_model_as_it_was(self):
        def fails(module, name):
            if name == "1.qrelu_3":
                raise KeyError(name)
            return True

        model = nn.Sequential(nn.ReLU(), Functional())
        with pytest.raises(KeyError):
            cg.quantize_(model, filter_fn=fails)
        assert type(model[0]) is nn.ReLU and type(model[1]) is Functional and not qrelus(model)
