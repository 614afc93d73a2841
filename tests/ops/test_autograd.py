"""In-place use, the graph, checkpointing and functorch: right, or refused in clear words."""

from __future__ import annotations

import itertools
import re

import oracle
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import coarsegrad as cg

ALPHA = torch.tensor([0.4])
BIT_STES = oracle.MASKED_STES
X_STES = oracle.X_STES
REFUSAL = "(?i)(not support|cannot|can't|not implement|double|twice|second|vmap|batching|forward.?mode|jvp)"


def sample(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def right_or_refused(compute, want):
    """The value, or an error whose text says what is not possible. Never a wrong number."""
    try:
        got = compute()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        assert re.search(REFUSAL, str(error)), f"refused, but not clearly: {error}"
        return "refused"
    assert torch.equal(got, want)
    return "right"


# --------------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize(
    "ste, alpha_grad",
    [
        (ste, rule)
        for ste, rule in itertools.product(BIT_STES, (None, "exact", "three_valued", "two_valued"))
        if not oracle.saves_x(ste, rule)
    ],
)
def test_in_place_equals_out_of_place(reference_or_native, ste, alpha_grad):
    weight = sample(7, 9)
    options = dict(bits=2, ste=ste, alpha_grad=alpha_grad or "exact")
    results = []
    for inplace in (False, True):
        leaf = weight.clone().requires_grad_()
        alpha = ALPHA.clone().requires_grad_(alpha_grad is not None)
        hidden = leaf * 2
        y = cg.qrelu(hidden, alpha, inplace=inplace, **options)
        assert (y.data_ptr() == hidden.data_ptr()) == inplace
        (y * sample(7, 9, seed=1)).sum().backward()
        results.append((y.detach(), leaf.grad, alpha.grad))
    for plain, inplace in zip(*results, strict=True):
        assert plain is inplace is None or torch.equal(plain, inplace)


def test_in_place_returns_x_and_raises_its_version(reference_or_native):
    hidden = sample(5).requires_grad_() * 1
    version = hidden._version
    y = cg.qrelu(hidden, ALPHA, 2, inplace=True)
    assert y is hidden
    assert hidden._version > version and hidden.grad_fn is y.grad_fn
    plain = sample(5)
    version = plain._version
    assert cg.qrelu(plain, ALPHA, 2, inplace=True) is plain and plain._version > version
    with torch.no_grad():
        leaf = sample(5).requires_grad_()
        assert cg.qrelu(leaf, ALPHA, 2, inplace=True) is leaf, "no_grad lifts the ban on leaves, as for torch.relu_"
        assert leaf._version > 0


def test_out_of_place_leaves_x_and_its_version_alone(reference_or_native):
    x = sample(5)
    before = x.clone()
    cg.qrelu(x, ALPHA, 2)
    assert x._version == 0 and torch.equal(x, before)


def test_a_leaf_is_refused_before_it_is_touched(reference_or_native):
    leaf = sample(9).requires_grad_()
    before = leaf.detach().clone()
    for x in (leaf, leaf[2:5], leaf.view(3, 3)):
        with pytest.raises(RuntimeError, match="leaf"):
            cg.qrelu(x, ALPHA, 2, inplace=True)
        assert torch.equal(leaf.detach(), before) and leaf._version == 0


@pytest.mark.parametrize(
    "ste, alpha_grad",
    [
        *((s, None) for s in X_STES),
        ("relu", "chain"),
        ("reverse_exponential", "exact"),
        ("trust", "three_valued"),
        ("trust", "two_valued"),
    ],
)
def test_in_place_is_refused_where_x_is_kept(reference_or_native, ste, alpha_grad):
    hidden = sample(9).requires_grad_() * 1
    alpha = ALPHA.clone().requires_grad_(alpha_grad is not None)
    before = hidden.detach().clone()
    culprit = "alpha_grad" if ste == "relu" else "ste"
    with pytest.raises(ValueError, match=f"inplace.*{culprit}") as error:
        cg.qrelu(hidden, alpha, 2, ste=ste, alpha_grad=alpha_grad or "exact", inplace=True)
    assert ("chain" if ste == "relu" else ste) in str(error.value)
    assert ste != "trust" or repr(alpha_grad) in str(error.value)
    assert torch.equal(hidden.detach(), before) and hidden._version == 0


@pytest.mark.parametrize("ste", X_STES)
def test_in_place_is_allowed_where_nothing_is_kept(reference_or_native, ste):
    """Without a gradient x is not kept, whatever the STE."""
    x = sample(9)
    want = oracle.output(x, ALPHA, 2, "ceil")
    assert torch.equal(cg.qrelu(x, ALPHA, 2, ste=ste, inplace=True), want)
    with torch.no_grad():
        hidden = sample(9).requires_grad_() * 1
        assert torch.equal(cg.qrelu(hidden, ALPHA, 2, ste=ste, inplace=True), want)


