"""Weights of few bits: scales to the bit on every backend, their errors beside the least ones, codes and gradients."""

from __future__ import annotations

import itertools
import math
import warnings
from fractions import Fraction

import hypothesis.strategies as st
import oracle
import oracle_signed
import oracle_weights
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import coarsegrad as cg
from coarsegrad import reference
from coarsegrad._types import DTYPES, WEIGHT_BITS

ops = torch.ops.coarsegrad


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def levels_of(weight, scale, bits, channel_dim):
    """Q(w) and codes, by the oracle of the signed staircase; for numbers of a scale that is 0 or NaN, by hand."""
    rows = oracle.to_rows(weight, channel_dim)
    scale = scale.reshape(-1)
    if bits == 1:
        codes = torch.where(rows < 0, -1, 1)
        y = torch.where(rows < 0, -scale[:, None], scale[:, None]).to(weight.dtype)
    else:
        alpha = torch.where(scale > 0, scale, 1.0)
        codes = oracle_signed.codes_of_rows(rows, alpha, bits) - (2 ** (bits - 1) - 1)
        codes = torch.where(scale.isnan()[:, None], 0, codes)
        y = oracle_signed.output_of_rows(rows, alpha, bits)
        y = torch.where(scale.isnan()[:, None], torch.nan, y)
        assert not y[scale == 0].any()
    return oracle.from_rows(y, weight, channel_dim), oracle.from_rows(codes, weight, channel_dim)


