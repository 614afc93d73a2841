"""That gpu_arithmetic.py would show a flushed ceiling, or a division that counts on being rounded: kernels changed on
purpose pass without it and fail with it. test_triton.py runs this, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from gpu_arithmetic import MODELS
from triton_interpreted import assert_backward, assert_forward, backward_arguments, numbers_of_all_magnitudes, same

from coarsegrad import integer, reference
from coarsegrad.testing import ulps_apart
from coarsegrad.triton import layer_kernels, layers, signed, signed_kernels, staircase
from coarsegrad.triton import ste as mirror
from coarsegrad.triton.staircase import level


@triton.jit
def code_by_ceil(x, alpha, inverse, DTYPE: tl.constexpr, BITS: tl.constexpr, ROUNDING: tl.constexpr):
    """As code_by_guess, by a ceiling that is never too low, unless it reads a subnormal quotient as 0."""
    inverse *= 1 + 2.0**-20
    code = tl.minimum(tl.maximum(tl.ceil(x * inverse), 0.0), 2.0**BITS - 1)
    code = tl.where(x == x, code, x)
    return tl.where((code > 0) & (x <= level(code - 1, alpha, DTYPE)), code - 1, code)


@triton.jit
def ceil_within(v, top):
    return tl.minimum(tl.maximum(tl.ceil(v), 0.0), top).to(tl.int32)


@triton.jit
def divided_by_triton(a, b):
    return a / b


@triton.jit
def exp_minus_of_triton(t):
    return tl.exp(-t)


@triton.jit
def quotient_by_triton(largest, BITS: tl.constexpr):
    return (largest.to(tl.float32, bitcast=True) / (2 ** (BITS - 1) - 1)).to(tl.int32, bitcast=True)


@triton.jit
def signed_code_by_quotient(x, alpha, inverse, DTYPE: tl.constexpr, BITS: tl.constexpr):
    return staircase.round_to_integer(x * inverse)


def subnormal_quotients():
    """Forward; a subnormal x, and one whose quotient alone is subnormal."""
    alpha = torch.tensor([0.3, 1.0, 1e3])
    x = torch.tensor([1e-45, 1e-40, 1.17549435e-38, -1e-40, 0.0, 0.2]).expand(3, 6)
    assert_forward(torch.where(x / alpha[:, None] == 0, 0.0, x), alpha, 3, "ceil", "inside", 0)


def subnormal_outputs():
    """A layer whose affine output is below, at and above 0 by a subnormal."""
    codes, weight = torch.arange(3, dtype=torch.uint8)[:, None], torch.ones(1, 32, dtype=torch.uint8)
    layer = (codes, weight, 2, 8, torch.tensor([1e-40]), torch.tensor([-1e-40]), None, 3)
    assert layers.integer_linear(*layer).flatten().tolist() == [0, 0, 1]
    assert same(layers.integer_linear(*layer), integer.KERNELS["integer_linear"](*layer))


def slopes(ste):
    """Far above the top level."""
    x, alpha = torch.linspace(-1, 40, 500), torch.tensor([0.3])
    assert_backward(backward_arguments(x, alpha, torch.ones_like(x), 2, ste, "ceil", None, None))


def dynamic_alphas():
    """Of groups whose alpha is a number of bfloat16 already, which a larger quotient rounds up."""
    want = torch.linspace(0.5, 2, 97).to(torch.bfloat16)
    found = signed.qsigned_forward(31 * want.float()[:, None], None, 6, None, False, False, None)[1]
    assert same(found, want[:, None])


def signed_codes():
    """Just above thresholds."""
    alpha = torch.tensor([0.25])
    edges = (torch.arange(-120, 120) + 0.5) * alpha
    arguments = torch.nextafter(edges, edges + 1), alpha, 8, None, False, True, None
    assert same(signed.qsigned_forward(*arguments)[3], reference.qsigned_forward(*arguments)[3])


MUTANTS = (
    (staircase, "code_by_guess", code_by_ceil, "ceil", subnormal_quotients),
    (layer_kernels, "_ceil_within", ceil_within, "ceil", subnormal_outputs),
    (mirror, "divide", divided_by_triton, "fdiv", lambda: slopes("log_tailed_relu")),
    (mirror, "exp_minus", exp_minus_of_triton, "exp", lambda: slopes("reverse_exponential")),
    (signed_kernels, "_quotient_bits", quotient_by_triton, "fdiv", dynamic_alphas),
    (staircase, "signed_code_by_guess", signed_code_by_quotient, "fdiv", signed_codes),
)


@pytest.mark.parametrize("module, name, mutant, operation, check", MUTANTS, ids=[name for _, name, *_ in MUTANTS])
def test_what_only_a_gpu_gets_wrong_is_seen(module, name, mutant, operation, check, monkeypatch):
    """A mutant passes if the interpreter computes that one operation in its own way."""
    check()
    monkeypatch.setattr(module, name, mutant)
    with pytest.raises(AssertionError):
        check()
    monkeypatch.delitem(MODELS, operation)
    check()


@triton.jit
def _log_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.log(tl.load(x_ptr + tl.arange(0, BLOCK))))


def test_the_errors_of_a_gpus_division_are_all_that_its_manual_allows():
    a, b = (numbers_of_all_magnitudes(2**12, seed).nan_to_num(1.0) for seed in (0, 1))
    got, want = torch.from_numpy(MODELS["fdiv"].function(a.numpy(), b.numpy())), a / b
    normal = (want.abs() >= torch.finfo(torch.float32).tiny) & want.isfinite()
    assert ulps_apart(got[normal], want[normal]).unique().tolist() == [0, 1, 2]


def test_an_operation_that_is_not_described_is_refused():
    with pytest.raises(Exception, match="log has no entry in gpu_arithmetic.MODELS"):
        _log_kernel[(1,)](torch.ones(4), BLOCK=4)