def test_overwriting_what_another_op_kept_is_noticed(reference_or_native):
    leaf = sample(9).requires_grad_()
    hidden = leaf.exp()  # keeps its output
    y = cg.qrelu(hidden, ALPHA, 2, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("ste", X_STES)
def test_overwriting_the_kept_x_is_noticed(reference_or_native, ste):
    hidden = sample(9).requires_grad_() * 1
    y = cg.qrelu(hidden, ALPHA, 2, ste=ste)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("ste", BIT_STES)
def test_overwriting_x_afterwards_is_safe_where_bits_are_kept(reference_or_native, ste):
    leaf = sample(9).requires_grad_()
    hidden = leaf * 1
    y = cg.qrelu(hidden, ALPHA, 2, ste=ste)
    with torch.no_grad():
        hidden.fill_(5)
    y.sum().backward()
    want = oracle.Staircase64(leaf, ALPHA, 2, "ceil").slope(ste)
    assert torch.equal(leaf.grad.double(), want)


def test_in_place_on_a_view_reaches_its_base(reference_or_native):
    """The base sees the new values, and its gradient goes through the staircase where the view lies only."""
    leaf = sample(6, 4).requires_grad_()
    base = leaf * 1
    cg.qrelu(base[2:5, ::2], ALPHA, 2, inplace=True)
    weight = sample(6, 4, seed=1)
    (base * weight).sum().backward()

    values, slope = leaf.detach().clone(), torch.ones(6, 4)
    part = leaf.detach()[2:5, ::2]
    values[2:5, ::2] = oracle.output(part, ALPHA, 2, "ceil")
    slope[2:5, ::2] = oracle.Staircase64(part, ALPHA, 2, "ceil").slope("clipped_relu").float()
    assert torch.equal(base.detach(), values) and torch.equal(leaf.grad, weight * slope)


VIEWS = {
    "linear": lambda h: torch.nn.functional.linear(h.view(2, 3, 4), torch.eye(4), torch.zeros(4)),
    "reshaped": lambda h: h.view(2, 3, 4),
    "transposed": lambda h: h.t(),
    "part": lambda h: h[1:5, 1:],
    "view of a view": lambda h: h.view(2, 12)[1].view(3, 4),
    "chunk": lambda h: h.split([1, 3], dim=1)[1],
    "expanded dim": lambda h: h[None],
}


@pytest.mark.parametrize("learn_alpha", [False, True])
@pytest.mark.parametrize("ste", ["relu", "clipped_relu", "identity"])
@pytest.mark.parametrize("view", VIEWS)
def test_in_place_on_a_view_is_what_the_view_is_from_then_on(reference_or_native, view, ste, learn_alpha):
    """What is computed from the view, as from a Linear's output of three dimensions, goes through the staircase."""
    grads = []
    for inplace in (False, True):
        leaf, alpha = sample(6, 4).requires_grad_(), ALPHA.clone().requires_grad_(learn_alpha)
        x = VIEWS[view](leaf * 1)
        if view == "chunk" and inplace:  # torch refuses writes to one of many views of one function
            with pytest.raises(RuntimeError, match="multiple views"):
                cg.qrelu(x, alpha, 2, ste=ste, inplace=True)
            return
        y = cg.qrelu(x, alpha, 2, ste=ste, inplace=inplace)
        (y * sample(*y.shape, seed=1)).sum().backward()
        grads.append([leaf.grad, alpha.grad])
    assert torch.equal(grads[1][0], grads[0][0])
    assert not learn_alpha or torch.equal(grads[1][1], grads[0][1])


def test_in_place_where_only_alpha_is_learned(reference_or_native):
    x, alpha = sample(50), ALPHA.clone().requires_grad_()
    want = oracle.Staircase64(x, ALPHA, 2, "ceil").grad_alpha(torch.ones(50), "clipped_relu", "exact")[0]
    y = cg.qrelu(x, alpha, 2, alpha_grad="exact", inplace=True)
    assert y is x and x.requires_grad
    y.sum().backward()
    assert alpha.grad.double() == want


# -------------------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("ste", oracle.STES)
def test_retain_graph(reference_or_native, ste):
    x, alpha = sample(50).requires_grad_(), ALPHA.clone().requires_grad_()
    y = cg.qrelu(x, alpha, 2, ste=ste, alpha_grad="exact").sum()
    first = torch.autograd.grad(y, (x, alpha), retain_graph=True)
    second = torch.autograd.grad(y, (x, alpha))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, (x, alpha))


