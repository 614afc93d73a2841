"""Dropout and the square fused into QReLU: the same network as with them apart, and nothing kept for them."""

from __future__ import annotations

import pytest
import saved_bytes
import torch
from torch import nn

import coarsegrad as cg
from coarsegrad.experiments.transformers import T5_SMALL, T5Encoder
from coarsegrad.ste import BUILT_IN

BITS = 2
STES = [ste for ste in BUILT_IN if not cg.stes()[ste].passes_zero] + ["reverse_exponential_step"]


def step(layer, x, dy, seed=7, packed=False):
    """(y, dx, dalpha or None) of one training step."""
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    if packed:
        with cg.packed_activations():
            y = layer(leaf)
    else:
        y = layer(leaf)
    inputs = [leaf, *layer.parameters()]
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("learn_alpha", [False, True])
@pytest.mark.parametrize("ste", STES)
def test_dropout_is_dropout_after_the_activation(reference_or_native, ste, learn_alpha):
    """With p = 1/2 all factors are powers of two: equal to the bit, element by element, gradient by gradient."""
    fused = cg.QReLU(BITS, ste=ste, alpha=0.3, dropout=0.5, learn_alpha=learn_alpha, alpha_grad="exact")
    plain = cg.QReLU(BITS, ste=ste, alpha=0.3, learn_alpha=learn_alpha, alpha_grad="exact")
    x, dy = numbers(40, 33), numbers(40, 33, seed=1)
    got = step(fused, x, dy)
    torch.manual_seed(7)
    mask = torch.nn.functional.dropout(torch.ones_like(x), 0.5)  # 0 or 2; what a dropout of x draws
    want = step(lambda_module(plain, lambda y: y * mask), x, dy)
    assert torch.equal(got[0], want[0]) and (got[0] == 0).any() and (got[0] > 0).any()
    for mine, right in zip(got[1:], want[1:], strict=True):
        assert torch.allclose(mine, right, rtol=1e-5, atol=1e-4), ste
    if ste in ("relu", "clipped_relu"):
        assert torch.equal(got[1], want[1])


def lambda_module(layer, then):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return then(self.layer(x))

    return Both()


def test_dropout_in_evaluation_and_of_nothing_is_none():
    x = numbers(1000)
    plain, fused = cg.QReLU(BITS, alpha=0.3), cg.QReLU(BITS, alpha=0.3, dropout=0.3)
    assert torch.equal(fused.eval()(x), plain(x))
    assert torch.equal(cg.QReLU(BITS, alpha=0.3, dropout=0.0)(x), plain(x))
    torch.manual_seed(5)  # not that of x, whose stream of random numbers would be the same
    y = fused.train()(x)
    dropped = ((y == 0) & (plain(x) > 0)).sum() / (plain(x) > 0).sum()
    assert 0.2 < dropped < 0.4
    levels = set((torch.arange(4) * (fused.alpha / 0.7)).tolist())
    assert set(y.tolist()) == levels


@pytest.mark.parametrize("ste, bits_kept", [("relu", 2), ("clipped_relu", 3), ("reverse_exponential_step", 2)])
def test_bytes_of_a_t5_block_with_dropout(ste, bits_kept):
    """wi -> activation -> dropout -> wo in bfloat16: b/8 bytes an element with relu and (b + 1)/8 with clipped_relu."""
    width, rows = 64, 96
    net = nn.Sequential(cg.QReLU(BITS, ste=ste, dropout=0.1), nn.Linear(width, 8, bias=False)).bfloat16()
    y = numbers(rows, width, dtype=torch.bfloat16).requires_grad_()
    x = y * 1  # as wi hands it over
    with saved_bytes.Kept(*net.parameters(), *net.buffers()) as kept, cg.packed_activations():
        out = net(x)
    assert kept.bytes == rows * width * bits_kept // 8 + 4, "and alpha, which stays float32"
    out.sum().backward()


@pytest.mark.parametrize("ste", ["relu", "clipped_relu"])
def test_a_t5_with_dropout_has_the_same_gradients_packed(ste):
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    grads = []
    for packed in (False, True):
        torch.manual_seed(0)
        config = T5_SMALL.resized(layers=2, vocabulary=64, width=32, heads=2, inner=32, hidden=48, dropout=0.0)
        model = T5Encoder(config, lambda: cg.QReLU(BITS, ste=ste, dropout=0.2))
        torch.manual_seed(1)
        if packed:
            with cg.packed_activations():
                loss = model(tokens).square().mean()
        else:
            loss = model(tokens).square().mean()
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


