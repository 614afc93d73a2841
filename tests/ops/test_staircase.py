"""Codes and outputs are bit-equal to the oracle, and have the properties that follow from it."""

from __future__ import annotations

import math
from functools import cache

import hypothesis.strategies as st
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import coarsegrad as cg

BITS = range(1, 9)
EVERYDAY_ALPHAS = torch.tensor([1.0, 0.5, 0.25, 1 / 3, 0.4866, 0.1, 1e-3, 100.0, 255.0**-1, 3.0])


@cache
def threshold_case(dtype, rounding, bits):
    """alpha [C], x [C, m] on and around every threshold of each alpha, and the oracle's codes and outputs."""
    seed = 1000 * bits + 10 * oracle.ROUNDINGS.index(rounding) + oracle.DTYPES.index(dtype)
    alpha = torch.cat([EVERYDAY_ALPHAS, oracle.log_uniform(22, 1e-3, 1e2, seed)])
    points = oracle.threshold_points(alpha, bits, dtype, rounding)
    random = (torch.rand(len(alpha), 32, generator=torch.Generator().manual_seed(seed)) * 1.4 - 0.2) * 2**bits
    special = oracle.special_values(dtype).expand(len(alpha), -1)
    x = torch.cat([points, (random * alpha[:, None]).to(dtype), special], 1)
    code = oracle.codes(x, alpha, bits, rounding, 0)
    return alpha, x, code.to(torch.uint8), oracle.output(x, alpha, bits, rounding, 0)


@cache
def exhaustive_case(dtype, rounding, bits):
    """Alphas and every value of a half dtype for each: the unit Gaussian's; one with the last of 8 bits' levels just
    above a power of two, where rounding to bfloat16 moves them by almost a step; one with the last two equal; one with
    levels halfway between two numbers of bfloat16; and a random one."""
    chosen = torch.tensor([1.6 / 2**bits, 256 / 253.5, 41 / 4096, 257 / 2048])
    alpha = torch.cat([chosen, oracle.log_uniform(1, 1e-3, 1e2, seed=bits)])
    x = oracle.every_value(dtype).expand(len(alpha), -1)
    code = oracle.codes(x, alpha, bits, rounding, 0)
    return alpha, x, code.to(torch.uint8), oracle.output(x, alpha, bits, rounding, 0)


def unpacked_codes(x, alpha, bits, rounding, channel_dim=None):
    """qrelu_codes, unpacked to memory order."""
    packed = cg.qrelu_codes(x, alpha, bits, rounding=rounding, channel_dim=channel_dim)
    return oracle.unpack(packed, oracle.CODE_WIDTH[bits], x.numel()).to(torch.uint8)


def assert_same(got, want, x, alpha):
    if not oracle.same_bits(got, want):
        rows = got.reshape(want.shape)
        wrong = ~((rows == want) | (rows.isnan() & want.isnan()))
        where = tuple(wrong.nonzero()[0].tolist()) if wrong.any() else "only the sign of a zero or the dtype"
        detail = f"x={x[where]!r} got={rows[where]!r} want={want[where]!r}" if wrong.any() else ""
        pytest.fail(f"{int(wrong.sum())} of {want.numel()} differ, first at {where}: {detail}; alpha={alpha}")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_on_every_threshold_and_one_ulp_either_side(backend, dtype, rounding, bits):
    alpha, x, code, y = threshold_case(dtype, rounding, bits)
    assert_same(cg.qrelu(x, alpha, bits, rounding=rounding, channel_dim=0), y, x, alpha)
    assert torch.equal(unpacked_codes(x, alpha, bits, rounding, 0), code.reshape(-1))

    # The inner-channel loop: channels_last puts the 32 alphas side by side, backwards in the second sample.
    image = torch.stack([x, x.flip(1)]).unsqueeze(-1).to(memory_format=torch.channels_last)
    want = torch.stack([y, y.flip(1)]).unsqueeze(-1)
    assert_same(cg.qrelu(image, alpha, bits, rounding=rounding, channel_dim=1), want, image, alpha)
    in_order = torch.stack([code, code.flip(1)]).permute(0, 2, 1).reshape(-1)
    assert torch.equal(unpacked_codes(image, alpha, bits, rounding, 1), in_order)

    # 96 side by side: blocks of 64 begin at any third of them.
    def thirds(t):
        return torch.cat([t, t.flip(0), t.roll(5, 0)]).T.contiguous()

    rows, steps = thirds(x), thirds(alpha[:, None])[0]
    assert_same(cg.qrelu(rows, steps, bits, rounding=rounding, channel_dim=1), thirds(y), rows, steps)
    assert torch.equal(unpacked_codes(rows, steps, bits, rounding, 1), thirds(code).reshape(-1))

    # The per-tensor loop, for an everyday alpha and three random ones.
    for row in (3, 12, 20, 30):
        got = cg.qrelu(x[row], alpha[row : row + 1], bits, rounding=rounding)
        assert_same(got, y[row], x[row], alpha[row])
        assert torch.equal(unpacked_codes(x[row], alpha[row : row + 1], bits, rounding), code[row])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("dtype", oracle.HALF_DTYPES, ids=str)
