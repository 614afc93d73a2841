"""torch.func's transforms, one inside of another and beside autograd, and compiled autograd: right, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import coarsegrad as cg

ALPHA = torch.tensor([0.4])
OWN = {
    "own_nothing": ("nothing", lambda u, q: torch.full_like(u, 0.5)),
    "own_relu": ("positive", lambda u, q: (u > 0).to(u.dtype)),
    "own_codes": ("codes", lambda u, q: torch.exp(-u) * (u > 0)),
}
LINEAR = ("relu", "clipped_relu", "identity", "reverse_exponential_step", *OWN)  # with fixed alpha
OTHERS = ("log_tailed_relu", "reverse_exponential", "own_x")


@pytest.fixture(autouse=True, scope="module")
def own_stes():
    with cg.register_ste("own_x", lambda u, q: torch.sigmoid(u) * (u > 0)):
        handles = [cg.register_ste(name, gprime, needs=needs) for name, (needs, gprime) in OWN.items()]
        yield
        for handle in handles:
            handle.close()


def sample(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(ste, inplace=False):
    return lambda x: (cg.qrelu(x * 1, ALPHA, 2, ste=ste, inplace=inplace) ** 2 * torch.arange(1.0, 8)).sum()


def twice_by_autograd(loss, x):
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(z), z, create_graph=True)
    return torch.autograd.grad(g.sum(), z)[0]


@pytest.mark.parametrize("inplace", [False, True], ids=["plain", "inplace"])
@pytest.mark.parametrize("ste", LINEAR)
def test_twice(ste, inplace):
    x, loss = sample(5, 7), loss_of(ste, inplace)
    want = twice_by_autograd(loss, x)
    assert want.any()
    assert torch.equal(grad(lambda x: grad(loss)(x).sum())(x), want)
    assert torch.equal(jacrev(lambda x: grad(loss)(x).sum())(x), want)
    assert torch.equal(jacrev(grad(loss))(x).sum((0, 1)), want)
    z = x.clone().requires_grad_()  # autograd over a transform
    assert torch.equal(torch.autograd.grad(grad(loss)(z).sum(), z)[0], want)
    assert torch.equal(vmap(grad(lambda row: grad(loss)(row).sum()))(x), want)
    assert torch.equal(grad(lambda x: vmap(grad(loss))(x).sum())(x), want)


def test_three_times():
    def loss(x):
        return (cg.qrelu(x, ALPHA, 2, ste="relu") ** 3).sum()

    x = sample(9)
    third = grad(lambda x: grad(lambda x: grad(loss)(x).sum())(x).sum())(x)
    assert torch.equal(third, 6.0 * (x > 0))


def test_the_value_of_an_outer_transform_inside_of_an_inner_one():
    """The inner one has nothing to differentiate in the qrelu; the outer one has."""
    x = sample(9)
    got = grad(lambda x: grad(lambda z: (cg.qrelu(x, ALPHA, 2, ste="relu") * z).sum())(torch.ones(9)).sum())(x)
    assert torch.equal(got, (x > 0).float())


@pytest.mark.parametrize("ste", OTHERS)
def test_twice_is_refused_where_x_is_kept(ste):
    x, loss = sample(5, 7), loss_of(ste)
    z = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(z), z)
    assert torch.equal(grad(loss)(x), want)
    for compute in (lambda: grad(lambda x: grad(loss)(x).sum())(x), lambda: jacrev(grad(loss))(x)):
        with pytest.raises((RuntimeError, NotImplementedError), match="differentiated twice|second derivative"):
            compute()
    z = x.clone().requires_grad_()
    with pytest.raises((RuntimeError, NotImplementedError), match="differentiated twice|second derivative"):
        torch.autograd.grad(grad(loss)(z).sum(), z)


@pytest.mark.parametrize("ste", ["relu", "own_relu", "own_x"])
def test_forward_mode_is_refused(ste):
    x, loss = sample(5, 7), loss_of(ste)
    for compute in (
        lambda: jvp(loss, (x,), (x,)),
        lambda: jvp(grad(loss), (x,), (x,)),
        lambda: hessian(loss)(x),
        lambda: grad(lambda x: jvp(loss, (x,), (torch.ones_like(x),))[1])(x),
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            compute()


def test_a_mapped_alpha_is_refused():
    x = sample(5, 7)
    with pytest.raises(
        NotImplementedError, match="vmap over alpha is not supported by qrelu; use one alpha per channel"
    ):
        vmap(lambda alpha: cg.qrelu(x, alpha[None], 2))(torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("alpha_grad", ["exact", "three_valued", "two_valued", "chain"])
@pytest.mark.parametrize("ste", ["relu", "clipped_relu", "own_codes"])
def test_a_learned_alpha(ste, alpha_grad):
    x = sample(5, 7)

    def loss(alpha):
        return (cg.qrelu(x, alpha, 2, ste=ste, alpha_grad=alpha_grad) ** 2).sum()

    alpha = ALPHA.clone().requires_grad_()
    assert torch.equal(grad(loss)(ALPHA), torch.autograd.grad(loss(alpha), alpha)[0])
    with pytest.raises((RuntimeError, NotImplementedError), match="differentiated twice|second derivative"):
        grad(lambda alpha: grad(loss)(alpha).sum())(ALPHA)


class Network(nn.Module):
    def __init__(self, fused, **settings):
        super().__init__()
        torch.manual_seed(0)
        first, act, second = nn.Linear(6, 8), cg.QReLU(2, **settings), nn.Linear(8, 3)
        self.first = first
        self.rest = cg.nn.QReLULinear(act, second) if fused else nn.Sequential(act, second)

    def forward(self, x):
        return self.rest(self.first(x))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("ste", ["relu", "own_relu"])
def test_a_meta_gradient(fused, ste):
    """MAML: a step of gradient descent inside, differentiated; with torch.func and with autograd."""
    model, x, y = Network(fused, ste=ste), sample(5, 6), sample(5, 6, seed=1)
    plain = Network(False, ste=ste)
    names = dict(zip(dict(model.named_parameters()), plain.parameters()))

    def adapted(parameters):
        step = grad(lambda p: functional_call(model, p, (x,)).square().sum())(parameters)
        parameters = {name: p - 0.1 * step[name] for name, p in parameters.items()}
        return functional_call(model, parameters, (y,)).square().sum()

    got = grad(adapted)(dict(model.named_parameters()))

    parameters = list(plain.parameters())
    order = list(dict(plain.named_parameters()))
    steps = torch.autograd.grad(plain(x).square().sum(), parameters, create_graph=True)
    moved = {name: p - 0.1 * step for name, p, step in zip(order, parameters, steps)}
    want = torch.autograd.grad(functional_call(plain, moved, (y,)).square().sum(), list(names.values()))
    for name, expected in zip(names, want, strict=True):
        assert torch.allclose(got[name], expected, rtol=1e-4, atol=1e-6) and got[name].any(), name


@pytest.mark.parametrize("fused", [False, True])
def test_a_packed_model(fused):
    """Packing does nothing under a transform, where torch has no hooks for what is kept."""
    model, x = Network(fused, ste="relu", squared=fused), sample(5, 1, 6)  # squared: not fused, but packed
    per_sample = vmap(grad(lambda p, x: functional_call(model, p, (x,)).square().sum()), (None, 0))
    parameters = dict(model.named_parameters())
    want = per_sample(parameters, x)
    with cg.pack_activations_(model):
        got = per_sample(parameters, x)
        model(x[0]).square().sum().backward()
    for name, p in parameters.items():
        assert torch.equal(got[name], want[name])
        assert torch.allclose(p.grad, want[name][0], rtol=1e-4, atol=1e-6) and p.grad.any()


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_the_fused_layers(kind):
    """Under a transform they are the qrelu and the layer, one after the other."""
    if kind == "linear":
        x, weight = sample(4, 5, 7), sample(3, 7, seed=1)
        fused, layer = (lambda x, w: cg.qrelu_linear(x, 0.4, w, bits=2)), F.linear
    else:
        x, weight = sample(4, 2, 3, 5, 5), sample(4, 3, 3, 3, seed=1)
        fused, layer = (lambda x, w: cg.qrelu_conv2d(x, 0.4, w, bits=2)), F.conv2d

    def pair(x, w):
        return layer(cg.qrelu(x, 0.4, 2), w)

    for both in (lambda f: grad(lambda w: f(x[0], w).square().sum())(weight),
                 lambda f: grad(lambda x: f(x, weight).square().sum())(x[0]),
                 lambda f: vmap(f, (0, None))(x, weight),
                 lambda f: vmap(grad(lambda x: f(x, weight).square().sum()))(x),
                 lambda f: grad(lambda w: vmap(f, (0, None))(x, w).square().sum())(weight),
                 lambda f: twice_by_func(lambda x: f(x, weight).square().sum(), x[0])):  # fmt: skip
        assert torch.equal(both(fused), both(pair)) and both(pair).any()


def twice_by_func(loss, x):
    return grad(lambda x: grad(loss)(x).square().sum())(x)


# ------------------------------------------------------------------------------------------ compiled autograd


class NotCompiled(nn.Module):
    """A part of the forward that runs eagerly, as after a graph break."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    @torch.compiler.disable
    def forward(self, x):
        return self.part(x)


@pytest.mark.parametrize("settings", [
    {"ste": "relu"}, {"ste": "own_codes"}, {"inplace": True, "learn_alpha": True, "alpha_grad": "exact"},
    {"ste": "log_tailed_relu", "learn_alpha": True, "alpha_grad": "chain", "num_channels": 16},
], ids=str)  # fmt: skip
def test_compiled_autograd_over_an_eager_forward(settings):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), NotCompiled(cg.QReLU(2, **settings)), nn.Linear(16, 4))

    def step(x):
        model(x).square().sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled = torch.compile(step, backend="aot_eager")
        for rows in (4, 6):
            results = []
            for run in (step, compiled):
                model.zero_grad()
                run(sample(rows, 8))
                results.append([p.grad.clone() for p in model.parameters()])
            assert all(map(torch.equal, *results)) and all(g.any() for g in results[0])
    torch._dynamo.reset()
