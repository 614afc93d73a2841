"""The Triton kernels of the signed staircase and of the Hadamard rotation against the reference, bit for bit, in
Triton's interpreter as in triton_interpreted.py; test_triton.py runs this."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from triton_interpreted import ALPHAS, numbers_of_all_magnitudes, ordinary, same

from coarsegrad import reference
from coarsegrad._types import CODE_WIDTH, DTYPES, top_level, wide_dtype
from coarsegrad.testing import hard_inputs
from coarsegrad.triton import qrelu, signed
from coarsegrad.triton.staircase import signed_code_by_guess, widen


def hard_signed_inputs(alpha, bits, dtype):
    """Those of the staircase of non-negative k that has the levels up to p, with their negatives."""
    return hard_inputs(alpha, bits - 1, "nearest", dtype)


def assert_forward(x, alpha, bits, group=None, channel_dim=None, codes=True):
    arguments = alpha, bits, group, True, codes, channel_dim
    results = signed.qsigned_forward(x, *arguments)
    want = list(reference.qsigned_forward(x, *arguments))
    if (
        alpha is None
    ):  # by definition; the reference compares with p * alpha, which a subnormal quotient may round below
        want[2] = reference.pack(torch.ones(x.numel(), dtype=torch.uint8), 1)
    for pair in zip(results, want, strict=True):
        assert same(*pair)
    return results


@pytest.mark.parametrize("bits", (2, 3, 6, 8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_alphas(dtype, bits):
    """Of which no level collapses or overflows, and of which some do: in blocks of their own, and in one block."""
    alpha = torch.tensor(ALPHAS, dtype=wide_dtype(dtype))
    x = torch.stack([hard_signed_inputs(a, bits, dtype) for a in alpha.tolist()])
    assert_forward(x, alpha, bits, channel_dim=0)
    for i in (0, 1, 3, 5):
        assert_forward(x[i], alpha[i : i + 1], bits)


@pytest.mark.parametrize(
    "shape, channel_dim, memory_format",
    (
        ((2, 3, 5, 7), 1, torch.channels_last),
        ((2, 3, 5, 7), -3, torch.contiguous_format),
        ((3, 2, 72), 1, torch.contiguous_format),
        ((0, 3), 1, torch.contiguous_format),
    ),
)
def test_layouts(shape, channel_dim, memory_format):
    x = ordinary(*shape).contiguous(memory_format=memory_format)
    alpha = torch.linspace(0.1, 0.5, shape[channel_dim])
    for bits in (2, 4, 8):
        *_, codes = assert_forward(x, alpha, bits, channel_dim=channel_dim)
        back = codes, alpha, bits, None, list(shape), x.dtype, channel_dim % x.dim(), memory_format
        assert same(signed.qsigned_dequantize(*back), reference.qsigned_dequantize(*back))


def test_views():
    whole, alpha = ordinary(40, 60), torch.tensor([0.4])
    for x in (whole[:, 1:], whole[3:, ::2], whole.t(), ordinary(1).expand(50), ordinary(3, 2, 1, 1)[:, :, 0, 0]):
        assert_forward(x, alpha, 3)
        assert_forward(x, None, 3)
        assert same(signed.hadamard(x, 1), reference.hadamard(x, 1))
    assert_forward(ordinary(1)[0], alpha, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_alpha_on_a_gpu_makes_nan(dtype, monkeypatch):
    """On a CPU it is an error before; the kernels get it here as a GPU's would."""
    x = ordinary(40, dtype=dtype)
    with pytest.raises(ValueError, match="alpha must be finite and > 0"):
        signed.qsigned_forward(x, torch.tensor([-1.0]), 3, None, True, True, None)
    monkeypatch.setattr(qrelu, "checked_values", lambda alpha, wide: alpha.to(wide))
    for bits in (2, 3):
        for bad in (0.0, -1.0, math.inf, math.nan):
            y, _, mask, codes = signed.qsigned_forward(x, torch.tensor([bad]), bits, None, True, True, None)
            assert y.isnan().all() and (mask == 255).all()
            assert (reference.unpack(codes, CODE_WIDTH[bits], 40) == top_level(bits)).all()
    y, *_ = signed.qsigned_forward(x.view(2, 20), torch.tensor([0.5, math.nan]), 2, None, True, True, 0)
    assert not y[0].isnan().any() and y[1].isnan().all()


