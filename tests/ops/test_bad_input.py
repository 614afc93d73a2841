"""Bad input is an error that names the argument, what was got and what was wanted; nothing is changed."""

from __future__ import annotations

import math
import re

import oracle
import pytest
import torch

import coarsegrad as cg

GOOD = torch.tensor([0.5])


def sample(dtype=torch.float32):
    return torch.linspace(-1, 2, 12).reshape(3, 4).to(dtype)


def assert_refused(kind, words, **arguments):
    """Refused with `words` in the message, out of place, in place and with gradients; x stays as it was."""
    x = arguments.pop("x", None)
    x = sample() if x is None else x
    alpha = arguments.pop("alpha", GOOD)
    bits = arguments.pop("bits", 2)
    before = x.clone()
    for inplace in (False, True):
        for need in (False, True):
            floating = isinstance(alpha, torch.Tensor) and alpha.is_floating_point() and x.is_floating_point()
            if need and not floating:
                continue
            given = x.clone().requires_grad_() * 1 if need else x.clone()
            step = alpha.detach().clone().requires_grad_() if need else alpha
            version = given._version
            with pytest.raises(kind) as error:
                cg.qrelu(given, step, bits, inplace=inplace, **arguments)
            for word in words:
                assert re.search(word, str(error.value)), f"{word!r} is not in: {error.value}"
            if x.device.type != "meta":
                assert torch.equal(given.detach(), before)
            assert given._version == version


@pytest.mark.parametrize("value", [0.0, -0.0, -0.5, math.nan, math.inf, -math.inf])
def test_alpha_values(reference_or_native, value):
    shown = re.escape(f"{value:g}")
    assert_refused(ValueError, ["alpha", "> 0|positive", shown], alpha=torch.tensor([value]))
    per_channel = torch.tensor([0.5, 0.5, value, 0.5])
    assert_refused(ValueError, ["alpha", shown], alpha=per_channel, channel_dim=1)
    with pytest.raises(ValueError, match="alpha"):
        cg.qrelu_codes(sample(), torch.tensor([value]), 2)
    with pytest.raises(ValueError, match="alpha"):
        cg.dequantize(torch.zeros(3, dtype=torch.uint8), torch.tensor([value]), 2, (3, 4), torch.float32)


def test_alpha_that_vanishes_in_float32(reference_or_native):
    assert_refused(ValueError, ["alpha"], alpha=torch.tensor([1e-300], dtype=torch.float64))
    assert_refused(ValueError, ["alpha"], alpha=torch.tensor([1e300], dtype=torch.float64))
    alpha = torch.tensor([1e-300], dtype=torch.float64)
    assert cg.qrelu(torch.ones(1, dtype=torch.float64), alpha, 2).item() == 3e-300


def test_alpha_shapes(reference_or_native):
    assert_refused(ValueError, ["alpha", r"\[1\]|\(1,\)"], alpha=torch.tensor(0.5))
    assert_refused(ValueError, ["alpha", r"\[1\]|\(1,\)", "4"], alpha=torch.full((4,), 0.5))
    assert_refused(ValueError, ["alpha", r"1, 1"], alpha=torch.full((1, 1), 0.5))
    assert_refused(ValueError, ["alpha"], alpha=torch.zeros(0))
    assert_refused(ValueError, ["alpha", "4", "3"], alpha=torch.full((3,), 0.5), channel_dim=1)
    assert_refused(ValueError, ["alpha", "3", "4"], alpha=torch.full((4,), 0.5), channel_dim=0)
    assert_refused(ValueError, ["alpha"], alpha=torch.full((1,), 0.5), channel_dim=1)
    assert_refused(ValueError, ["alpha"], alpha=torch.tensor(0.5), channel_dim=1)


def test_alpha_kinds(reference_or_native):
    assert_refused((TypeError, ValueError), ["alpha", "float", "int64"], alpha=torch.tensor([1]))
    assert_refused((TypeError, ValueError), ["alpha", "float", "bool"], alpha=torch.tensor([True]))
    assert_refused((TypeError, ValueError), ["alpha", "float", "complex64"], alpha=torch.ones(1, dtype=torch.complex64))
    assert_refused(TypeError, ["alpha", "float|str"], alpha="0.5")
    for wrong in (None, True, [0.5], 1j):
        assert_refused(TypeError, ["alpha"], alpha=wrong)
    for wrong in (0.0, -1, math.nan, math.inf):
        assert_refused(ValueError, ["alpha", "> 0"], alpha=wrong)


