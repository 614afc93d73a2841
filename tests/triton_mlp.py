"""Triton's matrix products of `qrelu_mlp` in its interpreter; test_triton.py runs this.

A product of matrices is not bit-equal to another one, as its sums have an order. So the codes and the mask are those of
the h that the same kernel emits, and h, outputs and gradients are near to those of torch.
"""

from __future__ import annotations

import collections
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
import triton
from bench import mlp_square, traffic
from mlp_models import alphas, apart, chain, gated
from saved_bytes import Kept
from triton.runtime.interpreter import InterpreterBuilder

import coarsegrad as cg
from coarsegrad import _mlp, _ops, reference
from coarsegrad._types import ROUNDINGS, MaskKind, Ste
from coarsegrad.triton import mlp, mlp_kernels

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"

HALVES = (torch.bfloat16, torch.float16)
# Rows, inputs, hidden, outputs: less than a tile, and several tiles with a part of one in each dimension.
SHAPES = ((3, 5, 8, 7), (70, 130, 136, 66))
ALPHA = torch.tensor([0.3])


@functools.cache
def tensors(shape, dtype):
    rows, inputs, hidden, outputs = shape
    g = torch.Generator().manual_seed(0)
    sizes = ((rows, inputs), (hidden, inputs), (hidden,), (outputs, hidden), (outputs,), (rows, outputs))
    x, weight1, bias1, weight2, bias2, grad_out = (torch.randn(size, generator=g) for size in sizes)
    scaled = (x, weight1 / inputs**0.5, bias1, weight2 / hidden**0.5, bias2, grad_out)
    return tuple(t.to(dtype) for t in scaled)


