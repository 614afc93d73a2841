"""Every way to break packing: writes in place, other hooks, threads, graphs used twice."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from packing_cases import assert_same, build, gradients, kept_bytes, packed_forward
from saved_bytes import Kept
from torch import nn
from torch.utils.checkpoint import checkpoint

import coarsegrad as cg

pytestmark = pytest.mark.usefixtures("reference_or_native")


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
        got, _ = kept_bytes(lambda: packed_forward(model, x), x, *model.parameters())
    once, _ = kept_bytes(lambda: packed_forward(model, x), x, *model.parameters())
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
    """A bfloat16 output is kept as codes, and so is autocast's bfloat16 copy of one of float32."""
    model, x = build("mlp", ste="relu")
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    with autocast():
        want = gradients(model, x)
    with autocast():
        assert_same(gradients(model, x, cg.packed_activations()), want)


CONVERTED = {
    "linear": (nn.Linear(16, 8), (4, 16, 16)),
    "flattened": (nn.Sequential(nn.Flatten(), nn.Linear(256, 8)), (4, 16, 16)),
    "conv": (nn.Conv2d(16, 8, 3), (4, 16, 4, 4)),
    "channels last": (nn.Conv2d(16, 8, 3), (4, 16, 4, 4)),
}


@pytest.mark.parametrize("ste", ["relu", "clipped_relu"])
@pytest.mark.parametrize("case", CONVERTED)
def test_autocast_of_a_float32_output(case, ste):
    """Its levels are rounded to bfloat16, by the codes alone: 0.3 is no number of it."""
    (layer, shape), alpha = CONVERTED[case], 0.3
    memory_format = torch.channels_last if case == "channels last" else torch.contiguous_format
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    inputs = [x, *layer.parameters()]

    def loss(block, squared):
        activation = cg.QReLU(2, ste=ste, alpha=alpha, squared=squared)
        with torch.autocast("cpu", torch.bfloat16), block():
            return layer(activation(x)).float().square().sum()

    for squared in (False, True):
        whole, wanted = kept_bytes(lambda: loss(contextlib.nullcontext, squared), *inputs)
        packed, found = kept_bytes(lambda: loss(cg.packed_activations, squared), *inputs)
        n, gate = x.numel(), 0 if ste == "relu" else x.numel() // 8
        assert whole - packed == (2 + 4 * squared) * n + n // 8 - (n // 4 + 4 + gate)  # codes, and alpha
        for got, want in zip(*(torch.autograd.grad(each, inputs) for each in (found, wanted)), strict=True):
            assert torch.equal(got, want)


def test_copies_in_another_dtype():
    """Kept as codes while y lives. A write to y or to the copy makes it another tensor, also where autograd sees none;
    what is a part of y, or in another order, is kept as it is."""
    copies = {
        "as it is": (lambda y: y.double(), True),
        "a view of it": (lambda y: y.double().view(4, 8).t(), True),
        "of a view": (lambda y: y.view(16, 2).double(), True),
        "transposed": (lambda y: y.transpose(0, 1).double(), False),
        "another format": (lambda y: y.to(torch.double, memory_format=torch.channels_last), False),
        "a part": (lambda y: y[1:].double(), False),
        "of a copy": (lambda y: y.half().double(), False),
        "y is written to": (lambda y: y.mul_(3).double(), False),
        "the copy is written to": (lambda y: y.double().mul_(3), False),
        "y, unseen": (lambda y: (unseen(y), y.double())[1], False),
        "y, unseen, after": (lambda y: (y.double(), unseen(y))[0], False),
        "the copy, unseen": (lambda y: unseen(y.double()), False),
    }

    @torch.no_grad()
    def unseen(t):
        t.mul_(3)
        return t

    for name, (convert, as_codes) in copies.items():
        x, alpha = torch.randn(2, 4, 2, 2, requires_grad=True), torch.tensor([0.3])
        factor = None

        def forward():
            nonlocal factor
            with cg.packed_activations():
                y = cg.qrelu(x, alpha, 2, ste="relu")
                copy = convert(y)
                factor = torch.ones(copy.shape, dtype=copy.dtype, requires_grad=True)
                return copy * factor, copy.detach().clone()

        bytes_kept, (z, values) = kept_bytes(forward, x)
        assert (bytes_kept < factor.nbytes + 32) == as_codes, (name, bytes_kept)
        (got,) = torch.autograd.grad(z.sum(), factor)
        assert torch.equal(got, values), name


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
