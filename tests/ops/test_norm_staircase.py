"""A norm and its staircase in one pass: every output to the bit, on every backend."""

from __future__ import annotations

import itertools
import math

import oracle
import oracle_signed
import pytest
import torch

import coarsegrad as cg

LANES = 1024
KINDS = ("rms", "layer")


# --------------------------------------------------------------------------- the specification, number by number


def row_sum(columns: list[torch.Tensor]) -> torch.Tensor:
    """The sum of columns of wide numbers."""
    lanes = [torch.zeros_like(columns[0]) for _ in range(LANES)]
    for i, column in enumerate(columns):
        lanes[i % LANES] = lanes[i % LANES] + column
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [low + high for low, high in zip(lanes[:half], lanes[half:])]
    return lanes[0]


def root(x: torch.Tensor) -> torch.Tensor:
    """Rounded once, which torch's own root is not; of float32 by way of float64, which is harmless."""
    return torch.tensor([v if v != v or v < 0 else math.sqrt(v) for v in x.tolist()], dtype=torch.float64).to(x.dtype)


def norm(x, weight, bias, eps, kind, shifted, twice):
    """(output, mean, inverse) of [rows, n]."""
    wide = oracle.wide(x.dtype)
    columns, count = [c.to(wide) for c in x.unbind(1)], torch.tensor(x.size(1), dtype=wide)
    mean = row_sum(columns) / count if kind == "layer" else None
    if mean is not None:
        columns = [c - mean for c in columns]
    variance = row_sum([c * c for c in columns]) / count
    deviation = root(variance + torch.tensor(eps, dtype=wide))
    inverse = torch.ones_like(deviation) / deviation
    out = []
    for i, column in enumerate(columns):
        n = column * inverse
        if twice:
            n = n.to(x.dtype).to(wide)
        if weight is not None:
            n = n * (weight[i].to(wide) + (1 if shifted else 0))
        if bias is not None:
            n = n + bias[i].to(wide)
        out.append(n.to(x.dtype))
    return torch.stack(out, 1), None if mean is None else mean[:, None], inverse[:, None]


def expected(x, weight, bias, eps, kind, shifted, twice, bits, group, rotation):
    """(output, y, packed codes, alphas, mean, inverse) of [rows, n]."""
    output, mean, inverse = norm(x, weight, bias, eps, kind, shifted, twice)
    rotated = output if rotation is None else oracle_signed.rotated(output, rotation)
    y, codes, alpha = oracle_signed.dynamic(rotated, bits, group or x.size(1))
    packed = torch.tensor(list(oracle.pack(codes.flatten().tolist(), oracle.CODE_WIDTH[bits])), dtype=torch.uint8)
    return output, y, packed, alpha, torch.empty(0, dtype=inverse.dtype) if mean is None else mean, inverse


def op(x, weight, bias, eps, kind, shifted, twice, bits, group, rotation, output=True, codes=True):
    return torch.ops.coarsegrad.norm_qsigned(
        x, weight, bias, eps, kind == "layer", shifted, twice, bits, group, rotation, output, codes
    )


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same(got, wanted):
    names = ("output", "y", "codes", "alpha", "mean", "inverse")
    wrong = [name for name, a, b in zip(names, got, wanted, strict=True) if not oracle.same_bits(a, b)]
    assert not wrong, wrong


# ----------------------------------------------------------------------------------------------------- forward