def far(got, want):
    """The relative difference in the 2-norm."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("bits, rounding, mask", [
    (bits, rounding, mask)
    for i, (bits, rounding) in enumerate(itertools.product(range(1, 9), ROUNDINGS))
    for mask in [("inside", "positive", "near", "nothing")[i % 4]]
])  # fmt: skip
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_codes_and_mask_are_those_of_the_kernels_own_h(dtype, bits, rounding, mask):
    for shape in SHAPES:
        x, weight1, bias1, *_ = tensors(shape, dtype)
        bias1 = None if bits == 3 else bias1
        h = x.new_empty(shape[0], shape[2])
        options = (bits, ROUNDINGS.index(rounding), MaskKind[mask].value)
        codes, packed_mask, nan_rows = mlp.linear_to_codes(x, weight1, bias1, ALPHA, *options, h)
        assert far(h, F.linear(x, weight1, bias1)) < 1e-3
        with cg.use_backend("reference"):
            _, want_mask, want = _ops.ops.qrelu_forward.default(h, ALPHA, *options, True, None)
        assert torch.equal(codes, want) and torch.equal(packed_mask, want_mask)
        assert torch.equal(nan_rows, torch.zeros(shape[0]))


@pytest.mark.parametrize("bits", (1, 2, 4, 7))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_reads_codes(dtype, bits):
    for shape in SHAPES:
        rows, inputs, hidden, outputs = shape
        x, weight1, bias1, weight2, bias2, grad_out = tensors(shape, dtype)
        for (ste, rounding), squared in itertools.product(
            (("clipped_relu", "nearest"), ("relu", "ceil"), ("identity", "ceil")), (False, True)
        ):
            kind = {"clipped_relu": MaskKind.inside}.get(ste, MaskKind.nothing)
            mode = ROUNDINGS.index(rounding)
            codes, mask, nan_rows = _mlp.linear_to_codes(x, weight1, bias1, ALPHA, bits, mode, kind)
            y = cg.dequantize(codes, ALPHA, bits, (rows, hidden), dtype)
            bias = bias2 if bits > 1 else None
            out = mlp.linear_from_codes([codes], nan_rows, [ALPHA], bits, squared, weight2, bias)
            y = y.square() if squared else y
            assert far(out, F.linear(y, weight2, bias)) < 1e-3
            grad_weight = mlp.linear_from_codes_grad_weight(grad_out, [codes], [ALPHA], bits, squared, hidden)
            assert far(grad_weight, grad_out.T @ y) < 1e-3
            gates = ([mask] if ste == "clipped_relu" else [], [codes] if ste == "relu" or squared else [])
            options = ([ALPHA], bits, squared, Ste[ste].value, mode)
            (got,) = mlp.linear_from_codes_grad_input(grad_out, weight2, *gates, *options)
            (want,) = _mlp.linear_from_codes_grad_input(grad_out, weight2, *gates, *options)
            assert far(got, want) < 1e-3 and torch.equal(got == 0, want == 0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("build", [chain, functools.partial(chain, squared=True), gated])
@pytest.mark.parametrize("ste, rounding", [
    ("clipped_relu", "ceil"), ("relu", "hwgq"), ("trust", "nearest"), ("identity", "nearest")
])  # fmt: skip
def test_a_chain(dtype, ste, rounding, build):
    """The whole module, near to the layers one after the other; and x and codes are all that is kept."""
    rows, *sizes = SHAPES[1]
    model = build(4, dtype, sizes=sizes, ste=ste, rounding=rounding, alpha=0.05)
    x, *_, grad_out = tensors(SHAPES[1], dtype)
    x = x.clone().requires_grad_()
    leaves = [x, *model.parameters()]
    with cg.use_backend("triton"):
        with Kept(*leaves, *alphas(model)) as kept:
            out = model(x)
        staircases, bits = len(alphas(model)), 4 + (ste in ("clipped_relu", "trust"))
        assert kept.bytes == staircases * rows * sizes[1] * bits // 8
        got = torch.autograd.grad(out, leaves, grad_out)
    want = apart(model, x)
    assert far(out, want) < 1e-3
    for mine, other in zip(got, torch.autograd.grad(want, leaves, grad_out), strict=True):
        assert far(mine, other) < 1e-3


@pytest.mark.parametrize("bits", (1, 2, 4, 7))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_reads_the_codes_of_two_factors(dtype, bits):
    for shape in SHAPES:
        rows, inputs, hidden, outputs = shape
        x, weight1, bias1, weight2, bias2, grad_out = tensors(shape, dtype)
        alphas = [ALPHA, ALPHA * 0.7]
        for ste, rounding in (("clipped_relu", "nearest"), ("relu", "ceil"), ("identity", "ceil")):
            kind = {"clipped_relu": MaskKind.inside}.get(ste, MaskKind.nothing)
            mode = ROUNDINGS.index(rounding)
            made = [
                _mlp.linear_to_codes(x, sign * weight1, bias1, alpha, bits, mode, kind)
                for sign, alpha in zip((1, -1), alphas)
            ]
            codes, masks, nan_rows = zip(*made)
            y, z = (cg.dequantize(c, alpha, bits, (rows, hidden), dtype) for c, alpha in zip(codes, alphas))
            out = mlp.linear_from_codes(codes, nan_rows[0], alphas, bits, False, weight2, bias2)
            assert far(out, F.linear(y * z, weight2, bias2)) < 1e-3
            grad_weight = mlp.linear_from_codes_grad_weight(grad_out, codes, alphas, bits, False, hidden)
            assert far(grad_weight, grad_out.T @ (y * z)) < 1e-3
            gates = masks if ste == "clipped_relu" else []
            options = (codes, alphas, bits, False, Ste[ste].value, mode)
            got = mlp.linear_from_codes_grad_input(grad_out, weight2, gates, *options)
            want = _mlp.linear_from_codes_grad_input(grad_out, weight2, gates, *options)
            for mine, other in zip(got, want, strict=True):
                assert far(mine, other) < 1e-3 and torch.equal(mine == 0, other == 0)


def test_nan_flows_by_rows_and_a_bad_alpha_is_noticed(monkeypatch):
    x, weight1, bias1, weight2, bias2, _ = (t.clone() for t in tensors(SHAPES[1], torch.bfloat16))
    x[66, 2] = torch.nan
    codes, _, nan_rows = mlp.linear_to_codes(x, weight1, bias1, ALPHA, 2, 0, 0)
    assert nan_rows.isnan().nonzero().tolist() == [[66]]
    out = mlp.linear_from_codes([codes], nan_rows, [ALPHA], 2, False, weight2, bias2)
    assert torch.equal(out.isnan(), nan_rows.isnan()[:, None].expand_as(out))
    monkeypatch.setattr(mlp, "prepared", lambda alpha, dtype: alpha)  # as on a GPU, where its value is not read
    assert mlp.linear_from_codes([codes], torch.zeros(70), [-ALPHA], 2, False, weight2, bias2).isnan().all()
    factors = [codes, codes], torch.zeros(70), [ALPHA, -ALPHA]
    assert mlp.linear_from_codes(*factors, 2, False, weight2, bias2).isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf * 0 in a product of the interpreter
def test_a_closed_gate_is_a_select():
    """0 also where the gradient is infinite."""
    x, weight1, bias1, weight2, _, grad_out = (t.clone() for t in tensors(SHAPES[0], torch.bfloat16))
    grad_out[1, 2] = torch.inf
    codes, mask, _ = mlp.linear_to_codes(x, weight1, bias1, ALPHA, 2, 0, MaskKind.inside)
    options = ([ALPHA], 2, False, Ste.clipped_relu.value, 0)
    (got,) = mlp.linear_from_codes_grad_input(grad_out, weight2, [mask], [], *options)
    is_open = reference.unpack(mask, 1, 24).view(3, 8) == 1
    assert (got[~is_open] == 0).all() and got[is_open].isinf().any()


def test_what_it_does_not_serve_runs_as_elsewhere():
    """float32, rows of codes that do not end with a byte, two bits for a gate, and nothing at all."""
    given = (*tensors(SHAPES[0], torch.bfloat16)[:3], ALPHA, 2, 0, MaskKind.state.value)
    assert all(map(torch.equal, mlp.linear_to_codes(*given), _mlp.linear_to_codes(*given)))
    for shape, dtype in (((3, 5, 8, 7), torch.float32), ((3, 5, 9, 7), torch.bfloat16), ((0, 5, 8, 7), torch.bfloat16)):
        x, weight1, bias1, weight2, bias2, grad_out = tensors(shape, dtype)
        made = mlp.linear_to_codes(x, weight1, bias1, ALPHA, 2, 0, MaskKind.inside)
        for got, want in zip(made, _mlp.linear_to_codes(x, weight1, bias1, ALPHA, 2, 0, MaskKind.inside), strict=True):
            assert torch.equal(got, want)
        codes, mask, nan_rows = made
        read = [codes], nan_rows, [ALPHA]
        assert mlp.linear_from_codes(*read, 2, False, weight2, bias2).shape == (shape[0], shape[3])
        assert mlp.linear_from_codes_grad_weight(grad_out, [codes], [ALPHA], 2, False, shape[2]).shape == weight2.shape
        gate = ([mask], [], [ALPHA], 2, False, Ste.clipped_relu.value, 0)
        assert mlp.linear_from_codes_grad_input(grad_out, weight2, *gate)[0].shape == (shape[0], shape[2])


def test_what_does_not_fit_is_refused():
    x, weight1, bias1, weight2, bias2, grad_out = tensors(SHAPES[0], torch.bfloat16)
    codes, mask, nan_rows = mlp.linear_to_codes(x, weight1, bias1, ALPHA, 2, 0, MaskKind.inside)
    with pytest.raises(ValueError, match=r"weight must be \[hidden, 5\] for x \[3, 5\], got \[7, 8\]"):
        mlp.linear_to_codes(x, weight2, bias1, ALPHA, 2, 0, 0)
    with pytest.raises(ValueError, match=r"bias must have shape \[8\], got \[7\]"):
        mlp.linear_to_codes(x, weight1, bias2, ALPHA, 2, 0, 0)
    for call in (
        lambda *codes: mlp.linear_from_codes(codes, nan_rows, [ALPHA] * len(codes), 2, False, weight2, bias2),
        lambda *codes: mlp.linear_from_codes_grad_weight(grad_out, codes, [ALPHA] * len(codes), 2, False, 8),
        lambda *codes: mlp.linear_from_codes_grad_input(
            grad_out, weight2, [], codes, [ALPHA] * len(codes), 2, False, Ste.relu.value, 0
        ),
    ):
        with pytest.raises(ValueError, match="codes must be a uint8 tensor of 6 bytes"):
            call(codes[:-1])
        with pytest.raises(ValueError, match="codes must be a uint8 tensor of 6 bytes"):
            call(codes, codes[:-1])
    with pytest.raises(ValueError, match="mask must be a uint8 tensor of 3 bytes"):
        mlp.linear_from_codes_grad_input(
            grad_out, weight2, [mask[:-1]], [], [ALPHA], 2, False, int(Ste.clipped_relu), 0
        )


def test_what_is_loaded_is_what_is_counted(monkeypatch):
    """bench.traffic's counts of each kernel, and what it leaves out: an alpha for each program, NaN of rows."""
    moved = collections.Counter()

    def counted(call, at):
        def count(self, pointers, *rest):  # of which one is the mask
            moved["bytes"] += int(rest[at].data.sum()) * pointers.dtype.element_ty.primitive_bitwidth // 8
            return call(self, pointers, *rest)

        return count

    for operation, at in (("create_masked_load", 0), ("create_masked_store", 1)):  # what loads and stores without call
        monkeypatch.setattr(InterpreterBuilder, operation, counted(getattr(InterpreterBuilder, operation), at))
    shape = rows, inputs, hidden, outputs = (70, 130, 136, 66)
    x, weight1, _, weight2, _, grad_out = tensors(shape, torch.bfloat16)
    codes, mask, nan_rows = mlp.linear_to_codes(x, weight1, None, ALPHA, 4, 0, MaskKind.inside)

    def after(call):
        moved.clear()
        call()
        return moved["bytes"]

    tiles = {name: -(-size // 64) for name, size in zip(("rows", "inputs", "hidden", "outputs"), shape)}
    for factors in (1, 2):
        read, alphas = [codes] * factors, [ALPHA] * factors
        options = (alphas, 4, False, Ste.clipped_relu.value, 0)
        encoded = (
            lambda: mlp.linear_to_codes(x, weight1, None, ALPHA, 4, 0, MaskKind.inside),
            4 * tiles["rows"] * tiles["hidden"],
        )
        calls = (
            *factors * [encoded],
            (lambda: mlp.linear_from_codes(read, nan_rows, alphas, 4, False, weight2, None),
             4 * factors * tiles["rows"] * tiles["outputs"] + 4 * rows * tiles["outputs"]),
            (lambda: mlp.linear_from_codes_grad_input(
                grad_out, weight2, [mask] * factors, read if factors > 1 else [], *options
            ), 4 * factors * tiles["rows"] * tiles["hidden"] * (factors > 1)),
            (lambda: mlp.linear_from_codes_grad_weight(grad_out, read, alphas, 4, False, hidden),
             4 * factors * tiles["outputs"] * tiles["hidden"]),
        )  # fmt: skip
        for kernel, (call, left_out) in zip(traffic.chain(shape, 4, True, factors=factors), calls):
            assert after(call) - left_out == kernel.loaded(64, 64), (kernel.name, factors)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_peer_of_the_benchmark(shape):
    """ReLU squared at the end of a product, and its derivative."""
    x, weight1, bias1, weight2, _, grad_out = tensors(shape, torch.bfloat16)
    y, z = mlp_square.forward(x, weight1, bias1)
    want = F.linear(x, weight1, bias1).relu()
    assert far(y, want) < 1e-3 and torch.equal(z, y.square())
    assert far(mlp_square.backward(grad_out, weight2, y), 2 * y.float() * (grad_out.float() @ weight2.float())) < 4e-3


def test_every_kernel_is_used():
    launched = {kernel.fn.fn.__name__ for kernel in mlp._KERNELS.values()}
    assert launched == {name for name in vars(mlp_kernels) if name.endswith("_kernel")}
