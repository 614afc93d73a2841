"""Packing what is kept of a QReLU's output: the same gradients to the bit, and the bytes."""

from __future__ import annotations

import contextlib
import copy

import oracle
import pytest
import torch
from packing_cases import CASES, assert_same, build, gradients, images, kept_bytes, packed_forward
from torch import nn

import coarsegrad as cg
from coarsegrad.experiments.models import lenet5

pytestmark = pytest.mark.usefixtures("reference_or_native")


# ------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ste", oracle.STES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same(case, ste, dtype):
    for rounding in oracle.ROUNDINGS:
        model, x = build(case, dtype, ste=ste, rounding=rounding)
        want = gradients(model, x)
        assert any(g.count_nonzero() for g in want.values())
        assert_same(gradients(model, x, cg.packed_activations()), want)


@pytest.mark.parametrize("alpha_grad", oracle.ALPHA_GRADS)
@pytest.mark.parametrize("ste", oracle.STES)
def test_gradients_with_a_learned_alpha_of_each_channel(ste, alpha_grad):
    for rounding in ("ceil", "nearest"):
        torch.manual_seed(0)
        settings = {"ste": ste, "rounding": rounding, "learn_alpha": True, "alpha_grad": alpha_grad}
        alpha = torch.linspace(0.1, 0.4, 8)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), cg.QReLU(3, alpha=alpha, num_channels=8, **settings), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 1), cg.QReLU(3, alpha=alpha, num_channels=8, **settings), nn.Flatten(),
        ).to(memory_format=torch.channels_last)  # fmt: skip
        x = images(torch.float32)
        assert_same(gradients(model, x, cg.packed_activations()), gradients(model, x))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_of_a_code(bits):
    for ste in ("relu", "clipped_relu"):
        model, x = build("mlp", bits=bits, ste=ste)
        assert_same(gradients(model, x, cg.packed_activations()), gradients(model, x))


def test_lenet():
    torch.manual_seed(0)
    model = lenet5(lambda: cg.QReLU(2))
    x = torch.randn(4, 1, 28, 28)
    want = gradients(copy.deepcopy(model), x)
    assert_same(gradients(model, x, cg.packed_activations()), want)


def test_an_ste_of_your_own():
    """Its slopes on the two sides are not 0 and 1, and follow from the codes."""
    with cg.register_ste("leaky", lambda u, q: torch.where(u > 0, 0.5, 0.125).to(u.dtype), needs="positive"):
        model, x = build("mlp", ste="leaky")
        assert_same(gradients(model, x, cg.packed_activations()), gradients(model, x))


@pytest.mark.parametrize("alpha", [1e-8, 3e4])
def test_levels_that_collapse_or_overflow(alpha):
    """In float16 the first levels of the one are 0, so that x > 0 is not y > 0, and the last of the other infinite."""
    x = (torch.tensor([-1.0, 0.0, 1e-7, 1.0, 6e4]) * torch.tensor(1.0)).to(torch.float16).requires_grad_()
    found = []
    for block in (contextlib.nullcontext(), cg.packed_activations()):
        with block:
            y = cg.qrelu(x, torch.tensor([alpha]), 3, ste="relu")
            z = y * y
        (grad,) = torch.autograd.grad(z, x, torch.ones_like(z))
        found.append(grad)
    assert torch.equal(*[g.nan_to_num(nan=7.0) for g in found])


