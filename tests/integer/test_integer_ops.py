"""The integer ops against loops over Python integers, bit for bit."""

from __future__ import annotations

import zlib

import integer_oracle
import oracle
import pytest
import torch

import coarsegrad as cg
from coarsegrad._types import Rounding
from coarsegrad.integer import KERNELS

ops = torch.ops.coarsegrad
WEIGHT_BITS = (8, 4, 2, 1)
FORMS = ("affine", "thresholds")


@pytest.fixture(autouse=True)
def _backend(integer_backend):
    return integer_backend


def generator(*seed):
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def random_codes(shape, bits, g):
    return torch.randint(0, 2**bits, shape, generator=g, dtype=torch.uint8)


def epilogue(acc, channels, levels, form, g):
    """(scale, offset, thresholds): every code occurs, and thresholds are on accumulators and one above."""
    low, high = (min(acc), max(acc)) if acc else (0, 1)
    spread = max(high - low, 1)
    scale = (levels / spread) * (0.5 + torch.rand(channels, generator=g))
    offset = levels * torch.rand(channels, generator=g) - low * scale
    if form == "affine":
        return scale, offset, None
    on = torch.tensor(acc or [0])[torch.randint(0, len(acc or [0]), (channels, levels), generator=g)]
    on = on + torch.randint(0, 2, (channels, levels), generator=g)
    return scale, offset, on.sort(1)[0].to(torch.int32)


def check_codes(got, acc, scale, offset, thresholds, levels, channel_dim):
    """got against the oracle's code of every accumulator; acc: nested lists of got's shape."""
    acc = torch.tensor(acc, dtype=torch.int64).reshape(got.shape).movedim(channel_dim, -1)
    rows = [None] * len(scale) if thresholds is None else thresholds.tolist()
    settings = list(zip(scale.tolist(), offset.tolist(), rows))
    wanted = [
        integer_oracle.code(value, *settings[i % len(settings)], levels)
        for i, value in enumerate(acc.flatten().tolist())
    ]
    assert got.dtype == torch.uint8
    assert torch.equal(got.movedim(channel_dim, -1).flatten(), torch.tensor(wanted, dtype=torch.uint8))


def check_floats(got, acc, scale, offset, channel_dim):
    acc = torch.tensor(acc, dtype=torch.int64).reshape(got.shape).movedim(channel_dim, -1)
    settings = list(zip(scale.tolist(), offset.tolist()))
    wanted = [integer_oracle.affine(v, *settings[i % len(settings)]) for i, v in enumerate(acc.flatten().tolist())]
    assert oracle.same_bits(got.movedim(channel_dim, -1).flatten(), torch.tensor(wanted, dtype=torch.float32))


def flat(nested):
    return [value for part in nested for value in flat(part)] if isinstance(nested, list) else [nested]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
@pytest.mark.parametrize("bits", (1, 4, 8))
@pytest.mark.parametrize("shape", ((3, 1, 1), (5, 33, 7), (2, 300, 13), (0, 9, 4), (1, 256, 32)), ids=str)
def test_linear(shape, bits, weight_bits, form):
    n, inputs, outputs = shape
    g = generator(n, inputs, bits, weight_bits)
    codes = random_codes((n, inputs), bits, g)
    weights = integer_oracle.random_weights((outputs, inputs), weight_bits, g)
    packed = integer_oracle.packed(weights, weight_bits)
    acc = integer_oracle.linear(codes, weights)
    levels = 2**bits - 1
    scale, offset, thresholds = epilogue(flat(acc), outputs, levels, form, g)
    got = ops.integer_linear(codes, packed, bits, weight_bits, scale, offset, thresholds, levels)
    check_codes(got, acc, scale, offset, thresholds, levels, -1)
    got = ops.integer_linear_float(codes, packed, bits, weight_bits, scale, offset)
    check_floats(got, acc, scale, offset, -1)


