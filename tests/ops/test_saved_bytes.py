"""Bytes kept for the backward, counted by saved-tensor hooks.

The rule: what grows with x is exactly the smallest state from which the gradients can be had. alpha itself,
the caller's own tensor, is kept beside x where x is kept, and nowhere else; masks and codes need no alpha.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import coarsegrad as cg

RULES = (None, *oracle.ALPHA_GRADS)


def expected_bytes(ste, rounding, alpha_grad, need_x, n, bits, itemsize):
    """The rule spelled out case by case. alpha_grad None: alpha is fixed."""
    bit, state = math.ceil(n / 8), math.ceil(2 * n / 8)
    codes = math.ceil(n * oracle.CODE_WIDTH[bits] / 8)
    if oracle.saves_x(ste, alpha_grad, need_x):
        return n * itemsize  # x serves both gradients
    if alpha_grad is None:
        return {"identity": 0, "relu": bit, "clipped_relu": bit, "trust": bit}[ste]
    if alpha_grad in ("three_valued", "two_valued"):
        return state  # the gate is read from the state
    if not need_x or ste == "identity":
        return codes
    if ste == "relu":
        return codes + (bit if rounding == "nearest" else 0)  # elsewhere x > 0 is c > 0
    return codes + bit


class Kept:
    """Collects what autograd saves while the block runs."""

    def __init__(self, alpha):
        self.alpha = alpha
        self.tensors = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor):
        self.tensors.append(tensor)
        return tensor

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self._hooks.__exit__(*exception)

    def _is_alpha(self, tensor):
        return tensor.shape == self.alpha.shape and tensor.data_ptr() == self.alpha.data_ptr()

    @property
    def state(self):
        return [t for t in self.tensors if not self._is_alpha(t)]

    @property
    def bytes(self):
        return sum(t.untyped_storage().nbytes() for t in self.state)

    @property
    def keeps_alpha(self):
        return any(map(self._is_alpha, self.tensors))


def make(n=1003, dtype=torch.float32, channels=None):
    shape = (channels, n // channels) if channels else (n,)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(n)).to(dtype)
    return x, torch.full((channels or 1,), 0.4)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("alpha_grad", RULES)
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("ste", oracle.STES)
def test_bytes_kept(reference_or_native, ste, rounding, alpha_grad, bits):
    for need_x in (True, False):
        if not need_x and alpha_grad is None:
            continue
        for n, dtype in (
            (1003, torch.float32),
            (8, torch.float64),
            (1001, torch.bfloat16),
            (1, torch.float16),
        ):
            x, alpha = make(n, dtype)
            alpha = alpha.repeat(1).requires_grad_(alpha_grad is not None)
            x.requires_grad_(need_x)
            with Kept(alpha) as kept:
                y = cg.qrelu(x, alpha, bits, ste=ste, rounding=rounding, alpha_grad=alpha_grad or "exact")
            want = expected_bytes(ste, rounding, alpha_grad, need_x, n, bits, x.element_size())
            assert kept.bytes == want, [(t.dtype, tuple(t.shape)) for t in kept.state]
            assert kept.keeps_alpha == oracle.saves_x(ste, alpha_grad, need_x)
            y.sum().backward()


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 4096, 100_003])
def test_one_bit_per_element(reference_or_native, n):
    """The headline: ceil(n / 8) for relu, clipped_relu and trust, nothing for identity, in any dtype."""
    for dtype in oracle.DTYPES:
        for ste in oracle.MASKED_STES:
            want = 0 if ste == "identity" else math.ceil(n / 8)
            x, alpha = make(n, dtype)
            with Kept(alpha) as kept:
                cg.qrelu(x.requires_grad_(), alpha, 2, ste=ste)
            assert kept.bytes == want
            assert all(t.dtype == torch.uint8 for t in kept.state)


@pytest.mark.parametrize("alpha_grad", RULES)
def test_bytes_kept_per_channel(reference_or_native, alpha_grad):
    for ste in oracle.STES:
        x, alpha = make(1001, channels=7)
        alpha.requires_grad_(alpha_grad is not None)
        with Kept(alpha) as kept:
            cg.qrelu(x.requires_grad_(), alpha, 2, ste=ste, alpha_grad=alpha_grad or "exact", channel_dim=0)
        assert kept.bytes == expected_bytes(ste, "ceil", alpha_grad, True, 1001, 2, 4)


@pytest.mark.parametrize("ste", ["log_tailed_relu", "reverse_exponential"])
def test_the_kept_x_is_x_itself(reference_or_native, ste):
    x, alpha = make()
    x.requires_grad_()
    with Kept(alpha) as kept:
        cg.qrelu(x, alpha, 2, ste=ste)
    assert [t.data_ptr() for t in kept.state if t.numel()] == [x.data_ptr()]


@pytest.mark.parametrize("ste", oracle.STES)
def test_nothing_is_kept_where_no_gradient_is_asked_for(reference_or_native, ste):
    x, alpha = make()
    with Kept(alpha) as kept:
        cg.qrelu(x, alpha, 2, ste=ste)
        with torch.no_grad():
            cg.qrelu(x.clone().requires_grad_(), alpha.clone().requires_grad_(), 2, ste=ste, alpha_grad="exact")
        with torch.inference_mode():
            cg.qrelu(x, alpha, 2, ste=ste)
    assert kept.tensors == []


class Written(TorchDispatchMode):
    """Bytes of everything that the project's forward kernels returned beside y."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.namespace == "coarsegrad":
            self.calls.append(function)
            if function.overloadpacket._qualified_op_name == "coarsegrad::qrelu_forward":
                self.bytes += sum(t.numel() * t.element_size() for t in results[1:])
        return results


