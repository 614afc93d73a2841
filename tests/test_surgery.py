"""quantize_: what it replaces, where, what it leaves, and the way back."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import relu as imported_relu

import coarsegrad as cg
from coarsegrad.rewriting import original

OWN = torch.tanh  # a global of this module that is no relu


def _qrelus(model: nn.Module) -> dict[str, cg.QReLU]:
    return {name: module for name, module in model.named_modules() if isinstance(module, cg.QReLU)}


def _as_float(model: nn.Module) -> nn.Module:
    """The QReLUs of the model made to compute the float activation: what is computed then is where they stand."""
    for layer in _qrelus(model).values():
        square = layer.squared
        layer.forward = lambda x, square=square, top=layer.limit: x.clamp(0, top) ** (2 if square else 1)
    return model


class Shared(nn.Module):
    """One activation at three places of two methods."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.act, self.lin = activation, nn.Linear(4, 4)

    def forward(self, x):
        x = self.act(x)
        if x.sum() < 1e9:
            x = self.act(self.lin(x)) + x
        return self.again(x - 1)

    def again(self, x):
        return self.act(x)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        a = F.relu(self.lin(x))
        b = torch.relu(input=a - 0.5) + torch.nn.functional.relu(x, inplace=False)
        c = (b - 0.1).relu() + imported_relu(x - 0.2)
        d = [F.relu(row) for row in c]
        inner = lambda y: F.relu(y - 0.3)  # noqa: E731
        return inner(torch.stack(d)) + OWN(x) + self.helper(x)

    def helper(self, x):
        squares = torch.square(F.relu(x)) + F.relu(x) ** 2 + F.relu(x).pow(2)
        return squares + F.relu(x).square() + torch.pow(F.relu(x), 2)


class InPlace(nn.Module):
    """Uses what an in-place relu leaves in its input."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = x * 1
        y = self.act(x)
        F.relu_(y.sub_(0.1))
        return x + torch.relu_(x - 0.2) + F.relu(x - 0.3, inplace=True)


class Six(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU6()

    def forward(self, x):
        return self.act(8 * x) + F.relu6(9 * x)


class SquaredModule(nn.Module):
    """An activation that is no nn.ReLU, with the square in a statement of its own."""

    def forward(self, x):
        y = F.relu(x)
        return torch.square(y)


class Holder(nn.Module):
    """Holds a function as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = F.relu

    def forward(self, x):
        return self.activation(x)


class Base(nn.Module):
    scale = 2.0

    def forward(self, x, *, shift: float = 0.5):
        """Documented."""
        return F.relu(x - shift) * self.scale


class Child(Base):
    def forward(self, x, *, shift: float = 0.25):
        return super().forward(x, shift=shift) + torch.relu(x)


class Inherits(Base):
    scale = 3.0


def _with_closure(factor: float) -> type[nn.Module]:
    class Closure(nn.Module):
        def forward(self, x):
            return F.relu(x) * factor

    return Closure