# ---------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_bytes_between_two_linears(bits, dtype):
    """relu b bits, clipped_relu and trust b + 1, beside one copy of alpha."""
    n, width = 64 * 40, oracle.CODE_WIDTH[bits]
    first, second = nn.Linear(16, 40, dtype=dtype), nn.Linear(40, 8, dtype=dtype)
    x = torch.randn(64, 16).to(dtype)
    alpha = torch.tensor([0.3])
    for ste, want in (("relu", width), ("clipped_relu", width + 1), ("trust", width + 1), ("identity", width)):
        for trainable in (True, False):
            second.requires_grad_(trainable)

            def forward(ste=ste):
                with cg.packed_activations():
                    return second(cg.qrelu(first(x), alpha, bits, ste=ste))

            got, _ = kept_bytes(forward, x, *first.parameters(), *second.parameters())
            frozen = 0 if ste == "identity" else n // 8
            assert got == (n * want // 8 + alpha.nbytes if trainable else frozen), (ste, trainable)
            plain, _ = kept_bytes(
                lambda ste=ste: second(cg.qrelu(first(x), alpha, bits, ste=ste)),
                x, *first.parameters(), *second.parameters(),
            )  # fmt: skip
            assert plain == frozen + (n * dtype.itemsize if trainable else 0)


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("alpha_grad", oracle.ALPHA_GRADS)
def test_bytes_with_a_learned_alpha(alpha_grad, rounding):
    n = 64 * 40
    first, second = nn.Linear(16, 40), nn.Linear(40, 8)
    x = torch.randn(64, 16)
    for ste in oracle.STES:
        alpha = torch.tensor([0.3], requires_grad=True)

        def forward(ste=ste, alpha=alpha):
            with cg.packed_activations():
                return second(cg.qrelu(first(x), alpha, 2, ste=ste, rounding=rounding, alpha_grad=alpha_grad))

        got, _ = kept_bytes(forward, x, alpha, *first.parameters(), *second.parameters())
        codes = n * 2 // 8
        if oracle.saves_x(ste, alpha_grad):
            beside = 4 * n
        elif alpha_grad != "exact":
            beside = n * 2 // 8
        else:
            beside = n // 8 if ste in ("clipped_relu", "trust") or (ste == "relu" and rounding == "nearest") else 0
        assert got == codes + beside + 4, ste


def test_under_nearest_the_gate_of_relu_is_not_in_the_codes():
    first, second, alpha = nn.Linear(16, 40), nn.Linear(40, 8), torch.tensor([0.3])
    x = torch.randn(64, 16)
    for rounding, width in (("ceil", 2), ("hwgq", 2), ("nearest", 3)):

        def forward(rounding=rounding):
            with cg.packed_activations():
                return second(cg.qrelu(first(x), alpha, 2, ste="relu", rounding=rounding))

        got, _ = kept_bytes(forward, x, *first.parameters(), *second.parameters())
        assert got == 64 * 40 * width // 8 + 4


def test_an_output_under_frozen_layers_is_packed_too():
    """No gradient goes through the activation, but the next Linear wants its input."""
    first, second, alpha = nn.Linear(16, 40).requires_grad_(False), nn.Linear(40, 8), torch.tensor([0.3])
    x = torch.randn(64, 16)

    def forward():
        with cg.packed_activations():
            return second(cg.qrelu(first(x), alpha, 2))

    got, out = kept_bytes(forward, x, *second.parameters())
    assert got == 64 * 40 * 2 // 8 + 4
    out.sum().backward()
    weight_grad = second.weight.grad.clone()
    second.weight.grad = None
    second(cg.qrelu(first(x), alpha, 2)).sum().backward()
    assert torch.equal(second.weight.grad, weight_grad)


def test_nothing_is_kept_without_grad():
    model, x = build("mlp")
    with torch.no_grad():
        got, y = kept_bytes(lambda: packed_forward(model, x))
    assert got == 0 and y.grad_fn is None


# ------------------------------------------------------------------------------- views and consumers

VIEWS = {
    "transpose": lambda y: y.transpose(0, 1),
    "flatten": lambda y: y.flatten(),
    "view": lambda y: y.view(2, 4, -1),
    "slice": lambda y: y[1:, 3:5],
    "step": lambda y: y[::2],
    "expand": lambda y: y[:, :, None].expand(-1, -1, 3),
    "narrowed twice": lambda y: y.narrow(1, 1, 4).narrow(1, 2, 2),
    "detached": lambda y: y.detach(),
    "unfold": lambda y: y.unfold(1, 3, 1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_kept_as_codes(view):
    x = torch.randn(8, 6, requires_grad=True)
    weight = torch.randn_like(VIEWS[view](x)).requires_grad_()
    alpha = torch.tensor([0.3])

    def forward():
        with cg.packed_activations():
            return VIEWS[view](cg.qrelu(x, alpha, 2)) * weight

    got, z = kept_bytes(forward, weight)
    assert got == 6 + 12 + 4 if view != "detached" else got == 12 + 4
    z.backward(torch.ones_like(z))
    assert torch.equal(weight.grad, VIEWS[view](cg.qrelu(x, alpha, 2)).detach())


def test_a_view_that_codes_cannot_give_is_kept_whole():
    x, alpha = torch.randn(8, 6, requires_grad=True), torch.tensor([0.3])
    weight = torch.randn(8, 6, requires_grad=True)
    with cg.packed_activations():
        y = cg.qrelu(x, alpha, 2)
        z = torch._neg_view(y) * weight
    (grad,) = torch.autograd.grad(z.sum(), weight)
    assert torch.equal(grad, -y)


def test_several_consumers_share_the_codes():
    x, alpha = torch.randn(64, 16), torch.tensor([0.3])
    first, heads = nn.Linear(16, 32), nn.ModuleList(nn.Linear(32, 8) for _ in range(3))

    def forward(packed=True):
        with cg.packed_activations() if packed else contextlib.nullcontext():
            y = cg.qrelu(first(x), alpha, 2, ste="relu")
            return sum(head(y).square().sum() for head in heads) + (y * y).sum()

    def grads(packed):
        return torch.autograd.grad(forward(packed), [*first.parameters(), *heads.parameters()])

    for got, want in zip(grads(True), grads(False)):
        assert torch.equal(got, want)
    got, _ = kept_bytes(forward, x, *first.parameters(), *heads.parameters())
    outputs = 3 * 64 * 8 * 4  # what square() keeps
    assert got == outputs + 64 * 32 * 2 // 8 + 4


def test_attention_on_quantized_queries_keys_and_values():
    """matmul keeps expanded and reshaped views of all three."""
    x, alpha = torch.randn(2, 6, 12, requires_grad=True), torch.tensor([0.3])
    projections = [nn.Linear(12, 12) for _ in range(3)]

    def forward():
        q, k, v = (cg.qrelu(p(x), alpha, 4).view(2, 6, 3, 4).transpose(1, 2) for p in projections)
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).square().sum()

    parameters = [p for projection in projections for p in projection.parameters()]
    want = torch.autograd.grad(forward(), [x, *parameters])
    with cg.packed_activations():
        loss = forward()
    for a, b in zip(torch.autograd.grad(loss, [x, *parameters]), want):
        assert torch.equal(a, b)


def test_one_activation_straight_after_another():
    """The second keeps its x, which is the first one's output: as codes."""
    x, alpha = torch.randn(64, requires_grad=True), torch.tensor([0.3])

    def forward(packed=True):
        with cg.packed_activations() if packed else contextlib.nullcontext():
            return cg.qrelu(cg.qrelu(x, alpha, 4, ste="relu"), 2 * alpha, 2, ste="reverse_exponential")

    got, y = kept_bytes(forward, alpha)
    assert got < 64 * 2
    (grad,) = torch.autograd.grad(y.sum(), x)
    (want,) = torch.autograd.grad(forward(False).sum(), x)
    assert torch.equal(grad, want)
