"""The native kernels of the signed staircase and of Hadamard's rotation, bit for bit against the reference."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coarsegrad import reference
from coarsegrad._types import DTYPES, top_level
from coarsegrad.testing import backend_ids, serving

ops = torch.ops.coarsegrad
NATIVE = [name for name in backend_ids() if name.startswith("native-")]
BITS = range(2, 9)


@pytest.fixture(scope="module", params=NATIVE or ["native"])
def native(request):
    """Each instruction set in turn."""
    if request.param == "native":
        pytest.skip("the native library is not in use")
    with serving(request.param):
        yield


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def agrees(x, alpha, bits, group=None, channel_dim=None):
    """Whether all that the kernels make of x is what the reference makes of it."""
    wanted = reference.qsigned_forward(x, alpha, bits, group, True, True, channel_dim)
    if alpha is None:  # nothing is outside
        inside = oracle.pack([1] * x.numel(), 1)
        wanted = *wanted[:2], torch.tensor(list(inside), dtype=torch.uint8), wanted[3]
    y, found, mask, codes = ops.qsigned_forward(x, alpha, bits, group, True, True, channel_dim)
    same = all(map(oracle.same_bits, (y, found, mask, codes), wanted)) and y.stride() == wanted[0].stride()
    alone = ops.qsigned_forward(x, alpha, bits, group, False, False, channel_dim)
    same &= oracle.same_bits(alone[0], y) and alone[2].numel() == alone[3].numel() == 0
    contiguous = y.is_contiguous()
    memory_format = torch.contiguous_format if contiguous else torch.channels_last
    if alpha is None:
        alpha, group = found, group or x.size(-1) or 1
    rest = (codes, alpha, bits, group, list(x.shape), x.dtype, channel_dim, memory_format)
    rebuilt = ops.qsigned_dequantize(*rest)
    return same and oracle.same_bits(rebuilt, reference.qsigned_dequantize(*rest)) and rebuilt.stride() == y.stride()


def points(alpha: float, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Every level and threshold with both neighbours in dtype, 1-d."""
    levels = reference.signed_levels(torch.tensor([alpha], dtype=torch.float64), bits, dtype)[0]
    on = torch.cat([levels, (levels[1:] + levels[:-1]) / 2]).to(dtype)
    on = on[on.isfinite()]
    return torch.cat([oracle.down(on), on, oracle.up(on)])


def alphas_of(dtype: torch.dtype) -> dict[str, float]:
    """Ordinary ones, and those with which levels collapse or overflow."""
    info = torch.finfo(dtype)
    least = oracle.up(torch.zeros(1, dtype=dtype)).item()
    below = max(info.max / 150, 1.0) if dtype == torch.float64 else min(info.max / 150, torch.finfo(torch.float32).max)
    return {"ordinary": 0.4866, "a power": 0.25, "least": least, "low": 1.3 * least, "tiny": info.tiny, "high": below}


@pytest.mark.parametrize("alpha", alphas_of(torch.float32))
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_alpha(native, dtype, alpha):
    value = alphas_of(dtype)[alpha]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    step = torch.tensor([value], dtype=wide)
    if not step > 0:
        pytest.skip("no alpha of the wide dtype")
    for bits in BITS:
        x = torch.cat([points(value, bits, dtype), oracle.special_values(dtype)])
        assert agrees(x, step, bits), bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_number_of_16_bits(native, dtype, bits):
    assert agrees(oracle.every_value(dtype), torch.tensor([0.0371]), bits)