def test_alpha_on_another_device(reference_or_native):
    assert_refused(ValueError, ["alpha", "device", "meta", "cpu"], alpha=torch.empty(1, device="meta"))
    assert_refused(ValueError, ["alpha", "device", "meta", "cpu"], x=torch.empty(3, 4, device="meta"))


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, 2.0, True, "4", None, 100])
def test_bits(reference_or_native, bits):
    words = ["bits", "1", "8", re.escape(repr(bits))]
    assert_refused((ValueError, TypeError), words, bits=bits)
    with pytest.raises((ValueError, TypeError), match="bits"):
        cg.qrelu_codes(sample(), GOOD, bits)
    with pytest.raises((ValueError, TypeError), match="bits"):
        cg.dequantize(torch.zeros(3, dtype=torch.uint8), GOOD, bits, (3, 4), torch.float32)
    with pytest.raises((ValueError, TypeError), match="bits"):
        cg.QReLU(bits)


@pytest.mark.parametrize("word", ["", "Relu", "no_such", "ceil ", 3, None, ["relu"]])
def test_unknown_words_list_the_known_ones(reference_or_native, word):
    shown = re.escape(repr(word))
    assert_refused((ValueError, TypeError), ["ste", shown, *oracle.STES], ste=word)
    assert_refused((ValueError, TypeError), ["rounding", shown, *oracle.ROUNDINGS], rounding=word)
    assert_refused((ValueError, TypeError), ["alpha_grad", shown, *oracle.ALPHA_GRADS], alpha_grad=word)
    with pytest.raises((ValueError, TypeError), match="(?s)rounding.*ceil.*nearest.*hwgq"):
        cg.qrelu_codes(sample(), GOOD, 2, rounding=word)
    for name, known in (
        ("ste", oracle.STES),
        ("rounding", oracle.ROUNDINGS),
        ("alpha_grad", oracle.ALPHA_GRADS),
    ):
        with pytest.raises((ValueError, TypeError), match=f"(?s){name}.*" + ".*".join(known)):
            cg.QReLU(2, **{name: word})


@pytest.mark.parametrize("scale", ["LSQ", "", math.nan, math.inf, None, [1.0]])
def test_alpha_scale(reference_or_native, scale):
    assert_refused((ValueError, TypeError), ["alpha_scale"], alpha_scale=scale)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_x_that_is_not_floating(reference_or_native, dtype):
    name = str(dtype).removeprefix("torch.")
    assert_refused((TypeError, ValueError), [r"\bx\b", "float", name], x=sample().abs().to(dtype))
    with pytest.raises((TypeError, ValueError), match=r"\bx\b"):
        cg.qrelu_codes(sample().abs().to(dtype), GOOD, 2)


def test_x_that_is_no_dense_tensor(reference_or_native):
    for x in (3.0, [1.0], None):
        with pytest.raises(TypeError, match=r"\bx\b"):
            cg.qrelu(x, GOOD, 2)
    with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError), match="(?i)sparse"):
        cg.qrelu(torch.eye(3).to_sparse(), GOOD, 2)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        with pytest.raises((TypeError, ValueError), match=r"\bx\b.*float8"):
            cg.qrelu(torch.zeros(3).to(dtype), GOOD, 2)


@pytest.mark.parametrize("channel_dim", [2, -3, 100, 1.0, "1", True])
def test_channel_dim(reference_or_native, channel_dim):
    words = ["channel_dim", re.escape(repr(channel_dim))]
    alpha = torch.full((4,), 0.5)
    assert_refused((ValueError, TypeError, IndexError), words, alpha=alpha, channel_dim=channel_dim)
    with pytest.raises((ValueError, TypeError, IndexError), match="channel_dim"):
        cg.qrelu_codes(sample(), alpha, 2, channel_dim=channel_dim)
    with pytest.raises((ValueError, TypeError, IndexError), match="channel_dim"):
        cg.dequantize(torch.zeros(3, dtype=torch.uint8), alpha, 2, (3, 4), torch.float32, channel_dim=channel_dim)


def test_channel_dim_of_a_zero_d_x(reference_or_native):
    with pytest.raises((ValueError, IndexError), match="channel_dim"):
        cg.qrelu(torch.tensor(0.7), GOOD, 2, channel_dim=0)


