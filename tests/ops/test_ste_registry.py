"""The table of STEs, a user's own STE, and the numerical check of the convergence class."""

from __future__ import annotations

from typing import get_args

import oracle
import pytest
import torch
from torch import nn

import coarsegrad as cg
from coarsegrad import _ops
from coarsegrad._types import AlphaGrad, AlphaGradName, MaskKind, Rounding, RoundingName, SteName

ALPHA = torch.tensor([0.4])


def softplus_slope(u, q):
    """A gradient that dies away below zero as well: outside of the class."""
    return torch.sigmoid(u)


def half_slope(u, q):
    """1/2 above zero: in the class, and a bit says it all."""
    return torch.where(u > 0, 0.5, 0.0).to(u.dtype)


def tent(u, q):
    """Falls linearly to 0 at the top and stays there: no lower bound."""
    return torch.where(u > 0, (1 - u / q).clamp_min(0), 0.0)


def exploding(u, q):
    return torch.where(u > 0, torch.exp(u.clamp(max=2000)), 0.0)


def sample(seed=0):
    return torch.randn(60, generator=torch.Generator().manual_seed(seed)) * 2


def test_the_table_lists_the_built_in_ones():
    table = cg.stes()
    assert tuple(table)[:6] == oracle.STES
    assert [table[name].in_class for name in oracle.STES] == [False, True, False, True, True, False]
    assert [table[name].needs for name in oracle.STES] == ["nothing", "positive", "inside", "x", "x", "near"]
    text = str(table)
    assert all(name in text for name in oracle.STES) and "exp(-u" in text
    assert all(table[name].paper for name in oracle.STES)


def test_hand_worked_points_of_every_row():
    for row in cg.stes().values():
        assert row.points, f"{row.name} has no points worked by hand"
        for u, q, want in row.points:
            assert row.gprime(torch.tensor(u, dtype=torch.float64), q).item() == pytest.approx(want, rel=1e-12)
        assert {u > 0 for u, _, _ in row.points} == {True, False}


def test_the_table_is_a_copy():
    cg.stes().clear()
    assert tuple(cg.stes())[:6] == oracle.STES


@pytest.mark.parametrize("bits", range(1, 9))
def test_check_ste_of_the_built_in_ones(bits):
    for name, row in cg.stes().items():
        result = cg.check_ste(name, bits)
        assert bool(result) == row.in_class, str(result)
        assert bool(result) == (not result.failures)


def test_check_ste_says_which_condition_fails():
    below = cg.check_ste("identity")
    assert not below and len(below.failures) == 1 and "u <= 0" in str(below)
    above = cg.check_ste("clipped_relu")
    assert not above and len(above.failures) == 1 and "delta" in str(above) and "u > 0" in str(above)
    assert "u <= 0" in str(cg.check_ste(softplus_slope))
    assert "delta <=" in str(cg.check_ste(tent)) and "u <= 0" not in str(cg.check_ste(tent))
    assert "inf" in str(cg.check_ste(exploding, 8))
    assert cg.check_ste(half_slope)


def test_check_ste_gives_the_bounds():
    result = cg.check_ste("reverse_exponential", 2, u_max=6.0)
    assert result.delta == pytest.approx(torch.exp(torch.tensor(-2.0)).item(), rel=1e-6)
    assert result.delta_max == pytest.approx(1.0, abs=1e-6)
    assert cg.check_ste("relu").delta == cg.check_ste("relu").delta_max == 1


def test_check_ste_bad_input():
    for wrong in (
        dict(ste="no_such"),
        dict(ste="relu", bits=0),
        dict(ste="relu", u_max=0.0),
        dict(ste="relu", u_max=-1.0),
    ):
        with pytest.raises(ValueError):
            cg.check_ste(**wrong)
    with pytest.raises(ValueError, match="reverse_exponential"):
        cg.check_ste("no_such")
    with pytest.raises(TypeError, match="ste"):
        cg.check_ste(3)


