"""Squares of outputs in statements of their own: known by the autograd graph, and kept as the outputs' codes."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from packing_cases import kept_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

import coarsegrad as cg

BITS, N = 2, 48
SQUARES = {
    "square": lambda y: y.square(),
    "torch.square": torch.square,
    "**": lambda y: y**2,
    "pow": lambda y: y.pow(exponent=2),
    "torch.pow": lambda y: torch.pow(y, 2.0),
    "*": lambda y: y * y,
    "mul": lambda y: torch.mul(y, y),
    "of a view": lambda y: y.flatten().square().view_as(y),
    "of two views": lambda y: (y.view(-1) * y.reshape(-1)).view_as(y),
    "of a transpose": lambda y: (y.transpose(0, -1) ** 2).transpose(0, -1),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PACKED = cg.packed_activations


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(make, *wanted, block=contextlib.nullcontext):
    """Bytes kept packed, once the gradients are those without to the bit."""
    found = []
    for packing in (PACKED, contextlib.nullcontext):

        def packed(packing=packing):
            with packing():
                return make()

        with block():
            kept, out = kept_bytes(packed, *wanted)
        found.append((kept, torch.autograd.grad(out.float().sum(), wanted)))
    (kept, got), (_, want) = found
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    return kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spelling", SQUARES)
def test_every_spelling_is_kept_as_the_codes(spelling, dtype):
    """The square's own gradient, the gate and the next layer share them; x and y are dead by then."""
    x = numbers(4, N, dtype=dtype).requires_grad_()
    layer = nn.Linear(N, 5, bias=False, dtype=dtype)
    alpha = torch.tensor([0.3])

    def forward():
        y = cg.qrelu(x * 1, alpha, BITS, ste="relu")
        y = SQUARES[spelling](y)
        return layer(y)

    assert both(forward, x, layer.weight) == x.numel() * BITS // 8 + 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_bits_are_those_of_every_level_squared(bits, dtype):
    """Levels whose squares are subnormal, rounded, or infinite."""
    for alpha in (torch.finfo(dtype).smallest_normal ** 0.5 / 3, 0.3, torch.finfo(dtype).max ** 0.5 / 2**bits * 1.5):
        x = (torch.arange(-1, 2**bits + 1).double() * alpha).to(dtype).requires_grad_()
        kept = []
        for square in SQUARES["**"], SQUARES["*"]:
            with PACKED():
                z = square(cg.qrelu(x, torch.tensor([alpha], dtype=torch.float64), bits, ste="relu"))
                kept.append(z.sigmoid() * z)
            assert torch.equal(kept[-1].grad_fn._saved_other, z)
        assert z.isfinite().all() or alpha > 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(value):
    """As for an output: inf is the top level, and a NaN comes back from its code as that."""
    x = torch.tensor([value, 0.5, 2.0], requires_grad=True)
    with PACKED():
        z = cg.qrelu(x, torch.tensor([0.25]), BITS, ste="relu").square()
        out = z.sigmoid() * z
    kept = out.grad_fn._saved_other
    assert torch.equal(kept, torch.tensor([0.0 if value < 0 else 0.5625, 0.25, 0.5625]))
    assert math.isnan(z[0].item()) == math.isnan(value)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_channels(memory_format):
    x = numbers(2, 8, 5, 3).contiguous(memory_format=memory_format).requires_grad_()
    layer, alpha = nn.Conv2d(8, 2, 3, padding=1), torch.rand(8).add(0.1)

    def forward():
        y = cg.qrelu(x, alpha, BITS, ste="relu", channel_dim=1)
        return layer(y * y)

    assert both(forward, x, layer.weight, layer.bias) == x.numel() * BITS // 8 + alpha.nbytes


@pytest.mark.parametrize("spelling", ["square", "*"])
def test_inside_of_other_hooks(spelling):
    """Those get the codes of the output, and of its square while the output lives."""
    x, weight = numbers(4, N).requires_grad_(), numbers(N, 5).requires_grad_()

    def forward():
        y = cg.qrelu(x, torch.tensor([0.3]), BITS, ste="relu")
        z = SQUARES[spelling](y)
        return z @ weight

    both(forward, x, weight, block=torch.autograd.graph.save_on_cpu)