def test_codes(reference_or_native):
    def dequantize(codes, shape=(3, 4), dtype=torch.float32, bits=2, **options):
        return cg.dequantize(codes, GOOD, bits, shape, dtype, **options)

    byte = torch.uint8
    assert dequantize(torch.zeros(3, dtype=byte)).shape == (3, 4)
    for wrong in (torch.int8, torch.int64, torch.float32, torch.bool):
        with pytest.raises((TypeError, ValueError), match="(?s)codes.*uint8"):
            dequantize(torch.zeros(3, dtype=wrong))
    for size in (0, 2, 4):
        with pytest.raises(ValueError, match=f"(?s)codes.*({size}.*3|3.*{size})"):
            dequantize(torch.zeros(size, dtype=byte))
    for wrong in (torch.zeros(3, 1, dtype=byte), torch.tensor(0, dtype=byte)):
        with pytest.raises((TypeError, ValueError), match="codes.*(1-d|one dim)"):
            dequantize(wrong, shape=(wrong.numel() * 4,))
    with pytest.raises(TypeError, match="codes"):
        dequantize([0, 0, 0])
    with pytest.raises(ValueError, match="device"):
        dequantize(torch.zeros(3, dtype=byte, device="meta"))
    for wrong in (torch.int64, torch.uint8, torch.complex64, "float32", None):
        with pytest.raises((TypeError, ValueError), match="dtype"):
            dequantize(torch.zeros(3, dtype=byte), dtype=wrong)
    for wrong in (torch.channels_last, torch.channels_last_3d, torch.preserve_format, None):
        with pytest.raises((TypeError, ValueError), match="memory_format"):
            dequantize(torch.zeros(3, dtype=byte), memory_format=wrong)
    for wrong in ((3, -4), (-3, -4), ("3", 4), 12.0, None):
        with pytest.raises((TypeError, ValueError), match="shape"):
            dequantize(torch.zeros(3, dtype=byte), shape=wrong)


@pytest.mark.parametrize(
    "alpha", [0.0, -1.0, math.nan, math.inf, "x", True, [0.5, -0.5], torch.tensor([[0.5]]), torch.zeros(1)]
)
def test_module_alpha(reference_or_native, alpha):
    with pytest.raises((ValueError, TypeError), match="alpha"):
        cg.QReLU(2, alpha=alpha)


def test_module_channels(reference_or_native):
    for wrong in (0, -1, 2.5, True, "4"):
        with pytest.raises((ValueError, TypeError), match="num_channels"):
            cg.QReLU(2, num_channels=wrong)
    with pytest.raises((ValueError, TypeError), match="alpha"):
        cg.QReLU(2, alpha=torch.tensor([0.1, 0.2]), num_channels=3)
    layer = cg.QReLU(2, num_channels=3)
    with pytest.raises(ValueError, match="alpha"):
        layer(torch.zeros(2, 4, 5))
    with pytest.raises((ValueError, IndexError), match="channel_dim"):
        layer(torch.zeros(3))


@pytest.mark.parametrize("op", ["qrelu", "qrelu_", "qrelu_codes"])
def test_the_ops_check_too(reference_or_native, op):
    """A call that goes round the public functions meets an error as well, never a crash."""
    call = getattr(torch.ops.coarsegrad, op)
    tail = (None,) if op == "qrelu_codes" else ("three_valued", 1.0, None)
    head = (0,) if op == "qrelu_codes" else ("relu", "ceil")
    before = sample()
    for x, alpha, bits in (
        (sample(), GOOD, 0),
        (sample(), GOOD, 9),
        (sample(), torch.tensor([0.0]), 2),
        (sample(), torch.tensor([]), 2),
        (sample(), torch.full((4,), 0.5), 2),
        (sample(), torch.tensor([1]), 2),
        (sample().long(), GOOD, 2),
        (sample(), torch.empty(1, device="meta"), 2),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
            call(x, alpha, bits, *head, *tail)
        assert torch.equal(x, before.to(x.dtype))
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        call(sample(), torch.full((4,), 0.5), 2, *head, *tail[:-1], 5)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        call(sample(), GOOD, 2, *((3,) if op == "qrelu_codes" else ("no_such", "no_such")), *tail)