def twice(method):
    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        return 2 * method(*args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    @twice
    def forward(self, x):
        return F.relu(x)


MODELS = {
    "module": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
    "shared": lambda: Shared(nn.ReLU()),
    "one module under two names": lambda: nn.Sequential(*[nn.ReLU()] * 2, nn.Linear(4, 4)),
    "functional": Functional,
    "six": Six,
    "squared module": lambda: nn.Sequential(SquaredModule(), nn.Linear(4, 4)),
    "squared module, shared": lambda: Shared(SquaredModule()),
    "attribute": Holder,
    "inherits": Inherits,
    "closure": _with_closure(5.0),
    "decorated": Decorated,
    "torch encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2),
}
COUNTS = {
    "module": 1, "shared": 3, "one module under two names": 2, "functional": 12, "six": 2, "squared module": 1,
    "squared module, shared": 3, "attribute": 1, "inherits": 1, "closure": 1, "decorated": 1, "torch encoder": 2,
}  # fmt: skip


@pytest.fixture
def x():
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
class TestEveryForm:
    def test_each_place_has_its_own_qrelu_in_the_right_place(self, name, x):
        model = MODELS[name]().eval()
        with torch.no_grad():
            before = model(x)
            report = cg.quantize_(model, bits=8)
            assert len(_qrelus(model)) == len(report.replaced) == COUNTS[name]
            assert [r.name for r in report.replaced] == list(dict.fromkeys(r.name for r in report.replaced))
            assert {r.name for r in report.replaced} == set(_qrelus(model))
            assert not report.skipped
            after = model(x)
            assert after.dtype == before.dtype and not torch.equal(after, before)
            torch.testing.assert_close(_as_float(model)(x), before)

    def test_undo_restores_the_same_modules_classes_and_outputs(self, name, x):
        model = MODELS[name]().eval()
        modules = [(n, id(m), type(m)) for n, m in model.named_modules(remove_duplicate=False)]
        attributes = {n: list(vars(m)) for n, m in model.named_modules()}
        with torch.no_grad():
            before = model(x)
            report = cg.quantize_(model)
            model.train()
            model(x)
            model.eval()
            report.undo()
            assert torch.equal(model(x), before)
        assert [(n, id(m), type(m)) for n, m in model.named_modules(remove_duplicate=False)] == modules
        assert {n: sorted(vars(m)) for n, m in model.named_modules()} == {n: sorted(a) for n, a in attributes.items()}
        assert not any(m.training for m in model.modules())
        with pytest.raises(RuntimeError, match="before"):
            report.undo()

    def test_once_more_changes_nothing(self, name, x):
        model = MODELS[name]().eval()
        cg.quantize_(model, bits=3)
        modules = list(model.named_modules(remove_duplicate=False))
        again = cg.quantize_(model, bits=5)
        assert not again.replaced and len(again.already) == COUNTS[name]
        assert list(model.named_modules(remove_duplicate=False)) == modules
        again.undo()
        assert list(model.named_modules(remove_duplicate=False)) == modules

    def test_copies_and_pickles_compute_the_same(self, name, x):
        model = MODELS[name]().eval()
        cg.quantize_(model, bits=2)
        others = [copy.deepcopy(model)]
        if name == "closure":
            with pytest.raises(AttributeError, match="local object"):  # as without conversion
                pickle.dumps(model)
        else:
            saved = io.BytesIO()
            torch.save(model, saved)
            saved.seek(0)
            others += [pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
        with torch.no_grad():
            y = model(x)
            for other in others:
                assert torch.equal(other(x), y)
                assert other is not model and type(other) is type(model)
                for name_, layer in _qrelus(other).items():
                    assert layer is not _qrelus(model)[name_]

    def test_every_alpha_learns(self, name, x):
        model = MODELS[name]().train()
        cg.quantize_(model, bits=2, learn_alpha=True)
        model(x + 0.1).sum().backward()
        for layer in _qrelus(model).values():
            assert isinstance(layer.alpha, nn.Parameter) and layer.alpha.grad is not None


def test_in_place_stays_in_place(x):
    model = InPlace().eval()
    before = model(x)
    report = cg.quantize_(model, bits=8)
    layers = _qrelus(model)
    assert len(layers) == 4 and all(layer.inplace for layer in layers.values())
    for layer in layers.values():
        layer.forward = lambda t: t.clamp_(min=0)
    torch.testing.assert_close(model(x), before)
    report.undo()
    assert torch.equal(model(x), before)


def test_in_place_is_given_up_with_a_note_where_the_ste_keeps_x():
    model = nn.Sequential(nn.ReLU(inplace=True))
    report = cg.quantize_(model, ste="reverse_exponential")
    assert not model[0].inplace
    assert "no longer in place" in report.replaced[0].note


def test_settings_training_and_device_go_to_every_qrelu():
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), Shared(nn.ReLU()).to("meta")).eval()
    cg.quantize_(model, bits=3, ste="relu", rounding="nearest", alpha=0.25, learn_alpha=True, alpha_scale="lsq")
    for layer in _qrelus(model).values():
        assert (layer.bits, layer.ste, layer.rounding, layer.alpha_scale) == (3, "relu", "nearest", "lsq")
        assert layer.alpha.device.type == "meta" and not layer.training and layer.alpha.requires_grad


def test_relu6_has_its_top_level_at_6():
    model = nn.Sequential(nn.ReLU6(), nn.ReLU())
    report = cg.quantize_(model, bits=4)
    assert model[0].alpha.item() == pytest.approx(6 / 15) and model[0].limit == 6 and model[1].limit == math.inf
    assert "top level 6" in report.replaced[0].note
    other = nn.Sequential(nn.ReLU6())
    cg.quantize_(other, bits=4, alpha=0.1)
    assert other[0].alpha.item() == pytest.approx(0.1)


def test_squares_have_squared_levels(x):
    model = nn.Sequential(SquaredModule())
    report = cg.quantize_(model, bits=2, alpha=0.5)
    assert report.replaced[0].note == "squared" and report.replaced[0].was == "SquaredModule"
    assert set(model(x).unique().tolist()) <= {0.0, 0.25, 1.0, 2.25}


class GeluNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.other = nn.GELU(), nn.SiLU()

    def forward(self, x):
        return self.act(x) + self.other(x) + F.gelu(x, approximate="tanh") + F.silu(x) + F.relu(x)


def test_other_activations_only_when_asked_for():
    model = GeluNet()
    report = cg.quantize_(model)
    assert [r.was.split()[0] for r in report.replaced] == ["relu"]
    report.undo()
    report = cg.quantize_(model, replace=(nn.GELU, nn.SiLU))
    assert [r.was.split()[0] for r in report.replaced] == ["GELU", "SiLU", "gelu", "silu"]
    assert not isinstance(model(torch.randn(2)), cg.QReLU)


