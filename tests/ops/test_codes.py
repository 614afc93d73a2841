"""qrelu_codes writes the specified layout; dequantize rebuilds qrelu's output bit for bit; slopes are looked up."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import coarsegrad as cg

BITS = range(1, 9)
ALPHA = torch.tensor([0.3])


def random_input(shape, dtype=torch.float32, seed=0, spread=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 257, 1023])
def test_layout_against_a_slow_packer(backend, size, bits):
    x = random_input(size, seed=size, spread=0.2 * 2**bits)
    packed = cg.qrelu_codes(x, ALPHA, bits)
    width = oracle.CODE_WIDTH[bits]
    assert packed.dtype == torch.uint8 and packed.shape == (oracle.packed_size(size, width),)
    assert bytes(packed.tolist()) == oracle.pack(oracle.codes(x, ALPHA, bits, "ceil").tolist(), width)


def test_layout_by_hand(backend):
    x = torch.tensor([-1.0, 0.5, 1.5, 2.5, 3.5])
    one = torch.tensor([1.0])
    assert cg.qrelu_codes(x, one, 1).tolist() == [0b11110]
    assert cg.qrelu_codes(x, one, 2).tolist() == [0b11_10_01_00, 0b11]
    assert cg.qrelu_codes(x, one, 3).tolist() == [0x10, 0x32, 0x04]
    assert cg.qrelu_codes(x, one, 4).tolist() == [0x10, 0x32, 0x04]
    for bits in (5, 6, 7, 8):
        assert cg.qrelu_codes(x, one, bits).tolist() == [0, 1, 2, 3, 4]


def test_bits_defaults_to_four(backend):
    x = random_input(33)
    assert torch.equal(cg.qrelu_codes(x, ALPHA), cg.qrelu_codes(x, ALPHA, 4, rounding="ceil", channel_dim=None))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_dequantize_rebuilds_the_output(backend, dtype, rounding, bits):
    for size in (0, 1, 7, 8, 33, 1001):
        x = random_input(size, dtype, seed=size, spread=0.2 * 2**bits)
        codes = cg.qrelu_codes(x, ALPHA, bits, rounding=rounding)
        y = cg.dequantize(codes, ALPHA, bits, x.shape, dtype)
        assert oracle.same_bits(y, cg.qrelu(x, ALPHA, bits, rounding=rounding))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("channel_dim", [0, 1, -1])
def test_dequantize_per_channel(backend, dtype, bits, channel_dim):
    x = random_input((3, 5, 7), dtype, spread=0.2 * 2**bits)
    alpha = oracle.log_uniform(x.size(channel_dim), 0.05, 1, seed=bits)
    codes = cg.qrelu_codes(x, alpha, bits, channel_dim=channel_dim)
    y = cg.dequantize(codes, alpha, bits, x.shape, dtype, channel_dim=channel_dim)
    assert oracle.same_bits(y, cg.qrelu(x, alpha, bits, channel_dim=channel_dim))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("channel_dim", [None, 1])
@pytest.mark.parametrize(
    "shape, memory_format",
    [
        ((2, 5, 3, 4), torch.contiguous_format),
        ((2, 5, 3, 4), torch.channels_last),
        ((2, 5, 3, 4, 3), torch.channels_last_3d),
    ],
    ids=str,
)
def test_memory_formats(backend, shape, memory_format, channel_dim, bits):
    """Codes lie in the memory order of the output; dequantize takes the format to rebuild in."""
    x = random_input(shape, spread=0.2 * 2**bits).contiguous(memory_format=memory_format)
    alpha = oracle.log_uniform(5 if channel_dim else 1, 0.1, 1, seed=bits)
    y = cg.qrelu(x, alpha, bits, channel_dim=channel_dim)
    packed = cg.qrelu_codes(x, alpha, bits, channel_dim=channel_dim)
    code = oracle.codes(x, alpha, bits, "ceil", channel_dim).contiguous(memory_format=memory_format)
    width = oracle.CODE_WIDTH[bits]
    assert bytes(packed.tolist()) == oracle.pack(oracle.memory_order(code).tolist(), width)
    rebuilt = cg.dequantize(packed, alpha, bits, shape, x.dtype, channel_dim=channel_dim, memory_format=memory_format)
    assert oracle.same_bits(rebuilt, y)
    assert rebuilt.stride() == y.stride()


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_every_code_of_every_width(backend, dtype):
    for bits in BITS:
        width, top = oracle.CODE_WIDTH[bits], 2**bits - 1
        code = (torch.arange(2 * top + 3) * 7) % (top + 1)
        packed = torch.tensor(list(oracle.pack(code.tolist(), width)), dtype=torch.uint8)
        y = cg.dequantize(packed, ALPHA, bits, code.shape, dtype)
        assert oracle.same_bits(y, oracle.levels(ALPHA, bits, dtype)[0][code])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_every_code_many_times(backend, dtype, bits):
    """Enough of them for the tables of native kernels; of the second alpha many levels are ties in bfloat16."""
    width, top = oracle.CODE_WIDTH[bits], 2**bits - 1
    code = torch.arange(64 * 66 + 37) * 7 % (top + 1)
    packed = torch.tensor(list(oracle.pack(code.tolist(), width)), dtype=torch.uint8)
    for value in (0.3, 257 / 2048, 41 / 4096):
        alpha = torch.tensor([value])
        y = cg.dequantize(packed, alpha, bits, code.shape, dtype)
        assert oracle.same_bits(y, oracle.levels(alpha, bits, dtype)[0][code])
    # Three channels, each in whole blocks of its own but for its ends.
    alpha, rows = torch.tensor([0.3, 257 / 2048, 1.7]), code[: code.numel() // 3 * 3].view(3, -1)
    y = cg.dequantize(packed[: -(-rows.numel() * width // 8)], alpha, bits, rows.shape, dtype, channel_dim=0)
    assert oracle.same_bits(y, oracle.levels(alpha, bits, dtype).gather(1, rows))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    values=st.lists(st.floats(width=16, allow_nan=False), max_size=70),
    alpha=st.floats(min_value=2.0**-24, max_value=65504, width=16),
    bits=st.integers(1, 8),
    rounding=st.sampled_from(oracle.ROUNDINGS),
    dtype=st.sampled_from(oracle.DTYPES),
)
def test_round_trip_of_anything(backend, values, alpha, bits, rounding, dtype):
    x, alpha = torch.tensor(values, dtype=dtype), torch.tensor([alpha])
    codes = cg.qrelu_codes(x, alpha, bits, rounding=rounding)
    want = oracle.codes(x, alpha, bits, rounding).tolist()
    assert bytes(codes.tolist()) == oracle.pack(want, oracle.CODE_WIDTH[bits])
    assert oracle.same_bits(
        cg.dequantize(codes, alpha, bits, x.shape, dtype), cg.qrelu(x, alpha, bits, rounding=rounding)
    )


def test_no_gradient_flows_through_codes(backend):
    x = random_input(16).requires_grad_()
    codes = cg.qrelu_codes(x, ALPHA, 2)
    assert not codes.requires_grad


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_backward_from_slopes(backend, bits, dtype):
    """dy * slopes[c], a select where the slope is 0; the last size is stored past the caches, with a tail."""
    generator, wide = torch.Generator().manual_seed(bits), torch.promote_types(dtype, torch.float32)
    slopes = torch.randn(2**bits, generator=generator, dtype=wide)
    slopes[bits % 2 :: 5] = 0
    large = [(2**22 + 5,)] if "native" in backend and bits in (2, 8) else []
    for shape in ((0,), (1,), (63,), (64,), (65,), (3, 5, 7, 9), (1001, 19), *large):
        dy = (torch.randn(shape, generator=generator) * 3).to(dtype)
        dy.view(-1)[::11], dy.view(-1)[5::13] = math.inf, math.nan
        code = torch.randint(2**bits, shape, generator=generator)
        in_memory = code
        if dy.dim() == 4:
            dy, in_memory = dy.to(memory_format=torch.channels_last), code.permute(0, 2, 3, 1)
        packed = cg.reference.pack(in_memory.reshape(-1).to(torch.uint8), oracle.CODE_WIDTH[bits])
        got = torch.ops.coarsegrad.backward_from_slopes(dy, packed, slopes, bits)
        want = torch.where(slopes[code] == 0, 0.0, dy.to(wide) * slopes[code]).to(dtype)
        assert got.stride() == dy.stride() and oracle.same_bits(got, want)