CONVOLUTIONS = (
    # channels in, out, size, kernel, stride, padding, dilation, groups
    (1, 3, (5, 5), (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (5, 7, (6, 5), (3, 2), (2, 1), (1, 2), (1, 1), 1),
    (6, 4, (7, 7), (3, 3), (1, 2), (2, 2), (2, 1), 2),
    (6, 12, (4, 5), (3, 3), (1, 1), (1, 1), (1, 1), 6),
    (33, 9, (1, 6), (1, 3), (1, 1), (0, 1), (1, 1), 1),
    (40, 8, (3, 3), (1, 1), (2, 2), (0, 0), (1, 1), 1),
)


FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv2d(case, weight_bits, memory_format):
    """The form of the epilogue goes round: each meets every case, width and format."""
    inputs, outputs, size, kernel, stride, padding, dilation, groups = case
    places = CONVOLUTIONS.index(case), WEIGHT_BITS.index(weight_bits), FORMATS.index(memory_format)
    form = FORMS[sum(places) % 2]
    bits, levels = 4, 15
    g = generator(*case, weight_bits)
    codes = random_codes((2, inputs, *size), bits, g).contiguous(memory_format=memory_format)
    weights = integer_oracle.random_weights((outputs, inputs // groups, *kernel), weight_bits, g)
    packed = integer_oracle.packed(weights, weight_bits)
    acc = integer_oracle.conv2d(codes, weights, stride, padding, dilation, groups)
    scale, offset, thresholds = epilogue(flat(acc), outputs, levels, form, g)
    layer, window = (codes, packed, bits, weight_bits, scale, offset), (kernel, stride, padding, dilation, groups)
    got = ops.integer_conv2d(*layer, thresholds, levels, *window)
    check_codes(got, acc, scale, offset, thresholds, levels, 1)
    assert got.is_contiguous(memory_format=torch.channels_last)
    got = ops.integer_conv2d_float(*layer, *window)
    check_floats(got, acc, scale, offset, 1)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
def test_largest_sums(weight_bits):
    """All codes and weights at their extremes: nothing saturates on the way."""
    inputs = 2**31 // (255 * 127) - 1 if weight_bits == 8 else 70_001
    codes = torch.full((1, inputs), 255, dtype=torch.uint8)
    for end in integer_oracle.WEIGHT_RANGE[weight_bits]:
        row = torch.tensor(integer_oracle.pack_row([end] * inputs, weight_bits), dtype=torch.uint8)[None]
        total = 255 * end * inputs
        thresholds = torch.tensor([[total, total + 1]], dtype=torch.int32)
        one, zero = torch.ones(1), torch.zeros(1)
        assert ops.integer_linear(codes, row, 8, weight_bits, one, zero, thresholds, 2).item() == 1
        got = ops.integer_linear_float(codes, row, 8, weight_bits, one, zero)
        assert got.item() == torch.tensor(total).float().item()


@pytest.mark.parametrize("bits", (6, 7, 8))
def test_corners(bits):
    """Codes of q and weights of 127, in pairs of either sign: vpmaddubsw saturates for 8 bits, and just not for 7."""
    top, one, zero = 2**bits - 1, torch.ones(1), torch.zeros(1)
    for channels, groups in ((64, 1), (64, 64)):
        codes = torch.full((1, channels, 4, 4), top, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        for pair in ((127, 127), (-127, -127), (127, -127)):
            row = torch.tensor(pair).repeat(8 * channels // groups)  # 4 x 4 pixels
            total = top * int(row.sum())
            weights = row.view(1, channels // groups, 4, 4).expand(channels, -1, -1, -1).contiguous()
            packed = integer_oracle.packed(weights, 8)
            layer = (packed, bits, 8, one.expand(channels).contiguous(), zero.expand(channels).contiguous())
            got = ops.integer_conv2d_float(codes, *layer, (4, 4), (1, 1), (0, 0), (1, 1), groups)
            assert set(got.flatten().tolist()) == {float(total)}
    row = torch.full((1, 1024), 127)
    for sign in (1, -1):
        got = ops.integer_linear_float(
            torch.full((1, 1024), top, dtype=torch.uint8), integer_oracle.packed(sign * row, 8), bits, 8, one, zero
        )
        assert got.item() == sign * 1024 * top * 127


def test_affine_is_two_roundings_and_not_one():
    """acc * scale is rounded to float32 before offset is added."""
    codes = torch.tensor([[3]], dtype=torch.uint8)
    weight = integer_oracle.packed(torch.tensor([[1]]), 8)
    scale = torch.tensor([1 / 3])
    assert 3 * scale.double().item() > 1
    got = ops.integer_linear(codes, weight, 2, 8, scale, torch.zeros(1), None, 3)
    assert got.item() == 1
    assert ops.integer_linear_float(codes, weight, 2, 8, scale, -torch.ones(1)).item() == 0


@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
def test_scales_below_zero(weight_bits):
    """Codes fall as sums rise, after a BatchNorm with a negative gain."""
    g = generator(weight_bits)
    codes = random_codes((9, 70), 3, g)
    weights = integer_oracle.random_weights((37, 70), weight_bits, g)
    acc, packed = integer_oracle.linear(codes, weights), integer_oracle.packed(weights, weight_bits)
    scale, offset, _ = epilogue([-value for value in flat(acc)], 37, 15, "affine", g)
    layer = (codes, packed, 3, weight_bits, -scale, offset)
    got = ops.integer_linear(*layer, None, 15)
    check_codes(got, acc, -scale, offset, None, 15, -1)
    assert len(got.unique()) > 4
    check_floats(ops.integer_linear_float(*layer), acc, -scale, offset, -1)


@pytest.mark.parametrize("shape", ((2, 3, 7), (7,), (2, 0, 7), (3, 1, 2, 7)), ids=str)
def test_linear_takes_any_shape_and_strides(shape):
    g = generator(*shape)
    codes = random_codes(shape, 4, g)
    weight = integer_oracle.packed(integer_oracle.random_weights((5, 7), 8, g), 8)
    scale, offset = torch.rand(5, generator=g), torch.rand(5, generator=g)
    wanted = ops.integer_linear(codes.reshape(-1, 7), weight, 4, 8, scale, offset, None, 15).reshape(*shape[:-1], 5)
    assert torch.equal(ops.integer_linear(codes, weight, 4, 8, scale, offset, None, 15), wanted)
    strided = torch.stack([codes, codes], -1)[..., 0]
    assert torch.equal(ops.integer_linear(strided, weight, 4, 8, scale, offset, None, 15), wanted)
    transposed = codes.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(ops.integer_linear(transposed, weight, 4, 8, scale, offset, None, 15), wanted)


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("bits", (1, 3, 4, 8))
def test_quantize_is_the_code_of_qrelu(bits, dtype, rounding):
    alpha = torch.tensor([0.3, 0.7, 1.1])
    points = oracle.threshold_points(alpha, bits, dtype, rounding)
    x = torch.cat([points, oracle.special_values(dtype).expand(3, -1)], 1)[None]
    got = ops.integer_quantize(x, alpha, bits, Rounding[rounding], 1)
    assert torch.equal(got.long(), oracle.codes(x, alpha, bits, rounding, 1))


def test_quantize_has_the_memory_format_of_x():
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
        got = ops.integer_quantize(x, torch.tensor([0.4]), 3, Rounding.ceil, None)
        assert got.stride() == x.stride()
        assert torch.equal(got.long(), oracle.codes(x, torch.tensor([0.4]), 3, "ceil"))


# Sizes around the blocks in which bytes are transposed.
@pytest.mark.parametrize(
    "shape", ((2, 3, 4, 5), (2, 16, 4, 4), (1, 17, 5, 7), (3, 40, 9, 11), (2, 33, 1, 20), (0, 20, 5, 5))
)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_layouts_of_codes(shape, memory_format):
    g = generator(shape)
    codes = random_codes(shape, 8, g).contiguous(memory_format=memory_format)
    for view in (codes, codes.transpose(2, 3), codes[:, 1:]):
        got = ops.integer_dequantize(view, 0.3, True)
        assert got.is_contiguous() and torch.equal(got, view.float() * 0.3)
        assert torch.equal(ops.integer_dequantize(view, 0.3, False), view.float() * 0.3)
        weights = integer_oracle.random_weights((3, view.size(1), 1, 1), 8, g)
        layer = integer_oracle.packed(weights, 8), 8, 8, torch.ones(3), torch.zeros(3)
        got = ops.integer_conv2d_float(view, *layer, [1, 1], [1, 1], [0, 0], [1, 1], 1)
        wanted = torch.einsum("nchw,oc->nohw", view.double(), weights.flatten(1).double())
        assert torch.equal(got.double(), wanted)


def samples(name):
    g = generator(name)
    scale, offset = torch.rand(6, generator=g), torch.rand(6, generator=g)
    if name == "integer_quantize":
        yield (torch.randn(2, 3, 4, 5), torch.tensor([0.4]), 3, Rounding.nearest, None)
        yield (
            torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).bfloat16(),
            ALPHAS,
            2,
            Rounding.ceil,
            1,
        )
        return
    if name == "integer_dequantize":
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for contiguous in (False, True):
                yield (random_codes((2, 4, 5, 6), 3, g).contiguous(memory_format=memory_format), 0.3, contiguous)
        return
    thresholds = torch.arange(18, dtype=torch.int32).view(6, 3)
    for weight_bits, staircase in ((8, (None, 3)), (2, (thresholds, 3))):
        extra = () if name.endswith("float") else staircase
        if "linear" in name:
            weight = integer_oracle.packed(integer_oracle.random_weights((6, 10), weight_bits, g), weight_bits)
            yield (random_codes((3, 2, 10), 2, g), weight, 2, weight_bits, scale, offset, *extra)
            continue
        weight = integer_oracle.packed(integer_oracle.random_weights((6, 2, 3, 3), weight_bits, g), weight_bits)
        memory_format = torch.channels_last if weight_bits == 2 else torch.contiguous_format
        codes = random_codes((2, 4, 5, 6), 2, g).contiguous(memory_format=memory_format)
        yield (codes, weight, 2, weight_bits, scale, offset, *extra, [3, 3], [2, 1], [1, 0], [1, 1], 2)


ALPHAS = torch.tensor([0.3, 0.4, 0.5])


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_opcheck(name):
    for arguments in samples(name):
        torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    (
        ({"codes": torch.zeros(2, 10)}, TypeError, "codes must be torch.uint8, got torch.float32"),
        ({"codes": torch.zeros((), dtype=torch.uint8)}, ValueError, "codes must have at least one dimension"),
        ({"codes": torch.zeros(2, 40, dtype=torch.uint8)}, ValueError, r"weight must have shape \[C, 64\] for 40"),
        ({"weight": torch.zeros(6, 10, dtype=torch.uint8)}, ValueError, r"\[C, 32\] for 10 weights of 8 bits, got"),
        ({"weight": torch.zeros(6, 32, dtype=torch.int8)}, TypeError, "weight must be torch.uint8"),
        ({"bits": 9}, ValueError, "bits must be an int in 1..8, got 9"),
        ({"weight_bits": 3}, ValueError, "weight_bits must be one of 8, 4, 2, 1, got 3"),
        ({"scale": torch.ones(5)}, ValueError, r"scale must have shape \[6\], got \[5\]"),
        ({"offset": torch.ones(6).double()}, TypeError, "offset must be torch.float32, got torch.float64"),
        ({"thresholds": torch.zeros(6, 4, dtype=torch.int32)}, ValueError, r"thresholds must have shape \[6, 3\]"),
        ({"thresholds": torch.zeros(6, 3, dtype=torch.int64)}, TypeError, "thresholds must be torch.int32"),
        ({"levels": 256}, ValueError, "levels must be in 1..255, got 256"),
    ),
    ids=lambda value: str(list(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_of_linear(change, error, words):
    arguments = {
        "codes": torch.zeros(2, 10, dtype=torch.uint8), "weight": torch.zeros(6, 32, dtype=torch.uint8), "bits": 4,
        "weight_bits": 8, "scale": torch.ones(6), "offset": torch.ones(6), "thresholds": None, "levels": 3,
    } | change  # fmt: skip
    with pytest.raises(error, match=words):
        ops.integer_linear(**arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    (
        ({"codes": torch.zeros(4, 5, 6, dtype=torch.uint8)}, r"codes must be \[N, C, H, W\], got shape \[4, 5, 6\]"),
        ({"kernel_size": [3, 7]}, "weight must have shape|kernel_size must be at most the padded input"),
        ({"stride": [0, 1]}, r"stride must be two ints >= 1, got \[0, 1\]"),
        ({"padding": [-1, 0]}, r"padding must be two ints >= 0, got \[-1, 0\]"),
        ({"groups": 3}, "groups must divide the channels of codes, 4, and of weight, 6, got 3"),
        ({"dilation": [4, 1]}, "kernel_size must be at most the padded input"),
    ),
    ids=lambda value: str(list(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_of_conv2d(change, words):
    arguments = {
        "codes": torch.zeros(2, 4, 5, 6, dtype=torch.uint8), "weight": torch.zeros(6, 64, dtype=torch.uint8),
        "bits": 4, "weight_bits": 8, "scale": torch.ones(6), "offset": torch.ones(6), "kernel_size": [3, 3],
        "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=words):
        ops.integer_conv2d_float(**arguments)


def test_use_backend_covers_the_integer_ops():
    x, alpha = torch.tensor([0.5]), torch.tensor([-1.0])
    with cg.use_backend("reference"), pytest.raises(ValueError, match="alpha must be finite and > 0"):
        ops.integer_quantize(x, alpha, 4, Rounding.ceil, None)