LAYOUTS = {
    "first dim": ((5, 331), 0),
    "middle dim": ((3, 7, 45), 1),
    "middle dim, whole blocks": ((3, 5, 128), 1),
    "last dim": ((11, 37), -1),
    "last dim, whole blocks": ((9, 128), -1),
    "images": ((2, 24, 9, 7), 1),
    "scalar": ((), None),
    "empty": ((0, 3), 1),
    "no channels": ((4, 0), 1),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_given_alpha_layouts(native, threads, case, layout):
    shape, channel_dim = LAYOUTS[case]
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("of images alone")
    for dtype in DTYPES:
        x = torch.randn((*shape, 2), generator=torch.Generator().manual_seed(1)).to(dtype)[..., 0]
        if layout != "strided":
            x = x.contiguous(memory_format=getattr(torch, layout.replace("contiguous", "contiguous_format")))
        alpha = torch.linspace(0.05, 0.3, 1 if channel_dim is None else x.size(channel_dim))
        assert agrees(x, alpha, 4, None, channel_dim), dtype


def rows_with_everything(rows: int, size: int, group: int, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Groups of all scales with numbers on thresholds; some of zeros, with a NaN or an infinity, tiny or huge."""
    generator = torch.Generator().manual_seed(2)
    p, count = top_level(bits), rows * size // group
    info = torch.finfo(dtype)
    scale = torch.exp2(torch.randint(-12, 12, (count,), generator=generator).double())
    mantissa = 1 + torch.randint(0, 128, (count,), generator=generator) / 128
    halves = torch.randint(-2 * p, 2 * p + 1, (count, group), generator=generator) / 2
    halves[:, 0] = p
    x = ((scale * mantissa)[:, None] * halves).to(dtype)
    side = torch.randint(0, 3, (count, group), generator=generator)
    x = torch.where(side == 0, oracle.down(x), torch.where(side == 1, oracle.up(x), x))
    odd = torch.randperm(count, generator=generator)[: max(count // 3, 1)]
    for i, row in enumerate(odd.tolist()):
        at = i % group
        if i % 7 == 0:
            x[row] = math.copysign(0.0, i % 2 - 0.5)
        elif i % 7 in (1, 2):
            x[row, at] = math.nan if i % 7 == 1 else -math.inf
        elif i % 7 == 3:
            x[row, at] = info.max
        elif i % 7 == 4:
            x[row] = x[row].sign() * oracle.up(torch.zeros(1, dtype=dtype))
        elif i % 7 == 5:
            x[row] = (x[row].double() / scale[row] * info.tiny / 8).to(dtype)
        else:
            x[row] = (x[row].double() / scale[row] * info.max / (2.5 * p)).to(dtype)
    return x.reshape(rows, size)


# group: (rows, last dimension). In the last but one no chunk of whole groups and blocks is small.
GROUPS = {
    1: (7, 45),
    3: (301, 333),
    8: (9, 72),
    16: (5, 80),
    32: (401, 160),
    64: (40, 192),
    96: (10, 96),
    128: (300, 256),
    1536: (50, 1536),
    2049: (70, 2049),
    4096: (2, 8192),
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dynamic_alpha(native, threads, dtype, group):
    rows, size = GROUPS[group]
    for bits in (2, 4, 8) if rows * size < 50_000 else (4, 8):
        x = rows_with_everything(rows, size, group, bits, dtype)
        assert agrees(x, None, bits, None if group == size else group), bits


@pytest.mark.parametrize("group", [32, 64, 1536])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dynamic_alpha_of_ordinary_numbers(native, dtype, group):
    """Also small ones, of which float16's levels are subnormal."""
    for bits in BITS:
        x = torch.randn(37, 1536, generator=torch.Generator().manual_seed(bits))
        for scale in (1.0, 2.0**-17):
            assert agrees((x * scale).to(dtype), None, bits, group), (bits, scale)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 64), (2, 0, 5)])
def test_dynamic_alpha_of_nothing(native, shape):
    for dtype in DTYPES:
        assert agrees(torch.empty(shape, dtype=dtype), None, 4)


