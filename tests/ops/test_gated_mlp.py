"""A gated MLP with two QReLUs as one op: the bits of its parts, x and codes alone kept, and what replaces them."""

from __future__ import annotations

import contextlib

import oracle
import pytest
import torch
from mlp_models import GATES, HIDDEN, alphas, apart, assert_same, gated, rows
from saved_bytes import Kept
from torch import nn
from torch.utils.checkpoint import checkpoint

import coarsegrad as cg
from coarsegrad._types import CODE_WIDTH, ROUNDINGS


def kept_bytes(model, x):
    with Kept(x, *model.parameters(), *alphas(model)) as kept:
        out = model(x)  # which keeps them
    assert out.requires_grad
    return kept.bytes


@pytest.mark.parametrize("ste", oracle.STES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_are_those_of_its_parts(dtype, rounding, ste):
    model = gated(3, dtype, ste=ste, rounding=rounding)
    for x in (rows(3, 5, 24, dtype=dtype), rows(24, dtype=dtype), rows(0, 24, dtype=dtype)):
        assert_same(model, x.requires_grad_())
        with torch.no_grad():
            assert torch.equal(model(x), apart(model, x))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("ste", GATES)
def test_what_is_kept(ste, rounding, bits):
    """Of gate and of up b / 8 bytes of codes an element, and 1 / 8 of a gate that they do not give; nothing else."""
    model, x = gated(bits, ste=ste, rounding=rounding), rows(6, 24).requires_grad_()
    mask = ste in ("clipped_relu", "trust") or (ste == "relu" and rounding == "nearest")
    for trained in (True, False):  # the factors' gradients need the codes too
        model.down.weight.requires_grad_(trained)
        assert kept_bytes(model, x) == 2 * 6 * HIDDEN * (CODE_WIDTH[bits] + mask) // 8
    assert_same(model, x)
    model.requires_grad_(False).down.weight.requires_grad_()
    assert kept_bytes(model, x.detach()) == 2 * 6 * HIDDEN * CODE_WIDTH[bits] // 8


def test_what_is_not_needed_is_not_kept_or_computed():
    model = gated().requires_grad_(False)
    for name, _ in list(model.named_parameters()):
        parameter = model.get_parameter(name).requires_grad_()
        assert_same(model, rows(6, 24))
        parameter.requires_grad_(False)
    model.down.bias.requires_grad_()
    assert kept_bytes(model, rows(6, 24)) == 0
    assert_same(gated(bias=False), rows(6, 24).requires_grad_())


@pytest.mark.parametrize("settings", [
    {"learn_alpha": True}, {"num_channels": HIDDEN, "channel_dim": -1}, {"other": {"bits": 4}},
    {"other": {"bits": 2, "ste": "relu"}}, {"squared": True}, {"other": {"bits": 2, "learn_alpha": True}},
], ids=str)  # fmt: skip
def test_other_settings_run_one_after_the_other(settings):
    """A learned or a per feature alpha, squares, staircases that differ; they keep what they need."""
    assert_same(gated(**settings), rows(6, 24).requires_grad_())


def test_dropout_runs_one_after_the_other():
    model, x = gated(dropout=0.5), rows(6, 24).requires_grad_()
    torch.manual_seed(2)
    out = model(x)
    torch.manual_seed(2)
    assert torch.equal(out, apart(model, x))
    assert_same(model.eval(), x)


def test_modules_in_its_place():
    """Adapters, and hooks."""
    x, seen = rows(6, 24).requires_grad_(), []
    for name in ("gate", "up", "down"):
        model = gated(ste="relu")
        setattr(model, name, nn.Sequential(getattr(model, name)))
        assert_same(model, x)
    for name in ("gate", "gate_activation", "up", "up_activation", "down"):
        model = gated()
        model.get_submodule(name).register_forward_hook(lambda module, *_: seen.append(type(module)))
        assert_same(model, x)
    wanted = [nn.Linear, cg.QReLU, nn.Linear, cg.QReLU, nn.Linear]
    assert seen == [each for each in wanted for _ in range(2)]  # as one, and apart


def test_autocast_compile_and_checkpoint():
    model, x = gated(), rows(6, 24).requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(model, x, compiled)
    assert_same(model, rows(9, 24).requires_grad_(), compiled)
    assert_same(model, x, lambda x: checkpoint(model, x, use_reentrant=False))
    with torch.autocast("cpu", torch.bfloat16):
        out, want = model(x), apart(model, x)
        assert out.dtype == torch.bfloat16 and torch.equal(out, want)
        # Copies in bfloat16 of x and of the weights, of which autocast saves as many; codes and gates.
        copies = 2 * (6 * 24 + 2 * HIDDEN * 24 + 8 * HIDDEN)
        assert kept_bytes(model, x) == copies + 2 * 6 * HIDDEN * 3 // 8


@pytest.mark.parametrize("part", ["gate", "up"])
def test_nan_makes_its_row_nan(part):
    """Of either factor alone: of infinity times 0."""
    model, x = gated(ste="relu"), rows(6, 24)
    x[2, 3] = torch.inf
    with torch.no_grad():
        model.get_submodule(part).weight[0, 3] = 0
    for x in (x, x.clone().requires_grad_()):
        assert model(x).isnan().all(1).tolist() == [i == 2 for i in range(6)]


def test_it_converts_as_its_parts():
    class Parts(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.stem, self.model = model[:2], model[2]

        def forward(self, x):
            x, model = self.stem(x), self.model
            return model.down(model.gate_activation(model.gate(x)) * model.up_activation(model.up(x)))

    model = nn.Sequential(nn.Linear(20, 24), cg.QReLU(4), gated(4)).eval()
    x = rows(8, 20)
    converted, parts = cg.convert(model, (x,)), cg.convert(Parts(model).eval(), (x,))
    assert torch.equal(converted(x), parts(x))
    assert [str(converted.report).count(name) for name in ("2.gate", "2.up")] == [1, 1]


def test_dtypes_are_those_of_x():
    model = gated()
    given = {"gate_weight": model.gate.weight, "up_weight": model.up.weight, "down_weight": model.down.weight}
    given |= {"gate_bias": model.gate.bias, "up_bias": model.up.bias, "down_bias": model.down.bias}
    for name in given:
        wrong = {**given, name: given[name].double()}
        with pytest.raises(TypeError, match=f"{name} must be torch.float32, as x, got torch.float64"):
            cg.qrelu_gated_mlp(rows(3, 24), gate_alpha=0.3, up_alpha=0.3, **wrong)


def test_bad_input():
    model = gated()
    parts = [model.gate, model.gate_activation, model.up, model.up_activation, model.down]
    for at, (name, wanted) in enumerate(
        (("gate", "an nn.Module"), ("gate_activation", "a QReLU"), ("up", "an nn.Module"),
         ("up_activation", "a QReLU"), ("down", "an nn.Module"))
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"{name} must be {wanted}, got NoneType"):
            cg.nn.QReLUGatedMLP(*parts[:at], None, *parts[at + 1 :])
    x, weights = rows(3, 24), (model.gate.weight, model.up.weight, model.down.weight)
    for wrong, error, match in (
        ({"bits": 9}, ValueError, "bits"), ({"bits": "4"}, TypeError, "bits"), ({"ste": "sign"}, ValueError, "ste"),
        ({"rounding": "down"}, ValueError, "rounding"), ({"channel_dim": 7}, (ValueError, IndexError), "channel_dim"),
        ({"gate_alpha": torch.tensor([-1.0])}, ValueError, "^gate_alpha must be finite and > 0"),
        ({"up_alpha": torch.tensor([-1.0])}, ValueError, "^up_alpha must be finite and > 0"),
        ({"up_alpha": "1"}, TypeError, "^up_alpha must be"),
        ({"up_alpha": torch.full((4,), 0.3)}, ValueError, "^up_alpha"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            cg.qrelu_gated_mlp(x, *weights, **{"gate_alpha": 0.3, "up_alpha": 0.3, **wrong})
    with pytest.raises(TypeError, match="must be Tensor"):
        cg.qrelu_gated_mlp([1.0], *weights, 0.3, 0.3)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name, shape, message", [
    ("x", (3, 25), r"gate_weight must be \[hidden, 25\], got \[40, 24\]"),
    ("x", (), "x must have at least one dimension"),
    ("gate_weight", (39, 24), r"up_weight must be \[39, 24\], got \[40, 24\]"),
    ("gate_weight", (24,), r"gate_weight must be \[hidden, 24\], got \[24\]"),
    ("up_weight", (40, 23), r"up_weight must be \[40, 24\], got \[40, 23\]"),
    ("down_weight", (8, 39), r"down_weight must be \[out_features, 40\], got \[8, 39\]"),
    ("down_weight", (40,), r"down_weight must be \[out_features, 40\], got \[40\]"),
    ("gate_bias", (1,), r"gate_bias must be \[40\], got \[1\]"),
    ("up_bias", (1, 40), r"up_bias must be \[40\], got \[1, 40\]"),
    ("down_bias", (9,), r"down_bias must be \[8\], got \[9\]"),
])  # fmt: skip
def test_shapes_that_do_not_fit(backend, name, shape, message):
    """Also where the packed codes have as many bytes: one row of 39 features has the 20 of 40."""
    wanted = {"x": (1, 24), "gate_weight": (40, 24), "up_weight": (40, 24), "down_weight": (8, 40), name: shape}
    with cg.use_backend(backend) if backend else contextlib.nullcontext():
        for needed in (False, True):
            given = {n: torch.ones(size).requires_grad_(needed) for n, size in wanted.items()}
            with pytest.raises(ValueError, match=message):
                cg.qrelu_gated_mlp(gate_alpha=0.3, up_alpha=0.3, **given)


def test_what_is_no_tensor():
    given = {"gate_weight": rows(40, 24), "up_weight": rows(40, 24), "down_weight": rows(8, 40)}
    for name, wrong in (("gate_weight", None), ("up_weight", 3), ("down_weight", None), ("down_bias", 1.0)):
        with pytest.raises(TypeError, match=f"{name} must be a Tensor, got {type(wrong).__name__}"):
            cg.qrelu_gated_mlp(rows(3, 24), gate_alpha=0.3, up_alpha=0.3, **{**given, name: wrong})


def test_nested_rows():
    model, x = gated(ste="relu"), rows(6, 24)
    for model in (model, gated(ste="relu", dropout=0.5).eval(), gated(learn_alpha=True)):
        got = model(torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged))
        assert torch.equal(got.values(), model(x))
        parameters = list(model.down.parameters())
        wanted = torch.autograd.grad(model(x).sum(), parameters)
        for one, right in zip(torch.autograd.grad(got.values().sum(), parameters), wanted, strict=True):
            torch.testing.assert_close(one, right)
