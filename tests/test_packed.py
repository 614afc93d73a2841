"""Packing what is kept of a QReLU's output: the same gradients to the bit, fewer bytes, and every way to break it."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import oracle
import pytest
import torch
from kept_bytes import Kept
from torch import nn
from torch.utils.checkpoint import checkpoint

import coarsegrad as cg
from coarsegrad.experiments.models import lenet5
from coarsegrad.experiments.transformers import OPT_125M, T5_SMALL, Opt, T5Encoder

pytestmark = pytest.mark.usefixtures("reference_or_native")

SMALL = {"layers": 2, "width": 16, "heads": 2, "inner": 16, "hidden": 48, "vocabulary": 30, "positions": 12}


def mlp(activation):
    return nn.Sequential(nn.Linear(11, 37), activation(), nn.Linear(37, 23), activation(), nn.Linear(23, 5))


def cnn(activation):
    """Convolutions, both kinds of pooling, and a flatten."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), activation(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), activation(),
        nn.AvgPool2d(2), nn.Conv2d(8, 8, 1), activation(), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def opt(activation):
    return Opt(OPT_125M.resized(**SMALL), activation)


def t5(activation):
    return T5Encoder(T5_SMALL.resized(dropout=0.0, **SMALL), activation)


def images(dtype):
    return torch.randn(2, 3, 8, 8).to(dtype)


def tokens(dtype):
    return torch.randint(30, (2, 12))


CASES = {
    "mlp": (mlp, lambda dtype: torch.randn(9, 11).to(dtype)),
    "cnn": (cnn, images),
    "cnn channels-last": (cnn, lambda dtype: images(dtype).to(memory_format=torch.channels_last)),
    "opt": (opt, tokens),
    "t5": (t5, tokens),
}


def build(case, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    make_model, make_input = CASES[case]
    settings = {"bits": 2, "alpha": 0.25, **settings}
    model = make_model(lambda: cg.QReLU(**settings)).to(dtype)
    x = make_input(dtype)
    if "last" in case:
        model = model.to(memory_format=torch.channels_last)
    return model, x.requires_grad_(x.is_floating_point())


def gradients(model, x, block=None):
    """The loss and every gradient of a step whose forward runs in `block`."""
    model.zero_grad()
    x.grad = None
    with block or contextlib.nullcontext():
        loss = model(x).square().sum()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad, "loss": loss.detach()}
    assert all(g is not None for name, g in found.items() if name != "x")
    return {name: g.clone() for name, g in found.items() if g is not None}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def kept_bytes(forward, *not_counted):
    """Bytes kept by `forward()`, whatever packs them, without those of the tensors given."""
    with Kept(*not_counted) as kept:
        result = forward()
    return kept.bytes, result


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
    """relu b bits, clipped_relu b + 1, beside one copy of alpha."""
    n, width = 64 * 40, oracle.CODE_WIDTH[bits]
    first, second = nn.Linear(16, 40, dtype=dtype), nn.Linear(40, 8, dtype=dtype)
    x = torch.randn(64, 16).to(dtype)
    alpha = torch.tensor([0.3])
    for ste, want in (("relu", width), ("clipped_relu", width + 1), ("identity", width)):
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
        if alpha_grad == "chain" or ste in ("log_tailed_relu", "reverse_exponential"):
            beside = 4 * n
        elif alpha_grad != "exact":
            beside = n * 2 // 8
        else:
            beside = n // 8 if ste == "clipped_relu" or (ste == "relu" and rounding == "nearest") else 0
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
        got, y = kept_bytes(lambda: gradients_off(model, x))
    assert got == 0 and y.grad_fn is None


def gradients_off(model, x):
    with cg.packed_activations():
        return model(x)


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


# ------------------------------------------------------------------------------------ writes in place


def test_a_write_before_it_is_kept():
    """y is another tensor then, and kept as it is."""
    x, alpha = torch.randn(64, requires_grad=True), torch.tensor([0.3])
    weight = torch.randn(64, requires_grad=True)
    with cg.packed_activations():
        y = cg.qrelu(x, alpha, 2, ste="relu")
        y.mul_(3)
        z = y * weight
    gx, gw = torch.autograd.grad(z.sum(), [x, weight])
    assert torch.equal(gw, y) and torch.equal(gx, torch.where(x > 0, 3 * weight, 0.0))


def test_a_write_to_a_view_before_it_is_kept():
    x, alpha = torch.randn(8, 8, requires_grad=True), torch.tensor([0.3])
    weight = torch.randn(8, 8, requires_grad=True)
    with cg.packed_activations():
        y = cg.qrelu(x, alpha, 2)
        y[2].zero_()
        z = y * weight
    gx, gw = torch.autograd.grad(z.sum(), [x, weight])
    assert torch.equal(gw, y) and not gx[2].any() and gx.any()