def test_dynamic_alpha_of_strided_x(native):
    x = torch.randn(64, 96, 2)
    for view in (x[..., 0], x[:, :, 1].t(), torch.randn(2, 8, 4, 32).to(memory_format=torch.channels_last)):
        assert agrees(view, None, 5, 32)


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES), bits=st.sampled_from(BITS), group=st.integers(1, 150), groups=st.integers(1, 5),
    rows=st.integers(1, 4), exponent=st.integers(-160, 130), seed=st.integers(0, 2**20), dynamic=st.booleans(),
)  # fmt: skip
def test_any_shape_and_scale(native, dtype, bits, group, groups, rows, exponent, seed, dynamic):
    x = torch.randn(rows, group * groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (x * 2.0**exponent).to(dtype)
    if dynamic:
        assert agrees(x, None, bits, group)
    else:
        scale = torch.tensor(2.0**exponent, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        alpha = (scale * torch.linspace(0.01, 1, rows, dtype=scale.dtype)).clamp(torch.finfo(scale.dtype).tiny / 1024)
        assert agrees(x, alpha.clamp(max=torch.finfo(scale.dtype).max), bits, None, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128, 512, 4096])
def test_hadamard(native, threads, dtype, size):
    x = torch.randn(33, 3 * size, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[1, 0], x[2, size - 1], x[3, 0] = math.inf, math.nan, torch.finfo(dtype).max
    for view in (x, x[:, :size], x[:0], torch.cat([x, x]).t().contiguous().t()):
        got = ops.hadamard(view, size)
        assert oracle.same_bits(got, reference.hadamard(view, size)) and got.is_contiguous()


BAD_FORWARDS = {
    "bits": ((torch.ones(4), None, 9, None), "bits must be an int in 1..8, got 9"),
    "1 bit": ((torch.ones(4), None, 1, None), "bits must be an int in 2..8 for the signed staircase, got 1"),
    "group and alpha": ((torch.ones(4), torch.ones(1), 4, 2), "group must be None if alpha is given, got 2"),
    "channel": ((torch.ones(4), None, 4, None, 0), "channel_dim must be None for a dynamic alpha, got 0"),
    "0-d": ((torch.tensor(1.0), None, 4, None), "x must have at least one dimension for a dynamic alpha, got a 0-d"),
    "group": ((torch.ones(4), None, 4, 3), "group must be >= 1 and divide x's last dimension, 4, got 3"),
    "group of 0": ((torch.ones(4), None, 4, 0), "group must be >= 1 and divide x's last dimension, 4, got 0"),
    "shape of alpha": ((torch.ones(4), torch.ones(2), 4, None), r"alpha must have shape \[1\]"),
    "value of alpha": ((torch.ones(4), torch.zeros(1), 4, None), "alpha must be finite and positive, got 0"),
    "one channel": (
        (torch.ones(2), torch.tensor([1.0, math.nan]), 4, None, 0),
        "alpha must be finite and positive, got nan at channel 1",
    ),
}


@pytest.mark.parametrize("case", BAD_FORWARDS)
def test_bad_forward(native, case):
    (x, alpha, bits, group, *channel_dim), message = BAD_FORWARDS[case]
    with pytest.raises(ValueError, match=message):
        ops.qsigned_forward(x, alpha, bits, group, False, False, *(channel_dim or [None]))


def test_bad_dtypes(native):
    with pytest.raises(TypeError, match="x must be float32, float64, bfloat16 or float16"):
        ops.qsigned_forward(torch.ones(4, dtype=torch.int32), None, 4, None, False, False, None)
    with pytest.raises(TypeError, match="x must be float32, float64, bfloat16 or float16"):
        ops.hadamard(torch.ones(4, dtype=torch.int32), 4)


def test_bad_dequantize(native):
    codes, contiguous = torch.zeros(4, dtype=torch.uint8), torch.contiguous_format
    for alpha, bits, group, count, message in (
        (torch.ones(1), 1, None, 8, "bits must be an int in 2..8"),
        (torch.ones(1), 4, None, 9, "codes must hold 5 bytes for 9 elements of 4 bits, got 4"),
        (torch.ones(3), 4, 4, 8, "alpha must have one value for each 4 of 8 elements, got 3"),
        (torch.ones(1), 4, 0, 8, "alpha must have one value for each 0 of 8 elements, got 1"),
        (torch.zeros(1), 4, None, 8, "alpha must be finite and positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.qsigned_dequantize(codes, alpha, bits, group, [count], torch.float32, None, contiguous)


def test_bad_hadamard(native):
    for x, size, message in (
        (torch.tensor(1.0), 1, "x must have at least one dimension, got a 0-d tensor"),
        (torch.ones(12), 8, "size must be >= 1 and divide x's last dimension, 12, got 8"),
        (torch.ones(12), 6, "size must be a power of two, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.hadamard(x, size)