@pytest.mark.parametrize("alpha_grad", oracle.ALPHA_GRADS)
@pytest.mark.parametrize("ste", oracle.STES)
def test_one_gradient_of_two(reference_or_native, ste, alpha_grad):
    """torch.autograd.grad for x alone, or alpha alone, gives what both together give."""
    x, alpha, dy = sample(50).requires_grad_(), ALPHA.clone().requires_grad_(), sample(50, seed=1)
    y = cg.qrelu(x, alpha, 2, ste=ste, alpha_grad=alpha_grad)
    dx, dalpha = torch.autograd.grad(y, (x, alpha), dy, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, x, dy, retain_graph=True)[0], dx)
    assert torch.equal(torch.autograd.grad(y, alpha, dy)[0], dalpha)


@pytest.mark.parametrize("ste", BIT_STES)
def test_double_backward_with_fixed_alpha(reference_or_native, ste):
    """dx is linear in dy, so the gradient of <dx, v> with respect to dy is v through the same gate."""
    x = sample(5, 7).requires_grad_()
    dy, v = sample(5, 7, seed=1).requires_grad_(), sample(5, 7, seed=2)
    (dx,) = torch.autograd.grad(cg.qrelu(x, ALPHA, 2, ste=ste), x, dy, create_graph=True)
    assert dx.requires_grad
    (back,) = torch.autograd.grad(dx, dy, v)
    want = oracle.Staircase64(x, ALPHA, 2, "ceil")
    assert torch.equal(back.double(), want.grad_x(v, ste))
    # a gradient penalty, through two layers
    x = sample(5, 7).requires_grad_()
    weight = sample(7, 7, seed=3).requires_grad_()
    (dx,) = torch.autograd.grad(cg.qrelu(x @ weight, ALPHA, 2, ste=ste).sum(), x, create_graph=True)
    dx.square().sum().backward()
    gate = oracle.Staircase64((x @ weight), ALPHA, 2, "ceil").slope(ste).float()
    plain = weight.detach().clone().requires_grad_()
    (gate @ plain.t()).square().sum().backward()
    assert torch.allclose(weight.grad, plain.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "ste, alpha_grad", [*((s, None) for s in X_STES), ("relu", "exact"), ("clipped_relu", "chain")]
)
def test_double_backward_elsewhere_is_refused(reference_or_native, ste, alpha_grad):
    x, dy = sample(9).requires_grad_(), sample(9, seed=1).requires_grad_()
    alpha = ALPHA.clone().requires_grad_(alpha_grad is not None)
    y = cg.qrelu(x, alpha, 2, ste=ste, alpha_grad=alpha_grad or "exact")
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)(double|twice|second|differentiat)"):
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        torch.autograd.grad(dx.square().sum(), (x, dy))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("ste", oracle.STES)
def test_checkpointing(reference_or_native, ste, use_reentrant):
    def layer(x, alpha):
        return cg.qrelu(x * 2, alpha, 2, ste=ste, alpha_grad="exact") * 3

    x, alpha = sample(50), ALPHA
    results = []
    for wrapped in (False, True):
        leaf, step = x.clone().requires_grad_(), alpha.clone().requires_grad_()
        y = checkpoint(layer, leaf, step, use_reentrant=use_reentrant) if wrapped else layer(leaf, step)
        y.sum().backward()
        results.append((y.detach(), leaf.grad, step.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("alpha_grad", [None, *oracle.ALPHA_GRADS])
@pytest.mark.parametrize("ste", oracle.STES)
def test_upstream_gradient_in_any_memory_format(reference_or_native, ste, alpha_grad):
    x, dy = sample(2, 3, 4, 5), sample(2, 3, 4, 5, seed=1)
    last = torch.channels_last
    strided = torch.empty(5, 4, 3, 2).permute(3, 2, 1, 0).copy_(dy)
    gapped = torch.zeros(2, 3, 4, 10)[..., ::2].copy_(dy)
    for image in (x, x.contiguous(memory_format=last)):
        results = []
        for grad in (dy, dy.contiguous(memory_format=last), strided, gapped):
            leaf = image.detach().requires_grad_()
            alpha = torch.full((3,), 0.4).requires_grad_(alpha_grad is not None)
            y = cg.qrelu(leaf, alpha, 2, ste=ste, alpha_grad=alpha_grad or "exact", channel_dim=1)
            y.backward(grad)
            results.append((leaf.grad, alpha.grad))
        for dx, dalpha in results[1:]:
            assert torch.equal(dx, results[0][0])
            assert dalpha is results[0][1] is None or torch.equal(dalpha, results[0][1])


def test_an_expanded_upstream_gradient(reference_or_native):
    """sum() hands back one number, expanded; mean over a dim a row of them."""
    x = sample(2, 3, 4, 5)
    want = oracle.Staircase64(x, ALPHA, 2, "ceil")
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        leaf, alpha = image.detach().requires_grad_(), ALPHA.clone().requires_grad_()
        cg.qrelu(leaf, alpha, 2, alpha_grad="exact").sum().backward()
        assert torch.equal(leaf.grad.double(), want.slope("clipped_relu"))
        assert alpha.grad.item() == pytest.approx(want.code.sum().item(), rel=1e-6)
        leaf = image.detach().requires_grad_()
        cg.qrelu(leaf, ALPHA, 2).sum(dim=(0, 2)).backward(torch.arange(15.0).view(3, 5))
        row = torch.arange(15.0).view(1, 3, 1, 5).expand(2, 3, 4, 5)
        assert torch.equal(leaf.grad.double(), want.grad_x(row, "clipped_relu"))


def test_gradients_accumulate(reference_or_native):
    x = sample(50).requires_grad_()
    for _ in range(3):
        cg.qrelu(x, ALPHA, 2, ste="relu").sum().backward()
    assert torch.equal(x.grad, 3.0 * (x > 0))


def test_the_output_may_be_overwritten(reference_or_native):
    """y is not kept, so what follows may work in place on it."""
    x = sample(50).requires_grad_()
    y = cg.qrelu(x, ALPHA, 2, ste="relu")
    y.mul_(2)
    y.sum().backward()
    assert torch.equal(x.grad, 2.0 * (x > 0))


# -------------------------------------------------------------------------------------------------- functorch


@pytest.mark.parametrize("ste", oracle.STES)
def test_functorch_grad(reference_or_native, ste):
    x = sample(50)
    want = oracle.Staircase64(x, ALPHA, 2, "ceil").slope(ste).float()
    got = []

    def compute():
        got.append(torch.func.grad(lambda x: cg.qrelu(x, ALPHA, 2, ste=ste).sum())(x))
        return got[0].round(decimals=5)

    right_or_refused(compute, want.round(decimals=5))


def test_vmap(reference_or_native):
    x, steps = sample(3, 50), torch.tensor([[0.2], [0.4], [0.6]])
    want = oracle.output(x, ALPHA, 2, "ceil")
    right_or_refused(lambda: torch.func.vmap(lambda x: cg.qrelu(x, ALPHA, 2))(x), want)
    want = oracle.output(x, steps[:, 0], 2, "ceil", 0)
    right_or_refused(lambda: torch.func.vmap(lambda x, alpha: cg.qrelu(x, alpha, 2))(x, steps), want)
    want = oracle.Staircase64(x, ALPHA, 2, "ceil").slope("relu").float()
    one = torch.func.grad(lambda x: cg.qrelu(x, ALPHA, 2, ste="relu").sum())
    right_or_refused(lambda: torch.func.vmap(one)(x), want)


@pytest.mark.parametrize("ste", BIT_STES)
def test_forward_mode(reference_or_native, ste):
    x, tangent = sample(50), sample(50, seed=1)
    want = oracle.Staircase64(x, ALPHA, 2, "ceil").grad_x(tangent, ste).float()
    right_or_refused(lambda: torch.func.jvp(lambda x: cg.qrelu(x, ALPHA, 2, ste=ste), (x,), (tangent,))[1], want)
    right_or_refused(lambda: torch.func.jacrev(lambda x: cg.qrelu(x, ALPHA, 2, ste=ste))(x) @ tangent, want)

    def dual():
        with torch.autograd.forward_ad.dual_level():
            y = cg.qrelu(torch.autograd.forward_ad.make_dual(x, tangent), ALPHA, 2, ste=ste)
            y_tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
            assert y_tangent is not None, "the tangent was dropped in silence"
            return y_tangent

    right_or_refused(dual, want)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_torch_function_mode_sees_the_call(reference_or_native, inplace):
    """As one of torch's own functions. Without a mode the native library is called past torch.ops."""
    seen = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(70)
    with Recorder():
        y = cg.qrelu(x.clone(), torch.tensor([0.5]), 2, inplace=inplace)
    assert seen.count(cg.qrelu) == 1
    assert torch.equal(y, cg.qrelu(x, torch.tensor([0.5]), 2))


def test_a_tensor_with_a_torch_function_sees_the_call(reference_or_native):
    seen = []

    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    y = cg.qrelu(torch.randn(70).as_subclass(Named), torch.tensor([0.5]), 2)
    assert isinstance(y, Named)
    assert seen.count(cg.qrelu) == 1