def test_filter_fn_sees_modules_and_names():
    seen = []

    def only_first(module, name):
        seen.append((type(module).__name__, name))
        return name.startswith("0.")

    model = nn.Sequential(Functional(), Functional(), nn.ReLU())
    report = cg.quantize_(model, filter_fn=only_first)
    assert all(r.name.startswith("0.") for r in report.replaced) and len(report.replaced) == 12
    assert ("ReLU", "2") in seen and ("Functional", "1.qrelu") in seen
    rest = cg.quantize_(model, filter_fn=lambda module, name: name != "2")
    assert len(rest.replaced) == 12 and isinstance(model[2], nn.ReLU)
    assert type(model[0]) is not Functional and original(type(model[0]))[0] is Functional


def test_what_was_left_by_a_filter_can_be_replaced_later(x):
    model = Functional().eval()
    before = model(x)
    kept = iter(range(100))
    first = cg.quantize_(model, filter_fn=lambda module, name: next(kept) % 2 == 0)
    second = cg.quantize_(model)
    assert len(first.replaced) == 6 and len(second.replaced) == 6 and len(_qrelus(model)) == 12
    torch.testing.assert_close(_as_float(copy.deepcopy(model))(x), before)
    with pytest.raises(RuntimeError, match="another class"):
        first.undo()
    second.undo()
    first.undo()
    assert type(model) is Functional and torch.equal(model(x), before)


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
        assert name == "0.forward" and why == "F.relu is handed on, not called"

    def test_arguments_that_cannot_be_told(self):
        class Starred(nn.Module):
            def forward(self, *x):
                return F.relu(*x)

        class Flag(nn.Module):
            inplace = False

            def forward(self, x):
                return F.relu(x, inplace=self.inplace)

        assert all("cannot be told" in why for _, why in self._reasons(Starred(), Flag()))

    def test_no_plain_method(self):
        class Static(nn.Module):
            @staticmethod
            def act(x):
                return F.relu(x)

            def forward(self, x):
                return self.act(x)

        assert self._reasons(Static()) == [("0.act", "is a staticmethod")]

    def test_private_names_and_nonlocals(self):
        count = 0

        class Private(nn.Module):
            def forward(self, x):
                self.__x = x
                return F.relu(x)

        class Counts(nn.Module):
            def forward(self, x):
                nonlocal count
                count += 1
                return F.relu(x)

        whys = dict(self._reasons(Private(), Counts()))
        assert "private names" in whys["0.forward"] and "outer function" in whys["1.forward"]

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
                imported_relu = torch.tanh
                return imported_relu(x)

        assert self._reasons(Assigns()) == []

    def test_a_subclass_with_its_own_forward(self):
        class Leaky(nn.ReLU):
            def forward(self, x):
                return F.leaky_relu(x)

        model = nn.Sequential(Leaky(), nn.ReLU())
        report = cg.quantize_(model)
        assert [r.name for r in report.replaced] == ["1"]


def test_the_class_and_its_other_instances_stay(x):
    one, other = Functional().eval(), Functional().eval()
    method, y = Functional.forward, other(x)
    cg.quantize_(one)
    assert Functional.forward is method and torch.equal(other(x), y)
    assert type(one).__name__ == "Functional" and isinstance(one, Functional)
    assert type(one).forward.__qualname__ == Functional.forward.__qualname__


def test_equal_instances_share_a_class():
    model = nn.Sequential(Functional(), Functional())
    cg.quantize_(model)
    assert type(model[0]) is type(model[1])


def test_tracebacks_and_docs_are_of_the_source():
    model = Inherits()
    cg.quantize_(model)
    assert type(model).forward.__doc__ == "Documented."
    assert type(model).forward.__code__.co_filename == Base.forward.__code__.co_filename
    assert type(model).forward.__code__.co_firstlineno == Base.forward.__code__.co_firstlineno
    assert type(model).forward.__kwdefaults__ == {"shift": 0.5}


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
            ({"nonsense": 1}, TypeError, "nonsense"),
            ({"alpha_scale": "all"}, TypeError, "alpha_scale"),
            ({"inplace": True}, TypeError, "inplace cannot be given for all"),
            ({"squared": True}, TypeError, "squared cannot"),
            ({"num_channels": 3}, TypeError, "num_channels cannot.*calibrate"),
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
        assert type(model[0]) is nn.ReLU and type(model[1]) is Functional and not _qrelus(model)


def test_the_report_prints_names_kinds_and_reasons():
    report = cg.quantize_(nn.Sequential(Child(), nn.ReLU()))
    text = str(report)
    for words in ("0.qrelu", "relu (in forward, line ", "0.forward", "called through super()", "2 replaced, 1 not"):
        assert words in text
    report.undo()
    assert "undone" in repr(report)