def test_a_write_after_it_was_kept():
    """The codes have the value of then: the gradient is that of the function that was computed."""
    x, alpha = torch.randn(64, requires_grad=True), torch.tensor([0.3])
    weight = torch.randn(64, requires_grad=True)
    with cg.packed_activations():
        y = cg.qrelu(x, alpha, 2)
        before = y.detach().clone()
        z = y * weight
        with torch.no_grad():
            y.mul_(3)
    assert torch.equal(torch.autograd.grad(z.sum(), weight)[0], before)


def test_a_write_to_what_is_kept_whole_is_an_error():
    """torch checks no versions where there are hooks; the packing does."""
    x = torch.randn(8, requires_grad=True)
    with cg.packed_activations():
        h = x + 1
        z = h * h
        h.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*\[8\] is at version 1, expected 0"):
        z.sum().backward()
    linear = nn.Linear(8, 8)
    with cg.packed_activations():
        z = linear(x)
    with torch.no_grad():
        linear.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_alpha_changes_before_the_backward():
    x, alpha = torch.randn(64, requires_grad=True), torch.tensor([0.3], requires_grad=True)
    weight = torch.randn(64, requires_grad=True)
    with cg.packed_activations():
        y = cg.qrelu(x, alpha, 2, alpha_grad="exact")
        z = y * weight
    want = y.detach().clone()
    with torch.no_grad():
        alpha.mul_(2)
    assert torch.equal(torch.autograd.grad(z.sum(), [weight, alpha])[0], want)


@pytest.mark.parametrize("ste", ["relu", "clipped_relu", "identity"])
def test_inplace_activation(ste):
    model, x = build("cnn", ste=ste)
    want = gradients(model, x)
    for module in model.modules():
        if isinstance(module, cg.QReLU):
            module.inplace = True
    assert_same(gradients(model, x, cg.packed_activations()), want)


PARTS = {
    "rows": (lambda h: h[2:5], lambda h: h),
    "its own rows": (lambda h: h[2:5], lambda h: h[2:5]),
    "rows and some after": (lambda h: h[2:5], lambda h: h[3:]),
    "rows and some before": (lambda h: h[2:5], lambda h: h[:4]),
    "one of its rows": (lambda h: h[2:5], lambda h: h[2:3]),
    "a column, which is not dense": (lambda h: h[:, 5], lambda h: h),
    "the top of a column": (lambda h: h[:, 5], lambda h: h[:2, 5]),
}


@pytest.mark.parametrize("case", PARTS)
def test_inplace_activation_of_a_part(case):
    """The codes are of the part alone; what reaches beyond it in the storage is kept whole."""
    part, kept = PARTS[case]
    alpha = torch.tensor([0.3])
    found = []
    for block in (contextlib.nullcontext(), cg.packed_activations()):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        weight = torch.ones_like(kept(x)).requires_grad_()
        with block:
            h = x + 0
            cg.qrelu(part(h), alpha, 2, inplace=True)
            z = kept(h) * weight
        found.append(torch.autograd.grad(z.sum(), [x, weight]))
        assert torch.equal(found[-1][1], kept(h).detach())
    for got, want in zip(*found):
        assert torch.equal(got, want)


def test_inplace_refusals_change_nothing():
    alpha = torch.tensor([0.3])
    leaf = torch.randn(8, requires_grad=True)
    before = leaf.detach().clone()
    with cg.packed_activations():
        for x in (leaf, leaf[2:]):
            with pytest.raises(RuntimeError, match="leaf"):
                cg.qrelu(x, alpha, 2, inplace=True)
        with pytest.raises(ValueError, match="reverse_exponential"):
            cg.qrelu(leaf * 1, alpha, 2, ste="reverse_exponential", inplace=True)
    assert torch.equal(leaf, before)


# ----------------------------------------------------------------------------- graphs and other hooks