def check(weight, bits, channel_dim=0):
    wanted = oracle_weights.scale(weight, bits, channel_dim)
    scale = cg.weight_scale(weight, bits, channel_dim=channel_dim)
    assert scale.dtype == wanted.dtype and torch.equal(scale.nan_to_num(-1), wanted.nan_to_num(-1)), bits
    y, codes = levels_of(weight, wanted, bits, channel_dim)
    got, again = cg.weight_codes(weight, bits, channel_dim=channel_dim)
    assert (
        got.dtype == torch.int8 and torch.equal(got, codes) and torch.equal(again.nan_to_num(-1), wanted.nan_to_num(-1))
    )
    quantized = cg.qweight(weight, bits, channel_dim=channel_dim)
    assert quantized.dtype == weight.dtype and oracle.same_bits(quantized, y)
    return scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_scales_and_levels(backend, bits, dtype):
    for channel_dim, (shape, seed) in itertools.product(
        (0, 1, -1, None), (((5, 7), 0), ((3, 4, 3, 3), 1), ((2, 130), 2))
    ):
        check(normal(*shape, dtype=dtype, seed=seed), bits, channel_dim)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_other_distributions(backend, bits):
    """Heavy tails, whose best scales cut the largest off; one magnitude; two; quantized weights; ties; and magnitudes
    of which any number has those from half its mean on."""
    flat = torch.arange(1, 401).double().rsqrt()
    check(
        torch.stack([flat, flat * torch.linspace(1, 1.001, 400), flat.flip(0) * torch.linspace(1, 1.1, 400)]).float(),
        bits,
    )
    for seed in range(4):
        heavy = normal(3, 200, seed=seed) / normal(3, 200, seed=seed + 100).abs()
        far = normal(3, 64, seed=seed)
        far[:, 0] *= 10.0 ** torch.arange(1, 4)
        few = torch.randint(-3, 4, (4, 50), generator=torch.Generator().manual_seed(seed)) * 0.375
        for weight in (heavy, far, few, few.sign(), cg.qweight(far, bits), few * normal(4, 50).abs().round(decimals=1)):
            check(weight, bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_extreme_magnitudes(backend, bits, dtype):
    weight = oracle_weights.extreme_rows(dtype)[:12]
    scale = check(weight, bits)
    assert scale[7] == 0 and scale.isfinite().all()
    check(weight[8:9, :3], bits, None)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_special_values(backend, bits):
    weight = normal(6, 8)
    weight[0, 3], weight[1, 0], weight[2, 7], weight[3] = math.nan, math.inf, -math.inf, math.nan
    weight[4] = -0.0
    scale = check(weight, bits)
    assert scale.isnan().tolist() == [True] * 4 + [False] * 2
    y = cg.qweight(weight, bits)
    assert y[:4].isnan().all() and not y[4].any() and not y[4].signbit().any()
    codes, _ = cg.weight_codes(weight, bits)
    assert (codes[4] == (1 if bits == 1 else 0)).all()
    assert cg.weight_scale(weight, bits, channel_dim=None).isnan()


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_few_and_no_weights(backend, bits):
    for value in (1.5, -3.25, 0.0, 1e-45):
        scale = check(torch.tensor([value]), bits, None)
        assert check(torch.tensor([value]), bits) == scale
        assert check(torch.tensor([[value]]), bits, 1) == scale
        assert cg.weight_scale(torch.tensor(value), bits, channel_dim=None) == scale
    assert cg.weight_scale(torch.tensor([2.0]), bits) == {8: 2 / 127, 4: 2 / 7, 2: 2, 1: 2}[bits] or bits > 2
    for shape, dim in (((0,), 0), ((3, 0), 0), ((0, 3), 0), ((3, 0), 1), ((0, 3), None), ((2, 0, 3), -1)):
        weight = torch.empty(shape)
        scale = cg.weight_scale(weight, bits, channel_dim=dim)
        assert scale.shape == (() if dim is None else (shape[dim],)) and not scale.any()
        assert cg.qweight(weight, bits, channel_dim=dim).shape == weight.shape
        assert cg.weight_codes(weight, bits, channel_dim=dim)[0].shape == weight.shape


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_strides(backend, bits):
    weight = normal(6, 4, 3, 5)
    last = weight.contiguous(memory_format=torch.channels_last)
    for dim in (0, 1, None):
        for view in (last, weight.transpose(0, 1), weight[::2], weight[:, :, 1:], weight.expand(2, 6, 4, 3, 5)[1],
                     weight[:, :1].expand(6, 4, 3, 5), weight.flip(0).mT):  # fmt: skip
            plain = view.contiguous()
            assert torch.equal(*(cg.weight_scale(w, bits, channel_dim=dim) for w in (view, plain)))
            assert torch.equal(*(cg.qweight(w, bits, channel_dim=dim) for w in (view, plain)))
            assert torch.equal(*(cg.weight_codes(w, bits, channel_dim=dim)[0] for w in (view, plain)))
    assert cg.qweight(last, bits).is_contiguous(memory_format=torch.channels_last)
    assert cg.weight_codes(last, bits)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [257, 4096, 20_011])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_long_rows(backend, bits, size):
    """In any order, on any number of threads."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = normal(3, size, dtype=dtype, seed=size)
        weight[1] *= torch.linspace(0, 3, size, dtype=dtype).exp()
        scales = [cg.weight_scale(weight, bits)]
        before = torch.get_num_threads()
        torch.set_num_threads(2 if backend.startswith("native") else 1)
        scales += [cg.weight_scale(weight[:, order], bits), cg.weight_scale(weight.t(), bits, channel_dim=1)]
        torch.set_num_threads(before)
        scales.append(torch.stack([cg.weight_scale(row, bits, channel_dim=None) for row in weight]))
        assert all(torch.equal(scale, reference.weight_scale(weight, bits, 0)) for scale in scales)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weight=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12),
    bits=st.sampled_from(WEIGHT_BITS),
    dtype=st.sampled_from(DTYPES),
)
def test_any_row(backend, weight, bits, dtype):
    row = torch.tensor([weight], dtype=torch.float64).to(dtype)
    if row.isfinite().all():
        check(row, bits)


# --------------------------------------------------------------------------------------- the least errors


def rows_to_fit():
    for seed, size in itertools.product(range(6), (1, 2, 3, 5, 9, 16)):
        w = normal(size, seed=seed)
        yield from (w, w.sign() * w**2, w / normal(size, seed=seed + 50), w.round(), w.uniform_(-1, 1))


@pytest.mark.parametrize("bits", [1, 2])
def test_one_and_two_bits_have_the_least_error(bits):
    for row in rows_to_fit():
        row = row.tolist()
        s = float(cg.weight_scale(torch.tensor(row), bits, channel_dim=None))
        least, *_ = oracle_weights.least_error(row, bits)
        # The scale is off by an ulp of float32, and by 2**-31 of the largest magnitude.
        off = len(row) * (Fraction(s) / 2**23 + Fraction(max(map(abs, row))) / 2**31) ** 2
        assert oracle_weights.error(row, s, bits) <= least + off


@pytest.mark.parametrize("bits", [4, 8])
def test_four_and_eight_bits_are_as_near_as_the_grid_is_fine(bits):
    p, divisors, excess = 2 ** (bits - 1) - 1, oracle_weights.DIVISORS[bits], 0.0
    for row in rows_to_fit():
        row = row.tolist()
        s = float(cg.weight_scale(torch.tensor(row), bits, channel_dim=None))
        least, square, best = oracle_weights.least_error(row, bits)
        largest = Fraction(max(map(abs, row)))
        if not largest:
            continue
        # The best codes with the nearest scale of the grid, which is off by rounding its inverse; and what h lacks.
        apart, divisor = min((abs(largest / (best * Fraction(d)) - 1), d) for d in divisors)
        bound = least + (apart + Fraction(1, 512)) ** 2 * square + len(row) * largest**2 / Fraction(divisor) / 2**14
        assert oracle_weights.error(row, s, bits) <= bound
        excess = max(excess, float(oracle_weights.error(row, s, bits) / largest**2 * p**2 / len(row)))
    assert excess <= 0.2  # of a squared step of the scale max / p


# ------------------------------------------------------------------------------------ as torch sees them


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_the_identity(reference_or_native, dtype):
    for bits, channel_dim in itertools.product(WEIGHT_BITS, (0, 1, None)):
        weight = normal(4, 5, dtype=dtype).requires_grad_()
        dy = normal(4, 5, dtype=dtype, seed=1)
        dy[0, 0], dy[1, 1] = math.inf, math.nan
        y = cg.qweight(weight, bits, channel_dim=channel_dim)
        assert y.grad_fn is not None and not any(name.startswith("_saved") for name in dir(y.grad_fn))
        assert oracle.same_bits(torch.autograd.grad(y, weight, dy)[0], dy)
        (grad,) = torch.autograd.grad((cg.qweight(weight, bits) ** 2).sum(), weight, create_graph=True)
        assert torch.equal(torch.autograd.grad(grad.sum(), weight)[0], torch.full_like(weight, 2))
        assert not cg.weight_scale(weight, bits).requires_grad
        assert not any(t.requires_grad for t in cg.weight_codes(weight, bits))
        with torch.no_grad():
            assert not cg.qweight(weight, bits).requires_grad


def limits(weight, bits, channel_dim, ste):
    """The largest magnitude with a gradient, beside each weight; infinite for a scale of 0."""
    scale = oracle_weights.scale(weight, bits, channel_dim)
    p = max(2 ** (bits - 1) - 1, 1)
    half = (scale if bits == 1 else scale / 2) if ste == "trust" else 0
    limit = torch.where(scale == 0, math.inf, (scale * p).to(weight.dtype).to(scale.dtype) + half)
    return oracle.per_element(limit, weight, channel_dim)


@pytest.mark.parametrize("ste", ["clipped", "trust"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_the_gradient_of_the_others_is_a_select(reference_or_native, bits, dtype, ste):
    for channel_dim in (0, 1, None):
        weight = normal(6, 70, dtype=dtype) ** 3
        weight[1], weight[2, 3] = 0, math.nan
        leaf, dy = weight.clone().requires_grad_(), normal(6, 70, dtype=dtype, seed=1)
        inside = ~(weight.abs().double() > limits(weight, bits, channel_dim, ste).double())
        dy = torch.where(inside, dy, math.inf)
        y = cg.qweight(leaf, bits, channel_dim=channel_dim, ste=ste)
        assert oracle.same_bits(y, cg.qweight(weight, bits, channel_dim=channel_dim))
        (dx,) = torch.autograd.grad(y, leaf, dy)
        assert oracle.same_bits(dx, torch.where(inside, dy, 0.0)) and inside.any()
        assert channel_dim is None or bits > 2 or not inside.all()  # of more bits the top level is near the largest
        (grad,) = torch.autograd.grad((cg.qweight(leaf, bits, ste=ste) ** 2).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), leaf)
        within = ~(weight.abs().double() > limits(weight, bits, 0, ste).double())
        assert torch.equal(second, 2.0 * within)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_trust_is_the_distance_to_a_level(reference_or_native, bits):
    """|w - Q(w)| at most half the distance of two levels. Quotients of float64, but for the scale."""
    weight = normal(5, 300).double().requires_grad_()
    y, scale = cg.qweight(weight, bits, ste="trust"), cg.weight_scale(weight, bits)[:, None]
    near = (weight - y).abs() <= (scale if bits == 1 else scale / 2)
    (dx,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(dx == 1, near) and (bits > 2 or not near.all())
    clipped = torch.autograd.grad(cg.qweight(weight, bits, ste="clipped").sum(), weight)[0]
    assert (clipped <= dx).all() and (bits == 8 or (clipped < dx).any())


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_the_ends_of_the_gradient(reference_or_native, bits):
    """Within and outside of s * p, for trust and half a step. Added weights move s by less than they lie apart."""
    p, steps = max(2 ** (bits - 1) - 1, 1), {"clipped": 0.0, "trust": 1.0 if bits == 1 else 0.5}
    rest = torch.tensor([-1.0, 1.0] * 500) if bits == 1 else (torch.arange(2000.0) % (2 * p + 1) - p)
    for ste, more in steps.items():
        found = set()
        for at in (p + more - 2**-6, p + more, p + more + 2**-6):
            weight = torch.cat([rest, torch.tensor([at, -at])]).requires_grad_()
            limit = limits(weight.detach(), bits, None, ste)
            (dx,) = torch.autograd.grad(cg.qweight(weight, bits, channel_dim=None, ste=ste).sum(), weight)
            assert torch.equal(dx == 0, weight.detach().abs() > limit)
            found.add(bool(dx[-1]))
        assert found == {True, False}


def test_the_others_save_the_weight_and_their_limits():
    for bits, ste in itertools.product(WEIGHT_BITS, ("clipped", "trust")):
        saved, weight = [], normal(4, 5).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = cg.qweight(weight, bits, ste=ste)
        assert [t.shape for t in saved] == [(4, 5), (4,)] and saved[0].data_ptr() == weight.data_ptr()
        assert y.requires_grad


def test_nothing_is_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        for bits in WEIGHT_BITS:
            cg.qweight(normal(4, 5).requires_grad_(), bits).sum()
    assert not saved


def test_no_forward_mode():
    with pytest.raises(NotImplementedError, match="qweight has no forward-mode derivative"):
        torch.func.jvp(lambda w: cg.qweight(w, 2), (normal(3, 4),), (normal(3, 4),))


OPS = (ops.qweight.default, ops.weight_scale.default, ops.weight_codes.default)


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("channel_dim", [0, 1, -1, None])
def test_vmap(reference_or_native, op, channel_dim):
    weights = normal(3, 4, 5, 6)
    for bits, dim in itertools.product(WEIGHT_BITS, (0, 1, 3)):
        got = torch.func.vmap(lambda w: op(w, bits, channel_dim), in_dims=dim)(weights)
        each = [op(w, bits, channel_dim) for w in weights.unbind(dim)]
        if isinstance(got, torch.Tensor):
            assert torch.equal(got, torch.stack(each))
        else:
            assert all(torch.equal(g, torch.stack(e)) for g, e in zip(got, zip(*each)))


def test_functorch_gradients(reference_or_native):
    weights, x = normal(3, 4, 5), normal(3, 5, seed=1)

    for ste, channel_dim in itertools.product(("identity", "clipped", "trust"), (0, 1, None)):

        def loss(w, x, ste=ste, channel_dim=channel_dim):
            return (cg.qweight(w, 4, channel_dim=channel_dim, ste=ste) @ x).square().sum()

        with warnings.catch_warnings():
            warnings.simplefilter("error")  # as of an op without a batching rule
            got = torch.func.vmap(torch.func.grad(loss))(weights, x)
        for g, w, v in zip(got, weights, x):
            leaf = w.clone().requires_grad_()
            loss(leaf, v).backward()
            torch.testing.assert_close(g, leaf.grad)
    jacobian = torch.func.jacrev(lambda w: cg.qweight(w, 2))(weights[0])
    assert torch.equal(jacobian.reshape(20, 20), torch.eye(20))


@pytest.mark.parametrize("ste", ["identity", "clipped", "trust"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_compile(reference_or_native, bits, dynamic, ste):
    torch._dynamo.reset()

    def layer(w, x):
        return torch.nn.functional.linear(x, cg.qweight(w, bits, ste=ste)) + cg.weight_scale(w, bits)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (6, 9):
        w, x = normal(4, size).requires_grad_(), normal(3, size, seed=1)
        out, wanted = (run(w, x) for run in (compiled, layer))
        grad, wanted_grad = (torch.autograd.grad(y.sum(), w)[0] for y in (out, wanted))
        assert torch.equal(out, wanted) and torch.equal(grad, wanted_grad)


@pytest.mark.parametrize("channel_dim", [0, 1, None])
def test_meta_tensors(channel_dim):
    for bits, dtype in itertools.product(WEIGHT_BITS, DTYPES):
        for weight in (
            normal(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last),
            normal(6, 5)[::2],
        ):
            for call in (cg.qweight, cg.weight_scale, cg.weight_codes):
                real, meta = (call(w, bits, channel_dim=channel_dim) for w in (weight, weight.to("meta")))
                for a, b in zip(real, meta) if call is cg.weight_codes else [(real, meta)]:
                    assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) and b.is_meta


@pytest.mark.parametrize("call", [cg.qweight, cg.weight_codes, cg.weight_scale])
def test_bad_input(reference_or_native, call):
    weight = normal(4, 5)
    for bits in (0, 3, 5, 16, -1):
        with pytest.raises(ValueError, match=f"bits must be one of 8, 4, 2, 1, got {bits}"):
            call(weight, bits)
    for bits in ("4", True, 2.0, None):
        with pytest.raises(TypeError, match=f"bits must be an int, one of 8, 4, 2, 1, got {bits!r}"):
            call(weight, bits)
    for bad, got in (
        (weight.int(), "torch.int32"),
        (weight.bool(), "torch.bool"),
        (weight.to(torch.cfloat), "complex64"),
    ):
        with pytest.raises(TypeError, match=f"weight must be of a dtype in .*{got}"):
            call(bad, 4)
    with pytest.raises(TypeError, match="weight must be a Tensor, got list"):
        call([1.0], 4)
    if call is cg.qweight:
        for bad in ("relu", None, 1):
            with pytest.raises(ValueError, match="unknown ste .*, must be one of 'identity', 'clipped', 'trust'"):
                call(weight, 4, ste=bad)
    with pytest.raises(TypeError, match="weight must be a dense Tensor, got one of layout torch.sparse_coo"):
        call(weight.to_sparse(), 4)
    for channel_dim in (2, -3):
        with pytest.raises(
            ValueError, match=f"channel_dim must be a dimension of weight, which has 2, got {channel_dim}"
        ):
            call(weight, 4, channel_dim=channel_dim)
    for channel_dim in (True, "0", 0.0):
        with pytest.raises(TypeError, match="channel_dim must be an int or None"):
            call(weight, 4, channel_dim=channel_dim)
    with pytest.raises(ValueError, match="channel_dim must be a dimension of weight, which has 0, got 0"):
        call(torch.tensor(1.0), 4)
    with pytest.raises(ValueError, match=r"at most 2\*\*25 elements for each scale, got 33554433"):
        call(torch.empty(1, 2**25 + 1, device="meta"), 8)