@pytest.mark.parametrize("ste", oracle.STES)
def test_nothing_is_written_for_a_backward_under_no_grad(reference_or_native, ste):
    x, alpha = make()
    with Written() as watched:
        cg.qrelu(x.clone().requires_grad_(), alpha, 2, ste=ste)
    assert watched.bytes == expected_bytes(ste, "ceil", None, True, x.numel(), 2, 0), "the meter sees what is written"
    with Written() as watched, torch.no_grad():
        cg.qrelu(x.clone().requires_grad_(), alpha.clone().requires_grad_(), 2, ste=ste, alpha_grad="exact")
    assert watched.calls and watched.bytes == 0


@pytest.mark.parametrize("alpha_grad", [None, "exact", "three_valued"])
def test_the_backward_reads_what_was_kept(reference_or_native, alpha_grad):
    """Zero the kept bits on their way back and the gradient is zero: there is no second, hidden copy."""
    x, alpha = make()
    alpha.requires_grad_(alpha_grad is not None)
    x.requires_grad_()

    def zeroed(tensor):
        return tensor if tensor.dtype != torch.uint8 else torch.zeros_like(tensor)

    with torch.autograd.graph.saved_tensors_hooks(zeroed, lambda tensor: tensor):
        y = cg.qrelu(x, alpha, 2, alpha_grad=alpha_grad or "exact")
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    if alpha_grad is not None:
        assert alpha.grad.item() == 0


def test_the_layer_that_follows_is_counted_apart(reference_or_native):
    """Two linears with a QReLU between: input, weights, y, and n / 8 bytes; x of the activation is gone."""
    alpha = torch.tensor([0.4])
    first, second = torch.nn.Linear(16, 64), torch.nn.Linear(64, 8)
    with Kept(alpha) as kept:
        hidden = first(torch.randn(32, 16))
        y = cg.qrelu(hidden, alpha, 2)
        second(y)
    pointers = {t.data_ptr() for t in kept.tensors if t.numel()}
    assert hidden.data_ptr() not in pointers and y.data_ptr() in pointers
    assert 32 * 64 // 8 in [t.numel() for t in kept.tensors if t.dtype == torch.uint8]