def test_retain_graph():
    model, x = build("mlp", ste="relu")
    want = gradients(model, x)["x"]
    with cg.packed_activations():
        loss = model(x).square().sum()
    for _ in range(3):
        assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], want)
    torch.autograd.grad(loss, x)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_second_derivative(bits):
    """Right where there is one without packing, and refused where there is none."""
    found = []
    for block in (contextlib.nullcontext(), cg.packed_activations()):
        model, x = build("mlp", torch.float64, bits=bits, ste="relu", alpha=0.25)
        with block:
            loss = model(x).square().sum()
        (gx,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append(torch.autograd.grad(gx.square().sum(), [p for p in model.parameters() if p.dim() > 1]))
    for got, want in zip(*found):
        assert torch.equal(got, want) and want.any()
    model, x = build("mlp", ste="reverse_exponential")
    with cg.packed_activations():
        loss = model(x).square().sum()
    (gx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice|second derivative"):
        gx.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_inside(use_reentrant):
    model, x = build("mlp", ste="relu")
    body = nn.Sequential(*model[1:4])

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return model[4](checkpoint(body, model[0](x), use_reentrant=use_reentrant))

    want = gradients(model, x)
    got = gradients(Checkpointed(), x, cg.packed_activations())
    assert_same({name.removeprefix("model."): g for name, g in got.items()}, want)
    with cg.packed_activations():  # the backward, and so the second forward, inside of the block as well
        got = gradients(Checkpointed(), x)
    assert_same({name.removeprefix("model."): g for name, g in got.items()}, want)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_keeps_its_input_as_codes(use_reentrant):
    x, alpha, second = torch.randn(64, 16, requires_grad=True), torch.tensor([0.3]), nn.Linear(16, 8)

    def forward():
        with cg.packed_activations():
            y = cg.qrelu(x, alpha, 2, ste="relu")
            return checkpoint(lambda y: second(y).square(), y, use_reentrant=use_reentrant)

    got, z = kept_bytes(forward)
    assert got == 64 * 16 * 2 // 8 + 4
    z.sum().backward()
    want = torch.autograd.grad(second(cg.qrelu(x, alpha, 2, ste="relu")).square().sum(), x)
    assert torch.equal(x.grad, want[0])


def test_checkpoint_outside():
    """The function that is run again opens the block itself."""
    model, x = build("mlp", ste="relu")
    want = gradients(model, x)
    with cg.pack_activations_(model):

        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, x):
                return checkpoint(model, x, use_reentrant=False)

        got = gradients(Checkpointed(), x)
    assert_same({name.removeprefix("model."): g for name, g in got.items()}, want)


def test_hooks_around_it_get_the_codes():
    model, x = build("mlp", ste="relu")
    want = gradients(model, x)
    with torch.autograd.graph.save_on_cpu():
        assert_same(gradients(model, x, cg.packed_activations()), want)
    seen = []
    identity = torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.dtype), t)[1], lambda t: t)
    with identity:
        assert_same(gradients(model, x, cg.packed_activations()), want)
    # For each activation a mask, its codes in place of that, and its codes for the Linear.
    assert seen.count(torch.uint8) == 2 * 3


def test_hooks_inside_of_it_see_what_they_always_do():
    """As the innermost hooks decide: nothing is packed there, and nothing is wrong."""
    model, x = build("mlp", ste="relu")
    want = gradients(model, x)
    with cg.packed_activations(), torch.autograd.graph.save_on_cpu():
        assert_same(gradients(model, x), want)


def test_nested_blocks_are_one():
    model, x = build("mlp", ste="relu")
    want = gradients(model, x)
    with cg.packed_activations():
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        with cg.packed_activations():
            assert torch._C._autograd._top_saved_tensors_default_hooks(False) == outer
        assert_same(gradients(model, x, cg.packed_activations()), want)
        got, _ = kept_bytes(lambda: gradients_off(model, x), x, *model.parameters())
    once, _ = kept_bytes(lambda: gradients_off(model, x), x, *model.parameters())
    assert got == once


def test_an_output_kept_outside_of_the_block_is_kept_whole():
    x, alpha = torch.randn(64, requires_grad=True), torch.tensor([0.3])
    weight = torch.randn(64, requires_grad=True)
    with cg.packed_activations():
        y = cg.qrelu(x, alpha, 2, ste="relu")
    z = y * weight
    gx, gw = torch.autograd.grad(z.sum(), [x, weight])
    assert torch.equal(gw, y) and torch.equal(gx, torch.where(x > 0, weight, 0.0))


def test_an_output_kept_in_a_later_block():
    x, alpha = torch.randn(64, requires_grad=True), torch.tensor([0.3])
    weight = torch.randn(64, requires_grad=True)
    with cg.packed_activations():
        y = cg.qrelu(x, alpha, 2, ste="relu")
    with cg.packed_activations():
        z = y * weight
    gx, gw = torch.autograd.grad(z.sum(), [x, weight])
    assert torch.equal(gw, y) and torch.equal(gx, torch.where(x > 0, weight, 0.0))