# (shape, group, rotation): rows with fewer elements than lanes, as many, and more; of whole bytes of codes and not; as
# chunks of many rows and of one, and longer than any chunk.
SHAPES = (
    *(((3, 64), 32, None), ((5, 7), None, None), ((4, 36), 12, 4), ((9, 1), None, None), ((33, 5), 5, None)),
    *(((3, 1024), 128, 128), ((2, 1027), None, None), ((2, 1100), 50, 4), ((130, 96), 32, 32)),
    *(((2, 3000), None, 8), ((3, 2048), 1024, 2048), ((2, 4099), None, None)),
    *(((2, 130), None, None), ((2, 700), 100, 4), ((1, 900), None, None)),  # some lanes have nothing to be added
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_against_the_specification(backend, dtype, kind):
    """Every choice meets every shape and dtype at some bits."""
    choices = itertools.cycle(
        [(True, True, False, False), (True, False, False, True), (False, False, False, False), (True, True, True, True),
         (False, True, False, False), (True, False, True, False)]
    )  # fmt: skip
    for seed, (shape, group, rotation) in enumerate(SHAPES):
        if backend == "triton" and math.prod(shape) > 5000 and dtype != torch.bfloat16:
            continue
        has_weight, has_bias, shifted, twice = next(choices)
        x = random(*shape, dtype=dtype, seed=seed) * (10.0 ** (seed % 3)) + seed % 2
        weight = random(shape[1], dtype=dtype if seed % 4 else torch.float32, seed=90) if has_weight else None
        bias = random(shape[1], dtype=dtype, seed=91) if has_bias else None
        settings = (weight, bias, 1e-5, kind, shifted, twice, (2, 4, 8, 3, 5)[seed % 5], group, rotation)
        wanted = expected(x, *settings)
        assert_same(op(x, *settings), wanted)
        alone = op(x, *settings, output=False, codes=False)
        assert alone[0].numel() == alone[2].numel() == 0
        assert_same((wanted[0], alone[1], wanted[2], *alone[3:]), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_special_rows(backend, dtype, kind):
    """Rows of zeros, of one number, with NaN and infinities, huge and tiny."""
    info = torch.finfo(dtype)
    rows = random(14, 70, dtype=dtype)
    rows[0], rows[1], rows[2] = 0, -0.0, 3
    rows[3, 5], rows[4, 6], rows[5, 69] = math.nan, math.inf, -math.inf
    rows[6] *= info.max / 8
    rows[7] *= info.tiny
    rows[8] = torch.where(rows[8] > 0, 1, -1) * torch.tensor(info.max, dtype=dtype)
    rows[9] = info.smallest_normal * info.eps
    rows[10, ::2] = -0.0
    rows[11] = rows[11] * 1e-4 + 100
    rows[12] = 0
    rows[12, 3] = 1
    rows[13] = info.max
    for eps, twice, (bits, group) in itertools.product((1e-6, 0.0), (False, True), ((4, 35), (8, None))):
        weight, bias = random(70, dtype=dtype, seed=1), random(70, dtype=dtype, seed=2) if twice else None
        settings = (weight, bias, eps, kind, False, twice, bits, group, None)
        assert_same(op(rows, *settings), expected(rows, *settings))


# Three NaNs, of which the last two would be zeros if they were rounded as numbers are, and both infinities.
NOT_FINITE = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800000, -0x800000], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_parameters_that_are_not_finite(backend, dtype, kind):
    """In whole vectors and after the last."""
    rows = random(2, 37, dtype=dtype)
    rows[:, ::3] = 0
    for value, in_bias, twice in itertools.product(NOT_FINITE, (False, True), (False, True)):
        weight, bias = random(37, seed=1), random(37, seed=2)
        (bias if in_bias else weight)[[0, 5, 36]] = value
        settings = (weight, bias if in_bias else None, 1e-6, kind, False, twice, 4, None, None)
        assert_same(op(rows, *settings), expected(rows, *settings))


def test_the_staircase_is_that_of_the_own_output(backend):
    for dtype, group, rotation in itertools.product((torch.float32, torch.bfloat16), (None, 16), (None, 16)):
        x, weight = random(5, 7, 48, dtype=dtype), random(48, dtype=dtype, seed=1)
        got = op(x, weight, None, 1e-6, "rms", False, True, 4, group, rotation)
        rotated = got[0] if rotation is None else cg.hadamard(got[0], rotation)
        assert torch.equal(got[1], cg.qsigned(rotated, None, 4, group=group))
        codes, alpha = cg.qsigned_codes(rotated, None, 4, group=group)
        assert torch.equal(got[2], codes) and torch.equal(got[3], alpha)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 4), (8,), (2, 3, 4, 8)], ids=str)
