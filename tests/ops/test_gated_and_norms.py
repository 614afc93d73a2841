"""The gated product, and a norm with the staircase after it: gradients, what is saved, packing, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from saved_bytes import Kept
from torch import nn

import coarsegrad as cg

pytestmark = pytest.mark.usefixtures("reference_or_native")

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "identity": lambda x: x,
}


def random_input(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ------------------------------------------------------------------------------------------------ gated products


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_as_the_two_operations(activation, dtype):
    gate, up = (random_input(3, 50, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    dy = random_input(3, 50, dtype=dtype, seed=2)
    wanted = ACTIVATIONS[activation](gate) * up
    got = cg.gated_product(gate, up, activation)
    assert torch.equal(got, wanted)
    grads = (torch.autograd.grad(y, (gate, up), dy) for y in (got, wanted))
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(activation):
    gate, up = (random_input(2, 3, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
    torch.autograd.gradgradcheck(lambda gate, up: cg.gated_product(gate, up, activation), (gate, up))


def test_the_second_derivative_with_respect_to_one_factor():
    gate, up = (random_input(2, 3, dtype=torch.float64, seed=seed) for seed in (0, 1))
    torch.autograd.gradgradcheck(lambda gate: cg.gated_product(gate, up), (gate.clone().requires_grad_(),))
    torch.autograd.gradgradcheck(lambda up: cg.gated_product(gate, up), (up.requires_grad_(),))


def test_vmap_of_a_gradient():
    gate, up = random_input(4, 6), random_input(4, 6, seed=1)
    one = torch.func.grad(lambda g, u: cg.gated_product(g, u).sum(), argnums=(0, 1))
    wanted = torch.autograd.grad(cg.gated_product(gate.requires_grad_(), up.requires_grad_()).sum(), (gate, up))
    torch.testing.assert_close(torch.vmap(one)(gate.detach(), up.detach()), wanted)
    torch.testing.assert_close(
        torch.vmap(one, in_dims=(0, None))(gate.detach(), up.detach()[0])[0][0],
        one(gate.detach()[0], up.detach()[0])[0],
    )


class GatedMLP(nn.Module):
    def __init__(self, activation, staircase):
        super().__init__()
        self.gate, self.up = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32, bias=False)
        self.activation, self.staircase = activation, staircase

    def forward(self, x):
        gate, up = self.staircase(self.gate(x)), self.staircase(self.up(x))
        return self.down(cg.gated_product(gate, up, self.activation))


def mlps():
    for bits in (2, 4, 8):
        yield GatedMLP("silu", cg.QSigned(bits, group=32)), bits, 2 * 2 * 2
    yield GatedMLP("gelu_tanh", cg.QSigned(4)), 4, 2 * 2
    yield GatedMLP("identity", cg.QReLU(4, alpha=0.2, ste="relu")), 4, 0


def gradients(model, x, packed=False):
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    if packed:
        with cg.packed_activations():
            y = model(x)
    else:
        y = model(x)
    y.square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_down_keeps_the_codes_of_gate_and_up(dtype):
    rows = 48
    for model, bits, alpha_bytes in mlps():
        model, x = model.to(dtype), random_input(rows, 32, dtype=dtype)
        assert all(map(torch.equal, gradients(model, x, packed=True), gradients(model, x)))
        with Kept(x, *model.parameters()) as kept, cg.packed_activations():
            y = model(x)
        of_alphas = rows * alpha_bytes if alpha_bytes else 2 * 4  # a copy of each QReLU's alpha
        assert kept.bytes == 2 * rows * 64 * bits // 8 + of_alphas and y.requires_grad


def test_a_product_that_was_written_to_is_saved_as_it_is():
    gate, up = (cg.qsigned(random_input(4, 32, seed=i).requires_grad_(), None, 4) for i in (0, 1))
    layer = nn.Linear(32, 1, bias=False)
    with cg.packed_activations():
        gate, up = (cg.qsigned(random_input(4, 32, seed=i).requires_grad_(), None, 4) for i in (0, 1))
        h = cg.gated_product(gate, up)
        wanted = h.detach().clone() * 2
        with torch.no_grad():
            h.mul_(2)
        layer(h).sum().backward()
    assert torch.equal(layer.weight.grad, wanted.sum(0, keepdim=True))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("change", ["some rows", "written to"])
def test_factors_that_are_not_whole_outputs(change, grad):
    layer, given = nn.Linear(32, 1, bias=False), [random_input(4, 32, seed=i) for i in (0, 1)]

    def gradient():
        layer.zero_grad()
        gate, up = (cg.qsigned(t.clone().requires_grad_(grad), None, 4) for t in given)
        if change == "some rows":
            gate, up = gate[2:], up[2:]
        else:
            with torch.no_grad():
                gate.mul_(2)
        layer(cg.gated_product(gate, up)).sum().backward()
        return layer.weight.grad

    wanted = gradient().clone()
    with cg.packed_activations():
        assert torch.equal(gradient(), wanted)


def test_compiled_down_keeps_codes():
    torch._dynamo.reset()
    model, x = GatedMLP("silu", cg.QSigned(4, group=32)), random_input(48, 32)

    def packed(x):
        with cg.packed_activations():
            return model(x)

    plain = gradients(torch.compile(model, fullgraph=True), x)
    compiled = torch.compile(packed, fullgraph=True)
    model.zero_grad()
    given = x.clone().requires_grad_()
    compiled(given).square().sum().backward()
    assert all(map(torch.equal, [given.grad, *(p.grad for p in model.parameters())], plain))
    with Kept(x, *model.parameters()) as kept:
        y = compiled(x)
    assert kept.bytes == 2 * (48 * 64 // 2 + 48 * 2 * 2) and y.requires_grad


def test_bad_factors():
    x = random_input(2, 4)
    for up, activation, words in (
        (x[:1], "silu", r"up must have gate's shape, dtype and device, \[2, 4\] torch.float32 on cpu, got \[1, 4\]"),
        (x.double(), "silu", "got .*torch.float64"),
        (x, "tanh", "unknown activation 'tanh', must be one of 'silu', 'gelu'"),
    ):
        with pytest.raises(ValueError, match=words):
            cg.gated_product(x, up, activation)
    with pytest.raises(TypeError, match="gate must be a Tensor, got list"):
        cg.gated_product([1.0], x)
    with pytest.raises(TypeError, match="up must be of a dtype in .*, got torch.int64"):
        cg.gated_product(x, torch.ones(2, 4, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------ norms


def norm_and_kind(kind, dtype=torch.float32):
    torch.manual_seed(0)
    norm = nn.RMSNorm(64, eps=1e-6) if kind == "rms" else nn.LayerNorm(64)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(64))
        if kind == "layer":
            norm.bias.copy_(0.1 * torch.randn(64))
    return norm.to(dtype), {"weight": norm.weight, "bias": getattr(norm, "bias", None), "eps": norm.eps}


def staircased(norm, x, arguments, kind, gradient, staircase):
    parameters = (getattr(norm, name, None) for name in ("weight", "bias"))
    settings = {"eps": arguments["eps"], "kind": kind, "gradient": gradient, "staircase": staircase}
    return cg.norm_staircase(x, *parameters, **settings)


@pytest.mark.parametrize("rotation", [None, 32])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_exact_gradient(kind, rotation):
    norm, arguments = norm_and_kind(kind, torch.float64)
    staircase = cg.QSigned(4, group=32, rotation=rotation)
    x, dy = random_input(3, 5, 64, dtype=torch.float64).requires_grad_(), random_input(3, 5, 64, dtype=torch.float64)
    inputs = (x, *norm.parameters())
    wanted = torch.autograd.grad(staircase(norm(x)), inputs, dy)
    y = staircased(norm, x, arguments, kind, "exact", staircase)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotation", [None, 32])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_coarse_gradient_is_the_norms_jacobian_at_the_output(kind, rotation):
    norm, arguments = norm_and_kind(kind, torch.float64)
    with torch.no_grad():
        norm.weight[5] = 0
    staircase = cg.QSigned(3, group=32, rotation=rotation)
    x, dy = random_input(4, 64, dtype=torch.float64).requires_grad_(), random_input(4, 64, dtype=torch.float64, seed=1)
    inputs = (x, *norm.parameters())
    y = staircased(norm, x, arguments, kind, "coarse", staircase)
    got = torch.autograd.grad(y, inputs, dy)

    unrotated, given = (y.detach(), dy) if rotation is None else (cg.hadamard(y.detach(), 32), cg.hadamard(dy, 32))
    weight, bias = norm.weight.detach(), norm.bias.detach() if kind == "layer" else 0
    n = torch.where(weight == 0, 0, (unrotated - bias) / weight)
    m = x.detach().mean(1, keepdim=True) if kind == "layer" else 0
    r = ((x.detach() - m).square().mean(1, keepdim=True) + norm.eps).rsqrt()
    g = given * weight
    jacobian = torch.eye(64) - n[:, :, None] * n[:, None, :] / 64 - (1 / 64 if kind == "layer" else 0)
    torch.testing.assert_close(got[0], r * torch.einsum("bij,bj->bi", jacobian.double(), g))
    torch.testing.assert_close(got[1], (given * n).sum(0))
    if kind == "layer":
        torch.testing.assert_close(got[2], given.sum(0))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_with_8_bits_the_coarse_gradient_is_close(kind):
    norm, arguments = norm_and_kind(kind)
    x, dy = random_input(64, 64).requires_grad_(), random_input(64, 64, seed=1)
    grads = [
        torch.autograd.grad(staircased(norm, x, arguments, kind, gradient, cg.QSigned(8)), (x, norm.weight), dy)
        for gradient in ("exact", "coarse")
    ]
    for exact, coarse in zip(*grads):
        assert F.cosine_similarity(exact.flatten(), coarse.flatten(), 0) > 0.999
        assert not torch.equal(exact, coarse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", ["exact", "coarse"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_what_a_norm_and_its_layers_keep(kind, gradient, dtype):
    norm, arguments = norm_and_kind(kind, dtype)
    layers = nn.ModuleList(nn.Linear(64, 64, bias=False, dtype=dtype) for _ in range(3))
    staircase, x = cg.QSigned(4, group=32), random_input(48, 64, dtype=dtype).requires_grad_()

    def forward(x):
        y = staircased(norm, x, arguments, kind, gradient, staircase)
        return sum(layer(y) for layer in layers)

    model = nn.ModuleList([norm, layers])
    model.forward = forward
    assert all(map(torch.equal, gradients(model, x, packed=True), gradients(model, x)))
    with Kept(*model.parameters()) as kept, cg.packed_activations():
        out = forward(x)
    rows = 48 * 4 * (2 if kind == "layer" and gradient == "exact" else 1)
    of_x = x.nbytes if gradient == "exact" else 0
    assert kept.bytes == 48 * 64 // 2 + 48 * 2 * 2 + rows + of_x and out.requires_grad


def test_a_compiled_norm():
    torch._dynamo.reset()
    norm, arguments = norm_and_kind("rms")
    model = nn.ModuleList([norm, nn.Linear(64, 64)])
    x = random_input(48, 64)

    def forward(x):
        y = staircased(norm, x, arguments, "rms", "coarse", cg.QSigned(4, group=32))
        return model[1](y)

    def packed(x):
        with cg.packed_activations():
            return forward(x)

    def run(function):
        model.zero_grad()
        given = x.clone().requires_grad_()
        function(given).square().sum().backward()
        return [given.grad, *(p.grad.clone() for p in model.parameters())]

    plain = run(torch.compile(forward, fullgraph=True))
    compiled = torch.compile(packed, fullgraph=True)
    assert all(map(torch.equal, run(compiled), plain))
    torch.testing.assert_close(plain, run(forward), rtol=1e-4, atol=1e-4)
    with Kept(x, *model.parameters()) as kept:
        y = compiled(x.clone().requires_grad_())
    assert kept.bytes == 48 * 64 // 2 + 48 * 2 * 2 + 48 * 4 and y.requires_grad


def test_bad_norms():
    norm, arguments = norm_and_kind("rms")
    x = random_input(2, 64)
    good = {**arguments, "kind": "rms", "gradient": "exact", "staircase": cg.QSigned(4)}
    for wrong, words in (
        ({"kind": "batch"}, "unknown kind 'batch', must be one of 'rms', 'layer'"),
        ({"gradient": "none"}, "unknown gradient 'none', must be one of 'exact', 'coarse'"),
        ({"staircase": cg.QSigned(4, alpha=0.1)}, "staircase must be a QSigned with a dynamic alpha"),
    ):
        with pytest.raises(ValueError, match=words):
            cg.norm_staircase(x, **{**good, **wrong})
    with pytest.raises(TypeError, match="x must be a Tensor, got NoneType"):
        cg.norm_staircase(None, **good)
    with pytest.raises(ValueError, match=r"weight must have shape \[32\] \(x's last dimension\), got \[64\]"):
        cg.norm_staircase(x[:, :32], **good)
    with pytest.raises(NotImplementedError, match="norm_staircase does not support transforms of torch.func"):
        torch.func.vmap(lambda x: cg.norm_staircase(x, **good))(x)


@pytest.mark.parametrize("gradient", ["exact", "coarse"])
def test_a_norm_that_is_shifted_and_rounds_twice(gradient):
    """As Gemma multiplies by 1 + weight, and as Llama rounds before that."""
    x, w = random_input(6, 64, dtype=torch.bfloat16), random_input(64, dtype=torch.bfloat16, seed=1)
    dy, settings = random_input(6, 64, seed=2), {"eps": 1e-6, "kind": "rms", "staircase": cg.QSigned(8)}
    grads = []
    for weight, shifted in ((w, True), (1 + w.float(), False)):
        given = [t.clone().requires_grad_() for t in (x, weight)]
        options = {"shifted": shifted, "rounds_twice": True, "gradient": gradient}
        y = cg.norm_staircase(*given, **settings, **options)
        grads.append((y, *torch.autograd.grad(y, given, dy.bfloat16())))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    assert torch.equal(grads[0][2], grads[1][2].bfloat16())
    n = (x.float() * (x.float().square().mean(1, keepdim=True) + 1e-6).rsqrt()).bfloat16() * (1 + w.float())
    torch.testing.assert_close(grads[0][0].float(), n, rtol=0, atol=0.02 * n.abs().max().item())