def test_autocast():
    """A bfloat16 output is kept as codes; one of float32 that autocast converts is kept as its bfloat16 copy."""
    model, x = build("mlp", ste="relu")
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    with autocast():
        want = gradients(model, x)
    with autocast():
        assert_same(gradients(model, x, cg.packed_activations()), want)
    alpha, second, wide = torch.tensor([0.3]), nn.Linear(16, 8), torch.randn(64, 16, requires_grad=True)

    def forward():
        with autocast(), cg.packed_activations():
            return second(cg.qrelu(wide, alpha, 2, ste="relu"))

    got, z = kept_bytes(forward, *second.parameters())
    assert got >= 64 * 16 * 2
    z.float().sum().backward()
    assert wide.grad is not None


def test_threads_do_not_share_a_block():
    model, x = build("mlp", ste="relu")
    found = {}

    def run(name, block):
        with block:
            found[name], _ = kept_bytes(lambda: model(x.detach()), *model.parameters())

    def run_inside(name):
        with Kept(x, *model.parameters()) as kept, cg.packed_activations():
            out = model(x.detach())
        found[name] = kept.bytes
        del out

    with cg.packed_activations():
        thread = threading.Thread(target=run, args=("other thread", contextlib.nullcontext()))
        thread.start()
        thread.join()
    thread = threading.Thread(target=run_inside, args=("inside",))
    thread.start()
    thread.join()
    run("plain", contextlib.nullcontext())
    assert found["other thread"] == found["plain"] > found["inside"]


def test_sparse_tensors_pass():
    x, alpha = torch.randn(6, 4, requires_grad=True), torch.tensor([0.3])
    sparse = torch.eye(6).to_sparse()
    with cg.packed_activations():
        z = torch.sparse.mm(sparse, cg.qrelu(x, alpha, 2))
    (grad,) = torch.autograd.grad(z.sum(), x)
    assert torch.equal(grad, torch.autograd.grad(cg.qrelu(x, alpha, 2).sum(), x)[0])


def test_empty_and_scalar_tensors():
    alpha = torch.tensor([0.3])
    for shape in ((0,), (0, 3), (), (1,)):
        x = torch.full(shape, 0.4, requires_grad=True)
        with cg.packed_activations():
            y = cg.qrelu(x, alpha, 2, ste="relu")
            z = y * y
        (grad,) = torch.autograd.grad(z.sum(), x)
        assert torch.equal(grad, 2 * y.detach())


def test_vmap_and_forward_mode():
    alpha = torch.tensor([0.3])
    x = torch.randn(5, 4)
    with cg.packed_activations():
        y = torch.vmap(lambda row: cg.qrelu(row, alpha, 2))(x)
        assert torch.equal(y, cg.qrelu(x, alpha, 2))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            with pytest.raises(NotImplementedError, match="forward-mode"):
                cg.qrelu(dual, alpha, 2)


def test_wrong_arguments_have_the_same_messages():
    x = torch.randn(4, requires_grad=True)
    wrong = {"finite and > 0": (torch.tensor([-1.0]), 2), "shape": (torch.ones(3), 2), "bits": (0.3, 9)}
    for words, arguments in wrong.items():
        with cg.packed_activations(), pytest.raises(ValueError, match=words):
            cg.qrelu(x, *arguments)


def test_compiled_code_in_the_block():
    """There qrelu is its normal op; the gradients are the same."""
    torch._dynamo.reset()
    model, x = build("mlp", ste="relu")
    want = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with cg.packed_activations():
        compiled_loss = compiled(x).square().sum()
    grads = torch.autograd.grad(compiled_loss, [x, *model.parameters()])
    assert torch.equal(grads[0], want["x"])
    for got, (name, _) in zip(grads[1:], model.named_parameters()):
        assert torch.equal(got, want[name])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        with cg.packed_activations():
            return model(x).square().sum()

    assert torch.equal(torch.autograd.grad(step(x), x)[0], want["x"])


# ---------------------------------------------------------------------------------------------- models


def test_pack_activations_():
    model, x = build("opt", ste="relu")
    want = gradients(model, x)
    parameters = [*model.parameters(), *model.buffers()]
    plain, _ = kept_bytes(lambda: model(x), x, *parameters)
    keys = list(model.state_dict())
    handle = cg.pack_activations_(model)
    packed, _ = kept_bytes(lambda: model(x), x, *parameters)
    assert packed < plain
    assert_same(gradients(model, x), want)
    assert list(model.state_dict()) == keys
    handle.remove()
    assert kept_bytes(lambda: model(x), x, *parameters)[0] == plain
    with cg.pack_activations_(model):
        assert kept_bytes(lambda: model(x), x, *parameters)[0] == packed
    assert kept_bytes(lambda: model(x), x, *parameters)[0] == plain