def test_shapes(backend, shape):
    for kind in KINDS:
        x, weight = random(*shape), random(shape[-1], seed=1)
        settings = (weight, None, 1e-5, kind, False, False, 4, None, None)
        got = op(x, *settings)
        assert [t.shape for t in got[:2]] == [x.shape] * 2 and got[5].shape == (*shape[:-1], 1)
        assert got[4].shape == (got[5].shape if kind == "layer" else (0,))
        assert got[3].shape == (*shape[:-1], 1 if shape[-1] else 0) and got[2].numel() == (x.numel() + 1) // 2
        if x.numel():
            wanted = expected(x.reshape(-1, shape[-1]), *settings)
            assert_same([g.reshape(w.shape) for g, w in zip(got, wanted)], wanted)


def test_layouts(backend):
    """The results are contiguous, whatever x is."""
    x = random(4, 6, 5, 16)
    for given in (
        x.transpose(0, 1),
        x[..., ::2],
        x.permute(0, 3, 1, 2),
        x.contiguous(memory_format=torch.channels_last),
    ):
        settings = (None, None, 1e-5, "layer", False, False, 4, None, None)
        got, wanted = op(given, *settings), op(given.contiguous(), *settings)
        assert_same(got, wanted)
        assert all(t.is_contiguous() for t in got)


def test_without_a_staircase(backend):
    x, weight, bias = random(6, 50), random(50, seed=1), random(50, seed=2)
    for kind in KINDS:
        settings = (weight, bias, 1e-5, kind, True, False)
        output, *rest, mean, inverse = op(x, *settings, None, None, None, True, False)
        wanted = norm(x, *settings)
        assert oracle.same_bits(output, wanted[0]) and oracle.same_bits(inverse, wanted[2])
        assert [t.numel() for t in rest] == [0, 0, 0] and (kind == "rms" or oracle.same_bits(mean, wanted[1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_it_is_the_norm_of_torch(backend, dtype, kind):
    """Up to the order of sums."""
    module = torch.nn.RMSNorm(100, eps=1e-6) if kind == "rms" else torch.nn.LayerNorm(100, eps=1e-6)
    module = module.to(dtype)
    with torch.no_grad():
        module.weight.copy_(random(100, seed=1))
    x = random(20, 100, dtype=dtype)
    got = op(x, module.weight, getattr(module, "bias", None), 1e-6, kind, False, False, None, None, None, True, False)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got[0], module(x).detach(), rtol=4 * tolerance, atol=4 * tolerance)


def test_threads_give_the_same_bits(backend):
    if not backend.startswith("native"):
        pytest.skip("of native kernels")
    x = random(700, 192, dtype=torch.bfloat16)
    settings = (random(192, seed=1), None, 1e-5, "layer", False, False, 4, 64, 64)
    wanted = op(x, *settings)
    torch.set_num_threads(3)
    try:
        assert_same(op(x, *settings), wanted)
        long = random(3, 70_001)  # as many as are normed before any is quantized
        settings = (None, None, 1e-5, "rms", False, False, 2, None, None)
        assert_same(op(long, *settings), cg.reference.norm_qsigned(long, None, None, 1e-5, False, False, False, 2, None,
                                                                   None, True, True))  # fmt: skip
    finally:
        torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------- errors


def test_bad_arguments(backend):
    x, weight = random(2, 8), random(8)
    good = (x, weight, None, 1e-5, "rms", False, False, 4, None, None)
    for place, wrong, error, words in (
        (0, x.long(), TypeError, "x must be"),
        (0, x[0, 0], ValueError, "x must have at least one dimension"),
        (1, random(7), ValueError, r"weight must have shape \[8\] \(x's last dimension\), got \[7\]"),
        (2, random(8, 1), ValueError, r"bias must have shape \[8\]"),
        (2, weight.long(), TypeError, "bias must be of a floating dtype"),
        (7, 1, ValueError, "bits must be an int in 2..8"),
        (8, 3, ValueError, "group must be >= 1 and divide x's last dimension, 8, got 3"),
        (9, 3, ValueError, "size must be"),
        (9, 16, ValueError, "size must be >= 1 and divide x's last dimension, 8, got 16"),
    ):
        arguments = [*good]
        arguments[place] = wrong
        with pytest.raises(error, match=words):
            op(*arguments)
    with pytest.raises(ValueError, match="output must be True if bits is None, got False"):
        op(*good[:7], None, None, None, False, False)