@pytest.mark.parametrize("alpha_grad", [None, *oracle.ALPHA_GRADS])
@pytest.mark.parametrize(
    "gprime, needs", [(softplus_slope, "x"), (tent, "x"), (half_slope, "x"), (half_slope, "positive")]
)
def test_a_users_own_ste(reference_or_native, gprime, needs, alpha_grad):
    """The forward is the staircase of every other STE; dx is dy * g'(x / alpha)."""
    with cg.register_ste("own", gprime, needs=needs):
        assert "own" in cg.stes()
        x, alpha = sample().requires_grad_(), ALPHA.clone().requires_grad_(alpha_grad is not None)
        y = cg.qrelu(x, alpha, 2, ste="own", alpha_grad=alpha_grad or "exact")
        dy = sample(1)
        y.backward(dy)
        want = oracle.Staircase64(x, ALPHA, 2, "ceil")
        slope = gprime(want.u, 3)
        assert torch.equal(y.detach(), oracle.output(x, ALPHA, 2, "ceil"))
        assert torch.allclose(x.grad.double(), dy.double() * slope, rtol=1e-6, atol=1e-6)
        if alpha_grad == "chain":
            grad = (dy.double() * (want.code - want.u * slope)).sum()
        elif alpha_grad is not None:
            grad = want.grad_alpha(dy, "relu", alpha_grad)[0]
        if alpha_grad is not None:
            assert alpha.grad.item() == pytest.approx(float(grad), rel=1e-4, abs=1e-4)
    assert "own" not in cg.stes()
    with pytest.raises(ValueError, match="own"):
        cg.qrelu(sample(), ALPHA, 2, ste="own")


def test_an_own_ste_keeps_what_it_says(reference_or_native):
    x = sample().requires_grad_()
    for needs, want in (("x", 4 * 60), ("positive", 8)):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel() * tensor.element_size() if tensor.numel() != 1 else 0)
            return tensor

        with cg.register_ste("own", half_slope, needs=needs):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                cg.qrelu(x, ALPHA, 2, ste="own")
        assert sum(sizes) == want


def test_an_own_ste_in_place(reference_or_native):
    leaf = sample().requires_grad_()
    with cg.register_ste("own", half_slope, needs="positive"):
        hidden = leaf * 1
        y = cg.qrelu(hidden, ALPHA, 2, ste="own", inplace=True)
        assert y is hidden
        y.sum().backward()
    assert torch.equal(leaf.grad, 0.5 * (leaf > 0))
    with cg.register_ste("own", tent), pytest.raises(ValueError, match="own"):
        cg.qrelu(leaf * 1, ALPHA, 2, ste="own", inplace=True)


def test_a_network_trains_with_an_own_ste(reference_or_native):
    torch.manual_seed(0)
    x = torch.randn(128, 4)
    target = (x[:, :1] * x[:, 1:2]).sign()
    with cg.register_ste("own", softplus_slope):
        network = nn.Sequential(nn.Linear(4, 32), cg.QReLU(3, ste="own", alpha=0.3), nn.Linear(32, 1))
        optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
        losses = []
        for _ in range(120):
            loss = (network(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_register_ste_bad_input():
    with pytest.raises(ValueError, match="(?s)relu.*built in|built.in.*relu"):
        cg.register_ste("relu", half_slope)
    for wrong in ("", "two words", "1st", 3, None):
        with pytest.raises((ValueError, TypeError), match="name"):
            cg.register_ste(wrong, half_slope)
    with pytest.raises(TypeError, match="gprime"):
        cg.register_ste("own", 0.5)
    with pytest.raises(ValueError, match="(?s)needs.*nothing.*positive.*inside.*x"):
        cg.register_ste("own", half_slope, needs="bits")
    with pytest.raises(ValueError, match="needs"):
        cg.register_ste("own", tent, needs="positive")
    with pytest.raises(ValueError, match="needs"):
        cg.register_ste("own", half_slope, needs="nothing")
    with pytest.raises(ValueError, match="gprime"):
        cg.register_ste("own", lambda u, q: u.sum())
    with pytest.raises(ValueError, match="gprime"):
        cg.register_ste("own", lambda u, q: 1.0)
    assert "own" not in cg.stes()
    with cg.register_ste("own", half_slope):
        with pytest.raises(ValueError, match="own"):
            cg.register_ste("own", half_slope)
    assert "own" not in cg.stes()


@pytest.mark.skipif(_ops.native is None, reason=f"native library not in use: {_ops.native_why_not}")
def test_the_native_lists_are_pythons():
    """The maths is written twice; no name is on one side alone."""
    assert tuple(_ops.native.stes()) == tuple(cg.stes())[:6] == oracle.STES
    assert tuple(_ops.native.alpha_grads()) == cg.ste.ALPHA_GRADS == oracle.ALPHA_GRADS
    assert tuple(_ops.native.roundings()) == cg.ste.ROUNDINGS == oracle.ROUNDINGS
    assert tuple(_ops.native.mask_kinds()) == tuple(MaskKind.__members__)


@pytest.mark.parametrize("names, options", [(RoundingName, Rounding), (AlphaGradName, AlphaGrad)])
def test_types_name_the_options_in_order(names, options):
    """The numbers that the ops take are those of the native library's enumerators."""
    assert get_args(names) == tuple(options.__members__)
    assert [option.value for option in options] == list(range(len(options)))


def test_the_type_of_ste_names_the_stes():
    assert set(get_args(get_args(SteName)[0])) == set(cg.stes())
