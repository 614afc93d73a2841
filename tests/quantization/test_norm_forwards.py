"""The forward that quantize_ gives to norms: one pass, for whoever reads them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import coarsegrad as cg

SIZE = 32


class Block(nn.Module):
    """Two layers that read a norm, and a sum that may read it too."""

    def __init__(self, norm, residual=False):
        super().__init__()
        self.norm, self.residual = norm, residual
        self.a, self.b = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        n = self.norm(x)
        y = self.a(n) * self.b(n)
        return y + n if self.residual else y


class Llama(nn.Module):
    def __init__(self, shifted=False, twice=True):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(SIZE)), 1e-6
        self.shifted, self.twice = shifted, twice

    def forward(self, x):
        wide = x.float()
        n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.twice:
            return (1 + self.weight if self.shifted else self.weight) * n.to(x.dtype)
        return (n * (1 + self.weight.float() if self.shifted else self.weight.float())).to(x.dtype)


class LlamaRMSNorm(Llama):
    pass


class _Passes(TorchDispatchMode):
    """(whether the norm's own output is asked for, the bits) of each pass."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.coarsegrad.norm_qsigned.default:
            self.made.append((args[10], args[7]))
        return function(*args, **(kwargs or {}))


def passes(model, x):
    with _Passes() as seen:
        y = model(x)
    grads = torch.autograd.grad(y.sum(), [x, *model.parameters()])
    return seen.made, [y.detach(), *grads]


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("gradient", ["exact", "coarse"])
@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(SIZE), LlamaRMSNorm], ids=["layer", "rms"])
def test_one_pass_from_the_second_forward_on(make, gradient, residual):
    model, x = Block(make(), residual), random(6, SIZE)
    cg.quantize_(model, inputs=4, norms=gradient)
    first, wanted = passes(model, x)
    assert first == [(True, None), (False, 4)]
    for same in (model, copy.deepcopy(model)):
        made, got = passes(same, x)
        assert made == [(True, 4)] and all(map(torch.equal, got, wanted))
    with cg.packed_activations():
        assert all(map(torch.equal, passes(model, x)[1], wanted))


def test_readers_of_several_kinds():
    """A pass for each, as the norm knows no single one."""
    model, x = Block(nn.RMSNorm(SIZE)), random(6, SIZE)
    model.c = nn.Linear(SIZE, SIZE)
    model.c.weight = model.b.weight  # a weight of two modules is not rotated
    cg.quantize_(model, inputs={"bits": 4, "rotation": 16}, norms="coarse")
    results = []
    for _ in range(2):
        with _Passes() as seen:
            y = model(x)
        assert seen.made == [(True, None), (False, 4), (False, 4)]
        results.append((y.detach(), *torch.autograd.grad(y.sum(), [x, model.norm.weight, model.a.weight])))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_where_it_rounds_is_found(shifted, twice):
    norm = type("OwnRMSNorm", (Llama,), {})(shifted, twice)
    model = Block(norm)
    cg.quantize_(model, inputs=4, norms="coarse")
    formula = vars(norm)["forward"].formula
    assert (formula.kind, formula.shifted, formula.rounds_twice) == ("rms", shifted, twice)
    assert formula.eps == 1e-6


def test_the_dtype_of_the_output_is_the_modules():
    x = random(6, SIZE).detach().bfloat16()
    for norm, wanted in ((LlamaRMSNorm(), torch.float32), (LlamaRMSNorm(twice=False), torch.bfloat16)):
        own = norm(x)
        assert own.dtype == wanted
        cg.quantize_(Block(norm), inputs=4, norms="exact")
        got = norm(x)
        assert got.dtype == wanted
        torch.testing.assert_close(got, own, rtol=0.02, atol=0.02)
    norm = nn.LayerNorm(SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = norm(x).dtype
        cg.quantize_(Block(norm), inputs=4, norms="exact")
        assert norm(x).dtype == wanted


def test_transforms_of_torch_func_have_the_modules_own():
    model, x = Block(nn.RMSNorm(SIZE)), random(6, SIZE).detach()
    cg.quantize_(model, inputs=4, norms="coarse")
    whole = model(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(model)(x), whole, rtol=0.1, atol=0.1)


def test_there_is_no_second_derivative():
    model, x = Block(nn.RMSNorm(SIZE), residual=True), random(6, SIZE)
    cg.quantize_(model, inputs=4, norms="exact")
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_undone_and_not_done_twice():
    norm = nn.LayerNorm(SIZE)
    model, x = Block(norm), random(6, SIZE)
    wanted, keys = norm(x), list(model.state_dict())
    report = cg.quantize_(model, inputs=4, norms="exact")
    assert list(model.state_dict()) == keys and "forward" in vars(norm)
    with pytest.raises(ValueError, match="it has a staircase already"):
        cg.quantize_(model, inputs=4, norms="exact")
    report.undo()
    assert "forward" not in vars(norm) and torch.equal(norm(x), wanted)
    norm.forward = norm.forward
    with pytest.raises(ValueError, match="its forward was replaced on this instance"):
        cg.quantize_(model, inputs=4, norms="exact")