def test_copies_of_a_packed_model_are_packed_models_of_their_own():
    model, x = build("mlp", ste="relu")
    want = gradients(model, x)
    cg.pack_activations_(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            model[0].weight.zero_()
        assert_same(gradients(twin, x), want)
        with torch.no_grad():
            model[0].weight.copy_(twin[0].weight)


def test_a_forward_that_fails_leaves_no_block_open():
    class Failing(nn.Module):
        def forward(self, x):
            raise KeyError("on purpose")

    def refuse(module, args):
        raise KeyError("before")

    top = torch._C._autograd._top_saved_tensors_default_hooks
    model = nn.Sequential(cg.QReLU(2), Failing())
    cg.pack_activations_(model)
    for _ in range(2):
        with pytest.raises(KeyError, match="on purpose"):
            model(torch.randn(4, requires_grad=True))
        assert top(False) is None
    # A hook that fails before the block is open must not close another's.
    inner = nn.Sequential(cg.QReLU(2))
    cg.pack_activations_(inner)
    inner.register_forward_pre_hook(refuse, prepend=True)
    outer_top = []

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            before = top(False)
            with pytest.raises(KeyError, match="before"):
                self.inner(x)
            outer_top.append(before is not None and top(False) == before)
            return x

    outer = Outer()
    cg.pack_activations_(outer)
    outer(torch.randn(4))
    assert outer_top == [True] and top(False) is None
    with pytest.raises(KeyError), cg.packed_activations():
        raise KeyError
    assert top(False) is None


def test_pack_activations_wants_a_module():
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        cg.pack_activations_(mlp)


# ----------------------------------------------------------------------------------------------- leaks


def alive(refs):
    gc.collect()
    return [ref for ref in refs if ref() is not None]


@pytest.mark.parametrize("ste", oracle.STES)
@pytest.mark.parametrize("around", [False, True])
def test_nothing_survives(ste, around):
    """No output and no note outlives the graph, with no help of the cycle collector."""
    refs, reachable = [], gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        model, x = build("mlp", ste=ste)

        def pack(t):
            if t.dtype != torch.uint8:
                return t.detach()
            refs.append(weakref.ref(t.untyped_storage()))
            return t  # as it is: whoever keeps it must not be what it leads to

        outer = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)

        def watch(module, args, output):
            storage = output.untyped_storage()
            refs.append(weakref.ref(storage))
            note = storage.__dict__.get("_coarsegrad_note")
            if note is not None:
                refs.extend(map(weakref.ref, (note, note._codes, note._alpha, note._rebuilding)))

        for module in model.modules():
            module.register_forward_hook(watch)
        with outer if around else contextlib.nullcontext(), cg.packed_activations():
            loss = model(x).square().sum()
        assert len(refs) > len(list(model.modules()))
        loss.backward()
        del loss
        assert [ref for ref in refs if ref() is not None] == []
        # Without a backward, and where an output is kept by nobody.
        refs.clear()
        model[2].requires_grad_(False)
        with outer if around else contextlib.nullcontext(), cg.packed_activations():
            model(x)
        assert [ref for ref in refs if ref() is not None] == []
    finally:
        if reachable:
            gc.enable()


def test_an_output_that_its_own_node_keeps_does_not_survive():
    x = torch.randn(8, requires_grad=True)
    with cg.packed_activations():
        y = x.exp()
    ref = weakref.ref(y.untyped_storage())
    gc.disable()
    try:
        del y
        assert ref() is None
    finally:
        gc.enable()


def test_codes_of_an_output_that_nobody_keeps_die_with_it():
    x, alpha = torch.randn(64, requires_grad=True), torch.tensor([0.3])
    with cg.packed_activations():
        y = cg.qrelu(x, alpha, 2)
        codes = weakref.ref(y.untyped_storage()._coarsegrad_note._codes)
        z = y + 1
        assert codes() is not None
        del y
        assert codes() is None
    z.sum().backward()


def test_the_backward_lets_go_of_what_was_kept():
    """Once used, though the graph itself is still there."""
    model, x = build("mlp", ste="relu")
    refs = []

    def pack(t):
        refs.append(weakref.ref(t.untyped_storage())) if t.dtype == torch.uint8 else None
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), cg.packed_activations():
        loss = model(x).square().sum()
    assert len({ref() for ref in alive(refs)}) == 2
    loss.backward()
    assert alive(refs) == []
    assert loss.grad_fn is not None
