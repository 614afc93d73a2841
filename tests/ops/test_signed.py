"""The signed staircase and the Hadamard rotation: codes, levels and dynamic alphas, to the bit, on every backend."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import oracle
import oracle_signed
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import coarsegrad as cg

BITS = range(2, 9)
ALPHAS = (0.3, 1.0, 1e-3, 777.0)


def random_input(shape, dtype=torch.float32, seed=0, spread=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def on_thresholds(alpha, bits, dtype):
    """Every level and threshold with both neighbours, and the special values."""
    alpha = torch.tensor([alpha], dtype=oracle.wide(dtype))
    edges = oracle_signed.thresholds(alpha, bits, dtype)[0].to(dtype)
    x = torch.cat([edges, oracle_signed.levels(alpha, bits, dtype)[0]])
    return torch.cat([x, oracle.up(x), oracle.down(x), oracle.special_values(dtype)])


def packed(codes, bits):
    width = oracle.CODE_WIDTH[bits]
    return oracle.pack(codes.flatten().tolist(), width)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_every_threshold_and_its_neighbours(backend, dtype, bits):
    for value in ALPHAS:
        x, alpha = on_thresholds(value, bits, dtype), torch.tensor([value], dtype=oracle.wide(dtype))
        wanted = oracle_signed.output_of_rows(x[None], alpha, bits)[0]
        assert oracle.same_bits(cg.qsigned(x, alpha, bits), wanted)
        codes, same = cg.qsigned_codes(x, alpha, bits)
        assert bytes(codes.tolist()) == packed(oracle_signed.codes_of_rows(x[None], alpha, bits), bits)
        assert same is alpha


@pytest.mark.parametrize("dtype", oracle.HALF_DTYPES, ids=str)
def test_every_16_bit_number(backend, dtype):
    x = oracle.every_value(dtype)
    for bits, value in ((2, 0.3), (4, 0.07), (8, 0.0123)):
        alpha = torch.tensor([value])
        assert oracle.same_bits(cg.qsigned(x, alpha, bits), oracle_signed.output_of_rows(x[None], alpha, bits)[0])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_alphas_at_the_ends_of_the_range(backend, dtype):
    """Levels that collapse or overflow."""
    finite = torch.finfo(dtype)
    for value in (finite.smallest_normal, finite.smallest_normal * finite.eps, finite.max / 3, finite.max * 0.9):
        alpha = torch.tensor([value], dtype=oracle.wide(dtype))
        x = on_thresholds(float(alpha), 4, dtype)
        assert oracle.same_bits(cg.qsigned(x, alpha, 4), oracle_signed.output_of_rows(x[None], alpha, 4)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channel_dim", [0, 1, -1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_an_alpha_per_channel(backend, dtype, channel_dim, memory_format):
    x = random_input((3, 5, 4, 7), dtype, spread=0.5).contiguous(memory_format=memory_format)
    alpha = oracle.log_uniform(x.size(channel_dim), 0.02, 1, seed=1)
    y = cg.qsigned(x, alpha, 4, channel_dim=channel_dim)
    rows = oracle.to_rows(x, channel_dim)
    wanted = oracle.from_rows(oracle_signed.output_of_rows(rows, alpha, 4), x, channel_dim)
    assert oracle.same_bits(y, wanted) and y.is_contiguous(memory_format=memory_format)
    codes, _ = cg.qsigned_codes(x, alpha, 4, channel_dim=channel_dim)
    again = cg.dequantize(
        codes, alpha, 4, x.shape, dtype, signed=True, channel_dim=channel_dim, memory_format=memory_format
    )
    assert oracle.same_bits(again, y)


SHAPES = [((6, 96), 32), ((6, 96), 96), ((2, 3, 128), 64), ((5, 9), 9), ((5, 9), 3), ((3, 7), 1), ((64,), 64)]


@pytest.mark.parametrize("shape, group", SHAPES)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_dynamic_alphas(backend, dtype, shape, group):
    for bits in BITS:
        x = random_input(shape, dtype, seed=bits) * 10.0 ** (bits - 5)
        y, codes, alpha = oracle_signed.dynamic(x, bits, group)
        assert oracle.same_bits(cg.qsigned(x, None, bits, group=group), y)
        got, of_groups = cg.qsigned_codes(x, None, bits, group=group)
        assert bytes(got.tolist()) == packed(codes, bits) and oracle.same_bits(of_groups, alpha)
        assert oracle.same_bits(cg.dequantize(got, of_groups, bits, shape, dtype, signed=True), y)


def test_without_a_group_a_row_shares_its_alpha(backend):
    x = random_input((4, 2, 40))
    assert oracle.same_bits(cg.qsigned(x, None, 8), cg.qsigned(x, None, 8, group=40))
    assert cg.qsigned_codes(x, None, 8)[1].shape == (4, 2, 1)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_nothing_saturates(backend, dtype):
    x = random_input((64, 64), dtype)
    for bits in BITS:
        alpha = cg.qsigned_codes(x, None, bits, group=32)[1].double().repeat_interleave(32, 1)
        assert (x.double().abs() <= (2 ** (bits - 1) - 1) * alpha).all()
        error = (cg.qsigned(x, None, bits, group=32).double() - x.double()).abs()
        assert (error <= alpha * (0.5 + 2 ** (bits - 1) * torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("group", [4, 32])
def test_dynamic_special_values(backend, dtype, group):
    finite = torch.finfo(dtype)
    rows = torch.randn(10, group, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[0] = 0
    rows[1] = -0.0
    rows[2, 1] = torch.nan
    rows[3, 2] = math.inf
    rows[4, 0] = -math.inf
    rows[5] = finite.smallest_normal * finite.eps  # the smallest number: its alpha is larger
    rows[6, 0] = finite.max
    rows[7] = -finite.max
    rows[8] = 0
    rows[8, 3] = finite.smallest_normal / 2
    for bits in (2, 4, 8):
        y, codes, alpha = oracle_signed.dynamic(rows, bits, group)
        assert alpha[0] == 0 and alpha[2:5].isnan().all()
        got = cg.qsigned(rows, None, bits, group=group)
        assert oracle.same_bits(got, y) and got[2:5].isnan().all() and not got[:2].any()
        assert not got[:2].signbit().any()
        got, of_groups = cg.qsigned_codes(rows, None, bits, group=group)
        assert bytes(got.tolist()) == packed(codes, bits) and oracle.same_bits(of_groups, alpha)
        assert (codes[:5] == 2 ** (bits - 1) - 1).all()
        assert oracle.same_bits(cg.dequantize(got, of_groups, bits, rows.shape, dtype, signed=True), y)


def test_a_level_that_rounds_to_zero_keeps_its_sign(backend):
    """Levels collapse: -0.3 of the smallest number is -0, and at a threshold the lower code wins, for 0 too."""
    x, alpha = torch.tensor([[2.0**-24, -(2.0**-24), 0.0]], dtype=torch.float16), torch.tensor([0.3 * 2.0**-24])
    y = cg.qsigned(x, alpha, 8)
    assert oracle.same_bits(y, oracle_signed.output_of_rows(x, alpha, 8)) and y[0, 2].signbit()


def test_a_quotient_beyond_bfloat16(backend):
    """p is 1 for 2 bits, and rounding up exceeds bfloat16."""
    x = torch.full((1, 8), torch.finfo(torch.float32).max)
    assert cg.qsigned(x, None, 2).isnan().all() and cg.qsigned_codes(x, None, 2)[1].isnan().all()
    assert cg.qsigned(x, None, 3).isfinite().all()


def test_odd_but_for_ties(backend):
    x = random_input((50, 32))
    assert torch.equal(cg.qsigned(-x, None, 4), -cg.qsigned(x, None, 4))
    assert cg.qsigned(torch.tensor([-1.5, 1.5]), 1.0, 4).tolist() == [-2.0, 1.0]  # at a threshold the lower code


@pytest.mark.parametrize("shape", [(0,), (0, 32), (4, 0), (2, 0, 32)], ids=str)
def test_empty(backend, shape):
    x = torch.empty(shape)
    for alpha in (None, 0.5):
        y = cg.qsigned(x, alpha, 4)
        codes, alphas = cg.qsigned_codes(x, alpha, 4)
        assert y.shape == x.shape and codes.numel() == 0
        assert cg.dequantize(codes, alphas, 4, x.shape, x.dtype, signed=True).shape == x.shape
    assert cg.qsigned_codes(x, None, 4)[1].numel() == 0


def test_strides(backend):
    x = random_input((6, 4, 64))
    for view in (x.transpose(0, 1), x[::2], x[..., ::2], x.transpose(1, 2), x[:, 1:3, 16:48]):
        for alpha in (None, 0.2):
            assert oracle.same_bits(cg.qsigned(view, alpha, 4), cg.qsigned(view.contiguous(), alpha, 4))
    images = random_input((2, 8, 4, 6)).contiguous(memory_format=torch.channels_last)
    y = cg.qsigned(images, None, 4)
    assert oracle.same_bits(y, cg.qsigned(images.contiguous(), None, 4)) and y.is_contiguous()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    group=st.integers(1, 130),
    bits=st.integers(2, 8),
    dtype=st.sampled_from(oracle.DTYPES),
    exponent=st.integers(-40, 36),
    seed=st.integers(0, 99),
)
def test_any_groups(backend, rows, groups, group, bits, dtype, exponent, seed):
    x = (random_input((rows, groups * group), torch.float64, seed) * 2.0**exponent).to(dtype)
    y, codes, alpha = oracle_signed.dynamic(x, bits, group)
    assert oracle.same_bits(cg.qsigned(x, None, bits, group=group), y)
    got, of_groups = cg.qsigned_codes(x, None, bits, group=group)
    assert bytes(got.tolist()) == packed(codes, bits) and oracle.same_bits(of_groups, alpha)


def test_threads_change_nothing(backend):
    x = random_input((512, 384))
    outputs = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outputs.append([cg.qsigned(x, None, 3, group=48), *cg.qsigned_codes(x, None, 3, group=48), cg.hadamard(x, 128)])
    torch.set_num_threads(before)
    assert all(map(oracle.same_bits, *outputs))


# ------------------------------------------------------------------------------------------------ rotation


@pytest.mark.parametrize("size", [1, 2, 16, 64, 128, 512])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_hadamard(backend, dtype, size):
    x = random_input((3, 2, 512), dtype)
    y = cg.hadamard(x, size)
    assert oracle.same_bits(y, oracle_signed.rotated(x, size))
    matrix = oracle_signed.hadamard_matrix(size)
    exact = (x.double().reshape(-1, size) @ matrix / size**0.5).reshape(x.shape)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=8 * float(x.abs().max()) * torch.finfo(dtype).eps)


def test_hadamard_of_special_values_and_strides(backend):
    x = random_input((4, 128))
    x[0, 3], x[1, 70], x[2, 5] = math.nan, math.inf, 1e38
    y = cg.hadamard(x, 64)
    assert y[0, :64].isnan().all() and not y[0, 64:].isnan().any() and oracle.same_bits(y, oracle_signed.rotated(x, 64))
    wide = random_input((128, 6)).t()
    assert oracle.same_bits(cg.hadamard(wide, 128), cg.hadamard(wide.contiguous(), 128))
    assert cg.hadamard(torch.empty(0, 64)).shape == (0, 64)


def test_a_rotation_spreads_an_outlier(backend):
    x = random_input((32, 64))
    x[:, 7] *= 100
    plain = (cg.qsigned(x, None, 4) - x).square().mean()
    rotated = (cg.hadamard(cg.qsigned(cg.hadamard(x), None, 4)) - x).square().mean()
    assert rotated < plain
