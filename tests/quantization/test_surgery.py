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
from coarsegrad.quantization.rewriting import original

OWN = torch.tanh  # a global of this module that is no relu


def qrelus(model: nn.Module) -> dict[str, cg.QReLU]:
    return {name: module for name, module in model.named_modules() if isinstance(module, cg.QReLU)}


def _as_float(model: nn.Module) -> nn.Module:
    """The QReLUs of the model made to compute the float activation: what is computed then is where they stand."""
    for layer in qrelus(model).values():
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
            assert len(qrelus(model)) == len(report.replaced) == COUNTS[name]
            assert [r.name for r in report.replaced] == list(dict.fromkeys(r.name for r in report.replaced))
            assert {r.name for r in report.replaced} == set(qrelus(model))
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
                for name_, layer in qrelus(other).items():
                    assert layer is not qrelus(model)[name_]

    def test_every_alpha_learns(self, name, x):
        model = MODELS[name]().train()
        cg.quantize_(model, bits=2, learn_alpha=True)
        model(x + 0.1).sum().backward()
        for layer in qrelus(model).values():
            assert isinstance(layer.alpha, nn.Parameter) and layer.alpha.grad is not None


def test_in_place_stays_in_place(x):
    model = InPlace().eval()
    before = model(x)
    report = cg.quantize_(model, bits=8)
    layers = qrelus(model)
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


@pytest.mark.parametrize("settings, rounding", [({}, "nearest"), ({"rounding": "ceil"}, "ceil")])
def test_the_rounding_is_nearest_where_none_is_given(settings, rounding):
    model = Shared(nn.ReLU())
    cg.quantize_(model, 2, **settings)
    assert [layer.rounding for layer in qrelus(model).values()] == [rounding] * 3
    alphas = {layer.alpha.item() for layer in qrelus(model).values()}
    assert alphas == {torch.tensor(cg.nn.half_gaussian_alpha(2, rounding)).item()}


def test_settings_training_and_device_go_to_every_qrelu():
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), Shared(nn.ReLU()).to("meta")).eval()
    cg.quantize_(model, bits=3, ste="relu", rounding="hwgq", alpha=0.25, learn_alpha=True, alpha_scale="lsq")
    for layer in qrelus(model).values():
        assert (layer.bits, layer.ste, layer.rounding, layer.alpha_scale) == (3, "relu", "hwgq", "lsq")
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
    assert len(first.replaced) == 6 and len(second.replaced) == 6 and len(qrelus(model)) == 12
    torch.testing.assert_close(_as_float(copy.deepcopy(model))(x), before)
    with pytest.raises(RuntimeError, match="another class"):
        first.undo()
    second.undo()
    first.undo()
    assert type(model) is Functional and torch.equal(model(x), before)


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


def test_the_report_prints_names_kinds_and_reasons():
    report = cg.quantize_(nn.Sequential(Child(), nn.ReLU()))
    text = str(report)
    for words in ("0.qrelu", "relu (in forward, line ", "0.forward", "called through super()", "2 replaced, 1 not"):
        assert words in text
    report.undo()
    assert "undone" in repr(report)