@triton.jit
def _guess_kernel(x_ptr, out_ptr, alpha_ptr, error, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, alpha = tl.load(x_ptr + at), tl.load(alpha_ptr)
    inverse = ((1.0 / alpha).to(tl.int32, bitcast=True) + error).to(tl.float32, bitcast=True)
    k = signed_code_by_guess(widen(x), alpha, inverse, x.dtype, BITS)
    tl.store(out_ptr + at, k.to(tl.int32) + 2 ** (BITS - 1) - 1)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_half_has_its_code_whatever_the_last_bits_of_the_inverse(dtype):
    """Levels move most where k * alpha just exceeds a power of two, and where they are subnormal."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    number = ~x.isnan()
    for alpha in (1.0, 1.00393, 1.0079, 1.9844, 0.3, 6.01e-8):
        alpha = torch.tensor([alpha])
        want = reference.qsigned_forward(x[number], alpha, 8, None, False, True, None)[3]
        for error in (-4, 4):
            out = torch.empty(x.shape, dtype=torch.int32)
            _guess_kernel[(1,)](x, out, alpha, error, BITS=8, BLOCK=2**16)
            assert torch.equal(out[number].to(torch.uint8), want)


# ------------------------------------------------------------------------------------- dynamic alphas


@pytest.mark.parametrize("bits", (2, 3, 6, 8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic_alphas_of_all_magnitudes(dtype, bits):
    """Groups of one element: of the half dtypes all numbers; of the others special ones too, beside what a quotient
    rounds up to."""
    if dtype.itemsize == 2:
        x = torch.arange(-(2**15), 2**15, 1 if bits == 8 else 7, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        edges = torch.tensor([1, 2, 3, 65535, 65536, 65537, 2**23 - 1, 2**23, 2**23 + 1], dtype=torch.int32)
        edges = torch.cat([edges, 0x7F800000 - edges, edges[3:] + (3 << 23)]).view(torch.float32).to(dtype)
        edges = torch.cat([edges, numbers_of_all_magnitudes(2**12, bits).to(dtype)])
        on = edges * top_level(bits)
        beside = [torch.nextafter(on, torch.full_like(on, end)) for end in (-math.inf, math.inf)]
        x = torch.cat([edges, on, *beside, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype)])
        if dtype == torch.float64:
            special = torch.finfo(dtype)
            x = torch.cat([x, torch.tensor([5e-324, special.smallest_normal, special.max, 3.4e38 * 127], dtype=dtype)])
    alpha = assert_forward(x[:, None], None, bits, codes=bits > 4)[1]
    assert alpha.isnan().any() and (alpha == 0).any()


@pytest.mark.parametrize("bits", (2, 3, 6, 8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_groups(dtype, bits):
    """On and beside every threshold of alphas that bfloat16 has, in groups with other kinds of groups around them."""
    rows = []
    for alpha in (1.0, 0.3, 1.9921875, 2.0**-23, 1e-39, 400.0, 1e37):
        alpha = torch.tensor(alpha, dtype=torch.bfloat16).item()
        x, top = hard_signed_inputs(alpha, bits, dtype), torch.tensor(top_level(bits) * alpha, dtype=dtype)
        rows.append(torch.where(x.abs() <= top, x, top))
    rows += [torch.zeros_like(rows[0]), torch.full_like(rows[0], math.inf), rows[0].clone()]
    rows[-1][3] = math.nan
    x = torch.stack(rows)
    for some in (x, x[::2], x[1:2]):
        assert_forward(some, None, bits)


SIZES = (  # shape, group
    ((5, 12), None), ((4, 64), 32), ((2, 3, 128), 64), ((3, 2, 9), 3), ((7, 5), 1), ((3, 11), None), ((33, 4), 2),
    ((600, 8), 4), ((3, 0), None), ((0, 8), 4), ((2, 4108), None), ((1, 4103), None), ((6,), None),
)  # fmt: skip


@pytest.mark.parametrize("shape, group", SIZES, ids=str)
def test_sizes_of_groups(shape, group):
    """Whole bytes and parts of them, several groups in a program, and a group that no tile holds."""
    for dtype, bits in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)):
        x = ordinary(*shape, dtype=dtype)
        x[..., -1:] *= 100
        if x.dim() > 1 and len(x) > 1:
            x[0] *= 1e-20
            x[-1, ..., :4] = 0
        _, alpha, _, codes = assert_forward(x, None, bits, group)
        assert signed.qsigned_forward(x, None, bits, group, False, False, None)[3].numel() == 0
        # A row of no elements has no group.
        back = codes, alpha, bits, group or max(1, shape[-1]), list(shape), dtype, None, torch.contiguous_format
        assert same(signed.qsigned_dequantize(*back), reference.qsigned_dequantize(*back))


def test_what_does_not_fit_is_refused():
    y, alpha, _, codes = signed.qsigned_forward(ordinary(4, 8), None, 4, 4, False, True, None)
    back = 4, 4, [4, 8], y.dtype, None, torch.contiguous_format
    with pytest.raises(ValueError, match="alpha must have 8 values, one for each group of 4, got 6"):
        signed.qsigned_dequantize(codes, alpha[:3], *back)
    with pytest.raises(ValueError, match="codes must be a uint8 tensor of 16 bytes"):
        signed.qsigned_dequantize(codes[:-1], alpha, *back)
    with pytest.raises(ValueError, match="bits must be an int in 2..8"):
        signed.qsigned_forward(y, None, 1, 4, False, True, None)


# ------------------------------------------------------------------------------------------- rotation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hadamard(dtype):
    for size, shape in ((1, (3,)), (2, (5, 6)), (32, (2, 3, 64)), (512, (3, 512)), (8192, (1, 8192)), (4, (0, 4))):
        x = ordinary(*shape, dtype=dtype)
        assert same(signed.hadamard(x, size), reference.hadamard(x, size))
    x = ordinary(6, 4, dtype=dtype)
    x[0, 0], x[1, 1], x[2, 2] = math.inf, -math.inf, math.nan
    x[3:] *= torch.finfo(dtype).smallest_normal
    assert same(signed.hadamard(x, 4), reference.hadamard(x, 4))
    assert same(signed.hadamard(x.t()[:, 2:], 2), reference.hadamard(x.t()[:, 2:], 2))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_hadamard_of_a_size_that_no_tile_holds(dtype, monkeypatch):
    """By three kernels, and by two in the test above."""
    monkeypatch.setattr(signed, "BLOCK", {2: 128, 4: 64})
    x = ordinary(2**13, dtype=dtype)
    assert same(signed.hadamard(x, 2**13), reference.hadamard(x, 2**13))