def test_inside_of_a_checkpoint():
    x, weight = numbers(4, N).requires_grad_(), numbers(N, 5).requires_grad_()
    runs = []

    def square(y):
        runs.append(1)
        return y * y

    def forward():
        y = cg.qrelu(x, torch.tensor([0.3]), BITS, ste="relu")
        return checkpoint(square, y, use_reentrant=False) @ weight

    both(forward, x, weight)
    assert len(runs) == 4  # a forward and a recomputation each: to look at what is kept recomputes nothing


@pytest.mark.parametrize("where", ["before the square", "after the square", "after both are kept"])
def test_a_write_that_autograd_does_not_see(where):
    """The square of what was then, and no code of what was written over."""
    x, weight = numbers(4, N).requires_grad_(), numbers(N, 5).requires_grad_()

    def forward():
        y = cg.qrelu(x * 1, torch.tensor([0.3]), BITS, ste="relu").view(4, N)
        if where == "after both are kept":
            y @ weight
        with torch.no_grad():
            if where != "after the square":
                y.mul_(1.5)
        z = y.square()
        with torch.no_grad():
            if where == "after the square":
                z.mul_(1.5)
        return z @ weight

    kept = both(forward, x, weight)
    assert kept >= x.nbytes  # the square


OTHER_PRODUCTS = {
    "with a weight": lambda y, w: y * w,
    "with its constant": lambda y, w: y * y.detach(),
    "of two halves": lambda y, w: y[:, : N // 2] * y[:, N // 2 :],
    "of two outputs of one split": lambda y, w: torch.mul(*y.chunk(2, dim=1)),
    "with its transpose": lambda y, w: y.view(4, 4, -1) * y.view(4, 4, -1).transpose(0, 1),
    "with itself, turned": lambda y, w: y * y.flip(1),
    "cubed": lambda y, w: y**3,
    "the root": lambda y, w: (y + 1) ** 0.5,
    "a part squared": lambda y, w: y[:, 3:] ** 2,
    "one row for all, squared": lambda y, w: y[:1].expand(4, N) ** 2,
    "a column for all, squared": lambda y, w: y[:, :1].expand(4, N) ** 2,
    "squared of another": lambda y, w: (y * 2) ** 2,
    "by a tensor": lambda y, w: y ** torch.tensor(2.0),
    "in place": lambda y, w: y.square_(),
    "the fourth power": lambda y, w: y.square().square(),
}


@pytest.mark.parametrize("product", OTHER_PRODUCTS)
def test_other_products(product):
    """Gradients as without a packing, whatever is kept."""
    x, w = numbers(4, N).requires_grad_(), numbers(4, N, seed=1).requires_grad_()

    def forward():
        z = OTHER_PRODUCTS[product](cg.qrelu(x, torch.tensor([0.3]), BITS, ste="relu"), w)
        return z.exp() * z * w.flatten()[: z.numel()].view_as(z)

    both(forward, x, w)


def test_the_fourth_power_is_kept_as_the_codes():
    x = numbers(4, N).requires_grad_()
    layer = nn.Linear(N, 5, bias=False)

    def forward():
        y = cg.qrelu(x * 1, torch.tensor([0.3]), BITS, ste="relu")
        return layer(y.square() ** 2)

    assert both(forward, x, layer.weight) == x.numel() * BITS // 8 + 4


def test_twice_through_the_graph():
    """A second derivative, and a square whose own node has let go of what it kept."""
    x, weight = numbers(4, N).requires_grad_(), numbers(N, 5).requires_grad_()
    found = []
    for packing in (PACKED, contextlib.nullcontext):
        with packing():
            z = cg.qrelu(x, torch.tensor([0.3]), BITS, ste="relu").square()
            (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
            again = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
            torch.autograd.grad(z.sum(), x)
            out = z @ weight
        found.append((*again, *torch.autograd.grad(out.sum(), weight)))
    assert all(map(torch.equal, *found))


def test_autocast():
    """Of a float32 output. The next layer's own copy of that is kept, as nothing tells that the square was
    not written to before it; QReLU(squared=True) knows its square, and keeps the codes alone."""
    x, layer = numbers(4, N).requires_grad_(), nn.Linear(N, 5, bias=False)
    codes = x.numel() * BITS // 8 + 4

    def forward(squared):
        activation = cg.QReLU(BITS, ste="relu", alpha=0.3, squared=squared)
        with torch.autocast("cpu", torch.bfloat16):
            y = activation(x * 1)
            return layer(y if squared else y.square())

    half = layer.weight.numel() * 2  # autocast's copy
    assert both(lambda: forward(True), x, layer.weight) == codes + half
    assert both(lambda: forward(False), x, layer.weight) == codes + half + x.numel() * 2