def test_all_65536_values_of_a_half_dtype(backend, dtype, rounding, bits):
    alpha, x, code, y = exhaustive_case(dtype, rounding, bits)
    assert_same(cg.qrelu(x, alpha, bits, rounding=rounding, channel_dim=0), y, x, alpha)
    for row in range(len(alpha)):
        step = alpha[row : row + 1]
        assert_same(cg.qrelu(x[row], step, bits, rounding=rounding), y[row], x[row], step)
        assert torch.equal(unpacked_codes(x[row], step, bits, rounding), code[row])


@pytest.mark.parametrize("bits", (1, 2, 3, 4))
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("dtype", (torch.float32, *oracle.HALF_DTYPES), ids=str)
def test_many_numbers_of_one_alpha_in_any_order(backend, dtype, rounding, bits):
    """Enough of them for the tables that native kernels search, with NaNs here and there and a short last block."""
    alpha, x, code, y = threshold_case(dtype, rounding, bits)
    row, generator = 4, torch.Generator().manual_seed(bits)
    order = torch.randint(x.shape[1], (64 * 2 ** (bits + 1) + 37,), generator=generator)
    finite = order[~x[row][order].isnan()]
    for pick in (order, finite):
        chosen, step = x[row][pick].clone().requires_grad_(), alpha[row : row + 1]
        got = cg.qrelu(chosen, step, bits, rounding=rounding)
        assert_same(got.detach(), y[row][pick], chosen, step)
        assert torch.equal(unpacked_codes(chosen.detach(), step, bits, rounding), code[row][pick])
        top = oracle.levels(step, bits, dtype)[0, -1]
        (dx,) = torch.autograd.grad(got, chosen, torch.ones_like(got))
        assert torch.equal(dx != 0, ~(chosen <= 0) & ~(chosen > top))


# Levels that collapse onto each other, overflow to infinity, or are subnormal; products that overflow.
EXTREME_ALPHAS = {
    torch.float16: [1e-8, 3e-8, 6e-8, 1e-7, 1e-5, 260.0, 1000.0, 65504.0, 1e6, 1e-20],
    torch.bfloat16: [1e-40, 1e-39, 1e-38, 9e-41, 1e36, 1e37, 1e38, 3e38],
    torch.float32: [1e-45, 4e-45, 1e-42, 1e-40, 1.2e-38, 5e-38, 1e36, 1e37, 1e38, 2e38, 3.4e38],
    torch.float64: [1e-45, 1e-40, 1e-38, 1e38, 3.4e38],
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_levels_that_collapse_or_overflow(backend, dtype, rounding, bits):
    low, high = (1e-10, 1e6) if dtype == torch.float16 else (1e-44, 3e38)
    alpha = torch.cat([torch.tensor(EXTREME_ALPHAS[dtype]), oracle.log_uniform(16, low, high, seed=bits)])
    points = oracle.threshold_points(alpha, bits, dtype, rounding)
    special = oracle.special_values(dtype).expand(len(alpha), -1)
    ladder = torch.logspace(-46, 38, 169, dtype=torch.float64).to(dtype).expand(len(alpha), -1)
    x = torch.cat([points, special, ladder], 1)
    y = oracle.output(x, alpha, bits, rounding, 0)
    assert_same(cg.qrelu(x, alpha, bits, rounding=rounding, channel_dim=0), y, x, alpha)
    code = oracle.codes(x, alpha, bits, rounding, 0).to(torch.uint8)
    assert torch.equal(unpacked_codes(x, alpha, bits, rounding, 0), code.reshape(-1))
    for row in (0, 3, len(alpha) - 1):
        assert_same(cg.qrelu(x[row], alpha[row : row + 1], bits, rounding=rounding), y[row], x[row], alpha[row])


@pytest.mark.parametrize("alpha_dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_alpha_of_another_dtype(backend, dtype, alpha_dtype):
    """alpha is computed with in float32, in float64 for float64 x, whatever its own dtype."""
    alpha = torch.tensor([0.1, 1 / 3, 0.7], dtype=torch.float64).to(alpha_dtype)
    x = oracle.threshold_points(alpha.to(oracle.wide(dtype)), 3, dtype, "ceil")
    y = cg.qrelu(x, alpha, 3, channel_dim=0)
    assert_same(y, oracle.output(x, alpha, 3, "ceil", 0), x, alpha)
    assert_same(cg.qrelu(x[1], alpha[1:2], 3), y[1], x[1], alpha[1:2])


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_special_values_by_hand(backend, dtype, rounding):
    info = torch.finfo(dtype)
    smallest = 2.0 ** {torch.float32: -149, torch.bfloat16: -133, torch.float16: -24, torch.float64: -1074}[dtype]
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, smallest, -smallest, info.tiny, info.max, info.min])
    x = (
        x.to(dtype)
        if dtype != torch.float64
        else torch.tensor(
            [math.nan, math.inf, -math.inf, -0.0, 0.0, smallest, -smallest, info.tiny, info.max, info.min],
            dtype=dtype,
        )
    )
    first = 0.0 if rounding == "nearest" else 0.5
    want = torch.tensor([math.nan, 1.5, 0.0, 0.0, 0.0, first, 0.0, first, 1.5, 0.0], dtype=dtype)
    y = cg.qrelu(x, torch.tensor([0.5]), 2, rounding=rounding)
    assert_same(y, want, x, 0.5)
    assert not torch.signbit(y[2:5]).any(), "-inf, -0.0 and +0.0 all give +0.0"
    code = unpacked_codes(x, torch.tensor([0.5]), 2, rounding)
    low = 0 if rounding == "nearest" else 1
    assert code.tolist() == [3, 3, 0, 0, 0, low, 0, low, 3, 0], "the code of NaN is the top one"