def test_dropout_of_a_square_is_dropout_after_the_square():
    """With p = 3/4 the root of 1 - p is a power of two."""
    fused, plain = (cg.QReLU(BITS, alpha=0.3, squared=True, dropout=p) for p in (0.75, 0.0))
    x, dy = numbers(40, 33), numbers(40, 33, seed=1)
    got = step(fused, x, dy)
    torch.manual_seed(7)
    mask = torch.nn.functional.dropout(torch.ones_like(x), 0.75)  # 0 or 4
    for mine, right in zip(got, step(lambda_module(plain, lambda y: y * mask), x, dy), strict=True):
        assert torch.equal(mine, right)


def test_dropout_in_the_fused_linear_and_compiled():
    layer = cg.nn.QReLULinear(cg.QReLU(BITS, alpha=0.3, dropout=0.5), nn.Linear(33, 5))
    apart = nn.Sequential(layer.activation, layer.layer)
    x, dy = numbers(7, 33), numbers(7, 5, seed=1)
    for got, want in zip(step(layer, x, dy), step(apart, x, dy), strict=True):
        assert torch.equal(got, want)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, dx, *_ = step(compiled, x, dy)
    assert y.shape == (7, 5) and dx.shape == x.shape
    assert 0.3 < (dx == 0).double().mean() < 1


def test_dropout_does_not_write_over_its_input():
    x = numbers(50)
    before = x.clone()
    cg.QReLU(BITS, dropout=0.5)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("wrong", [1, -0.1, 1.5, float("nan"), "0.1", None, True])
def test_dropout_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=r"dropout must be a number in \[0, 1\), got"):
        cg.QReLU(BITS, dropout=wrong)


def test_dropout_wants_an_ste_without_a_gradient_at_zero():
    with pytest.raises(ValueError, match="dropout needs an STE without a gradient at 0, got ste='identity'"):
        cg.QReLU(BITS, ste="identity", dropout=0.1)
    with cg.register_ste("leaky", lambda u, q: torch.where(u > 0, 1.0, 0.1).to(u.dtype), needs="positive"):
        with pytest.raises(ValueError, match="'leaky'"):
            cg.QReLU(BITS, ste="leaky", dropout=0.1)


# ---------------------------------------------------------------------------------------------- square


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ste", [*BUILT_IN, "reverse_exponential_step"])
def test_the_square_is_the_square_after_the_activation(reference_or_native, ste, dtype, packed):
    x, dy = numbers(40, 33, dtype=dtype), numbers(40, 33, dtype=dtype, seed=1)
    got = step(cg.QReLU(BITS, ste=ste, alpha=0.3, squared=True), x, dy, packed=packed)
    want = step(lambda_module(cg.QReLU(BITS, ste=ste, alpha=0.3), torch.square), x, dy)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("shape, memory_format", [((6, 64), None), ((2, 8, 5, 3), torch.channels_last)])
def test_the_square_is_kept_as_the_codes(shape, memory_format):
    """Between two layers: the codes, which the square's own gradient, the gate and the next layer share."""
    x = numbers(*shape, dtype=torch.bfloat16)
    if memory_format:
        x = x.contiguous(memory_format=memory_format)
    next_layer = nn.Conv2d(8, 2, 3, padding=1) if len(shape) == 4 else nn.Linear(64, 8)
    net = nn.Sequential(cg.QReLU(BITS, ste="relu", squared=True), next_layer.bfloat16())
    results = []
    for packed in (True, False):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with saved_bytes.Kept(*net.parameters(), *net.buffers()) as kept:
            if packed:
                with cg.packed_activations():
                    out = net(leaf)
                assert kept.bytes == x.numel() * BITS // 8 + 4
            else:
                out = net(leaf)
                assert kept.bytes > x.numel() * 4
        results.append(torch.autograd.grad(out.sum(), [leaf, *net.parameters()]))
    assert all(map(torch.equal, *results))


def test_the_square_of_an_output_that_was_written_to_is_kept_whole():
    results = []
    for packed in (True, False):
        leaf = numbers(30).requires_grad_()
        weight = numbers(30, seed=2).requires_grad_()

        def forward(leaf=leaf, weight=weight):
            y = cg.qrelu(leaf, 0.3, BITS, ste="relu")
            y.mul_(3)
            return (cg.packing.square(y) * weight).sum()

        if packed:
            with cg.packed_activations():
                loss = forward()
        else:
            loss = forward()
        results.append(torch.autograd.grad(loss, [leaf, weight]))
    assert all(map(torch.equal, *results))


def test_the_square_in_the_fused_linear():
    layer = cg.nn.QReLULinear(cg.QReLU(BITS, alpha=0.3, squared=True), nn.Linear(33, 5))
    x, dy = numbers(7, 33), numbers(7, 5, seed=1)
    for got, want in zip(step(layer, x, dy), step(nn.Sequential(layer.activation, layer.layer), x, dy), strict=True):
        assert torch.equal(got, want)


def test_what_it_is_shows():
    assert "squared=True, dropout=0.1" in repr(cg.QReLU(BITS, squared=True, dropout=0.1))