def test_hand_worked_codes(backend):
    x = torch.tensor([-1.0, 0.0, 0.1, 0.25, 0.26, 0.5, 0.6, 0.75, 0.76, 1.0, 1.1, 1.25, 1.3, 1.5, 1.6, 9.0])
    by_hand = {
        "ceil": [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3],
        "nearest": [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3],
        "hwgq": [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3],
    }
    for rounding, code in by_hand.items():
        assert unpacked_codes(x, torch.tensor([0.5]), 2, rounding).tolist() == code
        y = cg.qrelu(x, torch.tensor([0.5]), 2, rounding=rounding)
        assert y.tolist() == [0.5 * c for c in code]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_idempotent_and_levels_are_fixed_points(backend, dtype, rounding, bits):
    """Q(Q(x)) == Q(x) wherever the levels are distinct in the dtype."""
    alpha, x, _, _ = threshold_case(dtype, rounding, bits)
    level = oracle.levels(alpha, bits, dtype)
    distinct = (level.diff(dim=1) > 0).all(1) & level.isfinite().all(1)
    assert distinct.any()
    x, level, alpha = x[distinct], level[distinct], alpha[distinct]
    once = cg.qrelu(x, alpha, bits, rounding=rounding, channel_dim=0)
    assert_same(cg.qrelu(once, alpha, bits, rounding=rounding, channel_dim=0), once, x, alpha)
    assert_same(cg.qrelu(level, alpha, bits, rounding=rounding, channel_dim=0), level, level, alpha)


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_monotone(backend, dtype, rounding):
    for bits in BITS:
        alpha, x, _, _ = threshold_case(dtype, rounding, bits)
        ordered = x[:, ~x[0].isnan()].sort(dim=1).values
        y = cg.qrelu(ordered, alpha, bits, rounding=rounding, channel_dim=0)
        assert (y.diff(dim=1) >= 0).all()
        code = unpacked_codes(ordered, alpha, bits, rounding, 0).reshape(ordered.shape).int()
        assert (code.diff(dim=1) >= 0).all()


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=40),
    alpha=st.floats(min_value=2.0**-149, max_value=torch.finfo(torch.float32).max, width=32),
    bits=st.integers(1, 8),
    rounding=st.sampled_from(oracle.ROUNDINGS),
    dtype=st.sampled_from(oracle.DTYPES),
)
def test_any_input_any_alpha(backend, values, alpha, bits, rounding, dtype):
    """Whatever x and whatever positive alpha: the oracle's codes and outputs, and every output a level."""
    alpha = torch.tensor([alpha])
    near = torch.tensor(values, dtype=torch.float64)
    x = torch.cat([near, near.nan_to_num(0, 1, -1).remainder(1) * float(alpha) * 2**bits]).to(dtype)
    y = cg.qrelu(x, alpha, bits, rounding=rounding)
    assert_same(y, oracle.output(x, alpha, bits, rounding), x, alpha)
    assert torch.equal(unpacked_codes(x, alpha, bits, rounding).long(), oracle.codes(x, alpha, bits, rounding))
    assert torch.isin(y[~y.isnan()], oracle.levels(alpha, bits, dtype)).all()


def test_a_level_is_rounded_to_float32_before_the_dtype(backend):
    # 3 * alpha lies 2**-24 above the middle of two bfloat16 numbers. The product in float32 rounds to that middle,
    # and from there to the even neighbour below; rounded once it would be the neighbour above.
    alpha = torch.tensor([(2**25 + 2**17 + 2) / 3 * 2**-25], dtype=torch.float64)
    assert alpha.float().double() == alpha and (3 * alpha).item() == 1 + 2**-8 + 2**-24
    x = torch.tensor([10.0], dtype=torch.bfloat16)
    for a in (alpha.float(), alpha):
        assert cg.qrelu(x, a, 2).item() == 1.0
        assert cg.dequantize(cg.qrelu_codes(x, a, 2), a, 2, [1], torch.bfloat16).item() == 1.0
